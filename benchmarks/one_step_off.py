"""`staleness=1`: does an iteration cost the longer of generation and training, and no more?

The engine stands for one in another process with cores of its own: it returns made-up completions after a fixed time
and needs no core for it. That time is half of what training takes, as much, and twice as much; with and without
staleness. Medians over the iterations.

    python benchmarks/one_step_off.py                                                    # the record
    python benchmarks/one_step_off.py --iterations 2 --layers 1 --width 64 --prompts 2   # smoke
"""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from _common import Bars, report, spread
from lightning.pytorch import Callback, Trainer

from lightrft_lightning import PromptDataModule, RLHFModule, RolloutCallback, SamplingParams
from lightrft_lightning.experience.trajectory import Completion
from lightrft_lightning.models.tiny import char_tokenizer, tiny_llama


class FixedLatency(RolloutCallback):
    """Completions of random tokens, after so many seconds for all of them."""

    generates_elsewhere = True
    drift_warning = None

    def __init__(self, seconds: float, length: int) -> None:
        self.seconds, self.length = seconds, length

    def connect(self, model: Any, tokenizer: Any) -> None:
        self.vocabulary = model.config.vocab_size

    def generate(self, prompts: Any, sampling: SamplingParams, streams: Any = None) -> list[list[Completion]]:
        time.sleep(self.seconds)
        draw, tokens = random.Random(sampling.seed), range(3, self.vocabulary)
        return [
            [
                Completion(tuple(draw.choices(tokens, k=self.length)), (-2.5,) * self.length, "length")
                for _ in range(sampling.n)
            ]
            for _ in prompts
        ]

    def update_weights(self, named_tensors: Any, version: int) -> None:
        self.version = version


class Stopwatch(Callback):
    """Seconds from the end of one iteration to that of the next, and what the parts of it took."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {"iteration": [], "rollout": [], "update": []}
        self.before = 0.0

    def on_train_batch_end(self, trainer: Trainer, module: Any, *_: Any) -> None:
        now = time.perf_counter()
        if "time/update" in trainer.callback_metrics:
            self.seconds["iteration"].append(now - self.before)
            for name in ("rollout", "update"):
                self.seconds[name].append(float(trainer.callback_metrics[f"time/{name}"]))
        self.before = now


def run(args: argparse.Namespace, latency: float, staleness: int) -> dict[str, list[float]]:
    """Seconds of each iteration and its parts, without the first iteration."""
    model = tiny_llama(seed=0, width=args.width, layers=args.layers)
    module = RLHFModule(
        model, lambda completion: completion.count("2") - completion.count("3"), char_tokenizer(),
        SamplingParams(n=8, max_new_tokens=args.tokens), staleness=staleness, lr=1e-4, seed=1,
        check_numerics=False,  # its engine waits, and makes its samples up
    )  # fmt: skip
    watch = Stopwatch()
    trainer = Trainer(
        strategy="lightrft_fake", accelerator="cpu", max_epochs=1, limit_train_batches=args.iterations + 1 + staleness,
        callbacks=[FixedLatency(latency, args.tokens), watch], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    rows = [{"prompt": f"{i % 90 + 10}+{i // 90 + 10}="} for i in range(args.prompts * (args.iterations + 2))]
    trainer.fit(module, datamodule=PromptDataModule(train=rows, batch_size=args.prompts))
    return {name: values[1:] for name, values in watch.seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=6)
    parser.add_argument("--prompts", type=int, default=8, help="of an iteration, with 8 completions each")
    parser.add_argument("--tokens", type=int, default=48, help="of a completion")
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    training = median(run(args, 0.0, 0)["update"])
    rows = []
    for share in (0.5, 1.0, 2.0):
        for staleness in (0, 1):
            seconds = run(args, share * training, staleness)
            middle = {name: median(values) for name, values in seconds.items()}
            rows.append(
                {
                    "generation / training": str(share),
                    "staleness": staleness,
                    "generation s": middle["rollout"],
                    "training s": middle["update"],
                    "iteration s": middle["iteration"],
                    "spread": spread(seconds["iteration"]),
                    "iteration / longer": middle["iteration"] / max(middle["rollout"], middle["update"]),
                }
            )
    bars = Bars(
        ["generation / training", "staleness"], ["generation s", "training s", "iteration s"], "seconds of an iteration"
    )
    report("one_step_off", rows, {k: v for k, v in vars(args).items() if k != "out"}, args.out, bars)


if __name__ == "__main__":
    main()

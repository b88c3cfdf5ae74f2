"""What an iteration of many completions costs beside generation and training: decoding, rewards, packing, logs.

One iteration of `RLHFModule` under a `Trainer` with an engine that returns made-up completions at once, and a model so
small that its passes cost little; what they cost is measured and taken off. Against it stands the time in which vLLM
generates as many tokens with SmolLM2-135M, from the rate in ``rollout.json`` of the same machine: the part of a real
iteration that is the shortest, so the share of the whole is smaller still.

    python benchmarks/bookkeeping.py                 # the record
    python benchmarks/bookkeeping.py --prompts 4     # smoke
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import random
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from _common import RESULTS, Bars, report, spread
from lightning.pytorch import Callback, Trainer
from transformers import LlamaConfig, LlamaForCausalLM

import lightrft_lightning._update as update
from lightrft_lightning import RLHFModule, RolloutCallback, SamplingParams
from lightrft_lightning.data import make_dataloader
from lightrft_lightning.experience.trajectory import Completion, Prompt
from lightrft_lightning.models.loading import load_tokenizer

MODEL = "smollm2-135m-instruct"
VOCAB = 1024
"""Of the small model, whose tokens are the first of the real tokenizer's."""


class AtOnce(RolloutCallback):
    """Random completions of 1 to `longest` tokens, made before anybody asks for them."""

    drift_warning = None

    def __init__(self, longest: int, count: int) -> None:
        draw = random.Random(0)

        def completion(length: int) -> Completion:
            return Completion(tuple(draw.choices(range(100, VOCAB), k=length)), (-10.0,) * length, "eos")

        self.made = [completion(draw.randint(1, longest)) for _ in range(count)]

    def connect(self, model: Any, tokenizer: Any) -> None:
        """There is nothing to connect."""

    def generate(self, prompts: Any, sampling: SamplingParams, streams: Any = None) -> list[list[Completion]]:
        return [self.made[i * sampling.n : (i + 1) * sampling.n] for i in range(len(prompts))]

    def update_weights(self, named_tensors: Any, version: int) -> None:
        self.version = version


class Stopwatch(Callback):
    def __init__(self) -> None:
        self.iterations: list[float] = []

    def on_train_batch_start(self, *_: Any) -> None:
        self.start = time.perf_counter()

    def on_train_batch_end(self, *_: Any) -> None:
        self.iterations.append(time.perf_counter() - self.start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=128, help="with 8 completions each")
    parser.add_argument("--longest", type=int, default=256, help="tokens of the longest completion")
    parser.add_argument("--iterations", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--profile", action="store_true", help="also print where the time goes")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    passes = [0.0]
    scored, step = update.completion_logprobs, RLHFModule._step

    def timed(function: Any) -> Any:
        def run(*given: Any, **named: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*given, **named)
            finally:
                passes[0] += time.perf_counter() - start

        return run

    update.completion_logprobs = timed(scored)
    RLHFModule._step = timed(step)  # type: ignore[method-assign]
    config = LlamaConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8,
                         vocab_size=VOCAB, tie_word_embeddings=True)  # fmt: skip
    engine, watch = AtOnce(args.longest, 8 * args.prompts), Stopwatch()
    module = RLHFModule(
        LlamaForCausalLM(config), lambda completion: len(completion) % 7, load_tokenizer(MODEL),
        SamplingParams(n=8, max_new_tokens=args.longest), seed=1,
        check_numerics=False,  # its engine makes its samples up
    )  # fmt: skip
    trainer = Trainer(
        strategy="lightrft_fake", accelerator="cpu", max_epochs=1, limit_train_batches=args.iterations + 1,
        callbacks=[engine, watch], logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    draw = random.Random(1)
    rows = [
        Prompt(tuple(draw.choices(range(100, VOCAB), k=64)), f"{i}")
        for i in range(args.prompts * (args.iterations + 1))
    ]
    beside: list[float] = []

    class Difference(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            beside.append(watch.iterations[-1] - passes[0])
            passes[0] = 0.0

    trainer.callbacks.append(Difference())
    profile = cProfile.Profile()
    if args.profile:
        profile.enable()
    trainer.fit(module, make_dataloader(rows, args.prompts))
    profile.disable()
    if args.profile:
        pstats.Stats(profile).sort_stats("cumulative").print_stats(60)
    tokens = sum(len(c.token_ids) for c in engine.made)
    rollout = {r["engine"]: r["tokens/s"] for r in json.loads((RESULTS / "rollout.json").read_text())["rows"]}
    generation = tokens / rollout["VLLMRollout"]
    report(
        "bookkeeping",
        [
            {
                "completions": len(engine.made),
                "completion tokens": tokens,
                "seconds": median(beside[1:]),
                "spread": spread(beside[1:]),
                "ms a completion": 1000 * median(beside[1:]) / len(engine.made),
                "generation s": generation,
                "share of generation": median(beside[1:]) / generation,
            }
        ],
        {k: v for k, v in vars(args).items() if k not in ("out", "profile")},
        args.out,
        Bars(["completions"], ["seconds", "generation s"], "seconds of an iteration", log=True),
    )


if __name__ == "__main__":
    main()

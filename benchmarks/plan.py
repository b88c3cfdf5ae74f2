"""Whether `lightrft plan` predicts what a run needs: peak memory of twelve runs against its predictions.

Each run is two iterations of `RLHFModule` under a `Trainer` in processes of its own: prompts and completions of the
longest length that the settings allow, random rewards, generation by the model itself. The measured number is the most
memory that a rank had resident, in each phase and in all.

    python benchmarks/plan.py                        # the record
    python benchmarks/plan.py --only lora zero3      # some

The C library is told to give memory back as soon as it is freed (MALLOC_MMAP_THRESHOLD_, MALLOC_TRIM_THRESHOLD_):
otherwise it keeps a share that depends on the order in which blocks of different sizes come and go.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from _common import Bars, report
from transformers import LlamaConfig

from lightrft_lightning.planning import Planned, predict


def llama(layers: int, width: int, vocabulary: int) -> LlamaConfig:
    """Like SmolLM2: three heads of the keys for nine of the queries."""
    return LlamaConfig(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=9, num_key_value_heads=3,
        intermediate_size=8 * width // 3, vocab_size=vocabulary, tie_word_embeddings=True, eos_token_id=None,
    )  # fmt: skip


SMALL = llama(12, 576, 32_000)
BASE = Planned(
    SMALL,
    accelerator="cpu",
    prompts=4,
    n=8,
    prompt_tokens=64,
    completion_tokens=64,
    token_budget=1024,
)
RUNS: dict[str, Planned] = {
    "plain": BASE,
    "large vocabulary": replace(BASE, model=llama(4, 288, 150_000)),
    "long passes": replace(BASE, prompts=2, completion_tokens=448, token_budget=4096),
    "kl reference": replace(BASE, kl_coef=0.1),
    "lora": replace(BASE, lora_rank=16),
    "qlora": replace(BASE, lora_rank=16, quantization="nf4"),
    "adam 8 bits": replace(BASE, adam_8bit=True),
    "fsdp": replace(BASE, strategy="lightrft_fsdp", gpus=2),
    "zero1": replace(BASE, strategy="lightrft_deepspeed_stage_1", gpus=2),
    "zero2": replace(BASE, strategy="lightrft_deepspeed_stage_2", gpus=2),
    "zero3": replace(BASE, strategy="lightrft_deepspeed_stage_3", gpus=2),
    "critic, recomputed": replace(BASE, critic=True, gradient_checkpointing=True, completion_tokens=128),
}


def resident(key: str) -> int:
    """Bytes: VmRSS now, VmHWM at most since the last `reset`."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def reset() -> None:
    """Begin a new maximum (proc(5))."""
    Path("/proc/self/clear_refs").write_text("5")


def worker(wanted: Planned, folder: Path) -> dict[str, float]:
    import lightning.pytorch as pl
    import torch

    from lightrft_lightning import RLHFModule, SamplingParams, TransformersRollout, get_strategy
    from lightrft_lightning.data import make_dataloader
    from lightrft_lightning.experience.trajectory import Prompt
    from lightrft_lightning.models.tiny import char_tokenizer
    from lightrft_lightning.planning.predict import build

    torch.set_num_threads(1)
    torch.manual_seed(0)
    peaks: dict[str, list[int]] = {}

    class Phases(RLHFModule):
        """Notes the peak of each phase."""

        def _phase(self, name: str, call: Any, *args: Any) -> Any:
            reset()
            try:
                return call(*args)
            finally:
                peaks.setdefault(name, []).append(resident("VmHWM"))

        def _sample(self, *args: Any) -> Any:
            return self._phase("rollout", super()._sample, *args)

        def _score(self, *args: Any) -> Any:
            return self._phase("scoring", super()._score, *args)

        def _train_on(self, *args: Any) -> Any:
            return self._phase("training", super()._train_on, *args)

    draw = random.Random(0)
    model: Any = build(wanted if wanted.quantization is None else replace(wanted, lora_rank=0, quantization=None))
    settings: dict[str, Any] = {}
    if wanted.quantization is not None:  # such a model is loaded from a folder
        settings = {"lora": {"r": wanted.lora_rank}, "quantization": wanted.quantization}
        model.save_pretrained(folder)
        model = str(folder)
    module = Phases(
        model, lambda completion: draw.random(), char_tokenizer(),
        SamplingParams(n=wanted.n, max_new_tokens=wanted.completion_tokens), kl_coef=wanted.kl_coef, seed=1,
        token_budget=wanted.token_budget, gradient_checkpointing=wanted.gradient_checkpointing,
        **settings, **({"advantage_estimator": "gae", "critic": {}} if wanted.critic else {}),
    )  # fmt: skip
    rows = [
        Prompt(tuple(draw.choices(range(2, 12), k=wanted.prompt_tokens)), "")
        for _ in range(2 * wanted.prompts * wanted.gpus)
    ]
    devices = {} if wanted.gpus == 1 else {"devices": wanted.gpus}
    trainer = pl.Trainer(
        strategy=get_strategy(wanted.strategy, adam_8bit=wanted.adam_8bit), accelerator="cpu",
        max_epochs=1, limit_train_batches=2, logger=False,
        callbacks=[TransformersRollout()], enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, **devices,
    )  # fmt: skip
    trainer.fit(module, make_dataloader(rows, wanted.prompts))
    return {name: max(values) / 1e6 for name, values in peaks.items()}


def run(arguments: list[str], ranks: int = 1) -> list[dict[str, float]]:
    """What each of the processes with these arguments writes."""
    with tempfile.TemporaryDirectory() as folder, socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
        found.close()
        env = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
        group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(ranks)}
        processes = [
            subprocess.Popen(
                [sys.executable, __file__, *arguments, "--out", f"{folder}/{rank}"],
                env=env | ({**group, "RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(ranks)
        ]
        for process in processes:
            _, errors = process.communicate(timeout=900)
            if process.returncode:
                for other in processes:
                    other.kill()
                raise SystemExit(f"{arguments} failed:\n{errors[-4000:]}")
        return [json.loads(Path(f"{folder}/{rank}").read_text()) for rank in range(ranks)]


def planned(name: str, small: bool) -> Planned:
    return replace(RUNS[name], model=llama(2, 36, 320)) if small else RUNS[name]


def row(name: str, small: bool) -> dict[str, Any]:
    flags = ["--small"] if small else []
    ranks = run(["--worker", name, *flags], RUNS[name].gpus)
    (predicted,) = run(["--predict", name, *flags])
    measured = {phase: max(rank[phase] for rank in ranks) for phase in ranks[0]}
    process, peak, most = predicted.pop("process"), max(predicted.values()), max(measured.values())
    return {
        "run": name,
        "predicted MB": peak,
        "measured MB": most,
        "predicted / measured": peak / most,
        "without the process itself": (peak - process) / (most - process),
        "rollout": predicted["rollout"] / measured["rollout"],
        "training": predicted["training"] / measured["training"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(RUNS), default=list(RUNS), metavar="RUN")
    parser.add_argument("--small", action="store_true", help="models of no size, to see that it runs")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--predict", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.worker:
        args.out.write_text(json.dumps(worker(planned(args.worker, args.small), args.out.with_suffix(".model"))))
    elif args.predict:
        phases = predict(planned(args.predict, args.small)).phases
        totals = {phase.name: phase.total / 1e6 for phase in phases} | {"process": phases[0].parts["process"] / 1e6}
        args.out.write_text(json.dumps(totals))
    else:
        bars = Bars(["run"], ["predicted MB", "measured MB"], "MB of a rank at the peak")
        report("plan", [row(name, args.small) for name in args.only], {"small": args.small}, args.out, bars)


if __name__ == "__main__":
    main()

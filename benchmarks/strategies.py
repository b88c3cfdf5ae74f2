"""What a back end costs: seconds a step, memory a rank, bytes between the ranks, and what our wrapper adds.

Each sharded strategy runs in two processes, in fp32, on a Llama of random weights. In the same processes, step by step
in turn, runs the same training on plain `fully_shard` or plain `deepspeed.initialize`; the overhead is the ratio of the
medians. Memory is the peak growth of the process from before the model is built, in runs of their own. Bytes are what
a ring algorithm sends for each collective that was called; the minimum is 2 (n-1)/n of the parameters' bytes for ZeRO-1
and 2, and 3 (n-1)/n for ZeRO-3 and FSDP2, which gather the parameters twice.

    python benchmarks/strategies.py [--rounds 30] [--shape small] [--device cuda]

With ``--device cuda`` it runs on one GPU in one process (ZeRO and FSDP2 at world size 1), by default in the shape of a
model of 0.5 billion parameters, and measures the memory that offloading gives back.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from _common import Bars, need_device, report, spread  # isort: skip

NAMES = (
    "lightrft_fake",
    "lightrft_fsdp",
    "lightrft_deepspeed_stage_1",
    "lightrft_deepspeed_stage_2",
    "lightrft_deepspeed_stage_3",
)
SHAPES = {
    "tiny": {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
             "num_key_value_heads": 2, "vocab_size": 32},
    "small": {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 4, "num_attention_heads": 8,
              "num_key_value_heads": 8, "vocab_size": 1024},
    "0.5B": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
             "num_key_value_heads": 2, "vocab_size": 151_936, "tie_word_embeddings": True},
}  # fmt: skip
"""Of the models; the largest is that of Qwen2.5-0.5B."""

TOKENS, ROWS = 64, 4


# ------------------------------------------------------------------------------------------------- what is compared


def build(shape: str) -> nn.Module:
    import transformers

    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPES[shape]))


def started(name: str, device: str) -> Any:
    from lightrft_lightning import FakeStrategy, get_strategy

    settings: dict[str, Any] = {"max_norm": 1.0, "bf16": False}
    fake = name == "lightrft_fake"
    strategy: Any = FakeStrategy(device=device, **settings) if fake else get_strategy(name, **settings)
    strategy.setup_distributed()
    return strategy


def ours(strategy: Any, shape: str) -> tuple[nn.Module, Any, Callable[[torch.Tensor], None]]:
    model = build(shape)
    model, optimizer = strategy.prepare((model, strategy.create_optimizer(model, lr=1e-4)))

    def step(ids: torch.Tensor) -> None:
        strategy.backward(loss_of(model, ids), model, optimizer)
        strategy.optimizer_step(optimizer, model, None)

    return model, optimizer, step


def plain(name: str, shape: str, device: str) -> Callable[[torch.Tensor], None]:
    model = build(shape)
    if name == "lightrft_fake":
        return _plain_loop(model.to(device))
    if name == "lightrft_fsdp":
        from torch.distributed.fsdp import fully_shard

        for layer in model.model.layers:  # type: ignore[union-attr]
            fully_shard(layer)
        fully_shard(model)
        return _plain_loop(model)
    return _plain_deepspeed(model, int(name[-1]))


def _plain_loop(model: nn.Module) -> Callable[[torch.Tensor], None]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step(ids: torch.Tensor) -> None:
        loss_of(model, ids).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def _plain_deepspeed(model: nn.Module, stage: int) -> Callable[[torch.Tensor], None]:
    import deepspeed

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)

    def step(ids: torch.Tensor) -> None:
        engine.backward(loss_of(engine, ids))
        engine.step()

    return step


def loss_of(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=ids).logits
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


# ------------------------------------------------------------------------------------------------------- measurement


class Traffic(TorchDispatchMode):
    """Adds up what this rank sends in the collectives called inside, by a ring algorithm."""

    # Share of the larger of input and output that a rank sends, in units of (n-1)/n.
    SHARES = {"allreduce": 2, "allgather": 1, "reduce_scatter": 1, "broadcast": 1, "reduce": 1, "alltoall": 1}

    def __init__(self, ranks: int) -> None:
        super().__init__()
        self.ranks, self.bytes = ranks, 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        if name.startswith(("c10d.", "c10d::")):
            kind = next((k for k in self.SHARES if k in name.replace("_allgather_base", "allgather")), None)
            tensors = [t for t in torch.utils._pytree.tree_leaves(args) if isinstance(t, torch.Tensor)]
            if kind is not None and tensors:
                largest = max(t.numel() * t.element_size() for t in tensors)
                if kind == "allgather" and "base" not in name:  # a list of outputs
                    largest *= self.ranks
                self.bytes += self.SHARES[kind] * largest * (self.ranks - 1) / self.ranks
        return func(*args, **(kwargs or {}))


def seconds(step: Callable[[torch.Tensor], None], ids: torch.Tensor) -> float:
    import torch.distributed as dist

    if dist.is_initialized():
        dist.barrier()
    start = time.perf_counter()
    step(ids)
    if ids.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def time_main(name: str, shape: str, rounds: int, device: str, plain_first: bool) -> dict[str, Any]:
    """Seconds of both, in turn; bytes of one step of ours.

    What is built first lies better in memory, by one or two per cent: hence `plain_first` both ways.
    """
    strategy = started(name, device)
    reference = plain(name, shape, device) if plain_first else None
    model, _, step = ours(strategy, shape)
    reference = reference or plain(name, shape, device)
    ids = torch.randint(3, 16, (ROWS, TOKENS), generator=torch.Generator().manual_seed(0)).to(device)
    for _ in range(3):
        step(ids), reference(ids)
    times: dict[str, list[float]] = {"ours": [], "plain": []}
    for k in range(rounds):
        order = [("ours", step), ("plain", reference)]
        for label, run in order if k % 2 else order[::-1]:
            times[label].append(seconds(run, ids))
    with Traffic(strategy.world_size) as traffic:
        step(ids)
    ratio = statistics.median(a / b for a, b in zip(times["ours"], times["plain"], strict=True))
    parameters = 4 * sum(t.numel() for _, t in strategy.named_full_tensors(model))
    return {
        "seconds": statistics.median(times["ours"]),
        "spread": spread(times["ours"]),
        "overhead": ratio - 1,
        "bytes": traffic.bytes,
        "parameter_bytes": parameters,
    }


def memory_main(name: str, shape: str, device: str) -> dict[str, Any]:
    """Peak growth of the process (or the device) over three steps, and what offloading gives back on a GPU."""
    strategy = started(name, device)
    _, _, step = ours(strategy, "tiny")  # imports, and buffers of the process group
    step(torch.randint(3, 16, (ROWS, TOKENS)).to(device))
    before = reset_peak() if device == "cpu" else 0
    model, optimizer, step = ours(strategy, shape)
    ids = torch.randint(3, 16, (ROWS, TOKENS)).to(device)
    for _ in range(3):
        step(ids)
    if device == "cpu":
        return {"peak": peak_resident() - before}
    held, peak = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
    strategy.maybe_offload_optimizer(optimizer)
    strategy.offload_model(model)
    torch.cuda.empty_cache()
    return {"peak": peak, "given_back": 1 - torch.cuda.memory_allocated() / held}


def reset_peak() -> int:
    """Memory of this process now; `peak_resident` counts from here."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak_resident()


def peak_resident() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024


# ----------------------------------------------------------------------------------------------------------- the runs


def run(name: str, mode: str, args: argparse.Namespace) -> dict[str, Any]:
    """The result of rank 0, of `mode` in processes of its own."""
    ranks = 1 if name == "lightrft_fake" or args.device == "cuda" else 2
    with socket.socket() as listener, tempfile.NamedTemporaryFile() as output:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        listener.close()
        command = [sys.executable, __file__, "--mode", mode, "--name", name, "--shape", args.shape]
        command += ["--rounds", str(args.rounds), "--device", args.device, "--output", output.name]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
        processes = [
            subprocess.Popen(
                command,
                env=env | ({**group, "RANK": str(r), "LOCAL_RANK": str(r)} if ranks > 1 else {}),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
            for r in range(ranks)
        ]
        for process in processes:
            _, errors = process.communicate(timeout=900)
            if process.returncode:
                for other in processes:
                    other.kill()
                raise SystemExit(f"{name} {mode} failed:\n{errors[-4000:]}")
        return json.loads(Path(output.name).read_text())


def row_of(name: str, args: argparse.Namespace) -> dict[str, Any]:
    timed, again, memory = (run(name, mode, args) for mode in ("time", "time-plain-first", "memory"))
    overhead = (timed["overhead"] + again["overhead"]) / 2
    ranks = 1 if name == "lightrft_fake" or args.device == "cuda" else 2
    minimum = (3 if name.endswith(("fsdp", "_3")) else 2) * (ranks - 1) / ranks * timed["parameter_bytes"]
    row = {
        "strategy": name,
        "processes": ranks,
        "seconds a step": timed["seconds"],
        "spread": timed["spread"],
        "overhead of the wrapper": f"{overhead:+.1%}",
        "peak memory a rank (MB)": memory["peak"] / 1e6,
        "sent a step (MB)": timed["bytes"] / 1e6,
        "minimum (MB)": minimum / 1e6,
    }
    return row | ({"given back by offloading": f"{memory['given_back']:.0%}"} if "given_back" in memory else {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30, help="steps of each that are timed")
    parser.add_argument("--shape", choices=list(SHAPES), help="of the model; default: small on a CPU, 0.5B on a GPU")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--only", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--out", type=Path, help="JSON file; default: in benchmarks/results")
    for hidden in ("--mode", "--name", "--output"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    args = parser.parse_args()
    need_device(args.device)
    args.shape = args.shape or {"cpu": "small", "cuda": "0.5B"}[args.device]
    if args.mode is None:
        settings = {"shape": args.shape, "tokens a rank": ROWS * TOKENS, "rounds": args.rounds}
        rows, settings = [row_of(n, args) for n in args.only], settings | {"device": args.device}
        bars = Bars(["strategy"], ["peak memory a rank (MB)", "sent a step (MB)", "minimum (MB)"], "MB")
        report("strategies", rows, settings, args.out, bars)
        return
    torch.set_num_threads(1)
    measured = (
        time_main(args.name, args.shape, args.rounds, args.device, args.mode == "time-plain-first")
        if args.mode.startswith("time")
        else memory_main(args.name, args.shape, args.device)
    )
    if os.environ.get("RANK", "0") == "0":
        Path(args.output).write_text(json.dumps(measured))


if __name__ == "__main__":
    main()

"""Bytes a second of a weight update, as a share of memcpy, and its peak extra memory, against the size of a bucket.

The trainer's weights go into a vLLM engine in the same process: copied into buckets, loaded by vLLM's own loader
(which repacks them on a CPU), the prefix cache emptied. Three ways of verification. A plain copy of all the tensors is
timed in turn with the updates.

    python benchmarks/weight_sync.py                                    # the record
    python benchmarks/weight_sync.py --rounds 1 --buckets 64            # smoke
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from _common import Bars, report, spread

from lightrft_lightning import FakeStrategy
from lightrft_lightning.engines.vllm import VLLMRollout
from lightrft_lightning.engines.weight_sync import PolicyWeights, in_buckets
from lightrft_lightning.models.loading import load_model, load_tokenizer

MB = 1e6


def status_mb(field: str) -> float:
    """A line of this process's memory status, e.g. VmRSS."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(f"{field}:")) * 1024 / MB


def peak_extra_mb(call: Any) -> float:
    """Runs `call`; returns how far the resident memory rose above what it was before."""
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = status_mb("VmRSS")
    call()
    return status_mb("VmHWM") - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--buckets", type=int, nargs="+", default=[32, 128, 512], help="MiB")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model, tokenizer = load_model(args.model), load_tokenizer(args.model)
    strategy, engine = FakeStrategy(), VLLMRollout({"max_model_len": 1024, "enforce_eager": True})
    strategy.setup_inference_engine(engine_type=engine, actor=model, tokenizer=tokenizer)
    weights = PolicyWeights(strategy, model)
    size = sum(tensor.nbytes for _, tensor in weights)

    def copy() -> None:
        for _ in in_buckets(weights, engine.bucket_bytes, None):
            pass

    source = torch.cat([tensor.detach().flatten() for _, tensor in weights])
    target = torch.empty_like(source)
    rows = []
    for bucket in args.buckets:
        engine.bucket_bytes = bucket << 20
        calls = {"memcpy": lambda: target.copy_(source), "buckets only": copy}
        for verify in ("off", "sample", "all"):
            calls[verify] = lambda verify=verify: update(engine, weights, verify)  # type: ignore[misc]
        seconds: dict[str, list[float]] = {name: [] for name in calls}
        extra: dict[str, list[float]] = {name: [] for name in calls}
        for k in range(args.rounds + 1):
            for name, call in calls.items():
                start = time.perf_counter()
                rise = peak_extra_mb(call)
                if k:  # the first round warms up
                    seconds[name].append(time.perf_counter() - start)
                    extra[name].append(rise)
        memcpy = median(seconds["memcpy"])
        for name in list(calls)[1:]:
            took = median(seconds[name])
            rows.append(
                {
                    "bucket MB": bucket * 1.048576,
                    "update, verify": name,
                    "seconds": took,
                    "spread": spread(seconds[name]),
                    "GB/s": size / took / 1e9,
                    "share of memcpy": memcpy / took,
                    "peak extra MB": max(extra[name]),
                }
            )
    engine.close()
    largest = max(tensor.nbytes for _, tensor in weights) / MB
    settings = {k: v for k, v in vars(args).items() if k not in ("out", "buckets")}
    settings |= {"MB": size / MB, "largest tensor MB": largest}
    report("weight_sync", rows, settings, args.out, Bars(["bucket MB", "update, verify"], ["seconds"], "seconds"))


def update(engine: VLLMRollout, weights: PolicyWeights, verify: Any) -> None:
    engine.verify = verify
    engine.update_weights(weights, engine.version + 1)


if __name__ == "__main__":
    main()

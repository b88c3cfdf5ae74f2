"""Time and memory of decoder layers as they are, recomputed in the backward pass, compiled, and both.

One GRPO group with its prompt once, on a model of SmolLM2-135M's shape with random weights, forward + backward, the
four in turn within each round, medians over the rounds. Memory is what waits for the backward pass.

    python benchmarks/layers.py                                     # the record
    python benchmarks/layers.py --layers 2 --rounds 1 --vocab 512   # smoke
"""

from __future__ import annotations

import argparse
import time
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

import torch
from _common import Bars, llama, report
from packing import gradient_step, make_group
from torch import Tensor
from transformers import LlamaForCausalLM

from lightrft_lightning.experience.packing import PackedBatch, pack
from lightrft_lightning.models.layers import checkpoint_activations, compile_layers, uncompiled
from lightrft_lightning.models.logprobs import completion_logprobs

VARIANTS = {"plain": (False, False), "recomputed": (True, False), "compiled": (False, True), "both": (True, True)}


def kept_mb(model: LlamaForCausalLM, batch: PackedBatch) -> float:
    """What a forward pass keeps besides the weights."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = completion_logprobs(model, batch).logprobs.sum()
    loss.backward()
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    return sum(size for pointer, size in kept.items() if pointer not in weights) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", type=int, default=256, help="tokens of the prompt")
    parser.add_argument("--longest", type=int, default=128, help="tokens of the longest of the 8 completions")
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--vocab", type=int, default=49152)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    model = llama("135M", args.layers, args.vocab)
    compile_layers(model)
    trajectories = make_group(args.prompt, args.longest, args.vocab)
    advantages = [torch.full((len(t.mask),), value) for t, value in zip(trajectories, torch.randn(8), strict=True)]
    batches = pack(trajectories, 4096)
    seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
    memory, gradients, first = {}, {}, {}
    for i in range(-1, args.rounds):
        for name, (recomputed, compiled) in VARIANTS.items():
            if recomputed:
                checkpoint_activations(model)
            else:
                model.gradient_checkpointing_disable()
            with ExitStack() as stack:
                if not compiled:
                    stack.enter_context(uncompiled(model))
                if i >= 0:
                    seconds[name].append(gradient_step(model, batches, advantages))
                    gradients[name] = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
                else:  # warm up
                    start = time.perf_counter()
                    memory[name] = kept_mb(model, batches[0])
                    first[name] = time.perf_counter() - start
    plain = gradients["plain"]
    rows: list[dict[str, Any]] = [
        {
            "layers": name,
            "tokens": batches[0].num_tokens,
            "first pass s": first[name],
            "s": median(seconds[name]),
            "plain / this": median(seconds["plain"]) / median(seconds[name]),
            "kept MB": memory[name],
            "gradient difference": ((gradients[name] - plain).norm() / plain.norm()).item(),
        }
        for name in VARIANTS
    ]
    settings = {k: v for k, v in vars(args).items() if k != "out"}
    report("layers", rows, settings, args.out, Bars(["layers"], ["s", "first pass s"], "seconds of a pass"))


if __name__ == "__main__":
    main()

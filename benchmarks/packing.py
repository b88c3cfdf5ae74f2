"""Time and tokens of padded rows against rows that hold the prompt of a group once.

One GRPO group on a model of SmolLM2-135M's shape with random weights, forward + backward, the two layouts in turn
within each round, medians over the rounds. Also the relative difference of the two gradients.

    python benchmarks/packing.py                                   # the record
    python benchmarks/packing.py --layers 2 --rounds 1 --vocab 512 # smoke
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from _common import Bars, llama, report, spread
from torch import Tensor
from transformers import LlamaForCausalLM

from lightrft_lightning.experience.packing import PackedBatch, pack
from lightrft_lightning.experience.trajectory import Completion, Prompt, Trajectory
from lightrft_lightning.models.logprobs import completion_logprobs

# Most completions of a group are short and a few run long: the case that padding is worst at.
SKEWED = (1.0, 0.6, 0.4, 0.3, 0.2, 0.15, 0.1, 0.08)


def make_group(prompt_length: int, longest: int, vocab: int) -> list[Trajectory]:
    """G = 8 completions of skewed lengths after one prompt, random tokens."""
    prompt = Prompt(tuple(torch.randint(vocab, (prompt_length,)).tolist()), "")
    lengths = [max(1, round(share * longest)) for share in SKEWED]
    completions = [
        Completion(tuple(torch.randint(vocab, (length,)).tolist()), (0.0,) * length, "length") for length in lengths
    ]
    return [Trajectory(prompt, completion, group=0) for completion in completions]


def gradient_step(model: LlamaForCausalLM, batches: list[PackedBatch], advantages: list[Tensor]) -> float:
    """Seconds of forward + backward of a policy-gradient loss; leaves the gradient in the model."""
    model.zero_grad()
    start = time.perf_counter()
    total = sum(batch.num_policy_tokens for batch in batches)
    for batch in batches:
        logprobs = completion_logprobs(model, batch).logprobs
        (-(logprobs * batch.pack_values(advantages)).sum() / total).backward()
    return time.perf_counter() - start


def compare(model: LlamaForCausalLM, prompt_length: int, args: argparse.Namespace) -> dict[str, Any]:
    """One row of the table."""
    torch.manual_seed(prompt_length)
    trajectories = make_group(prompt_length, args.longest, args.vocab)
    advantages = [torch.full((len(t.mask),), value) for t, value in zip(trajectories, torch.randn(8), strict=True)]
    layouts = {
        "padded": pack(trajectories, args.token_budget, share_prompts=False),
        "shared": pack(trajectories, args.token_budget),
    }
    seconds: dict[str, list[float]] = {name: [] for name in layouts}
    gradients: dict[str, Tensor] = {}
    for batches in layouts.values():  # warm up
        gradient_step(model, batches, advantages)
    for _ in range(args.rounds):
        for name, batches in layouts.items():
            seconds[name].append(gradient_step(model, batches, advantages))
            gradients[name] = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    tokens = {name: sum(batch.input_ids.numel() for batch in batches) for name, batches in layouts.items()}
    times = {name: median(values) for name, values in seconds.items()}
    difference = (gradients["shared"] - gradients["padded"]).norm() / gradients["padded"].norm()
    return {
        "prompt": prompt_length,
        "completion tokens": sum(len(t.mask) for t in trajectories),
        "padded tokens": tokens["padded"],
        "shared tokens": tokens["shared"],
        "tokens ratio": tokens["padded"] / tokens["shared"],
        "padded s": times["padded"],
        "padded spread": spread(seconds["padded"]),
        "shared s": times["shared"],
        "shared spread": spread(seconds["shared"]),
        "time ratio": times["padded"] / times["shared"],
        "gradient difference": difference.item(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, nargs="+", default=[32, 256], help="prompt lengths")
    parser.add_argument("--longest", type=int, default=128, help="tokens of the longest of the 8 completions")
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--vocab", type=int, default=49152)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--token-budget", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--attention", choices=("sdpa", "eager"), default="sdpa")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    model = llama("135M", args.layers, args.vocab)
    model.set_attn_implementation(args.attention)
    rows = [compare(model, prompt_length, args) for prompt_length in args.prompts]
    bars = Bars(["prompt"], ["padded s", "shared s"], "seconds of forward and backward")
    report("packing", rows, {k: v for k, v in vars(args).items() if k != "out"}, args.out, bars)


if __name__ == "__main__":
    main()

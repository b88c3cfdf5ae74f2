"""How the training phase grows: time a token, share of the machine's matrix product, and peak memory.

Groups of 8 completions of fixed lengths after prompts of a fixed length, on a model of SmolLM2-135M's shape with fewer
layers, fp32, forward and backward of a policy-gradient loss.

    python benchmarks/growth.py time        # 1k to 16k packed tokens, in passes of at most 4096 and in one pass
    python benchmarks/growth.py memory      # more and more groups within one token budget, a process each
    python benchmarks/growth.py time --device cuda --shape 0.5B --tokens 4096 16384 --token-budget 16384 --out x.json

On a GPU the weights are fp32 and passes compute in bf16, as under ``precision="bf16-mixed"``, with ``flex_attention``;
the share of the matrix product is then the MFU against what the GPU really reaches.

The FLOPs are those that the tokens need: 6 a weight and token of the decoder layers (prompts count once), 6 a weight
and completion token of the output head, 12 a head dimension and pair of tokens that see each other. Padding and what is
computed twice (the output head, in the backward pass) do not count. The matrix product is that of two square matrices
of 2048 (on a GPU 8192), measured in turn with the passes.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

import torch
from _common import SHAPES, Bars, llama, need_device, now, peak_rss_mb, report, spread
from transformers import LlamaForCausalLM

from lightrft_lightning.experience.packing import PackedBatch, pack
from lightrft_lightning.experience.trajectory import Completion, Prompt, Trajectory
from lightrft_lightning.models.attention import FLEX, use_kernel
from lightrft_lightning.models.logprobs import completion_logprobs


def build_model(args: argparse.Namespace) -> LlamaForCausalLM:
    model = llama(args.shape, args.layers, args.vocab).to(args.device)
    if args.device == "cuda":
        use_kernel(model, FLEX)
    return model


def groups(count: int, args: argparse.Namespace) -> list[Trajectory]:
    """Random tokens; completions of 16 to 2 x 64 - 16 tokens, the same lengths in every group."""

    def ids(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(args.vocab, (length,)).tolist())

    step = 2 * (args.completion - 16) // 7
    made = []
    for group in range(count):
        prompt = Prompt(ids(args.prompt), "")
        for k in range(8):
            length = 16 + k * step
            made.append(Trajectory(prompt, Completion(ids(length), (0.0,) * length, "length"), group))
    return made


def useful_flops(model: LlamaForCausalLM, batches: list[PackedBatch]) -> float:
    head = model.lm_head.weight.numel()
    layers = sum(p.numel() for p in model.model.layers.parameters())
    config: Any = model.config
    width = config.num_attention_heads * (config.hidden_size // config.num_attention_heads)
    pairs = sum(int((b.visible().squeeze(1) & (b.piece >= 0)[:, :, None]).sum()) for b in batches)
    tokens, predicted = sum(b.num_tokens for b in batches), sum(b.num_policy_tokens for b in batches)
    return 6.0 * (layers * tokens + head * predicted) + 12.0 * width * config.num_hidden_layers * pairs


def gradient_step(model: LlamaForCausalLM, batches: list[PackedBatch]) -> float:
    """Seconds of forward and backward."""
    model.zero_grad()
    device, total = model.device.type, sum(batch.num_policy_tokens for batch in batches)
    start = now(device)
    for batch in batches:
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            logprobs = completion_logprobs(model, batch).logprobs
        (-logprobs.sum() / total).backward()
    return now(device) - start


def matrix_product(a: torch.Tensor) -> float:
    """FLOP/s of the machine at this moment."""
    start = now(a.device.type)
    for _ in range(5):
        a @ a
    return 5 * 2 * len(a) ** 3 / (now(a.device.type) - start)


def time_a_token(args: argparse.Namespace) -> list[dict[str, Any]]:
    model = build_model(args)
    gpu = args.device == "cuda"
    side, dtype = (8192, torch.bfloat16) if gpu else (2048, torch.float32)
    square = torch.randn(side, side, device=args.device, dtype=dtype)
    per_group = sum(len(t.completion.token_ids) for t in groups(1, args)) + args.prompt
    cases = {}
    for tokens in args.tokens:
        trajectories = groups(max(1, round(tokens / per_group)), args)
        for budget in (args.token_budget, 2 * tokens):
            batches = [batch.to(args.device) for batch in pack(trajectories, budget, row_length=per_group)]
            cases[tokens, len(batches)] = batches
    seconds: dict[tuple[int, int], list[float]] = {case: [] for case in cases}
    shares: dict[tuple[int, int], list[float]] = {case: [] for case in cases}
    first = next(iter(cases))
    for batches in cases.values() if gpu else [cases[first]]:  # warm up; on a GPU kernels are compiled
        matrix_product(square), gradient_step(model, batches)
    for _ in range(args.rounds):
        for case, batches in cases.items():
            before = matrix_product(square)
            took = gradient_step(model, batches)
            peak = (before + matrix_product(square)) / 2
            seconds[case].append(took)
            shares[case].append(useful_flops(model, batches) / took / peak)
    packed = {case: sum(b.num_tokens for b in batches) for case, batches in cases.items()}
    each = {case: median(seconds[case]) / packed[case] for case in cases}
    return [
        {
            "packed tokens": packed[case],
            "passes": case[1],
            "seconds": median(seconds[case]),
            "spread": spread(seconds[case]),
            "ms a token": 1000 * each[case],
            "TFLOP/s": useful_flops(model, cases[case]) / median(seconds[case]) / 1e12,
            "against the first": each[case] / each[first],
            "share of the matrix product": median(shares[case]),
        }
        for case in cases
    ]


def memory(args: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    for count in args.groups:
        command = [sys.executable, __file__, "memory", "--one", str(count), "--layers", str(args.layers)]
        command += ["--token-budget", str(args.token_budget), "--vocab", str(args.vocab), "--shape", args.shape]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        rows.append({"groups": count, "peak MB": float(done.stdout.split()[-1])})
    return [{**row, "against the first": row["peak MB"] / rows[0]["peak MB"]} for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["time", "memory"])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 2048, 4096, 8192, 16384])
    parser.add_argument("--groups", type=int, nargs="+", default=[8, 32, 128])
    parser.add_argument("--prompt", type=int, default=64, help="tokens of a prompt")
    parser.add_argument("--completion", type=int, default=64, help="mean tokens of a completion")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="not of memory")
    parser.add_argument("--shape", choices=list(SHAPES), default="135M", help="of the model")
    parser.add_argument("--layers", type=int, help="default: those of the shape; on a CPU 8")
    parser.add_argument("--vocab", type=int, help="default: that of the shape")
    parser.add_argument(
        "--token-budget", type=int, help="tokens of a pass, at most; default: 4096 for time, 2048 for memory"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    need_device(args.device)
    if args.what == "memory" and args.device != "cpu":
        parser.error("memory measures a process on a CPU: leave --device out")
    if args.device == "cpu" and args.layers is None:
        args.layers = 8  # of SmolLM2's 30: a round on two cores takes minutes
    args.vocab = args.vocab or SHAPES[args.shape][-1]
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    args.token_budget = args.token_budget or {"time": 4096, "memory": 2048}[args.what]
    if args.one is not None:
        gradient_step(build_model(args), pack(groups(args.one, args), args.token_budget))
        print(peak_rss_mb())
        return
    rows = time_a_token(args) if args.what == "time" else memory(args)
    settings = {k: v for k, v in vars(args).items() if k not in ("out", "one", "what")}
    bars = {
        "time": Bars(["packed tokens", "passes"], ["ms a token"], "ms a token"),
        "memory": Bars(["groups"], ["peak MB"], "MB at the peak"),
    }[args.what]
    report(f"growth_{args.what}", rows, settings, args.out, bars)


if __name__ == "__main__":
    main()

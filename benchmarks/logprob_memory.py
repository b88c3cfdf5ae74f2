"""Peak memory of the log-probability step: ours, the naive way, and TRL's two.

Every cell is a process of its own: it builds a small Llama and a batch, notes its peak memory, scores N completion
tokens, back-propagates, and reports how much the peak rose. All variants run the same one-layer backbone.

- ours: `completion_logprobs`
- naive: ``log_softmax`` of the logits, then gather
- trl_selective: ``trl.trainer.utils.selective_log_softmax`` of the logits
- trl_fused: the model patched by ``add_fused_lm_head``, which is what ``GRPOTrainer`` of TRL 1.16 runs

    python benchmarks/logprob_memory.py                                  # the record, about 10 minutes
    python benchmarks/logprob_memory.py --tokens 256 512 --vocab 49152   # smoke
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from _common import Bars, peak_rss_mb, report

VARIANTS = ("ours", "naive", "trl_selective", "trl_fused")
PROMPT, COMPLETION = 8, 128


def measure(variant: str, tokens: int, vocab: int, hidden: int, chunk_size: int, threads: int) -> dict[str, float]:
    """Rise of the peak (MB) and seconds of one forward + backward pass over `tokens` completion tokens."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from lightrft_lightning.experience.packing import pack
    from lightrft_lightning.experience.trajectory import Completion, Prompt, Trajectory
    from lightrft_lightning.models.logprobs import completion_logprobs

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=vocab, hidden_size=hidden, intermediate_size=hidden, num_hidden_layers=1,
                         num_attention_heads=4, num_key_value_heads=4, tie_word_embeddings=True)  # fmt: skip
    model = LlamaForCausalLM(config)
    ids = torch.randint(vocab, (tokens // COMPLETION, PROMPT + COMPLETION))
    rows = ids.tolist()
    zeros = (0.0,) * COMPLETION
    trajectories = [
        Trajectory(Prompt(tuple(row[:PROMPT]), ""), Completion(tuple(row[PROMPT:]), zeros, "length"), group)
        for group, row in enumerate(rows)
    ]
    (batch,) = pack(trajectories, ids.numel(), share_prompts=False)
    if variant.startswith("trl"):
        from trl.trainer.utils import add_fused_lm_head, selective_log_softmax

        add_fused_lm_head(model)
    for parameter in model.parameters():  # the gradients themselves are not part of the step
        parameter.grad = torch.ones_like(parameter)

    before, start = peak_rss_mb(), time.perf_counter()
    if variant == "ours":
        logprobs = completion_logprobs(model, batch, chunk_size=chunk_size).logprobs
    elif variant == "trl_fused":
        labels = ids.clone()
        labels[:, :PROMPT] = -100
        logprobs = model(input_ids=ids, labels=labels, fused_lm_head=True).log_probs[:, PROMPT - 1 :]
    else:
        logits = model(input_ids=ids, logits_to_keep=COMPLETION + 1).logits[:, :-1]
        target = ids[:, PROMPT:]
        if variant == "naive":
            logprobs = logits.log_softmax(-1).gather(-1, target[..., None])[..., 0]
        else:
            logprobs = selective_log_softmax(logits, target)
    loss = -logprobs.mean()
    loss.backward()
    return {"peak_mb": peak_rss_mb() - before, "seconds": time.perf_counter() - start, "loss": loss.item()}


def run(variant: str, tokens: int, vocab: int, args: argparse.Namespace) -> dict[str, float]:
    """`measure` in a fresh process. This one never imports torch: Linux hands a parent's peak on to its children."""
    command = [sys.executable, __file__, "--measure", variant, "--tokens", str(tokens), "--vocab", str(vocab)]
    command += ["--hidden", str(args.hidden), "--chunk-size", str(args.chunk_size), "--threads", str(args.threads)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    result: dict[str, float] = json.loads(output.splitlines()[-1])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 512, 1024, 2048, 4096])
    parser.add_argument("--vocab", type=int, nargs="+", default=[49152, 151936])
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--chunk-size", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--measure", choices=VARIANTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if bad := [n for n in args.tokens if n % COMPLETION]:
        parser.error(f"--tokens {bad[0]}: must be a multiple of {COMPLETION}")
    if args.measure:
        print(
            json.dumps(measure(args.measure, args.tokens[0], args.vocab[0], args.hidden, args.chunk_size, args.threads))
        )
        return
    rows: list[dict[str, Any]] = []
    for vocab in args.vocab:
        for tokens in args.tokens:
            results = {variant: run(variant, tokens, vocab, args) for variant in args.variants}
            losses = [result["loss"] for result in results.values()]
            row: dict[str, Any] = {"vocabulary": vocab, "tokens": tokens}
            row |= {f"{variant} MB": result["peak_mb"] for variant, result in results.items()}
            row |= {f"{variant} s": result["seconds"] for variant, result in results.items()}
            rows.append(row | {"largest loss difference": max(losses) - min(losses)})
    settings = {"hidden": args.hidden, "chunk_size": args.chunk_size, "threads": args.threads, "dtype": "float32"}
    bars = Bars(["vocabulary", "tokens"], [f"{variant} MB" for variant in args.variants], "MB above the start")
    report("logprob_memory", rows, settings, args.out, bars)


if __name__ == "__main__":
    main()

"""Tokens a second of vLLM, SGLang and the transformers engine, against plain `generate` of transformers.

Eight prompts of the same length whose answers are short for most and run to the limit for some, eight completions each,
drawn at a temperature so low that all programs write the same text: the token counts are equal. One process, in
turn within each round, medians over the rounds.

    python benchmarks/rollout.py --sglang                               # the record; SGLang is the one of `make test`
    python benchmarks/rollout.py --rounds 1 --max-new-tokens 16 --n 2   # smoke
"""

from __future__ import annotations

import argparse
import atexit
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from _common import Bars, report, spread

from lightrft_lightning import FakeStrategy, RolloutEngine, SamplingParams, SGLangRollout, TransformersRollout
from lightrft_lightning.engines.vllm import VLLMRollout
from lightrft_lightning.models.loading import load_model, load_tokenizer

EXAMPLES = (
    "You are a careful assistant. Examples. Q: What is 2 + 2? A: 4. Q: What is the capital of Italy? A: Rome. "
    "Q: Name three colours. A: Red, green, blue. Q: Which animal says meow? A: The cat. "
    "Q: How many days has a week? A: Seven. Q: What is water made of? A: Hydrogen and oxygen. "
    "Q: What is the opposite of hot? A: Cold. Now answer: "
)
QUESTIONS = (
    "What is 3 + 4?", "What is the capital of France? One word.", "Name two fruits.",
    "Say hello in one short sentence.", "Explain what a bicycle is.",
    "Explain in three sentences why the sky is blue.", "Write a long story about a dragon.",
    "Write a poem about rain.",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--n", type=int, default=8, help="completions of a prompt")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.01)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--sglang", action=argparse.BooleanOptionalAction, default=False, help="SGLang too, on a CPU")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model, tokenizer = load_model(args.model).eval(), load_tokenizer(args.model)
    chats = [[{"role": "user", "content": EXAMPLES + question}] for question in QUESTIONS]
    prompts = [
        tokenizer.apply_chat_template(c, add_generation_prompt=True, return_dict=True)["input_ids"] for c in chats
    ]
    sampling = SamplingParams(n=args.n, max_new_tokens=args.max_new_tokens, temperature=args.temperature)

    def plain(sampling: SamplingParams) -> int:
        batch = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")
        out = model.generate(
            **batch, do_sample=True, temperature=sampling.temperature, top_k=0, num_return_sequences=sampling.n,
            max_new_tokens=sampling.max_new_tokens, pad_token_id=tokenizer.pad_token_id,
        )[:, batch["input_ids"].shape[1] :]  # fmt: skip
        ends = (out == tokenizer.eos_token_id).int()
        return int((ends.cumsum(1) - ends == 0).sum())  # up to and with the first end token

    strategy = FakeStrategy()
    vllm = VLLMRollout({"max_model_len": 1024, "enforce_eager": True})
    strategy.setup_inference_engine(engine_type=vllm, actor=model, tokenizer=tokenizer)
    ours, refilled = TransformersRollout(), TransformersRollout(max_batch_size=16)
    for engine in (ours, refilled):
        engine.connect(model, tokenizer)

    def with_engine(engine: RolloutEngine) -> Callable[[SamplingParams], int]:
        def run(sampling: SamplingParams) -> int:
            # Every round sees its prompts for the first time.
            if isinstance(engine, SGLangRollout):
                engine._client.text("POST", "/flush_cache", None, 60.0)
            vllm._engine.reset_prefix_cache()
            return sum(len(c.token_ids) for group in engine.generate(prompts, sampling) for c in group)

        return run

    programs = {
        "plain generate": plain,
        "TransformersRollout": with_engine(ours),
        "TransformersRollout, 16 at once": with_engine(refilled),
        "VLLMRollout": with_engine(vllm),
    }
    if args.sglang:
        sglang = sglang_on_cpu(args.threads)
        strategy.setup_inference_engine(engine_type=sglang, actor=model, tokenizer=tokenizer)
        programs["SGLangRollout"] = with_engine(sglang)
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    tokens: dict[str, int] = {}
    for program in programs.values():  # warm up
        program(SamplingParams(n=args.n, max_new_tokens=2, temperature=args.temperature))
    for _ in range(args.rounds):
        for name, program in programs.items():
            start = time.perf_counter()
            tokens[name] = program(sampling)
            seconds[name].append(time.perf_counter() - start)
    vllm.close()
    if args.sglang:
        sglang.close()
    rates = {name: tokens[name] / median(seconds[name]) for name in programs}
    rows = [
        {
            "engine": name,
            "completion tokens": tokens[name],
            "seconds": median(seconds[name]),
            "spread": spread(seconds[name]),
            "tokens/s": rates[name],
            "ratio": rates[name] / rates["plain generate"],
        }
        for name in programs
    ]
    settings = {**{k: v for k, v in vars(args).items() if k != "out"}, "prompt tokens": [len(p) for p in prompts]}
    report("rollout", rows, settings, args.out, Bars(["engine"], ["tokens/s"], "tokens a second"))


def sglang_on_cpu(threads: int) -> SGLangRollout:
    """The SGLang that `make test` installs, which its own processes alone must see whole."""
    installed, folder = Path(sys.prefix, ".sglang"), Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder)
    (folder / "sglang").symlink_to(installed / "sglang")
    sys.path.append(str(folder))
    patches = Path(__file__).parents[1] / "tests" / "engines" / "real_sglang"
    os.environ["PYTHONPATH"] = os.pathsep.join(map(str, (patches, installed)))
    os.environ |= {"SGLANG_USE_CPU_ENGINE": "1", "TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": str(threads)}
    settings = {"device": "cpu", "attention_backend": "torch_native", "max_total_tokens": 32768, "context_length": 1024}
    return SGLangRollout(settings)


if __name__ == "__main__":
    main()

"""This package against TRL's `GRPOTrainer`: each in a process of its own, the two in turn, medians over the rounds.

Both train the same model with the same optimizer steps (GRPO without KL penalty, every token weighing the same, AdamW,
clipping), in fp32 and without gradient checkpointing.

    python benchmarks/against_trl.py training             # forward, backward and step on frozen rollouts
    python benchmarks/against_trl.py iteration            # generation, rewards, training; reward curves
    python benchmarks/against_trl.py memory               # peak of the training phase at a large vocabulary
    python benchmarks/against_trl.py training --device cuda --shape 0.5B --prompts 16 --token-budget 16384 --out x.json

On a GPU both have fp32 weights and compute in bf16.

``training`` and ``memory`` give both the same completions through each one's own interface for rollouts, and compare
the gradients of the first step. ``iteration`` generates, with the sampling and prompts of the demo. TRL always
generates with transformers: its vLLM support needs a GPU.
"""

from __future__ import annotations

import argparse
import gc
import os
import tempfile
import time
import traceback
import zlib
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import mean, median
from typing import Any

from _common import SHAPES, Bars, draw_curves, llama, need_device, now, peak_rss_mb, report, resident_mb, spread

DEADLINE = 1800.0
"""Seconds that one iteration may take."""
SKEWED = (1.0, 0.6, 0.4, 0.3, 0.2, 0.15, 0.125, 0.125)
"""Lengths of the completions of a group, as shares of the longest."""


# ----------------------------------------------------------------------------------------------------- what both train


def reward(completion: str) -> float:
    """For frozen rollouts: arbitrary, but the same for the same text."""
    return zlib.crc32(completion.encode()) % 97 / 97


def frozen_rollouts(args: argparse.Namespace) -> dict[str, tuple[list[int], list[list[int]]]]:
    """Of each prompt's name its token ids and those of its completions: random ones of skewed lengths."""
    import torch

    g = torch.Generator().manual_seed(args.seed)

    def ids(count: int) -> list[int]:
        return torch.randint(100, 40_000, (count,), generator=g).tolist()

    shares = SKEWED if args.skewed else (1.0,) * args.n
    lengths = [max(1, round(args.completion_tokens * shares[k % len(shares)])) for k in range(args.n)]
    return {f"prompt {i}": (ids(args.prompt_tokens), [ids(length) for length in lengths]) for i in range(args.prompts)}


def build_model(args: argparse.Namespace) -> Any:
    """With random weights, for both the same."""
    import torch

    torch.manual_seed(0)
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    return llama(args.shape, args.layers, args.vocab, max_position_embeddings=8192, **ends)


def task_rows(args: argparse.Namespace) -> list[dict[str, str]]:
    from lightrft_lightning.tasks import make_task

    return make_task({"task": "addition", "size": args.prompts * (args.rounds + 1), "split": "train"})


# ------------------------------------------------------------------------------------------------------------- workers


class Turn:
    """A worker's side of taking turns: waits for the word before an iteration, and tells what it took."""

    def __init__(self, connection: Connection, gradient: Path, device: str) -> None:
        self.connection, self.gradient, self.device = connection, gradient, device
        self.hooked = False

    def begin(self, model: Any, optimizer: Any) -> None:
        if not self.hooked:
            names = {p: name for name, p in model.named_parameters()}
            optimizer.register_step_pre_hook(lambda opt, *_: self.keep(opt, names))
            self.hooked = True
        gc.collect()
        self.connection.send({"ready": True})
        try:
            if not self.connection.poll(DEADLINE) or self.connection.recv() != "go":
                raise SystemExit(0)
        except EOFError:  # the driver is gone
            raise SystemExit(1) from None
        self.held = resident_mb()
        self.start = now(self.device)

    def end(self, rollout: float, reward: float) -> None:
        """Tell what it took: `rollout` seconds with the rewards, whose mean is `reward`, the rest is training."""
        took = now(self.device) - self.start
        seconds = {"iteration": took, "rollout": rollout, "training": took - rollout}
        self.connection.send({**seconds, "reward": reward, "peak": peak_rss_mb(), "held": self.held})

    def keep(self, optimizer: Any, names: dict[Any, str]) -> None:
        """The gradient of the first step."""
        import torch

        if not self.gradient.exists():
            found = {names[p]: p.grad for group in optimizer.param_groups for p in group["params"]}
            torch.save(torch.cat([found[name].flatten() for name in sorted(found)]), self.gradient)


def trl_worker(turn: Turn, args: argparse.Namespace, folder: str) -> None:
    import torch
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from lightrft_lightning.models.loading import load_model, load_tokenizer

    torch.set_num_threads(args.threads)
    tokenizer: PreTrainedTokenizerFast = load_tokenizer("smollm2-135m-instruct")
    seconds = {"rollout": 0.0, "reward": 0.0}
    options: dict[str, Any] = {}
    if args.phase == "iteration":
        from lightrft_lightning.rewards.functions import last_number

        model = load_model("smollm2-135m-instruct")
        rows = [{"prompt": [{"role": "user", "content": r["prompt"]}], "answer": r["answer"]} for r in task_rows(args)]

        def score(completions: Any, answer: list[str], completion_ids: Any, **_: Any) -> list[float]:
            ends = [ids[-1] == tokenizer.eos_token_id for ids in completion_ids]
            texts = [c[0]["content"] for c in completions]
            scored = [
                last_number(text, right, "eos" if end else "length", unfinished=-0.5)
                for text, right, end in zip(texts, answer, ends, strict=True)
            ]
            seconds["reward"] = mean(scored)
            return scored
    else:
        model, rollouts = build_model(args), frozen_rollouts(args)
        rows = [{"prompt": name} for name in rollouts] * (args.rounds + 1)

        def frozen(prompts: list[str], trainer: Any) -> dict[str, Any]:
            numbers = [prompts[:k].count(name) for k, name in enumerate(prompts)]
            return {
                "prompt_ids": [rollouts[name][0] for name in prompts],
                "completion_ids": [rollouts[name][1][k] for name, k in zip(prompts, numbers, strict=True)],
                "logprobs": None,
            }

        def score(completions: list[str], **_: Any) -> list[float]:  # type: ignore[misc]
            return [reward(text) for text in completions]

        options["rollout_func"] = frozen
    total, gpu = args.prompts * args.n, args.device == "cuda"
    config = GRPOConfig(
        output_dir=folder, use_cpu=not gpu, bf16=gpu, gradient_checkpointing=False, report_to=[], save_strategy="no",
        logging_strategy="no", disable_tqdm=True, seed=args.seed, shuffle_dataset=False, max_steps=args.rounds + 1,
        per_device_train_batch_size=args.trl_batch, gradient_accumulation_steps=total // args.trl_batch,
        num_generations=args.n, max_completion_length=args.completion_tokens, temperature=1.0, learning_rate=args.lr,
        lr_scheduler_type="constant", adam_beta2=0.95, loss_type="dapo", beta=0.0, epsilon=0.2,
    )  # fmt: skip
    trainer = GRPOTrainer(
        model=model, reward_funcs=score, args=config, train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer, **options,
    )  # fmt: skip
    generate = trainer._generate_and_score_completions

    def timed(inputs: Any) -> Any:
        start = time.perf_counter()
        result = generate(inputs)
        seconds["rollout"] = time.perf_counter() - start
        return result

    trainer._generate_and_score_completions = timed

    class Turns(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *_: Any, model: Any, optimizer: Any, **__: Any) -> None:
            turn.begin(model, optimizer.optimizer)

        def on_step_end(self, *_: Any, **__: Any) -> None:
            turn.end(seconds["rollout"], seconds["reward"])

    trainer.add_callback(Turns())
    trainer.train()


def our_worker(turn: Turn, args: argparse.Namespace, folder: str, vllm: bool = False) -> None:
    import torch
    from lightning.pytorch import Callback, Trainer

    from lightrft_lightning import PromptDataModule, RLHFModule, RolloutCallback, SamplingParams, TransformersRollout
    from lightrft_lightning.data import make_dataloader
    from lightrft_lightning.experience.trajectory import Completion, Prompt
    from lightrft_lightning.models.loading import load_tokenizer

    torch.set_num_threads(args.threads)
    engine: RolloutCallback
    settings: dict[str, Any] = {}
    if args.phase == "iteration":
        model: Any = "smollm2-135m-instruct"
        rows, rewards = task_rows(args), {"name": "last_number", "unfinished": -0.5}
        if vllm:
            from lightrft_lightning.engines.vllm import VLLMRollout

            engine = VLLMRollout({"max_model_len": 512, "enforce_eager": True})
        else:
            engine = TransformersRollout()
    else:
        model, rollouts = build_model(args), frozen_rollouts(args)
        tokenizer = load_tokenizer("smollm2-135m-instruct")
        of_ids = {tuple(ids): completions for ids, completions in rollouts.values()}
        rows = [Prompt(tuple(ids), name) for name, (ids, _) in rollouts.items()] * (args.rounds + 1)
        rewards = reward
        settings = {"tokenizer": tokenizer, "advantage_options": {"eps": 1e-4}}

        class Frozen(TransformersRollout):
            def generate(self, prompts: Any, sampling: Any, streams: Any = None) -> Any:
                return [
                    [Completion(tuple(ids), (0.0,) * len(ids), "length") for ids in of_ids[tuple(prompt)]]
                    for prompt in prompts
                ]

        engine = Frozen()
        engine.drift_warning = None

    class Turns(Callback):
        def on_train_batch_start(self, trainer: Trainer, module: Any, *_: Any) -> None:
            turn.begin(module.actor, trainer.optimizers[0])

        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            seen = trainer.callback_metrics
            turn.end(float(seen["time/rollout"] + seen["time/rewards"]), float(seen["train/reward"]))

    module = RLHFModule(
        model, rewards, sampling=SamplingParams(n=args.n, max_new_tokens=args.completion_tokens), lr=args.lr,
        token_budget=args.token_budget, seed=args.seed, **settings,
    )  # fmt: skip
    gpu = args.device == "cuda"
    trainer = Trainer(
        strategy="lightrft_fake", accelerator="gpu" if gpu else "cpu", devices=1,
        precision="bf16-mixed" if gpu else "32-true", max_epochs=1, limit_train_batches=args.rounds + 1,
        callbacks=[engine, Turns()], logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=folder,
    )  # fmt: skip
    if args.phase == "iteration":
        trainer.fit(module, datamodule=PromptDataModule(train=rows, batch_size=args.prompts, shuffle=False))
    else:
        trainer.fit(module, make_dataloader(rows, args.prompts, shuffle=False))


def work(name: str, connection: Connection, args: argparse.Namespace, folder: str) -> None:
    """A worker process."""
    turn = Turn(connection, Path(folder, f"{name}.pt"), args.device)
    try:
        if name == "TRL":
            trl_worker(turn, args, folder)
        else:
            our_worker(turn, args, folder, vllm=name == "ours, vLLM")
    except Exception:
        connection.send({"error": traceback.format_exc()})


# -------------------------------------------------------------------------------------------------------------- driver


def run(names: list[str], args: argparse.Namespace) -> tuple[dict[str, list[dict[str, Any]]], float]:
    """What each iteration of each program took, without the first; and how far the first gradients are apart."""
    import torch

    context = get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        pipes, workers = {}, []
        for name in names:
            pipes[name], theirs = context.Pipe()
            workers.append(context.Process(target=work, args=(name, theirs, args, folder), daemon=True))
            workers[-1].start()
            answer(pipes[name], name)  # one loads after the other
        results: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
        for k in range(args.rounds + 1):
            for name in names:
                pipes[name].send("go")
                results[name].append(answer(pipes[name], name))
                if k < args.rounds:
                    answer(pipes[name], name)  # that it is ready for the next
        difference = float("nan")
        if args.phase != "iteration":
            ours, theirs = (torch.load(Path(folder, f"{name}.pt")) for name in ("ours", "TRL"))
            difference = float((ours - theirs).norm() / theirs.norm())
        for worker in workers:
            worker.join(60)
            worker.kill()
    return {name: of_name[1:] for name, of_name in results.items()}, difference


def answer(pipe: Connection, name: str) -> dict[str, Any]:
    if not pipe.poll(DEADLINE):
        raise SystemExit(f"{name} has not answered for {DEADLINE:.0f} s")
    message: dict[str, Any] = pipe.recv()
    if "error" in message:
        raise SystemExit(f"{name} failed:\n{message['error']}")
    return message


def training(args: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    for prompt_tokens in args.prompt_lengths:
        args.prompt_tokens = prompt_tokens
        results, difference = run(["TRL", "ours"], args)
        seconds = {name: median(r["training"] for r in of_name) for name, of_name in results.items()}
        ratios = [t["training"] / o["training"] for t, o in zip(results["TRL"], results["ours"], strict=True)]
        rows.append(
            {
                "prompt tokens": prompt_tokens,
                "TRL s": seconds["TRL"],
                "TRL spread": spread([r["training"] for r in results["TRL"]]),
                "ours s": seconds["ours"],
                "ours spread": spread([r["training"] for r in results["ours"]]),
                "ratio": seconds["TRL"] / seconds["ours"],
                "lowest ratio": min(ratios),
                "highest ratio": max(ratios),
                "gradient difference": difference,
            }
        )
        print(rows[-1], flush=True)  # the next takes many minutes
    return rows


def iteration(args: argparse.Namespace) -> list[dict[str, Any]]:
    names = ["TRL", "ours", *(["ours, vLLM"] if args.vllm else [])]
    results, _ = run(names, args)
    seconds = {name: median(r["iteration"] for r in of_name) for name, of_name in results.items()}
    return [
        {
            "program": name,
            "iteration s": seconds[name],
            "spread": spread([r["iteration"] for r in of_name]),
            "rollout s": median(r["rollout"] for r in of_name),
            "training s": median(r["training"] for r in of_name),
            "ratio": seconds["TRL"] / seconds[name],
            "reward, first third": mean(r["reward"] for r in of_name[: max(1, len(of_name) // 3)]),
            "reward, last third": mean(r["reward"] for r in of_name[-max(1, len(of_name) // 3) :]),
            "rewards": " ".join(f"{r['reward']:.2f}" for r in of_name),
        }
        for name, of_name in results.items()
    ]


def memory(args: argparse.Namespace) -> list[dict[str, Any]]:
    results, difference = run(["TRL", "ours"], args)
    peaks = {name: max(r["peak"] for r in of_name) for name, of_name in results.items()}
    # Libraries, weights and moments are there before the phase begins, and as large for both.
    added = {name: peaks[name] - of_name[-1]["held"] for name, of_name in results.items()}
    return [
        {
            "tokens": args.prompts * args.n * (args.prompt_tokens + args.completion_tokens),
            "vocabulary": args.vocab,
            "TRL, process MB": peaks["TRL"],
            "ours, process MB": peaks["ours"],
            "ratio, process": peaks["ours"] / peaks["TRL"],
            "TRL, phase MB": added["TRL"],
            "ours, phase MB": added["ours"],
            "ratio, phase": added["ours"] / added["TRL"],
            "gradient difference": difference,
        }
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("phase", choices=["training", "iteration", "memory"])
    parser.add_argument("--rounds", type=int, help="default: 5; memory: 1; iteration: 12")
    parser.add_argument("--prompts", type=int, default=4, help="prompts of an iteration; memory: 1")
    parser.add_argument("--n", type=int, default=8, help="completions of a prompt")
    parser.add_argument("--prompt-lengths", type=int, nargs="+", default=[32, 256], help="of training")
    parser.add_argument("--completion-tokens", type=int, help="most of a completion; default: 128, 64, 480")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="not of memory")
    parser.add_argument("--shape", choices=list(SHAPES), default="135M", help="of the model; not of iteration")
    parser.add_argument("--layers", type=int, help="default: those of the shape; memory: 2")
    parser.add_argument("--vocab", type=int, help="default: that of the shape; memory: 151936")
    parser.add_argument("--trl-batch", type=int, default=8, help="completions of one of TRL's passes")
    parser.add_argument("--token-budget", type=int, default=4096, help="tokens of one of our passes")
    parser.add_argument("--lr", type=float, default=2e-5)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-vllm", dest="vllm", action="store_false")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    need_device(args.device)
    if args.phase == "memory" and args.device != "cpu":
        parser.error("memory measures a process on a CPU: leave --device out")
    if args.phase == "iteration" and args.shape != "135M":
        parser.error("iteration trains the pretrained SmolLM2-135M: leave --shape out")
    defaults = {
        "training": {"rounds": 5, "completion_tokens": 128},
        "iteration": {"rounds": 12, "completion_tokens": 64},
        "memory": {"rounds": 1, "completion_tokens": 480, "layers": 2, "vocab": 151_936},
    }[args.phase]
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.skewed, args.prompt_tokens = args.phase == "training", 32
    if args.phase == "memory":
        args.prompts = 1
    settings = {k: v for k, v in vars(args).items() if k not in ("out", "phase")}
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    rows = {"training": training, "iteration": iteration, "memory": memory}[args.phase](args)
    bars = {
        "training": Bars(["prompt tokens"], ["TRL s", "ours s"], "seconds of the training phase"),
        "iteration": Bars(["program"], ["rollout s", "training s", "iteration s"], "seconds"),
        "memory": Bars(
            ["tokens", "vocabulary"],
            ["TRL, process MB", "ours, process MB", "TRL, phase MB", "ours, phase MB"],
            "MB at the peak",
        ),
    }[args.phase]
    path = report(f"against_trl_{args.phase}", rows, settings, args.out, bars)
    if args.phase == "iteration":
        curves = {row["program"]: [[float(reward) for reward in row["rewards"].split()]] for row in rows}
        draw_curves(curves, path.with_name(f"{path.stem}_rewards.png"), "mean training reward")


if __name__ == "__main__":
    main()

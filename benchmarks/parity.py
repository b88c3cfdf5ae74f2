"""One result on every back end: the same training on one process, FSDP2 and DeepSpeed ZeRO-1, 2, 3, compared.

Two runs for each back end, in fp32 with the same seed, model and data:

- A hand-written loop: an actor and a critic with learning rates of their own, sequences of different lengths, two
  backward passes a step, clipping that is active at every step.
- GRPO under a `Trainer`: rollouts from the transformers engine, rewards, updates in passes of a small token budget.

    python benchmarks/parity.py [--steps 20] [--only NAME ...] [--device cuda] [--bf16]

With ``--device cuda`` every back end runs on one GPU in one process. With ``--bf16`` all compute in bfloat16 with fp32
weights; rounding then depends on the order of sums, so differences of some per cent are to be expected.
"""

from __future__ import annotations

import argparse
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from _common import Bars, need_device, report  # isort: skip

BACK_ENDS = {
    "lightrft_fake": 1,
    "lightrft_fsdp": 2,
    "lightrft_deepspeed_stage_1": 2,
    "lightrft_deepspeed_stage_2": 2,
    "lightrft_deepspeed_stage_3": 2,
}
"""Names of the strategies, and on how many processes each runs."""

BATCH, ACCUMULATION = 16, 2


# ------------------------------------------------------------------------------------------------- what a rank does


class Critic(nn.Module):
    """A language model's backbone with a value head, as PPO trains it."""

    def __init__(self) -> None:
        super().__init__()
        from lightrft_lightning.models.tiny import tiny_llama

        self.backbone = tiny_llama(seed=1, width=32, layers=2).model
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.value_head = nn.Linear(32, 1)

    def forward(self, ids_BT: Tensor) -> Tensor:
        return self.value_head(self.backbone(ids_BT).last_hidden_state).squeeze(-1)


def sequences(step: int) -> list[Tensor]:
    """The global batch of a step: token ids, 4 to 16 of them."""
    generator = torch.Generator().manual_seed(step)
    lengths = torch.randint(4, 17, (BATCH,), generator=generator).tolist()
    return [torch.randint(3, 16, (n,), generator=generator) for n in lengths]


def returns(rows: list[Tensor]) -> Tensor:
    """What the critic is to predict for each sequence: between -1 and 1, too irregular to be learned in a few steps.

    A critic that fits has gradients that nearly cancel, and rounding in what is left of them.
    """
    return torch.stack([torch.sin(row.square().sum().float()) for row in rows])


def hand_written_loop(name: str, steps: int, device: str, bf16: bool) -> dict[str, Any]:
    """Losses and gradient norms of every step, and the parameters at the end."""
    from lightrft_lightning import FakeStrategy, get_strategy
    from lightrft_lightning.models.tiny import tiny_llama

    micro = BATCH // ACCUMULATION // processes(name, device)
    settings: dict[str, Any] = {"train_batch_size": BATCH, "micro_train_batch_size": micro, "max_norm": 0.2}
    settings["bf16"] = bf16
    fake = name == "lightrft_fake"
    strategy: Any = FakeStrategy(device=device, **settings) if fake else get_strategy(name, **settings)
    strategy.setup_distributed()
    models: dict[str, Any] = {"actor": tiny_llama(seed=0, width=32, layers=2), "critic": Critic()}
    rates = {"actor": 1e-3, "critic": 3e-3}
    optimizers = {k: strategy.create_optimizer(m, lr=rates[k], weight_decay=0.01) for k, m in models.items()}
    pairs = strategy.prepare(*((models[k], optimizers[k]) for k in models))
    for k, (model, optimizer) in zip(list(models), pairs, strict=True):
        models[k], optimizers[k] = model, optimizer
    history: dict[str, list[float]] = {f"{k} {what}": [] for k in models for what in ("loss", "norm")}
    for step in range(steps):
        batch = sequences(step)
        for part in range(ACCUMULATION):
            mine = batch[part::ACCUMULATION][strategy.get_rank() :: strategy.world_size]
            rows = [row.to(strategy.root_device) for row in mine]
            losses = {"actor": actor_loss(models["actor"], rows), "critic": critic_loss(models["critic"], rows)}
            for k, loss in losses.items():
                strategy.backward(loss, models[k], optimizers[k])
                history[f"{k} loss"].append(float(strategy.all_reduce(loss.detach())))
                norm = strategy.optimizer_step(optimizers[k], models[k], None, k)
                if norm is not None:
                    history[f"{k} norm"].append(norm)
    weights = {f"{k}.{n}": t.cpu().clone() for k, m in models.items() for n, t in strategy.named_full_tensors(m)}
    return {"history": history, "weights": weights}


def actor_loss(actor: nn.Module, rows: list[Tensor]) -> Tensor:
    """Mean over the sequences of the mean loss of their tokens."""
    ids_BT, mask_BT = padded(rows)
    logits_BTV = actor(input_ids=ids_BT, attention_mask=mask_BT).logits[:, :-1]
    losses_BT = nn.functional.cross_entropy(logits_BTV.transpose(1, 2), ids_BT[:, 1:], reduction="none")
    return ((losses_BT * mask_BT[:, 1:]).sum(1) / mask_BT[:, 1:].sum(1)).mean()


def critic_loss(critic: nn.Module, rows: list[Tensor]) -> Tensor:
    ids_BT, mask_BT = padded(rows)
    errors_BT = (critic(ids_BT) - returns(rows)[:, None]) ** 2
    return ((errors_BT * mask_BT).sum(1) / mask_BT.sum(1)).mean()


def padded(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    mask = nn.utils.rnn.pad_sequence([torch.ones_like(r) for r in rows], batch_first=True)
    return nn.utils.rnn.pad_sequence(rows, batch_first=True), mask


def length_reward(completion: str, answer: str) -> float:
    """Something that a random model can learn: characters of the answer, short."""
    return len(set(completion) & set(answer)) - 0.1 * len(completion)


def grpo(name: str, iterations: int, device: str, bf16: bool) -> dict[str, Any]:
    """Token ids, rewards, losses and gradient norms of a GRPO run."""
    import lightning.pytorch as pl

    from lightrft_lightning import PromptDataModule, RLHFModule, SamplingParams, TransformersRollout
    from lightrft_lightning.models.tiny import char_tokenizer, tiny_llama

    ranks = processes(name, device)
    tokens: list[Any] = []
    history: dict[str, list[float]] = {"loss": [], "grad_norm": [], "kl": [], "reward": []}

    class Record(pl.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
            mine = [(t.group, t.completion.token_ids) for t in module.last_trajectories]
            tokens.append(sorted(s for rank in trainer.strategy.gather_objects(mine) for s in rank))
            for key, values in history.items():
                values.append(float(trainer.callback_metrics[f"train/{key}"]))

    rows = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in range(2, 12) for b in range(2, 12)]
    module = RLHFModule(
        tiny_llama(seed=0, width=32, layers=2), length_reward, tokenizer=char_tokenizer(),
        sampling=SamplingParams(n=4, max_new_tokens=8), lr=1e-3, kl_coef=0.1, steps_per_epoch=2, token_budget=48,
        seed=7,
    )  # fmt: skip
    trainer = pl.Trainer(
        strategy=name, accelerator=device, devices=ranks, max_epochs=1, limit_train_batches=iterations,
        precision="bf16-mixed" if bf16 else "32-true",
        callbacks=[TransformersRollout(), Record()], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=1,
    )  # fmt: skip
    trainer.fit(module, datamodule=PromptDataModule(train=rows, batch_size=8 // ranks, seed=7))
    assert module.actor is not None
    weights = {n: t.cpu().clone() for n, t in trainer.strategy.named_full_tensors(module.actor)}  # type: ignore[attr-defined]
    return {"tokens": tokens, "history": history, "weights": weights}


def rank_main(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    result = {
        "loop": hand_written_loop(args.rank_of, args.steps, args.device, args.bf16),
        "grpo": grpo(args.rank_of, args.iterations, args.device, args.bf16),
    }
    if int(os.environ.get("RANK", 0)) == 0:
        torch.save(result, args.output)


# --------------------------------------------------------------------------------------------------- the comparison


def processes(name: str, device: str) -> int:
    """On a CPU the sharded back ends run in two; on a machine with one GPU in one."""
    return BACK_ENDS[name] if device == "cpu" else 1


def run(name: str, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run a back end in processes of its own."""
    output = folder / f"{name}.pt"
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    ranks = processes(name, args.device)
    command = [sys.executable, __file__, "--rank-of", name, "--device", args.device, "--output", str(output)]
    command += ["--steps", str(args.steps), "--iterations", str(args.iterations), *(["--bf16"] if args.bf16 else [])]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    if ranks > 1:
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
        env |= {"LOCAL_WORLD_SIZE": str(ranks), "TORCHELASTIC_RUN_ID": "parity"}
    jobs = [
        subprocess.Popen(
            command,
            env=env | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    for rank, process in enumerate(jobs):
        _, errors = process.communicate(timeout=600)
        if process.returncode:
            for other in jobs:
                other.kill()
            raise SystemExit(f"{name}: rank {rank} failed\n{errors[-4000:]}")
    return torch.load(output, weights_only=False)


def compare(name: str, device: str, result: dict[str, Any], reference: dict[str, Any]) -> dict[str, Any]:
    """Largest relative differences to the reference."""
    loop, loop_ref = result["loop"], reference["loop"]
    rl, rl_ref = result["grpo"], reference["grpo"]
    return {
        "strategy": name,
        "processes": processes(name, device),
        "loss": _difference(loop["history"], loop_ref["history"], "loss"),
        "gradient norm": _difference(loop["history"], loop_ref["history"], "norm"),
        "parameters": _weights_difference(loop["weights"], loop_ref["weights"]),
        "same token ids": "yes" if rl["tokens"] == rl_ref["tokens"] else "NO",
        "GRPO gradient norm": _difference(rl["history"], rl_ref["history"], "grad_norm"),
        "GRPO parameters": _weights_difference(rl["weights"], rl_ref["weights"]),
    }


def _difference(here: dict[str, list[float]], there: dict[str, list[float]], what: str) -> float:
    pairs = [(a, b) for key in there if key.endswith(what) for a, b in zip(here[key], there[key], strict=True)]
    assert pairs, f"no {what} was recorded"
    return max(abs(a - b) / abs(b) for a, b in pairs)


def _weights_difference(here: dict[str, Tensor], there: dict[str, Tensor]) -> float:
    """Largest over the tensors of the distance relative to the tensor's norm."""
    assert here.keys() == there.keys()
    return max(float((here[n] - there[n]).norm() / there[n].norm()) for n in there)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps of the hand-written loop")
    parser.add_argument("--iterations", type=int, default=5, help="iterations of GRPO, two optimizer steps each")
    parser.add_argument("--out", type=Path, help="JSON file of the differences; default: in benchmarks/results")
    parser.add_argument("--only", nargs="+", choices=list(BACK_ENDS)[1:], default=list(BACK_ENDS)[1:])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--rank-of", help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank_of:
        rank_main(args)
        return
    need_device(args.device)
    with tempfile.TemporaryDirectory() as folder:
        results = {n: run(n, args, Path(folder)) for n in ["lightrft_fake", *args.only]}
    rows = [compare(name, args.device, results[name], results["lightrft_fake"]) for name in args.only]
    settings = {"optimizer steps": args.steps, "GRPO iterations": args.iterations, "device": args.device}
    print("Largest relative differences to `lightrft_fake` in one process:\n")
    columns = [name for name, value in rows[0].items() if isinstance(value, float)]
    bars = Bars(["strategy"], columns, "largest relative difference", log=True)
    report("parity", rows, {**settings, "compute": "bfloat16" if args.bf16 else "float32"}, args.out, bars)


if __name__ == "__main__":
    main()

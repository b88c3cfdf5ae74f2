"""Save under one strategy, resume under another.

``resume.py save FOLDER NAME...``: train six steps under each strategy, with a checkpoint after step 3.
``resume.py load FOLDER OUTPUT NAME... -- SOURCE...``: under each strategy resume from each source, three steps.
"""

from __future__ import annotations

import json
import sys
from datetime import timedelta
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks"))
torch.set_num_threads(1)

from parity import ACCUMULATION, BATCH, Critic, actor_loss, critic_loss, sequences  # noqa: E402

from lightrft_lightning import get_strategy  # noqa: E402
from lightrft_lightning.models.tiny import tiny_llama  # noqa: E402

HALF, ALL = 3, 6


class Run:
    """An actor and a critic under a strategy, with schedules of their own."""

    def __init__(self, name: str, seed: int) -> None:
        # A run that resumes starts from other weights, so that what is not restored shows.
        strategy = get_strategy(name.split("@")[0], max_norm=0.2, **self._sizes())
        strategy.setup_distributed(timedelta(seconds=60))
        self.strategy = strategy
        models = {"actor": tiny_llama(seed=seed, width=32, layers=2), "critic": Critic()}
        self.models, self.optimizers, self.schedulers = {}, {}, {}
        for key, model in models.items():
            optimizer = strategy.create_optimizer(model, lr=1e-3, weight_decay=0.01)
            scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.2, ALL)
            triple = strategy.prepare((model, optimizer, scheduler))
            self.models[key], self.optimizers[key], self.schedulers[key] = triple

    @staticmethod
    def _sizes():
        import os

        ranks = int(os.environ.get("WORLD_SIZE", 1))
        return {"train_batch_size": BATCH, "micro_train_batch_size": BATCH // ACCUMULATION // ranks}

    def train(self, first: int, last: int) -> dict:
        """Losses and gradient norms of steps `first` to `last`, the parameters after them, and a random number."""
        losses, norms = [], []
        for step in range(first, last):
            for part in range(ACCUMULATION):
                rows = sequences(step)[part::ACCUMULATION][self.strategy.get_rank() :: self.strategy.world_size]
                for key, loss_of in (("actor", actor_loss), ("critic", critic_loss)):
                    loss = loss_of(self.models[key], rows)
                    self.strategy.backward(loss, self.models[key], self.optimizers[key])
                    losses.append(float(self.strategy.all_reduce(loss.detach())))
                    norm = self.strategy.optimizer_step(
                        self.optimizers[key], self.models[key], self.schedulers[key], key
                    )
                    norms += [] if norm is None else [norm]
        whole = {f"{k}.{n}": t.clone() for k, m in self.models.items() for n, t in self.strategy.named_full_tensors(m)}
        return {"losses": losses, "norms": norms, "weights": whole, "random": torch.rand(3).tolist()}

    def save(self, folder: Path) -> None:
        for key, model in self.models.items():
            self.strategy.save_ckpt(model, folder / key, tag="half", client_state={"step": HALF})

    def load(self, folder: Path) -> None:
        for key, model in self.models.items():
            path, client = self.strategy.load_ckpt(model, folder / key)
            assert client == {"step": HALF} and path.endswith("half")


def save(folder: Path, names: list[str]) -> None:
    for name in names:
        run = Run(name, seed=0)
        run.train(0, HALF)
        run.save(folder / name)
        result = run.train(HALF, ALL)
        torch.save(result, folder / f"{name}.rank{run.strategy.get_rank()}.pt")


def load(folder: Path, output: Path, names: list[str], sources: list[str]) -> None:
    """Largest relative differences to the uninterrupted run of each strategy; exactly equal or not."""
    differences = {}
    for name in names:
        expected = torch.load(folder / f"{name}.rank0.pt")
        for source in sources:
            run = Run(name, seed=3)
            run.load(folder / source)
            result = run.train(HALF, ALL)
            pairs = [(a, b) for what in ("losses", "norms") for a, b in zip(result[what], expected[what], strict=True)]
            weights = [((t - expected["weights"][n]).norm() / t.norm()).item() for n, t in result["weights"].items()]
            differences[f"{source} -> {name}"] = {
                "numbers": max(abs(a - b) / abs(b) for a, b in pairs),
                "weights": max(weights),
                "equal": all(a == b for a, b in pairs)
                and all(torch.equal(t, expected["weights"][n]) for n, t in result["weights"].items())
                and result["random"] == expected["random"],
            }
            rank = run.strategy.get_rank()
    if rank == 0:
        output.write_text(json.dumps(differences))


if __name__ == "__main__":
    mode, folder, *rest = sys.argv[1:]
    if mode == "save":
        save(Path(folder), rest)
    else:
        load(Path(folder), Path(rest[0]), rest[1 : rest.index("--")], rest[rest.index("--") + 1 :])

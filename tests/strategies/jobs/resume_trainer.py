"""A GRPO run under a Trainer, stopped in the middle of an epoch under one strategy and resumed under another.

``resume_trainer.py save FOLDER NAME...`` and ``resume_trainer.py load FOLDER OUTPUT NAME... -- SOURCE...``: see
resume.py.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from lightrft_lightning import PromptDataModule, RLHFModule, SamplingParams, TransformersRollout
from lightrft_lightning.models.tiny import char_tokenizer, tiny_llama

torch.set_num_threads(1)
RANKS = int(os.environ.get("WORLD_SIZE", 1))
if RANKS > 1:
    os.environ["TORCHELASTIC_RUN_ID"] = "test"


class Record(pl.Callback):
    """Token ids of all ranks, iteration by iteration; saves after the second one."""

    def __init__(self, path: Path | None) -> None:
        self.path, self.tokens = path, []

    def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
        mine = [(t.group, list(t.completion.token_ids)) for t in module.last_trajectories]
        self.tokens.append(sorted(s for rank in trainer.strategy.gather_objects(mine) for s in rank))
        if self.path is not None and module.iteration == 2:
            trainer.save_checkpoint(self.path)


def short(completion: str, answer: str) -> float:
    return len(set(completion) & set(answer)) - 0.1 * len(completion)


def run(name: str, save_to: Path | None = None, resume_from: Path | None = None) -> dict[str, Any]:
    record = Record(save_to)
    rows = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in range(2, 8) for b in range(2, 8)]
    module = RLHFModule(
        tiny_llama(seed=0, width=32, layers=2), short, tokenizer=char_tokenizer(), lr=1e-3, lr_schedule="linear",
        sampling=SamplingParams(n=4, max_new_tokens=8), kl_coef=0.1, token_budget=48, seed=7,
    )  # fmt: skip
    trainer = pl.Trainer(
        strategy=name.split("@")[0], accelerator="cpu", devices=RANKS, max_epochs=1, limit_train_batches=4,
        callbacks=[TransformersRollout(), record], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, datamodule=PromptDataModule(train=rows, batch_size=8 // RANKS, seed=7), ckpt_path=resume_from)
    weights = {n: t.clone() for n, t in trainer.strategy.named_full_tensors(module.actor)}
    return {"tokens": record.tokens[-2:], "weights": weights, "count": len(record.tokens), "step": trainer.global_step}


def main(mode: str, folder: Path, rest: list[str]) -> None:
    if mode == "save":
        for name in rest:
            torch.save(run(name, save_to=folder / f"{name}.ckpt"), folder / f"{name}.{os.environ.get('RANK', 0)}.pt")
        return
    output, names, sources = Path(rest[0]), rest[1 : rest.index("--")], rest[rest.index("--") + 1 :]
    found = {}
    for name in names:
        expected = torch.load(folder / f"{name}.0.pt")
        for source in sources:
            resumed = run(name, resume_from=folder / f"{source}.ckpt")
            weights = resumed["weights"]
            distance = max(((t - expected["weights"][n]).norm() / t.norm()).item() for n, t in weights.items())
            found[f"{source} -> {name}"] = {
                "same tokens": resumed["tokens"] == expected["tokens"] and resumed["count"] == 2,
                "same step": resumed["step"] == expected["step"] == 4,
                "weights": distance,
                "equal": all(torch.equal(t, expected["weights"][n]) for n, t in weights.items()),
            }
    if os.environ.get("RANK", "0") == "0":
        output.write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])

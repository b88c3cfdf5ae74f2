"""GRPO of a tiny model on two workers of Ray Train, whose parameters FSDP2 shards.

    pip install "lightrft-lightning[ray]"
    python examples/ray_train.py --iterations 3

Ray starts the processes and tells each its rank. Everything else is as under torchrun, so the weights are too; with
GPUs set `use_gpu=True` of the ScalingConfig and `accelerator="gpu"`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers import CSVLogger
from ray.train import RunConfig, ScalingConfig
from ray.train.lightning import RayLightningEnvironment
from ray.train.torch import TorchTrainer

from lightrft_lightning import PromptDataModule, RLHFModule, TransformersRollout
from lightrft_lightning.callbacks import ExportModel


def short(completion: str) -> float:
    """A reward that is learnt at once."""
    return -float(len(completion))


def module_and_data(batch_size: int) -> tuple[RLHFModule, PromptDataModule]:
    """What is trained, and the prompts of one worker."""
    model = {"name": "tiny-llama", "width": 32, "layers": 1}
    module = RLHFModule(model, short, sampling={"n": 4, "max_new_tokens": 8}, lr=1e-3, seed=0)
    prompts = [{"prompt": f"{a}+{b}="} for a in range(4) for b in range(8)]
    return module, PromptDataModule(prompts, batch_size=batch_size, seed=0)


def train(settings: dict[str, Any]) -> None:
    """What each worker runs."""
    folder = Path(settings["folder"])
    trainer = pl.Trainer(
        strategy="lightrft_fsdp",
        accelerator="cpu",
        devices="auto",  # what this worker sees
        plugins=[RayLightningEnvironment()],
        callbacks=[TransformersRollout(), ExportModel(str(folder / "model"))],
        max_steps=settings["iterations"],
        logger=CSVLogger(folder, "csv", ""),
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_checkpointing=False,
    )
    trainer.fit(*module_and_data(8 // trainer.world_size))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=Path("runs/ray_train"))
    arguments = parser.parse_args()
    folder = str(arguments.folder.absolute())
    TorchTrainer(
        train,
        train_loop_config={"iterations": arguments.iterations, "folder": folder},
        scaling_config=ScalingConfig(num_workers=arguments.workers),
        run_config=RunConfig(storage_path=f"{folder}/ray"),
    ).fit()
    print(f"curves: {folder}/csv/metrics.csv, model: {folder}/model")


if __name__ == "__main__":
    main()

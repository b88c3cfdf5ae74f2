"""A reward function of one's own, in three forms; a tiny Llama with random weights learns what the rewards ask for.

    python examples/own_reward.py

A reward takes `completion` (one text) or `completions` (all texts of the iteration), and by name any other column of
the data. It may be `async`. One that raises or takes too long costs its own sample and nothing else.
"""

import asyncio

import torch
from lightning.pytorch import Trainer, seed_everything

from lightrft_lightning import PromptDataModule, Rewards, RLHFModule, SamplingParams, TransformersRollout
from lightrft_lightning.callbacks import ProgressLine, SampleTable, Summary


def contains_digit(completion: str, digit: str) -> float:
    """Called once a sample. `digit` is a column of the data below; the value is the share of right characters."""
    return completion.count(digit) / 6


def not_too_alike(completions: list[str]) -> list[float]:
    """Called once an iteration, with lists: for rewards that compare samples, or a model that scores batches."""
    return [1 / completions.count(completion) for completion in completions]


async def graded_elsewhere(completion: str) -> float:
    """Awaited for all samples at the same time: for a server that grades. Here the end is graded, and slowly."""
    await asyncio.sleep(0.01)
    return float(completion.endswith("="))


if __name__ == "__main__":
    torch.set_num_threads(1)  # more would only wait for each other: the model is tiny
    seed_everything(0, verbose=False)
    prompts = [{"prompt": f"{digit}=", "digit": str(digit)} for digit in range(10)]
    module = RLHFModule(
        model={"name": "tiny-llama", "layers": 2, "width": 64},
        rewards=Rewards([contains_digit, not_too_alike, graded_elsewhere], weights=[1.0, 0.2, 0.2], deadline=5.0),
        sampling=SamplingParams(n=16, max_new_tokens=6),
        lr=3e-3,
    )
    trainer = Trainer(
        strategy="lightrft_fake",
        accelerator="cpu",
        max_epochs=60,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        logger=False,
        callbacks=[TransformersRollout(), ProgressLine(every_n=10), SampleTable(every_n=60), Summary()],
    )
    trainer.fit(module, datamodule=PromptDataModule(train=prompts, batch_size=10))

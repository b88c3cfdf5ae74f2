"""A short supervised start for models that would never find a right answer by chance."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from lightning.pytorch.utilities.seed import isolate_rng
from typing_extensions import override

from lightrft_lightning._errors import unknown_name
from lightrft_lightning._seeds import global_seed
from lightrft_lightning.callbacks._output import rlhf_module
from lightrft_lightning.callbacks.rollout import RolloutCallback
from lightrft_lightning.data import completion_ids
from lightrft_lightning.experience.packing import pack
from lightrft_lightning.experience.trajectory import Prompt
from lightrft_lightning.models.tokens import end_ids
from lightrft_lightning.sft_module import answer_loss
from lightrft_lightning.strategies.deepspeed import DeepspeedStrategy
from lightrft_lightning.supervised import trajectories_of

SMOOTHING = 5
"""Number of batches whose mean decides about `until`."""


class SupervisedWarmup(Callback):
    """Teaches the answers of the training prompts before reinforcement learning begins.

    Next-token loss on the answer and the end token, given the prompt; AdamW of its own, so the state of the training
    optimizer is not touched. It runs after the checkpoint has been restored and before the sanity check, so that the
    first validation sees its result; a fit that resumes has its weights from the checkpoint and skips it. All ranks
    train on the same batches.

    Args:
        steps: number of optimizer steps (one under ``fast_dev_run``).
        lr: learning rate.
        batch_size: prompts a step.
        answer_column: column of the training prompts that holds the answer.
        until: stop early once greedy decoding gets this share of the answers exactly right (mean of the latest 5
            batches, each seen before it is trained on); 0: never.
        seed: fixes the order of the prompts; default: Lightning's global seed, else 0.

    Raises:
        ValueError: a value is out of range; when the fit starts: a prompt has no such column, or the strategy is
            DeepSpeed.
    """

    def __init__(
        self,
        steps: int = 300,
        lr: float = 1e-3,
        batch_size: int = 64,
        answer_column: str = "answer",
        until: float = 0.0,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        if steps < 1 or batch_size < 1 or lr <= 0 or not 0 <= until <= 1:
            raise ValueError(
                f"SupervisedWarmup(steps={steps}, lr={lr}, batch_size={batch_size}, until={until}): "
                "steps and batch_size must be at least 1, lr above 0, until from 0 to 1"
            )
        self.steps, self.lr, self.batch_size = steps, lr, batch_size
        self.answer_column = answer_column
        self.until = until
        self.seed = global_seed() if seed is None else seed
        self._examples: list[Prompt] = []

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        module = rlhf_module(self, pl_module)
        if isinstance(trainer.strategy, DeepspeedStrategy):
            raise ValueError(
                "SupervisedWarmup has an optimizer of its own, and DeepSpeed ties a model to one: train an SFTModule "
                "first (`lightrft sft fit`), which runs on every strategy, and start from the folder that it writes"
            )
        prompts = getattr(trainer.datamodule, "train_prompts", None)  # type: ignore[attr-defined]
        if not prompts:
            raise ValueError("SupervisedWarmup needs a data module with `train_prompts`, as PromptDataModule has")
        ends = end_ids(module.actor, module.tokenizer)
        self._examples = [self._example(prompt, i, module.tokenizer, ends) for i, prompt in enumerate(prompts)]

    @override
    def on_sanity_check_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._once(trainer, pl_module)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._once(trainer, pl_module)

    def _once(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Train in the first of the two hooks; the other one exists because the sanity check may be off."""
        examples, self._examples = self._examples, []
        module = rlhf_module(self, pl_module)
        if not examples or trainer.ckpt_path or module.iteration:
            return
        steps = 1 if trainer.fast_dev_run else self.steps  # type: ignore[attr-defined]
        actor = module.actor
        assert actor is not None
        with isolate_rng():  # dropout
            torch.manual_seed(self.seed)
            self._train(actor, examples, steps, pl_module.device)
        for engine in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(engine, RolloutCallback):
                engine.stale = True

    def _train(self, actor: Any, examples: Sequence[Prompt], steps: int, device: torch.device) -> None:
        parameters = [p for p in actor.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=self.lr, betas=(0.9, 0.95))
        losses: list[float] = []
        shares: list[float] = []
        start = time.perf_counter()
        for batch in self._batches(examples, steps):
            longest = max(len(prompt.token_ids) + len(prompt.completions[0]) for prompt in batch)
            (packed,) = pack(trajectories_of(batch), longest * len(batch), share_prompts=False)
            answers = answer_loss(actor, packed.to(device))
            loss = answers.loss / answers.tokens
            losses.append(loss.item())
            shares.append(answers.right_texts / answers.texts)
            recent = shares[-SMOOTHING:]
            if self.until and len(recent) == SMOOTHING and sum(recent) / SMOOTHING >= self.until:
                break
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        seconds, exact = time.perf_counter() - start, sum(recent) / len(recent)
        rank_zero_info(
            f"Supervised warm-up: {len(losses)} steps in {seconds:.0f} s, loss {losses[0]:.3f} -> {losses[-1]:.3f}, "
            f"exact answers {shares[0]:.0%} -> {exact:.0%}"
        )

    def _batches(self, examples: Sequence[Prompt], steps: int) -> Iterator[list[Prompt]]:
        """`steps` batches; the prompts come in a new order once all have come."""
        generator = torch.Generator().manual_seed(self.seed)
        order: list[int] = []
        for _ in range(steps):
            while len(order) < self.batch_size:
                order += torch.randperm(len(examples), generator=generator).tolist()
            chosen, order = order[: self.batch_size], order[self.batch_size :]
            yield [examples[i] for i in chosen]

    def _example(self, prompt: Prompt, index: int, tokenizer: Any, ends: frozenset[int]) -> Prompt:
        if self.answer_column not in prompt.fields:
            known = unknown_name("column", self.answer_column, prompt.fields)
            raise ValueError(f"SupervisedWarmup: training prompt {index}: {known}")
        whole = prompt.text + str(prompt.fields[self.answer_column])
        answer = completion_ids(tokenizer, prompt, whole, special_tokens=not prompt.messages, ends=ends)
        return replace(prompt, completions=(answer,))

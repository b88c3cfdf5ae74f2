"""`SupervisedModule`: what training on given texts, `SFTModule` and `RewardModule`, has in common."""

from __future__ import annotations

import contextlib
import math
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any, NamedTuple

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from typing_extensions import override

from lightrft_lightning._errors import check_types, unknown_name
from lightrft_lightning._seeds import global_seed
from lightrft_lightning._trainer import LR_SCHEDULES, check_optimizers, check_strategy, with_lr_schedule
from lightrft_lightning.callbacks.checkpoint_folders import check_checkpoints
from lightrft_lightning.callbacks.monitors import tell_monitors
from lightrft_lightning.checkpoints.settings import KEY as SETTINGS
from lightrft_lightning.checkpoints.settings import given, let_given_win
from lightrft_lightning.checkpoints.trainer_state import load_module
from lightrft_lightning.experience.packing import PackedBatch, pack
from lightrft_lightning.experience.trajectory import Completion, Prompt, Trajectory, check_batch
from lightrft_lightning.models.layers import in_training_mode
from lightrft_lightning.models.loading import load_tokenizer
from lightrft_lightning.models.logprobs import pretrained_part, shared_prompt_problem
from lightrft_lightning.models.lora import add_lora, has_adapters
from lightrft_lightning.models.objects import check_model_object
from lightrft_lightning.models.outputs import tell_ignored_outputs
from lightrft_lightning.models.precision import train_in_float32
from lightrft_lightning.models.proof import proof_of_run
from lightrft_lightning.models.rope import most_positions
from lightrft_lightning.models.tokens import check_data_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lightrft_lightning.strategies.base import StrategyBase

Sums = dict[str, tuple[float, float]]
"""By name of a metric: its sum, and how many things were summed."""


class MicroBatch(NamedTuple):
    """What one forward pass takes.

    Attributes:
        batch: the rows.
        trajectories: what they were made from, in the order of `PackedBatch.trajectory`.
        weight: 1, or 0 for a pass that only keeps other ranks company.
    """

    batch: PackedBatch
    trajectories: Sequence[Trajectory]
    weight: int = 1


class SupervisedModule(pl.LightningModule):
    """Base of the modules that train on texts of the data set.

    A batch is a list of `Prompt` with `completions`, as `PromptDataModule` makes them; one `training_step` is one
    optimizer step over the batches of all ranks, in as many passes as the token budget asks for, with the same
    result whatever the cut. Optimization is manual; clipping (`max_norm`) and the optimizer are the strategy's.

    Args:
        model: as for `RLHFModule`.
        tokenizer: default: the one of `model`.
        lr: learning rate of AdamW.
        weight_decay: decoupled weight decay.
        lr_schedule: after a warm-up ``constant``, ``linear``, ``cosine``, or ``cosine_with_min_lr`` (to a tenth).
        warmup_ratio: share of all optimizer steps in which the rate rises linearly.
        token_budget: most tokens (padding included) of one forward pass.
        share_prompts: write the texts of one row behind a single copy of their prompt; False for models that take no
            dense attention mask.
        check_numerics: prove at the start of a fit that training computes what the model says (docs/proof.md).

    Raises:
        ValueError: a setting is out of range; before anything is loaded.
    """

    completion_columns: tuple[str, ...] = ()
    """Columns with the texts to learn from; `PromptDataModule` asks."""
    lora: dict[str, Any] | None = None
    """Settings of the adapters that `configure_model` puts around the model."""

    def __init__(
        self,
        model: Any = None,
        tokenizer: Any = None,
        lr: float = 1e-5,
        weight_decay: float = 0.0,
        lr_schedule: str = "constant",
        warmup_ratio: float = 0.0,
        token_budget: int = 8192,
        share_prompts: bool = True,
        check_numerics: bool = True,
    ) -> None:
        super().__init__()
        if model is None:
            raise ValueError(f"{type(self).__name__} needs `model`")
        check_types(type(self).__name__, SupervisedModule.__init__, locals())
        self.automatic_optimization = False
        self.lr, self.weight_decay = lr, weight_decay
        self.lr_schedule, self.warmup_ratio = lr_schedule, warmup_ratio
        self.token_budget, self.share_prompts = token_budget, share_prompts
        self.check_numerics = check_numerics
        if lr_schedule not in LR_SCHEDULES:
            raise ValueError(unknown_name("lr_schedule", lr_schedule, LR_SCHEDULES))
        self._check("lr", 0 <= lr < math.inf, "0 or more")
        self._check("weight_decay", 0 <= weight_decay < math.inf, "0 or more")
        self._check("warmup_ratio", 0 <= warmup_ratio <= 1, "between 0 and 1")
        self._check("token_budget", token_budget >= 1, "at least 1")
        check_model_object(model)
        self._source: Any = None if isinstance(model, nn.Module) else model
        self._tokenizer = tokenizer
        self.model: Any = in_training_mode(model) if isinstance(model, nn.Module) else None
        self._sums: Sums = {}
        self._given: dict[str, Any] | None = None

    def _check(self, name: str, ok: bool, allowed: str) -> None:
        if not ok:
            raise ValueError(f"{type(self).__name__}({name}={getattr(self, name)!r}): must be {allowed}")

    def _save_hyperparameters(self, model: Any, **more: Any) -> None:
        """Plain values only, so that a checkpoint can be read with `weights_only=True`."""
        source = str(model) if isinstance(model, PathLike) else model if isinstance(model, str | Mapping) else None
        names = ("lr", "weight_decay", "lr_schedule", "warmup_ratio", "token_budget", "share_prompts", "check_numerics")
        self.save_hyperparameters({"model": source, **{name: getattr(self, name) for name in names}, **more})

    # ---------------------------------------------------------------- what a subclass says

    @abstractmethod
    def _load_model(self, source: Any) -> nn.Module:
        """The model to train, from a folder or a name."""

    @abstractmethod
    def _count(self, trajectories: Sequence[Trajectory]) -> int:
        """What the loss is a mean over: tokens, or pairs."""

    @abstractmethod
    def _losses(self, batch: PackedBatch, trajectories: Sequence[Trajectory]) -> tuple[Tensor, Sums]:
        """The sum of the loss over a micro-batch, and all metrics."""

    def _tokens_needed(self, prompt: Prompt) -> int:
        """The smallest budget of a pass in which the texts of one row fit."""
        return len(prompt.token_ids) + max(map(len, prompt.completions))

    def _micro_batches(self, prompts: Sequence[Prompt]) -> list[MicroBatch]:
        trajectories = trajectories_of(prompts)
        batches = pack(trajectories, self.token_budget, share_prompts=self.share_prompts)
        return [MicroBatch(batch, trajectories) for batch in batches]

    # ---------------------------------------------------------------- one step

    def training_step(self, batch: Iterable[Prompt], batch_idx: int) -> None:
        """One optimizer step."""
        prompts = self._checked(batch)
        count = self.strategy.all_reduce(self._count(trajectories_of(prompts)), op="sum")
        passes = self._passes(prompts)
        sums: Sums = {}
        for micro in passes:
            loss, metrics = self._losses(micro.batch, micro.trajectories)
            self._step(loss * (micro.weight / count), len(passes))
            _add(sums, metrics, micro.weight)
        values = self._means(sums)
        values["grad_norm"] = self.strategy.grad_norms["model"]
        values["skipped_steps"] = float(self.strategy.skipped_steps.get("model", 0))
        self._log("train", values, on_epoch=False)

    def _passes(self, prompts: Sequence[Prompt]) -> list[MicroBatch]:
        """This rank's micro-batches, as many as on any other: the passes of sharded models wait for one another."""
        real = [prompt for prompt in prompts if not prompt.filler]
        passes = self._micro_batches(real) if real else []
        needed = int(self.strategy.all_reduce(len(passes), op="max"))
        if needed > len(passes):
            shortest = min(prompts, key=self._tokens_needed)
            (company,) = self._micro_batches([shortest])
            passes += [company._replace(weight=0)] * (needed - len(passes))
        return [micro._replace(batch=micro.batch.to(self.device)) for micro in passes]

    def _step(self, loss: Tensor, passes: int) -> None:
        """Back-propagate; the strategy steps at the last of `passes`. `loss` is a share of the mean over all ranks."""
        strategy, optimizer, scheduler = self.strategy, self.optimizers(), self.lr_schedulers()
        strategy.backward(loss * passes * strategy.world_size, self.model, optimizer, accumulation_steps=passes)
        strategy.optimizer_step(optimizer, self.model, scheduler, "model", accumulation_steps=passes)  # type: ignore[arg-type]

    def _means(self, sums: Sums) -> dict[str, float]:
        """Metrics over all ranks."""
        totals = self.strategy.all_reduce(torch.tensor(list(sums.values()), dtype=torch.float64), op="sum")
        return {name: value / count for name, (value, count) in zip(sums, totals.tolist(), strict=True)}

    # ---------------------------------------------------------------- evaluation

    def validation_step(self, batch: Iterable[Prompt], batch_idx: int) -> None:
        """Adds to the sums over the whole held-out set, in which each row counts once."""
        for micro in self._passes(self._checked(batch)):
            _add(self._sums, self._losses(micro.batch, micro.trajectories)[1], micro.weight)

    def test_step(self, batch: Iterable[Prompt], batch_idx: int) -> None:
        """As `validation_step`."""
        self.validation_step(batch, batch_idx)

    @override
    def on_validation_epoch_start(self) -> None:
        self._sums = {}

    @override
    def on_test_epoch_start(self) -> None:
        self._sums = {}

    @override
    def on_validation_epoch_end(self) -> None:
        self._log_sums("val")

    @override
    def on_test_epoch_end(self) -> None:
        self._log_sums("test")

    def _log_sums(self, stage: str) -> None:
        # The values are the same on every rank; without sync_dist Lightning would warn that they may not be.
        self._log(stage, self._means(self._sums), sync_dist=True)

    def _log(self, stage: str, values: Mapping[str, float], **settings: Any) -> None:
        for name, value in values.items():
            self.log(f"{stage}/{name}", value, prog_bar=name in ("loss", "accuracy"), **settings)

    # ---------------------------------------------------------------- data

    def _checked(self, prompts: Iterable[Prompt]) -> list[Prompt]:
        """`prompts`, all of which can be learnt from.

        Raises:
            ValueError: one has not the texts that the module trains on, or is too long for a pass or the model.
        """
        prompts = list(prompts)
        check_batch(prompts)
        for prompt in prompts:
            if len(prompt.completions) != len(self.completion_columns):
                raise ValueError(
                    f"{type(self).__name__} trains on the columns {', '.join(map(repr, self.completion_columns))}, and "
                    f"the prompt {prompt.text[:40]!r} comes with {len(prompt.completions)} texts: set "
                    f"PromptDataModule(completion_columns={list(self.completion_columns)!r}), or leave it out"
                )
        needed = max((self._tokens_needed(prompt) for prompt in prompts), default=0)
        if needed > self.token_budget:
            raise ValueError(
                f"the longest row takes {needed} tokens of a pass, token_budget is {self.token_budget}: raise it, or "
                "leave long rows out with PromptDataModule(max_length=..., overlong='drop')"
            )
        positions = most_positions(self.model.config)
        longest = max((len(p.token_ids) + max(map(len, p.completions)) for p in prompts), default=0)
        if positions is not None and longest > positions:
            raise ValueError(
                f"the longest row has {longest} tokens, the model's max_position_embeddings is {positions}: leave long "
                "rows out with PromptDataModule(max_length=..., overlong='drop')"
            )
        return prompts

    # ---------------------------------------------------------------- set-up

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer; without one of its own that of the model's source, loaded at first use."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self._source or self.model.config.name_or_path)
        return self._tokenizer

    @property
    def model_or_source(self) -> Any:
        """What the model is, or will be loaded from."""
        return self._source if self.model is None else self.model

    @property
    def strategy(self) -> StrategyBase:
        """The Trainer's strategy."""
        return self.trainer.strategy  # type: ignore[return-value]

    @override
    def setup(self, stage: str) -> None:
        check_strategy(self)
        validated = getattr(self.trainer.datamodule, "val_prompts", None)  # type: ignore[attr-defined]
        if isinstance(validated, Mapping):
            raise ValueError(
                f"PromptDataModule(val=...) has the sets {', '.join(map(repr, validated))}: {type(self).__name__} "
                "takes one, so put them together or leave the others out"
            )

    @override
    def configure_model(self) -> None:
        if self.model is None:
            # Without a trainer this is `load_from_checkpoint`. Adapters have names that no folder has to stream from.
            alone = self._trainer is None
            with contextlib.nullcontext() if alone else self.strategy.init_model_context(meta_init=self.lora is None):
                self.model = self._load_model(self._source).train()
        if self.lora is not None and not has_adapters(self.model):  # a second fit calls this again
            self.model = add_lora(self.model, self.lora, global_seed())
        train_in_float32(self.model)

    @override
    def configure_optimizers(self) -> Any:
        return with_lr_schedule(self, self.model, self)

    @override
    def on_fit_start(self) -> None:
        check_optimizers(self.trainer)
        self._given = given(self)
        check_checkpoints(self.trainer, self.model)
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        for name in ("train_prompts", "val_prompts"):
            prompts = getattr(data, name, None) or ()
            self._checked(prompts)
            check_data_ids(name.removesuffix("_prompts"), prompts, self.model, self.tokenizer)
        tell_ignored_outputs(self.model)
        tell_monitors(self, bool(getattr(data, "val_prompts", None)) or data is None)
        self._prove_layout()

    def _prove_layout(self) -> None:
        """Give the model a kernel under which it computes the right thing; see `models.proof`."""
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        prompts = [p for p in getattr(data, "train_prompts", None) or () if p.completions]
        longest = max((len(p.token_ids) + max(map(len, p.completions)) for p in prompts), default=self.token_budget)
        new = max((max(map(len, p.completions)) for p in prompts), default=longest)
        problem = shared_prompt_problem(self.model, self.token_budget) if self.share_prompts else None
        if problem is not None:
            raise ValueError(f"{problem}; set share_prompts=False")
        inner = pretrained_part(self.model)
        proof_of_run(self, inner, [p.token_ids for p in prompts], longest, new).settle(self.model, "the model")

    # ---------------------------------------------------------------- checkpoints

    @classmethod
    @override
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> SupervisedModule:  # type: ignore[override]
        """As Lightning's, also for the folders that this package's strategies write; in one process.

        Of the rewards and environments that the checkpoint names, registered ones are built. Any other name in it is an
        error, unless it is passed here, like ``rewards="file.py:mine"``, or with ``weights_only=False``, which lets the
        checkpoint run any code.

        Raises:
            ValueError: such a name.
        """
        return load_module(cls, checkpoint_path, *args, **kwargs)

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint[SETTINGS] = self._given

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        let_given_win(self, self._given, checkpoint)


def trajectories_of(prompts: Iterable[Prompt]) -> list[Trajectory]:
    """The texts of the data set in the form that `pack` takes; those of a prompt are a group."""
    return [
        Trajectory(prompt, Completion(ids, (0.0,) * len(ids), "eos"), group)
        for group, prompt in enumerate(prompts)
        for ids in prompt.completions
    ]


def _add(sums: Sums, more: Sums, weight: int) -> None:
    for name, (value, count) in more.items():
        before, counted = sums.get(name, (0.0, 0.0))
        sums[name] = (before + weight * value, counted + weight * count)

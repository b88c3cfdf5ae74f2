"""The settings of `RLHFModule`, and which of them do not go together."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from os import PathLike
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch

from lightrft_lightning import algorithms
from lightrft_lightning._errors import unknown_name
from lightrft_lightning._find import check_named
from lightrft_lightning._trainer import LR_SCHEDULES
from lightrft_lightning.critic import Critic
from lightrft_lightning.experience.trajectory import SamplingParams

if TYPE_CHECKING:
    from lightrft_lightning.strategies.base import StrategyBase

KL_PLACES = ("loss", "reward")
REWARD_NORMS = ("none", "scale", "full")
SHORT_BATCHES = ("train", "error")
OFFLOADS = ("none", "optimizer", "all")
BY_TOKEN = ("reinforce", "reinforce_plus_plus", "gae")
"""Advantage estimators that look at single tokens."""
ONE_CALL = "what is sampled ahead is sampled in one call of the engine; leave one of them out"


class Settings(pl.LightningModule):
    """What `RLHFModule` was told; see there for what each setting means."""

    sampling: SamplingParams
    val_sampling: SamplingParams
    first_token_temperature: float | None
    algorithm: str | None
    advantage_estimator: str
    advantage_options: dict[str, Any]
    policy_loss: str
    policy_loss_options: dict[str, Any]
    correction: str
    correction_options: dict[str, Any]
    aggregation: str
    high_entropy_share: float
    kl_coef: float
    kl_estimator: str
    kl_unbiased_gradient: bool
    kl_in: str
    kl_target: float | None
    kl_horizon: int
    dynamic_sampling: bool
    staleness: int
    sampling_attempts: int
    short_batch: str
    overlong_buffer: int
    overlong_factor: float
    reward_norm: str
    reward_clip: float
    critic_settings: Critic | None
    advantage_norm: bool
    advantage_clip: float
    lr: float
    weight_decay: float
    lr_schedule: str
    warmup_ratio: float
    epochs_per_rollout: int
    steps_per_epoch: int
    token_budget: int
    share_prompts: bool
    attn_implementation: str
    lora: dict[str, Any] | None
    quantization: str | None
    offload: str
    gradient_checkpointing: bool
    compile_layers: bool
    check_numerics: bool
    pass_threshold: float
    max_turns: int | None
    max_length: int | None
    seed: int

    @property
    def strategy(self) -> StrategyBase:
        """The Trainer's strategy."""
        return self.trainer.strategy  # type: ignore[return-value]

    def _check_settings(self) -> None:
        if not self.attn_implementation.isidentifier():  # "organisation/kernel" is fetched from the hub and run
            check_named("attn_implementation", self.attn_implementation, "attn_implementation=...")
        for registry, name in (
            (algorithms.ADVANTAGES, self.advantage_estimator),
            (algorithms.POLICY_LOSSES, self.policy_loss),
            (algorithms.KL_ESTIMATORS, self.kl_estimator),
        ):
            if name not in registry:
                raise ValueError(unknown_name(registry.kind, name, registry))
        for kind, name, valid in (
            ("aggregation", self.aggregation, algorithms.AGGREGATIONS),
            ("lr_schedule", self.lr_schedule, LR_SCHEDULES),
            ("kl_in", self.kl_in, KL_PLACES),
            ("reward_norm", self.reward_norm, REWARD_NORMS),
            ("short_batch", self.short_batch, SHORT_BATCHES),
            ("offload", self.offload, OFFLOADS),
        ):
            if name not in valid:
                raise ValueError(unknown_name(kind, name, valid))
        loss = algorithms.POLICY_LOSSES[self.policy_loss]
        algorithms.check_options("policy loss", self.policy_loss, loss, self.policy_loss_options)
        if self.correction != "none":
            correction = algorithms.CORRECTIONS[self.correction]
            algorithms.check_options("correction", self.correction, correction, self.correction_options)
            nothing = torch.zeros(1)
            algorithms.importance_weights(self.correction, nothing, nothing, **self.correction_options)
        elif self.correction_options:
            raise ValueError(f"correction_options={self.correction_options!r} without a correction")
        estimator = algorithms.ADVANTAGES[self.advantage_estimator]
        algorithms.check_options("advantage estimator", self.advantage_estimator, estimator, self.advantage_options)
        takes_values = getattr(estimator, "needs_critic", False)
        if takes_values and self.critic_settings is None:
            raise ValueError(
                f"advantage_estimator={self.advantage_estimator!r} needs a critic: set critic={{'lr': 1e-5}}"
            )
        if self.critic_settings is not None and not takes_values:
            raise ValueError(
                f"critic={self.critic_settings} with advantage_estimator={self.advantage_estimator!r}, which takes no "
                "values: leave it out, or use advantage_estimator='gae'"
            )
        if self.kl_unbiased_gradient and not (self.kl_coef and self.kl_in == "loss"):
            raise ValueError("kl_unbiased_gradient=True is about a penalty in the loss: set kl_coef and kl_in='loss'")
        first = self.first_token_temperature
        checks = {
            "first_token_temperature": (first is None or first > 0, "above 0, or None"),
            "high_entropy_share": (0 < self.high_entropy_share <= 1, "above 0 and at most 1 (all tokens)"),
            "kl_coef": (0 <= self.kl_coef < math.inf, "0 or more"),
            "kl_target": (self.kl_target is None or self.kl_target > 0, "above 0, or None"),
            "kl_horizon": (self.kl_horizon >= 1, "at least 1"),
            "staleness": (self.staleness in (0, 1), "0, or 1 to sample one batch ahead"),
            "sampling_attempts": (self.sampling_attempts >= 1, "at least 1"),
            "reward_clip": (self.reward_clip >= 0, "0 (off) or more"),
            "advantage_clip": (self.advantage_clip >= 0, "0 (off) or more"),
            "lr": (0 <= self.lr < math.inf, "0 or more"),
            "weight_decay": (0 <= self.weight_decay < math.inf, "0 or more"),
            "warmup_ratio": (0 <= self.warmup_ratio <= 1, "between 0 and 1"),
            "epochs_per_rollout": (self.epochs_per_rollout >= 1, "at least 1"),
            "steps_per_epoch": (self.steps_per_epoch >= 1, "at least 1"),
            "token_budget": (self.token_budget >= 1, "at least 1"),
            "max_turns": (self.max_turns is None or self.max_turns >= 1, "at least 1"),
            "max_length": (self.max_length is None or 1 <= self.max_length <= self.token_budget, "1 to token_budget"),
            "pass_threshold": (abs(self.pass_threshold) < float("inf"), "a finite number"),
        }
        for name, (ok, allowed) in checks.items():
            if not ok:
                raise ValueError(f"RLHFModule({name}={getattr(self, name)!r}): must be {allowed}")
        if self.kl_in == "reward" and self.kl_coef and self.advantage_estimator not in BY_TOKEN:
            raise ValueError(
                f"kl_in='reward' with advantage_estimator={self.advantage_estimator!r}: it compares whole completions; "
                f"use one of {', '.join(BY_TOKEN)}, or kl_in='loss'"
            )
        divisors = {
            f"advantage_estimator={self.advantage_estimator!r}": getattr(estimator, "normalises", False),
            "advantage_norm=True": self.advantage_norm,
            f"reward_norm={self.reward_norm!r}": self.reward_norm != "none",
        }
        if sum(divisors.values()) > 1:
            twice = " and ".join(name for name, divides in divisors.items() if divides)
            raise ValueError(f"{twice} would normalise more than once: keep one of them")
        if self.advantage_estimator == "dr_grpo" and any(divisors.values()):
            given = next(name for name, divides in divisors.items() if divides)
            raise ValueError(
                f"advantage_estimator='dr_grpo' with {given}: it is group_norm without the division, which this would "
                "bring back; leave it out, or use 'group_norm'"
            )
        if self.overlong_buffer:
            nothing = torch.zeros(0)
            limit = self.sampling.max_new_tokens
            algorithms.overlong_penalty(nothing, limit, self.overlong_buffer, self.overlong_factor)
        if self.dynamic_sampling and not self._compares_groups:
            raise ValueError(
                f"dynamic_sampling=True with advantage_estimator={self.advantage_estimator!r}, which does not compare "
                "the completions of a prompt: it learns from equal rewards too"
            )
        for name in ("dynamic_sampling", "first_token_temperature"):
            if self.staleness and getattr(self, name):
                raise ValueError(f"{name}={getattr(self, name)!r} with staleness={self.staleness}: {ONE_CALL}")
        if self.staleness and self.offload != "none":
            raise ValueError(
                f"offload={self.offload!r} with staleness={self.staleness}: training goes on beside every rollout, "
                "leave one of them out"
            )
        if self.kl_target is not None and not self.kl_coef:
            raise ValueError(f"kl_target={self.kl_target!r} needs a kl_coef above 0 to begin with")
        self._check_sampling()

    @property
    def _shares_trunk(self) -> bool:
        return self.critic_settings is not None and self.critic_settings.share_trunk

    @property
    def _compares_groups(self) -> bool:
        return getattr(algorithms.ADVANTAGES[self.advantage_estimator], "compares_groups", False)

    def _check_sampling(self) -> None:
        s = self.sampling
        if s.n < 2 and self._compares_groups:
            raise ValueError(
                f"advantage_estimator={self.advantage_estimator!r} compares the completions of one prompt: "
                f"sampling.n={s.n} must be at least 2"
            )
        if s.temperature == 0:
            raise ValueError("sampling.temperature=0 (greedy) draws the same completion every time: set it above 0")
        if s.stop and self.first_token_temperature is not None:
            raise ValueError(
                f"sampling.stop={s.stop} with first_token_temperature={self.first_token_temperature}: a stop string "
                "that begins with the first token, which is sampled by itself, would be missed; leave one of them out"
            )
        if s.top_p < 1 or s.top_k > 0:
            raise ValueError(
                f"sampling.top_p={s.top_p}, top_k={s.top_k}: the engine would sample from another distribution than "
                "the trainer computes; train with top_p=1, top_k=0 and set them in val_sampling"
            )

    def _save_hyperparameters(self, model: Any, rewards: Any, environment: Any, **more: Any) -> None:
        """Plain values only, so that a checkpoint can be read with `weights_only=True`."""
        plain = {
            "sampling": dataclasses.asdict(self.sampling),
            "val_sampling": dataclasses.asdict(self.val_sampling),
            "model": str(model) if isinstance(model, PathLike) else model if isinstance(model, str | Mapping) else None,
            "rewards": rewards if isinstance(rewards, str | Mapping) else None,
            "environment": environment if isinstance(environment, str | Mapping) else None,
            "critic": self.critic_settings and self.critic_settings.plain(),
            "compile": self.compile_layers,
        }
        names = (
            "first_token_temperature", "algorithm", "advantage_estimator", "advantage_options", "policy_loss",
            "policy_loss_options", "correction", "correction_options", "aggregation", "high_entropy_share", "kl_coef",
            "kl_estimator", "kl_unbiased_gradient", "kl_in", "kl_target", "kl_horizon", "dynamic_sampling", "staleness",
            "sampling_attempts", "short_batch", "overlong_buffer", "overlong_factor", "reward_norm", "reward_clip",
            "advantage_norm", "advantage_clip", "lr", "weight_decay", "lr_schedule", "warmup_ratio",
            "epochs_per_rollout", "steps_per_epoch", "token_budget", "share_prompts", "attn_implementation",
            "lora", "quantization", "offload", "gradient_checkpointing", "pass_threshold", "max_turns", "max_length",
            "check_numerics", "seed",
        )  # fmt: skip
        self.save_hyperparameters({**plain, **{name: getattr(self, name) for name in names}, **more})

"""The critic of `RLHFModule`: its settings, the model that they mean, and its values."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from os import PathLike
from typing import Any

from torch import Tensor, nn

from lightrft_lightning._errors import check_types, unknown_name
from lightrft_lightning._trainer import LR_SCHEDULES
from lightrft_lightning.experience.packing import PackedBatch
from lightrft_lightning.models.layers import in_training_mode
from lightrft_lightning.models.scalar import completion_values, load_scalar_model, with_scalar_head


@dataclass(frozen=True)
class Critic:
    """How the values that GAE needs are learnt.

    Attributes:
        model: where it starts: anything that `load_scalar_model` takes, so also a reward model, if it has the policy's
            tokenizer; default: the policy's starting weights with a new head.
        share_trunk: a head on the policy's hidden states in place of a model; its loss trains the policy too.
        value_coef: weight of the value loss beside the policy's, with a shared trunk.
        value_clip: how far a value may move in one update before its gradient ends; None: any distance.
        warmup_iterations: iterations at the start in which the critic alone learns.
        lr: learning rate of its AdamW.
        weight_decay: decoupled weight decay.
        lr_schedule: after a warm-up ``constant``, ``linear``, ``cosine``, or ``cosine_with_min_lr`` (to a tenth).
        warmup_ratio: share of all its optimizer steps in which the rate rises linearly.

    Raises:
        ValueError: a value is out of range, or a model is given although the trunk is shared.
    """

    model: Any = None
    share_trunk: bool = False
    value_coef: float = 0.1
    value_clip: float | None = 0.2
    warmup_iterations: int = 0
    lr: float = 1e-5
    weight_decay: float = 0.0
    lr_schedule: str = "constant"
    warmup_ratio: float = 0.0

    def __post_init__(self) -> None:
        check_types("Critic", Critic, vars(self))
        checks = {
            "weight_decay": (0 <= self.weight_decay < math.inf, "0 or more"),
            "value_coef": (self.value_coef > 0, "above 0"),
            "value_clip": (self.value_clip is None or self.value_clip > 0, "above 0, or None to switch it off"),
            "warmup_iterations": (self.warmup_iterations >= 0, "0 or more"),
            "lr": (0 <= self.lr < math.inf, "0 or more"),
            "warmup_ratio": (0 <= self.warmup_ratio <= 1, "between 0 and 1"),
        }
        for name, (ok, allowed) in checks.items():
            if not ok:
                raise ValueError(f"Critic({name}={getattr(self, name)!r}): must be {allowed}")
        if self.lr_schedule not in LR_SCHEDULES:
            raise ValueError(unknown_name("lr_schedule", self.lr_schedule, LR_SCHEDULES))
        if self.share_trunk and self.model is not None:
            raise ValueError(f"Critic(model={self.model!r}, share_trunk=True): a shared trunk has no model of its own")

    def plain(self) -> dict[str, Any]:
        """As plain values, for a checkpoint; a model that is an object is left out."""
        model = str(self.model) if isinstance(self.model, PathLike) else self.model
        return asdict(replace(self, model=model if isinstance(model, str | Mapping) else None))


def as_critic(value: Critic | Mapping[str, Any] | None) -> Critic | None:
    """`value` as `Critic`.

    Raises:
        ValueError: an unknown setting, or what `Critic` refuses.
    """
    if value is None or isinstance(value, Critic):
        return value
    for name in value:
        if name not in Critic.__dataclass_fields__:
            raise ValueError(unknown_name("setting of the critic", name, Critic.__dataclass_fields__))
    return Critic(**value)


def new_critic(settings: Critic, source: Any, actor: Any) -> nn.Module:
    """A critic as it starts: a model with one number as output, or a head for the policy's hidden states.

    Args:
        settings: of the critic.
        source: where the policy comes from; None if it was given as an object.
        actor: the policy, whole unless `source` is given.
    """
    if settings.share_trunk:
        config = actor.config.get_text_config()
        head = nn.Linear(config.hidden_size, 1, bias=False)
        nn.init.zeros_(head.weight)
        return head
    if isinstance(settings.model, nn.Module):
        return in_training_mode(settings.model)
    start = source if settings.model is None else settings.model
    if start is not None:
        return load_scalar_model(start).train()
    inner = actor.get_base_model() if hasattr(actor, "get_base_model") else actor
    return with_scalar_head(inner).train()


def critic_values(critic: Any, batch: PackedBatch, hidden: Tensor | None = None) -> Tensor:
    """``[N]`` the value of the state before each policy token.

    Args:
        critic: from `new_critic`.
        batch: from `pack`.
        hidden: ``[N, H]`` the policy's hidden states, if the critic is a head on them.
    """
    return completion_values(critic, batch) if hidden is None else critic(hidden)[:, 0].float()

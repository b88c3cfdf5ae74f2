"""Advantage estimators: from rewards to how much better a completion was than expected."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightrft_lightning._registry import Registry
from lightrft_lightning.algorithms._options import check_options


@dataclass(frozen=True)
class AdvantageInputs:
    """What an advantage estimator sees.

    Attributes:
        rewards: ``[B]`` float64, one a completion, finite.
        group_ids: ``[B]`` int64, completions with the same id answer the same prompt; None if not given.
        mask: ``[B, T]`` bool, true at policy tokens; None if not given.
        values: ``[B, T]`` of the critic; None if not given.
    """

    rewards: Tensor
    group_ids: Tensor | None = None
    mask: Tensor | None = None
    values: Tensor | None = None


@dataclass(frozen=True)
class Advantages:
    """What an advantage estimator returns.

    Attributes:
        advantages: ``[B]`` one value a completion, or ``[B, T]`` one a token and 0 where masked.
        returns: ``[B, T]`` what a critic is fitted to; None for estimators without one.
        metrics: scalars for the log.
    """

    advantages: Tensor
    returns: Tensor | None = None
    metrics: Mapping[str, Tensor] = field(default_factory=dict)


AdvantageEstimator = Callable[..., Advantages]

ADVANTAGES: Registry[AdvantageEstimator] = Registry("advantage estimator")
"""Name → function ``(AdvantageInputs, *, options) -> Advantages``."""


@ADVANTAGES.register("group_norm")
def group_norm(inputs: AdvantageInputs, *, eps: float = 1e-6) -> Advantages:
    """GRPO: ``(r - mean) / (std + eps)`` within each group, unbiased std (arXiv 2402.03300).

    Where all rewards of a group are equal the advantages are exactly 0: there is nothing to learn, and rounding errors
    of the mean divided by a tiny `eps` would be noise of order 1.

    Raises:
        ValueError: a group has only one completion, or no groups were given.
    """
    rewards = inputs.rewards
    index, counts = _groups("group_norm", inputs)
    zeros = rewards.new_zeros(counts.numel())
    centred = rewards - (zeros.index_add(0, index, rewards) / counts)[index]
    std = (zeros.index_add(0, index, centred.square()) / (counts - 1)).sqrt()
    highest = zeros.scatter_reduce(0, index, rewards, "amax", include_self=False)
    lowest = zeros.scatter_reduce(0, index, rewards, "amin", include_self=False)
    equal = highest == lowest
    advantages = torch.where(equal[index], 0.0, centred / (std + eps)[index])
    return Advantages(advantages, metrics={"equal_groups": equal.double().mean(), "group_std": std.mean()})


def _groups(name: str, inputs: AdvantageInputs) -> tuple[Tensor, Tensor]:
    """Group index ``[B]`` (0, 1, ...) of each completion and the sizes of the groups, all at least 2."""
    if inputs.group_ids is None:
        raise ValueError(f"advantage estimator {name!r} compares completions of a prompt: give group_ids")
    ids, index, counts = inputs.group_ids.unique(return_inverse=True, return_counts=True)
    alone = ids[counts == 1].tolist()
    if alone:
        raise ValueError(
            f"advantage estimator {name!r} needs at least 2 completions a prompt, but group {alone[0]} has one"
            + (f" (and {len(alone) - 1} more groups)" if len(alone) > 1 else "")
            + ". Sample more per prompt, or leave the group out"
        )
    return index, counts


def advantages(
    name: str,
    rewards: Tensor | Sequence[float],
    group_ids: Tensor | Sequence[int] | None = None,
    mask: Tensor | None = None,
    values: Tensor | None = None,
    **options: Any,
) -> Advantages:
    """Estimate advantages.

    Args:
        name: ``group_norm`` or one registered in `ADVANTAGES`.
        rewards: ``[B]``, one a completion. Samples whose reward failed are the caller's to leave out.
        group_ids: ``[B]`` ints, completions with the same number share a prompt.
        mask: ``[B, T]``, true at policy tokens. If given, advantages of completions are spread over their tokens.
        values: ``[B, T]``, a critic's values, for estimators that use them.
        **options: of the estimator, e.g. ``eps=1e-6``.

    Returns:
        See `Advantages`; in the dtype of `rewards` if that is a floating one, computed in float64.

    Raises:
        ValueError: an unknown name or option, a reward that is not finite, shapes that do not fit, or what the
            estimator refuses.
    """
    estimator = ADVANTAGES[name]
    check_options("advantage estimator", name, estimator, options)
    rewards = torch.as_tensor(rewards)
    dtype = rewards.dtype if rewards.is_floating_point() else torch.get_default_dtype()
    bad = (~rewards.isfinite()).nonzero().flatten().tolist()
    if bad:
        raise ValueError(f"reward {bad[0]} is {rewards[bad[0]].item()}: leave out samples without a reward")
    ids = None if group_ids is None else torch.as_tensor(group_ids, dtype=torch.long, device=rewards.device)
    for what, tensor in {"group_ids": ids, "mask": mask, "values": values}.items():
        if tensor is not None and len(tensor) != len(rewards):
            raise ValueError(f"{what} has {len(tensor)} entries for {len(rewards)} rewards")
    result = estimator(AdvantageInputs(rewards.double(), ids, None if mask is None else mask.bool(), values), **options)
    spread = result.advantages
    if mask is not None and spread.dim() == 1:
        spread = spread[:, None] * mask
    return Advantages(spread.to(dtype), result.returns, result.metrics)

"""Advantage estimators: from rewards to how much better a completion, or a token, was than expected."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightrft_lightning._registry import Registry
from lightrft_lightning.algorithms._options import check_options

SumOverRanks = Callable[[Tensor], Tensor]


def _of_one_rank(value: Tensor) -> Tensor:
    return value


@dataclass(frozen=True)
class AdvantageInputs:
    """What an advantage estimator sees.

    Attributes:
        rewards: ``[B]`` float64, one a completion, finite.
        group_ids: ``[B]`` int64, completions with the same id answer the same prompt; None if not given.
        mask: ``[B, T]`` bool, true at policy tokens; None if not given.
        values: ``[B, T]`` of the critic; None if not given.
        token_rewards: ``[B, T]`` rewards of single tokens, such as a KL penalty; None if there are none.
        sum_over_ranks: adds a tensor up over all ranks, for statistics of the global batch.
    """

    rewards: Tensor
    group_ids: Tensor | None = None
    mask: Tensor | None = None
    values: Tensor | None = None
    token_rewards: Tensor | None = None
    sum_over_ranks: SumOverRanks = _of_one_rank


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


def compares_groups(estimator: AdvantageEstimator) -> AdvantageEstimator:
    """Mark an estimator that needs at least two completions of every prompt; `RLHFModule` leaves other groups out."""
    estimator.compares_groups = True  # type: ignore[attr-defined]
    return estimator


def normalises(estimator: AdvantageEstimator) -> AdvantageEstimator:
    """Mark an estimator that divides by a standard deviation; `RLHFModule` refuses to divide by a second one."""
    estimator.normalises = True  # type: ignore[attr-defined]
    return estimator


def needs_critic(estimator: AdvantageEstimator) -> AdvantageEstimator:
    """Mark an estimator that takes the values of a critic and returns what it is fitted to."""
    estimator.needs_critic = True  # type: ignore[attr-defined]
    return estimator


# -------------------------------------------------------------------- by comparison within a group


@ADVANTAGES.register("group_norm")
@compares_groups
@normalises
def group_norm(inputs: AdvantageInputs, *, eps: float = 1e-6) -> Advantages:
    """GRPO: ``(r - mean) / (std + eps)`` within each group, unbiased std (arXiv 2402.03300).

    Where all rewards of a group are equal the advantages are exactly 0: there is nothing to learn, and rounding errors
    of the mean divided by a tiny `eps` would be noise of order 1.

    Raises:
        ValueError: a group has only one completion, or no groups were given.
    """
    groups = _Groups("group_norm", inputs)
    std = groups.std()
    scaled = groups.exactly_zero_where_equal(groups.centred / (std + eps)[groups.index])
    return Advantages(scaled, metrics={"equal_groups": groups.equal.double().mean(), "group_std": std.mean()})


@ADVANTAGES.register("dr_grpo")
@compares_groups
def dr_grpo(inputs: AdvantageInputs) -> Advantages:
    """``r - mean`` within each group, not divided by anything (Dr. GRPO, arXiv 2503.20783).

    Its loss goes with the aggregation ``sequence_sum_constant``.

    Raises:
        ValueError: a group has only one completion, or no groups were given.
    """
    groups = _Groups("dr_grpo", inputs)
    return Advantages(
        groups.exactly_zero_where_equal(groups.centred), metrics={"equal_groups": groups.equal.double().mean()}
    )


@ADVANTAGES.register("rloo")
@compares_groups
def rloo(inputs: AdvantageInputs) -> Advantages:
    """``r`` less the mean of the *other* completions of its group (RLOO, arXiv 2402.14740).

    Raises:
        ValueError: a group has only one completion, or no groups were given.
    """
    groups = _Groups("rloo", inputs)
    sizes = groups.sizes[groups.index]
    return Advantages(
        groups.exactly_zero_where_equal(groups.centred * sizes / (sizes - 1)),
        metrics={"equal_groups": groups.equal.double().mean()},
    )


@ADVANTAGES.register("cpgd")
@compares_groups
@normalises
def cpgd(inputs: AdvantageInputs, *, eps: float = 1e-6) -> Advantages:
    """The advantage that CPGD uses, `group_norm` (arXiv 2505.12504); it goes with the policy loss ``cpgd``."""
    return group_norm(inputs, eps=eps)


@ADVANTAGES.register("reinforce_baseline")
@compares_groups
@normalises
def reinforce_baseline(inputs: AdvantageInputs, *, eps: float = 1e-8) -> Advantages:
    """``r - mean`` within each group, then divided by its std over the global batch (arXiv 2501.03262, section 3.4).

    Raises:
        ValueError: a group has only one completion, or no groups were given.
    """
    groups = _Groups("reinforce_baseline", inputs)
    centred = groups.exactly_zero_where_equal(groups.centred)
    mask = torch.ones_like(centred, dtype=torch.bool) if inputs.mask is None else inputs.mask
    spread = centred if inputs.mask is None else centred[:, None].expand_as(mask)
    mean, std = global_moments(spread, mask, inputs.sum_over_ranks)
    normal = (centred - mean) / (std + eps)
    return Advantages(normal, metrics={"equal_groups": groups.equal.double().mean(), "batch_std": std})


# -------------------------------------------------------------------- by return


@ADVANTAGES.register("reinforce")
def reinforce(inputs: AdvantageInputs, *, gamma: float = 1.0, baseline: bool = False) -> Advantages:
    """The discounted return from each token on, by choice less the mean reward of the global batch (Williams, 1992).

    Args:
        inputs: with `mask`, unless `gamma` is 1 and there are no `token_rewards`.
        gamma: discount of one token.
        baseline: subtract the mean reward over all completions of all ranks.

    Raises:
        ValueError: a mask is needed, or `gamma` is out of range.
    """
    _check_discount("reinforce", gamma=gamma)
    rewards = inputs.rewards
    if baseline:
        mean, _ = global_moments(rewards, torch.ones_like(rewards, dtype=torch.bool), inputs.sum_over_ranks)
        rewards = rewards - mean
    if gamma == 1 and inputs.token_rewards is None:
        return Advantages(rewards)
    return Advantages(_returns("reinforce", inputs, rewards, gamma))


@ADVANTAGES.register("reinforce_plus_plus")
@normalises
def reinforce_plus_plus(inputs: AdvantageInputs, *, gamma: float = 1.0, eps: float = 1e-8) -> Advantages:
    """The return from each token on, normalised over all policy tokens of the global batch (arXiv 2501.03262).

    Args:
        inputs: with `mask`; the KL penalty is in `token_rewards`.
        gamma: discount of one token.
        eps: added to the standard deviation.

    Raises:
        ValueError: no mask was given, or `gamma` is out of range.
    """
    _check_discount("reinforce_plus_plus", gamma=gamma)
    returns = _returns("reinforce_plus_plus", inputs, inputs.rewards, gamma)
    assert inputs.mask is not None
    mean, std = global_moments(returns, inputs.mask, inputs.sum_over_ranks)
    normal = torch.where(inputs.mask, (returns - mean) / (std + eps), 0.0)
    return Advantages(normal, metrics={"batch_std": std})


@ADVANTAGES.register("gae")
@needs_critic
def gae(inputs: AdvantageInputs, *, gamma: float = 1.0, lam: float = 1.0) -> Advantages:
    """Generalised advantage estimation with a critic (arXiv 1506.02438), not normalised; returns are A + V.

    Tokens in between that the policy did not write (a tool's output) are passed over: the token after them counts as
    the next one.

    Args:
        inputs: with `mask` and `values`.
        gamma: discount of one token.
        lam: weight of long estimates; 1 is the return less the value, 0 a single step.

    Raises:
        ValueError: no mask or values were given, or a discount is out of range.
    """
    _check_discount("gae", gamma=gamma, lam=lam)
    if inputs.values is None:
        raise ValueError("advantage estimator 'gae' needs a critic: give values")
    rewards = _token_rewards("gae", inputs, inputs.rewards)
    assert inputs.mask is not None
    values = inputs.values.to(rewards)
    advantages = torch.zeros_like(rewards)
    following, running = (rewards.new_zeros(len(rewards)) for _ in range(2))
    for t in reversed(range(rewards.shape[1])):
        here = inputs.mask[:, t]
        delta = rewards[:, t] + gamma * following - values[:, t]
        running = torch.where(here, delta + gamma * lam * running, running)
        following = torch.where(here, values[:, t], following)
        advantages[:, t] = torch.where(here, running, 0.0)
    return Advantages(advantages, torch.where(inputs.mask, advantages + values, 0.0))


# -------------------------------------------------------------------- parts


class _Groups:
    """The completions of a batch by their prompts.

    Attributes:
        index: ``[B]`` which group (0, 1, ...) a completion belongs to.
        sizes: of the groups, all at least 2.
        centred: ``[B]`` rewards less the mean of the group.
        equal: for each group, whether all of its rewards are the same.
    """

    def __init__(self, name: str, inputs: AdvantageInputs) -> None:
        if inputs.group_ids is None:
            raise ValueError(f"advantage estimator {name!r} compares completions of a prompt: give group_ids")
        ids, self.index, self.sizes = inputs.group_ids.unique(return_inverse=True, return_counts=True)
        alone = ids[self.sizes == 1].tolist()
        if alone:
            raise ValueError(
                f"advantage estimator {name!r} needs at least 2 completions a prompt, but group {alone[0]} has one"
                + (f" (and {len(alone) - 1} more groups)" if len(alone) > 1 else "")
                + ". Sample more per prompt, or leave the group out"
            )
        rewards = inputs.rewards
        self._zeros = rewards.new_zeros(self.sizes.numel())
        self.centred = rewards - (self._zeros.index_add(0, self.index, rewards) / self.sizes)[self.index]
        highest = self._zeros.scatter_reduce(0, self.index, rewards, "amax", include_self=False)
        lowest = self._zeros.scatter_reduce(0, self.index, rewards, "amin", include_self=False)
        self.equal = highest == lowest

    def std(self) -> Tensor:
        """Unbiased, of each group."""
        return (self._zeros.index_add(0, self.index, self.centred.square()) / (self.sizes - 1)).sqrt()

    def exactly_zero_where_equal(self, values: Tensor) -> Tensor:
        return torch.where(self.equal[self.index], 0.0, values)


def _token_rewards(name: str, inputs: AdvantageInputs, rewards: Tensor) -> Tensor:
    """``[B, T]``: `token_rewards`, with the completion's reward at its last policy token."""
    if inputs.mask is None:
        raise ValueError(f"advantage estimator {name!r} looks at single tokens: give mask")
    mask = inputs.mask
    spread = torch.zeros(mask.shape, dtype=rewards.dtype, device=rewards.device)
    if inputs.token_rewards is not None:
        spread = torch.where(mask, inputs.token_rewards.to(rewards), 0.0)
    last = mask.shape[1] - 1 - mask.int().flip(1).argmax(1)
    some = mask.any(1)
    spread[some.nonzero()[:, 0], last[some]] += rewards[some]
    return spread


def _returns(name: str, inputs: AdvantageInputs, rewards: Tensor, gamma: float) -> Tensor:
    """``[B, T]`` discounted sum of the rewards from each policy token on; 0 where masked."""
    spread = _token_rewards(name, inputs, rewards)
    assert inputs.mask is not None
    returns, running = torch.zeros_like(spread), spread.new_zeros(len(spread))
    for t in reversed(range(spread.shape[1])):
        here = inputs.mask[:, t]
        running = torch.where(here, spread[:, t] + gamma * running, running)
        returns[:, t] = torch.where(here, running, 0.0)
    return returns


def global_moments(values: Tensor, mask: Tensor, sum_over_ranks: SumOverRanks) -> tuple[Tensor, Tensor]:
    """Mean and (biased) standard deviation over the unmasked entries of all ranks."""
    kept = values[mask].double()
    total, count = sum_over_ranks(torch.stack([kept.sum(), kept.new_tensor(kept.numel())]))
    mean = total / count.clamp(min=1)
    (square,) = sum_over_ranks((kept - mean).square().sum()[None])
    return mean, (square / count.clamp(min=1)).sqrt()


def _check_discount(name: str, **options: float) -> None:
    for option, value in options.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{name}({option}={value!r}): must be between 0 and 1")


def advantages(
    name: str,
    rewards: Tensor | Sequence[float],
    group_ids: Tensor | Sequence[int] | None = None,
    mask: Tensor | None = None,
    values: Tensor | None = None,
    *,
    token_rewards: Tensor | None = None,
    sum_over_ranks: SumOverRanks = _of_one_rank,
    **options: Any,
) -> Advantages:
    """Estimate advantages.

    Args:
        name: of an estimator in `ADVANTAGES`.
        rewards: ``[B]``, one a completion. Samples whose reward failed are the caller's to leave out.
        group_ids: ``[B]`` ints, completions with the same number share a prompt.
        mask: ``[B, T]``, true at policy tokens. If given, advantages of completions are spread over their tokens.
        values: ``[B, T]``, a critic's values, for estimators that use them.
        token_rewards: ``[B, T]``, rewards of single tokens, such as a KL penalty, for estimators that look at tokens.
        sum_over_ranks: adds a tensor up over all ranks, if the batch is spread over several.
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
    for what, tensor in {"group_ids": ids, "mask": mask, "values": values, "token_rewards": token_rewards}.items():
        if tensor is not None and len(tensor) != len(rewards):
            raise ValueError(f"{what} has {len(tensor)} entries for {len(rewards)} rewards")
    for what, tensor in {"values": values, "token_rewards": token_rewards}.items():
        if tensor is not None and mask is not None and tensor.shape != mask.shape:
            raise ValueError(f"{what} has shape {tuple(tensor.shape)}, mask {tuple(mask.shape)}")
    inputs = AdvantageInputs(
        rewards.double(), ids, None if mask is None else mask.bool(), values, token_rewards, sum_over_ranks
    )
    result = estimator(inputs, **options)
    spread = result.advantages
    if mask is not None and spread.dim() == 1:
        spread = spread[:, None] * mask
    return Advantages(spread.to(dtype), result.returns, result.metrics)

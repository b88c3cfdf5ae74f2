"""Policy losses: per-token objectives, and how tokens are weighed into one number.

The two are separate. An objective knows nothing of the batch it is in; `aggregation_weights` knows only sizes, and gets
those of the *whole optimizer step* from outside. So ``loss = -(weights * objective).sum()`` of micro-batches, on any
number of ranks, adds up exactly to the loss of the global batch, however it is cut. All tensors are flat: one entry for
each policy token, as `PackedBatch` has them; `policy_loss` is the front door for padded ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightrft_lightning._registry import Registry
from lightrft_lightning.algorithms._options import check_options
from lightrft_lightning.algorithms._sequences import mean_of_sequence
from lightrft_lightning.algorithms.kl import k3

_MAX_LOG_RATIO = 20.0


@dataclass(frozen=True)
class PolicyTokens:
    """What a policy loss sees: every policy token of some sequences, flat. A sequence is never cut.

    Attributes:
        log_probs: ``[N]`` under the policy that is trained, with gradient.
        old_log_probs: ``[N]`` under the policy that the ratio is taken to.
        advantages: ``[N]``.
        sequence: ``[N]`` int64, which sequence a token belongs to; any numbering from 0, gaps allowed.
    """

    log_probs: Tensor
    old_log_probs: Tensor
    advantages: Tensor
    sequence: Tensor

    @property
    def log_ratio(self) -> Tensor:
        """``[N]`` log(pi / pi_old), within ±20 so that its exponential is finite (inf times 0 would be NaN)."""
        return (self.log_probs - self.old_log_probs.detach()).clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO)


@dataclass(frozen=True)
class TokenObjective:
    """What a policy loss returns.

    Attributes:
        value: ``[N]``, to be maximised.
        metrics: name → ``[N]`` without gradient; concatenate over micro-batches, then `summarize`.
    """

    value: Tensor
    metrics: Mapping[str, Tensor]


@dataclass(frozen=True)
class BatchTotals:
    """Sizes of the whole optimizer step, over all micro-batches and ranks: what its loss is divided by.

    Attributes:
        num_tokens: policy tokens.
        num_sequences: completions, those without policy tokens included.
        max_length: the length limit of a completion, for ``sequence_sum_constant``.
    """

    num_tokens: int
    num_sequences: int
    max_length: int | None = None


class PolicyLoss(NamedTuple):
    """Of a policy or a critic: what to minimise (scalar), and metrics (scalars without gradient, none of no token)."""

    loss: Tensor
    metrics: dict[str, Tensor]


PolicyObjective = Callable[..., TokenObjective]
Aggregation = Callable[[Tensor, BatchTotals], Tensor]

POLICY_LOSSES: Registry[PolicyObjective] = Registry("policy loss")
"""Name → function ``(PolicyTokens, *, options) -> TokenObjective``."""

AGGREGATIONS: Registry[Aggregation] = Registry("aggregation")
"""Name → function ``(sequence [N], BatchTotals) -> weights``, ``[N]`` or a scalar."""


@POLICY_LOSSES.register("ppo")
def ppo(
    tokens: PolicyTokens, *, clip_low: float = 0.2, clip_high: float = 0.2, dual_clip: float | None = None
) -> TokenObjective:
    """The clipped objective ``min(ratio * A, clip(ratio, 1 - clip_low, 1 + clip_high) * A)`` (arXiv 1707.06347).

    Args:
        tokens: see `PolicyTokens`.
        clip_low: how far the ratio may fall before the gradient ends.
        clip_high: how far it may rise; above `clip_low` it is DAPO's clip-higher (arXiv 2503.14476).
        dual_clip: the objective is at least ``dual_clip * A`` where A < 0 (arXiv 1912.09729), usually 3.

    Raises:
        ValueError: a clip is negative or `dual_clip` is at most 1.
    """
    _check_not_negative("ppo", clip_low=clip_low, clip_high=clip_high)
    if dual_clip is not None and dual_clip <= 1:
        raise ValueError(f"ppo(dual_clip={dual_clip!r}): must be above 1, or None to switch it off")
    return _clipped(tokens.advantages, tokens.log_ratio, clip_low, clip_high, dual_clip)


@POLICY_LOSSES.register("gspo")
def gspo(tokens: PolicyTokens, *, clip_low: float = 3e-4, clip_high: float = 4e-4) -> TokenObjective:
    """`ppo` on the ratio of the whole sequence, ``s = exp(mean log ratio)`` (GSPO, arXiv 2507.18071, eq. 5 and 7).

    Every token of a sequence has the sequence's objective, so ``sequence_mean`` is the paper's mean over sequences.

    Args:
        tokens: see `PolicyTokens`.
        clip_low: how far s may fall before the gradient ends.
        clip_high: how far it may rise. The ranges are so narrow because the mean of a sequence moves little.

    Raises:
        ValueError: a clip is negative.
    """
    _check_not_negative("gspo", clip_low=clip_low, clip_high=clip_high)
    log_ratio = mean_of_sequence(tokens.log_ratio, tokens.sequence)
    return _clipped(tokens.advantages, log_ratio, clip_low, clip_high)


@POLICY_LOSSES.register("gmpo")
def gmpo(tokens: PolicyTokens, *, clip_low: float = 0.4, clip_high: float = 0.4) -> TokenObjective:
    """Geometric mean over the tokens of the clipped ratio, times A (GMPO, arXiv 2507.20673, equation 4).

    Each token's ratio is clipped to [exp(-clip_low), exp(clip_high)] on the side where it would improve the objective.
    Every token of a sequence has the sequence's objective.

    Args:
        tokens: see `PolicyTokens`.
        clip_low: of the log-ratio, downwards.
        clip_high: of the log-ratio, upwards.

    Raises:
        ValueError: a clip is negative.
    """
    _check_not_negative("gmpo", clip_low=clip_low, clip_high=clip_high)
    advantages, log_ratio = tokens.advantages, tokens.log_ratio
    clipped = log_ratio.clamp(-clip_low, clip_high)
    kept = torch.where(advantages > 0, torch.minimum(log_ratio, clipped), torch.maximum(log_ratio, clipped))
    value = mean_of_sequence(kept, tokens.sequence).exp() * advantages
    return TokenObjective(value, _metrics(log_ratio, kept != log_ratio))


@POLICY_LOSSES.register("cispo")
def cispo(tokens: PolicyTokens, *, clip_low: float = 1.0, clip_high: float = 0.28) -> TokenObjective:
    """The policy gradient weighted by the clipped ratio, ``clip(ratio) * A * log pi`` (CISPO, arXiv 2506.13585, eq. 4).

    No token loses its gradient; the clip bounds its weight.

    Args:
        tokens: see `PolicyTokens`.
        clip_low: the weight is at least ``1 - clip_low``; at 1 there is no lower bound, as in the paper.
        clip_high: the weight is at most ``1 + clip_high``.

    Raises:
        ValueError: a clip is negative.
    """
    _check_not_negative("cispo", clip_low=clip_low, clip_high=clip_high)
    log_ratio = tokens.log_ratio
    ratio = log_ratio.exp()
    weight = ratio.clamp(1 - clip_low, 1 + clip_high)
    value = weight.detach() * tokens.advantages * tokens.log_probs
    return TokenObjective(value, _metrics(log_ratio, weight != ratio))


@POLICY_LOSSES.register("sapo")
def sapo(tokens: PolicyTokens, *, tau_pos: float = 1.0, tau_neg: float = 1.05) -> TokenObjective:
    """A soft gate in place of the clip: ``4 / tau * sigmoid(tau * (ratio - 1)) * A`` (SAPO, arXiv 2511.20347).

    At a ratio of 1 its gradient is the policy gradient; it fades on both sides.

    Args:
        tokens: see `PolicyTokens`.
        tau_pos: temperature where A > 0; larger fades faster.
        tau_neg: the same elsewhere.

    Raises:
        ValueError: a temperature is not above 0.
    """
    for name, value in (("tau_pos", tau_pos), ("tau_neg", tau_neg)):
        if value <= 0:
            raise ValueError(f"sapo({name}={value!r}): must be above 0")
    log_ratio = tokens.log_ratio
    temperatures = tokens.advantages.new_tensor([tau_neg, tau_pos])
    tau = temperatures[(tokens.advantages > 0).long()]
    gate = torch.sigmoid(tau * (log_ratio.exp() - 1)) * 4 / tau
    return TokenObjective(gate * tokens.advantages, _metrics(log_ratio, torch.zeros_like(log_ratio, dtype=torch.bool)))


@POLICY_LOSSES.register("cpgd")
def cpgd(
    tokens: PolicyTokens, *, clip_low: float = 0.2, clip_high: float = 0.2, drift_coef: float = 1e-3
) -> TokenObjective:
    """The policy gradient with a clipped log-ratio, less a penalty for the drift (CPGD, arXiv 2505.12504).

    ``min(log ratio * A, clip(log ratio, log(1 - clip_low), log(1 + clip_high)) * A) - drift_coef * KL(pi_old || pi)``,
    the KL by its estimator ``ratio - 1 - log ratio``, which is unbiased on tokens of the old policy.

    Args:
        tokens: see `PolicyTokens`.
        clip_low: how far the ratio may fall before the gradient ends.
        clip_high: how far it may rise.
        drift_coef: weight of the drift.

    Raises:
        ValueError: an option is out of range.
    """
    _check_not_negative("cpgd", clip_low=clip_low, clip_high=clip_high, drift_coef=drift_coef)
    if clip_low >= 1:
        raise ValueError(f"cpgd(clip_low={clip_low!r}): must be below 1")
    advantages, log_ratio = tokens.advantages, tokens.log_ratio
    unclipped = log_ratio * advantages
    value = torch.minimum(unclipped, log_ratio.clamp(math.log1p(-clip_low), math.log1p(clip_high)) * advantages)
    drift = k3(-log_ratio)
    return TokenObjective(value - drift_coef * drift, _metrics(log_ratio, value != unclipped))


@POLICY_LOSSES.register("reinforce")
def reinforce(tokens: PolicyTokens) -> TokenObjective:
    """The policy gradient, ``A * log pi``, for tokens of the policy itself (Williams, 1992)."""
    log_ratio = tokens.log_ratio
    return TokenObjective(
        tokens.advantages * tokens.log_probs, _metrics(log_ratio, torch.zeros_like(log_ratio, dtype=torch.bool))
    )


def _clipped(
    advantages: Tensor, log_ratio: Tensor, clip_low: float, clip_high: float, dual_clip: float | None = None
) -> TokenObjective:
    ratio = log_ratio.exp()
    unclipped = ratio * advantages
    value = torch.minimum(unclipped, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages)
    if dual_clip is not None:
        value = torch.where(advantages < 0, torch.maximum(value, dual_clip * advantages), value)
    return TokenObjective(value, _metrics(log_ratio, value != unclipped))


def _metrics(log_ratio: Tensor, clipped: Tensor) -> dict[str, Tensor]:
    log_ratio = log_ratio.detach()
    return {"clip_fraction": clipped.to(log_ratio.dtype), "ratio": log_ratio.exp(), "approx_kl": k3(-log_ratio)}


def _check_not_negative(name: str, **options: float) -> None:
    if any(value < 0 for value in options.values()):
        given = ", ".join(f"{option}={value!r}" for option, value in options.items())
        raise ValueError(f"{name}({given}): must be 0 or more")


@AGGREGATIONS.register("token_mean")
def token_mean(sequence: Tensor, totals: BatchTotals) -> Tensor:
    """Every token of the global batch weighs the same (DAPO, arXiv 2503.14476)."""
    return torch.tensor(1 / max(totals.num_tokens, 1), dtype=torch.float64)  # a scalar does not promote the product


@AGGREGATIONS.register("sequence_mean")
def sequence_mean(sequence: Tensor, totals: BatchTotals) -> Tensor:
    """Every sequence weighs the same, and so does every token within it (GRPO, arXiv 2402.03300)."""
    lengths = torch.bincount(sequence)[sequence]
    return 1 / (lengths * max(totals.num_sequences, 1))


@AGGREGATIONS.register("sequence_sum_constant")
def sequence_sum_constant(sequence: Tensor, totals: BatchTotals) -> Tensor:
    """Sum over a sequence, divided by the constant length limit, mean over sequences (Dr. GRPO, arXiv 2503.20783)."""
    if totals.max_length is None:
        raise ValueError(
            "aggregation 'sequence_sum_constant' divides by the length limit: give max_length=<max_new_tokens>"
        )
    return torch.tensor(1 / (max(totals.num_sequences, 1) * totals.max_length), dtype=torch.float64)


def aggregation_weights(name: str, sequence: Tensor, totals: BatchTotals) -> Tensor:
    """The weight of each token in the global batch's loss.

    Args:
        name: ``token_mean``, ``sequence_mean``, ``sequence_sum_constant`` or one registered in `AGGREGATIONS`.
        sequence: ``[N]`` which sequence a token belongs to; all policy tokens of a sequence must be here.
        totals: sizes of the whole optimizer step.

    Returns:
        ``[N]``, or a scalar where all tokens weigh the same.

    Raises:
        ValueError: no such aggregation.
    """
    return AGGREGATIONS[name](sequence, totals)


def summarize(metrics: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Per-token metrics → scalars: means, and for ``ratio`` also the maximum. Empty if there is no token."""
    result: dict[str, Tensor] = {}
    for name, values in metrics.items():
        if values.numel():
            result["ratio_mean" if name == "ratio" else name] = values.mean()
        if values.numel() and name == "ratio":
            result["ratio_max"] = values.max()
    return result


def policy_loss(
    name: str,
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    aggregation: str = "token_mean",
    sequence: Tensor | None = None,
    totals: BatchTotals | None = None,
    max_length: int | None = None,
    weights: Tensor | None = None,
    **options: Any,
) -> PolicyLoss:
    """A policy loss on padded or flat tensors.

    Masked entries are taken out before anything is computed, so whatever they hold, NaN included, has no influence.

    Args:
        name: ``ppo`` or one registered in `POLICY_LOSSES`.
        log_probs: ``[B, T]``, or ``[N]`` flat.
        old_log_probs: the same shape.
        advantages: the same shape, or ``[B]`` for one value a sequence.
        mask: the same shape, true at policy tokens.
        aggregation: ``token_mean``, ``sequence_mean`` or ``sequence_sum_constant``.
        sequence: ``[N]`` which sequence a flat entry belongs to; without it they are one sequence.
        totals: sizes of the whole optimizer step, if these tensors are only a part of it.
        max_length: the length limit of a completion, for ``sequence_sum_constant``; part of `totals` if that is given.
        weights: the same shape as `mask`: how much each token counts, see `importance_weights`. The divisors stay.
        **options: of the policy loss, e.g. ``clip_high=0.28``.

    Raises:
        ValueError: an unknown name, aggregation or option, or shapes that do not fit.
    """
    objective = POLICY_LOSSES[name]
    check_options("policy loss", name, objective, options)
    if advantages.dim() == 1 and log_probs.dim() == 2:
        advantages = advantages[:, None].expand(-1, log_probs.shape[1])
    _check_shapes(log_probs, old_log_probs=old_log_probs, advantages=advantages, mask=mask)
    sequence = _rows(log_probs) if sequence is None else sequence
    _check_shapes(log_probs, sequence=sequence)
    if weights is not None:
        _check_shapes(log_probs, weights=weights)
    keep = mask.bool()
    tokens = PolicyTokens(log_probs[keep], old_log_probs[keep], advantages[keep], sequence[keep])
    if totals is None:
        totals = BatchTotals(int(keep.sum()), sequence.unique().numel(), max_length)
    result = objective(tokens, **options)
    shares = aggregation_weights(aggregation, tokens.sequence, totals)
    value = result.value if weights is None else weights[keep] * result.value
    return PolicyLoss(-(shares * value).sum(), summarize(result.metrics))


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    *,
    clip: float | None = 0.2,
    aggregation: str = "token_mean",
    sequence: Tensor | None = None,
    totals: BatchTotals | None = None,
    max_length: int | None = None,
) -> PolicyLoss:
    """A critic's loss, ``max((V - R)^2, (clip(V, V_old - c, V_old + c) - R)^2) / 2`` (PPO's reference implementation).

    The clip is as in https://github.com/openai/baselines, ppo2; the paper (arXiv 1707.06347) has the square alone.

    Args:
        values: ``[B, T]``, or ``[N]`` flat, with gradient.
        old_values: the same shape, before the update.
        returns: the same shape, what the values are fitted to.
        mask: the same shape, true at policy tokens; other entries have no influence, NaN included.
        clip: how far a value may move away from `old_values` before its gradient ends; None: any distance.
        aggregation: as for `policy_loss`, like `sequence`, `totals` and `max_length`.
        sequence: which sequence a flat entry belongs to.
        totals: sizes of the whole optimizer step.
        max_length: the length limit of a completion.

    Raises:
        ValueError: `clip` is not above 0, an unknown aggregation, or shapes that do not fit.
    """
    if clip is not None and clip <= 0:
        raise ValueError(f"value_loss(clip={clip!r}): must be above 0, or None to switch it off")
    sequence = _rows(values) if sequence is None else sequence
    _check_shapes(values, "values", old_values=old_values, returns=returns, mask=mask, sequence=sequence)
    keep = mask.bool()
    value, old, target = values[keep], old_values[keep].detach(), returns[keep].detach()
    if totals is None:
        totals = BatchTotals(int(keep.sum()), sequence.unique().numel(), max_length)
    error = (value - target).square()
    kept = error
    if clip is not None:
        kept = torch.maximum(error, ((old + (value - old).clamp(-clip, clip)) - target).square())
    shares = aggregation_weights(aggregation, sequence[keep], totals)
    metrics = {"value_clip_fraction": (kept != error).to(value.dtype), "value_mean": value.detach()}
    return PolicyLoss((shares * kept).sum() / 2, summarize(metrics))


def _rows(values: Tensor) -> Tensor:
    """Which sequence an entry belongs to: the rows of ``[B, T]`` are sequences, ``[N]`` is a single one."""
    rows = torch.arange(values.shape[0] if values.dim() == 2 else 1, device=values.device)
    return rows[:, None].expand_as(values) if values.dim() == 2 else rows.expand_as(values)


def _check_shapes(first: Tensor, name_of_first: str = "log_probs", **others: Tensor) -> None:
    for name, tensor in others.items():
        if tensor.shape != first.shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, {name_of_first} {tuple(first.shape)}")

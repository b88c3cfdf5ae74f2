"""Rollout–training mismatch: an engine and the trainer give the same tokens different log-probabilities.

The samples then come from another policy than the one that the loss takes its ratio to. A correction weighs every
token by how much more likely the trainer's policy makes it (https://fengyao.notion.site/off-policy-rl).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightrft_lightning._registry import Registry
from lightrft_lightning.algorithms._options import check_options
from lightrft_lightning.algorithms._sequences import mean_of_sequence, sum_of_sequence
from lightrft_lightning.algorithms.kl import kl_penalty

Correction = Callable[..., Tensor]

CORRECTIONS: Registry[Correction] = Registry("correction")
"""Name → function ``(log_ratio [N], sequence [N], *, options) -> weights [N]``."""

_LARGE = 20.0


@CORRECTIONS.register("token_truncated")
def token_truncated(log_ratio: Tensor, sequence: Tensor, *, cap: float = 2.0) -> Tensor:
    """Truncated importance sampling: a token's ratio, at most `cap`."""
    return _truncated("token_truncated", log_ratio, cap)


@CORRECTIONS.register("sequence_truncated")
def sequence_truncated(log_ratio: Tensor, sequence: Tensor, *, cap: float = 2.0) -> Tensor:
    """The ratio of the whole sequence, at most `cap`: unbiased but for the cap, and noisier."""
    return _truncated("sequence_truncated", sum_of_sequence(log_ratio, sequence), cap)


@CORRECTIONS.register("token_masked")
def token_masked(log_ratio: Tensor, sequence: Tensor, *, low: float = 0.5, high: float = 2.0) -> Tensor:
    """A token's ratio inside [low, high]; tokens outside count for nothing."""
    ratio = _ratio(log_ratio)
    return torch.where(_inside("token_masked", ratio, low, high), ratio, 0.0)


@CORRECTIONS.register("sequence_masked")
def sequence_masked(log_ratio: Tensor, sequence: Tensor, *, low: float = 0.5, high: float = 2.0) -> Tensor:
    """The ratio of the whole sequence inside [low, high]; sequences outside count for nothing."""
    ratio = _ratio(sum_of_sequence(log_ratio, sequence))
    return torch.where(_inside("sequence_masked", ratio, low, high), ratio, 0.0)


@CORRECTIONS.register("geometric_masked")
def geometric_masked(log_ratio: Tensor, sequence: Tensor, *, low: float = 0.5, high: float = 2.0) -> Tensor:
    """1 for sequences whose geometric mean of the ratios is inside [low, high], else 0; no length is favoured."""
    inside = _inside("geometric_masked", _ratio(mean_of_sequence(log_ratio, sequence)), low, high)
    return inside.to(log_ratio.dtype)


def _ratio(log_ratio: Tensor) -> Tensor:
    return log_ratio.clamp(-_LARGE, _LARGE).exp()


def _truncated(name: str, log_ratio: Tensor, cap: float) -> Tensor:
    if cap <= 0:
        raise ValueError(f"{name}(cap={cap!r}): must be above 0")
    return _ratio(log_ratio).clamp(max=cap)


def _inside(name: str, ratio: Tensor, low: float, high: float) -> Tensor:
    if not 0 <= low <= 1 <= high:
        raise ValueError(f"{name}(low={low!r}, high={high!r}): must be a range around 1, from 0 or more")
    return (ratio >= low) & (ratio <= high)


def importance_weights(
    name: str,
    trainer_logprobs: Tensor,
    engine_logprobs: Tensor,
    mask: Tensor | None = None,
    *,
    sequence: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """How much each sampled token counts.

    Args:
        name: of an entry in `CORRECTIONS`.
        trainer_logprobs: of the sampled tokens under the policy that the ratio is taken to, ``[B, T]`` or ``[N]``.
        engine_logprobs: as the engine reported them, the same shape.
        mask: the same shape, true at policy tokens; all of them if None.
        sequence: ``[N]`` which sequence a flat entry belongs to; without it they are one sequence.
        **options: of the correction, e.g. ``cap=2.0``.

    Returns:
        Weights in the same shape, without gradient, 0 where masked.

    Raises:
        ValueError: an unknown name or option, one out of range, or shapes that differ.
    """
    correction = CORRECTIONS[name]
    check_options("correction", name, correction, options)
    _check_shapes(trainer_logprobs, engine_logprobs)
    keep = torch.ones_like(trainer_logprobs, dtype=torch.bool) if mask is None else mask.bool()
    if sequence is None:
        rows = torch.arange(len(keep) if keep.dim() == 2 else 1, device=keep.device)
        sequence = (rows[:, None] if keep.dim() == 2 else rows).expand_as(keep)
    log_ratio = (trainer_logprobs.detach() - engine_logprobs.detach())[keep]
    weights = torch.zeros_like(trainer_logprobs.detach())
    weights[keep] = correction(log_ratio, sequence[keep], **options)
    return weights


def _check_shapes(trainer_logprobs: Tensor, engine_logprobs: Tensor) -> None:
    if trainer_logprobs.shape != engine_logprobs.shape:
        raise ValueError(
            f"trainer_logprobs has shape {tuple(trainer_logprobs.shape)}, "
            f"engine_logprobs {tuple(engine_logprobs.shape)}"
        )


def mismatch_metrics(
    trainer_logprobs: Tensor, engine_logprobs: Tensor, mask: Tensor | None = None
) -> dict[str, Tensor]:
    """How far the trainer's policy is from the one that sampled (https://fengyao.notion.site/off-policy-rl).

    Args:
        trainer_logprobs: of the sampled tokens, any shape.
        engine_logprobs: the same tokens as the engine reported them, the same shape.
        mask: the same shape, true at policy tokens; all of them if None.

    Returns:
        Scalars: ``mismatch_mean`` and ``mismatch_max`` of ``|trainer - engine|`` in nats, ``mismatch_kl``
        (KL(engine || trainer), k3) and ``mismatch_outside``, the share of tokens whose ratio is outside [1/2, 2].
        Empty if there is no token.

    Raises:
        ValueError: the shapes differ.
    """
    _check_shapes(trainer_logprobs, engine_logprobs)
    trainer, engine = trainer_logprobs.detach(), engine_logprobs.detach()
    if mask is not None:
        trainer, engine = trainer[mask.bool()], engine[mask.bool()]
    if not trainer.numel():
        return {}
    delta = trainer - engine
    ratio = delta.exp()
    return {
        "mismatch_mean": delta.abs().mean(),
        "mismatch_max": delta.abs().max(),
        "mismatch_kl": kl_penalty("k3", engine, trainer).mean(),
        "mismatch_outside": ((ratio < 0.5) | (ratio > 2)).to(delta.dtype).mean(),
    }

"""What happens to rewards before, and to advantages after, they are compared: each a step of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightrft_lightning.algorithms.advantages import SumOverRanks, global_moments


def overlong_penalty(lengths: Tensor, max_length: int, buffer: int, factor: float = 1.0) -> Tensor:
    """DAPO's soft punishment of long completions (arXiv 2503.14476, equation 13).

    0 up to ``max_length - buffer`` tokens, then falling in a straight line to ``-factor`` at `max_length`.

    Args:
        lengths: ``[B]`` tokens of each completion.
        max_length: the length limit of a completion.
        buffer: tokens before the limit where the penalty begins.
        factor: penalty at the limit.

    Raises:
        ValueError: `buffer` is not between 1 and `max_length`, or `factor` is negative.
    """
    if not 1 <= buffer <= max_length:
        raise ValueError(f"overlong_buffer={buffer!r}: must be between 1 and the length limit, {max_length}")
    if factor < 0:
        raise ValueError(f"overlong_factor={factor!r}: must be 0 or more")
    over = (lengths.double() - (max_length - buffer)) / buffer
    return -factor * over.clamp(0, 1)


def entropy_threshold(entropies: Tensor, share: float) -> float:
    """The entropy that the given share of tokens reaches: only these are learnt from (arXiv 2506.01939, equation 6).

    Args:
        entropies: ``[N]`` of all policy tokens of the global batch.
        share: of the tokens that are kept, above 0 and at most 1.
    """
    if not entropies.numel():
        return 0.0
    kept = max(1, round(share * entropies.numel()))
    return float(entropies.sort(descending=True).values[kept - 1])


class RunningMoments:
    """Mean and standard deviation of all rewards so far, of all ranks (Welford; Chan, Golub, LeVeque 1983).

    Attributes:
        count: rewards seen.
        mean: their mean.
    """

    def __init__(self) -> None:
        self.count, self.mean, self._squares = 0.0, 0.0, 0.0

    def update(self, values: Tensor, sum_over_ranks: SumOverRanks) -> None:
        """Take in this rank's ``[B]`` values; all ranks together, also those without any."""
        kept = values.double()
        count, total = sum_over_ranks(torch.stack([kept.new_tensor(float(kept.numel())), kept.sum()])).tolist()
        mean = total / max(count, 1.0)
        squares = float(sum_over_ranks((kept - mean).square().sum()[None]))
        if not count:
            return
        delta, together = mean - self.mean, self.count + count
        self._squares += squares + delta**2 * self.count * count / together
        self.mean += delta * count / together
        self.count = together

    @property
    def std(self) -> float:
        """Unbiased; 0 of fewer than two values."""
        return (self._squares / (self.count - 1)) ** 0.5 if self.count > 1 else 0.0

    def normalised(self, values: Tensor, minus_mean: bool) -> Tensor:
        """Divided by the standard deviation, if it is above 0; by choice less the mean."""
        centred = values - self.mean if minus_mean else values
        return centred / self.std if self.std > 0 else centred

    def state_dict(self) -> dict[str, float]:
        """For a checkpoint."""
        return {"count": self.count, "mean": self.mean, "squares": self._squares}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Undo `state_dict`."""
        self.count, self.mean, self._squares = state["count"], state["mean"], state["squares"]


def whitened(values: Tensor, mask: Tensor, sum_over_ranks: SumOverRanks, eps: float = 1e-8) -> Tensor:
    """``[B, T]`` less the mean and divided by the standard deviation of the global batch's policy tokens."""
    mean, std = global_moments(values, mask, sum_over_ranks)
    return torch.where(mask, (values - mean) / (std + eps), 0.0).to(values.dtype)

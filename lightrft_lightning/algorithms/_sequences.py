"""Sums and means over the tokens of a sequence, for flat tensors."""

from __future__ import annotations

import torch
from torch import Tensor


def sum_of_sequence(values: Tensor, sequence: Tensor) -> Tensor:
    """``[N]`` the sum over a token's sequence, at each token.

    Args:
        values: ``[N]``.
        sequence: ``[N]`` int64, which sequence a token belongs to; any numbering from 0, gaps allowed.
    """
    if not values.numel():
        return values
    return values.new_zeros(int(sequence.max()) + 1).index_add(0, sequence, values)[sequence]


def mean_of_sequence(values: Tensor, sequence: Tensor) -> Tensor:
    """As `sum_of_sequence`, divided by the length of the sequence."""
    return sum_of_sequence(values, sequence) / torch.bincount(sequence)[sequence] if values.numel() else values

"""Overlong penalty, running moments, whitening."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightrft_lightning.algorithms import RunningMoments, entropy_threshold, overlong_penalty, whitened


def alone(value: torch.Tensor) -> torch.Tensor:
    return value


def test_the_overlong_penalty_is_dapos() -> None:
    """2503.14476, equation 13, at every length."""
    for length in range(21):
        expected = 0.0 if length <= 12 else -2.0 * (length - 12) / 8
        assert overlong_penalty(torch.tensor([length]), 20, 8, factor=2.0).item() == pytest.approx(expected)


@pytest.mark.parametrize(("buffer", "factor"), [(0, 1.0), (21, 1.0), (8, -1.0)])
def test_a_bad_penalty_is_refused(buffer: int, factor: float) -> None:
    with pytest.raises(ValueError, match=f"overlong_(buffer={buffer}|factor={factor})"):
        overlong_penalty(torch.tensor([1]), 20, buffer, factor)


@given(st.lists(st.lists(st.floats(-1e3, 1e3), max_size=5), min_size=1, max_size=5))
def test_running_moments_are_those_of_everything(batches: list[list[float]]) -> None:
    moments, everything = RunningMoments(), [value for batch in batches for value in batch]
    for batch in batches:
        moments.update(torch.tensor(batch, dtype=torch.float64), alone)
    assert moments.count == len(everything)
    if everything:
        mean = sum(everything) / len(everything)
        assert moments.mean == pytest.approx(mean, abs=1e-9)
        if len(everything) > 1:
            squares = sum((value - mean) ** 2 for value in everything)
            assert moments.std == pytest.approx(math.sqrt(squares / (len(everything) - 1)), abs=1e-6)


def test_running_moments_of_several_ranks() -> None:
    """Rank 1 has nothing; the sums of rank 0 are added by hand."""
    whole, part = RunningMoments(), RunningMoments()
    values = torch.tensor([1.0, 2.0, 4.0])
    whole.update(values, alone)
    others = iter([torch.tensor([1.0, 4.0]), torch.tensor([(4 - 7 / 3) ** 2])])
    part.update(values[:2], lambda value: value + next(others))
    assert part.state_dict() == pytest.approx(whole.state_dict())
    empty = RunningMoments()
    empty.update(torch.zeros(0), alone)
    assert empty.state_dict() == RunningMoments().state_dict()


def test_running_moments_survive_a_checkpoint_and_normalise() -> None:
    moments, other = RunningMoments(), RunningMoments()
    moments.update(torch.tensor([1.0, 3.0]), alone)
    other.load_state_dict(moments.state_dict())
    values = torch.tensor([2.0, 5.0])
    std = 2**0.5
    torch.testing.assert_close(other.normalised(values, minus_mean=True), torch.tensor([0.0, 3 / std]))
    torch.testing.assert_close(other.normalised(values, minus_mean=False), values / std)
    equal = RunningMoments()
    equal.update(torch.tensor([0.7, 0.7]), alone)
    assert torch.equal(equal.normalised(values, minus_mean=False), values)


@given(st.lists(st.floats(0, 5), min_size=1, max_size=30, unique=True), st.floats(0.01, 1.0))
def test_the_threshold_keeps_that_share(values: list[float], share: float) -> None:
    entropies = torch.tensor(values, dtype=torch.float64)
    kept = int((entropies >= entropy_threshold(entropies, share)).sum())
    assert kept == max(1, round(share * len(values)))
    assert entropy_threshold(torch.zeros(0), share) == 0


def test_whitened() -> None:
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]]).bool()
    values = torch.tensor([[1.0, 2.0, 9.0], [6.0, 9.0, 9.0]])
    std = math.sqrt((4 + 1 + 9) / 3)
    expected = torch.tensor([[-2 / std, -1 / std, 0.0], [3 / std, 0.0, 0.0]])
    torch.testing.assert_close(whitened(values, mask, alone), expected)

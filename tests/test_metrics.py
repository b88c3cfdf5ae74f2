"""pass@k by counting, and its mean over draws; mean@n; samples without a reward."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightrft_lightning.metrics import SampleResult, pass_at_k, pass_metrics


@given(st.integers(1, 9), st.data())
def test_it_is_the_share_of_all_choices_in_which_one_passes(n, data):
    c, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    choices = list(combinations(range(n), k))  # the first c pass
    assert pass_at_k(n, c, k) == pytest.approx(sum(min(choice) < c for choice in choices) / len(choices), abs=1e-12)


@given(st.floats(0, 1), st.integers(1, 12), st.data())
def test_it_is_unbiased(p, n, data):
    """Summed over all outcomes of n samples that pass with probability p."""
    from math import comb

    k = data.draw(st.integers(1, n))
    expected = sum(comb(n, c) * p**c * (1 - p) ** (n - c) * pass_at_k(n, c, k) for c in range(n + 1))
    assert expected == pytest.approx(1 - (1 - p) ** k, abs=1e-9)


def test_large_numbers_stay_exact():
    assert pass_at_k(10_000, 1, 5_000) == pytest.approx(0.5)
    with pytest.raises(ValueError, match=r"pass_at_k\(n=4, c=5, k=1\)"):
        pass_at_k(4, 5, 1)


def test_the_metrics_of_an_evaluation():
    rewards = [[1.0, 0.0, 0.0, 0.0, 0.0, 2.0], [0.0, 0.5, None, 0.0, 0.0, 0.0]]
    groups = [[SampleResult(3, True, r, {}, i) for r in group] for i, group in enumerate(rewards)]
    metrics = pass_metrics(groups, 1.0)
    assert list(metrics) == ["pass@1", "pass@2", "pass@4", "pass@6", "mean@6"]
    assert metrics["pass@1"] == pytest.approx((2 / 6 + 0) / 2)
    assert metrics["pass@2"] == pytest.approx((1 - 4 * 3 / (6 * 5)) / 2)
    assert metrics["pass@6"] == pytest.approx(0.5)
    assert metrics["mean@6"] == pytest.approx(3.5 / 11)
    assert pass_metrics(groups, 0.5)["pass@6"] == 1.0
    assert list(pass_metrics([g[:1] for g in groups], 1.0)) == ["pass@1"]
    assert pass_metrics([], 1.0) == {}

"""Advantage estimators."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightrft_lightning.algorithms import ADVANTAGES, AdvantageInputs, Advantages, advantages

finite = st.floats(-1e3, 1e3, width=32)
groups = st.lists(st.lists(finite, min_size=2, max_size=6), min_size=1, max_size=4)


def flat(groups: list[list[float]]) -> tuple[torch.Tensor, torch.Tensor]:
    rewards = torch.tensor([r for group in groups for r in group], dtype=torch.float64)
    return rewards, torch.tensor([g for g, group in enumerate(groups) for _ in group])


def group_norm(rewards: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return advantages("group_norm", rewards, group_ids=ids).advantages


def test_definition() -> None:
    result = advantages("group_norm", [1.0, 0.0, 0.0, 5.0, 7.0], group_ids=[3, 3, 3, -1, -1])
    std = (1 / 3) ** 0.5  # of 1, 0, 0 with n - 1 in the denominator
    expected = [(2 / 3) / (std + 1e-6), (-1 / 3) / (std + 1e-6), (-1 / 3) / (std + 1e-6)]
    expected += [-1 / (2**0.5 + 1e-6), 1 / (2**0.5 + 1e-6)]
    torch.testing.assert_close(result.advantages, torch.tensor(expected))
    assert result.advantages.dtype == torch.float32
    assert result.metrics["equal_groups"] == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("reward", [0.7, 0.1, 1 / 3, -1e4, 0.0])
def test_a_group_of_equal_rewards_is_exactly_zero(reward: float, dtype: torch.dtype) -> None:
    """An epsilon of 1e-9 gives eight rewards of 0.7 advantages of up to 0.92."""
    for size in range(2, 20):
        rewards = torch.full((size,), reward, dtype=dtype)
        assert group_norm(rewards, torch.zeros(size, dtype=torch.long)).tolist() == [0.0] * size


def test_equal_and_other_groups_in_one_batch() -> None:
    result = advantages("group_norm", [0.7] * 8 + [0.0, 1.0], group_ids=[0] * 8 + [1] * 2)
    assert result.advantages[:8].tolist() == [0.0] * 8
    assert result.advantages[8:].abs().min() > 0.5
    assert result.metrics["equal_groups"] == 0.5


@given(groups, st.floats(-100, 100))
def test_a_constant_added_to_a_group_changes_nothing(values: list[list[float]], shift: float) -> None:
    rewards, ids = flat(values)
    # An epsilon is added to the standard deviation, so rounding differences of a tiny one are amplified.
    torch.testing.assert_close(group_norm(rewards + shift, ids), group_norm(rewards, ids), atol=1e-5, rtol=1e-5)


@given(groups, st.floats(0.5, 100))
def test_the_scale_of_the_rewards_does_not_matter(values: list[list[float]], scale: float) -> None:
    rewards, ids = flat([[round(r, 1) for r in group] for group in values])
    torch.testing.assert_close(group_norm(rewards * scale, ids), group_norm(rewards, ids), atol=1e-3, rtol=1e-4)


@given(groups, st.randoms())
def test_the_order_of_the_completions_does_not_matter(values: list[list[float]], rng: object) -> None:
    rewards, ids = flat(values)
    order = list(range(len(rewards)))
    rng.shuffle(order)  # type: ignore[attr-defined]
    shuffled = group_norm(rewards[order], 10 - 3 * ids[order])  # nor does the numbering of the groups
    torch.testing.assert_close(shuffled, group_norm(rewards, ids)[order], atol=1e-9, rtol=1e-9)


@given(groups)
def test_a_group_has_mean_zero_and_at_most_unit_variance(values: list[list[float]]) -> None:
    rewards, ids = flat(values)
    result = group_norm(rewards, ids)
    for g in ids.unique():
        assert result[ids == g].mean().abs() < 1e-6
        assert result[ids == g].std() <= 1 + 1e-6


def test_spread_over_tokens_by_a_mask() -> None:
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    result = advantages("group_norm", torch.tensor([1.0, 0.0]), torch.tensor([4, 4]), mask=mask).advantages
    value = 0.5 / (0.5**0.5 + 1e-6)
    torch.testing.assert_close(result, torch.tensor([[value, value, 0.0], [-value, 0.0, 0.0]]))


def test_integer_rewards() -> None:
    assert advantages("group_norm", [1, 0], group_ids=[0, 0]).advantages.dtype == torch.float32


# ------------------------------------------------------------------ bad input


def test_a_group_of_one_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"'group_norm' needs at least 2 completions a prompt, but group 12 has one\."):
        advantages("group_norm", [1.0, 0.0, 1.0], group_ids=[3, 3, 12])
    with pytest.raises(ValueError, match=r"group 1 has one \(and 2 more groups\)"):
        advantages("group_norm", [1.0, 0.0, 1.0], group_ids=[1, 2, 3])


def test_no_groups() -> None:
    with pytest.raises(ValueError, match="'group_norm' compares completions of a prompt: give group_ids"):
        advantages("group_norm", [1.0, 0.0])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_reward_that_is_not_finite_is_refused_with_its_index(bad: float) -> None:
    with pytest.raises(ValueError, match=f"reward 1 is {bad}: leave out samples without a reward"):
        advantages("group_norm", [1.0, bad], group_ids=[0, 0])


def test_lengths_that_differ() -> None:
    with pytest.raises(ValueError, match="group_ids has 3 entries for 2 rewards"):
        advantages("group_norm", [1.0, 0.0], group_ids=[0, 0, 0])


def test_unknown_names_and_options_name_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"unknown advantage estimator 'group_nrm'. Did you mean 'group_norm'"):
        advantages("group_nrm", [1.0])
    with pytest.raises(ValueError, match=r"option of the advantage estimator 'group_norm' 'epss'. Did you mean 'eps'"):
        advantages("group_norm", [1.0, 0.0], group_ids=[0, 0], epss=1e-3)


def test_a_users_own_estimator() -> None:
    @ADVANTAGES.register("test_best_of_group")
    def best_of_group(inputs: AdvantageInputs, *, bonus: float = 1.0) -> Advantages:
        return Advantages(torch.where(inputs.rewards == inputs.rewards.max(), bonus, 0.0))

    result = advantages("test_best_of_group", torch.tensor([1.0, 3.0]), bonus=2.0)
    assert result.advantages.tolist() == [0.0, 2.0]

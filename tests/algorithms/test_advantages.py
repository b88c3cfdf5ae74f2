"""Advantage estimators."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

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


# ------------------------------------------------------------------ all of them, literally

REWARDS = [1.0, 0.0, 0.5, 2.0, 2.0, -1.0, 3.0, 0.25]
GROUPS = [4, 4, 4, 1, 1, 7, 7, 7]
MASK = torch.tensor(
    [
        [1, 1, 1, 1],
        [1, 0, 0, 0],
        [1, 1, 0, 1],
        [1, 1, 1, 0],
        [1, 1, 0, 0],
        [1, 1, 1, 1],
        [1, 1, 1, 1],
        [0, 1, 0, 1],
    ]
).bool()
TOKEN_REWARDS = torch.randn(8, 4, generator=torch.Generator().manual_seed(0)).double()
VALUES = torch.randn(8, 4, generator=torch.Generator().manual_seed(1)).double()


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def std(values: list[float], unbiased: bool) -> float:
    return math.sqrt(sum((v - mean(values)) ** 2 for v in values) / (len(values) - unbiased))


def group_of(i: int) -> list[float]:
    return [r for r, g in zip(REWARDS, GROUPS, strict=True) if g == GROUPS[i]]


def others_of(i: int) -> list[float]:
    return [r for j, (r, g) in enumerate(zip(REWARDS, GROUPS, strict=True)) if g == GROUPS[i] and j != i]


def literal_returns(gamma: float) -> list[list[float]]:
    """From each policy token on: its own reward and later ones, each discounted by its distance in policy tokens."""
    rows = []
    for i, keep in enumerate(MASK):
        positions = keep.nonzero()[:, 0].tolist()
        row = [0.0] * 4
        for a, t in enumerate(positions):
            for b in range(a, len(positions)):
                reward = float(TOKEN_REWARDS[i, positions[b]]) + (REWARDS[i] if b == len(positions) - 1 else 0.0)
                row[t] += gamma ** (b - a) * reward
        rows.append(row)
    return rows


def test_no_estimator_is_left_out() -> None:
    tested = {"group_norm", "dr_grpo", "rloo", "reinforce", "reinforce_plus_plus", "reinforce_baseline", "gae", "cpgd"}
    assert {n for n in ADVANTAGES if not n.startswith("test_")} == tested


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("group_norm", lambda i: (REWARDS[i] - mean(group_of(i))) / (std(group_of(i), True) + 1e-6)),
        ("cpgd", lambda i: (REWARDS[i] - mean(group_of(i))) / (std(group_of(i), True) + 1e-6)),
        ("dr_grpo", lambda i: REWARDS[i] - mean(group_of(i))),
        ("rloo", lambda i: REWARDS[i] - mean(others_of(i))),
        ("reinforce", lambda i: REWARDS[i]),
    ],
)
def test_estimators_by_completion(name: str, expected: Any) -> None:
    found = advantages(name, torch.tensor(REWARDS).double(), GROUPS).advantages
    assert found.tolist() == pytest.approx([expected(i) for i in range(8)], abs=1e-12)


def test_reinforce_baseline() -> None:
    centred = [REWARDS[i] - mean(group_of(i)) for i in range(8)]
    spread = [centred[i] for i in range(8) for _ in range(int(MASK[i].sum()))]
    expected = [[(c - mean(spread)) / (std(spread, False) + 1e-8) * m for m in row] for c, row in zip(centred, MASK.int().tolist(), strict=True)]  # fmt: skip  # noqa: E501
    found = advantages("reinforce_baseline", torch.tensor(REWARDS).double(), GROUPS, MASK).advantages
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("gamma", [1.0, 0.9, 0.0])
def test_reinforce_and_reinforce_plus_plus(gamma: float) -> None:
    returns = literal_returns(gamma)
    given = {"rewards": torch.tensor(REWARDS).double(), "mask": MASK, "token_rewards": TOKEN_REWARDS, "gamma": gamma}
    torch.testing.assert_close(
        advantages("reinforce", **given).advantages, torch.tensor(returns, dtype=torch.float64), rtol=1e-9, atol=1e-12
    )
    kept = [returns[i][t] for i, t in MASK.nonzero().tolist()]
    expected = (torch.tensor(returns, dtype=torch.float64) - mean(kept)) / (std(kept, False) + 1e-8) * MASK
    torch.testing.assert_close(advantages("reinforce_plus_plus", **given).advantages, expected, rtol=1e-9, atol=1e-12)


def test_the_baseline_of_reinforce_is_the_mean_reward() -> None:
    found = advantages("reinforce", torch.tensor(REWARDS).double(), baseline=True).advantages
    assert found.tolist() == pytest.approx([r - mean(REWARDS) for r in REWARDS])


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (0.99, 0.95), (0.9, 0.0), (1.0, 0.5)])
def test_gae(gamma: float, lam: float) -> None:
    """1506.02438, equation 16: the sum of (gamma lambda)^l delta_(t+l), over policy tokens only."""
    result = advantages(
        "gae",
        torch.tensor(REWARDS).double(),
        mask=MASK,
        values=VALUES,
        token_rewards=TOKEN_REWARDS,
        gamma=gamma,
        lam=lam,
    )
    for i, keep in enumerate(MASK):
        positions = keep.nonzero()[:, 0].tolist()
        deltas = []
        for k, t in enumerate(positions):
            last = k == len(positions) - 1
            reward = float(TOKEN_REWARDS[i, t]) + (REWARDS[i] if last else 0.0)
            following = 0.0 if last else float(VALUES[i, positions[k + 1]])
            deltas.append(reward + gamma * following - float(VALUES[i, t]))
        for k, t in enumerate(positions):
            expected = sum((gamma * lam) ** (j - k) * deltas[j] for j in range(k, len(positions)))
            assert result.advantages[i, t].item() == pytest.approx(expected, abs=1e-12)
            assert result.returns is not None
            assert result.returns[i, t].item() == pytest.approx(expected + float(VALUES[i, t]), abs=1e-12)
        assert (result.advantages[i][~keep] == 0).all()


def test_with_lambda_1_gae_is_the_return_less_the_value() -> None:
    arguments = {"rewards": torch.tensor(REWARDS).double(), "mask": MASK, "token_rewards": TOKEN_REWARDS}
    result = advantages("gae", values=VALUES, **arguments)
    assert result.returns is not None
    torch.testing.assert_close(result.returns, advantages("reinforce", **arguments).advantages)


@pytest.mark.parametrize("name", ["reinforce_plus_plus", "reinforce_baseline", "reinforce"])
def test_statistics_are_those_of_all_ranks(name: str) -> None:
    """Two ranks, one after the other: the sums of both are added up by hand."""
    options: dict[str, Any] = {"baseline": True} if name == "reinforce" else {}
    rewards, groups = torch.tensor(REWARDS).double(), torch.tensor(GROUPS)
    whole = advantages(name, rewards, groups, MASK, **options).advantages
    parts = (slice(0, 3), slice(3, 8))
    sums: list[list[Tensor]] = [[], []]

    def run(rank: int, known: list[Tensor] | None) -> Tensor:
        calls = iter(known or [])

        def add_up(value: Tensor) -> Tensor:
            sums[rank].append(value)
            return next(calls, value)

        part = parts[rank]
        return advantages(name, rewards[part], groups[part], MASK[part], sum_over_ranks=add_up, **options).advantages

    known: list[Tensor] = []
    for _ in range(3):  # the second sum needs the first
        sums[0].clear(), sums[1].clear()
        found = [run(rank, known) for rank in range(2)]
        known = [a + b for a, b in zip(*sums, strict=True)]
    torch.testing.assert_close(torch.cat(found), whole, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["group_norm", "dr_grpo", "rloo", "cpgd", "reinforce_baseline"])
@given(st.lists(st.floats(-100, 100), min_size=2, max_size=6), st.floats(-50, 50))
def test_a_constant_added_to_a_group_changes_no_advantage(name: str, values: list[float], shift: float) -> None:
    rewards = torch.tensor([*values, 1.0, 2.0]).double()
    groups = [0] * len(values) + [1, 1]
    moved = rewards + torch.tensor([shift] * len(values) + [0.0, 0.0]).double()
    torch.testing.assert_close(
        advantages(name, moved, groups).advantages, advantages(name, rewards, groups).advantages, atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("name", ["group_norm", "dr_grpo", "rloo", "cpgd"])
@pytest.mark.parametrize("reward", [0.7, 1 / 3, -1e4])
def test_equal_groups_are_exactly_zero(name: str, reward: float) -> None:
    for size in range(2, 20):
        assert advantages(name, [reward] * size, [0] * size).advantages.tolist() == [0.0] * size


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("rloo", {"group_ids": [0, 0, 1]}, "'rloo' needs at least 2 completions a prompt, but group 1 has one"),
        ("dr_grpo", {}, "'dr_grpo' compares completions of a prompt: give group_ids"),
        ("gae", {"mask": torch.ones(3, 2)}, "'gae' needs a critic: give values"),
        ("gae", {"values": torch.ones(3, 2)}, "'gae' looks at single tokens: give mask"),
        ("reinforce_plus_plus", {}, "'reinforce_plus_plus' looks at single tokens: give mask"),
        ("reinforce", {"gamma": 0.9}, "'reinforce' looks at single tokens: give mask"),
        ("reinforce", {"gamma": 1.5}, r"reinforce\(gamma=1.5\): must be between 0 and 1"),
        ("gae", {"lam": -1.0}, r"gae\(lam=-1.0\): must be between 0 and 1"),
        ("gae", {"values": torch.ones(3, 2), "mask": torch.ones(3, 4)}, r"values has shape \(3, 2\), mask \(3, 4\)"),
    ],
)
def test_what_cannot_be_estimated_is_refused(name: str, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        advantages(name, torch.tensor([1.0, 0.0, 1.0]), **given)


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

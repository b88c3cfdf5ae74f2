from __future__ import annotations

import pickle

import torch
from hypothesis import given
from hypothesis import strategies as st

from lightrft_lightning.experience.balance import by_group, deal, exchanged, flops, for_sending, rank_loads, row_lengths
from lightrft_lightning.experience.packing import pack
from lightrft_lightning.experience.trajectory import Completion, Prompt, Trajectory
from lightrft_lightning.strategies.fake import FakeStrategy


def group_of(prompt, lengths, group=0):
    completions = [Completion((1,) * n, (-1.0,) * n, "length") for n in lengths]
    return [Trajectory(Prompt((1,) * prompt, "text", {"answer": "42"}), c, group) for c in completions]


GROUPS = st.lists(st.tuples(st.integers(0, 1000), st.integers(0, 7)), max_size=20)


@given(groups=GROUPS, more=st.integers(0, 4))
def test_every_group_is_dealt_once_and_never_worse_than_before(groups, more):
    ranks = 8 + more
    costs = {g: cost for g, (cost, _) in enumerate(groups)}
    holders = {g: rank for g, (_, rank) in enumerate(groups)}
    dealt = deal(costs, holders, ranks)
    assert dealt.keys() == costs.keys() and set(dealt.values()) <= set(range(ranks))
    busiest = max(rank_loads(costs, dealt, ranks))
    assert busiest <= max(rank_loads(costs, holders, ranks))
    # The rank that is last to get a group had the least at that time, so no more than the mean.
    assert busiest <= sum(costs.values()) / ranks + max(costs.values(), default=0)
    reordered = deal(dict(reversed(costs.items())), dict(reversed(holders.items())), ranks)
    assert reordered == dealt


def test_a_rank_with_long_and_one_with_short_groups_end_up_even():
    costs = {0: 100, 1: 10, 2: 100, 3: 10, 4: 80, 5: 20}
    dealt = deal(costs, {g: g % 2 for g in costs}, 2)
    assert sorted(rank_loads(costs, dealt, 2)) == [140, 180]  # 40 and 280 before; no deal is better


def test_groups_stay_where_moving_them_would_gain_nothing():
    costs, holders = {0: 5, 1: 5, 2: 0, 3: 0}, {0: 1, 1: 0, 2: 1, 3: 1}
    assert deal(costs, holders, 2) == holders
    assert deal({0: 7}, {0: 1}, 2) == {0: 1}


def test_the_work_of_a_group_is_that_of_the_rows_it_is_packed_in():
    group = group_of(10, [3, 5, 0])
    assert row_lengths(group) == [b.input_ids.shape[1] for b in pack(group, 100)] == [18]
    (padded,) = pack(group, 100, share_prompts=False)
    assert sorted(row_lengths(group, share_prompts=False)) == sorted(padded.attention_mask(torch.float32, "").sum(1))
    assert row_lengths([]) == row_lengths(group_of(4, [0])) == []
    assert flops([18], parameters=1000, attention_width=64) == 6 * 1000 * 18 + 12 * 64 * 18**2
    assert flops([10, 10], 7, 3) < flops([20], 7, 3)


def test_in_one_process_nothing_is_copied():
    groups = by_group(group_of(3, [2, 2], 5) + group_of(3, [1], 2))
    assert list(groups) == [5, 2]
    moved = exchanged(groups, {5: 0, 2: 0}, FakeStrategy())
    assert list(moved) == [2, 5] and all(moved[g] is groups[g] for g in groups)


def test_a_trajectory_is_sent_with_its_numbers_and_without_its_texts():
    (t,) = group_of(4, [3])
    t.old_logprobs = torch.zeros(100_000)[5:8]  # a view of a whole rollout's
    t.advantages, t.text, t.reward = (0.5, 0.5, 0.5), "abc", 1.0
    sent = pickle.dumps(for_sending(t))
    assert len(sent) < 2_000
    there = pickle.loads(sent)
    assert there.old_logprobs.equal(t.old_logprobs) and there.advantages == t.advantages and there.mask == t.mask
    assert (there.prompt, there.text, there.completion) == (Prompt(t.prompt.token_ids, ""), "", t.completion)
    assert (t.text, t.prompt.fields) == ("abc", {"answer": "42"})

"""Which rank trains on which group: an even share of the predicted work, not of the groups.

All ranks wait for the slowest at every step of a sharded model, and a group of long completions is many times the work
of one of short ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from lightrft_lightning.experience.trajectory import Prompt, Trajectory


def by_group(trajectories: Iterable[Trajectory]) -> dict[int, list[Trajectory]]:
    """The trajectories of each group, both in the order in which they come."""
    groups: dict[int, list[Trajectory]] = {}
    for t in trajectories:
        groups.setdefault(t.group, []).append(t)
    return groups


def row_lengths(group: Sequence[Trajectory], share_prompts: bool = True) -> list[int]:
    """Tokens of the rows that `pack` makes of a group: one with the prompt once, or one a completion."""
    completions = [len(t.completion.token_ids) for t in group if any(t.mask)]
    if not completions:
        return []
    prompt = len(group[0].prompt.token_ids)
    return [prompt + sum(completions)] if share_prompts else [prompt + length for length in completions]


def flops(lengths: Iterable[int], parameters: int, attention_width: int) -> int:
    """Predicted floating-point operations of a forward and backward pass over rows of these lengths.

    ``6 · parameters`` for each token and ``12 · attention_width`` for each pair of tokens in a row (arXiv 2204.02311,
    appendix B). A dense mask computes all pairs, so none are taken off for those that do not see each other. What this
    leaves out (joined rows, padding, a group that is split) is small beside the differences between groups.

    Args:
        lengths: tokens of each row.
        parameters: that every token is multiplied with.
        attention_width: layers times hidden size.
    """
    return sum(6 * parameters * n + 12 * attention_width * n * n for n in lengths)


def deal(costs: Mapping[int, int], holders: Mapping[int, int], ranks: int) -> dict[int, int]:
    """The rank that each group goes to, so that the busiest rank has little to do.

    The longest processing time first (Graham 1969): the most expensive group that is left goes to the rank that has the
    least so far, which ends at most a third above the best that is possible. Ties go to the rank that has the group,
    then to the first. A group without cost stays where it is, and so do all if that is as good.

    Args:
        costs: of each group.
        holders: the rank that has each group.
        ranks: their number.
    """
    loads = [0] * ranks
    result = dict(holders)
    for group in sorted(costs, key=lambda g: (-costs[g], g)):
        if costs[group]:
            rank = min(range(ranks), key=lambda r: (loads[r], r != holders[group], r))
            loads[rank] += costs[group]
            result[group] = rank
    better = max(loads) < max(rank_loads(costs, holders, ranks))
    return result if better else dict(holders)


def rank_loads(costs: Mapping[int, int], holders: Mapping[int, int], ranks: int) -> list[int]:
    """What the groups of each rank cost together."""
    loads = [0] * ranks
    for group, cost in costs.items():
        loads[holders[group]] += cost
    return loads


def exchanged(values: Mapping[int, Any], receivers: Mapping[int, int], strategy: Any) -> dict[int, Any]:
    """Move what belongs to each group to the rank that receives it. All ranks together.

    Args:
        values: of the groups that this rank has; anything that can be pickled.
        receivers: the rank that each of these groups goes to.
        strategy: a `StrategyBase`.

    Returns:
        The values of the groups that this rank has then, in the order of the groups. What stays is not copied.
    """
    rank = strategy.global_rank
    parcels = [
        {group: value for group, value in values.items() if receivers[group] == to != rank}
        for to in range(strategy.world_size)
    ]
    result = {group: value for group, value in values.items() if receivers[group] == rank}
    for parcel in strategy.exchange_objects(parcels):
        result.update(parcel)
    return dict(sorted(result.items()))


def for_sending(trajectory: Trajectory) -> Trajectory:
    """A copy with what a pass over a model needs: without text, fields and parts of the reward, on the CPU."""
    names = ("old_logprobs", "reference_logprobs", "entropies", "values", "returns")
    tensors: dict[str, Tensor | None] = {name: getattr(trajectory, name) for name in names}
    # Each may be a view of those of the whole rollout, which pickle would send along.
    copies: dict[str, Any] = {name: None if v is None else v.to("cpu", copy=True) for name, v in tensors.items()}
    prompt = Prompt(trajectory.prompt.token_ids, "")
    return replace(trajectory, prompt=prompt, text="", episode=None, reward_parts={}, **copies)

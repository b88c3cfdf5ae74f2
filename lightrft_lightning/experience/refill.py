"""Dynamic sampling: prompts whose completions all earn the same give way to others (DAPO, arXiv 2503.14476, 3.2)."""

from __future__ import annotations

from collections.abc import Container, Sequence
from itertools import islice

import torch

from lightrft_lightning.experience.trajectory import Prompt, Trajectory


def informative_groups(trajectories: Sequence[Trajectory]) -> list[int]:
    """The groups that a comparison within them can learn from: two different rewards at least. In order."""
    rewards: dict[int, set[float]] = {}
    for t in trajectories:
        if t.reward is not None:
            rewards.setdefault(t.group, set()).add(t.reward)
    return sorted(group for group, different in rewards.items() if len(different) > 1)


class Refill:
    """The order in which one iteration takes further prompts from the training set; each once.

    Args:
        prompts: of the training set.
        used: token ids of the prompts that the iteration has begun with.
        seed: fixes the order.
    """

    def __init__(self, prompts: Sequence[Prompt], used: Container[tuple[int, ...]], seed: int) -> None:
        order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(seed)).tolist()
        self._waiting = (prompts[i] for i in order if prompts[i].token_ids not in used)

    def take(self, count: int) -> list[Prompt]:
        """The next `count`, or what is left."""
        return list(islice(self._waiting, count))

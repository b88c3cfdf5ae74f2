"""What `RLHFModule` has sampled for an iteration, at once or while it trained on the batch before."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch

from lightrft_lightning.engines.base import RolloutEngine
from lightrft_lightning.experience.trajectory import Completion, Prompt, SamplingParams, Trajectory
from lightrft_lightning.rewards.base import Rewards, Scoring
from lightrft_lightning.rewards.report import RewardReport
from lightrft_lightning.strategies.base import StrategyBase

_SECONDS = ("rollout", "rewards", "waited")
"""What `Ahead` measures: the rollout as a whole, and what training had to wait for."""

_OWN = ("policy_version", "text", "reward", "reward_parts", "applicable")
"""What a checkpoint holds of a trajectory besides its prompt and tokens."""


@dataclass
class Sampled:
    """What one iteration has sampled: completions with rewards, what became of these, and how long it took."""

    trajectories: list[Trajectory]
    report: RewardReport
    seconds: dict[str, float]
    resampled: int = 0
    optimizer_steps: int | None = None
    """That had been made when the sampling began; None if it was in a run before."""

    def add(self, other: Sampled) -> None:
        self.trajectories = self.trajectories + other.trajectories
        self.report = self.report + other.report
        self.seconds = {name: value + other.seconds[name] for name, value in self.seconds.items()}


class Ahead:
    """A rollout that goes on in the background, its rewards too. All ranks begin and finish it together.

    Args:
        engine: generates in another process.
        rewards: score the completions.
        strategy: the trainer's.
        prompts: of this rank.
        sampling: see `SamplingParams`.
        numbers: the group of each prompt.
        trajectories: what makes trajectories of a prompt's completions and the number of its group.
    """

    def __init__(
        self,
        engine: RolloutEngine,
        rewards: Rewards,
        strategy: StrategyBase,
        prompts: Sequence[Prompt],
        sampling: SamplingParams,
        numbers: Sequence[int],
        trajectories: Callable[[Prompt, Sequence[Completion], int], list[Trajectory]],
    ) -> None:
        self._start, self._steps = time.perf_counter(), strategy.optimizer_steps
        self._generated = self._start
        self._groups: dict[int, list[Trajectory]] = {}
        self._count = len(prompts)
        self._scoring = Scoring(rewards, strategy)

        def arrived(i: int, completions: list[Completion]) -> None:
            self._groups[i] = [] if prompts[i].filler else trajectories(prompts[i], completions, numbers[i])
            self._scoring.add(self._groups[i])
            self._generated = time.perf_counter()

        self._generation = engine.begin([p.token_ids for p in prompts], sampling, numbers, arrived)

    def finish(self) -> Sampled:
        """Wait for what is missing.

        Raises:
            EngineError: the engine failed.
            ValueError: as `Rewards.score`.
        """
        start = time.perf_counter()
        try:
            self._generation.finish()
            report = self._scoring.finish()
        finally:
            self._scoring.stop()
        trajectories = [t for i in range(self._count) for t in self._groups[i]]
        now = time.perf_counter()
        seconds = (self._generated - self._start, now - max(start, self._generated), now - start)
        timing = dict(zip(_SECONDS, seconds, strict=True))
        return Sampled(trajectories, report, timing, optimizer_steps=self._steps)

    def give_up(self) -> None:
        """Score nothing more; the engine ends the rest when it is closed."""
        self._scoring.stop()


def sampled_state(sampled: Sampled, gather: Callable[[Any], list[Any]]) -> dict[str, Any]:
    """What all ranks have sampled, for a checkpoint. All of them together."""
    mine = [
        (
            {
                "group": t.group,
                "prompt": {"text": t.prompt.text, "fields": dict(t.prompt.fields), "messages": list(t.prompt.messages)},
                "prompt_tokens": len(t.prompt.token_ids),
                "completion_tokens": len(t.completion.token_ids),
                "finish_reason": t.completion.finish_reason,
                **{name: getattr(t, name) for name in _OWN},
            },
            t.prompt.token_ids + t.completion.token_ids,
            t.completion.logprobs,
        )
        for t in sampled.trajectories
    ]
    rows = [row for of_rank in gather(mine) for row in of_rank]
    rows.sort(key=lambda row: row[0]["group"])  # stable: those of a group keep their order
    return {  # two tensors in place of an entry for every token
        "samples": [sample for sample, _, _ in rows],
        "token_ids": torch.tensor([i for _, ids, _ in rows for i in ids], dtype=torch.long),
        "logprobs": torch.tensor([p for _, _, logprobs in rows for p in logprobs], dtype=torch.float64),
    }


def sampled_from_state(state: Mapping[str, Any], rank: int, ranks: int) -> Sampled:
    """This rank's share of what was saved, which may have been by another number of ranks."""
    ids, logprobs = iter(state["token_ids"].tolist()), iter(state["logprobs"].tolist())
    trajectories: list[Trajectory] = []
    prompts: dict[int, Prompt] = {}
    for sample in state["samples"]:
        prompt_ids, count = tuple(islice(ids, sample["prompt_tokens"])), sample["completion_tokens"]
        completion = Completion(tuple(islice(ids, count)), tuple(islice(logprobs, count)), sample["finish_reason"])
        group, given = sample["group"], sample["prompt"]
        if group % ranks == rank:
            messages = tuple(given["messages"])
            prompt = prompts.setdefault(group, Prompt(prompt_ids, given["text"], given["fields"], False, messages))
            own = {name: sample[name] for name in _OWN if name in sample}
            trajectories.append(Trajectory(prompt, completion, group, **own))
    missing = [t.applicable for t in trajectories if t.reward is None]
    report = RewardReport(len(trajectories), failed=sum(missing), inapplicable=len(missing) - sum(missing))
    return Sampled(trajectories, report, dict.fromkeys(_SECONDS, 0.0))

"""What an iteration logs, as plain numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from lightrft_lightning.experience.trajectory import Trajectory


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean; NaN of nothing."""
    return sum(values) / len(values) if values else float("nan")


def combine_passes(passes: Sequence[tuple[int, Mapping[str, float]]]) -> dict[str, float]:
    """Metrics of one optimizer step from those of its passes, on all ranks, each with its number of policy tokens.

    Losses and KL are shares that add up, ``*_max`` stay maxima, the rest are means over tokens.
    """
    combined: dict[str, float] = {}
    tokens = sum(count for count, _ in passes)
    for name in passes[0][1] if passes else ():
        values = [metrics[name] for _, metrics in passes]
        if name in ("loss", "kl", "value_loss"):
            combined[name] = sum(values)
        elif name.endswith("_max"):
            combined[name] = max(values)
        else:
            combined[name] = sum(count * metrics[name] for count, metrics in passes) / tokens
    return combined


def mean_over_steps(steps: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Mean of each metric over the optimizer steps that have it."""
    names = sorted({name for step in steps for name in step})
    return {name: mean([step[name] for step in steps if name in step]) for name in names}


class SampleResult(NamedTuple):
    """What the metrics need to know of a trajectory; small, as ranks exchange it."""

    length: int
    finished: bool
    reward: float | None
    reward_parts: dict[str, float]


def sample_result(t: Trajectory) -> SampleResult:
    """Length in tokens, whether the completion ended by itself, and the reward."""
    finished = t.completion.finish_reason != "length"
    return SampleResult(len(t.completion.token_ids), finished, t.reward, dict(t.reward_parts))


def reward_metrics(samples: Sequence[SampleResult]) -> dict[str, float]:
    """Length and share of finished completions, and of those that were scored mean, spread and parts of the reward."""
    rewards = [s.reward for s in samples if s.reward is not None]
    metrics = {"length": mean([s.length for s in samples]), "finished": mean([s.finished for s in samples])}
    if rewards:
        metrics["reward"] = mean(rewards)
        metrics["reward_std"] = mean([(r - metrics["reward"]) ** 2 for r in rewards]) ** 0.5
    for name in sorted({name for s in samples for name in s.reward_parts}):
        metrics[f"reward/{name}"] = mean([s.reward_parts[name] for s in samples if name in s.reward_parts])
    return metrics

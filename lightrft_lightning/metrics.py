"""What an iteration logs, as plain numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lightrft_lightning.experience.trajectory import Trajectory


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean; NaN of nothing."""
    return sum(values) / len(values) if values else float("nan")


def combine_passes(passes: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Metrics of one optimizer step from those of its passes: loss and KL are shares that add up, ``*_max`` stay
    maxima, the rest is averaged.
    """
    combined: dict[str, float] = {}
    for name in passes[0] if passes else ():
        values = [p[name] for p in passes]
        if name in ("loss", "kl"):
            combined[name] = sum(values)
        else:
            combined[name] = max(values) if name.endswith("_max") else mean(values)
    return combined


def mean_over_steps(steps: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Mean of each metric over the optimizer steps that have it."""
    names = sorted({name for step in steps for name in step})
    return {name: mean([step[name] for step in steps if name in step]) for name in names}


def reward_metrics(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    """Length and share of finished completions, and of those that were scored mean, spread and parts of the reward."""
    rewards = [t.reward for t in trajectories if t.reward is not None]
    metrics = {
        "length": mean([len(t.completion.token_ids) for t in trajectories]),
        "finished": mean([t.completion.finish_reason != "length" for t in trajectories]),
    }
    if rewards:
        metrics["reward"] = mean(rewards)
        metrics["reward_std"] = mean([(r - metrics["reward"]) ** 2 for r in rewards]) ** 0.5
    for name in sorted({name for t in trajectories for name in t.reward_parts}):
        metrics[f"reward/{name}"] = mean([t.reward_parts[name] for t in trajectories if name in t.reward_parts])
    return metrics

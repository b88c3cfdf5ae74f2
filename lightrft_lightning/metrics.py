"""What an iteration logs, as plain numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import comb
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
    group: int
    turns: int = 0
    errors: int = 0
    observed: int = 0
    applicable: bool = True


def sample_result(t: Trajectory) -> SampleResult:
    """Policy tokens, whether the completion ended by itself, the reward, whose completion it is, and its episode."""
    finished, written = t.completion.finish_reason != "length", sum(t.mask)
    episode = (len(t.episode.turns), t.episode.errors, len(t.mask) - written) if t.episode else (0, 0, 0)
    return SampleResult(written, finished, t.reward, dict(t.reward_parts), t.group, *episode, t.applicable)


def reward_metrics(samples: Sequence[SampleResult]) -> dict[str, float]:
    """Length and share of finished completions, and of those that were scored mean, spread and parts of the reward."""
    rewards = [s.reward for s in samples if s.reward is not None]
    metrics = {"length": mean([s.length for s in samples]), "finished": mean([s.finished for s in samples])}
    if rewards:
        metrics["reward"] = mean(rewards)
        metrics["reward_std"] = mean([(r - metrics["reward"]) ** 2 for r in rewards]) ** 0.5
    if any(s.turns for s in samples):
        metrics |= {"turns": mean([s.turns for s in samples]), "tool_errors": mean([s.errors for s in samples])}
        observed = sum(s.observed for s in samples)
        metrics["observation_share"] = observed / (observed + sum(s.length for s in samples))
    for name in sorted({name for s in samples for name in s.reward_parts}):
        metrics[f"reward/{name}"] = mean([s.reward_parts[name] for s in samples if name in s.reward_parts])
    return metrics


def pass_metrics(groups: Sequence[Sequence[SampleResult]], threshold: float) -> dict[str, float]:
    """``pass@k`` for k = 1, 2, 4, ... and n, and ``mean@n``, over prompts with n samples each.

    A sample passes if its reward reaches `threshold`; one whose reward failed does not pass, and is left out of the
    mean. Samples that no reward function applies to are left out of everything.
    """
    groups = [rest for group in groups if (rest := [s for s in group if s.applicable])]
    n = max(map(len, groups), default=0)
    passed = [(len(group), sum(s.reward is not None and s.reward >= threshold for s in group)) for group in groups]
    ks = sorted({n, *(2**i for i in range(n.bit_length()))} - {0})
    metrics = {f"pass@{k}": mean([pass_at_k(m, c, k) for m, c in passed if m >= k]) for k in ks if k <= n}
    if n > 1:
        metrics[f"mean@{n}"] = mean([s.reward for group in groups for s in group if s.reward is not None])
    return metrics


def pass_at_k(n: int, c: int, k: int) -> float:
    """Unbiased estimate of the chance that one of `k` samples passes, if `c` of `n` did (arXiv 2107.03374, 3.1).

    Raises:
        ValueError: not 1 <= k <= n and 0 <= c <= n.
    """
    if not 1 <= k <= n or not 0 <= c <= n:
        raise ValueError(f"pass_at_k(n={n}, c={c}, k={k}): needs 1 <= k <= n and 0 <= c <= n")
    return 1 - comb(n - c, k) / comb(n, k)

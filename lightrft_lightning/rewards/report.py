"""What became of the rewards of some samples, in numbers and in words."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

log = logging.getLogger(__name__)

LINES = 10
"""Most reasons that are told one by one."""
INAPPLICABLE = "every reward function returned None, which means that it does not apply"


class Reason(NamedTuple):
    """Why samples have no reward: of how many it is the reason, and the prompt of the first."""

    samples: int
    prompt: str


@dataclass(frozen=True)
class RewardReport:
    """What became of a batch, in numbers of samples.

    Attributes:
        samples: all of them.
        failed: without a reward of their own, for whatever reason.
        timed_out: of these, those that took longer than the deadline.
        non_finite: of these, those whose reward was NaN or infinite.
        inapplicable: those for which every reward function returned None; they have not failed.
        values: how many samples each reward function has given a number.
        reasons: why samples failed, each reason once.
    """

    samples: int
    failed: int = 0
    timed_out: int = 0
    non_finite: int = 0
    inapplicable: int = 0
    values: Mapping[str, int] = field(default_factory=dict, compare=False, repr=False)
    reasons: Mapping[str, Reason] = field(default_factory=dict, compare=False, repr=False)

    @property
    def rewarded(self) -> int:
        """Samples with a reward of their own."""
        return self.samples - self.failed - self.inapplicable

    def __add__(self, other: RewardReport) -> RewardReport:
        names = ("samples", "failed", "timed_out", "non_finite", "inapplicable")
        counts = {name: getattr(self, name) + getattr(other, name) for name in names}
        values = {name: self.values.get(name, 0) + other.values.get(name, 0) for name in (*self.values, *other.values)}
        reasons = collected([*self.reasons.items(), *other.reasons.items()])
        return RewardReport(**counts, values=values, reasons=reasons)

    def lines(self) -> list[str]:
        """A line for each reason, the most frequent first: ``3 of 16 samples: right: KeyError: ... (first prompt)``."""
        ordered = sorted(self.reasons.items(), key=lambda item: -item[1].samples)
        lines = [
            f"{reason.samples} of {self.samples} samples: {text} (first prompt: {reason.prompt})"
            for text, reason in ordered[:LINES]
        ]
        if rest := ordered[LINES:]:
            lines.append(f"{sum(reason.samples for _, reason in rest)} more samples: {len(rest)} further reasons")
        if self.inapplicable:
            lines.append(f"{self.inapplicable} of {self.samples} samples: {INAPPLICABLE}")
        return lines

    def warn(self, on_error: float | None) -> None:
        """Log a line for each reason why samples failed.

        Args:
            on_error: the reward that they get; None: they are left out.
        """
        consequence = "dropped" if on_error is None else f"given {on_error}"
        failures = RewardReport(self.samples, reasons=self.reasons)
        for line in failures.lines():
            log.warning("no reward, %s: %s", consequence, line)


def collected(reasons: Iterable[tuple[str, Reason]]) -> dict[str, Reason]:
    """Each reason once, with the number of all its samples."""
    found: dict[str, Reason] = {}
    for text, reason in reasons:
        before = found.get(text, Reason(0, reason.prompt))
        found[text] = Reason(before.samples + reason.samples, before.prompt)
    return found

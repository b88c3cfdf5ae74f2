"""Looks after the rewards of a run: tells of failures, and stops where no reward function has ever worked."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from lightning.pytorch.utilities.rank_zero import rank_zero_only

from lightrft_lightning.rewards.report import INAPPLICABLE, RewardReport

if TYPE_CHECKING:
    from lightrft_lightning.rewards.base import Rewards
    from lightrft_lightning.strategies.base import StrategyBase

log = logging.getLogger(__name__)


class NoRewardError(RuntimeError):
    """Not one completion of the first iteration has a reward, so a run would learn nothing."""


class RewardWatch:
    """What `RLHFModule` does with the reports of its rewards. The same calls on all ranks.

    Args:
        rewards: those of the run.
    """

    def __init__(self, rewards: Rewards) -> None:
        self._rewards = rewards
        self._works = False
        self._told: tuple[int, set[str]] = (0, set())
        self._evaluated = RewardReport(0)

    def trained(self, report: RewardReport, iteration: int, strategy: StrategyBase) -> None:
        """Tell what has failed in this iteration, each reason once.

        Raises:
            NoRewardError: no sample of any rank has a reward, and none has had one before in this process.
        """
        if not self._works:
            self._check_first(report, strategy)
        told = self._told[1] if self._told[0] == iteration else set()
        self._told = (iteration, told | set(report.reasons))
        news = {text: reason for text, reason in report.reasons.items() if text not in told}
        RewardReport(report.samples, reasons=news).warn(self._rewards.on_error)

    def begin_evaluation(self) -> None:
        """Forget an evaluation that was broken off."""
        self._evaluated = RewardReport(0)

    def evaluated(self, report: RewardReport) -> None:
        """Keep the report of one batch."""
        self._evaluated = self._evaluated + report

    def end_evaluation(self, strategy: StrategyBase) -> None:
        """Tell what has failed in this evaluation, each reason once.

        Raises:
            NoRewardError: no sample of any rank has a reward, and nothing has been trained in this process so far.
        """
        report, self._evaluated = self._evaluated, RewardReport(0)
        if not self._works:
            found = _of_all_ranks(report, strategy)
            if found.failed and not found.rewarded:
                raise NoRewardError(_story("of this evaluation", found))
            if found.inapplicable and not found.rewarded:
                rank_zero_only(log.warning)("none of the %d samples has a reward: %s", found.samples, INAPPLICABLE)
        report.warn(self._rewards.on_error)

    def _check_first(self, report: RewardReport, strategy: StrategyBase) -> None:
        found = _of_all_ranks(report, strategy)
        if not found.samples or not (found.rewarded or found.reasons or found.inapplicable):
            return  # of a checkpoint: told by the run that wrote it
        if not found.rewarded:
            raise NoRewardError(_story("of the first iteration", found))
        self._works = True
        for name in self._rewards.names:
            if not found.values.get(name):
                rank_zero_only(log.warning)(
                    "the reward %r is part of nothing: it gave none of the %d samples of the first iteration a number",
                    name, found.samples,
                )  # fmt: skip


def _of_all_ranks(report: RewardReport, strategy: StrategyBase) -> RewardReport:
    total = RewardReport(0)
    for one in strategy.gather_objects(report):
        total = total + one
    return total


def _story(whose: str, report: RewardReport) -> str:
    lines = "\n".join(f"  {line}" for line in report.lines())
    return (
        f"not one of the {report.samples} completions {whose} has a reward, so there is nothing to learn from:\n{lines}"
        "\nThe run stops here: mend the reward function, or the data that it needs. Only where some samples have a "
        "reward are the others left out"
    )

"""Rewards: plain functions, servers and models that score completions, and what runs them safely."""

from lightrft_lightning.rewards import functions  # registers them
from lightrft_lightning.rewards._spec import REWARDS, InProcesses
from lightrft_lightning.rewards.base import Rewards
from lightrft_lightning.rewards.judge import Judge
from lightrft_lightning.rewards.model import RewardModel
from lightrft_lightning.rewards.remote import RemoteReward
from lightrft_lightning.rewards.report import RewardReport
from lightrft_lightning.rewards.watch import NoRewardError

__all__ = [
    "REWARDS", "InProcesses", "Judge", "NoRewardError", "RemoteReward", "RewardModel", "RewardReport", "Rewards",
    "functions",
]  # fmt: skip

"""Rewards: plain functions that score completions, and what runs them safely."""

from lightrft_lightning.rewards import functions  # registers them
from lightrft_lightning.rewards._spec import REWARDS, InProcesses
from lightrft_lightning.rewards.base import RewardReport, Rewards

__all__ = ["REWARDS", "InProcesses", "RewardReport", "Rewards", "functions"]

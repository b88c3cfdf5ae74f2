"""Callbacks that a user switches on and off; the rollout engine is one of them."""

from lightrft_lightning.callbacks.export import ExportModel
from lightrft_lightning.callbacks.predictions import WritePredictions
from lightrft_lightning.callbacks.progress import ProgressLine
from lightrft_lightning.callbacks.reward_curve import RewardCurve
from lightrft_lightning.callbacks.rollout import RolloutCallback
from lightrft_lightning.callbacks.samples import SampleTable
from lightrft_lightning.callbacks.summary import Summary
from lightrft_lightning.callbacks.warmup import SupervisedWarmup

__all__ = [
    "ExportModel",
    "ProgressLine",
    "RewardCurve",
    "RolloutCallback",
    "SampleTable",
    "Summary",
    "SupervisedWarmup",
    "WritePredictions",
]

"""Reinforcement fine-tuning of language models inside PyTorch Lightning.

Importing this package registers its strategies with Lightning: ``Trainer(strategy="lightrft_fake")``.
"""

from lightrft_lightning.callbacks.rollout import RolloutCallback
from lightrft_lightning.checkpoints.folder import CheckpointError
from lightrft_lightning.config import StrategyConfig
from lightrft_lightning.data import PromptDataModule
from lightrft_lightning.engines.base import RolloutEngine
from lightrft_lightning.engines.remote import RemoteRollout
from lightrft_lightning.engines.sglang import SGLangRollout
from lightrft_lightning.engines.transformers import TransformersRollout
from lightrft_lightning.engines.vllm import VLLMRollout
from lightrft_lightning.experience.trajectory import Completion, Prompt, SamplingParams, Trajectory
from lightrft_lightning.module import RLHFModule
from lightrft_lightning.reward_module import RewardModule
from lightrft_lightning.rewards import Rewards
from lightrft_lightning.sft_module import SFTModule
from lightrft_lightning.strategies.base import StrategyBase
from lightrft_lightning.strategies.deepspeed import DeepspeedStrategy
from lightrft_lightning.strategies.factory import (
    available_strategies,
    get_fake_strategy,
    get_strategy,
    register_builtin_strategies,
    register_strategy,
)
from lightrft_lightning.strategies.fake import FakeStrategy
from lightrft_lightning.strategies.fsdp import FSDPV2Strategy
from lightrft_lightning.strategies.lightrft_calls import is_engine

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "Completion",
    "DeepspeedStrategy",
    "FSDPV2Strategy",
    "FakeStrategy",
    "Prompt",
    "PromptDataModule",
    "RLHFModule",
    "RemoteRollout",
    "RewardModule",
    "Rewards",
    "RolloutCallback",
    "RolloutEngine",
    "SFTModule",
    "SGLangRollout",
    "SamplingParams",
    "StrategyBase",
    "StrategyConfig",
    "Trajectory",
    "TransformersRollout",
    "VLLMRollout",
    "available_strategies",
    "get_fake_strategy",
    "get_strategy",
    "is_engine",
    "register_strategy",
]

register_builtin_strategies()

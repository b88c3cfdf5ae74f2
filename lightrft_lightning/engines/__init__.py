"""Engines that generate."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, get_args

from torch import nn

from lightrft_lightning._errors import unknown_name
from lightrft_lightning.config import EngineType, StrategyConfig
from lightrft_lightning.engines.base import RolloutEngine

if TYPE_CHECKING:
    from lightrft_lightning.strategies.base import StrategyBase


def create_engine(
    engine_type: str,
    config: StrategyConfig,
    actor: nn.Module | None,
    tokenizer: Any,
    strategy: StrategyBase | None = None,
) -> RolloutEngine:
    """Build an engine of `engine_type` that generates with `actor`; see `StrategyBase.setup_inference_engine`."""
    if engine_type not in get_args(EngineType):
        raise ValueError(unknown_name("engine_type", engine_type, get_args(EngineType)))
    if engine_type != "transformers":
        raise RuntimeError(f"engine_type={engine_type!r} is not available yet in this release; use 'transformers'")
    if config.engine_tp_size != 1:
        raise ValueError(f"engine_tp_size={config.engine_tp_size}: the transformers engine has no tensor parallelism")
    if actor is None:
        raise ValueError("engine_type='transformers' generates with the actor itself: pass actor=")
    from lightrft_lightning.engines.transformers import TransformersRollout
    from lightrft_lightning.models.loading import load_tokenizer

    model: Any = actor if hasattr(actor, "config") else actor.model
    engine = TransformersRollout()
    engine.strategy = strategy
    engine.connect(model, tokenizer if tokenizer is not None else load_tokenizer(model.config.name_or_path))
    return engine

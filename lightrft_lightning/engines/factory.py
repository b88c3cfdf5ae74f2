"""Engines by name, for `StrategyBase.setup_inference_engine`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, get_args

from torch import nn

from lightrft_lightning._errors import unknown_name
from lightrft_lightning.callbacks.rollout import RolloutCallback
from lightrft_lightning.config import EngineType, StrategyConfig
from lightrft_lightning.engines.base import RolloutEngine
from lightrft_lightning.engines.weight_sync import PolicyWeights
from lightrft_lightning.models.loading import load_tokenizer
from lightrft_lightning.models.lora import check_policy

if TYPE_CHECKING:
    from lightrft_lightning.strategies.base import StrategyBase


def create_engine(
    engine: str | RolloutEngine,
    config: StrategyConfig,
    actor: nn.Module | None,
    tokenizer: Any,
    strategy: StrategyBase,
) -> RolloutEngine:
    """Build or connect an engine that generates with `actor`'s weights; see `StrategyBase.setup_inference_engine`."""
    if isinstance(engine, str) and engine not in get_args(EngineType):
        raise ValueError(unknown_name("engine_type", engine, get_args(EngineType)))
    if actor is None:
        raise ValueError(f"engine_type={engine!r} generates with the actor's weights: pass actor=")
    if isinstance(engine, str):
        engine = _by_name(engine, config)
    weights = PolicyWeights(strategy, actor)
    engine.strategy = strategy
    if isinstance(engine, RolloutCallback):
        model = weights.model
        check_policy(model, type(engine).__name__, engine.has_copy)
        engine.connect(model, tokenizer if tokenizer is not None else load_tokenizer(model.config.name_or_path))
        try:
            if engine.has_copy:
                engine.update_weights(weights, engine.version)
        except BaseException:
            engine.close()
            raise
    return engine


def _by_name(name: str, config: StrategyConfig) -> RolloutEngine:
    shared: dict[str, Any] = {
        "tensor_parallel_size": config.engine_tp_size,
        "sleep_level": int(config.enable_engine_sleep),
    }
    if name == "vllm":
        from lightrft_lightning.engines.vllm import VLLMRollout

        return VLLMRollout(**shared)
    if name == "sglang":
        from lightrft_lightning.engines.sglang import SGLangRollout

        return SGLangRollout(**shared)
    if config.engine_tp_size != 1:
        raise ValueError(f"engine_tp_size={config.engine_tp_size}: the transformers engine has no tensor parallelism")
    from lightrft_lightning.engines.transformers import TransformersRollout

    return TransformersRollout()

"""`DeepspeedStrategy`: name, dispatch and configuration checks; the back end itself is not part of this release."""

from __future__ import annotations

from typing import Any, NoReturn

from lightrft_lightning.config import StrategyConfig
from lightrft_lightning.strategies.base import StrategyBase


class DeepspeedStrategy(StrategyBase):
    """DeepSpeed ZeRO-1, 2 and 3. Not available yet: the first thing that would need it says so.

    Raises:
        ValueError: a configuration that contradicts DeepSpeed, e.g. ``fsdp=True``.
    """

    strategy_name = "lightrft_deepspeed"
    # Any number of devices may be asked for; what says "not available" comes later.
    parallel_devices = None  # type: ignore[assignment, override]
    num_nodes = 1  # type: ignore[assignment]

    def _checked_config(self, config: StrategyConfig) -> StrategyConfig:
        if config.fsdp:
            raise ValueError("DeepspeedStrategy(fsdp=True): leave fsdp out, or use FSDPV2Strategy")
        return config

    def _not_available(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise RuntimeError(f"strategy {self.strategy_name!r} is not available yet in this release")

    setup_distributed = setup_environment = prepare = create_optimizer = init_model_context = _not_available
    save_ckpt = load_ckpt = backward = optimizer_step = _not_available

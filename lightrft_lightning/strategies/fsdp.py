"""`FSDPV2Strategy`: name, dispatch and configuration checks; the back end itself is not part of this release."""

from __future__ import annotations

from typing import Any, NoReturn

from lightrft_lightning.config import StrategyConfig
from lightrft_lightning.strategies.base import StrategyBase


class FSDPV2Strategy(StrategyBase):
    """FSDP2 (`fully_shard`). Not available yet: the first thing that would need it says so.

    Raises:
        ValueError: a configuration that contradicts FSDP2, e.g. ``zero_stage=3``.
    """

    strategy_name = "lightrft_fsdp"
    # Any number of devices may be asked for; what says "not available" comes later.
    parallel_devices = None  # type: ignore[assignment, override]
    num_nodes = 1  # type: ignore[assignment]

    def _checked_config(self, config: StrategyConfig) -> StrategyConfig:
        if config.fsdp:
            return config
        if config.is_set("fsdp"):
            raise ValueError("FSDPV2Strategy(fsdp=False): leave it out, or use DeepspeedStrategy")
        return config.replace(fsdp=True)

    def _not_available(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise RuntimeError(
            f"strategy {self.strategy_name!r} is not available yet in this release; use strategy='lightrft_fake', "
            "which trains in one process"
        )

    setup_distributed = setup_environment = prepare = create_optimizer = init_model_context = _not_available
    save_ckpt = load_ckpt = backward = optimizer_step = _not_available

"""`FakeStrategy`: the whole interface in one process, without a process group."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from typing_extensions import override

from lightrft_lightning.strategies.base import StrategyBase


class FakeStrategy(StrategyBase, SingleDeviceStrategy):
    """One process on one device. "Fake" names the absence of a cluster, not of work: it trains for real.

    Settings of the sharded back ends (`zero_stage`, `fsdp`, offload, ...) are accepted, so that it replaces any of
    them in a test; there is nothing to shard, so they change nothing.

    Args:
        device: default the CPU in a hand-written loop and the Trainer's accelerator inside a `Trainer`.
        **kwargs: see `StrategyBase`.
    """

    strategy_name = "lightrft_fake"
    whole_parameters = True

    @property
    def restore_checkpoint_after_setup(self) -> bool:  # type: ignore[override]
        """As in Lightning's strategies for one device, so that `on_fit_start` sees what was saved.

        The modules of this package compare their settings with those saved, once their optimizers are there.
        """
        return hasattr(self.lightning_module, "_given")

    def __init__(self, *positional: Any, device: str | torch.device | None = None, **kwargs: Any) -> None:
        super().__init__(*positional, device="cpu" if device is None else device, **kwargs)
        self._device_given = device is not None

    @property
    @override
    def root_device(self) -> torch.device:
        return self._root_device if self._device_given else super().root_device

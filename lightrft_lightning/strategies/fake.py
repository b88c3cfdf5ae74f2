"""`FakeStrategy`: the whole interface in one process, without a process group."""

from __future__ import annotations

from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
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

    def __init__(self, *, device: str | torch.device | None = None, **kwargs: Any) -> None:
        super().__init__(device="cpu" if device is None else device, **kwargs)
        self._device_given = device is not None
        self._parallel_devices: list[torch.device] | None = None

    @property
    @override
    def root_device(self) -> torch.device:
        if self._parallel_devices and not self._device_given:
            return self._parallel_devices[0]
        return self._root_device

    @property
    def parallel_devices(self) -> list[torch.device] | None:
        """The Trainer's devices; more than one is refused."""
        return self._parallel_devices

    @parallel_devices.setter
    def parallel_devices(self, devices: list[torch.device]) -> None:
        if len(devices) > 1:
            raise MisconfigurationException(
                f"{self.strategy_name} runs in one process, got devices={len(devices)}: set devices=1, "
                "or take strategy='lightrft_fsdp' or 'lightrft_deepspeed'"
            )
        self._parallel_devices = devices

    @property
    def num_nodes(self) -> int:
        """Always 1."""
        return 1

    @num_nodes.setter
    def num_nodes(self, value: int) -> None:
        if value != 1:
            raise MisconfigurationException(f"{self.strategy_name} runs in one process, got num_nodes={value}")

"""AdamW with both moments in eight bits and a scale for every 256 of them (arXiv 2110.02861), by bitsandbytes."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lightrft_lightning._errors import import_extra

MOMENTS = (("exp_avg", "state1", "absmax1", "qmap1"), ("exp_avg_sq", "state2", "absmax2", "qmap2"))
"""Of each moment the name in `torch.optim.AdamW`, and bitsandbytes' names of its codes, scales and table."""
BLOCK = 256
SMALLEST = 4096
"""Elements with one scale, and of the smallest tensor in eight bits, in bitsandbytes' blockwise optimizers."""


def adamw_8bit(groups: list[dict[str, Any]], **settings: Any) -> Optimizer:
    """The optimizer; `settings` are those of `bitsandbytes.optim.AdamW8bit`."""
    return _class()(groups, **settings)  # type: ignore[no-any-return]


@functools.cache
def _class() -> Any:
    optim = import_extra("bitsandbytes.optim", "bitsandbytes")

    class AdamW8bit(optim.AdamW8bit):  # type: ignore[misc, name-defined]
        """bitsandbytes' own, for FSDP2 too: of a parameter it is shown the part of this rank, which may be empty."""

        def init_state(self, group: dict[str, Any], p: Tensor, gindex: int, pindex: int) -> None:
            self.state[p]["step"] = 0
            with self._shown(p) as local:
                if local.numel():
                    super().init_state(group, local, gindex, pindex)

        def update_step(self, group: dict[str, Any], p: Tensor, gindex: int, pindex: int) -> None:
            with self._shown(p) as local:
                if local.numel():
                    super().update_step(group, local, gindex, pindex)
                else:
                    self.state[p]["step"] += 1

        @contextmanager
        def _shown(self, p: Tensor) -> Iterator[Tensor]:
            local = _local(p)
            local.grad = None if p.grad is None else _local(p.grad)
            self.state[local] = self.state[p]
            try:
                yield local
            finally:
                del self.state[local]

    return AdamW8bit


def _local(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@contextmanager
def full_moments(optimizer: Optimizer, change: bool = False) -> Iterator[None]:
    """Inside, moments in eight bits are those of `torch.optim.AdamW`: numbers of full precision, under its names.

    Args:
        optimizer: any; to another one nothing happens.
        change: take over what they are at the end; otherwise they are a copy to look at.
    """
    if type(optimizer).__name__ != "AdamW8bit":
        yield
        return
    before = dict(optimizer.state)
    for parameter, state in before.items():
        optimizer.state[parameter] = _expanded(parameter, state)
    try:
        yield
        if change:
            before = {parameter: _packed(parameter, state) for parameter, state in optimizer.state.items()}
    finally:
        optimizer.state.clear()
        optimizer.state.update(before)


def _expanded(parameter: Tensor, state: dict[str, Any]) -> dict[str, Any]:
    full: dict[str, Any] = {"step": torch.tensor(float(state["step"]))}
    for name, codes, scales, table in MOMENTS:
        full[name] = torch.zeros_like(parameter.detach(), dtype=torch.float32)
        if table in state:
            numbers = state[table][state[codes].int()].view(-1)
            scale = state[scales].repeat_interleave(BLOCK)[: numbers.numel()]
            _local(full[name]).view(-1).copy_(numbers * scale)
        elif codes in state:  # few enough to be kept in full precision
            _local(full[name]).copy_(state[codes])
    return full


def _packed(parameter: Tensor, full: dict[str, Any]) -> dict[str, Any]:
    """Undo `_expanded`: what was eight bits once is so again, without a further error."""
    functional = import_extra("bitsandbytes.functional", "bitsandbytes")
    state: dict[str, Any] = {"step": int(full["step"])}
    for (name, codes, scales, table), signed in zip(MOMENTS, (True, False), strict=True):
        values = _local(full[name])
        if values.numel() < SMALLEST:
            if values.numel():
                state[codes] = values.clone()
            continue
        state[table] = functional.create_dynamic_map(signed=signed).to(values.device)
        low, high = float(state[table][0]), float(state[table][-1])
        blocks = torch.nn.functional.pad(values.reshape(-1), (0, -values.numel() % BLOCK)).view(-1, BLOCK)
        # The table goes from -0.993 to 1: a largest number that is negative must meet the lower end.
        scale = blocks.amax(1) / high
        if signed:
            scale = torch.maximum(scale, blocks.amin(1) / low)
        between = (state[table][1:] + state[table][:-1]) / 2
        found = torch.bucketize(blocks / scale.clamp_min(torch.finfo(torch.float32).tiny)[:, None], between)
        state[codes] = found.to(torch.uint8).view(-1)[: values.numel()].view(values.shape)
        state[scales] = scale
    return state

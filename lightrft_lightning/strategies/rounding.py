"""When weights of a model without an optimizer are rounded to 16 bits: it may get one yet, which needs exact ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def refuse_rounded(model: nn.Module) -> None:
    """Raise ValueError: its exact weights are gone."""
    raise ValueError(
        f"the weights of {type(model).__name__} were rounded to 16 bits at its first forward pass, since it was "
        "prepared without an optimizer: call create_optimizer before, so that exact ones are trained"
    )


class Rounding:
    """Rounds a model's float32 weights at its first forward pass.

    Args:
        model: whole.
        dtype: of 16 bits.
        at_once: now.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype, at_once: bool) -> None:
        self._model, self._dtype = model, dtype
        self._is_done = False
        self._handle = model.register_forward_pre_hook(self._round, prepend=True)
        if at_once:
            self._round()

    def _round(self, *_: Any) -> None:
        self._handle.remove()
        for parameter in self._model.parameters():
            if parameter.is_floating_point() and parameter.dtype != self._dtype:
                self._is_done |= parameter.dtype == torch.float32
                # Not upwards: this may be a part of a model, the rest of which computes in 16 bits (under adapters).
                parameter.data = parameter.data.to(self._dtype)

    def check_exact(self) -> None:
        """Leave it alone from now on.

        Raises:
            ValueError: it is too late.
        """
        self._handle.remove()
        if self._is_done:
            refuse_rounded(self._model)

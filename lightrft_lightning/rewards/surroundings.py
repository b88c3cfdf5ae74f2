"""What is global in a process and changes a training's numbers or files, if a reward function touches it."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch

log = logging.getLogger(__name__)

_SETTINGS: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "the working directory": (os.getcwd, os.chdir),
    "torch's default dtype": (torch.get_default_dtype, torch.set_default_dtype),
    "the precision of float32 products": (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    "the use of deterministic algorithms": (torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode),
}


@contextlib.contextmanager
def kept_while_scoring() -> Iterator[None]:
    """What reward functions change inside is put back at the end, and told in a line. For the main thread."""
    before = {name: get() for name, (get, _) in _SETTINGS.items()}
    try:
        yield
    finally:
        for name, (get, put) in _SETTINGS.items():
            try:
                now = get()
            except OSError:  # the directory has been removed
                now = None
            if now != before[name]:
                put(before[name])
                log.warning(
                    "a reward function has changed %s from %s to %s, which is the training's as well: put back. "
                    "Let it leave that alone, or run it in a process (`processes: 1`)",
                    name, before[name], now,
                )  # fmt: skip

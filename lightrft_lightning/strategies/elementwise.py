"""Whether an optimizer treats every element of a parameter by itself, as is needed where it gets rows of elements."""

from __future__ import annotations

import copy
import logging
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

log = logging.getLogger(__name__)


def check_elementwise(optimizer: Optimizer) -> None:
    """Refuse optimizers for which the shape of a parameter matters, by two steps of one that is whole and in two rows.

    So do Adafactor and Shampoo (rows and columns), Muon (matrices), LAMB and LARS (norms of parameters).

    Args:
        optimizer: without a state; it is not changed.

    Raises:
        ValueError: the steps are others.
    """
    if type(optimizer).__module__.partition(".")[0] in ("lightrft_lightning", "deepspeed", "bitsandbytes"):
        return  # made for rows
    numbers = torch.Generator().manual_seed(0)
    start, *gradients = (torch.randn(4, 6, generator=numbers) for _ in range(3))
    try:
        whole = _stepped(optimizer, [start], [[g] for g in gradients])
    except Exception as err:  # of one that needs more than parameters and gradients
        log.info("%s could not be tried on two rows of numbers: %s", type(optimizer).__name__, err)
        return
    reason: Exception | None = None
    try:
        rows = _stepped(optimizer, _rows(start), [_rows(g) for g in gradients])
        if torch.allclose(whole[0].flatten(), torch.cat(rows), rtol=1e-4, atol=1e-6):
            return
    except Exception as err:  # such as Muon's, which steps nothing else than matrices
        reason = err
    raise ValueError(
        f"{type(optimizer).__name__} looks at the shape of parameters, and DeepSpeed gives it rows of elements of "
        "several: it would make other steps. Take AdamW or SGD, or lightrft_fake"
    ) from reason


def _rows(tensor: Tensor) -> list[Tensor]:
    return list(tensor.flatten().split(10))


def _stepped(optimizer: Optimizer, values: list[Tensor], gradients: list[list[Tensor]]) -> list[Tensor]:
    """What becomes of values under an optimizer of the same kind and settings."""
    twin: Any = object.__new__(type(optimizer))
    vars(twin).update({key: copy.copy(value) for key, value in vars(optimizer).items() if key != "step"})
    parameters = [nn.Parameter(value.clone()) for value in values]
    group = {key: value for key, value in optimizer.param_groups[0].items() if key not in ("params", "lr")}
    rate = optimizer.param_groups[0].get("lr") or 1e-2  # a schedule may begin with 0
    twin.state, twin.param_groups = defaultdict(dict), [{**group, "params": parameters, "lr": rate}]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for step in gradients:
            for parameter, gradient in zip(parameters, step, strict=True):
                parameter.grad = gradient.clone()
            type(optimizer).step(twin)
    return [parameter.detach() for parameter in parameters]

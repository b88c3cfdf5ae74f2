"""Which tensors an engine's model consists of: whatever else is sent would end some engines, or be lost in them."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from lightrft_lightning._errors import unknown_name
from lightrft_lightning.models.export import on_meta
from lightrft_lightning.models.file_names import as_in_files

log = logging.getLogger(__name__)


class ExpectedTensors:
    """Names and shapes of all weights of a model.

    Args:
        model: a Hugging Face or PEFT model, whatever state its own parameters are in.
        in_files: as they are in files, see `models.file_names`.

    Raises:
        ValueError: the class cannot be built from the config that the model has.
    """

    def __init__(self, model: Any, in_files: bool) -> None:
        made = on_meta(model)
        named = made.named_parameters()
        self._needed = {name: tuple(p.shape) for name, p in (as_in_files(made, named) if in_files else named)}
        self._others = {name: tuple(value.shape) for name, value in made.state_dict().items()}  # tied names, buffers
        self._same = {name: parameter for name, parameter in made.named_parameters(remove_duplicate=False)}

    def checked(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """The tensors as they come.

        Raises:
            ValueError: one has another name, shape or kind of numbers than the engine's model; or, at the end, some are
                missing.
        """
        seen: set[str] = set()
        for name, tensor in tensors:
            shape = self._needed.get(name, self._others.get(name))
            if shape is None:
                raise ValueError(f"update_weights: {unknown_name('tensor', name, self._needed)}")
            if tuple(tensor.shape) != shape:
                raise ValueError(
                    f"update_weights: {name!r} has the shape {list(tensor.shape)}, in the engine's model it has "
                    f"{list(shape)}: send the model that the engine was started for, or start an engine for this one"
                )
            if name in self._needed and not tensor.is_floating_point():
                raise ValueError(f"update_weights: {name!r} is of {tensor.dtype}: weights are floating-point numbers")
            seen.add(name)
            yield name, tensor
        if missing := self._missing(seen):
            raise ValueError(
                f"update_weights: {len(missing)} tensors of the engine's model are missing: {missing[0]!r}"
            )

    def _missing(self, seen: Collection[str]) -> list[str]:
        given = {self._same[name] for name in seen if name in self._same}  # under any of their names
        return [name for name in self._needed if name not in seen and self._same.get(name) not in given]


def expected_tensors(model: Any, in_files: bool) -> ExpectedTensors | None:
    """What `model` consists of; None, and a line in the log, if that cannot be told."""
    try:
        with torch.no_grad():
            return ExpectedTensors(model, in_files)
    except Exception as err:  # whatever a model of a user's own raises
        log.info("names and shapes of weights are not checked before they are sent: %s", err)
        return None

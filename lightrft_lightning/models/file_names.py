"""Names and shapes that a model's tensors have in files, where Transformers has others in memory.

A mixture of experts is one tensor for all experts in memory and one tensor an expert in files, and some names differ.
Loaders other than Transformers' own, those of engines, know the files.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor

from lightrft_lightning._errors import import_extra
from lightrft_lightning.models.export import on_meta, unsharded_class


def as_in_files(model: Any, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """The tensors as ``save_pretrained`` would write them, a layer of the model at a time.

    Args:
        model: a Hugging Face or PEFT model.
        tensors: whole, by the names that they have in memory without PEFT; each may be overwritten afterwards.
    """
    revert = import_extra("transformers.core_model_loading", "hf").revert_weight_conversion
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    known = _known_by_class(base)
    if not _differs(known):
        yield from tensors
        return
    layer: dict[str, Tensor] = {}
    for name, tensor in tensors:
        if layer and _layer(name) != _layer(next(iter(layer))):
            yield from revert(known, layer).items()
            layer = {}
        layer[name] = tensor.detach().clone()
    yield from revert(known, layer).items()


def _layer(name: str) -> str:
    """What is before the first number in a name, and that."""
    found = re.match(r".*?\.\d+(?=\.)", name)
    return found[0] if found else name.rpartition(".")[0]


def _known_by_class(base: Any) -> Any:
    """`base`, or a model like it, of the class that Transformers' table has an entry for."""
    if unsharded_class(base) is type(base):
        return base
    made = on_meta(base)
    if (from_files := getattr(base, "_weight_conversions", None)) is not None:
        made._weight_conversions = from_files
    return made


def _differs(model: Any) -> bool:
    if (from_files := getattr(model, "_weight_conversions", None)) is not None:
        return bool(from_files)
    table = import_extra("transformers.conversion_mapping", "hf")
    return bool(table.get_model_conversion_mapping(model, add_legacy=False))

"""What a model's ``config.json`` may not say: it comes from others, and is read before anything else of a model."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

MOST_LAYERS = 10_000
"""A layer is an object in memory, with weights or without; the deepest models have hundreds."""
_LAYERS = re.compile(r"(^|_)n(um)?_.*layers?$|^n_?layers?$|(encoder|decoder)_layers$|^depths?$|^block_count$")


def check_config_file(folder: Path) -> None:
    """As `check_config`, for the ``config.json`` of a folder, and that its ``generation_config.json`` can be read.

    Raises:
        ValueError: also if one is no JSON. Transformers would take its own values for the second then.
    """
    file = folder / "config.json"
    check_config(_read(file), str(file))
    if (file := folder / "generation_config.json").is_file():
        _read(file)


def _read(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as err:
        raise ValueError(f"{file} is no JSON: {err}") from err
    if not isinstance(values, dict):
        raise ValueError(f"{file} is no config: it holds a {type(values).__name__}")
    return values


def check_config(values: Mapping[str, Any], where: str) -> None:
    """Refuse settings that would fetch and run a kernel, or build layers until there is no memory.

    Args:
        values: as in ``config.json``.
        where: they come from, for the message.

    Raises:
        ValueError: the message names the setting.
    """
    for name, value in _settings(values):
        if name.endswith("_implementation") and isinstance(value, str) and not value.replace("|", "").isidentifier():
            raise ValueError(
                f"{where}: {name}={value!r} would fetch a kernel from the hub and run it: take it out, or load the "
                "model yourself and pass the object"
            )
        if isinstance(value, int | float) and _LAYERS.search(name) and value > MOST_LAYERS:
            raise ValueError(f"{where}: {name}={value!r} is more than the {MOST_LAYERS} layers that are built")


def _settings(values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if not isinstance(value, Mapping):
            yield str(name), value
        elif str(name).endswith("_implementation"):  # one for each part of a model
            yield from ((str(name), of_part) for of_part in value.values())
        else:
            yield from _settings(value)

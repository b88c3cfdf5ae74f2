"""Messages shared by the whole package: the nearest valid name, the type of a value, the extra that an import needs."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import logging
import numbers
import sys
import types
from collections.abc import Callable, Iterable, Mapping
from types import ModuleType
from typing import Any, Union, get_args, get_origin, get_type_hints


def unknown_name(kind: str, name: object, valid: Iterable[str]) -> str:
    """The message for a name that does not exist: quotes it, suggests the nearest one and lists the rest.

    >>> unknown_name("strategy", "lightrft_fke", ["lightrft_fake"])
    "unknown strategy 'lightrft_fke'. Did you mean 'lightrft_fake'? Valid: 'lightrft_fake'"
    """
    names = sorted(valid)
    close = difflib.get_close_matches(str(name), names, n=1, cutoff=0.5)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return f"unknown {kind} {name!r}.{hint} Valid: {', '.join(map(repr, names)) or '(none)'}"


_PLAIN: dict[Any, tuple[Any, str]] = {
    bool: (bool, "True or False"),
    int: (numbers.Integral, "a whole number"),
    float: (numbers.Real, "a number"),
    str: (str, "a string"),
    type(None): (type(None), "None"),
}


def check_types(owner: str, annotated: Callable[..., Any], values: Mapping[str, Any]) -> None:
    """Compare values with what is annotated as bool, int, float, str or None; other annotations are left alone.

    Args:
        owner: of the arguments, for the message.
        annotated: a function or a dataclass.
        values: by the names of its arguments, and any others.

    Raises:
        TypeError: the message names argument, value and type.
    """
    for name, hint in get_type_hints(annotated).items():
        kinds = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
        if name not in values or not all(kind in _PLAIN for kind in kinds):
            continue
        if not any(_is_a(values[name], kind) for kind in kinds):
            wanted = " or ".join(_PLAIN[kind][1] for kind in kinds)
            raise TypeError(f"{owner}({name}={values[name]!r}): must be {wanted}")


def _is_a(value: Any, kind: Any) -> bool:
    # True counts as a number in Python.
    return isinstance(value, _PLAIN[kind][0]) and not (kind in (int, float) and isinstance(value, bool))


def import_extra(module: str, extra: str) -> ModuleType:
    """Import an optional dependency; if it is missing, name the extra that brings it.

    Raises:
        ImportError: with the `pip install` line that fixes it.
    """
    try:
        if module.partition(".")[0] in ("bitsandbytes", "peft"):  # which imports the other
            _import_bitsandbytes()
        return importlib.import_module(module)
    except ModuleNotFoundError as err:
        if err.name is None or err.name.split(".")[0] != module.split(".")[0]:
            raise
        raise ImportError(
            f"this needs the package {module.split('.')[0]!r}, which is not installed. "
            f'Install it with: pip install "lightrft-lightning[{extra}]"'
        ) from err


def _import_bitsandbytes() -> None:
    """Import it, if it is installed, as if `kernels` were not: it would load code from a hub with it, and run that."""
    if "bitsandbytes" in sys.modules or importlib.util.find_spec("bitsandbytes") is None:
        return
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    kernels, level = sys.modules.get("kernels"), logger.level
    sys.modules["kernels"] = None  # type: ignore[assignment]
    logger.setLevel(logging.ERROR)  # it warns of what it has not found
    try:
        importlib.import_module("bitsandbytes")
    finally:
        logger.setLevel(level)
        del sys.modules["kernels"]
        if kernels is not None:
            sys.modules["kernels"] = kernels

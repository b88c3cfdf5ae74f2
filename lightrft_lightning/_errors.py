"""Messages shared by the whole package: the nearest valid name, and the extra that a missing import needs."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable
from types import ModuleType


def unknown_name(kind: str, name: object, valid: Iterable[str]) -> str:
    """The message for a name that does not exist: quotes it, suggests the nearest one and lists the rest.

    >>> unknown_name("strategy", "lightrft_fke", ["lightrft_fake"])
    "unknown strategy 'lightrft_fke'. Did you mean 'lightrft_fake'? Valid: 'lightrft_fake'"
    """
    names = sorted(valid)
    close = difflib.get_close_matches(str(name), names, n=1, cutoff=0.5)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return f"unknown {kind} {name!r}.{hint} Valid: {', '.join(map(repr, names)) or '(none)'}"


def import_extra(module: str, extra: str) -> ModuleType:
    """Import an optional dependency; if it is missing, name the extra that brings it.

    Raises:
        ImportError: with the `pip install` line that fixes it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as err:
        if err.name is None or err.name.split(".")[0] != module.split(".")[0]:
            raise
        raise ImportError(
            f"this needs the package {module.split('.')[0]!r}, which is not installed. "
            f'Install it with: pip install "lightrft-lightning[{extra}]"'
        ) from err

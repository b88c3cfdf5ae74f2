"""Check the options of a registered function by its signature, before it runs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from lightrft_lightning._errors import unknown_name


def check_options(kind: str, name: str, function: Callable[..., Any], options: Mapping[str, Any]) -> None:
    """Refuse an option that `function` does not take: its options are its keyword-only parameters.

    Raises:
        ValueError: quotes the option and names the nearest one that exists.
    """
    parameters = inspect.signature(function).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return
    valid = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    for option in options:
        if option not in valid:
            raise ValueError(unknown_name(f"option of the {kind} {name!r}", option, valid))

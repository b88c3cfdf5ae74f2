"""Code that a model folder or a hub repository brings along: it is never run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any


class CodeRefusedError(ValueError):
    """A model, its config or its tokenizer can only be loaded by code of its own."""


@contextlib.contextmanager
def code_refused(found: Any) -> Iterator[None]:
    """Inside, Transformers' refusal to run a folder's own code becomes one line.

    Every ``from_pretrained`` and ``from_config`` of this package says ``trust_remote_code=False``. Without it
    Transformers asks on standard input, and a ``y`` there runs the code.

    Args:
        found: the folder or hub id, for the message.

    Raises:
        CodeRefusedError: that is needed.
    """
    try:
        yield
    except ValueError as err:
        if "trust_remote_code" not in str(err):
            raise
        raise CodeRefusedError(
            f"{str(found)!r} needs code that it brings along (`auto_map` in its JSON files), which is never run here: "
            "read that code, load model and tokenizer yourself with trust_remote_code=True, and pass the objects"
        ) from err

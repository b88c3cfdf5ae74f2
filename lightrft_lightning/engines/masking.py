"""Keys that must not be read where others can look: logs, messages and files that are kept."""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

MASK = "***"
SHORT = 8
"""Characters; a shorter key may be a part of common words, so it is masked only where it stands alone."""


class Mask:
    """Puts `MASK` in the place of a key, also where it is quoted as Python, JSON or a URL would.

    Args:
        key: printable ASCII.
    """

    def __init__(self, key: str) -> None:
        quoted = {key, repr(key)[1:-1], json.dumps(key)[1:-1], quote(key), quote(key, safe="")}
        twice = {json.dumps(form)[1:-1] for form in quoted} | {repr(form)[1:-1] for form in quoted}
        forms = sorted(quoted | twice, key=len, reverse=True)
        self.longest = len(forms[0])
        pattern = "|".join(map(re.escape, forms))
        self._pattern = re.compile(f"(?<![A-Za-z0-9])(?:{pattern})(?![A-Za-z0-9])" if len(key) < SHORT else pattern)

    def __call__(self, text: str) -> str:
        return self._pattern.sub(MASK, text)

    def pieces(self, chunks: Iterator[bytes]) -> Iterator[str]:
        """Masked text of lines that may come in pieces, of which none ends within a key.

        Bytes that are no UTF-8 are kept as surrogates.
        """
        rest = ""
        for chunk in chunks:
            text = self(rest + chunk.decode(errors="surrogateescape"))
            keep = 0 if text.endswith("\n") else min(self.longest, len(text))
            rest = text[len(text) - keep :]
            if text := text[: len(text) - keep]:
                yield text
        if rest:
            yield rest


def open_private(path: str | Path, flags: int) -> int:
    """A file's descriptor; others cannot read the file, also if they could before.

    Args:
        path: of the file, made if there is none.
        flags: as of `os.open`.

    Raises:
        OSError: as `os.open`.
    """
    descriptor = os.open(path, flags | os.O_CREAT, 0o600)
    about = os.fstat(descriptor)
    if stat.S_ISREG(about.st_mode) and about.st_mode & 0o077 and about.st_uid == os.geteuid():
        os.fchmod(descriptor, 0o600)  # what is no file, e.g. a terminal, stays as it is
    return descriptor

"""Imports Lightning as where transformers is not installed.

Otherwise torchmetrics, which Lightning imports, imports it: half of the time of a short job.
"""

from __future__ import annotations

import importlib.metadata
from unittest import mock

_installed = importlib.metadata.version


def _version(package: str) -> str:
    if package == "transformers":
        raise importlib.metadata.PackageNotFoundError(package)
    return _installed(package)


with mock.patch.object(importlib.metadata, "version", _version):
    import lightning.pytorch  # noqa: F401

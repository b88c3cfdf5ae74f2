"""A folder that is read while other processes may replace it."""

from __future__ import annotations

import os
import sys
import time
import weakref
from pathlib import Path

from lightrft_lightning.checkpoints import owners
from lightrft_lightning.checkpoints.folder import MANIFEST

_TRIES = 50


class Held:
    """The folder that is called `folder` now, whatever is called so later, until this object is gone.

    Its files are not removed meanwhile, as far as the file system has locks. Outside of Linux a folder cannot be read
    under another name than its own; there `is_replaced` tells afterwards.

    Args:
        folder: a checkpoint.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        for _ in range(_TRIES):
            self._handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            owners.share(self._handle)
            self.path = Path(f"/proc/self/fd/{self._handle}") if sys.platform == "linux" else folder
            """How to read it."""
            if (self.path / MANIFEST).exists() or not self.is_replaced():
                break
            os.close(self._handle)  # it was being removed
            time.sleep(0.01)
        else:
            raise FileNotFoundError(f"{folder} was removed while it was being opened")
        weakref.finalize(self, os.close, self._handle)

    def is_replaced(self) -> bool:
        """Whether the folder's name is now that of another one, or of none."""
        try:
            now = os.stat(self._folder)
        except FileNotFoundError:
            return True
        here = os.fstat(self._handle)
        return (now.st_dev, now.st_ino) != (here.st_dev, here.st_ino)

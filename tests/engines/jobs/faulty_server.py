"""`lightrft serve`, whose loading of weights fails as often as a file says.

Arguments: the file, then those of `lightrft`.
"""

from __future__ import annotations

import sys
from pathlib import Path

from lightrft_lightning import cli
from lightrft_lightning.engines._hosted import TransformersCopy

FAILURES = Path(sys.argv[1])
load = TransformersCopy._load


def load_or_fail(self, bucket):
    left = int(FAILURES.read_text())
    if left:
        FAILURES.write_text(str(left - 1))
        raise RuntimeError("out of memory, says the test")
    load(self, bucket)


TransformersCopy._load = load_or_fail

if __name__ == "__main__":
    sys.exit(cli.main(sys.argv[2:]))

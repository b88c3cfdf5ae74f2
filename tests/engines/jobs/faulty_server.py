"""`lightrft serve`, whose loading of weights fails as often as a file says.

While there is a file ``hold`` beside it, generation stops after the first group, so that a test can be sure that the
rest is missing.

Arguments: the file, then those of `lightrft`.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from lightrft_lightning import cli
from lightrft_lightning.engines._hosted import TransformersCopy

FAILURES = Path(sys.argv[1])
HOLD = FAILURES.with_name("hold")
load, stream = TransformersCopy._load, TransformersCopy.stream


def load_or_fail(self, bucket):
    left = int(FAILURES.read_text())
    if left:
        FAILURES.write_text(str(left - 1))
        raise RuntimeError("out of memory, says the test")
    load(self, bucket)


def stream_or_wait(self, *args, **kwargs):
    for group in stream(self, *args, **kwargs):
        yield group
        while HOLD.exists():
            time.sleep(0.01)


TransformersCopy._load, TransformersCopy.stream = load_or_fail, stream_or_wait

if __name__ == "__main__":
    sys.exit(cli.main(sys.argv[2:]))

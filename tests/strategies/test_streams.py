from __future__ import annotations

import subprocess
import sys

import pytest

from lightrft_lightning.strategies import streams

# The module alone, which needs no torch; what it guards is what everything prints to.
PROGRAM = f"""
import importlib.util, logging, sys
spec = importlib.util.spec_from_file_location("streams", {streams.__file__!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
logging.basicConfig(stream=sys.stderr)
module.keep_printing()
module.keep_printing()
for line in range(3000):
    print("a line of some length", line)
    print("another one", file=sys.__stderr__)
    logging.warning("and one of a logger")
    sys.stdout.flush()
open(sys.argv[1], "w").write("done")
sys.exit(int(sys.argv[2]))
"""


@pytest.mark.parametrize(
    ("redirected", "told"),
    [
        ("| head -c 10 >&2", b"<stdout> cannot be written to ([Errno 32] Broken pipe): the run goes on without it"),
        (">/dev/full", b"<stdout> cannot be written to ([Errno 28] No space left on device): the run goes on"),
        ("2>/dev/full", b"<stderr> cannot be written to ([Errno 28] No space left on device): the run goes on"),
        (">/dev/full 2>/dev/full", b""),
        (">&- 2>&-", b""),
    ],
)
def test_an_output_that_ends_or_fills_up_leaves_the_exit_code_as_it_is(tmp_path, redirected, told):
    command = f'set -o pipefail; "$0" -c "$1" "$2" 7 {redirected}'
    shell = subprocess.run(
        ["bash", "-c", command, sys.executable, PROGRAM, str(tmp_path / "done")], capture_output=True, timeout=60
    )
    assert shell.returncode == 7 and (tmp_path / "done").read_text() == "done"
    assert (shell.stdout + shell.stderr).count(b"cannot be written") == bool(told)
    assert told in shell.stdout + shell.stderr and b"Exception ignored" not in shell.stderr

"""The helper process of the reward `math_verify`: reads JSON lines from its input, writes the verdicts to its output.

Run as a script by `functions.math_verify`; it imports nothing of this package, so it starts without torch.

It is a process because sympy may never come back from what a policy writes: evaluating ``9^{9^{9^9}}`` happens in one
call that holds the interpreter lock, so neither a thread nor a Python signal handler could end it. The default action
of SIGALRM can: the kernel ends the process.
"""

import json
import logging
import resource
import signal
import sys

from math_verify import parse, verify

MEMORY_LIMIT = 4 << 30


def main() -> None:
    """Answer requests ``[gold, text, seconds]`` with ``true`` or ``false`` until the input ends."""
    logging.disable(logging.WARNING)  # its remark that time limits are off
    if sys.platform == "linux":
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    for line in sys.stdin:
        gold, text, seconds = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, seconds)
        verdict = verify(
            parse(f"${gold}$", parsing_timeout=None), parse(text, parsing_timeout=None), timeout_seconds=None
        )
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(json.dumps(bool(verdict)), flush=True)


if __name__ == "__main__":
    main()

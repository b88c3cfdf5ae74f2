"""SGLang's server, which ends with the trainer that started it: ``python _sglang_server.py arguments.json``.

A script, so that this package is not imported into SGLang's process. The key comes in the environment, and what the
options are goes into `sys.argv` only here: everybody can see a command's arguments.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import json
import os
import re
import runpy
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROUNDS = 20
"""How often processes are looked for that have to end, 0.05 s apart."""
LONGEST = 90
"""Characters of a folder with sockets in it, whose whole name has 107 at most."""
NUMBER = re.compile(r"-\d+|-\d*\.\d+")
"""What a parser takes for a value although it begins with ``-``."""


def _end_with_parent() -> None:
    """Standard input is a pipe that only the trainer holds open.

    Nothing in SGLang is worth the five seconds that it takes to end in order: its processes are killed, and then the
    leader, which is this one, ends. The tracker of their semaphores is left to clean up after them.
    """
    while os.read(sys.stdin.fileno(), 4096):
        pass
    for _ in range(ROUNDS):  # those that are being started in the meantime
        for file in files_in_memory(os.getpgrp()):  # first: SGLang may end the leader as soon as another one ends
            Path(file).unlink(missing_ok=True)
        others = [pid for pid in _processes(os.getpgrp()) if pid != os.getpid() and not _tracks(pid)]
        for pid in others:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if not others:
            break
        time.sleep(0.05)
    os._exit(0)


def _processes(group: int) -> list[int]:
    """Those of the group that have not ended; the trainer made it for SGLang alone."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, of_group = path.read_text().rpartition(")")[2].split()[:3]
            if int(of_group) == group and state not in "ZX":
                found.append(int(path.parent.name))
    return found


def _tracks(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return b"resource_tracker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    return False


def files_in_memory(group: int) -> set[str]:
    """By which processes of SGLang tell each other how much they have to do; it leaves them behind."""
    found = set()
    for pid in _processes(group):
        with contextlib.suppress(OSError):
            found.update(re.findall(r"/dev/shm/sglang_loads_\S+", Path(f"/proc/{pid}/maps").read_text()))
    return found


def options(arguments: Mapping[str, Any], parser: argparse.ArgumentParser) -> list[str]:
    """The command line that gives exactly these arguments, whatever characters their values begin with.

    Args:
        arguments: by the names of the parser's options, with ``_`` or ``-``; None leaves one out.
        parser: SGLang's.

    Raises:
        ValueError: an unknown name (no abbreviation is taken), two for the same option, or a value that no command line
            can give.
    """
    actions = [action for action in parser._actions if action.option_strings and action.dest != "help"]
    known = {_plain(option): action for action in actions for option in action.option_strings}
    known |= {action.dest: action for action in actions}
    found: dict[int, str] = {}
    line: list[str] = []
    for given, value in arguments.items():
        action = known.get(_plain(given))
        if action is None:
            close = difflib.get_close_matches(_plain(given), known, 1)
            hint = f", did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"engine_args: SGLang's server has no argument {given!r}{hint}")
        if (other := found.setdefault(id(action), given)) != given:
            raise ValueError(f"engine_args: {other!r} and {given!r} are the same argument of SGLang's server")
        if value is not None:
            line += _option(action, given, value)
    return line


def _plain(option: str) -> str:
    return option.lstrip("-").replace("-", "_")


def _option(action: argparse.Action, name: str, value: Any) -> Sequence[str]:
    option = next(o for o in action.option_strings if o.startswith("--") and not o.startswith("--no-"))
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise ValueError(f"engine_args[{name!r}]={value!r}: must be true or false")
        negative = [o for o in action.option_strings if o.startswith("--no-")]
        return [option] if value else negative[:1]
    if isinstance(value, list) and action.nargs in ("+", "*") and len(value) != 1:
        items = [_text(item) for item in value]
        for item in items:
            if item.startswith("-") and not NUMBER.fullmatch(item):
                raise ValueError(f"engine_args[{name!r}]={value!r}: SGLang takes {item!r} for an option in a list")
        return [option, *items]
    if isinstance(value, list) and action.nargs in ("+", "*"):
        (value,) = value
    return [f"{option}={_text(value)}"]


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return json.dumps(value) if isinstance(value, list | dict) else str(value)


def _leave_sockets_in(folder: Path) -> None:
    """SGLang never removes the sockets between its processes; there they go with what the trainer gave it."""
    if len(str(folder)) < LONGEST:
        folder.mkdir(mode=0o700, exist_ok=True)
        tempfile.tempdir = str(folder)


def main(path: str) -> None:
    """Run the server with the arguments of a JSON file."""
    _leave_sockets_in(Path(path).with_name("tmp"))
    from sglang.srt.server_args import ServerArgs

    parser = argparse.ArgumentParser(prog="sglang serve")
    ServerArgs.add_cli_args(parser)
    arguments = {**json.loads(Path(path).read_text()), "api_key": os.environ.pop("LIGHTRFT_KEY")}
    try:
        sys.argv[1:] = options(arguments, parser)
    except ValueError as err:
        sys.exit(f"error: {err}")
    runpy.run_module("sglang.launch_server", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    sys.path.pop(0)  # the script's folder, where another sglang.py is
    threading.Thread(target=_end_with_parent, daemon=True).start()
    main(sys.argv[1])

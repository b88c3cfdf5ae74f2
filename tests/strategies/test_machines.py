from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

JOB = Path(__file__).parent / "jobs" / "machines.py"
HEARTBEAT = 5
"""The setting in `JOB`."""
UNSHARE = ["unshare", "--user", "--map-root-user", "--net", "--pid", "--fork", "--mount-proc", "--kill-child"]
CABLE = "ip link add cable0 type veth peer name cable1"

GONE = r"has not answered for 5 s: its machine or the network to it is gone; last seen in machines\.py"
STOPPED = r"died without an error of its own: stopped for too long, or .* no sign of life for [56] s; last seen in mach"
SAID = {"network gone": (GONE, GONE), "stop 1": (STOPPED, r""), "stop 0": (r"", STOPPED), "long call": (r"", r"")}
CODES = {"network gone": [1, 1], "stop 1": [1, -9], "stop 0": [-9, 1], "long call": [0, 0]}


def no_namespaces() -> str:
    """Why there cannot be two machines; "": there can."""
    if shutil.which("unshare") is None or shutil.which("ip") is None:
        return "no unshare(1) or no ip(8) on this machine"
    tried = subprocess.run([*UNSHARE, "sh", "-c", CABLE], capture_output=True, text=True, timeout=20)
    return tried.stderr.strip()


def test_machines_that_go_away_end_a_job_within_the_setting_and_long_computations_do_not(tmp_path):
    if problem := no_namespaces():
        pytest.skip(problem)
    job = subprocess.run(
        [*UNSHARE, sys.executable, str(JOB), str(tmp_path), "0"], capture_output=True, text=True, timeout=200
    )
    assert job.returncode == 0, job.stderr
    ranks = json.loads(job.stdout)
    for name in SAID:
        case = [rank for rank in ranks if rank["case"] == name]
        assert [rank["code"] for rank in case] == CODES[name], case
        failed_at = max(float(at) for rank in case for at in re.findall(r"failing ([\d.]+)", rank["stdout"]))
        for rank, said in zip(case, SAID[name], strict=True):
            assert re.search(said, rank["stderr"]), rank["stderr"]
            assert rank["at"] - failed_at < 3 * HEARTBEAT, rank
    (stopped,) = (rank for rank in ranks if (rank["case"], rank["rank"]) == ("stop 1", 1))
    assert re.search(r"\[rank 1: .*, pid \d+\] has been stopped for 5 s: killed", stopped["stderr"])

"""`make bench`: that it knows every result, that it runs, and what it says of the last run."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"


def load(name):
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", FOLDER / f"{name}.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # where dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


def test_every_result_and_every_script_is_part_of_it():
    benchmarks = load("all").BENCHMARKS
    assert {p.stem for p in (FOLDER / "results").glob("*.json")} <= set(benchmarks)
    scripts = {command[0] for command, _ in benchmarks.values()}
    assert scripts == {p.name for p in FOLDER.glob("*.py")} - {"all.py", "_common.py"}


def test_it_runs_and_keeps_nothing_of_a_smoke_run():
    before = {p: p.stat().st_mtime_ns for p in (FOLDER / "results").iterdir()}
    command = [sys.executable, FOLDER / "all.py", "--smoke", "--only", "packing", "one_step_off", "families"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("exit code 0") == 3 and "| generation / training | staleness |" in done.stdout
    assert {p: p.stat().st_mtime_ns for p in (FOLDER / "results").iterdir()} == before


def test_every_family_of_the_page_is_right_or_refused():
    rows = json.loads((FOLDER / "results" / "families.json").read_text())["rows"]
    page = (FOLDER.parent / "docs" / "models.md").read_text()
    assert len(rows) >= 65 and page.count("\n| ") == len(rows) + 2
    for row in rows:
        told = " ".join(map(str, row.values()))
        assert f"| {row['family']} | " in page and "OFF" not in told and "FAILED" not in told
        assert row["why"] or "refused" not in told


def test_a_benchmark_that_fails_is_named_at_the_end(monkeypatch):
    bench = load("all")
    monkeypatch.setattr(bench, "BENCHMARKS", {"lost": (["nowhere.py"], [])})
    monkeypatch.setattr(sys, "argv", ["all.py"])
    with pytest.raises(SystemExit, match="failed: lost"):
        bench.main()


def test_what_has_changed_since_the_last_run_is_told(tmp_path, capsys):
    common, out = load("_common"), tmp_path / "x.json"
    common.report("x", [{"engine": "a", "seconds": 2.0}, {"engine": "b", "seconds": 1.0}], {"n": (1, 2)}, out)
    assert "against" not in capsys.readouterr().out
    common.report("x", [{"engine": "a", "seconds": 3.0}, {"engine": "c", "seconds": 1.0}], {"n": (1, 2)}, out)
    told = capsys.readouterr().out
    assert "the same settings" in told and "- a: seconds 2 -> 3 (+50%)" in told
    assert "b:" not in told and "c:" not in told
    assert [row["engine"] for row in json.loads(out.read_text())["rows"]] == ["a", "c"]
    common.report("x", [{"engine": "d", "seconds": 3.0}], {"n": 3}, out)
    assert "OTHER SETTINGS" in (told := capsys.readouterr().out) and "no row of it is here again" in told


def test_a_picture_goes_beside_the_numbers(tmp_path):
    common, rows = load("_common"), [{"engine": "a", "s": 2.0, "t": 1.0}, {"engine": "b", "s": 0.5, "t": 3.0}]
    path = common.report("x", rows, {}, tmp_path / "x.json", common.Bars(["engine"], ["s", "t"], "seconds"))
    common.draw_curves({"a": [[0.1, 0.2], [0.3, 0.2]]}, tmp_path / "curves" / "x.png", "reward")
    for picture in (path.with_suffix(".png"), tmp_path / "curves" / "x.png"):
        assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 5000
    with pytest.raises(KeyError, match="missing"):
        common.Bars(["engine"], ["missing"], "seconds").draw(rows, tmp_path / "y.png")


def test_the_spread_is_told_from_the_median():
    assert load("_common").spread([1.0, 2.0, 3.0]) == "-50% +50%"

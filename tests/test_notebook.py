"""The notebook runs from top to bottom, and the outputs that are committed are its own."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[1] / "examples" / "quickstart.ipynb"


def text_of(notebook):
    """Everything that the cells print, without colours."""
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    texts = [output.get("text") or output.get("data", {}).get("text/plain", "") for output in outputs]
    return re.sub(r"\x1b\[[0-9;]*m", "", "".join(texts))


def rewards(text):
    return [float(value) for value in re.search(r"Done: validation reward (\S+) -> (\S+),", text).groups()]


def test_runs_and_learns(tmp_path):
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=200, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()
    before, after = rewards(text_of(notebook))
    assert before < 0.3 and after > 0.8
    assert (tmp_path / "runs" / "quickstart" / "model" / "model.safetensors").exists()


def test_is_committed_with_its_outputs():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    before, after = rewards(text_of(notebook))
    assert before < 0.3 and after > 0.8
    assert any("image/png" in output.get("data", {}) for cell in code for output in cell.outputs)
    assert NOTEBOOK.stat().st_size < 200_000
    assert not re.search(r"(/home|/root|/tmp|site-packages)/", text_of(notebook))

"""The notebook docs/tutorial/subscribe.ipynb runs from beginning to end."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest

NOTEBOOK = Path(__file__).resolve().parents[2] / "docs" / "tutorial" / "subscribe.ipynb"


@pytest.mark.system
def test_the_notebook_runs(tmp_path: Path) -> None:
    # In a process of its own: warnings of Jupyter's are not ours to turn into errors.
    executed = tmp_path / "executed.ipynb"
    command = [
        sys.executable,
        "-m",
        "jupyter",
        "execute",
        "--timeout=60",
        f"--output={executed}",
        str(NOTEBOOK),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=150, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    notebook: Any = nbformat.read(executed, as_version=4)
    printed = [
        "".join(o.get("text", "") + o.get("data", {}).get("text/plain", "") for o in cell.outputs)
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]
    assert any("peaks, Cu" in text for text in printed)
    assert any("match_rate" in text for text in printed)
    assert any(" 0 lost, gaps: []" in text for text in printed)


def test_it_is_kept_without_the_traces_of_a_run() -> None:
    notebook: Any = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        assert cell.metadata == {}
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None

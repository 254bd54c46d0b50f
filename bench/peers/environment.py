"""The environment in which LaueTools runs: .peers/venv, never the project's own."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
LAUETOOLS = "lauetools==3.2.19"


def ensure(folder: Path) -> Path:
    """Create the environment where it is missing or made for other versions; return its Python.

    Raises
    ------
    RuntimeError
        If a step fails: what was run, and the last line of what it said.
    """
    requirements = HERE / "requirements.txt"
    stamp = folder / "installed"
    wanted = hashlib.sha256(requirements.read_bytes() + f"{LAUETOOLS} {sys.version}".encode()).hexdigest()
    python = folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == wanted:
        return python
    print(f"creating {folder} with {LAUETOOLS} (a minute or two)", flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    _run([sys.executable, "-m", "venv", str(folder)])
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    _run([*pip, "-r", str(requirements)])
    _run([*pip, "--no-deps", LAUETOOLS])
    stamp.write_text(wanted, encoding="utf-8")
    return python


def _run(command: list[str]) -> None:
    answer = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    if answer.returncode:
        said = [line for line in answer.stderr.splitlines() if line.strip()] or ["(it said nothing)"]
        raise RuntimeError(f"`{' '.join(command)}` failed: {said[-1]}")

"""Where third-party frames and micrographs lie."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

from bench.report import ROOT


def laue_dir() -> Path | None:
    """Return the folder of the Laue frames: in $GRAINWATCH_DATA, ../shared/data or .data (`make data`)."""
    return _part("laue")


def micrographs_dir() -> Path | None:
    """Return the folder of the micrographs, looked for in the same places."""
    return _part("micrographs")


def _part(name: str) -> Path | None:
    configured = os.environ.get("GRAINWATCH_DATA")
    if configured:
        if not (Path(configured) / name).is_dir():
            raise FileNotFoundError(f"GRAINWATCH_DATA={configured} has no folder {name}")
        return Path(configured) / name
    for candidate in (ROOT.parent / "shared" / "data", ROOT / ".data"):
        if (candidate / name).is_dir():
            return candidate / name
    return None


def uncompressed(frame: Path, folder: Path) -> Path:
    """Return a copy of a .gz frame without the compression, for programs that do not read it."""
    folder.mkdir(parents=True, exist_ok=True)
    plain = folder / frame.stem
    plain.write_bytes(gzip.decompress(frame.read_bytes()))
    return plain

"""Where the third-party frames lie."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

from bench.report import ROOT


def laue_dir() -> Path | None:
    """Return the folder of the Laue frames: in $GRAINWATCH_DATA, ../shared/data or .data (`make data`)."""
    configured = os.environ.get("GRAINWATCH_DATA")
    if configured:
        if not (Path(configured) / "laue").is_dir():
            raise FileNotFoundError(f"GRAINWATCH_DATA={configured} has no folder laue")
        return Path(configured) / "laue"
    for candidate in (ROOT.parent / "shared" / "data", ROOT / ".data"):
        if (candidate / "laue").is_dir():
            return candidate / "laue"
    return None


def uncompressed(frame: Path, folder: Path) -> Path:
    """Return a copy of a .gz frame without the compression, for programs that do not read it."""
    folder.mkdir(parents=True, exist_ok=True)
    plain = folder / frame.stem
    plain.write_bytes(gzip.decompress(frame.read_bytes()))
    return plain

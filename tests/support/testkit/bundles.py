"""Bundles that somebody altered, with a manifest that fits all the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


def sign(folder: Path) -> None:
    """Write the manifest anew: what someone does who alters a bundle and its manifest alike."""
    names = sorted(p.name for p in folder.iterdir() if p.name != "manifest.sha256")
    lines = [f"{hashlib.sha256((folder / n).read_bytes()).hexdigest()}  {n}\n" for n in names]
    (folder / "manifest.sha256").write_text("".join(lines))


def redescribe(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change bundle.json and sign it."""
    description = json.loads((folder / "bundle.json").read_text())
    change(description)
    (folder / "bundle.json").write_text(json.dumps(description))
    sign(folder)

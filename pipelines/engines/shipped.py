"""The bundles that come with grainwatch: in a checkout, or beside an installation."""

from __future__ import annotations

import sys
from pathlib import Path

from pipelines.engines.bundle import DESCRIPTION, BundleError, load_bundle

_PLACES = (
    Path(__file__).resolve().parents[2] / "bundles",
    Path(sys.prefix) / "share" / "grainwatch" / "bundles",
)


def shipped_bundles(kind: str = "") -> dict[str, Path]:
    """Return the folders of the bundles, or of those of a kind, by name; empty where none are installed."""
    for place in _PLACES:
        found = {path.parent.name: path.parent for path in sorted(place.glob(f"*/{DESCRIPTION}"))}
        if found:
            break
    if not kind:
        return found
    return {name: path for name, path in found.items() if load_bundle(path).description.kind == kind}


def find_bundle(name: str) -> Path:
    """Return the folder that is meant: a bundle that lies there, else the shipped one of that name.

    Raises
    ------
    BundleError
        If there is neither.
    """
    folder, shipped = Path(name), shipped_bundles()
    if name in shipped and not (folder / DESCRIPTION).is_file():
        return shipped[name]
    if folder.is_dir():
        return folder
    known = ", ".join(shipped) or "none"
    raise BundleError(
        f"{name}: there is no such folder; bundles that come with grainwatch and need no folder: {known}"
    )

"""The bundles that come with grainwatch: in a checkout, or beside an installation."""

from __future__ import annotations

import sys
from pathlib import Path

from pipelines.engines.bundle import DESCRIPTION, BundleError

_PLACES = (
    Path(__file__).resolve().parents[2] / "bundles",
    Path(sys.prefix) / "share" / "grainwatch" / "bundles",
)


def shipped_bundles() -> dict[str, Path]:
    """Return the folders of the bundles by name; empty where none are installed."""
    for place in _PLACES:
        found = {path.parent.name: path.parent for path in sorted(place.glob(f"*/{DESCRIPTION}"))}
        if found:
            return found
    return {}


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

"""Whether a folder can be written, found out by writing."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path


def try_folder(folder: Path, *, keep: bool) -> None:
    """Make a folder if need be, and write a file into it, which is removed again.

    Permissions alone do not say it: an administrator has them all, and file systems refuse nevertheless.

    Parameters
    ----------
    folder : Path
    keep : bool
        False removes the folders that were made, too.

    Raises
    ------
    OSError
        If it cannot be made or written.
    """
    folder = folder.absolute()
    made = [place for place in (folder, *folder.parents) if not os.path.lexists(place)]
    probe = folder / f".grainwatch-{os.getpid()}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"")
        probe.unlink()
    finally:
        if not keep:
            for place in made:
                # What somebody else has put there meanwhile stays.
                with suppress(OSError):
                    place.rmdir()

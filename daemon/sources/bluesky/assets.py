"""Frames that lie in files: the resources of documents, opened when a frame of them is wanted.

Documents come while files are still written, on a share perhaps where they show up late. What is not
there is therefore `NotYet`: the caller tries again and gives up after a while.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt

from daemon.sources.bluesky.hdf5 import Hdf5Stack, NotYet, first_line, need_file
from daemon.sources.bluesky.paths import Places
from daemon.sources.fields import is_name, need, shown, text
from pipelines.files import open_images
from pipelines.frame import BadFrame, Image, PlainImage

HDF5_SPECS: Final = ("AD_HDF5", "AD_HDF5_SWMR")
TIFF_SPEC: Final = "AD_TIFF"
NPY_SPEC: Final = "NPY_SEQ"
_HDF5: Final = "application/x-hdf5"
_FOLDERS: Final = ("multipart/related;type=image/tiff", "multipart/related;type=application/x-npy")
_DATASET: Final = "/entry/data/data"
_MOST_PER_FILE: Final = 1_000_000
_LONGEST: Final = 4000

#: The number in the name of a file of a sequence: {:05d}, %05d, %6.6d.
_NUMBER: Final = re.compile(r"\{:?(?P<new>0?[0-9]{0,2})d?\}|%(?P<wide>0?[0-9]{0,2})(\.(?P<old>[0-9]{1,2}))?d")
_ABSOLUTE: Final = re.compile(r"[/\\]|[A-Za-z]:")


class Asset(Protocol):
    """Files with the frames of one resource."""

    def image(self, number: int) -> Image:
        """Return an image, counted from 0.

        Raises
        ------
        NotYet
            If it is not there (yet).
        BadFrame
            If it may not be read.
        """
        ...

    def close(self) -> None:
        """Let go of the files."""
        ...


class FileSequence:
    """Numbered files, each with the same number of images."""

    def __init__(self, places: Places, begin: str, template: str, per_file: int = 1) -> None:
        self._places = places
        self._begin = begin
        self._per_file = per_file
        found = list(_NUMBER.finditer(template))
        if len(found) != 1 or len(template) > 1000:
            raise BadFrame(f"template {shown(template)} has no number such as {{:05d}} or %05d")
        match = found[0]
        self._ends = template[: match.start()], template[match.end() :]
        wide = match["new"] or match["wide"] or ""
        self._fill, self._width = ("0" if wide.startswith("0") else " "), int(wide or 0)
        if match["old"]:
            self._fill, self._width = "0", int(match["old"])

    def image(self, number: int) -> Image:
        """Implements `Asset`."""
        file, within = divmod(number, self._per_file)
        digits = str(file).rjust(self._width, self._fill)
        path = self._places.of_path(self._begin + self._ends[0] + digits + self._ends[1])
        need_file(path)
        if path.suffix == ".npy":
            return PlainImage(_npy_image(path, within))
        try:
            found = next(open_images(path, first=within), None)
        except BadFrame as error:
            raise NotYet(str(error)) from error
        if found is None:
            raise NotYet(f"{path}: has no image {within}")
        return PlainImage(found.pixels)

    def close(self) -> None:
        """Implements `Asset`."""


def _npy_image(path: Path, number: int) -> npt.NDArray[Any]:
    try:
        pixels = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise NotYet(f"{path}: cannot be read: {first_line(error)}") from error
    if not isinstance(pixels, np.ndarray):  # an archive, whatever its name says
        pixels.close()
        raise BadFrame(f"{path}: is no npy file but an archive of several: not read")
    if pixels.ndim == 3 and number < len(pixels):
        pixels = pixels[number]
    if pixels.ndim != 2 or pixels.dtype.kind not in "uif":
        raise BadFrame(f"{path}: is not a grey image: {pixels.ndim} dimensions of {pixels.dtype}")
    return np.ascontiguousarray(pixels, dtype=pixels.dtype.newbyteorder("="))


def stream_asset(places: Places, document: Mapping[str, Any]) -> Asset:
    """Return the files of a stream_resource document.

    Raises
    ------
    BadFrame
        If they are of a kind that is not read, or may not be read.
    """
    kind = text(document, "mimetype", "stream_resource").replace(" ", "")
    uri = text_of_any_length(document, "uri", "stream_resource")
    parameters = mapping(document, "parameters", "stream_resource")
    if kind == _HDF5:
        dataset = parameters.get("dataset", parameters.get("path"))
        if isinstance(dataset, list | tuple):
            dataset = "/".join(map(str, dataset))
        if not is_name(dataset) or not dataset:
            raise BadFrame(f"stream_resource: parameters: dataset: expected a name, got {shown(dataset)}")
        return Hdf5Stack(places, places.of_uri(uri), dataset)
    if kind in _FOLDERS:
        chunk = parameters.get("chunk_shape")
        template = text(parameters, "template", "stream_resource: parameters")
        # The last part of the URI may be the beginning of the files' names.
        folder = str(places.of_uri(uri)) + ("/" if uri.endswith("/") else "")
        per_file = chunk[0] if isinstance(chunk, list | tuple) and chunk else 1
        return FileSequence(_local(places), folder, template, _per_file(per_file))
    raise BadFrame(f"stream_resource of type {shown(kind)}, expected {_HDF5} or {' or '.join(_FOLDERS)}")


def asset(places: Places, document: Mapping[str, Any]) -> tuple[Asset, int]:
    """Return the files of a resource document, and how many images each datum stands for.

    Raises
    ------
    BadFrame
        As `stream_asset`.
    """
    spec = text(document, "spec", "resource")
    kwargs = mapping(document, "resource_kwargs", "resource")
    path = text_of_any_length(document, "resource_path", "resource")
    root = document.get("root")
    if isinstance(root, str) and root and not _ABSOLUTE.match(path):
        path = root.rstrip("/\\") + "/" + path
    per_point = _per_file(kwargs.get("frame_per_point", 1))
    if spec in HDF5_SPECS:
        dataset = kwargs.get("dataset", _DATASET)
        if not is_name(dataset):
            raise BadFrame(f"resource: dataset: expected text, got {shown(dataset)}")
        return Hdf5Stack(places, places.of_path(path), dataset), per_point
    if spec == TIFF_SPEC:
        template = text(kwargs, "template", "resource: resource_kwargs").removeprefix("%s%s")
        name = text(kwargs, "filename", "resource: resource_kwargs")
        return FileSequence(places, f"{path.rstrip('/')}/{name}", template), per_point
    if spec == NPY_SPEC:
        return FileSequence(places, path, "_%d.npy"), 1
    raise BadFrame(
        f"resource of spec {shown(spec)}, expected {', '.join((*HDF5_SPECS, TIFF_SPEC, NPY_SPEC))}"
    )


def datum_number(document: Mapping[str, Any]) -> int:
    """Return which point of its resource a datum document stands for, from 0.

    Raises
    ------
    BadFrame
        If it does not say.
    """
    kwargs = mapping(document, "datum_kwargs", "datum")
    for key in ("point_number", "index"):
        if type(kwargs.get(key)) is int and kwargs[key] >= 0:
            return int(kwargs[key])
    need(kwargs, "point_number", "datum: datum_kwargs")
    raise BadFrame(f"datum: point_number: expected a whole number, got {shown(kwargs['point_number'])}")


def mapping(document: Mapping[str, Any], key: str, where: str) -> Mapping[str, Any]:
    """Return a map of a document.

    Raises
    ------
    BadFrame
        If it is missing or is none.
    """
    found = need(document, key, where)
    if not isinstance(found, Mapping):
        raise BadFrame(f"{where}: {key}: expected a map, got {shown(found)}")
    return found


def text_of_any_length(document: Mapping[str, Any], key: str, where: str) -> str:
    """Return a text of a document that may be longer than a name: a path.

    Raises
    ------
    BadFrame
        If it is missing or is none.
    """
    found = need(document, key, where)
    if not isinstance(found, str) or len(found) > _LONGEST:
        raise BadFrame(f"{where}: {key}: expected text of up to {_LONGEST} letters, got {shown(found)}")
    return found


def _per_file(value: Any) -> int:
    if type(value) is not int or not 1 <= value <= _MOST_PER_FILE:
        raise BadFrame(f"images per file: expected a whole number from 1, got {shown(value)}")
    return value


def _local(places: Places) -> Places:
    """Return the same limits for paths that are those of this machine already."""
    return Places(roots=places.roots)

"""Tags of the first page of a TIFF file, as raw bytes.

Vendors of electron microscopes keep their metadata in private tags, as text of their own making. What
reads pixels also interprets tags it knows, each in its way, and gives up on those it finds damaged; here
nothing is interpreted, and a damaged tag costs only itself. Formats: TIFF 6.0 (Adobe, 1992) and BigTIFF.
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

from pipelines.frame import BadFrame

IMAGE_WIDTH: Final = 256
IMAGE_LENGTH: Final = 257
IMAGE_DESCRIPTION: Final = 270
X_RESOLUTION: Final = 282
RESOLUTION_UNIT: Final = 296

#: Metadata of microscopes have some ten kilobytes; more is a damaged count.
MAX_TAG_BYTES: Final = 1 << 22
_MAX_TAGS: Final = 4096
_SIZES: Final = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8}
_INTEGERS: Final = {1: "B", 3: "H", 4: "I", 6: "b", 8: "h", 9: "i", 13: "I", 16: "Q"}
_RATIONALS: Final = {5: "II", 10: "ii"}
_MAGIC: Final = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


@dataclass(frozen=True, slots=True)
class Tag:
    """A tag as it stands in the file: its type, and its bytes in the file's order."""

    kind: int
    data: bytes


@dataclass(frozen=True, slots=True)
class TiffTags:
    """The tags of a page.

    Attributes
    ----------
    order : str
        "<" or ">".
    tags : mapping
        By code.
    damaged : tuple of int
        Codes of tags that point outside the file or are too large.
    """

    order: str
    tags: Mapping[int, Tag]
    damaged: tuple[int, ...] = ()

    def integer(self, code: int) -> int | None:
        """Return the first value of a tag of integers; None if there is none."""
        tag = self.tags.get(code)
        form = None if tag is None else _INTEGERS.get(tag.kind)
        if tag is None or form is None or len(tag.data) < struct.calcsize(form):
            return None
        return int(struct.unpack_from(self.order + form, tag.data)[0])

    def rational(self, code: int) -> float | None:
        """Return the first value of a tag of rationals; None if there is none, or its divisor is 0."""
        tag = self.tags.get(code)
        form = None if tag is None else _RATIONALS.get(tag.kind)
        if tag is None or form is None or len(tag.data) < 8:
            return None
        numerator, denominator = struct.unpack_from(self.order + form, tag.data)
        return float(numerator) / float(denominator) if denominator else None

    def content(self, code: int) -> bytes:
        """Return the bytes of a tag, b"" without it."""
        tag = self.tags.get(code)
        return b"" if tag is None else tag.data


def is_tiff(path: str | Path) -> bool:
    """Return whether a file begins as a TIFF file does.

    Raises
    ------
    OSError
        If it cannot be read.
    """
    with open(path, "rb") as opened:
        return opened.read(4) in _MAGIC


def read_tags(path: str | Path, codes: Collection[int]) -> TiffTags:
    """Read tags of the first page, those of the given codes.

    Raises
    ------
    BadFrame
        If the file is no TIFF file or ends before its first page is described; the message names it.
    OSError
        If it cannot be read.
    """
    with open(path, "rb") as opened:
        magic = opened.read(4)
        if magic not in _MAGIC:
            raise BadFrame(f"{path}: is no TIFF file, whatever its name says")
        order = "<" if magic[:2] == b"II" else ">"
        try:
            return _first_page(opened, order, codes, big=b"+" in magic)
        except (struct.error, OverflowError) as error:
            raise BadFrame(f"{path}: is a truncated TIFF file: its first page is not described") from error


def _first_page(opened: BinaryIO, order: str, codes: Collection[int], *, big: bool) -> TiffTags:
    word, count_form, size = ("Q", "Q", 20) if big else ("I", "H", 12)
    if big:
        opened.read(4)
    offset = _unpack(opened, order + word)
    opened.seek(0, 2)
    length = opened.tell()
    if offset >= length:
        raise struct.error
    opened.seek(offset)
    count = _unpack(opened, order + count_form)
    if not 0 < count <= _MAX_TAGS:
        raise struct.error
    entries = opened.read(size * count)
    if len(entries) < size * count:
        raise struct.error
    tags: dict[int, Tag] = {}
    damaged: list[int] = []
    inline = struct.calcsize(word)
    for code, kind, number, value in struct.iter_unpack(f"{order}HH{word}{inline}s", entries):
        if code not in codes:
            continue
        n_bytes = _SIZES.get(kind, 0) * number
        if n_bytes > MAX_TAG_BYTES:
            damaged.append(code)
            continue
        if n_bytes <= inline:
            tags.setdefault(code, Tag(kind, value[:n_bytes]))
            continue
        (where,) = struct.unpack(order + word, value)
        if where + n_bytes > length:
            damaged.append(code)
            continue
        opened.seek(where)
        tags.setdefault(code, Tag(kind, opened.read(n_bytes)))
    return TiffTags(order, tags, tuple(damaged))


def _unpack(opened: BinaryIO, form: str) -> int:
    return int(struct.unpack(form, opened.read(struct.calcsize(form)))[0])

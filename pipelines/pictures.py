"""Pictures as programs for people write them: PNG, JPEG, BMP, and TIFF files in colour.

Detectors do not write such files, and what reads theirs either refuses these or makes luminance of them
without saying so. Kinds are told by the first bytes, not by names.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from PIL import Image

from pipelines.frame import BadFrame
from pipelines.micrograph.tiff_tags import is_tiff, read_tags

_KINDS: Final[Mapping[bytes, str]] = {b"\x89PNG\r\n\x1a\n": "PNG", b"\xff\xd8\xff": "JPEG", b"BM": "BMP"}
_PHOTOMETRIC: Final = 262
_SAMPLES: Final = 277
#: Values of the tag: white or black is 0, and a mask's; all others are kinds of colour (TIFF 6.0, page 37).
_GREY: Final = frozenset({0, 1, 4})
#: Modes of Pillow that numpy takes as they are: one number a pixel.
_PLAIN: Final = frozenset({"1", "L", "I", "F", "I;16", "I;16B", "I;16L", "I;16N"})


def picture_kind(path: str) -> str:
    """Return "PNG", "JPEG", "BMP", "TIFF" for one in colour or with alpha; "" for all other files.

    Raises
    ------
    OSError
        If the file cannot be read.
    """
    with open(path, "rb") as opened:
        head = opened.read(8)
    for magic, kind in _KINDS.items():
        if head.startswith(magic):
            return kind
    return "TIFF" if is_tiff(path) and _is_colour(path) else ""


def read_pictures(path: str, kind: str, first: int = 0) -> Iterator[tuple[npt.NDArray[Any], int]]:
    """Yield the images of a file, and how many it has, from number `first` on.

    They are (rows, columns), or (rows, columns, 3) in colour; alpha is left out.

    Parameters
    ----------
    path : str
    kind : str
        What `picture_kind` says.
    first : int

    Raises
    ------
    Exception
        Whatever Pillow raises on a damaged file; it does not decode images of more than 178 megapixels.
    """
    with warnings.catch_warnings():
        # It warns at half of what it refuses. Images have limits of their own further on.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        opened = Image.open(path, formats=(kind,))
    with opened:
        count = getattr(opened, "n_frames", 1) if kind == "TIFF" else 1
        for number in range(first, count):
            opened.seek(number)
            yield _array(opened), count


def _is_colour(path: str) -> bool:
    try:
        tags = read_tags(path, {_PHOTOMETRIC, _SAMPLES})
    except BadFrame:
        return False  # damaged: what reads all other TIFF files says how
    photometric = tags.integer(_PHOTOMETRIC)
    return (photometric is not None and photometric not in _GREY) or (tags.integer(_SAMPLES) or 1) > 1


def _array(image: Image.Image) -> npt.NDArray[Any]:
    if image.mode in _PLAIN:
        return np.asarray(image)
    if image.mode in ("LA", "La") or (image.mode in ("P", "PA") and _has_grey_palette(image)):
        return np.asarray(image.convert("L"))
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


def _has_grey_palette(image: Image.Image) -> bool:
    colours = np.reshape(image.getpalette("RGB") or [0, 0, 1], (-1, 3))
    return bool(np.all(colours == colours[:, :1]))

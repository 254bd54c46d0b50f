"""A file that failed is named once, whatever its error begins with."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines.telling import failure, picture_path


@pytest.mark.parametrize(
    ("path", "why", "line"),
    [
        ("a.tif", "a.tif: cannot be read: No such file", "a.tif: failed: cannot be read: No such file"),
        ("a.tif", "a.tif#3: cannot be read", "a.tif#3: failed: cannot be read"),
        ("a.h5", "a.h5::/entry/data#3: is damaged", "a.h5::/entry/data#3: failed: is damaged"),
        ("a.h5::/x", "a.h5: has no dataset /x", "a.h5::/x: failed: a.h5: has no dataset /x"),
        ("a (1)+.tif", "a (1)+.tif: is: no image", "a (1)+.tif: failed: is: no image"),
        ("a.tif", "image of 3 x 4 pixels is too large", "a.tif: failed: image of 3 x 4 pixels is too large"),
        ("a.tif", "a.tiff: is another file", "a.tif: failed: a.tiff: is another file"),
        ("a.tif", "", "a.tif: failed: "),
    ],
)
def test_a_name_is_said_once(path: str, why: str, line: str) -> None:
    assert failure(path, why) == line


def test_only_pictures_of_several_have_numbers() -> None:
    assert picture_path(Path("of/found.png"), 1, only=True) == Path("of/found.png")
    assert picture_path(Path("of/found.png"), 12, only=False) == Path("of/found-0012.png")

"""Pictures of any kind become arrays, or are refused by name: never a crash, never another picture."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipelines.files import open_images
from pipelines.frame import BadFrame
from pipelines.micrograph.grey import to_grey

GREY = (np.arange(47 * 61) % 251).astype(np.uint8).reshape(47, 61)
COLOUR = np.dstack([GREY, GREY // 2, GREY // 3])
NAN = GREY.astype(np.float32)
NAN[3, 5] = np.nan

Save = Callable[[Path], object]


def _pillow(image: Image.Image, **options: object) -> Save:
    return lambda path: image.save(path, **options)


def _palette(colours: np.ndarray) -> Image.Image:
    indexed = Image.frombytes("P", GREY.shape[::-1], (GREY % 16).tobytes())
    indexed.putpalette(colours.astype(np.uint8).tobytes())
    return indexed


GREYS = np.repeat(np.arange(16) * 16, 3).reshape(16, 3)
HUES = np.column_stack([np.arange(16) * 16, np.arange(16)[::-1] * 16, np.full(16, 40)])


def _read(path: Path) -> np.ndarray:
    (image,) = open_images(path, colour=True)
    assert (image.label, image.metadata["file"], image.of_stack) == (str(path), str(path), False)
    return image.pixels


@pytest.mark.parametrize(
    ("name", "save", "expected"),
    [
        ("a.png", _pillow(Image.fromarray(GREY)), GREY),
        ("a.bmp", _pillow(Image.fromarray(GREY)), GREY),
        ("a16.png", _pillow(Image.fromarray(GREY * np.uint16(257))), GREY * np.uint16(257)),
        ("bits.png", _pillow(Image.fromarray(GREY > 99)), (GREY > 99).astype(np.uint8)),
        ("bits.bmp", _pillow(Image.fromarray(GREY > 99)), (GREY > 99).astype(np.uint8)),
        ("bits.tif", _pillow(Image.fromarray(GREY > 99)), (GREY > 99).astype(np.uint8)),
        ("nan.tif", _pillow(Image.fromarray(NAN)), NAN),
        ("one.tif", _pillow(Image.fromarray(GREY[:1, :1])), GREY[:1, :1]),
        ("a.tif.png", _pillow(Image.fromarray(COLOUR)), COLOUR),
        ("rgb.bmp", _pillow(Image.fromarray(COLOUR)), COLOUR),
        ("rgb.tif", _pillow(Image.fromarray(COLOUR)), COLOUR),
        ("packed.tif", _pillow(Image.fromarray(COLOUR), compression="tiff_lzw"), COLOUR),
        ("alpha.png", _pillow(Image.fromarray(np.dstack([COLOUR, GREY]))), COLOUR),
        ("alpha.tif", _pillow(Image.fromarray(np.dstack([COLOUR, GREY]))), COLOUR),
        ("la.png", _pillow(Image.fromarray(GREY).convert("LA")), GREY),
        ("hues.png", _pillow(_palette(HUES)), HUES[GREY % 16].astype(np.uint8)),
        ("hues.tif", _pillow(_palette(HUES)), HUES[GREY % 16].astype(np.uint8)),
        ("greys.png", _pillow(_palette(GREYS)), GREYS[GREY % 16, 0].astype(np.uint8)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_pixels_are_those_that_were_saved(
    tmp_path: Path, name: str, save: Save, expected: np.ndarray
) -> None:
    path = tmp_path / name
    save(path)
    pixels = _read(path)
    assert pixels.dtype == expected.dtype
    assert np.array_equal(pixels, expected, equal_nan=expected.dtype.kind == "f")
    if expected.ndim == 3:
        with pytest.raises(BadFrame, match=rf"{name}: is a colour image, expected a grey one"):
            list(open_images(path))
    else:
        assert np.array_equal(next(open_images(path)).pixels, pixels, equal_nan=pixels.dtype.kind == "f")


@pytest.mark.parametrize("layout", ["planar", "tiled", "sixteen", "pages"])
def test_other_programs_colours(tmp_path: Path, layout: str) -> None:
    tifffile = pytest.importorskip("tifffile", reason="tifffile is absent")
    path, rgb = tmp_path / "rgb.tif", {"photometric": "rgb"}
    if layout == "planar":
        tifffile.imwrite(path, np.moveaxis(COLOUR, 2, 0), planarconfig="separate", **rgb)
    elif layout == "tiled":
        tifffile.imwrite(path, COLOUR, tile=(16, 16), **rgb)
    elif layout == "sixteen":
        tifffile.imwrite(path, COLOUR * np.uint16(256), **rgb)
    else:
        tifffile.imwrite(path, np.stack([COLOUR, 255 - COLOUR]), **rgb)
    images = list(open_images(path, colour=True))
    assert np.array_equal(images[0].pixels, COLOUR)
    if layout == "pages":
        assert np.array_equal(images[1].pixels, 255 - COLOUR)
        assert [(i.index, i.of_stack, i.label) for i in images] == [(n, True, f"{path}#{n}") for n in (0, 1)]
        (second,) = open_images(path, first=1, colour=True)
        assert np.array_equal(second.pixels, 255 - COLOUR)


def test_jpeg_is_near_what_was_saved(tmp_path: Path) -> None:
    smooth = np.add.outer(np.arange(48), np.arange(64)).astype(np.uint8) * 2
    Image.fromarray(smooth).save(tmp_path / "g.jpg", quality=95)
    Image.fromarray(np.dstack([smooth] * 3)).save(tmp_path / "rgb.jpg", quality=95)
    assert np.abs(_read(tmp_path / "g.jpg").astype(int) - smooth).max() <= 4
    coloured = _read(tmp_path / "rgb.jpg")
    assert coloured.shape == (48, 64, 3)
    grey = to_grey(coloured)  # a grey one in a colour file is grey, as screens and exports have them
    assert grey.flags == ()
    assert np.abs(grey.image.astype(int) - smooth).max() <= 4


@pytest.mark.parametrize("pixels", [GREY, COLOUR], ids=["grey", "colour"])
def test_a_png_is_read_whatever_its_name(tmp_path: Path, pixels: np.ndarray) -> None:
    path = tmp_path / "really.tiff"
    Image.fromarray(pixels).save(path, format="PNG")
    assert np.array_equal(_read(path), pixels)


@settings(max_examples=60, deadline=None)
@given(kind=st.sampled_from(["png", "jpg", "bmp", "tif"]), colour=st.booleans(), data=st.data())
def test_damage_is_named(
    tmp_path_factory: pytest.TempPathFactory, kind: str, colour: bool, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("damaged") / f"x.{kind}"
    Image.fromarray(COLOUR if colour else GREY).save(path)
    whole = bytearray(path.read_bytes())
    if data.draw(st.booleans(), "cut"):
        del whole[data.draw(st.integers(0, len(whole) - 1), "to") :]
    else:
        at = data.draw(st.integers(0, min(len(whole), 200) - 1), "at")
        whole[at] = data.draw(st.integers(0, 255), "byte")
    path.write_bytes(whole)
    complaint = str(path)
    try:
        images = list(open_images(path, colour=True))
    except BadFrame as error:
        images, complaint = [], str(error)
    assert str(path) in complaint
    assert all(i.pixels.ndim == 2 or i.pixels.shape[2] == 3 for i in images)


def test_images_of_a_hundred_megapixels(tmp_path: Path) -> None:
    path = tmp_path / "large.png"
    Image.new("1", (10_000, 10_000), 1).save(path)
    pixels = _read(path)
    assert (pixels.shape, pixels.dtype) == ((10_000, 10_000), np.uint8)
    Image.new("1", (20_000, 10_000), 1).save(path)
    with pytest.raises(BadFrame, match=r"large\.png: cannot be read as an image: .*exceeds limit"):
        _read(path)

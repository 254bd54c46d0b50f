"""Frames come out of files as they went in; what cannot be read is named."""

from __future__ import annotations

import bz2
import gzip
import subprocess
import sys
from pathlib import Path
from typing import Any

import fabio.cbfimage
import fabio.edfimage
import fabio.tifimage
import h5py
import hdf5plugin
import numpy as np
import pytest
from PIL import Image

from grainwatch.push_files import natural_key
from pipelines.files import expand, hdf5_writer, open_images, read_images
from pipelines.frame import BadFrame

PIXELS = np.arange(600, dtype=np.uint16).reshape(20, 30)


def labels(path: Path | str) -> list[str]:
    return [label for label, _ in read_images(path)]


@pytest.mark.parametrize("pack", ["", ".gz", ".bz2"])
@pytest.mark.parametrize(
    ("suffix", "kind"),
    [("edf", fabio.edfimage.EdfImage), ("tif", fabio.tifimage.TifImage), ("cbf", fabio.cbfimage.CbfImage)],
)
def test_formats_plain_and_packed(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], suffix: str, kind: Any, pack: str
) -> None:
    plain = tmp_path / f"a.{suffix}"
    kind(data=PIXELS.astype(np.int32) if suffix == "cbf" else PIXELS).write(str(plain))
    path = plain
    if pack:
        path = tmp_path / f"b.{suffix}{pack}"
        path.write_bytes({".gz": gzip.compress, ".bz2": bz2.compress}[pack](plain.read_bytes()))
    ((label, pixels),) = read_images(path)
    assert label == str(path)
    assert (pixels == PIXELS).all()
    assert pixels.dtype.isnative
    assert capfd.readouterr() == ("", "")  # standard output belongs to the commands' results


@pytest.mark.truth
@pytest.mark.parametrize(
    ("name", "shape"), [("Ge_blanc_0000.mccd.gz", (2048, 2048)), ("nw1_0000.tif.gz", (2018, 2016))]
)
def test_real_frames(truth_dir: Path, name: str, shape: tuple[int, int]) -> None:
    ((_, pixels),) = read_images(truth_dir / name)
    assert pixels.shape == shape
    assert pixels.dtype == np.uint16
    assert pixels.max() > 10 * np.median(pixels)


def test_several_images_in_one_file(tmp_path: Path) -> None:
    image = fabio.edfimage.EdfImage(data=PIXELS)
    image.append_frame(data=PIXELS + 1)
    image.write(str(tmp_path / "two.edf"))
    first, second = open_images(tmp_path / "two.edf")
    assert (first.label.endswith("#0"), second.label.endswith("#1")) == (True, True)
    assert (second.pixels == PIXELS + 1).all()
    assert second.metadata["file"] == str(tmp_path / "two.edf")


def stack(n: int = 3) -> np.ndarray[Any, Any]:
    return np.stack([PIXELS + k for k in range(n)])


def test_hdf5_default_of_nexus(tmp_path: Path) -> None:
    path = tmp_path / "nexus.nxs"
    with h5py.File(path, "w") as file:
        file.attrs["default"] = "scan"
        file["a_first_stack"] = np.zeros((2, 4, 4))
        file.create_group("scan").attrs["default"] = "images"
        group = file.create_group("scan/images")
        group.attrs["signal"] = "counts"
        group.create_dataset("counts", data=stack(), chunks=(1, 20, 30), **hdf5plugin.Bitshuffle())
    read = list(read_images(path))
    assert [label for label, _ in read] == [f"{path}::/scan/images/counts#{k}" for k in range(3)]
    assert all((pixels == PIXELS + k).all() for k, (_, pixels) in enumerate(read))


def test_hdf5_numbered_data_of_a_detector(tmp_path: Path) -> None:
    for k in range(2):
        with h5py.File(tmp_path / f"run_data_{k + 1:06d}.h5", "w") as file:
            file["/entry/data/data"] = stack(2) + 10 * k
    master = tmp_path / "run_master.h5"
    with h5py.File(master, "w") as file:
        for k in range(2):
            link = h5py.ExternalLink(f"run_data_{k + 1:06d}.h5", "/entry/data/data")
            file[f"/entry/data/data_{k + 1:06d}"] = link
    assert [int(pixels[0, 0]) for _, pixels in read_images(master)] == [0, 1, 10, 11]
    (tmp_path / "run_data_000002.h5").unlink()
    with pytest.raises(BadFrame, match=r"run_master\.h5: links to 1 data files"):
        list(read_images(master))


def test_hdf5_by_name_and_by_search(tmp_path: Path) -> None:
    path = tmp_path / "any.h5"
    with h5py.File(path, "w") as file:
        file["flat"] = PIXELS
        file["text"] = "hello"
        file["deep/down/stack"] = stack().astype(">i4")
    assert len(labels(path)) == 3
    ((_, pixels),) = read_images(f"{path}::/flat")
    assert (pixels == PIXELS).all()
    assert next(iter(read_images(path)))[1].dtype == np.dtype("=i4")
    with pytest.raises(BadFrame, match="has no dataset nothing"):
        list(read_images(f"{path}::nothing"))
    with pytest.raises(BadFrame, match="text is not a stack"):
        list(read_images(f"{path}::text"))


def test_a_stack_that_breaks_off_gives_its_first_images(tmp_path: Path) -> None:
    path = tmp_path / "torn.h5"
    with h5py.File(path, "w") as file:
        data = file.create_dataset(
            "/entry/data/data", (3, 20, 30), np.uint16, chunks=(1, 20, 30), **hdf5plugin.LZ4()
        )
        data[0] = PIXELS
        data.id.write_direct_chunk((1, 0, 0), b"no such thing as lz4")
    images = read_images(path)
    assert (next(images)[1] == PIXELS).all()
    with pytest.raises(BadFrame, match=r"torn\.h5::/entry/data/data#1: cannot be read"):
        next(images)


WRITER = """
import sys, h5py, numpy as np
file = h5py.File(sys.argv[1], "w", libver="latest")
data = file.create_dataset("d", (0, 20, 30), "u2", maxshape=(None, 20, 30), chunks=(1, 20, 30))
file["x"] = [1.5, 2.5, 3.5]
file["name"] = "a sample"
for line in sys.stdin:
    exec(line)
    print(line, end="", flush=True)
"""


def test_hdf5_grows_in_swmr_mode(tmp_path: Path) -> None:
    """The writer is another process, as it is at a beamline."""
    path = tmp_path / "grows.h5"
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as writer:

        def does(line: str) -> None:
            assert writer.stdin is not None
            assert writer.stdout is not None
            writer.stdin.write(line + "\n")
            writer.stdin.flush()
            assert writer.stdout.readline() == line + "\n"

        def images(first: int = 0) -> list[tuple[int, int, dict[str, Any]]]:
            found = open_images(f"{path}::d", first=first, keys=("x", "name", "none"), growing=True)
            return [(i.index, int(i.pixels[0, 0]), dict(i.header)) for i in found]

        does("file.flush()")
        assert hdf5_writer(path) == "alone"
        with pytest.raises(BadFrame, match=r"grows\.h5"):
            images()
        does("file.swmr_mode = True")
        assert hdf5_writer(path) == "swmr"
        does("data.resize(3, 0); data[0] = 7; data[2] = 9; data.flush()")
        # Image 1 has room but no pixels: it would be read as zeros.
        assert images() == [(0, 7, {"x": 1.5, "name": "a sample", "none": None})]
        assert images(first=1) == []
        does("data[1] = 8; data.flush()")
        assert [(i, value) for i, value, _ in images(first=1)] == [(1, 8), (2, 9)]
        does("file.close()")
        assert hdf5_writer(path) == ""
        assert len(images()) == 3
        assert writer.stdin is not None
        writer.stdin.close()


def test_a_stack_is_told_from_one_image_and_read_from_any(tmp_path: Path) -> None:
    image = fabio.edfimage.EdfImage(data=PIXELS, header={"motor_x": "1.25"})
    image.write(str(tmp_path / "one.edf"))
    (only,) = open_images(tmp_path / "one.edf")
    assert (only.index, only.of_stack, only.header["motor_x"]) == (0, False, "1.25")
    assert hdf5_writer(tmp_path / "one.edf") == ""
    image.append_frame(data=PIXELS + 1)
    image.append_frame(data=PIXELS + 2)
    image.write(str(tmp_path / "three.edf"))
    last = list(open_images(tmp_path / "three.edf", first=1))
    assert [(i.index, i.of_stack, int(i.pixels[0, 0])) for i in last] == [(1, True, 1), (2, True, 2)]
    with h5py.File(tmp_path / "stack.h5", "w") as file:
        file["d"] = stack(1)
    assert [i.of_stack for i in open_images(tmp_path / "stack.h5")] == [True]


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    fabio.tifimage.TifImage(data=PIXELS).write(str(tmp_path / "sound.tif"))
    fabio.edfimage.EdfImage(data=PIXELS).write(str(tmp_path / "sound.edf"))
    tif, edf = (tmp_path / "sound.tif").read_bytes(), (tmp_path / "sound.edf").read_bytes()
    contents = {
        "short.tif": tif[: len(tif) // 2],
        "head.tif": tif[:60],
        "short.edf": edf[:-100],
        "short.tif.gz": gzip.compress(tif)[:-20],
        "not_packed.tif.gz": tif,
        "garbled.tif.gz": gzip.compress(tif)[:30] + b"garbled" * 20,
        "empty.tif": b"",
        "noise.cbf": bytes(range(256)),
        "text.txt": b"hello",
        "short.h5": b"\x89HDF\r\n\x1a\n" + b"0" * 50,
        "magic.npy": b"\x93NUMPY",
    }
    for name, data in contents.items():
        (tmp_path / name).write_bytes(data)
    np.save(tmp_path / "complex.npy", np.zeros((4, 4), complex))
    with h5py.File(tmp_path / "none.h5", "w") as file:
        file["spectrum"] = np.zeros(100)
    return tmp_path


@pytest.mark.parametrize(
    "name",
    [
        "short.tif",
        "head.tif",
        "short.edf",
        "short.tif.gz",
        "not_packed.tif.gz",
        "garbled.tif.gz",
        "empty.tif",
        "noise.cbf",
        "text.txt",
        "short.h5",
        "magic.npy",
        "complex.npy",
        "none.h5",
        "absent.tif",
    ],
)
def test_damaged_files_are_named(damaged: Path, name: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(BadFrame, match=name.replace(".", r"\.")):
        list(read_images(damaged / name))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("short.tif", "image file is truncated"),
        ("head.tif", "the file ends before its first page is described"),
        ("short.edf", "the file ends before its pixels do"),
        ("empty.tif", "the file is empty"),
        ("empty.png", "the file is empty"),
        ("text.txt", "its format is not known"),
        ("text.png", "its format is not known"),
        ("lzw.tif", "the file ends before its first page is described"),
        ("magic.tif", "the file ends before its first page is described"),
        ("short.png", "image file is truncated"),
    ],
)
def test_what_is_wrong_is_said_in_one_clause(damaged: Path, name: str, why: str) -> None:
    picture = Image.fromarray(PIXELS.astype(np.uint8))
    picture.save(damaged / "short.png")
    picture.save(damaged / "lzw.tif", compression="tiff_lzw")
    for made in (damaged / "short.png", damaged / "lzw.tif"):
        made.write_bytes(made.read_bytes()[: made.stat().st_size // 2])
    (damaged / "empty.png").touch()
    (damaged / "text.png").write_text("hello")
    (damaged / "magic.tif").write_bytes(b"II*\0")
    with pytest.raises(BadFrame) as refused:
        list(read_images(damaged / name))
    assert str(refused.value) == f"{damaged / name}: cannot be read as an image: {why}"


def test_natural_order_of_folders_and_patterns(tmp_path: Path) -> None:
    for name in ("img_10.tif", "img_9.tif", "img_100.tif", ".hidden", "other.edf"):
        (tmp_path / name).touch()
    in_order = [str(tmp_path / name) for name in ("img_9.tif", "img_10.tif", "img_100.tif")]
    assert expand([tmp_path / "img_*.tif"]) == in_order
    assert expand([tmp_path]) == [*in_order, str(tmp_path / "other.edf")]
    assert expand(["b.h5::/x", "a.h5"]) == ["b.h5::/x", "a.h5"]
    assert expand([f"{tmp_path}/img_?.tif::/x"]) == [f"{tmp_path}/img_9.tif::/x"]
    with pytest.raises(BadFrame, match=r"nothing\*: no file there"):
        expand([tmp_path / "nothing*"])


def test_natural_key_keeps_text_and_numbers_apart() -> None:
    names = ["b1", "a2", "a10", "2", "10", "a"]
    assert sorted(names, key=natural_key) == ["2", "10", "a", "a2", "a10", "b1"]


def test_names_that_differ_in_leading_zeros_have_an_order_of_their_own() -> None:
    # Otherwise the file system decides it, and another machine reads the same files in another order.
    names = ["a1.tif", "a001.tif", "a01.tif", "a2.tif", "1", "01", "1_1", "1_01"]
    in_order = ["01", "1", "1_01", "1_1", "a001.tif", "a01.tif", "a1.tif", "a2.tif"]
    for listed in (names, names[::-1]):
        assert sorted(listed, key=natural_key) == in_order

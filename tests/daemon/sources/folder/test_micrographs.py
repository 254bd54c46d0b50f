"""Micrographs in a folder: colour, mixed sizes, vendors' metadata, texts that come late or never."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from testkit.folders import FolderRun

from daemon.flow.transport import Task, frame_of, frame_task, pack, read_in_worker
from daemon.sources.folder.microscope import VENDORS, Microscope
from daemon.sources.folder.source import Config
from pipelines.frame import Frame
from pipelines.images import pack_image
from pipelines.micrograph.acquisition import Acquisition
from pipelines.micrograph.frame_acquisition import acquisition_of
from pipelines.micrograph.grey import to_grey

PICTURE = np.arange(96 * 128, dtype=np.uint8).reshape(96, 128)
FLOAT = PICTURE.astype(np.float32)
FLOAT[0, 0] = np.nan
HITACHI = Microscope("hitachi", pixel_size_um=0.0125)


def shoot(folder: Path, name: str, microscope: Microscope) -> None:
    for written, content in microscope.files(name, PICTURE):
        (folder / written).write_bytes(content)


def as_a_worker_sees(frame: Frame) -> Frame:
    header, data = pack_image(frame.image)
    task = Task("s", [frame_task(frame, header, 0, data.nbytes)])
    received = read_in_worker(pack(task))
    assert isinstance(received, Task)
    return frame_of(received.frames[0], memoryview(bytes(data)))


def acquisitions(run: FolderRun) -> dict[str, Acquisition]:
    frames = [as_a_worker_sees(taken.frame) for taken in run.taken]
    return {Path(f.metadata["file"]).name: acquisition_of(f) for f in frames}


def test_what_five_vendors_say_reaches_the_worker(data: Path, state: Path) -> None:
    for number, vendor in enumerate(VENDORS):
        shoot(data, f"a_{number}.tif", Microscope(vendor, pixel_size_um=0.1 * (number + 1)))
    with FolderRun(state, data, once=True).to_the_end() as run:
        found = acquisitions(run)
        assert run.totals == run.totals | {"done": 5, "failed": 0}
    for number, vendor in enumerate(VENDORS):
        acquisition = found[f"a_{number}.tif"]
        assert acquisition.pixel_size_um == pytest.approx(0.1 * (number + 1))
        assert (acquisition.flags, acquisition.detector) == ((), "SIM-SE")
        assert acquisition.data_bar_px == (None if vendor == "zeiss" else 7)
        assert acquisition.vendor.lower().startswith(vendor)


def test_pictures_of_all_kinds_in_one_series(data: Path, state: Path) -> None:
    pictures: dict[str, Any] = {
        "a_0.png": PICTURE,
        "a_1.jpg": np.dstack([PICTURE // 2] * 3),
        "a_2.bmp": PICTURE > 99,
        "a_3.tif": FLOAT,
        "a_4.tif": np.dstack([PICTURE, PICTURE // 2, PICTURE // 3])[:40],
        "a_5.tif": PICTURE[:1, :1],
    }
    for name, pixels in pictures.items():
        Image.fromarray(pixels).save(data / name)
    (data / "a_6.tiff").write_bytes((data / "a_0.png").read_bytes())
    (data / "a_7.tif").write_bytes((data / "a_4.tif").read_bytes()[:4000])
    (data / "a_8.tif").write_bytes(b"no image at all")
    with FolderRun(state, data, series="folder", mixed=True, once=True).to_the_end() as run:
        assert run.totals == run.totals | {"received": 9, "done": 7, "failed": 2}
        assert sorted(bad.frame for bad in run.bad if bad.frame is not None) == [7, 8]
        assert all("cannot be read as an image" in bad.reason for bad in run.bad)
        frames = {t.frame.key.frame: as_a_worker_sees(t.frame) for t in run.taken}
    for number, (name, pixels) in enumerate(pictures.items()):
        seen = frames[number].image.array()
        assert seen.shape == pixels.shape
        assert seen.shape == frames[number].image.shape
        if not name.endswith("jpg"):
            assert np.array_equal(seen, pixels, equal_nan=pixels.dtype.kind == "f")
        to_grey(seen)
    assert "not_as_named" in acquisition_of(frames[6]).flags


def test_without_mixed_a_picture_unlike_the_first_fails(data: Path, state: Path) -> None:
    Image.fromarray(PICTURE).save(data / "a_0.png")
    Image.fromarray(np.dstack([PICTURE] * 3)).save(data / "a_1.png")
    with FolderRun(state, data, once=True).to_the_end() as run:
        assert run.totals == run.totals | {"done": 1, "failed": 1}
        assert "image is 96 x 128 x 3 uint8, the series began with 96 x 128 uint8" in run.tracker.last_error


def test_a_mixed_series_goes_on_after_a_crash(data: Path, state: Path) -> None:
    Image.fromarray(PICTURE).save(data / "a_0.png")
    run = FolderRun(state, data, mixed=True, hold=True)
    run.until(lambda: run.taken)
    run.kill()
    Image.fromarray(PICTURE[:50]).save(data / "a_1.png")
    with FolderRun(state, data, mixed=True) as again:
        again.until(lambda: len(again.taken) == 2)
        assert again.totals == again.totals | {"done": 2, "failed": 0, "lost": 0}


def test_a_text_that_comes_late_is_waited_for(data: Path, state: Path) -> None:
    (image, picture), (text, content) = HITACHI.files("a_0.tif", PICTURE)
    with FolderRun(state, data, sidecar="{stem}.txt", patience_s=60.0) as run:
        (data / image).write_bytes(picture)
        run.until(lambda: "waits for a_0.txt" in run.source.problem)
        (data / text).touch()
        run.for_a_while(0.3)
        assert run.taken == []
        (data / text).write_bytes(content)
        run.until(lambda: run.taken)
        assert acquisitions(run)["a_0.tif"].pixel_size_um == pytest.approx(0.0125)
        run.until(lambda: run.source.problem == "")


def test_a_text_that_never_comes_is_given_up_by_name(data: Path, state: Path) -> None:
    shoot(data, "a_0.tif", HITACHI)
    (data / "a_0.txt").unlink()
    with FolderRun(state, data, sidecar="{stem}.txt", patience_s=0.5, once=True).to_the_end() as run:
        assert run.totals == run.totals | {"done": 1, "failed": 0}
        found = acquisitions(run)["a_0.tif"]
    assert found.flags == ("pixel_size_unknown",)
    assert "neither a_0.txt (Hitachi, JEOL) nor a_0-tif.hdr (Tescan) lies beside it" in found.remarks[0]


def test_texts_of_windows_are_no_images(data: Path, state: Path) -> None:
    for written, content in HITACHI.files("A_0.TIF", PICTURE):
        (data / written.replace(".txt", ".TXT")).write_bytes(content)
    (data / "desktop.ini").write_text("[.ShellClassInfo]")
    # Waited for as they are read: under either name.
    waiting = FolderRun(state, data, once=True, sidecar="{stem}.txt", patience_s=600.0)
    with waiting.to_the_end() as run:
        assert run.totals == run.totals | {"received": 1, "done": 1}
        assert acquisitions(run)["A_0.TIF"].pixel_size_um == pytest.approx(0.0125)


def test_metadata_need_not_be_read(data: Path, state: Path) -> None:
    shoot(data, "a_0.tif", Microscope())
    with FolderRun(state, data, once=True, acquisition=False).to_the_end() as run:
        assert "acquisition" not in run.taken[0].frame.metadata


def test_a_share_that_fails_for_a_text_does_not_cost_the_pixel_size(
    data: Path, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shoot(data, "a_0.tif", HITACHI)
    asked: list[str] = []
    is_file = Path.is_file

    def away_once(path: Path) -> bool:
        asked.append(path.name)
        if path.name == "a_0.txt" and asked.count("a_0.txt") == 1:
            raise OSError(5, os.strerror(5), str(path))
        return is_file(path)

    monkeypatch.setattr(Path, "is_file", away_once)
    with FolderRun(state, data, once=True).to_the_end() as run:
        assert asked.count("a_0.txt") == 2
        assert acquisitions(run)["a_0.tif"].pixel_size_um == pytest.approx(0.0125)


@pytest.mark.parametrize("pattern", ["note.txt", "../{stem}.txt", "sub/{name}"])
def test_a_sidecar_has_the_name_of_its_image(pattern: str) -> None:
    with pytest.raises(
        ValueError, match=r"sidecar: expected the name of a file with \{stem\} or \{name\} in it"
    ):
        Config(path="/data", sidecar=pattern)

"""Replay: files become one series, in order, at a rate; a broken file costs its own frame."""

from __future__ import annotations

import itertools
import time
from pathlib import Path
from typing import Any

import fabio.tifimage
import h5py
import numpy as np
import pytest
from PIL import Image

from daemon.sources.base import Arrival, Bad, Event, Exhausted, Idle, SeriesEnd, SeriesStart
from daemon.sources.folder.microscope import Microscope
from daemon.sources.replay import Config, open_source
from grainwatch.config import ConfigError, convert


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in (1, 2, 10):
        pixels = np.full((8, 9), number, np.uint16)
        fabio.tifimage.TifImage(data=pixels).write(str(tmp_path / f"img_{number}.tif"))
    (tmp_path / "img_3.tif").write_bytes((tmp_path / "img_1.tif").read_bytes()[:100])
    with h5py.File(tmp_path / "stack.h5", "w") as file:
        file["/entry/data/data"] = np.arange(2 * 4 * 5, dtype=np.uint32).reshape(2, 4, 5)
    return tmp_path


def replay(*files: Path | str, **config: Any) -> list[Event]:
    source = open_source(Config(files=tuple(map(str, files)), **config), "laue")
    events = list(itertools.takewhile(lambda e: not isinstance(e, Exhausted), source.events()))
    source.close()
    return [e for e in events if not isinstance(e, Idle)]


def test_files_in_order_and_a_broken_one_named(folder: Path) -> None:
    start, *frames, end = replay(folder / "img_*.tif", folder / "stack.h5")
    assert isinstance(start, SeriesStart)
    assert end == SeriesEnd(start.detector_series)
    assert [f.frame for f in frames if isinstance(f, Arrival | Bad)] == list(range(6))
    values = [int(f.image.array()[0, 0]) for f in frames if isinstance(f, Arrival)]
    assert values == [1, 2, 10, 0, 20]
    bad = frames[2]
    assert isinstance(bad, Bad)
    assert "img_3.tif: cannot be read as an image" in bad.reason
    last = frames[-1]
    assert isinstance(last, Arrival)
    assert last.image.shape == (4, 5)  # the change of size is for the daemon to judge
    assert last.metadata == {
        "file": str(folder / "stack.h5"),
        "file_frame": 1,
        "label": f"{folder / 'stack.h5'}::/entry/data/data#1",
    }


def test_numbers_go_on_when_it_repeats(folder: Path) -> None:
    _, *frames, _ = replay(folder / "img_1.tif", folder / "img_2.tif", repeat=3)
    assert [f.frame for f in frames if isinstance(f, Arrival)] == list(range(6))
    assert [int(f.image.array()[0, 0]) for f in frames if isinstance(f, Arrival)] == [1, 2] * 3


def test_each_run_is_a_series_of_its_own(folder: Path) -> None:
    first, second = (replay(folder / "img_1.tif")[0] for _ in range(2))
    assert isinstance(first, SeriesStart)
    assert isinstance(second, SeriesStart)
    assert first.detector_series != second.detector_series


def test_for_ever_until_closed(folder: Path) -> None:
    source = open_source(Config(files=(str(folder / "img_1.tif"),), repeat=0), "laue")
    events = source.events()
    frames = [e.frame for e in itertools.islice(events, 50) if isinstance(e, Arrival)]
    assert frames == list(range(49))
    source.close()
    assert len(list(events)) <= 1


def test_rate_and_idle(folder: Path) -> None:
    source = open_source(Config(files=(str(folder / "img_1.tif"),), repeat=3, rate_hz=1.0), "laue")
    arrived, idled = [], [0, 0, 0]
    for event in source.events():
        if isinstance(event, Arrival):
            arrived.append(time.monotonic())
        elif isinstance(event, Idle):
            idled[len(arrived) - 1] += 1
        if isinstance(event, Exhausted):
            break
    source.close()
    # What comes late, on a machine that is busy, does not delay the next.
    assert np.diff(arrived) == pytest.approx([1.0, 1.0], abs=0.5)
    assert arrived[2] - arrived[0] > 1.5
    # Something comes every 0.1 s, and not all the time.
    assert all(4 <= n <= 12 for n in idled[:2])


def test_after_the_end_it_idles_until_closed(folder: Path) -> None:
    source = open_source(Config(files=(str(folder / "img_1.tif"),)), "laue")
    events = source.events()
    assert [type(e) for e in itertools.islice(events, 6)] == [
        SeriesStart,
        Arrival,
        SeriesEnd,
        Exhausted,
        Idle,
        Idle,
    ]
    source.close()
    assert list(events) == []
    assert "replay of" in source.describe()


def test_no_file_is_a_configuration_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"streams\.laue\.source\.files: .*\*\.tif: no file there"):
        open_source(Config(files=(f"{tmp_path}/*.tif",)), "laue")


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"files": []}, "files: expected at least one"),
        ({"files": ["a"], "rate_hz": -1}, "rate_hz: expected 0"),
        ({"files": ["a"], "repeat": -1}, "repeat: expected 0"),
        ({"files": "a.tif"}, "files: expected a list .*, got a text in quotes"),
    ],
)
def test_configuration_errors_name_the_key(table: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        convert(table, Config, "config.toml: streams.laue.source")


def test_micrographs_say_how_they_were_taken_and_may_differ(tmp_path: Path) -> None:
    picture = np.arange(64 * 80, dtype=np.uint8).reshape(64, 80)
    for name, content in Microscope("hitachi", pixel_size_um=0.5).files("a.tif", picture):
        (tmp_path / name).write_bytes(content)
    Image.fromarray(np.dstack([picture] * 3)).save(tmp_path / "b.png")
    _, *frames, _ = replay(tmp_path / "a.tif", tmp_path / "b.png", mixed=True)
    first, second = (f for f in frames if isinstance(f, Arrival))
    assert (first.mixed, second.mixed, second.image.shape) == (True, True, (64, 80, 3))
    assert first.metadata["acquisition"]["statements"][0]["pixel_um"] == pytest.approx(0.5)
    assert "acquisition" not in second.metadata

"""What no sender should say: each costs a document, and never the stream."""

from __future__ import annotations

import os
from pathlib import Path

import msgpack
import numpy as np
import pytest

from daemon.flow.scan import GridWalk
from daemon.sources.base import Bad, SeriesStart
from daemon.sources.bluesky.assets import FileSequence
from daemon.sources.bluesky.documents import Documents, Rules
from daemon.sources.bluesky.framing import Document, decode_message
from daemon.sources.bluesky.hdf5 import Hdf5Stack, NotYet
from daemon.sources.bluesky.paths import Places
from daemon.sources.bluesky.scan import PlanWalk, plan_grid
from grainwatch.config import ScanTable
from pipelines.frame import BadFrame

DEEP = b"\x91" * 1015 + b"\x00"  # lists in lists, as deep as msgpack goes


def test_a_deeply_nested_value_is_refused() -> None:
    body = b"\x82" + b"".join(map(msgpack.packb, (b"complex", 1, b"data"))) + DEEP
    with pytest.raises(BadFrame, match="nested too deeply"):
        decode_message(b" start " + body)


def test_a_document_whose_use_goes_too_deep_is_refused() -> None:
    nested: list[object] = []
    for _ in range(5000):
        nested = [nested]
    dimensions = {"dimensions": [[["x"], "primary"]]}
    start = {"uid": "a", "plan_pattern": nested, "num_points": 3, "hints": dimensions}
    (bad,) = Documents(Rules()).take(Document("start", start), 0.0)
    assert isinstance(bad, Bad)
    assert "nested too deeply" in bad.reason


def test_a_page_of_countless_empty_rows_is_refused() -> None:
    page = {"seq_num": np.zeros((10**12, 0), np.uint8), "data": {}, "descriptor": "d"}
    (bad,) = Documents(Rules()).take(Document("event_page", page), 0.0)
    assert isinstance(bad, Bad)
    assert "rows, the limit is" in bad.reason


def test_an_event_of_too_many_images_fails_as_one() -> None:
    documents = Documents(Rules())
    documents.take(Document("start", {"uid": "a"}), 0.0)
    keys = {"camera": {"shape": [8, 8]}}
    described = {"uid": "d", "run_start": "a", "name": "primary", "data_keys": keys}
    documents.take(Document("descriptor", described), 0.0)
    stack = np.zeros((100_000, 1, 1), np.uint8)
    event = {"seq_num": 1, "descriptor": "d", "data": {"camera": stack}}
    start, bad = documents.take(Document("event", event), 0.0)
    assert isinstance(start, SeriesStart)
    assert isinstance(bad, Bad)
    assert bad.frame == 1
    assert "100000 images" in bad.reason


def test_coordinates_that_overflow_lie_outside_of_the_grid() -> None:
    start = {
        "num_points": 3,
        "shape": [3],
        "extents": [[0.0, 1.0]],
        "hints": {"dimensions": [[["x"], "primary"]]},
    }
    grid = plan_grid(start, "primary")
    assert grid is not None
    walk = PlanWalk(grid)
    assert walk.index(1, (0.0,)) == (0,)
    assert walk.index(2, (1.7e308,)) is None
    assert walk.index(3, (1.0,)) == (2,)
    by_table = GridWalk(ScanTable(shape=(3,), step_um=(0.5,), origin_um=(0.0,)), 0)
    assert by_table.index(0, (1.7e308,)) is None
    assert by_table.index(1, (0.5,)) == (1,)


def test_extents_that_overflow_are_none() -> None:
    dimensions = {"dimensions": [[["x"], "primary"]]}
    start = {"num_points": 3, "shape": [3], "extents": [[-1.7e308, 1.7e308]], "hints": dimensions}
    grid = plan_grid(start, "primary")
    assert grid is not None
    assert grid.extents == ()


def test_a_pipe_is_not_opened(tmp_path: Path) -> None:
    pipe = tmp_path / "a.h5"
    os.mkfifo(pipe)
    with pytest.raises(BadFrame, match="no regular file") as caught:
        Hdf5Stack(Places(), pipe, "/entry/data/data").image(0)
    assert not isinstance(caught.value, NotYet)


def test_an_archive_that_is_called_npy_is_refused(tmp_path: Path) -> None:
    with (tmp_path / "a_0.npy").open("wb") as file:
        np.savez(file, np.zeros((4, 4)))
    with pytest.raises(BadFrame, match="archive"):
        FileSequence(Places(), str(tmp_path / "a"), "_%d.npy").image(0)

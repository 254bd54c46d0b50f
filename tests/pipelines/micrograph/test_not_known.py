"""What is not known of a micrograph is said to be so, by whatever way it is read: never a number."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image
from typer.testing import CliRunner

from daemon.sinks.base import SeriesOpened, SinkContext
from daemon.sinks.results_file import Config as SinkConfig
from daemon.sinks.results_file import open_sink
from daemon.sinks.simulator import published
from grainwatch.cli import app
from grainwatch.messages import FrameKey, MicrographResult, decode, encode, to_builtins
from grainwatch.words import micrograph_words
from pipelines.frame import Frame, PlainImage, StreamContext
from pipelines.micrograph.compare import compare_micrographs
from pipelines.micrograph.pipeline import Config, build
from pipelines.results_files import ResultsFile, results_files

UID = "0123456789abcdef0123456789abcdef"
GREY = np.full((512, 512), 90, np.uint8)
STRIPES = np.repeat(np.where(np.arange(256) // 16 % 2, 200, 60).astype(np.uint8)[None], 256, axis=0)


def result(pixels: np.ndarray, **settings: object) -> MicrographResult:
    pipe = build(Config(**settings), StreamContext("sem"))
    (found,) = pipe.process([Frame(FrameKey("sem", UID, 0), PlainImage(pixels))])
    assert isinstance(found, MicrographResult)
    return found


def fingerprinted(pixels: np.ndarray, place: Path, suffix: str = "png", *options: str) -> tuple[dict, str]:
    Image.fromarray(pixels).save(place / f"image.{suffix}")
    out = place / "found.jsonl"
    done = CliRunner().invoke(
        app, ["fingerprint", str(place / f"image.{suffix}"), "--json", str(out), *options]
    )
    assert done.exit_code == 0, done.output
    return json.loads(out.read_text()), done.stderr


@pytest.mark.parametrize(
    "pixels",
    [GREY, np.zeros((200, 300), np.uint8), np.full((1, 1), 255, np.uint8)],
    ids=["grey", "black", "1x1"],
)
@pytest.mark.parametrize("phase", ["bright", "dark"])
def test_the_fraction_of_one_grey_is_null_and_unknown(pixels: np.ndarray, phase: str, tmp_path: Path) -> None:
    line, said = fingerprinted(pixels, tmp_path, "png", "--phase", phase)
    assert (line["fraction"], line["fraction_spread"], line["mean_free_path"]["value"]) == (None, None, None)
    assert f"{phase} unknown, free path unknown" in said
    assert "nan" not in said


def test_a_free_path_may_be_unknown_where_the_fraction_is_not(tmp_path: Path) -> None:
    line, said = fingerprinted(STRIPES, tmp_path)
    assert line["fraction"] == 0.5
    assert line["mean_free_path"]["value"] is None
    assert "bright 50.0 %, free path unknown" in said


def test_the_picture_says_it_and_colours_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    for phase in ("bright", "dark"):
        fingerprinted(GREY, tmp_path, "png", "--phase", phase, "--plot", str(tmp_path / "picture.png"))
        _, phases, greys = drawn.pop().axes
        assert phases.get_title() == f"{phase} phase (red): unknown, mean free path unknown"
        assert np.ptp(phases.images[0].get_array(), axis=2).max() == 0
        assert greys.get_title() == "one grey: no threshold"
    fingerprinted(STRIPES, tmp_path, "png", "--plot", str(tmp_path / "picture.png"))
    _, phases, greys = drawn.pop().axes
    assert phases.get_title() == "bright phase (red): 50.0 %, mean free path unknown"
    assert "threshold" in greys.get_title()


def test_messages_and_results_files_keep_it_unknown(tmp_path: Path) -> None:
    grey = result(GREY)
    again = decode(encode(grey))
    assert isinstance(again, MicrographResult)
    assert again.morphology is not None
    assert np.isnan([again.morphology.fraction, again.morphology.fraction_spread]).all()
    assert json.loads(msgspec.json.encode(to_builtins(grey)))["morphology"]["fraction"] is None
    assert micrograph_words(again.morphology, None) == ["bright unknown, free path unknown"]
    sink = open_sink(SinkConfig(folder=str(tmp_path)), SinkContext("beamline", tmp_path / "state"))
    sink.handle([SeriesOpened("sem", UID, 1e9, "1"), published(msgspec.structs.replace(grey, seq=1), "sem")])
    sink.close()
    with ResultsFile(*results_files(tmp_path)) as file:
        table = file.micrographs()
    assert np.isnan([table["fraction"][0], table["fraction_spread"][0], table["free_path_px"][0]]).all()
    assert table["mean"][0] == 90 / 255


def test_two_models_may_agree_that_there_is_no_fraction() -> None:
    grey, stripes = result(GREY), result(STRIPES)
    assert compare_micrographs(grey, grey).agree
    assert compare_micrographs(stripes, stripes).agree
    for live, other in ((grey, stripes), (stripes, grey)):
        compared = compare_micrographs(live, other)
        assert not compared.agree
        assert np.isfinite(list(compared.figures.values())).all()


@pytest.mark.parametrize(
    ("kind", "full_scale"), [("u1", 255.0), (">u2", 65535.0), ("f4", None), ("i4", None), ("u4", None)]
)
def test_brightness_says_what_it_is_a_share_of(kind: str, full_scale: float | None) -> None:
    pixels = STRIPES.astype(kind)
    found = result(pixels).statistics
    assert found is not None
    assert found.full_scale == full_scale
    assert found.mean == pytest.approx(130.0 / (full_scale or 1.0))
    assert found.std == pytest.approx(70.0 / (full_scale or 1.0))


def test_a_float_file_has_no_full_scale(tmp_path: Path) -> None:
    line, _ = fingerprinted(STRIPES.astype(np.float32), tmp_path, "tif")
    assert line["statistics"]["full_scale"] is None
    assert line["statistics"]["mean"] == pytest.approx(130.0)
    assert fingerprinted(STRIPES, tmp_path)[0]["statistics"]["full_scale"] == 255.0

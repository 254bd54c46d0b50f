"""``grainwatch fingerprint`` on files good and bad."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from grainwatch.cli import app
from grainwatch.config import ConfigError

pytest.importorskip("onnx", reason="onnx writes the networks")
from testkit.micrograph_bundle import SIMULATOR

KEYS = {
    "file", "shape_px", "data_bar_px", "pixel_size_um", "fingerprint", "phase", "fraction", "fraction_spread",
    "mean_free_path", "statistics", "posterior", "novelty", "neighbours", "model", "flags", "remarks",
}  # fmt: skip


@pytest.fixture
def files(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(3):
        Image.fromarray(SIMULATOR.sample(700 + number).image).save(folder / f"image_{number}.png")
    return folder


def run(*arguments: Any) -> Result:
    return CliRunner().invoke(app, ["fingerprint", *map(str, arguments)])


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_name_is_drawn_whatever_it_is(files: Path, tmp_path: Path) -> None:
    (files / "image_0.png").rename(files / "a$^$_{.png")
    (files / "image_1.png").rename(files / "\udcff$x.png")
    found = run(files, "--json", tmp_path / "found.jsonl", "--plot", tmp_path / "picture.png")
    assert found.exit_code == 0, found.output
    assert len(list(tmp_path.glob("picture-*.png"))) == 3


def test_each_image_is_a_line(files: Path, model_folder: Path, tmp_path: Path) -> None:
    out, plot = tmp_path / "found.jsonl", tmp_path / "picture.png"
    found = run(
        files, "--bundle", model_folder, "--json", out, "--plot", plot, "--pixel-size-um", 0.25, "--codes"
    )
    assert found.exit_code == 0, found.output
    said = lines(out)
    assert [Path(line["file"]).name for line in said] == ["image_0.png", "image_1.png", "image_2.png"]
    for line in said:
        assert set(line) == KEYS
        assert line["mean_free_path"]["unit"] == "um"
        assert line["mean_free_path"]["value"] == pytest.approx(
            0.25 * (line["mean_free_path"]["rows_px"] + line["mean_free_path"]["columns_px"]) / 2
        )
        first, further = line["fingerprint"]
        assert (len(first["vector"]), len(further["vector"])) == (4, 2)
        assert np.shape(first["codes"]) == (9, 8, 8)
        assert sum(line["posterior"]["probability"]) == pytest.approx(1.0)
        assert 0.0 < line["novelty"]["typicality"] <= 1.0
        assert line["model"]["name"] == "two-phase-trial"
        assert not {"pixel_size_unknown", "out_of_domain"} & set(line["flags"])
    assert [len(line["neighbours"]) for line in said] == [0, 1, 2]
    pictures = sorted(tmp_path.glob("picture-*.png"))
    assert [p.name for p in pictures] == ["picture-0001.png", "picture-0002.png", "picture-0003.png"]
    for picture in pictures:
        with Image.open(picture) as image:
            assert min(image.size) > 600
            assert len(np.unique(np.asarray(image.convert("L")))) > 50


def test_without_a_pixel_size_lengths_are_in_px(files: Path, tmp_path: Path) -> None:
    out = tmp_path / "found.jsonl"
    found = run(files / "image_0.png", "--json", out, "--phase", "dark", "--plot", tmp_path / "one.png")
    assert found.exit_code == 0
    (line,) = lines(out)
    assert "pixel_size_unknown" in line["flags"]
    assert (line["mean_free_path"]["unit"], line["pixel_size_um"]) == ("px", None)
    assert line["phase"] == "dark"
    assert line["model"]["name"] == "classical-morphology"
    assert (line["fingerprint"], line["posterior"], line["novelty"]) == ([], None, None)
    assert "says nothing of how it was taken" in found.stderr
    assert (tmp_path / "one.png").exists()


def test_a_bad_file_is_named_and_the_others_go_on(files: Path, tmp_path: Path) -> None:
    whole = (files / "image_0.png").read_bytes()
    (files / "image_0b.png").write_bytes(whole[: len(whole) // 2])
    Image.fromarray(np.full((40, 40), 9, np.uint8)).save(files / "image_0c.png")
    out = tmp_path / "found.jsonl"
    found = run(files, files / "absent.tif", "--json", out, "--plot", tmp_path / "p.png")
    assert found.exit_code == 1
    said = {Path(line["file"]).name: line for line in lines(out)}
    assert sorted(name for name, line in said.items() if "error" in line) == ["absent.tif", "image_0b.png"]
    assert "image_0b.png: failed: " in found.stderr
    assert "2 of 6 images failed" in found.stderr
    assert {"one_grey", "too_small"} <= set(said["image_0c.png"]["flags"])
    assert said["image_0c.png"]["mean_free_path"]["value"] is None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--bundle", "nowhere"], "fingerprint: --bundle: nowhere: there is no such folder"),
        (["--phase", "grey"], "--phase grey: expected bright or dark"),
        (["--pixel-size-um", "-1"], "--pixel-size-um: expected"),
        (["--max-patches", "0"], "--max-patches: expected 1 or more"),
        (["--plot", "a.jpg"], "expected a name that ends in .png"),
        (["--plot", "nowhere/a.png"], "nowhere is no folder"),
        (["--json", "nowhere/a.jsonl"], "--json nowhere/a.jsonl: No such file"),
    ],
)
def test_options_that_cannot_be_used_are_refused_before_the_work(
    files: Path, options: list[str], words: str
) -> None:
    found = run(files, *options)
    assert isinstance(found.exception, ConfigError)
    assert words in str(found.exception)

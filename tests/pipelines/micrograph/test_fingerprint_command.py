"""``grainwatch fingerprint`` on files good and bad."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import h5py
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
    assert f"{tmp_path}/one.png: picture of {files}/image_0.png\n" in found.stderr
    assert (tmp_path / "one.png").exists()


def test_a_bad_file_is_named_and_the_others_go_on(files: Path, tmp_path: Path) -> None:
    whole = (files / "image_0.png").read_bytes()
    (files / "image_0b.png").write_bytes(whole[: len(whole) // 2])
    Image.fromarray(np.full((40, 40), 9, np.uint8)).save(files / "image_0c.png")
    out = tmp_path / "found.jsonl"
    found = run(files, files / "absent.tif", "--json", out, "--plot", tmp_path / "p.png")
    assert found.exit_code == 1
    told = found.stderr.splitlines()
    assert f"{files}/absent.tif: failed: cannot be read: No such file or directory" in told
    # Each name once: the error begins with it, too.
    assert all(line.count(f"{files}/image_0b.png") == 1 for line in told if "image_0b.png" in line)
    # What failed leaves no hole among the pictures, and each is named beside its image.
    assert [line for line in told if ": picture of " in line] == [
        f"{tmp_path}/p-{number:04d}.png: picture of {files}/{name}.png"
        for number, name in enumerate(("image_0", "image_0c", "image_1", "image_2"), start=1)
    ]
    assert len(list(tmp_path.glob("p-*.png"))) == 4
    # That nothing says how they were taken is one line for all, and in the JSON of each.
    assert [line for line in told if "how they were taken" in line] == [
        "4 images: nothing says how they were taken, and neither NAME.txt (Hitachi, JEOL) nor NAME-png.hdr"
        " (Tescan; png as the image's suffix) lies beside them"
    ]
    assert "says nothing of how it was taken" not in found.stderr
    said = {Path(line["file"]).name: line for line in lines(out)}
    for name in ("image_0.png", "image_1.png"):
        assert f"{name}: says nothing of how it was taken" in said[name]["remarks"][0]
    assert sorted(name for name, line in said.items() if "error" in line) == ["absent.tif", "image_0b.png"]
    assert "image_0b.png: failed: " in found.stderr
    assert "2 of 6 images failed" in found.stderr
    assert {"one_grey", "too_small"} <= set(said["image_0c.png"]["flags"])
    assert said["image_0c.png"]["mean_free_path"]["value"] is None


def test_images_of_a_stack_have_pictures_with_numbers(files: Path, tmp_path: Path) -> None:
    stack, picture = tmp_path / "stack.h5", tmp_path / "p.png"
    with h5py.File(stack, "w") as file:
        file["entry/data/data"] = np.stack([np.asarray(Image.open(path)) for path in sorted(files.iterdir())])
    found = run(stack, "--json", tmp_path / "found.jsonl", "--plot", picture)
    assert found.exit_code == 0, found.output
    for number in range(3):
        assert f"p-{number + 1:04d}.png: picture of {stack}::/entry/data/data#{number}\n" in found.stderr
        assert (tmp_path / f"p-{number + 1:04d}.png").exists()
    assert not picture.exists()


def test_a_size_that_is_not_used_is_said(files: Path, tmp_path: Path) -> None:
    # The file's own description is trusted more than what is said of all.
    description = b"ImageJ=1.53\nunit=micron\n"
    with Image.open(files / "image_0.png") as image:
        image.save(files / "told.tif", tiffinfo={270: description.decode(), 282: 4.0, 283: 4.0})
    for asked, said in ((0.5, True), (0.2501, False)):
        out = tmp_path / "found.jsonl"
        found = run(files / "told.tif", files / "image_0.png", "--json", out, "--pixel-size-um", asked)
        assert found.exit_code == 0, found.output
        told, silent = lines(out)
        assert told["pixel_size_um"] == pytest.approx(0.25)
        assert (told["remarks"] == []) is not said
        assert (silent["pixel_size_um"], silent["remarks"]) == (asked, [])
        assert ("says that a pixel is 0.25 um wide; --pixel-size-um 0.5 is of" in found.stderr) is said


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

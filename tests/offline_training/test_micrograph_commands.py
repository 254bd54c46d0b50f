"""Commands of micrographs, from images to a bundle that draws: small networks, few steps, all of the way."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from grainwatch.config import ConfigError
from offline_training.commands import app
from offline_training.commands.common import INSTALL
from offline_training.commands.generate import app as generate_app
from offline_training.micrograph.images import load_images
from pipelines.engines.bundle import load_bundle
from pipelines.engines.choice import open_engine
from pipelines.micrograph.model_bundle import read_parts
from pipelines.micrograph.preparation import PreparationParameters
from pipelines.micrograph.synthetic import MicrographSimulator

NO_TORCH = "torch is absent: see docs/how-to/train-a-network.md"
VQ = ["--set", "codes=32", "--set", "width=16", "--set", "batch=8", "--steps", "30"]
PIXEL = ["--set", "width=8", "--set", "layers=3", "--set", "head=16", "--set", "batch=4", "--steps", "20"]
VAE = ["--set", "latent=8", "--set", "width=4", "--set", "batch=4", "--steps", "4"]
PNG = b"\x89PNG"


@pytest.fixture
def torch() -> None:
    for name in ("torch", "onnxscript"):
        pytest.importorskip(name, reason=NO_TORCH)


def _folder(place: Path, count: int = 60) -> list[str]:
    """Write synthetic images of 64 x 96 px and their labels; return the options that name them."""
    images = place / "images"
    images.mkdir()
    lines = ["file,group,ln_cooling_rate,class"]
    for number, sample in enumerate(MicrographSimulator(shape=(64, 96)).samples(0, count)):
        Image.fromarray(sample.image).save(images / f"{number}.png")
        rate = sample.condition.ln_cooling_rate
        lines.append(f"{number}.png,spot {number // 2},{rate},{'fast' if rate > 1.7 else 'slow'}")
    (place / "labels.csv").write_text("\n".join(lines) + "\n")
    return ["--images", str(images), "--labels", str(place / "labels.csv"), "--cores", "1"]


def _done(command: list[str], runner: object = app) -> str:
    result = CliRunner().invoke(runner, command, catch_exceptions=False)  # type: ignore[arg-type]
    assert result.exit_code == 0, result.output
    return result.output


def _refused(command: list[str], runner: object = app) -> str:
    result = CliRunner().invoke(runner, command)  # type: ignore[arg-type]
    assert isinstance(result.exception, ConfigError), result.output
    return str(result.exception)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bundles "codes", "codes-2" with a prior, "codes-3" with a VAE too, and what was printed."""
    for name in ("torch", "onnxscript"):
        pytest.importorskip(name, reason=NO_TORCH)
    place = tmp_path_factory.mktemp("bundles")
    # A posterior takes ten whole images to calibrate: half of the fifth that is held out.
    images = [*_folder(place, 120), "--label", "ln_cooling_rate"]
    one, two, three = (str(place / name) for name in ("codes", "codes-2", "codes-3"))
    printed = _done(["vqvae", *images, "--pixel-size-um", "0.25", "--patch-px", "32", "--out", one, *VQ])
    (place / "vqvae.txt").write_text(printed)
    more = ["--vqvae", one, "--out", two, "--drawn", "24", "--candidates", "3", *PIXEL]
    (place / "pixelcnn.txt").write_text(_done(["pixelcnn", *images, *more]))
    (place / "vae.txt").write_text(_done(["vae", *images, "--into", two, "--out", three, *VAE]))
    return place


def test_the_bundles_hold_what_they_say_and_each_part_passes_its_test(made: Path) -> None:
    for name, version, parts in (
        ("codes", "", ["", "decoder"]),
        ("codes-2", "+pixelcnn", ["", "decoder", "prior"]),
        ("codes-3", "+pixelcnn+vae", ["", "decoder", "prior", "vae"]),
    ):
        bundle = load_bundle(made / name, "micrograph-vqvae")
        assert bundle.description.name == name
        assert re.sub(r"^[\d.]+", "", bundle.description.version) == version
        assert [network.part for network in bundle.networks()] == parts
        for network in bundle.networks():
            open_engine(network)
        assert bundle.description.command.startswith("grainwatch train ")
    last = load_bundle(made / "codes-3")
    assert last.file("model.onnx") == load_bundle(made / "codes").file("model.onnx")
    told = last.description.training
    assert set(told["data"]["held_out"]).isdisjoint(told["data"]["trained_on"])
    assert told["prior"]["data"]["held_out"] == told["data"]["held_out"]
    found = read_parts(last)
    assert found.posterior is not None
    assert found.posterior.quantity == "ln_cooling_rate"
    assert len(found.posterior.candidates) == 3
    assert (found.posterior.sources, found.posterior.few_sources) == (6, True)
    # Pixel size is what was said for images that say nothing.
    assert found.domain.pixel_size_um == (0.25, 0.25)
    # Self-tests are made of images that nobody took.
    patches = np.load(io.BytesIO(last.file("selftest.npz")))["image"][:, 0].astype(np.uint8)
    for image in load_images(str(made / "images"), PreparationParameters(patch_px=32)).images:
        corners = np.lib.stride_tricks.sliding_window_view(image, (4, 4))
        assert not any(np.any(np.all(corners == patch[:4, :4], axis=(2, 3))) for patch in patches)


def test_figures_are_printed_beside_their_baselines_and_drawn(made: Path) -> None:
    codes, pixel, vae = ((made / f"{name}.txt").read_text() for name in ("vqvae", "pixelcnn", "vae"))
    assert "12 groups" in codes
    assert re.search(
        r"held-out patches by codes: [\d.]+ dB\n +average pooling at the same length: [\d.]+", codes
    )
    assert re.search(r"codes met: \d+ of 32", codes)
    assert re.search(r"held-out maps: [\d.]+ bits a code\n +order 0: [\d.]+; four neighbours before: ", pixel)
    assert "log score" in pixel
    assert "W1 (by codes, chance)" in pixel
    assert "as many principal components" in vae
    for name, pictures in (
        ("codes", ("reconstructions", "codebook", "latents")),
        ("codes-2", ("generated", "distributions")),
        ("codes-3", ("reconstructions", "latents")),
    ):
        for picture in pictures:
            assert (made / name / f"{picture}.png").read_bytes().startswith(PNG)
        assert json.loads((made / name / "evaluation.json").read_text())["conditions"]["patches"] > 0


def test_the_same_command_goes_on_and_another_is_refused(made: Path) -> None:
    images = ["--images", str(made / "images"), "--labels", str(made / "labels.csv"), "--cores", "1"]
    images += ["--label", "ln_cooling_rate"]
    again = ["vqvae", *images, "--pixel-size-um", "0.25", "--patch-px", "32", "--out", str(made / "codes")]
    before = load_bundle(made / "codes").file("model.onnx")
    _done([*again, *VQ])
    assert load_bundle(made / "codes").file("model.onnx") == before
    assert "steps differ" in _refused([*again, *VQ, "--steps", "31"])
    assert "data differ" in _refused([*again, *VQ, "--held-out", "spot 1"])
    same = ["pixelcnn", *images, "--vqvae", str(made / "codes"), "--out", str(made / "codes"), *PIXEL]
    assert "is the bundle that is added to" in _refused(same)


def test_images_are_drawn_and_measured(made: Path, tmp_path: Path) -> None:
    bundle = str(made / "codes-3")
    command = ["micrographs", "--bundle", bundle, "-n", "5", "--out", str(tmp_path / "drawn"), "--seed", "3"]
    printed = _done([*command, "--condition", "ln_cooling_rate=1.1"], generate_app)
    assert "5 images of 32x32 px" in printed
    with (tmp_path / "drawn" / "generated.csv").open() as opened:
        rows = list(csv.DictReader(opened))
    assert [row["file"] for row in rows] == [f"{i:05d}.png" for i in range(5)]
    drawn = [np.asarray(Image.open(tmp_path / "drawn" / row["file"])) for row in rows]
    assert all(image.shape == (32, 32) and image.dtype == np.uint8 for image in drawn)
    assert all(0.0 <= float(row["fraction"]) <= 1.0 for row in rows)
    assert len({image.tobytes() for image in drawn}) == 5
    _done(
        [*command[:-4], "--out", str(tmp_path / "again"), "--seed", "3", "-c", "ln_cooling_rate=1.1"],
        generate_app,
    )
    assert (tmp_path / "again" / "00004.png").read_bytes() == (tmp_path / "drawn" / "00004.png").read_bytes()
    for given, said in (
        ([], "--condition ln_cooling_rate=...: is missing"),
        (["-c", "ln_cooling_rate=99"], "outside of"),
        (["-c", "ln_cooling_rate=warm"], "expected a number"),
        (["-c", "carbon=1"], "no such condition; it has: ln_cooling_rate"),
        (["-c", "ln_cooling_rate"], "expected NAME=VALUE"),
    ):
        assert said in _refused([*command, *given], generate_app)
    absent = ["micrographs", "--bundle", str(made / "codes"), "--out", str(tmp_path / "x")]
    assert "has no PixelCNN to draw with" in _refused(absent, generate_app)


def test_a_condition_is_found_with_an_interval_or_not_at_all(made: Path, tmp_path: Path) -> None:
    command = ["condition", "--bundle", str(made / "codes-3"), "-n", "80"]
    given = ["--json", str(tmp_path / "answer.json"), "--plot", str(tmp_path / "answer.png")]
    _done(
        [
            "micrographs",
            "--bundle",
            str(made / "codes-3"),
            "-n",
            "40",
            "-c",
            "ln_cooling_rate=1.5",
            "--out",
            str(tmp_path / "drawn"),
        ],
        generate_app,
    )
    with (tmp_path / "drawn" / "generated.csv").open() as opened:
        mean = np.mean([float(row["fraction"]) for row in csv.DictReader(opened)])
    printed = _done([*command, "--fraction", f"{mean:.4f}", *given], generate_app)
    told = json.loads((tmp_path / "answer.json").read_text())
    low, high = told["interval_90"]
    assert told["range"][0] <= low <= told["best"] <= high <= told["range"][1]
    assert f"ln_cooling_rate: {told['best']:.3g}" in printed
    assert (tmp_path / "answer.png").read_bytes().startswith(PNG)
    result = CliRunner().invoke(generate_app, [*command, "--fraction", "0.9999"])
    assert result.exit_code == 1
    assert "no ln_cooling_rate from" in result.output
    assert "give a fraction" in _refused(command, generate_app)
    assert "fraction 5: expected" in _refused([*command, "--fraction", "5"], generate_app)
    twice = [*command, "--fraction", "0.5", "-c", "ln_cooling_rate=1"]
    assert "--condition ln_cooling_rate: is what is asked for" in _refused(twice, generate_app)
    both = ["--free-path-um", "1", "--free-path-px", "4"]
    assert "give one of them" in _refused([*command, *both], generate_app)


def test_a_prior_of_other_codes_is_refused(made: Path, tmp_path: Path) -> None:
    from pipelines.engines.bundle import MANIFEST, Description, write_bundle

    two = load_bundle(made / "codes-2")
    copy = tmp_path / "copy"
    shutil.copytree(made / "codes-2", copy)
    told = two.description.training
    other = {**told, "prior": {**told["prior"], "encoder_sha256": "0" * 64}}
    import msgspec

    described: Description = msgspec.structs.replace(two.description, training=other)
    (copy / MANIFEST).unlink()
    write_bundle(copy, described, {n: c for n, c in two.files.items() if n != "bundle.json"})
    command = ["micrographs", "--bundle", str(copy), "-c", "ln_cooling_rate=1", "--out", str(tmp_path / "x")]
    assert "is not the encoder whose codes the PixelCNN has learned" in _refused(command, generate_app)


@pytest.mark.usefixtures("torch")
def test_specimens_of_one_rate_each_are_weighed_over_the_range_of_those_trained_on(tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    lines = ["file,group,ln_cooling_rate"]
    for specimen, rate in enumerate((0.0, 0.6, 1.2, 1.8, 2.4, 3.0, 1.1, 3.4)):
        simulator = MicrographSimulator(shape=(32, 64), ln_cooling_rates=(rate, rate))
        for number, sample in enumerate(simulator.samples(100 * specimen, 10)):
            name = f"{specimen}_{number}.png"
            Image.fromarray(sample.image).save(images / name)
            lines.append(f"{name},specimen {specimen},{rate}")
    (tmp_path / "labels.csv").write_text("\n".join(lines) + "\n")
    data = ["--images", str(images), "--labels", str(tmp_path / "labels.csv"), "--cores", "1"]
    data += ["--no-overlaps", "--held-out", "specimen 6", "--held-out", "specimen 7"]
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    _done(["vqvae", *data, "--patch-px", "32", "--out", one, *VQ[:-1], "6"])
    printed = _done(["pixelcnn", *data, "--vqvae", one, "--out", two, "--drawn", "16", *PIXEL[:-1], "6"])
    told = json.loads((tmp_path / "two" / "evaluation.json").read_text())
    left_out = (
        "10 of 20 held-out images are of a condition that no candidate stands for (ln_cooling_rate: 0 to 3)"
    )
    assert left_out in printed
    assert any(left_out in remark for remark in told["remarks"])
    # 1.0 stands for the 1.1 of the specimen that calibrates; nothing stands for the 3.4 of the other one.
    found = read_parts(load_bundle(tmp_path / "two")).posterior
    assert found is not None
    np.testing.assert_allclose(found.values, np.arange(7) / 2.0, atol=1e-6)
    assert found.sources == 1
    assert "posterior" not in told
    assert "the posterior is not judged" in printed


@pytest.mark.usefixtures("torch")
def test_classes_by_fingerprint_and_by_texture(tmp_path: Path) -> None:
    pytest.importorskip("skimage", reason="scikit-image is absent: see docs/how-to/train-a-network.md")
    images = [*_folder(tmp_path, 24), "--label", "class", "--patch-px", "32", "--folds", "3"]
    command = ["micrograph-classes", *images, "--out", str(tmp_path / "out"), *VQ[:-1], "6"]
    printed = _done(command)
    result = json.loads((tmp_path / "out" / "classes.json").read_text())
    figures, files = result["figures"], result["files"]
    assert result["classes"] == ["fast", "slow"]
    assert figures["accuracy"] == pytest.approx(np.mean([f["class"] == f["by_fingerprint"] for f in files]))
    assert figures["texture_accuracy"] == pytest.approx(
        np.mean([f["class"] == f["by_texture"] for f in files])
    )
    folds = {(f["group"], f["fold"]) for f in files}
    assert len(folds) == len({group for group, _ in folds}) == 12
    low, high = figures["interval"]
    assert low <= figures["difference"] <= high
    assert "right by LBP and GLCM" in printed
    # Numbers are no classes.
    numbers = [*images, "--label", "ln_cooling_rate", "--out", str(tmp_path / "x")]
    numbers.remove("class")
    numbers.pop(numbers.index("--label"))
    assert "give --labels with a column that is a class" in _refused(["micrograph-classes", *numbers, *VQ])


@pytest.mark.usefixtures("torch")
@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["vqvae", "--recipe", "magic"], "recipe 'magic' of vqvae is not known; known: ema, noguchi-2021"),
        (["vqvae", "--set", "layers=3"], "expected NAME=VALUE with NAME one of"),
        (["vqvae", "--steps", "0"], "steps 0: expected 1 or more"),
        (["vqvae", "--phase", "grey"], "--phase grey: expected bright or dark"),
        (["vqvae", "--patch-px", "100"], "--patch-px 100: expected a multiple of 16"),
        (["vqvae", "--name", "two words"], "--name 'two words': expected letters"),
        (["vqvae", "--label", "rate"], "--label names columns of --labels"),
        (["vae", "--into", "nowhere"], "nowhere: no such bundle"),
        (["pixelcnn", "--vqvae", "nowhere"], "nowhere: no such bundle"),
    ],
)
def test_what_cannot_be_is_told_in_one_line(tmp_path: Path, command: list[str], said: str) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for number, sample in enumerate(MicrographSimulator(shape=(32, 32)).samples(0, 4)):
        Image.fromarray(sample.image).save(images / f"{number}.png")
    given = [*command, "--images", str(images), "--out", str(tmp_path / "out")]
    if "--patch-px" not in command and command[0] == "vqvae":
        given += ["--patch-px", "32"]
    line = _refused(given)
    assert said in line
    assert "\n" not in line


def test_without_torch_the_commands_say_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    images = ["--images", str(tmp_path), "--out", str(tmp_path / "out")]
    for command, runner in (
        (["vqvae", *images], app),
        (["vae", *images], app),
        (["pixelcnn", *images, "--vqvae", "x"], app),
        (["micrograph-classes", *images, "--labels", "x"], app),
        (["micrographs", "--bundle", "x", "--out", "x"], generate_app),
        (["condition", "--bundle", "x"], generate_app),
    ):
        assert [line.strip() for line in _refused(command, runner).split("\n")[1:]] == list(INSTALL)

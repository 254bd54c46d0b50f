"""What a bundle of a micrograph model holds: it comes back as it was, and what is wrong is named."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from testkit.bundles import redescribe, sign

from pipelines.engines.bundle import BundleError, load_bundle
from pipelines.micrograph.acquisition import Acquisition
from pipelines.micrograph.model_bundle import Domain, read_parts
from pipelines.micrograph.networks import MicrographModel
from pipelines.micrograph.novelty import ImageFeatures

pytest.importorskip("onnx", reason="onnx writes the networks")
from testkit.micrograph_bundle import PATCH, SIDE, fitted, make_bundle, make_vae_bundle, read


@pytest.fixture
def folder(model_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model_folder, tmp_path / "bundle"))


def rearrange(folder: Path, change: Callable[[dict[str, np.ndarray]], Any]) -> None:
    with np.load(folder / "reference.npz") as stored:
        arrays = dict(stored)
    change(arrays)
    content = io.BytesIO()
    np.savez(content, **arrays)
    (folder / "reference.npz").write_bytes(content.getvalue())
    sign(folder)


def test_parts_come_back_as_they_were(model_folder: Path) -> None:
    made, found = fitted()[0], read_parts(load_bundle(model_folder))
    assert found.preparation == made.preparation
    assert (found.domain, found.codebook, found.alarm_names) == (made.domain, made.codebook, made.alarm_names)
    assert found.alarm_values is not None
    np.testing.assert_array_equal(found.alarm_values, np.asarray(made.alarm_values))
    assert made.novelty is not None
    assert found.novelty is not None
    assert made.posterior is not None
    assert found.posterior is not None
    np.testing.assert_array_equal(found.novelty.held_out.sources, made.novelty.held_out.sources)
    np.testing.assert_array_equal(found.posterior.inputs, made.posterior.inputs)
    rng = np.random.default_rng(0)
    codes, latents = read(rng.integers(0, 255, (5, PATCH, PATCH)).astype(np.uint8))
    image = ImageFeatures(latents, codes, rng.normal(-100.0, 5.0, (5, 4)))
    assert found.novelty.judge(image) == made.novelty.judge(image)
    assert found.novelty.fit_typicality(image) == made.novelty.fit_typicality(image)
    assert found.posterior.judge(image.log_likelihood) == made.posterior.judge(image.log_likelihood)


def test_what_older_bundles_do_not_hold_is_unknown_and_of_others_comes_back(tmp_path: Path) -> None:
    made = fitted()[0]
    assert made.posterior is not None
    assert made.novelty is not None
    older = replace(made.posterior, sources=None)
    make_bundle(tmp_path / "older", posterior=older)
    described = load_bundle(tmp_path / "older")
    assert "sources" not in described.description.decision["posterior"]
    found = read_parts(described)
    assert found.posterior is not None
    assert found.novelty is not None
    assert (found.posterior.sources, found.posterior.few_sources) == (None, False)
    assert found.novelty.held_out.has_candidate is None
    some = np.arange(len(made.novelty.held_out.sources)) % 3 > 0
    novelty = replace(made.novelty, held_out=replace(made.novelty.held_out, has_candidate=some))
    make_bundle(tmp_path / "new", posterior=replace(made.posterior, sources=4), novelty=novelty)
    found = read_parts(load_bundle(tmp_path / "new"))
    assert found.posterior is not None
    assert found.novelty is not None
    assert (found.posterior.sources, found.posterior.few_sources) == (4, True)
    np.testing.assert_array_equal(found.novelty.held_out.has_candidate, some)
    rearrange(tmp_path / "new", lambda a: a.update(held_out_has_candidate=np.zeros(len(some), bool)))
    with pytest.raises(BundleError, match="held_out_has_candidate: expected one image at least"):
        read_parts(load_bundle(tmp_path / "new"))


def test_networks_say_what_the_bundle_was_made_of(model_folder: Path) -> None:
    model = MicrographModel(model_folder)
    patches = np.random.default_rng(1).integers(0, 255, (7, PATCH, PATCH)).astype(np.uint8)
    first, further = model.read(patches)
    codes, latents = read(patches)
    assert first.codes is not None
    np.testing.assert_array_equal(first.codes, codes)
    np.testing.assert_allclose(first.latents, latents, rtol=1e-4)
    assert (first.kind, further.kind, further.codes, further.latents.shape) == ("vqvae", "vae", None, (7, 2))
    # Each map under each condition, though a run of the network takes five rows only.
    found = model.log_likelihood(codes)
    one_by_one = np.concatenate([model.log_likelihood(codes[k : k + 1]) for k in range(7)])
    assert found.shape == (7, 4)
    np.testing.assert_allclose(found, one_by_one, rtol=1e-5)
    assert list(model.engines) == ["", "vae", "prior"]


def test_a_bundle_of_a_vae_alone(tmp_path: Path) -> None:
    make_vae_bundle(tmp_path)
    model = MicrographModel(tmp_path)
    (only,) = model.read(np.full((2, PATCH, PATCH), 51, np.uint8))
    np.testing.assert_allclose(only.latents, [[0.2, 0.04]] * 2, rtol=1e-5)
    assert not model.has_prior
    with pytest.raises(ValueError, match="has no network prior"):
        model.log_likelihood(np.zeros((1, SIDE, SIDE), np.int32))


def test_a_prior_whose_conditions_were_not_calibrated_is_not_asked(tmp_path: Path) -> None:
    make_bundle(tmp_path, posterior=None)
    model = MicrographModel(tmp_path)
    assert not model.has_prior
    assert model.parts.novelty is not None
    assert not model.parts.novelty.weighs_codes
    codes, latents = read(np.full((2, PATCH, PATCH), 90, np.uint8))
    found = model.parts.novelty.judge(ImageFeatures(latents, codes))
    assert found.code_divergence_bits is not None
    assert found.bits_per_code is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d.update(kind="laue-classes"), "kind 'laue-classes', expected micrograph-vqvae"),
        (lambda d: d["preparation"]["parameters"].update(sharpen=1), "this version does not know sharpen"),
        (lambda d: d["preparation"]["parameters"].update(median_px=2), "median_px: expected an odd number"),
        (lambda d: d["preparation"].update(phase="grey"), "phase"),
        (lambda d: d["domain"].update(pixel_size_um=[0.3, 0.2]), "pixel_size_um: expected two rising"),
        (lambda d: d["domain"].update(humidity=1), "humidity"),
        (lambda d: d["decision"].update(codebook=0), "decision.codebook is 0"),
        (lambda d: d["decision"].update(codebook=8), "expected maps of codes below 8|code_mean"),
        (lambda d: d["decision"].update(alarm=["hue"]), "this version does not know hue"),
        (lambda d: d["decision"]["posterior"].update(candidates=["1"]), "1 candidates and 4 values"),
        (lambda d: d["decision"]["posterior"].update(sharpness=-1.0), "sharpness: expected a number above 0"),
        (lambda d: d["decision"]["posterior"].update(correlation=1.5), "correlation: expected 0 to 1, got"),
        (lambda d: d["decision"]["posterior"].update(sources=0), "sources: expected 1 or more, got 0"),
        (lambda d: d["decision"]["novelty"].update(level=0.0), "level: expected a number between 0 and 1"),
        (lambda d: d["decision"]["novelty"].update(neighbours=0), "neighbours: expected 1 or more, got 0"),
        (lambda d: d["networks"].pop("prior"), "has no network prior"),
        (lambda d: d["outputs"]["latent"].update(shape=["batch", 5]), "gives 5 numbers a patch"),
        (lambda d: d["networks"]["prior"]["inputs"].pop("condition"), "expected codes .*, condition float32"),
    ],
)  # fmt: skip
def test_what_is_wrong_in_the_description_is_named(
    folder: Path, change: Callable[[dict[str, Any]], Any], words: str
) -> None:
    redescribe(folder, change)
    with pytest.raises(BundleError, match=words) as error:
        MicrographModel(folder)
    assert str(folder) in str(error.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda a: a.pop("image_mean"), "image_mean"),
        (lambda a: a.update(latent_mean=a["latent_mean"][:2]), r"latent_mean: .* shape \(4\), got \(2,\)"),
        (lambda a: a.update(latent_reference=a["latent_reference"] * np.nan), "latent_reference: expected"),
        (lambda a: a.update(held_out_codes=a["held_out_codes"] + np.uint16(40)), "codes below 32"),
        (lambda a: a.update(held_out_codes_count=a["held_out_codes_count"][:-1]), "held_out_codes: has"),
        (
            lambda a: a.update(held_out_log_likelihood=a["held_out_log_likelihood"][:, :3]),
            r"held_out_log_likelihood: of the shape \(\d+, 3\) for 4 candidates",
        ),
        (
            lambda a: a["held_out_codes_count"].__iadd__(np.r_[1, -1, np.zeros(58, int)]),
            "held_out_codes_count: differs",
        ),
        (lambda a: a.update(held_out_source=a["held_out_source"] + 60), "held_out_source: expected"),
        (lambda a: a.update(candidate_input=a["candidate_input"][:3]), "candidate_input: .* 4 candidates"),
        (lambda a: a.update(alarm=a["alarm"][:, :3]), r"alarm: .* the shape \(any, 9\)"),
        (lambda a: a.update(code_mean=np.array(["a"] * 32)), "code_mean: expected finite numbers"),
    ],
)  # fmt: skip
def test_what_is_wrong_in_the_arrays_is_named(
    folder: Path, change: Callable[[dict[str, np.ndarray]], Any], words: str
) -> None:
    rearrange(folder, change)
    with pytest.raises(BundleError, match=words) as error:
        read_parts(load_bundle(folder))
    assert "make the bundle again" in str(error.value)


def test_arrays_are_never_unpickled(folder: Path) -> None:
    rearrange(folder, lambda a: a.update(alarm=np.array([{"a": 1}], dtype=object)))
    with pytest.raises(BundleError, match=r"reference\.npz"):
        read_parts(load_bundle(folder))


def test_the_domain_names_what_is_outside_of_it() -> None:
    domain = Domain(
        pixel_size_um=(0.1, 0.2), voltage_kV=(5.0, 15.0), detectors=("ETD", "vCD"), smallest_px=256
    )
    inside = Acquisition(pixel_size_um=0.2, voltage_kV=5.0, detector="etd")
    assert domain.mismatch(inside, (256, 400)) == ()
    assert domain.mismatch(Acquisition(), (256, 256)) == ()  # what nobody knows is not outside
    outside = Acquisition(pixel_size_um=0.25, voltage_kV=20.0, detector="TLD")
    assert domain.mismatch(outside, (100, 400)) == (
        "pixel_size_um 0.25 is outside 0.1 to 0.2",
        "voltage_kV 20 is outside 5 to 15",
        "detector TLD is not one of ETD, vCD",
        "100 x 400 pixels are fewer than 256 a side",
    )

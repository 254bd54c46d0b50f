"""The micrograph pipeline: frames in, results out, with all networks of a bundle and without any."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from testkit.micrographs import data_bar

from grainwatch.config import ConfigError, plugin_config
from grainwatch.messages import FrameKey, MicrographResult, decode, encode
from pipelines.engines.bundle import load_bundle
from pipelines.frame import Failure, Frame, ModelRef, PlainImage, StreamContext
from pipelines.micrograph.frame_acquisition import AcquisitionTable
from pipelines.micrograph.morphology import morphology
from pipelines.micrograph.pipeline import CLASSICAL, Config, MicrographPipeline, build, comparer, watch
from pipelines.micrograph.preparation import prepare
from pipelines.micrograph.stream_watch import DriftTable, StreamWatch

pytest.importorskip("onnx", reason="onnx writes the networks")
from testkit.micrograph_bundle import (
    CANDIDATES,
    PATCH,
    PREPARATION,
    SIMULATOR,
    fitted,
    likelihood,
    make_bundle,
    make_vae_bundle,
    read,
)

KNOWN = {"pixel_size_um": 0.25, "detector": "SE", "data_bar_px": 0}


def frame(pixels: np.ndarray, metadata: Mapping[str, Any] | None = None, number: int = 0) -> Frame:
    return Frame(FrameKey("sem", "u" * 32, number), PlainImage(pixels), metadata=dict(metadata or {}))


def pipeline(folder: Path | str | None = None, **keys: Any) -> MicrographPipeline:
    names = () if folder is None else (str(folder),)
    return build(Config(**{"bundle": names, **keys}), StreamContext("sem", "c" * 8))


def answer(pipe: MicrographPipeline, pixels: np.ndarray, **metadata: Any) -> MicrographResult:
    (found,) = pipe.process([frame(pixels, metadata)])
    assert isinstance(found, MicrographResult), found
    assert encode(decode(encode(found))) == encode(found)  # not equal as they are: NaN is none
    return found


@pytest.fixture(scope="module")
def full(model_folder: Path) -> MicrographPipeline:
    made = pipeline(model_folder)
    made.warm()
    return made


def test_it_is_registered() -> None:
    module, config = plugin_config(
        "pipelines", {"type": "micrograph", "phase": "dark"}, "streams.sem.pipeline"
    )
    assert module.__name__ == "pipelines.micrograph.pipeline"
    assert config == Config(phase="dark")


def test_results_are_what_the_parts_say(full: MicrographPipeline, model_folder: Path) -> None:
    sample = SIMULATOR.sample(500)
    found = answer(full, sample.image, **KNOWN)
    prepared = prepare(sample.image, PREPARATION)
    patches = prepared.image.reshape(3, PATCH, 3, PATCH).swapaxes(1, 2).reshape(9, PATCH, PATCH)
    codes, latents = read(patches)
    assert found.patches is not None
    assert (found.patches.shape, found.patches.origin_px) == ((3, 3), (0, 0))
    assert found.patches.numbers.numpy().tolist() == list(range(9))
    first, further = found.fingerprints
    assert (first.kind, further.kind, first.codebook) == ("vqvae", "vae", 32)
    assert first.model == load_bundle(model_folder).model == found.provenance.model
    assert first.codes is not None
    assert further.codes is None
    np.testing.assert_array_equal(first.codes.numpy(), codes)
    np.testing.assert_allclose(first.vector.numpy(), latents.mean(axis=0), rtol=1e-4)
    np.testing.assert_allclose(first.spread.numpy(), latents.std(axis=0, ddof=1), rtol=1e-3)
    parts, a, b = fitted()
    assert parts.posterior is not None
    assert found.posterior is not None
    expected = parts.posterior.judge(likelihood(codes, a, b))
    np.testing.assert_allclose(found.posterior.probability, expected.probability, atol=1e-3)
    assert found.posterior.values == CANDIDATES
    assert found.novelty is not None
    assert found.novelty.bits_per_code is not None
    assert found.morphology is not None
    own = morphology(prepared.filtered, pixel_size_um=0.25, patch_px=PATCH)
    assert (found.morphology.fraction, found.morphology.free_path_um) == (own.fraction, own.free_path_um)
    assert found.flags == ()
    assert found.provenance.config_hash == "c" * 8


def test_of_the_trained_kind_few_are_novel_and_of_others_all(full: MicrographPipeline) -> None:
    usual = [answer(full, SIMULATOR.sample(600 + n).image, **KNOWN) for n in range(30)]
    # Level 0.05 and sixty held-out images: more than 8 of 30 are once in ten thousand times.
    assert sum("novel" in r.flags for r in usual) <= 8
    assert sum("none_of_these" in r.flags for r in usual) <= 8
    waves = 128 + 90 * np.sin(np.arange(192) / 9.0)[:, None] * np.ones(192)
    smooth = np.clip(waves + np.random.default_rng(0).normal(0, 2, (192, 192)), 0, 255).astype(np.uint8)
    found = answer(full, smooth, **KNOWN)
    assert {"novel", "none_of_these"} <= set(found.flags)
    assert found.novelty is not None
    assert found.novelty.typicality < 0.05


def test_without_a_bundle_there_is_morphology() -> None:
    pipe = pipeline(acquisition=AcquisitionTable(pixel_size_um=0.5), phase="dark")
    pipe.warm()
    found = answer(pipe, SIMULATOR.sample(1).image)
    assert found.provenance.model == CLASSICAL
    assert found.morphology is not None
    assert found.morphology.phase == "dark"
    assert found.morphology.free_path_um == pytest.approx(found.morphology.free_path_px * 0.5)
    assert (found.fingerprints, found.patches, found.posterior, found.novelty) == ((), None, None, None)


def test_what_is_out_of_domain_is_flagged_in_words(full: MicrographPipeline) -> None:
    image = SIMULATOR.sample(2).image
    found = answer(full, image, **{**KNOWN, "pixel_size_um": 1.0, "detector": "BSE"})
    assert "out_of_domain" in found.flags
    assert [r for r in found.remarks if r.startswith("two-phase-trial: ")] == [
        "two-phase-trial: pixel_size_um 1 is outside 0.2 to 0.3",
        "two-phase-trial: detector BSE is not one of SE, SIM-SE",
    ]
    assert found.instrument == "BSE"
    unknown = answer(full, image, data_bar_px=0)
    assert "out_of_domain" not in unknown.flags
    assert "pixel_size_unknown" in unknown.flags
    assert unknown.pixel_size_um is None
    for size in (-1.0, 0, float("nan"), 1e9, "wide"):
        wrong = answer(full, image, data_bar_px=0, pixel_size_um=size)
        assert wrong.pixel_size_um is None
        assert {"metadata_damaged", "pixel_size_unknown"} <= set(wrong.flags)


def test_of_a_large_image_some_patches_are_looked_at(model_folder: Path) -> None:
    pipe = pipeline(model_folder, max_patches=5, posterior_patches=2)
    found = answer(pipe, SIMULATOR.sample(3).image, **KNOWN)
    assert "patches_sampled" in found.flags
    assert found.patches is not None
    assert found.patches.shape == (3, 3)
    # Two, one and two in a row; two, two and one in a column.
    assert found.patches.numbers.numpy().tolist() == [0, 1, 5, 6, 7]
    assert found.posterior is not None
    assert found.posterior.patches == 2


def test_bad_input_is_flagged_or_fails_with_words(full: MicrographPipeline) -> None:
    picture = SIMULATOR.sample(4).image
    holed = picture.astype(np.float32)
    holed[5:9, 5:9] = np.nan
    bar = data_bar(640, 40, 0, 255, "plain")
    cases: list[tuple[np.ndarray, set[str]]] = [
        (picture > 120, {"two_levels"}),
        (holed, {"not_finite", "novel", "none_of_these"}),
        (np.full((192, 192), np.nan, np.float32), {"one_grey", "not_finite", "novel", "none_of_these"}),
        (np.full((192, 192), 7, np.uint16), {"one_grey", "novel", "none_of_these", "no_phase_boundary"}),
        (np.dstack([picture, picture // 2, picture // 3]), {"true_colour"}),
        (picture[:1, :1], {"too_small", "one_grey", "out_of_domain"}),
        (picture[:63], {"too_small", "out_of_domain"}),
        (bar, {"data_bar_only"}),
    ]
    for pixels, flags in cases:
        known = {k: v for k, v in KNOWN.items() if pixels is not bar or k != "data_bar_px"}
        found = answer(full, pixels, **known)
        assert flags <= set(found.flags), (pixels.shape, found.flags)
        assert ("too_small" in found.flags) == (not found.fingerprints)
    words = {
        "pixels": np.zeros((0, 5), np.uint8),
        "objects": np.array([["a"]], dtype=object),
        "dimensions": np.zeros((2, 2, 2, 2), np.uint8),
    }
    outcomes = full.process([frame(pixels) for pixels in words.values()])
    assert all(isinstance(outcome, Failure) and outcome.reason and not outcome.fault for outcome in outcomes)


def test_several_models_each_have_a_fingerprint(model_folder: Path, tmp_path: Path) -> None:
    make_vae_bundle(tmp_path / "greys")
    pipe = build(Config(bundle=(str(model_folder), str(tmp_path / "greys"))), StreamContext("sem"))
    found = answer(pipe, SIMULATOR.sample(5).image, **KNOWN)
    assert [(f.model.name, f.kind) for f in found.fingerprints] == [
        ("two-phase-trial", "vqvae"),
        ("two-phase-trial", "vae"),
        ("greys", "vae"),
    ]
    assert found.provenance.model.name == "two-phase-trial+greys"
    assert [f.whitened is None for f in found.fingerprints] == [False, True, True]
    said = "\n".join(pipe.describe())
    assert "judges novelty and ln_cooling_rate" in said
    assert "bundle greys: patches of 64 px, judges nothing" in said
    assert len(pipe.engines()) == 4
    with pytest.raises(ConfigError, match=r"streams.sem.pipeline.bundle: a bundle is named twice"):
        build(Config(bundle=(str(model_folder),) * 2), StreamContext("sem"))


def test_it_is_said_where_few_specimens_calibrated_the_process_condition(tmp_path: Path) -> None:
    posterior = fitted()[0].posterior
    assert posterior is not None
    make_bundle(tmp_path / "few", posterior=dataclasses.replace(posterior, sources=3))
    make_bundle(tmp_path / "many", posterior=dataclasses.replace(posterior, sources=10))
    words = "ln_cooling_rate calibrated on too few specimens (3): of a new one, it may be surer than"
    assert any(words in line for line in pipeline(tmp_path / "few").describe())
    assert not any("calibrated on too few" in line for line in pipeline(tmp_path / "many").describe()[:4])


def test_the_bundle_that_was_chosen_is_taken(model_folder: Path, tmp_path: Path) -> None:
    sha256 = make_bundle(tmp_path / "second", version=2)
    models = {"sem-model": ModelRef(str(tmp_path / "second"), sha256)}
    pipe = build(Config(bundle=("sem-model",)), StreamContext("sem", models=models))
    assert answer(pipe, SIMULATOR.sample(6).image).provenance.model.version == "2"
    stale = {"sem-model": ModelRef(str(model_folder), sha256)}
    with pytest.raises(ConfigError, match=r"sem.pipeline.bundle: .* has changed since it was taken"):
        build(Config(bundle=("sem-model",)), StreamContext("sem", models=stale))
    with pytest.raises(ConfigError, match=r"sem.pipeline.bundle: nowhere: there is no such folder"):
        pipeline("nowhere")
    with pytest.raises(ConfigError, match=r"bundle of kind 'laue-classes', expected micrograph-vqvae"):
        pipeline("Cu")


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"max_patches": 0}, "max_patches: expected 1 or more"),
        ({"posterior_patches": -1}, "posterior_patches: expected 1"),
        ({"neighbours": 101}, "neighbours: expected 0 to 100"),
        ({"phase": "grey"}, "phase"),
        ({"drift": {"block": 0}}, "block: expected 1"),
        ({"drift": {"memory": 2.0}}, "memory: expected 0.01 to 0.3, got 2"),
        ({"acquisition": {"pixel_size_um": 0.0}}, "pixel_size_um: expected"),
    ],
)
def test_what_is_wrong_in_the_configuration_is_named(keys: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        plugin_config("pipelines", {"type": "micrograph", **keys}, "streams.sem.pipeline")


def test_the_watch_begins_as_the_model_says_where_that_is_asked_for(model_folder: Path) -> None:
    context, names = StreamContext("sem"), (str(model_folder),)
    found = watch(Config(bundle=names, drift=DriftTable(start="model")), context)
    assert isinstance(found, StreamWatch)
    learnt = found.settings[2]
    assert learnt is not None
    assert learnt.sha256 == load_bundle(model_folder).sha256
    assert learnt.values.shape == (60, 9)
    plain = watch(Config(bundle=names), context)
    assert isinstance(plain, StreamWatch)
    assert plain.settings[2] is None
    assert watch(Config(drift=DriftTable(on=False), neighbours=0), context) is None


def test_the_alarm_is_prepared_for_what_the_model_lets_it_follow(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The limit takes a second to find: if first for other components, results would wait for it.
    prepared: list[tuple[str, ...]] = []
    monkeypatch.setattr(DriftTable, "begin", lambda table, names: prepared.append(tuple(names)))
    make_vae_bundle(tmp_path)
    for bundle in ((), (str(model_folder),), (str(tmp_path),)):
        watch(Config(bundle=bundle), StreamContext("sem"))
    plain, vqvae, judges_nothing = prepared
    assert plain[-1] == "fraction"
    assert vqvae == (*plain, "latent_distance", "code_divergence_bits")
    assert judges_nothing == plain


def test_two_models_are_compared_by_what_they_conclude(full: MicrographPipeline) -> None:
    compare = comparer(Config(), StreamContext("sem"))
    found = answer(full, SIMULATOR.sample(7).image, **KNOWN)
    same = compare(found, found)
    assert same.agree
    assert same.figures["fraction_more"] == 0.0
    assert same.figures["posterior_distance"] == 0.0
    assert found.novelty is not None
    assert found.morphology is not None
    assert found.posterior is not None
    replace = msgspec.structs.replace
    turned = tuple(reversed(found.posterior.probability))
    others = {
        "fraction_more": replace(found, morphology=replace(found.morphology, fraction=0.99)),
        "same_verdict": replace(found, novelty=replace(found.novelty, novel=not found.novelty.novel)),
        "same_condition": replace(found, posterior=replace(found.posterior, probability=turned)),
    }
    for figure, other in others.items():
        different = compare(found, other)
        assert not different.agree
        assert different.figures[figure] != same.figures[figure]
    assert not compare(found, replace(found, posterior=replace(found.posterior, none_of_these=True))).agree
    # What only one of them judges is no disagreement.
    assert compare(found, replace(found, posterior=None, novelty=None)).agree


def test_a_stream_that_shows_another_structure_is_noticed(full: MicrographPipeline) -> None:
    # Brightness, fraction and size stay what they were: only the texture is another.
    watching = watch(Config(bundle=("model",)), StreamContext("sem"))
    assert watching is not None
    rng = np.random.default_rng(0)
    for number in range(60):
        result, _ = watching.take(answer(full, SIMULATOR.sample(1000 + number).image, **KNOWN))
        assert "stream_changed" not in result.flags
    flags = []
    for number in range(20):
        # Finely mixed, as many bright pixels as before.
        image = SIMULATOR.sample(1100 + number).image
        mixed = rng.permuted(image.reshape(48, 4, 48, 4).swapaxes(1, 2).reshape(48, 48, 16), axis=2)
        image = mixed.reshape(48, 48, 4, 4).swapaxes(1, 2).reshape(192, 192)
        flags.append("stream_changed" in watching.take(answer(full, image, **KNOWN))[0].flags)
    assert flags[-1]
    assert watching.alarm

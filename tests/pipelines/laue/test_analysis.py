"""What is published of a crystal belongs together and is true; bad frames are named."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from testkit.laue import (
    AREA,
    CALIBRATION,
    equivalent_of,
    indexer,
    material,
    misorientation_deg,
    phase,
    random_strain,
    random_turns,
    simulated,
    turn_about,
)

from grainwatch.config import ConfigError
from grainwatch.messages import FrameKey, LaueResult, Provenance, decode, encode
from pipelines import rotations
from pipelines.frame import BadFrame, Failure, Frame, PlainImage, StreamContext
from pipelines.laue.analysis import LaueAnalysis, LaueSettings, calibration_hash, read_mask
from pipelines.laue.forward import random_positions, simulate_spots
from pipelines.laue.geometry import Calibration, DetectorArea, beams_of
from pipelines.laue.indexing.parameters import IndexingParameters
from pipelines.laue.indexing.refine import decompose
from pipelines.laue.lauetools_files import write_det
from pipelines.laue.orientation import SAMPLE_FRAMES, orientation_of
from pipelines.laue.peaks import PeakSearch
from pipelines.laue.pipeline import CLASSICAL, Config, LauePipeline, build, peak_array
from pipelines.laue.render import render_frame


@cache
def analysis(*names: str, sample_frame: str = "tilt40") -> LaueAnalysis:
    settings = LaueSettings(sample_frame=sample_frame)
    return LaueAnalysis([material(n) for n in names], CALIBRATION, settings=settings)


@cache
def strained_pattern() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Peaks, M and strain (B0 frame) of one strained crystal of titanium."""
    strain = random_strain(np.random.default_rng(3), 1e-3)
    matrix = random_turns(1, seed=3)[0] @ np.linalg.inv(np.eye(3) + strain)
    return simulated("Ti", matrix, seed=3).xy_px, matrix, strain


@cache
def image(name: str, grains: int, seed: int) -> np.ndarray:
    """A frame with crystals of one material, noise and all."""
    turns = random_turns(grains, seed)
    spots = simulate_spots(turns @ material(name).B0, phase(name).scene.reflections, CALIBRATION, AREA)
    counts = 2e5 * spots.intensity / np.median(spots.intensity)
    rng = np.random.default_rng(seed)
    return render_frame(CALIBRATION.shape, spots.xy_px, np.clip(counts, 3e3, 3e5), 2.2, rng)


@pytest.mark.parametrize("sample_frame", ["lab", "tilt40"])
def test_the_published_numbers_belong_together(sample_frame: str) -> None:
    peaks, matrix, strain = strained_pattern()
    there = analysis("Ti", sample_frame=sample_frame)
    (crystal,) = there.analyse_peaks(peaks).crystals
    of = material("Ti")
    ub, b0 = crystal.UB.numpy(), crystal.B0.numpy()
    np.testing.assert_array_equal(b0, of.B0)
    # UB @ hkl lies where the peaks are.
    spots, hkl = crystal.spot_indices.numpy(), crystal.hkl.numpy().astype(float)
    u, wavelength = beams_of(hkl @ ub.T)
    distance = np.linalg.norm(CALIBRATION.pixels(u) - peaks[spots], axis=1)
    assert distance.mean() == pytest.approx(crystal.residual_px, rel=1e-9)
    assert distance.max() < 2.0
    energy = 12.398419843320026 / wavelength
    assert np.all((energy > 5.0 * 0.999) & (energy < 22.0 * 1.001))
    assert crystal.spots_matched == len(spots)
    assert crystal.match_rate == crystal.spots_matched / crystal.spots_expected
    expected = simulate_spots(ub, phase("Ti").scene.reflections, CALIBRATION, AREA)
    assert crystal.spots_expected == len(expected)
    assert set(map(tuple, hkl.astype(int))) <= set(map(tuple, expected.hkl.tolist()))
    # The quaternion is that of UB, in the fundamental zone; Euler angles are the quaternion's.
    quaternion, _ = orientation_of(ub, of, SAMPLE_FRAMES[sample_frame])
    np.testing.assert_allclose(crystal.quaternion, quaternion, atol=1e-12)
    assert crystal.quaternion[0] >= 0
    np.testing.assert_allclose(
        np.abs(np.dot(rotations.from_euler_deg(crystal.euler_deg), crystal.quaternion)), 1.0, atol=1e-12
    )
    # Strain: of UB, in the crystal frame; in the sample frame it is the same tensor, turned.
    rotation, of_ub = decompose(ub @ np.linalg.inv(of.B0))
    crystal_strain, sample_strain = crystal.strain_crystal.numpy(), crystal.strain_sample.numpy()
    frame = of.crystal_frame
    np.testing.assert_allclose(crystal_strain, frame @ of_ub @ frame.T, atol=1e-12)
    np.testing.assert_allclose(crystal_strain, crystal_strain.T, atol=1e-15)
    assert abs(np.trace(crystal_strain)) < 1e-12
    # From the crystal frame to the sample: the crystal as indexed, not its reduced equivalent.
    to_sample = SAMPLE_FRAMES[sample_frame] @ rotation @ frame.T
    np.testing.assert_allclose(sample_strain, to_sample @ crystal_strain @ to_sample.T, atol=1e-12)
    # ... and it is the true strain.
    true_turn, _ = decompose(matrix)
    in_sample = SAMPLE_FRAMES[sample_frame] @ true_turn
    sigma = crystal.strain_sigma.numpy()
    assert np.all((sigma > 0) & (sigma < 3e-4))
    np.testing.assert_allclose(sample_strain, in_sample @ strain @ in_sample.T, atol=5 * sigma.max())
    found = equivalent_of(ub @ np.linalg.inv(of.B0), matrix, of)
    assert np.radians(misorientation_deg(found, matrix, of)) < 5 * np.radians(crystal.orientation_sigma_deg)
    assert 0 <= crystal.false_probability < 1e-20
    assert 0 < crystal.chance_match_rate < 0.01
    assert crystal.depth_um == 0.0
    assert crystal.flags == ()


def test_crystals_pass_through_a_message() -> None:
    found = analysis("Ti").analyse_peaks(strained_pattern()[0])
    message = LaueResult(
        key=FrameKey("laue", "uid", 3, ""),
        provenance=Provenance(model=CLASSICAL),
        n_peaks=len(found.xy_px),
        peaks=peak_array(found),
        crystals=found.crystals,
    )
    assert decode(encode(message)) == message


def test_a_crystal_of_few_spots_has_an_orientation_and_no_strain() -> None:
    truth = random_turns(1, seed=2)[0]
    pattern = simulated("Cu", truth, seed=2, spurious_fraction=0.0)
    (crystal,) = analysis("Cu").analyse_peaks(pattern.xy_px[:8]).crystals
    assert "strain_not_refined" in crystal.flags
    assert "low_match_rate" in crystal.flags  # a few spots of many
    for array in (crystal.strain_crystal, crystal.strain_sample, crystal.strain_sigma):
        assert np.all(np.isnan(array.numpy()))
    assert np.isfinite(crystal.orientation_sigma_deg)
    ours = crystal.UB.numpy() @ np.linalg.inv(material("Cu").B0)
    assert misorientation_deg(ours, truth, material("Cu")) < 0.1


def test_a_strain_above_the_limit_is_flagged() -> None:
    strain = np.diag([-3.5e-3, -3.5e-3, 7e-3])  # along c, an axis of both frames
    matrix = random_turns(1, seed=5)[0] @ np.linalg.inv(np.eye(3) + strain)
    found = analysis("Ti").analyse_peaks(simulated("Ti", matrix, seed=5).xy_px)
    (crystal,) = found.crystals
    assert crystal.flags == ("unphysical_strain",)
    assert np.abs(crystal.strain_crystal.numpy()).max() == pytest.approx(7e-3, rel=0.1)


def test_a_twin_says_that_it_shares_spots() -> None:
    parent = random_turns(1, seed=2)[0]
    truths = [parent, parent @ turn_about([1, 1, 1], 60)]
    found = analysis("Si").analyse_peaks(simulated("Si", truths, seed=2).xy_px)
    assert [("shares_spots" in c.flags) for c in found.crystals] == [False, True]


def test_a_frame_gives_what_its_crystals_are() -> None:
    found = analysis("Cu").analyse_image(image("Cu", 3, 1))
    assert found.peaks is not None
    assert len(found.crystals) == 3
    for truth in random_turns(3, seed=1):
        near = [
            misorientation_deg(c.UB.numpy() @ np.linalg.inv(material("Cu").B0), truth, material("Cu"))
            for c in found.crystals
        ]
        assert min(near) < 0.02
    assert found.flags == ()
    again = analysis("Cu").analyse_image(image("Cu", 3, 1))
    assert again.crystals == found.crystals


def test_what_was_cut_off_is_flagged() -> None:
    many = random_positions(5000, AREA, np.random.default_rng(0))
    assert analysis("Cu").analyse_peaks(many).flags == ("spots_truncated",)
    settings = LaueSettings(search=PeakSearch(max_peaks=20))
    few = LaueAnalysis([material("Cu")], CALIBRATION, settings=settings)
    found = few.analyse_image(image("Cu", 3, 1))
    assert "peaks_truncated" in found.flags
    assert len(found.xy_px) == 20


def test_a_frame_of_another_detector_is_refused() -> None:
    with pytest.raises(BadFrame, match=r"frame 7 has 100 rows and 120 columns.*sCMOS of 2018 rows and 2016"):
        analysis("Cu").analyse_image(np.zeros((100, 120), dtype=np.uint16), source="frame 7")
    colour = np.zeros((*CALIBRATION.shape, 3), dtype=np.uint8)
    with pytest.raises(BadFrame, match=r"frame 7 is a colour image \(3 channels\), expected a grey one"):
        analysis("Cu").analyse_image(colour, source="frame 7")


def test_a_peak_list_of_another_detector_is_refused() -> None:
    peaks = random_positions(100, AREA, np.random.default_rng(0)) * 4
    with pytest.raises(
        BadFrame, match=r"\d\d of 100 peaks lie off the detector of 2018 rows and 2016 columns"
    ):
        analysis("Cu").analyse_peaks(peaks)
    # One peak that ran away is no other detector.
    assert analysis("Cu").analyse_peaks([*strained_pattern()[0], [-50.0, 3.0]]).crystals == ()


def test_a_peak_that_is_no_number_is_refused() -> None:
    with pytest.raises(BadFrame, match="peak 2 of 3 has the position"):
        analysis("Cu").analyse_peaks([[1.0, 2.0], [np.nan, 3.0], [4.0, 5.0]])


@pytest.mark.parametrize(("value", "complaint"), [(0, "all pixels are zero"), (65535, "saturated")])
def test_frames_without_content_are_refused(value: int, complaint: str) -> None:
    with pytest.raises(BadFrame, match=complaint):
        analysis("Cu").analyse_image(np.full(CALIBRATION.shape, value, dtype=np.uint16))


def test_a_frame_of_background_holds_no_crystal() -> None:
    pixels = np.random.default_rng(0).poisson(40, CALIBRATION.shape).astype(np.uint16)
    assert analysis("Cu").analyse_image(pixels).crystals == ()


def test_no_peaks_no_crystals() -> None:
    found = analysis("Cu").analyse_peaks([])
    assert (found.crystals, found.flags, len(found.xy_px)) == ((), (), 0)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"energy_keV": (22.0, 5.0)}, "energy_keV: expected the lower first"),
        ({"energy_keV": (0.0, 5.0)}, "energy_keV"),
        ({"energy_keV": (5.0, float("nan"))}, "energy_keV"),
        ({"sample_frame": "tilt4O"}, "sample_frame: 'tilt4O' is not known; known: lab, tilt40"),
    ],
)
def test_settings_that_cannot_be_are_refused(change: dict[str, object], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        LaueSettings(**change)  # type: ignore[arg-type]


def test_a_band_in_which_nothing_reflects_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Cu reflects nothing in 0\.5-1 keV .*: check the"):
        LaueAnalysis([material("Cu")], CALIBRATION, settings=LaueSettings(energy_keV=(0.5, 1.0)))


@pytest.mark.parametrize(
    ("band", "shown"), [((5.0, 5.05), "no spot|at most 1 spot"), ((5.0, 6.0), "at most [234] spots")]
)
def test_a_band_in_which_too_few_spots_reach_the_detector_is_refused(
    band: tuple[float, float], shown: str
) -> None:
    words = rf"Cu puts ({shown}) on the detector between .* keV, a crystal needs 5: check energy band"
    with pytest.raises(ValueError, match=words):
        LaueAnalysis([material("Cu")], CALIBRATION, settings=LaueSettings(energy_keV=band))


def test_a_detector_that_is_masked_altogether_is_refused() -> None:
    nothing = DetectorArea.of(CALIBRATION, np.ones(CALIBRATION.shape, dtype=bool))
    with pytest.raises(ValueError, match=r"Cu puts no spot on the detector .* calibration and mask"):
        LaueAnalysis([material("Cu")], CALIBRATION, nothing)


def test_calibrations_that_differ_have_other_hashes() -> None:
    changes = {"dd_mm": 79.613, "xcen_px": 1.0, "ycen_px": 1.0, "xbet_deg": 0.0, "xgam_deg": 0.0}
    hashes = {calibration_hash(CALIBRATION.with_parameters(**{k: v})) for k, v in changes.items()}
    hashes |= {calibration_hash(replace(CALIBRATION, pixel_size_mm=0.07))}
    hashes |= {calibration_hash(replace(CALIBRATION, shape=(2016, 2018)))}
    assert len(hashes) == 7
    assert calibration_hash(CALIBRATION) not in hashes
    assert calibration_hash(replace(CALIBRATION)) == calibration_hash(CALIBRATION)


def test_masks(tmp_path: Path) -> None:
    path = tmp_path / "mask.npy"
    pixels = np.zeros((30, 40), dtype=np.uint8)
    pixels[3, 5] = 7
    np.save(path, pixels)
    mask = read_mask(path, (30, 40))
    assert (mask.dtype, mask.sum(), bool(mask[3, 5])) == (np.dtype(bool), 1, True)
    with pytest.raises(ValueError, match=r"mask.npy: mask of shape \(30, 40\) does not fit"):
        read_mask(path, (40, 30))
    with pytest.raises((OSError, ValueError), match="nowhere"):
        read_mask(tmp_path / "nowhere.npy", (40, 30))
    with pytest.raises((OSError, ValueError), match="nowhere"):
        read_mask(tmp_path / "nowhere.tif", (40, 30))


def pipeline(folder: Path, **changes: object) -> LauePipeline:
    det = folder / "c.det"
    write_det(det, CALIBRATION)
    config = Config(materials=("Cu",), geometry=str(det), **changes)  # type: ignore[arg-type]
    return build(config, StreamContext("laue", "hash"))


def frame(number: int, pixels: np.ndarray) -> Frame:
    return Frame(FrameKey("laue", "uid", number, ""), PlainImage(pixels))


def test_the_pipeline_fails_one_frame_and_goes_on(tmp_path: Path) -> None:
    there = pipeline(tmp_path)
    there.warm()
    good = image("Cu", 3, 1)
    first, bad, second = there.process([frame(1, good), frame(2, good[:100]), frame(3, good)])
    assert isinstance(bad, Failure)
    assert bad.key.frame == 2
    assert "frame 2 of laue has 100 rows" in bad.reason
    assert isinstance(first, LaueResult)
    assert isinstance(second, LaueResult)
    assert first.crystals == second.crystals
    assert len(first.crystals) == 3
    assert first.provenance.config_hash == "hash"
    assert first.provenance.calibration_hash == calibration_hash(CALIBRATION)
    assert first.peaks.numpy().shape == (first.n_peaks, 4)


def test_reusing_neighbours_finds_the_same_and_what_is_new(tmp_path: Path) -> None:
    plain, reusing = pipeline(tmp_path), pipeline(tmp_path, reuse_neighbours=True)
    frames = [frame(n, image("Cu", 3, seed)) for n, seed in enumerate((1, 1, 2, 1))]
    for one, other in zip(plain.process(frames), reusing.process(frames), strict=True):
        assert isinstance(one, LaueResult)
        assert isinstance(other, LaueResult)
        assert len(one.crystals) == len(other.crystals) == 3
        for a in one.crystals:
            between = [
                rotations.misorientation_deg(a.quaternion, b.quaternion, material("Cu").proper_point_group)
                for b in other.crystals
            ]
            assert min(between) < 0.01


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"materials": ()}, "streams.laue.pipeline.materials: expected at least one"),
        ({"materials": ("Unobtainium",)}, "streams.laue.pipeline.materials: .*Unobtainium"),
        ({"geometry": "/nowhere/c.det"}, "streams.laue.pipeline.geometry: .*nowhere"),
        ({"mask": "/nowhere/mask.npy"}, "streams.laue.pipeline.mask: .*nowhere"),
        ({"energy_keV": (22.0, 5.0)}, "streams.laue.pipeline.energy_keV"),
        ({"sample_frame": "tilted"}, "streams.laue.pipeline.sample_frame: 'tilted'"),
        ({"match_radius_px": 0.0}, "streams.laue.pipeline.match_radius_px"),
        ({"max_false_probability": 2.0}, "streams.laue.pipeline.max_false_probability"),
        ({"threshold_sigma": -1.0}, "streams.laue.pipeline.threshold_sigma"),
    ],
)
def test_a_wrong_key_is_named(tmp_path: Path, change: dict[str, object], complaint: str) -> None:
    write_det(tmp_path / "c.det", CALIBRATION)
    config = Config(**{"materials": ("Cu",), "geometry": str(tmp_path / "c.det"), **change})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=complaint):
        build(config, StreamContext("laue", "hash"))


def test_another_detector_is_another_analysis() -> None:
    far = Calibration(250.0, 740.0, 830.0, -1.2, 0.3, 0.172, (1679, 1475), "PILATUS")
    there = LaueAnalysis(
        [material("Ti")], far, settings=LaueSettings(indexing=IndexingParameters(max_crystals=1))
    )
    truths = random_turns(2, seed=1)
    found = there.analyse_peaks(simulated("Ti", truths, seed=1, calibration=far).xy_px)
    assert len(found.crystals) == 1
    assert indexer("Ti").phases[0].material is there.phases[0].material

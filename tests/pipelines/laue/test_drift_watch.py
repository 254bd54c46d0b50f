"""From indexed frames to the alarm of a drift watch: what a worker measures, what follows from it."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import msgspec
import numpy as np
import pytest
from testkit.laue import AREA, CALIBRATION, material, phase, random_turns

from daemon.flow.watching import Watching
from grainwatch.config import ConfigError, convert
from grainwatch.messages import (
    ArrayData,
    DriftObservation,
    DriftReport,
    FrameKey,
    LaueResult,
    ModelInfo,
    Provenance,
    decode,
    encode,
)
from pipelines.laue.analysis import LaueAnalysis
from pipelines.laue.calibration_fit import Geometry, vector_of, with_vector
from pipelines.laue.drift import observe
from pipelines.laue.drift_watch import UNSEEN, DriftTable, ReferenceWatch, observation_of
from pipelines.laue.forward import simulate_pattern, simulate_spots
from pipelines.laue.indexing.refine import depth_shift
from pipelines.laue.pipeline import Config, peak_array

STILL = np.zeros(5)
TABLE = DriftTable(material="Ge")


@cache
def analysis() -> LaueAnalysis:
    return LaueAnalysis([material("Cu"), material("Ge")], CALIBRATION, AREA)


def result_of(xy: np.ndarray, frame: int, **changes: object) -> LaueResult:
    """What the pipeline answers, without the image."""
    found = analysis().analyse_peaks(xy)
    result = LaueResult(
        key=FrameKey("laue", "a" * 32, frame),
        provenance=Provenance(ModelInfo("classical", "1"), analysis().calibration_hash),
        n_peaks=len(xy),
        peaks=peak_array(found),
        crystals=found.crystals,
        drift=observation_of(found, CALIBRATION, analysis().phases, 1, TABLE.min_spots),
    )
    return msgspec.structs.replace(result, **changes) if changes else result


def frames(seed: int) -> Callable[[np.ndarray], np.ndarray]:
    """A germanium substrate under a copper grain, on a detector that may move."""
    turns = random_turns(2, seed)
    ubs = np.array([t @ phase(name).material.B0 for t, name in zip(turns, ("Ge", "Cu"), strict=True)])
    rng = np.random.default_rng(seed)

    def frame(move: np.ndarray) -> np.ndarray:
        where = with_vector(CALIBRATION, vector_of(CALIBRATION) + move)
        lists = [phase(name).scene.reflections for name in ("Ge", "Cu")]
        return simulate_pattern(lists, ubs, where, AREA, rng).xy_px

    return frame


def fed(watch: ReferenceWatch, results: list[LaueResult]) -> tuple[list[LaueResult], list[DriftReport]]:
    out, reports = [], []
    for result in results:
        published, said = watch.take(result)
        out.append(published)
        reports += said
    return out, reports


def test_a_frame_says_how_far_the_detector_moved() -> None:
    frame = frames(1)
    moves = [STILL, np.array([0.15, 1.5, -1.0, 0.0, 0.0]), np.array([0.0, -3.0, 2.0, 0.0, 0.0])]
    for number, move in enumerate(moves):
        result = result_of(frame(move), number)
        seen = result.drift
        assert seen is not None
        assert seen.material == "Ge"
        assert np.all(
            np.abs(np.array(seen.change) - move[:3]) < 4.5 * np.array(seen.sigma) + 0.02 * np.abs(move[:3])
        )
        assert decode(encode(result)).drift == seen
        assert math.sqrt(seen.square_sum_px2 / seen.freedom) == pytest.approx(0.2, rel=0.25)


def test_what_a_frame_says_is_what_the_fit_says() -> None:
    """Chosen crystal, spots and energies are right: the same as from the truth."""
    result = result_of(frames(2)(STILL), 0)
    (germanium,) = [c for c in result.crystals if c.material == "Ge"]
    xy = result.peaks.numpy()[germanium.spot_indices.numpy(), :2]
    g = germanium.hkl.numpy() @ germanium.B0.numpy().T
    q = germanium.hkl.numpy() @ germanium.UB.numpy().T
    energy = 12.398419843 * np.sum(q * q, axis=1) / (-2 * q[:, 0])
    assert np.all((energy > 4.9) & (energy < 22.2))
    turn = germanium.UB.numpy() @ np.linalg.inv(germanium.B0.numpy())
    u, _, vt = np.linalg.svd(turn)
    expected = observe(Geometry(CALIBRATION, u @ vt), g, xy, u @ vt, energy)
    assert result.drift is not None
    np.testing.assert_allclose(result.drift.change, expected.change, atol=3e-3)


def test_a_depth_of_penetration_is_no_move() -> None:
    of = material("Si")
    turn = random_turns(1, 5)[0]
    spots = simulate_spots(turn @ of.B0, phase("Si").scene.reflections, CALIBRATION, AREA)
    shift = depth_shift(spots.xy_px, spots.energy_keV, CALIBRATION.projection, CALIBRATION.dd_mm)
    rng = np.random.default_rng(5)
    g = spots.hkl @ of.B0.T
    worst = {True: 0.0, False: 0.0}
    for _ in range(20):
        # Half of the spots are too weak in each frame: others every time.
        seen = rng.random(len(g)) < 0.5
        xy = (spots.xy_px + 0.03 * shift + rng.normal(0, 0.05, spots.xy_px.shape))[seen]
        for with_energy in worst:
            energy = spots.energy_keV[seen] if with_energy else None
            o = observe(Geometry(CALIBRATION, turn), g[seen], xy, turn, energy)
            z = np.linalg.solve(np.linalg.cholesky(o.unit_covariance) * 0.05, o.change)
            worst[with_energy] = max(worst[with_energy], float(np.linalg.norm(z)))
    assert worst[True] < 5.0 < worst[False]


def test_an_alarm_comes_when_theory_says_and_stays() -> None:
    frame = frames(3)
    watch = ReferenceWatch(TABLE)
    results, reports = fed(watch, [result_of(frame(STILL), n) for n in range(30)])
    assert not any(r.flags for r in results)
    assert [(r.state, r.frames) for r in reports] == [
        ("still", 1),
        ("still", 10),
        ("still", 20),
        ("still", 30),
    ]
    assert "still over 30 frames of Ge" in watch.text
    assert not watch.alarm

    move = np.array([0.0, 0.5, 0.0, 0.0, 0.0])
    unit = unit_covariance(results[0])
    variance = np.mean([r.drift.square_sum_px2 / r.drift.freedom for r in results if r.drift])
    size = float(np.sqrt(move[:3] @ np.linalg.solve(unit * variance * (1 + 1 / 30), move[:3])))
    limit = reports[-1].limit
    expected = math.ceil(math.log(1 - limit / size) / math.log(1 - TABLE.memory))
    assert 2 <= expected <= 12
    moved, reports = fed(watch, [result_of(frame(move), n) for n in range(30, 60)])
    flagged = [r.key.frame for r in moved if r.flags == ("detector_moved",)]
    assert abs(flagged[0] - (30 + expected - 1)) <= 2
    assert flagged == list(range(flagged[0], 60))
    first = reports[0]
    assert (first.state, first.frame, first.alarm_frame) == ("moved", flagged[0], flagged[0])
    assert first.flags == ("detector_moved",)
    last = reports[-1]
    # A first frame that was not yet suspect may lie in the baseline.
    assert abs(last.change[1] - 0.5) < 4 * last.sigma[1] + 0.5 / 30
    assert last.text == watch.text
    assert f"detector moved, seen at frame {flagged[0]} of series aaaaaaaa" in watch.text
    assert "grainwatch recalibrate" in watch.text
    again = decode(encode(last))
    assert again == last


def unit_covariance(result: LaueResult) -> np.ndarray:
    assert result.drift is not None
    a, b, c, d, e, f = result.drift.covariance
    return np.array([[a, b, c], [b, d, e], [c, e, f]])


def synthetic(frame: int, rng: np.random.Generator, wild: float = 0.0, **changes: object) -> LaueResult:
    """A result whose observation is that of a detector at rest."""
    x, y, z = (0.05 * rng.standard_normal(3)).tolist()
    seen = DriftObservation("Ge", (x + wild, y, z), (1.0, 0.0, 0.0, 1.0, 0.0, 1.0), 0.05**2 * 200, 200)
    base = LaueResult(
        key=FrameKey("laue", "b" * 32, frame),
        provenance=Provenance(ModelInfo("classical", "1"), "one"),
        n_peaks=0,
        peaks=ArrayData.of(np.zeros((0, 4)), "<f4"),
        drift=seen,
    )
    return msgspec.structs.replace(base, **changes) if changes else base


def test_one_wild_frame_is_no_drift_and_four_are() -> None:
    rng = np.random.default_rng(6)
    alarms = 0
    for _ in range(100):
        watch = ReferenceWatch(TABLE)
        fed(watch, [synthetic(n, rng) for n in range(20)])
        fed(watch, [synthetic(20, rng, wild=25.0), *(synthetic(n, rng) for n in range(21, 40))])
        alarms += watch.alarm
    assert alarms <= 4
    watch = ReferenceWatch(TABLE)
    fed(watch, [synthetic(n, rng) for n in range(40)])
    fed(watch, [synthetic(n, rng, wild=25.0) for n in range(40, 44)])
    assert watch.alarm


def test_a_crystal_that_is_not_seen_any_more_is_said_but_is_no_alarm() -> None:
    rng = np.random.default_rng(7)
    watch = ReferenceWatch(TABLE)
    assert "no Ge crystal yet" in watch.text
    _, reports = fed(watch, [synthetic(n, rng, drift=None) for n in range(2 * UNSEEN)])
    assert reports == []
    fed(watch, [synthetic(n, rng) for n in range(15)])
    results, reports = fed(watch, [synthetic(n, rng, drift=None) for n in range(15, 15 + 2 * UNSEEN)])
    assert [(r.state, r.unseen, r.frames) for r in reports] == [("unseen", UNSEEN, 15)]
    assert f"no Ge crystal in the last {2 * UNSEEN} frames, after 15 frames" in watch.text
    assert not any(r.flags for r in results)
    _, reports = fed(watch, [synthetic(99, rng)])
    assert [r.state for r in reports] == ["still"]


def test_another_calibration_begins_anew_and_a_second_channel_is_left_out() -> None:
    rng = np.random.default_rng(8)
    watch = ReferenceWatch(TABLE)
    fed(watch, [synthetic(n, rng) for n in range(30)])
    other = FrameKey("laue", "b" * 32, 30, "threshold_2")
    assert fed(watch, [synthetic(30, rng, key=other, wild=9.0)] * 9)[1] == []
    fed(watch, [synthetic(n, rng, wild=25.0) for n in range(31, 36)])
    assert watch.alarm
    assert fed(watch, [synthetic(36, rng, key=other)])[0][0].flags == ("detector_moved",)
    changed = Provenance(ModelInfo("classical", "1"), "two")
    results, reports = fed(watch, [synthetic(37, rng, wild=25.0, provenance=changed)])
    assert not watch.alarm
    assert results[0].flags == ()
    assert (reports[0].frames, reports[0].calibration_hash) == (1, "two")


def test_it_goes_on_when_a_new_configuration_watches_for_the_same() -> None:
    rng = np.random.default_rng(9)
    running = Watching("laue", ReferenceWatch(TABLE))
    for number in range(3):
        running.take(synthetic(number, rng))
    assert running.followed_by(Watching("laue", ReferenceWatch(TABLE))) is running
    for other in (None, ReferenceWatch(DriftTable(material="Si"))):
        follows = running.followed_by(Watching("laue", other))
        assert follows is not running
        assert "Ge" not in follows.text


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"material": "Ge", "memory": 0.0}, "drift: memory 0: expected 0.01 to 1"),
        ({"material": "Ge", "frames_between_false_alarms": 3.0}, "expected 10 to 1e9"),
        ({"material": "Ge", "min_spots": 4}, "min_spots: expected 10 or more, got 4"),
        ({"material": "Ge", "jitter": [0.0, -1.0, 0.0]}, "jitter: expected three numbers"),
        ({"materials": "Ge"}, "did you mean material?"),
    ],
)
def test_a_table_that_cannot_be_is_refused_by_name(table: dict[str, object], words: str) -> None:
    whole = {"materials": ["Ge"], "geometry": "lab.det", "drift": table}
    with pytest.raises(ConfigError) as caught:
        convert(whole, Config, "lab.toml: streams.laue.pipeline")
    assert words in str(caught.value)
    assert "streams.laue.pipeline.drift" in str(caught.value)

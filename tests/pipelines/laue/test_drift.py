"""The drift watch: its false alarms are as rare as asked for, and simulated drifts are found."""

from __future__ import annotations

import numpy as np
import pytest
from testkit.laue import AREA, CALIBRATION, phase, random_turns, turn_about

from pipelines.laue.calibration_fit import Geometry, vector_of, with_vector
from pipelines.laue.drift import (
    DriftWatch,
    Observation,
    observe,
)
from pipelines.laue.forward import simulate_spots

NOISE_PX = 0.2


class Stream:
    """Frames of one crystal on a detector that may move."""

    def __init__(self, seed: int) -> None:
        of = phase("Ge")
        self.of = of
        self.turn = random_turns(1, seed)[0]
        self.rng = np.random.default_rng(seed)
        self.reference = Geometry(CALIBRATION, self.turn)

    def frame(self, move: np.ndarray | None = None, turn: np.ndarray | None = None) -> Observation:
        where = CALIBRATION if move is None else with_vector(CALIBRATION, vector_of(CALIBRATION) + move)
        rotation = self.turn if turn is None else turn
        spots = simulate_spots(rotation @ self.of.material.B0, self.of.scene.reflections, where, AREA)
        xy = spots.xy_px + self.rng.normal(0.0, NOISE_PX, spots.xy_px.shape)
        # The orientation comes from an indexer: a little off.
        told = turn_about([1.0, 2.0, -1.0], 0.02) @ rotation
        return observe(self.reference, spots.hkl @ self.of.material.B0.T, xy, told)


def test_an_observation_is_the_move_whatever_the_crystal_does() -> None:
    stream = Stream(0)
    move = np.array([0.05, 0.6, -0.4, 0.0, 0.0])
    for turn in (stream.turn, random_turns(1, 99)[0]):
        seen = [stream.frame(move, turn) for _ in range(150)]
        variance = sum(s.square_sum_px2 for s in seen) / sum(s.freedom for s in seen)
        assert variance == pytest.approx(NOISE_PX**2, rel=0.05)
        lower = [np.linalg.cholesky(s.unit_covariance * variance) for s in seen]
        z = np.array([np.linalg.solve(c, s.change - move[:3]) for c, s in zip(lower, seen, strict=True)])
        assert np.all(np.abs(z.mean(0)) < 4 / np.sqrt(150))
        assert 0.9 < z.std() < 1.1


def test_wrong_spots_do_not_look_like_a_move() -> None:
    stream = Stream(1)
    spots = simulate_spots(
        stream.turn @ stream.of.material.B0, stream.of.scene.reflections, CALIBRATION, AREA
    )
    xy = spots.xy_px + stream.rng.normal(0.0, NOISE_PX, spots.xy_px.shape)
    xy[::15] += 3.0
    seen = observe(stream.reference, spots.hkl @ stream.of.material.B0.T, xy, stream.turn)
    sigma = np.sqrt(np.diag(seen.unit_covariance)) * NOISE_PX
    assert np.all(np.abs(seen.change) < 4 * sigma)


def still(rng: np.random.Generator, covariance: np.ndarray, lower: np.ndarray) -> Observation:
    freedom = 160
    return Observation(
        NOISE_PX * lower @ rng.standard_normal(3),
        covariance,
        NOISE_PX**2 * float(rng.chisquare(freedom)),
        freedom,
    )


def test_false_alarms_are_as_rare_as_asked_for() -> None:
    # Many streams without drift, with the covariance of a real geometry: run lengths average what was asked.
    covariance = Stream(2).frame().unit_covariance
    lower = np.linalg.cholesky(covariance)
    asked = 150.0
    rng = np.random.default_rng(3)
    lengths = []
    for _ in range(150):
        watch = DriftWatch(asked)
        while not (now := watch.update(still(rng, covariance, lower))).alarm:
            pass
        lengths.append(now.alarm_frame)
    # Run lengths spread about as much as their mean: 150 of them give it to 8 %.
    assert np.mean(lengths) == pytest.approx(asked, rel=0.25)


def test_a_long_still_stream_is_quiet() -> None:
    covariance = Stream(2).frame().unit_covariance
    lower = np.linalg.cholesky(covariance)
    rng = np.random.default_rng(4)
    watch = DriftWatch(1e6)
    for _ in range(5000):
        now = watch.update(still(rng, covariance, lower))
    assert not now.alarm
    assert now.alarm_frame == -1
    assert np.all(np.abs(now.change) < 4.5 * now.sigma)


def test_a_slow_drift_is_found_and_its_size_told() -> None:
    stream = Stream(5)
    watch = DriftWatch(1e5)
    rate = np.array([0.0, 0.01, -0.01, 0.0, 0.0])  # px a frame
    for _ in range(100):
        assert not watch.update(stream.frame()).alarm
    found = -1
    for n in range(200):
        now = watch.update(stream.frame(rate * n))
        if now.alarm and found < 0:
            found = n
    assert 0 <= found < 60  # 0.6 px; one frame alone knows xcen to 0.07 px
    assert now.alarm_frame == 100 + found
    # The mean of the last 19 frames lags by 9 of them.
    truth = rate[:3] * (199 - 9)
    assert np.all(np.abs(now.change - truth) < 5 * now.sigma + 0.1 * np.abs(truth) + 1e-3)


def test_a_jump_is_found_at_once() -> None:
    stream = Stream(6)
    watch = DriftWatch(1e5)
    for _ in range(50):
        watch.update(stream.frame())
    jumped = np.array([0.1, 0.0, 0.0, 0.0, 0.0])
    alarms = [watch.update(stream.frame(jumped)).alarm for _ in range(10)]
    assert alarms[-1]
    assert alarms == sorted(alarms)  # once alarmed, it stays so


def test_jitter_that_is_no_drift_is_left_in_peace() -> None:
    stream = Stream(7)
    jitter = np.array([0.0, 0.5, 0.5])
    calm, nervous = DriftWatch(1e4, jitter=jitter), DriftWatch(1e4)
    for _ in range(150):
        seen = stream.frame(np.append(stream.rng.normal(0.0, 1.0, 3) * jitter, [0.0, 0.0]))
        now = calm.update(seen)
        then = nervous.update(seen)
    assert not now.alarm
    assert then.alarm


def test_what_cannot_be_is_refused() -> None:
    stream = Stream(8)
    spots = simulate_spots(
        stream.turn @ stream.of.material.B0, stream.of.scene.reflections, CALIBRATION, AREA
    )
    g = spots.hkl @ stream.of.material.B0.T
    with pytest.raises(ValueError, match="4 spots are too few"):
        observe(stream.reference, g[:4], spots.xy_px[:4], stream.turn)
    with pytest.raises(ValueError, match="too close"):
        observe(stream.reference, g[[0] * 10], spots.xy_px[[0] * 10], stream.turn)
    with pytest.raises(ValueError, match="memory"):
        DriftWatch(memory=0.005)
    with pytest.raises(ValueError, match="frames_between_false_alarms"):
        DriftWatch(1.0)

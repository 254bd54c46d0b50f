"""The drift watch of a stream: what a worker measures in a frame, and what follows from frame after frame.

A worker has the spots of a frame and its crystals, but sees only some of the frames; the front process
sees all results, but no phases. So the observation, small and independent of all others, is made in the
worker (`observation_of`) and travels in the result; `ReferenceWatch` strings observations together where
results meet. A detector does not go back between series, so there is one watch a stream.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np
import numpy.typing as npt

from grainwatch.config import Table
from grainwatch.messages import AnyResult, DriftObservation, DriftReport, LaueResult
from pipelines.frame import Watch
from pipelines.laue.analysis import FrameAnalysis
from pipelines.laue.calibration_fit import Geometry
from pipelines.laue.drift import Drift, DriftWatch, Observation, observe
from pipelines.laue.geometry import HC_KEV_A, Calibration
from pipelines.laue.indexing.parameters import Phase
from pipelines.laue.indexing.refine import decompose

FloatArray = npt.NDArray[np.float64]

DETECTOR_MOVED = "detector_moved"
"""Flag of the result that raised the alarm and of all after it."""

REPORT_EVERY = 10
"""Frames of the reference crystal between two reports."""

UNSEEN = 20
"""After so many frames without the crystal that is worth a word."""

_UPPER = ((0, 0), (0, 1), (0, 2), (1, 1), (1, 2), (2, 2))
_DOUBTFUL = frozenset({"shares_spots", "low_match_rate"})


class DriftTable(Table, frozen=True, kw_only=True):
    """Watch whether the detector moves, on a crystal that is in every frame.

    Attributes
    ----------
    material : str
        Of the reference crystal, a substrate for example: one of `materials`. Strain does no harm
        as long as it stays the same.
    min_spots : int
        Frames with fewer spots of the crystal do not count.
    frames_between_false_alarms : float
        Mean number of frames until a detector at rest raises an alarm by chance.
    memory : float
        Weight of the newest frame, 0.01 to 1: small finds slow and small drifts, large finds jumps
        sooner.
    jitter : (float, float, float)
        Standard deviations of dd (mm), xcen and ycen (px) from frame to frame that are no drift, of
        a beam that trembles for example.
    """

    material: str
    min_spots: int = 20
    frames_between_false_alarms: float = 1e5
    memory: float = 0.1
    jitter: tuple[float, float, float] = (0.0, 0.0, 0.0)

    def __post_init__(self) -> None:
        if self.min_spots < 10:
            raise ValueError(f"min_spots: expected 10 or more, got {self.min_spots}")
        if not all(0.0 <= value < 1e3 for value in self.jitter):
            raise ValueError(f"jitter: expected three numbers from 0, got {list(self.jitter)}")
        self.begin()  # refuses what is wrong with the others

    def begin(self) -> DriftWatch:
        """Return a watch that has seen nothing yet."""
        return DriftWatch(self.frames_between_false_alarms, self.memory, self.jitter)


def observation_of(
    found: FrameAnalysis, calibration: Calibration, phases: Sequence[Phase], phase: int, min_spots: int
) -> DriftObservation | None:
    """Measure what a frame says of the detector, on its strongest crystal of one phase.

    Returns
    -------
    DriftObservation or None
        None without such a crystal, or where its spots do not determine the change.
    """
    crystals = [
        indexed
        for indexed, crystal in zip(found.indexed, found.crystals, strict=True)
        if indexed.phase == phase and len(indexed.spots) >= min_spots and _DOUBTFUL.isdisjoint(crystal.flags)
    ]
    if not crystals:
        return None
    best = max(crystals, key=lambda crystal: len(crystal.spots))
    reflections = phases[phase].scene.reflections
    g = reflections.g[best.reflections]
    rotation = decompose(best.matrix)[0]
    # E = hc/λ with λ = −2 q_x/|q|², of the lowest order in the band.
    energy = best.orders * HC_KEV_A * np.sum(g * g, axis=1) / (-2.0 * (g @ rotation[0]))
    try:
        seen = observe(Geometry(calibration, rotation), g, found.xy_px[best.spots], rotation, energy)
    except ValueError:
        return None
    dd, x, y = seen.change.tolist()
    covariance = [float(seen.unit_covariance[index]) for index in _UPPER]
    return DriftObservation(
        material=phases[phase].material.name,
        change=(dd, x, y),
        covariance=(covariance[0], covariance[1], covariance[2], covariance[3], covariance[4], covariance[5]),
        square_sum_px2=seen.square_sum_px2,
        freedom=seen.freedom,
    )


class ReferenceWatch:
    """Follows the observations in the results of a stream; implements `pipelines.frame.Watch`.

    It begins anew with another calibration, and goes on over all other changes of a configuration. Of
    several channels it follows the first that shows the crystal, because they are the same exposures.
    """

    def __init__(self, table: DriftTable) -> None:
        self.table = table
        self._begin("")

    def _begin(self, calibration_hash: str) -> None:
        self._watch = self.table.begin()
        self._calibration_hash = calibration_hash
        self._channel: str | None = None
        self._material = self.table.material
        self._drift: Drift | None = None
        self._unseen = 0
        self._state = ""
        self._alarm_at = ("", -1)
        self._text = f"drift watch: no {self._material} crystal yet"

    @property
    def text(self) -> str:
        """What it knows, in words."""
        return self._text

    @property
    def alarm(self) -> bool:
        """Whether the detector has moved."""
        return self._state == "moved"

    def same_as(self, other: Watch) -> bool:
        """Whether another one follows the same crystal in the same way."""
        return isinstance(other, ReferenceWatch) and other.table == self.table

    def take(self, result: AnyResult) -> tuple[AnyResult, list[DriftReport]]:
        """Take a result; return it, flagged after an alarm, and a report when one is due."""
        if not isinstance(result, LaueResult):
            return result, []
        if result.provenance.calibration_hash != self._calibration_hash:
            self._begin(result.provenance.calibration_hash)
        if self._channel not in (None, result.key.channel):
            return self._flagged(result), []
        before = self._state
        if result.drift is None:
            self._unseen += 1
        else:
            self._see(result, result.drift)
        if self._drift is None:
            return result, []
        if self._drift.alarm:
            self._state = "moved"
        elif self._unseen >= UNSEEN:
            self._state = "unseen"
        elif self._unseen == 0:
            self._state = "still"
        self._text = self._words(self._drift)
        due = self._unseen == 0 and self._drift.frames % REPORT_EVERY == 0
        if due or self._state != before:
            return self._flagged(result), [self._report(result, self._drift)]
        return self._flagged(result), []

    def _see(self, result: LaueResult, drift: DriftObservation) -> None:
        self._channel, self._material, self._unseen = result.key.channel, drift.material, 0
        covariance = np.empty((3, 3))
        for (i, j), value in zip(_UPPER, drift.covariance, strict=True):
            covariance[i, j] = covariance[j, i] = value
        was = self.alarm
        self._drift = self._watch.update(
            Observation(np.array(drift.change), covariance, drift.square_sum_px2, drift.freedom)
        )
        if self._drift.alarm and not was:
            self._alarm_at = (result.key.series_uid, result.key.frame)

    def _flagged(self, result: LaueResult) -> LaueResult:
        if not self.alarm:
            return result
        return msgspec.structs.replace(result, flags=(*result.flags, DETECTOR_MOVED))

    def _report(self, result: LaueResult, drift: Drift) -> DriftReport:
        return DriftReport(
            source=result.key.source,
            series_uid=result.key.series_uid,
            frame=result.key.frame,
            channel=result.key.channel,
            material=self._material,
            calibration_hash=self._calibration_hash,
            state=self._state,
            frames=drift.frames,
            unseen=self._unseen,
            change=_three(drift.change),
            sigma=_three(drift.sigma),
            offset=_three(drift.offset),
            offset_sigma=_three(drift.offset_sigma),
            statistic=drift.statistic,
            limit=drift.limit,
            alarm_series_uid=self._alarm_at[0],
            alarm_frame=self._alarm_at[1],
            text=self._text,
            flags=(DETECTOR_MOVED,) if self.alarm else (),
        )

    def _words(self, drift: Drift) -> str:
        seen = f"{drift.frames} frame{'s' if drift.frames > 1 else ''} of {self._material}"
        (dd, x, y), (s_dd, s_x, s_y) = drift.change, drift.sigma
        numbers = (
            f"dd {dd:+.4f} +- {s_dd:.4f} mm, xcen {x:+.3f} +- {s_x:.3f} px, ycen {y:+.3f} +- {s_y:.3f} px"
        )
        if self._state == "moved":
            uid, frame = self._alarm_at
            words = f"detector moved, seen at frame {frame} of series {uid[:8]}: {numbers}"
            return f"{words}; run grainwatch recalibrate and give the daemon the new geometry"
        if self._state == "unseen":
            return (
                f"drift watch: no {self._material} crystal in the last {self._unseen} frames, after {seen}:"
                " the detector moved too far for indexing, or the crystal left the beam"
            )
        return f"detector still over {seen}: {numbers}" if drift.frames > 1 else f"drift watch: {seen}"


def _three(values: FloatArray) -> tuple[float, float, float]:
    a, b, c = (float(value) for value in values)
    return a, b, c

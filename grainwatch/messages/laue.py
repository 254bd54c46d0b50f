"""Laue diffraction: the crystals of a frame, the map of a scan, the drift of the detector."""

from __future__ import annotations

from typing import ClassVar

import msgspec
import numpy as np

from grainwatch.messages.common import ArrayData, FrameResult, Message


class Crystal(msgspec.Struct, frozen=True):
    """One crystal found in a frame.

    Attributes
    ----------
    material : str
    UB : ArrayData, (3, 3) float64, 1/angstrom without 2 pi
        q = UB @ hkl in the lab frame (x along the beam); crystal to lab, active; strain included.
    B0 : ArrayData, (3, 3) float64, 1/angstrom
        Unstrained reciprocal basis in LaueTools' convention (a* || x, c || z): UB @ inv(B0) is
        what LaueTools prints as its UB matrix.
    quaternion : tuple of 4 float
        Unit quaternion (w, x, y, z), w >= 0: Bunge passive (sample to crystal, crystal frame
        e1 || a, e3 || c*), in the fundamental zone of the material's proper point group.
    euler_deg : tuple of 3 float
        Bunge angles phi1, Phi, phi2 of the same orientation.
    strain_crystal, strain_sample : ArrayData, (3, 3) float64
        Deviatoric strain in the crystal frame (e1 || a, e3 || c*) and in the sample frame.
    strain_sigma : ArrayData, (3, 3) float64
        Standard deviations of `strain_crystal`; NaN where the strain was not refined.
    orientation_sigma_deg : float
        Root mean square standard deviation of the three rotation components.
    spots_matched, spots_expected : int
        Reflections that can hit this detector, harmonics counted once.
    match_rate, chance_match_rate : float
        spots_matched / spots_expected, and what a random orientation reaches on this frame.
    false_probability : float
        Probability that chance alone would put a crystal as good as this into this frame.
    residual_px : float
        Mean distance between measured and computed positions.
    depth_um : float
        Depth of penetration at 15 keV that the spot positions show, 0 where they show none.
    spot_indices : ArrayData, (n,) int32
        Rows of the frame's peak table that belong to this crystal.
    hkl : ArrayData, (n, 3) int16
        Lowest order in the band of each of them.
    grain_id : int
        Number in the map, -1 when not (yet) linked.
    flags : tuple of str
        "strain_not_refined" (too few spots), "unphysical_strain", "uncertain_strain",
        "shares_spots" (with a better crystal), "low_match_rate" (under 0.4: a wrong material or
        a weak crystal looks so) and "doubtful_structure" (of the material's file, see check-config).
        None of them withdraws the crystal.
    """

    material: str
    UB: ArrayData
    B0: ArrayData
    quaternion: tuple[float, float, float, float]
    euler_deg: tuple[float, float, float]
    strain_crystal: ArrayData
    strain_sample: ArrayData
    strain_sigma: ArrayData
    orientation_sigma_deg: float
    spots_matched: int
    spots_expected: int
    match_rate: float
    chance_match_rate: float
    false_probability: float
    residual_px: float
    depth_um: float
    spot_indices: ArrayData
    hkl: ArrayData
    grain_id: int = -1
    flags: tuple[str, ...] = ()


class DriftObservation(msgspec.Struct, frozen=True):
    """What one frame of the reference crystal says of the detector's position.

    Attributes
    ----------
    material : str
        Of the reference crystal.
    change : tuple of 3 float
        Of dd (mm), xcen and ycen (px) against the calibration.
    covariance : tuple of 6 float
        Of `change` for residuals of 1 px: (dd dd, dd xcen, dd ycen, xcen xcen, xcen ycen, ycen ycen).
    square_sum_px2 : float
        Of the residuals that remain.
    freedom : int
        Their number less that of the parameters: square_sum_px2 / freedom scales `covariance`.
    """

    material: str
    change: tuple[float, float, float]
    covariance: tuple[float, float, float, float, float, float]
    square_sum_px2: float
    freedom: int

    @property
    def sigma(self) -> tuple[float, float, float]:
        """Standard deviations of `change` by the residuals of this frame."""
        scale = self.square_sum_px2 / max(self.freedom, 1)
        dd, x, y = (float(np.sqrt(self.covariance[k] * scale)) for k in (0, 3, 5))
        return dd, x, y


class LaueResult(FrameResult, frozen=True, tag="grainwatch.laue/1", kw_only=True):
    """The crystals of one frame.

    `peaks` is (n, 4) float32: x_px (column), y_px (row), both from 0 at the centre of the first
    pixel, intensity above background in counts, full width at half maximum in px.
    `drift` is there when the pipeline watches a reference crystal and this frame shows it. The flag
    "detector_moved" stands on the frame that raised the alarm and on all after it.
    """

    SCHEMA: ClassVar[str] = "grainwatch.laue/1"

    n_peaks: int
    peaks: ArrayData
    crystals: tuple[Crystal, ...] = ()
    drift: DriftObservation | None = None


class MapPoint(msgspec.Struct, frozen=True):
    """What a map holds at one grid point for one crystal, best crystal first.

    `rank` 0 is the crystal whose spots are brightest together. `quaternion` as in `Crystal`;
    `strain_sample` is its (xx, yy, zz, yz, xz, xy).
    """

    grid_index: tuple[int, ...]
    frame: int
    rank: int
    material: str
    quaternion: tuple[float, float, float, float]
    grain_id: int
    match_rate: float
    false_probability: float
    residual_px: float
    strain_sample: tuple[float, float, float, float, float, float]


class Grain(msgspec.Struct, frozen=True):
    """A set of connected crystals of one map.

    `size_points` 0 says that the grain is gone. `spread_deg` is the root mean square
    misorientation of its crystals to `mean_quaternion`; `centre` is in grid units.
    """

    grain_id: int
    material: str
    size_points: int
    mean_quaternion: tuple[float, float, float, float]
    spread_deg: float
    centre: tuple[float, ...]


class MapUpdate(Message, frozen=True, tag="grainwatch.map/1", kw_only=True):
    """A delta (one frame's points and the grains they changed) or a snapshot of a map.

    Each grid point that `points` or `empty` lists is replaced as a whole. The frame's own points
    come first, best crystal first; points of a grain that a replacement split follow. `empty`
    are points that were measured and hold no crystal, `filled` counts all measured points.
    `merged` lists pairs (absorbed, into) when a point joins grains that were apart: every other
    point of the absorbed grain is now of the other one. Apply `merged` first, then the rest.
    """

    SCHEMA: ClassVar[str] = "grainwatch.map/1"

    source: str
    series_uid: str
    shape: tuple[int, ...]
    step_um: tuple[float, ...]
    kind: str  # "delta" | "snapshot"
    points: tuple[MapPoint, ...] = ()
    grains: tuple[Grain, ...] = ()
    merged: tuple[tuple[int, int], ...] = ()
    empty: tuple[tuple[int, ...], ...] = ()
    filled: int = 0


class DriftReport(Message, frozen=True, tag="grainwatch.drift/1", kw_only=True):
    """What the drift watch of a stream knows: every ten frames of its crystal, and when `state` changes.

    Attributes
    ----------
    source, series_uid, frame, channel
        The frame, as in `FrameKey`.
    material : str
        Of the reference crystal.
    calibration_hash : str
        Of the calibration that `offset` counts from.
    state : str
        "still"; "moved" after an alarm, until the watch begins anew with another calibration or a
        restart; "unseen" when no frame has shown the crystal for a while.
    frames : int
        With the crystal, since the watch began.
    unseen : int
        Frames since the last one with the crystal.
    change, sigma : tuple of 3 float
        Of dd (mm), xcen and ycen (px): the last frames against the frames before, and standard deviations.
    offset, offset_sigma : tuple of 3 float
        The frames before against the calibration.
    statistic, limit : float
        What is compared: above `limit` is an alarm.
    alarm_series_uid, alarm_frame
        Where the alarm was raised; "" and -1 without one.
    text : str
        The same in words, with what to do.
    """

    SCHEMA: ClassVar[str] = "grainwatch.drift/1"

    source: str
    series_uid: str
    frame: int
    channel: str = ""
    material: str
    calibration_hash: str
    state: str  # "still" | "moved" | "unseen"
    frames: int
    unseen: int
    change: tuple[float, float, float]
    sigma: tuple[float, float, float]
    offset: tuple[float, float, float]
    offset_sigma: tuple[float, float, float]
    statistic: float
    limit: float
    alarm_series_uid: str = ""
    alarm_frame: int = -1
    text: str = ""

"""Where a diffracted beam hits the detector, and back.

Lab frame and calibration are LaueTools': x along the beam, z towards the detector, y = z × x;
dd, xcen, ycen, xbet, xgam (LaueTools, LaueGeometry.py). The detector lies above the sample
(kf Z > 0); other geometries are refused by name at the file boundary.

Written as a pinhole camera: with camera axes v = (−u_y, u_x, u_z), detector normal
n = (0, sin xbet, cos xbet) and in-plane axes a = (1, 0, 0), b = (0, cos xbet, −sin xbet), a beam
u hits x0 = dd (a·v)/(n·v), y0 = dd (b·v)/(n·v), turned by xgam and scaled by the pixel size.
That is one 3 × 3 projective matrix P: (X, Y, 1) ~ P u.

Pixels count from 0 here (x is the column, y the row); LaueTools files count from 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Self

import numpy as np
import numpy.typing as npt

HC_KEV_A = 12.398419843320026
"""Planck constant times speed of light, keV·angstrom (CODATA, exact since 2019)."""

HC_LAUETOOLS_KEV_A = 12.398
"""The rounded value in LaueTools; for comparisons with it only."""

FloatArray = npt.NDArray[np.float64]
_BEAM = np.array([1.0, 0.0, 0.0])


@dataclass(frozen=True)
class Calibration:
    """Position and orientation of a flat detector.

    Attributes
    ----------
    dd_mm : float
        Distance from the sample to the detector plane.
    xcen_px, ycen_px : float
        Foot of the perpendicular from the sample, counted from 0.
    xbet_deg, xgam_deg : float
        Tilt of the detector normal and rotation in the detector plane.
    pixel_size_mm : float
    shape : (int, int)
        Rows, columns.
    label : str
        LaueTools' camera label ("sCMOS", "MARCCD165", ...), empty when unknown.
    """

    dd_mm: float
    xcen_px: float
    ycen_px: float
    xbet_deg: float
    xgam_deg: float
    pixel_size_mm: float
    shape: tuple[int, int]
    label: str = ""

    def __post_init__(self) -> None:
        values = (self.dd_mm, self.xcen_px, self.ycen_px, self.xbet_deg, self.xgam_deg, self.pixel_size_mm)
        if not all(math.isfinite(v) for v in values):
            raise ValueError(f"calibration holds a value that is not a number: {values}")
        if self.dd_mm <= 0 or self.pixel_size_mm <= 0:
            raise ValueError(
                f"dd ({self.dd_mm} mm) and pixel size ({self.pixel_size_mm} mm) must be positive"
            )
        if min(self.shape) <= 0:
            raise ValueError(f"detector shape {self.shape} must be positive")

    @classmethod
    def from_lauetools(
        cls,
        parameters: tuple[float, float, float, float, float],
        pixel_size_mm: float,
        shape: tuple[int, int],
        label: str = "",
    ) -> Self:
        """Read (dd, xcen, ycen, xbet, xgam) as LaueTools writes them: first pixel is 1."""
        dd, xcen, ycen, xbet, xgam = parameters
        return cls(dd, xcen - 1.0, ycen - 1.0, xbet, xgam, pixel_size_mm, shape, label)

    def to_lauetools(self) -> tuple[float, float, float, float, float]:
        """Return (dd, xcen, ycen, xbet, xgam) counted from 1."""
        return (self.dd_mm, self.xcen_px + 1.0, self.ycen_px + 1.0, self.xbet_deg, self.xgam_deg)

    def with_parameters(self, **changes: float) -> Self:
        """Return a copy with some of the parameters changed."""
        return replace(self, **changes)  # type: ignore[arg-type]

    @property
    def centre_off_middle_mm(self) -> tuple[float, float]:
        """How far (xcen, ycen) lies from the middle of the detector, along x and y."""
        rows, columns = self.shape
        return (
            (self.xcen_px - 0.5 * (columns - 1)) * self.pixel_size_mm,
            (self.ycen_px - 0.5 * (rows - 1)) * self.pixel_size_mm,
        )

    @cached_property
    def projection(self) -> FloatArray:
        """P, (3, 3): (X, Y, 1) ~ P u for a beam direction u in the lab frame; row 2 · u > 0 in front."""
        cb, sb = math.cos(math.radians(self.xbet_deg)), math.sin(math.radians(self.xbet_deg))
        cg, sg = math.cos(math.radians(self.xgam_deg)), math.sin(math.radians(self.xgam_deg))
        to_camera = np.array([[0.0, -1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
        a = np.array([1.0, 0.0, 0.0])
        b = np.array([0.0, cb, -sb])
        n = np.array([0.0, sb, cb])
        scale = self.dd_mm / self.pixel_size_mm
        rows = np.stack(
            [scale * (cg * a - sg * b) + self.xcen_px * n, scale * (sg * a + cg * b) + self.ycen_px * n, n]
        )
        return np.asarray(rows @ to_camera)

    @cached_property
    def back_projection(self) -> FloatArray:
        """Inverse of `projection`, (3, 3): u ~ P⁻¹ (X, Y, 1)."""
        return np.asarray(np.linalg.inv(self.projection), dtype=np.float64)

    def pixels(self, u: npt.ArrayLike) -> FloatArray:
        """Return where beams hit the detector plane.

        Parameters
        ----------
        u : (..., 3) array
            Directions in the lab frame, any length.

        Returns
        -------
        (..., 2) array
            x (column) and y (row), px from 0; NaN where the beam leaves away from the detector.
        """
        h = np.asarray(u, dtype=np.float64) @ self.projection.T
        depth = h[..., 2:3]
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(depth > 0, h[..., :2] / depth, np.nan)

    def directions(self, xy_px: npt.ArrayLike) -> FloatArray:
        """Return unit beam directions u, (..., 3), of positions (..., 2) in px from 0."""
        xy = np.asarray(xy_px, dtype=np.float64)
        u = xy @ self.back_projection[:, :2].T + self.back_projection[:, 2]
        return np.asarray(u / np.linalg.norm(u, axis=-1, keepdims=True))

    def scattering_vectors(self, xy_px: npt.ArrayLike) -> FloatArray:
        """Return unit scattering vectors q̂ = (u − ki)/|u − ki|, (..., 3), of positions (..., 2)."""
        q = self.directions(xy_px) - _BEAM
        return np.asarray(q / np.linalg.norm(q, axis=-1, keepdims=True))


@dataclass(frozen=True, eq=False)
class DetectorArea:
    """Which pixels can see a spot: outline, gaps and masked pixels.

    Attributes
    ----------
    usable : (rows, columns) uint8 array, C order
        1 where a spot can be seen.
    """

    usable: npt.NDArray[np.uint8] = field(repr=False)

    @classmethod
    def rectangle(cls, shape: tuple[int, int]) -> Self:
        """Return the whole rectangle of a detector."""
        return cls(np.ones(shape, dtype=np.uint8))

    @classmethod
    def of(cls, calibration: Calibration, mask: npt.NDArray[np.bool_] | None = None) -> Self:
        """Return the outline that belongs to the camera label, less the masked pixels.

        Parameters
        ----------
        calibration : Calibration
            "MARCCD165" is a disc of 165 mm; every other camera is its rectangle.
        mask : (rows, columns) bool array, optional
            True where a pixel is dead or lies in a gap.

        Raises
        ------
        ValueError
            If the mask is for another detector.
        """
        usable = np.ones(calibration.shape, dtype=np.uint8)
        diameter_mm = _DISC_MM.get(calibration.label)
        if diameter_mm is not None:
            rows, columns = calibration.shape
            y = np.arange(rows)[:, None] - (rows - 1) / 2
            x = np.arange(columns)[None, :] - (columns - 1) / 2
            usable[x * x + y * y > (0.5 * diameter_mm / calibration.pixel_size_mm) ** 2] = 0
        if mask is not None:
            if mask.shape != calibration.shape:
                raise ValueError(
                    f"mask of shape {mask.shape} does not fit a detector of shape {calibration.shape}"
                )
            usable[mask] = 0
        return cls(usable)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows, columns."""
        rows, columns = self.usable.shape
        return int(rows), int(columns)

    def contains(self, xy_px: npt.ArrayLike) -> npt.NDArray[np.bool_]:
        """Return which positions (..., 2) lie on a usable pixel; NaN lies on none."""
        xy = np.asarray(xy_px, dtype=np.float64)
        rows, columns = self.shape
        with np.errstate(invalid="ignore"):
            inside = (
                (xy[..., 0] > -0.5)
                & (xy[..., 0] < columns - 0.5)
                & (xy[..., 1] > -0.5)
                & (xy[..., 1] < rows - 0.5)
            )
        column = np.where(inside, xy[..., 0] + 0.5, 0).astype(np.intp)
        row = np.where(inside, xy[..., 1] + 0.5, 0).astype(np.intp)
        return np.asarray(inside & (self.usable[row, column] != 0))


_DISC_MM = {"MARCCD165": 165.0}


def two_theta_chi_deg(u: npt.ArrayLike) -> tuple[FloatArray, FloatArray]:
    """Return LaueTools' angles of unit beam directions (..., 3).

    2θ = acos(u_x), χ = atan(u_y / u_z), degrees, from u = (cos 2θ, sin 2θ sin χ, sin 2θ cos χ).
    """
    v = np.asarray(u, dtype=np.float64)
    two_theta = np.degrees(np.arctan2(np.hypot(v[..., 1], v[..., 2]), v[..., 0]))
    return two_theta, np.degrees(np.arctan2(v[..., 1], v[..., 2]))


def directions_of_angles(two_theta_deg: npt.ArrayLike, chi_deg: npt.ArrayLike) -> FloatArray:
    """Return unit beam directions (..., 3) of LaueTools' angles: inverse of `two_theta_chi_deg`."""
    tt, chi = np.radians(np.asarray(two_theta_deg)), np.radians(np.asarray(chi_deg))
    return np.stack([np.cos(tt), np.sin(tt) * np.sin(chi), np.sin(tt) * np.cos(chi)], axis=-1)


def beams_of(q: npt.ArrayLike) -> tuple[FloatArray, FloatArray]:
    """Return diffracted beams and wavelengths of scattering vectors.

    Parameters
    ----------
    q : (..., 3) array, 1/angstrom without 2 pi
        kf − ki with |k| = 1/λ.

    Returns
    -------
    u : (..., 3) array
        Unit kf = ki + λ q; NaN where q_x >= 0, which cannot reflect.
    wavelength_A : (...) array
        λ = −2 q_x / |q|² (Bragg); NaN likewise.
    """
    v = np.asarray(q, dtype=np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        wavelength = np.where(v[..., 0] < 0, -2.0 * v[..., 0] / np.einsum("...i,...i->...", v, v), np.nan)
    return _BEAM + wavelength[..., None] * v, wavelength

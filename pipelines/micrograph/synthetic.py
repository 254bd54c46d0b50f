"""Synthetic SEM micrographs of two-phase structures whose process condition is known.

They are synthetic, and everything that holds for them is said of synthetic images only: no micrographs
with cooling rates are free. The law has the form that continuous cooling of steel is described by, a size
that falls as a power of the cooling rate and a fraction that falls with its logarithm,

    size(r) = size_um · r^−exponent,    fraction(r) = fraction − slope · ln r,    r in K/s,

its constants being close to the means that Noguchi & Inoue (Phys. Rev. E 104, 025302, 2021, Tables I and II)
measured in low-carbon steel from 1 to 30 K/s. They describe no material. The size is the mean free path of
the bright phase, as `pipelines.micrograph.morphology` measures it.

Both are exact for the structures below as sampled by pixels, because the chance that two neighbouring
pixels differ is known (lag of one pixel; the mean free path is twice the fraction over that chance):

- a Gaussian field with correlation ρ cut at t: 4 T(t, √((1 − ρ)/(1 + ρ))), T being Owen's function
  (Owen, Ann. Math. Stat. 27, 1075, 1956);
- a Boolean model of discs with intensity λ: 2 (f − f² e^{λ E[overlap of a disc and its shifted self]}), f
  being the uncovered fraction e^{−λ E[area]} (Chiu, Stoyan, Kendall & Mecke, Stochastic Geometry and its
  Applications, 2013, section 3.1).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Final, Literal, get_args

import numpy as np
import numpy.typing as npt
from scipy import fft, ndimage, optimize, special

from pipelines.micrograph.morphology import patch_morphology

ByteImage = npt.NDArray[np.uint8]
BoolImage = npt.NDArray[np.bool_]
FloatImage = npt.NDArray[np.float32]

Structure = Literal["islands", "labyrinth", "particles"]
STRUCTURES: Final[tuple[Structure, ...]] = get_args(Structure)
"""What phases look like: smooth islands (white noise through a Gaussian, cut at a level), a labyrinth as of
spinodal decomposition (waves of one length, cut at a level: Cahn, J. Chem. Phys. 42, 93, 1965), dark discs
at random places in a bright matrix."""

_RING: Final = 0.15
"""Relative half-width of the wave numbers of a labyrinth."""
_RADII: Final = 0.4
"""Relative half-width of the radii of discs, which are uniform."""
_SIZES_PX: Final = (3.0, 200.0)
"""Mean free paths that pixels can show."""
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(16)


def checked_structure(name: str) -> Structure:
    """Return the name of a structure.

    Raises
    ------
    ValueError
        If it is none.
    """
    for structure in STRUCTURES:
        if structure == name:
            return structure
    raise ValueError(f"structure {name!r}: expected one of {', '.join(STRUCTURES)}")


@dataclass(frozen=True)
class Condition:
    """How a micrograph came about.

    Attributes
    ----------
    ln_cooling_rate : float
        Of the cooling rate in K/s.
    structure : str
        One of `STRUCTURES`.
    """

    ln_cooling_rate: float
    structure: Structure = "islands"

    def __post_init__(self) -> None:
        if not np.isfinite(self.ln_cooling_rate):
            raise ValueError(f"ln_cooling_rate {self.ln_cooling_rate}: expected a number")
        checked_structure(self.structure)


@dataclass(frozen=True)
class ProcessLaw:
    """What a cooling rate makes of a structure; see the head of this module.

    Attributes
    ----------
    size_um, exponent : float
        Mean free path of the bright phase at 1 K/s, and the power by which it falls.
    fraction, slope : float
        Share of the bright phase at 1 K/s, and what it loses with each unit of ln(rate).
    size_scatter : float
        Relative standard deviation from one image to the next (log-normal, its mean as the law says).
    fraction_scatter : float
        Standard deviation from one image to the next (normal).
    """

    size_um: float = 6.0
    exponent: float = 0.2
    fraction: float = 0.73
    slope: float = 0.03
    size_scatter: float = 0.05
    fraction_scatter: float = 0.01

    def mean_size_um(self, ln_cooling_rate: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """Return the mean free path of the bright phase."""
        return self.size_um * np.exp(-self.exponent * np.asarray(ln_cooling_rate, dtype=np.float64))

    def mean_fraction(self, ln_cooling_rate: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """Return the share of the bright phase."""
        return self.fraction - self.slope * np.asarray(ln_cooling_rate, dtype=np.float64)

    def draw(self, ln_cooling_rate: float, rng: np.random.Generator) -> tuple[float, float]:
        """Return size in um and fraction of one image."""
        # A log-normal factor of mean 1; the fraction is kept off 0 and 1, where there is no structure.
        spread = np.sqrt(np.log1p(self.size_scatter**2))
        size = float(
            self.mean_size_um(ln_cooling_rate) * np.exp(spread * rng.standard_normal() - spread**2 / 2)
        )
        fraction = float(self.mean_fraction(ln_cooling_rate)) + self.fraction_scatter * rng.standard_normal()
        return size, float(np.clip(fraction, 0.02, 0.98))


@dataclass(frozen=True)
class Imaging:
    """How an SEM shows a structure; where two numbers are given, each image draws its own between them.

    Attributes
    ----------
    dark, bright : (float, float)
        Signal of the phases, a share of full scale.
    texture : float
        Standard deviation of the signal inside a phase, at about 3 px, as from roughness; full scale 1.
    blur_px : (float, float)
        Standard deviation of the beam.
    shading : float
        Largest relative loss or gain of signal at an edge of the image, linear and quadratic in position.
    electrons : (float, float)
        Detected for each pixel at full scale: shot noise is Poisson's.
    read_noise, line_noise : float
        Standard deviations for each pixel and for each scan line; full scale 1.
    """

    dark: tuple[float, float] = (0.22, 0.34)
    bright: tuple[float, float] = (0.62, 0.78)
    texture: float = 0.012
    blur_px: tuple[float, float] = (0.6, 1.2)
    shading: float = 0.06
    electrons: tuple[float, float] = (300.0, 900.0)
    read_noise: float = 0.006
    line_noise: float = 0.004

    def expose(self, bright: BoolImage, rng: np.random.Generator) -> ByteImage:
        """Return the (rows, columns) image of a structure, 8-bit."""
        rows, columns = bright.shape
        low, high = rng.uniform(*self.dark), rng.uniform(*self.bright)
        signal = np.where(bright, np.float32(high), np.float32(low))
        if self.texture > 0.0:
            # A coarse grid, enlarged: white noise through a filter would cost more than all the rest.
            coarse = rng.standard_normal((rows // 3 + 3, columns // 3 + 3), dtype=np.float32)
            signal += np.float32(self.texture) * _enlarged(coarse, (rows, columns))
        signal = ndimage.gaussian_filter(signal, rng.uniform(*self.blur_px), truncate=3.0, mode="nearest")
        tilt = rng.uniform(-0.5, 0.5, 4) * self.shading
        y, x = np.linspace(-1.0, 1.0, rows), np.linspace(-1.0, 1.0, columns)
        signal *= (1.0 + tilt[0] * y + tilt[1] * y**2).astype(np.float32)[:, None]
        signal *= (1.0 + tilt[2] * x + tilt[3] * x**2).astype(np.float32)
        electrons = rng.uniform(*self.electrons)
        counted = rng.poisson(np.maximum(signal, 0.0) * electrons).astype(np.float32)
        seen: FloatImage = counted / np.float32(electrons)
        seen += np.float32(self.read_noise) * rng.standard_normal(seen.shape, dtype=np.float32)
        seen += np.float32(self.line_noise) * rng.standard_normal((rows, 1), dtype=np.float32)
        image: ByteImage = np.clip(np.rint(seen * 255.0), 0.0, 255.0).astype(np.uint8)
        return image


@dataclass(frozen=True, eq=False)
class SyntheticSample:
    """A synthetic micrograph and what is true of it.

    Attributes
    ----------
    image : (rows, columns) uint8
    condition : Condition
    fraction : float
        Share of the bright phase in this very image, before it was exposed.
    free_path_um : float
        Mean free path of the bright phase in it; NaN if no line crosses a boundary.
    source : str
        Whose crops belong together.
    """

    image: ByteImage
    condition: Condition
    fraction: float
    free_path_um: float
    source: str


@dataclass(frozen=True)
class MicrographSimulator:
    """Draws micrographs over a range of cooling rates; number i of a seed is always the same.

    Attributes
    ----------
    ln_cooling_rates : tuple of float
        What conditions are drawn from: two or more values, each as likely; with `continuous`, uniform
        between the least and the greatest.
    continuous : bool
    structure : str
        One of `STRUCTURES`.
    shape : (int, int)
        Rows and columns.
    pixel_size_um : float
    law : ProcessLaw
    imaging : Imaging
    seed : int
    """

    ln_cooling_rates: tuple[float, ...] = (0.0, 3.4)
    continuous: bool = True
    structure: Structure = "islands"
    shape: tuple[int, int] = (512, 512)
    pixel_size_um: float = 0.25
    law: ProcessLaw = field(default_factory=ProcessLaw)
    imaging: Imaging = field(default_factory=Imaging)
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.ln_cooling_rates:
            raise ValueError("ln_cooling_rates: expected one number or more")
        if min(self.shape) < 1:
            raise ValueError(f"shape {self.shape}: expected rows and columns of 1 or more")
        if not 0.0 < self.pixel_size_um < np.inf:
            raise ValueError(f"pixel_size_um {self.pixel_size_um}: expected a number greater than 0")
        for rate in self.ln_cooling_rates:
            Condition(rate, self.structure)
            size_px = float(self.law.mean_size_um(rate)) / self.pixel_size_um
            if not _SIZES_PX[0] <= size_px <= _SIZES_PX[1]:
                raise ValueError(
                    f"ln_cooling_rate {rate:g}: structures of {size_px:.3g} px; pixels can show"
                    f" {_SIZES_PX[0]:g} to {_SIZES_PX[1]:g}: choose another rate or pixel_size_um"
                )

    def sample(self, number: int, condition: Condition | None = None) -> SyntheticSample:
        """Return micrograph `number` of this seed.

        Parameters
        ----------
        number : int
        condition : Condition, optional
            Instead of the one that is drawn.
        """
        rng = self._rng(number)
        drawn = self._draw(rng)
        given = condition or Condition(drawn, self.structure)
        size_um, fraction = self.law.draw(given.ln_cooling_rate, rng)
        size_px = float(np.clip(size_um / self.pixel_size_um, *_SIZES_PX))
        bright = two_phases(given.structure, self.shape, size_px, fraction, rng)
        measured = patch_morphology(bright[None].view(np.uint8), thresholds=np.zeros(1, dtype=np.int64))
        name = f"synthetic-{given.structure}-{self.seed}-{number}"
        if condition is not None:
            # The same number under another condition is another image.
            name += f"-{given.ln_cooling_rate!r}"
        return SyntheticSample(
            image=self.imaging.expose(bright, rng),
            condition=given,
            fraction=float(measured.fraction[0]),
            free_path_um=float(measured.free_path_px[0]) * self.pixel_size_um,
            source=name,
        )

    def condition(self, number: int) -> Condition:
        """Return what micrograph `number` shows, without making it."""
        return Condition(self._draw(self._rng(number)), self.structure)

    def samples(self, first: int, count: int) -> Iterator[SyntheticSample]:
        """Yield micrographs `first` ... `first + count − 1`."""
        return (self.sample(number) for number in range(first, first + count))

    def as_dict(self) -> dict[str, Any]:
        """Return all that the images follow from, and what they are."""
        return {"synthetic": True} | asdict(self)

    @property
    def fingerprint(self) -> str:
        """Sha256 of all that the images follow from."""
        return hashlib.sha256(repr(self.as_dict()).encode()).hexdigest()

    def _rng(self, number: int) -> np.random.Generator:
        return np.random.default_rng((self.seed, number, STRUCTURES.index(self.structure)))

    def _draw(self, rng: np.random.Generator) -> float:
        if self.continuous:
            return float(rng.uniform(min(self.ln_cooling_rates), max(self.ln_cooling_rates)))
        return float(rng.choice(self.ln_cooling_rates))


def two_phases(
    structure: Structure, shape: tuple[int, int], size_px: float, fraction: float, rng: np.random.Generator
) -> BoolImage:
    """Return a random structure, True in the bright phase.

    Parameters
    ----------
    structure : str
        One of `STRUCTURES`.
    shape : (int, int)
    size_px : float
        Expected mean free path of the bright phase.
    fraction : float
        Expected share of the bright phase.
    rng : numpy.random.Generator

    Raises
    ------
    ValueError
        If pixels cannot show such a structure.
    """
    if not 0.0 < fraction < 1.0 or not _SIZES_PX[0] <= size_px <= _SIZES_PX[1]:
        raise ValueError(
            f"fraction {fraction:g}, mean free path {size_px:g} px: expected a fraction between 0 and 1 and"
            f" {_SIZES_PX[0]:g} to {_SIZES_PX[1]:g} px"
        )
    if structure == "particles":
        return _discs(shape, size_px, fraction, rng)
    level = float(special.ndtri(1.0 - fraction))
    return _field(structure, shape, _correlation(level, fraction, size_px), rng) > np.float32(level)


def _correlation(level: float, fraction: float, size_px: float) -> float:
    # Of neighbouring pixels, so that they differ with the chance that the mean free path asks for.
    wanted = fraction / (2.0 * size_px)
    if wanted >= special.owens_t(level, 1.0):
        raise ValueError(
            f"a mean free path of {size_px:g} px at a fraction of {fraction:g} is that of unrelated pixels:"
            " choose a smaller pixel_size_um"
        )
    slope = optimize.brentq(lambda a: special.owens_t(level, a) - wanted, 1e-6, 1.0, xtol=1e-10)
    return float((1.0 - slope**2) / (1.0 + slope**2))


def _field(
    structure: Structure, shape: tuple[int, int], correlation: float, rng: np.random.Generator
) -> FloatImage:
    # A stationary Gaussian field of variance 1. The grid is larger than the image: a field made by Fourier
    # transforms repeats, and opposite edges of the image must not know of each other.
    if structure == "islands":
        sigma = 0.5 / np.sqrt(-np.log(correlation))  # ρ(h) = exp(−h²/4σ²)
        margin = 5.0 * sigma
    else:
        k0 = optimize.brentq(lambda k: _ring_correlation(k) - correlation, 1e-3, 2.4, xtol=1e-10)
        margin = 4.0 * np.pi / k0
    rows, columns = (fft.next_fast_len(int(n + margin), real=True) for n in shape)
    ky, kx = 2.0 * np.pi * fft.fftfreq(rows)[:, None], 2.0 * np.pi * fft.rfftfreq(columns)
    k2 = (ky**2 + kx**2).astype(np.float32)
    if structure == "islands":
        filter_ = np.exp(np.float32(-0.5 * sigma**2) * k2)
    else:
        filter_ = ((k2 >= (k0 * (1.0 - _RING)) ** 2) & (k2 <= (k0 * (1.0 + _RING)) ** 2)).astype(np.float32)
    # Parseval: the variance of filtered white noise, both halves of the spectrum counted.
    twice = np.full(filter_.shape[1], 2.0)
    twice[0] = 1.0
    if columns % 2 == 0:
        twice[-1] = 1.0
    power = float(np.sum(filter_.astype(np.float64) ** 2 * twice)) / (rows * columns)
    noise = rng.standard_normal((rows, columns), dtype=np.float32)
    smooth = fft.irfft2(fft.rfft2(noise) * filter_, s=(rows, columns))
    gaussian: FloatImage = (smooth[: shape[0], : shape[1]] / np.float32(np.sqrt(power))).astype(np.float32)
    return gaussian


def _ring_correlation(k0: float) -> float:
    # One pixel apart, of wave vectors that fill the ring from k0 (1 − w) to k0 (1 + w) evenly.
    a, b = k0 * (1.0 - _RING), k0 * (1.0 + _RING)
    return float(2.0 * (b * special.j1(b) - a * special.j1(a)) / (b * b - a * a))


def _discs(shape: tuple[int, int], size_px: float, fraction: float, rng: np.random.Generator) -> BoolImage:
    covered = -np.log(fraction)  # λ E[area]

    def excess(mean_radius: float) -> float:
        radii = mean_radius * (1.0 + _RADII * _NODES)
        half = np.minimum(0.5 / radii, 1.0)
        overlap = radii**2 * 2.0 * (np.arccos(half) - half * np.sqrt(1.0 - half**2))
        share = float(_WEIGHTS @ overlap) / float(_WEIGHTS @ (np.pi * radii**2))
        return float(1.0 - fraction * np.exp(covered * share)) - 1.0 / size_px

    # In the continuum the mean free path is 1/(2 λ E[radius]); pixels change that a little.
    guess = 2.0 * size_px * covered / (np.pi * (1.0 + _RADII**2 / 3.0))
    low, high = 0.3 * guess, 3.0 * guess
    if excess(low) * excess(high) > 0.0:
        raise ValueError(
            f"particles that leave a mean free path of {size_px:g} px at a fraction of {fraction:g} are"
            " smaller than pixels: choose a smaller pixel_size_um"
        )
    mean_radius = float(optimize.brentq(excess, low, high, xtol=1e-9))
    reach = int(np.ceil(mean_radius * (1.0 + _RADII)))
    rows, columns = (n + 2 * reach + 1 for n in shape)
    density = covered / (np.pi * mean_radius**2 * (1.0 + _RADII**2 / 3.0))
    n = int(rng.poisson(density * rows * columns))
    centre = rng.uniform(0.0, 1.0, (n, 2)) * (rows, columns)
    radius = mean_radius * (1.0 + _RADII * rng.uniform(-1.0, 1.0, n))
    dark = np.zeros((rows + 2 * reach + 2, columns + 2 * reach + 2), dtype=np.bool_)
    corner = np.floor(centre).astype(np.int64)
    part = centre - corner
    offset = np.arange(-reach, reach + 2)
    # In parts: all discs at once would take memory that nobody expects.
    for some in np.array_split(np.arange(n), max(1, n * offset.size**2 // 2_000_000)):
        dy2 = (offset - part[some, 0, None]) ** 2
        dx2 = (offset - part[some, 1, None]) ** 2
        disc, y, x = np.nonzero(dy2[:, :, None] + dx2[:, None, :] < radius[some, None, None] ** 2)
        dark[corner[some, 0][disc] + y, corner[some, 1][disc] + x] = True
    # Index `reach` of `dark` is position 0 of the centres, and the image begins `reach` further in.
    return ~dark[2 * reach : 2 * reach + shape[0], 2 * reach : 2 * reach + shape[1]]


def _enlarged(coarse: FloatImage, shape: tuple[int, int]) -> FloatImage:
    # By three, linearly between the points; of variance 1 again.
    third = np.arange(max(shape)) / 3.0
    at = third.astype(np.int64)
    weight = (third - at).astype(np.float32)
    down, across = at[: shape[0]], at[: shape[1]]
    wy, wx = weight[: shape[0], None], weight[: shape[1]]
    tall = coarse[down] * (1.0 - wy) + coarse[down + 1] * wy
    wide: FloatImage = tall[:, across] * (1.0 - wx) + tall[:, across + 1] * wx
    # Mean of ((1−w)² + w²) for w = 0, 1/3, 2/3 is 19/27, once for each direction.
    return wide * np.float32(27.0 / 19.0)

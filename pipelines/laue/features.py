"""What a network sees of a spot: its angles to the other spots, and a few numbers about itself.

The angles between scattering vectors do not depend on the orientation of the crystal. Of the
crystal's own spots they fall on the values that the lattice allows for the class of the spot;
those to other crystals' spots are an even background. LaueNN (Purohit et al., J. Appl. Cryst.
55, 737, 2022) takes their histogram in 900 bins of 0.1 deg, divided by its largest count. The
narrower the bins and the brighter the partners, the better signal and background part, until the
noise of the positions (0.01 deg) is reached.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipelines.kernels import kernel

FloatArray = npt.NDArray[np.float64]
Features = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int32]

_GUESSES = 1 << 14
_SINE_BINS = 24
_SINE_RANGE = (0.1, 1.0)
N_OWN = _SINE_BINS + 5
"""Numbers about the spot itself."""


@dataclass(frozen=True)
class FeatureSpec:
    """How features are made; part of a bundle.

    Attributes
    ----------
    bins : int
        Of the histogram of angles.
    step_deg : float
        Width of a bin; the first one begins at 0.
    partners : int
        The brightest spots of the frame that are counted; 0 for all.
    normalise : bool
        Divide each histogram by its largest count, as LaueNN does.
    own : bool
        Add sin θ (which energies and orders are possible), direction, rank and number of spots.
    """

    bins: int = 1400
    step_deg: float = 0.05
    partners: int = 256
    normalise: bool = False
    own: bool = True

    def __post_init__(self) -> None:
        """Refuse what cannot be."""
        if not 1 <= self.bins <= 20000:
            raise ValueError(f"bins {self.bins}: expected 1 to 20000")
        if not 0 < self.step_deg * self.bins <= 180 + 1e-9:
            raise ValueError(f"{self.bins} bins of {self.step_deg} deg: expected up to 180 deg")
        if self.partners < 0:
            raise ValueError(f"partners {self.partners}: expected 0 (all) or more")

    @property
    def width(self) -> int:
        """Numbers per spot."""
        return self.bins + (N_OWN if self.own else 0)


LAUENN_2022 = FeatureSpec(bins=900, step_deg=0.1, partners=0, normalise=True, own=False)


class FeatureMaker:
    """Makes the features of spots, tables included."""

    def __init__(self, spec: FeatureSpec) -> None:
        self.spec = spec
        edges = np.cos(np.radians(spec.step_deg * np.arange(spec.bins + 1)))
        self._edges = np.ascontiguousarray(edges)
        # The bin in which each of many equal steps of 1 − cos begins: the search goes on from there.
        cosines = 1.0 - np.arange(_GUESSES + 1) * (2.0 / _GUESSES)
        # A hair early: rounding must not start the search behind the bin.
        guess = np.searchsorted(-edges, -cosines - 1e-9, side="right") - 1
        self._guess = np.clip(guess, 0, spec.bins).astype(np.int32)

    def features(self, q: npt.ArrayLike, spots: npt.ArrayLike | None = None) -> Features:
        """Return the features of spots of one frame.

        Parameters
        ----------
        q : (n, 3) array
            Unit scattering vectors of all spots, the brightest first.
        spots : (k,) int array, optional
            Which spots; all by default.

        Returns
        -------
        (k, spec.width) float32
        """
        vectors = np.ascontiguousarray(q, dtype=np.float64).reshape(-1, 3)
        chosen = np.arange(len(vectors)) if spots is None else np.asarray(spots)
        out = np.zeros((len(chosen), self.spec.width), dtype=np.float32)
        self.fill(vectors, np.ascontiguousarray(chosen, dtype=np.int32), out)
        return out

    def fill(self, q: FloatArray, spots: IntArray, out: Features) -> None:
        """Write features into zeroed rows `out` (k, spec.width); see `features`."""
        spec = self.spec
        partners = len(q) if spec.partners == 0 else min(spec.partners, len(q))
        _fill(q, spots, partners, self._edges, self._guess, spec.normalise, spec.own, out)


@kernel(
    "void(float64[:, ::1], int32[::1], int64, float64[::1], int32[::1], boolean, boolean, float32[:, ::1])"
)
def _fill(
    q: FloatArray,
    spots: IntArray,
    partners: int,
    edges: FloatArray,
    guess: IntArray,
    normalise: bool,
    own: bool,
    out: Features,
) -> None:
    bins = edges.shape[0] - 1
    last = edges[bins]
    scale = 0.5 * (guess.shape[0] - 1)
    n = q.shape[0]
    for row in range(spots.shape[0]):
        i = spots[row]
        x, y, z = q[i, 0], q[i, 1], q[i, 2]
        largest = np.float32(0.0)
        for j in range(partners):
            if j == i:
                continue
            c = x * q[j, 0] + y * q[j, 1] + z * q[j, 2]
            if c <= last:
                continue
            c = min(c, 1.0)
            b = guess[int((1.0 - c) * scale)]
            while c <= edges[b + 1]:
                b += 1
            out[row, b] += np.float32(1.0)
            largest = max(largest, out[row, b])
        if normalise and largest > 0:
            for b in range(bins):
                out[row, b] /= largest
        if own:
            # sin θ as a soft one-of-24, so that one layer can cut out intervals.
            place = (-x - _SINE_RANGE[0]) / (_SINE_RANGE[1] - _SINE_RANGE[0]) * (_SINE_BINS - 1)
            place = min(max(place, 0.0), _SINE_BINS - 1.000001)
            low = int(place)
            out[row, bins + low] = np.float32(1.0 - (place - low))
            out[row, bins + low + 1] = np.float32(place - low)
            at = bins + _SINE_BINS
            out[row, at] = np.float32(y)
            out[row, at + 1] = np.float32(z)
            out[row, at + 2] = np.float32((i + 0.5) / n)
            out[row, at + 3] = np.float32(0.25 * np.log(i + 1.0))
            out[row, at + 4] = np.float32(0.25 * np.log(n + 1.0))

"""What a model has to beat: pooling at the same length in bytes, and codes counted with few neighbours.

A VQ-VAE with 512 codes keeps a patch of 128 px in 16 × 16 × 9 bits, 288 bytes. Average pooling to 16 × 16
values of 9 bits keeps as many. A PixelCNN must say codes in fewer bits than a table of how often each was
met does, alone (order 0) or after its earlier neighbours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final, Self

import numpy as np
import numpy.typing as npt
from scipy import ndimage

ByteImage = npt.NDArray[np.uint8]
FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

NEIGHBOURS: Final = ((-1, 0), (0, -1), (-1, -1), (-1, 1))
"""Rows and columns from a code to the earlier ones among the 3 × 3 around it, the most telling first."""

_STRENGTHS: Final = (0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)


def code_bytes(rows: int, columns: int, codes: int, pixels_per_code: int = 8) -> float:
    """Return how many bytes the codes of an image take: 288 for 128 × 128 px and 512 codes."""
    return (rows // pixels_per_code) * (columns // pixels_per_code) * math.log2(codes) / 8


def pooled(patches: ByteImage, side_px: int = 8, bits: float = 9.0, order: int = 3) -> FloatArray:
    """Return patches as average pooling keeps them.

    Parameters
    ----------
    patches : (n, rows, columns) uint8
        Sides are multiples of `side_px`.
    side_px : int
        Of the squares that are averaged.
    bits : float
        Of each average; 9 equal 512 codes.
    order : int
        Of the spline between the averages: 0 for squares, 1 linear, 3 cubic.

    Returns
    -------
    (n, rows, columns) float64
        Greys from 0 to 255.
    """
    n, rows, columns = patches.shape
    if rows % side_px or columns % side_px:
        raise ValueError(f"patches of {rows} x {columns} px: expected multiples of {side_px}")
    means = patches.reshape(n, rows // side_px, side_px, columns // side_px, side_px).mean((2, 4))
    step = 255.0 / (2.0**bits - 1.0)
    kept = np.rint(means / step) * step
    zoom = (1.0, side_px, side_px)
    shown = ndimage.zoom(kept, zoom, order=order, mode="nearest", grid_mode=True)
    return np.clip(shown, 0.0, 255.0).astype(np.float64)


def by_components(training: ByteImage, patches: ByteImage, count: int, most: int = 1000) -> FloatArray:
    """Return patches as the principal components of training patches keep them.

    Parameters
    ----------
    training : (m, rows, columns) uint8
    patches : (n, rows, columns) uint8
    count : int
        Components; all where there are fewer.
    most : int
        Training patches that are used, evenly chosen.

    Returns
    -------
    (n, rows, columns) float64
        Greys from 0 to 255.
    """
    some = training[np.linspace(0, len(training) - 1, min(len(training), most)).astype(np.int64)]
    known = some.reshape(len(some), -1).astype(np.float32)
    mean = known.mean(axis=0)
    known -= mean
    # Of fewer patches than pixels: the small matrix has the same components.
    values, vectors = np.linalg.eigh((known @ known.T).astype(np.float64))
    kept = np.argsort(-values)[: min(count, len(some) - 1)]
    kept = kept[values[kept] > 1e-9 * values.max()]
    components = (vectors[:, kept].T.astype(np.float32) @ known) / np.sqrt(values[kept])[:, None]
    asked = patches.reshape(len(patches), -1).astype(np.float32) - mean
    shown = asked @ components.T @ components + mean
    return np.clip(shown, 0.0, 255.0).reshape(patches.shape).astype(np.float64)


def psnr_dB(image: npt.NDArray[np.generic], shown: npt.NDArray[np.generic]) -> float:
    """Return the peak signal-to-noise ratio of 8-bit greys, over all pixels of all images; inf if equal."""
    error = float(np.mean((np.asarray(image, np.float64) - np.asarray(shown, np.float64)) ** 2))
    return 10.0 * math.log10(255.0**2 / error) if error > 0.0 else math.inf


def order_0_bits(training: IntArray, held_out: IntArray, codes: int) -> FloatArray:
    """Return bits for each code of held-out maps when each code is as likely as it was common in training.

    Counts begin at 1 (Laplace), so that no code is impossible.

    Parameters
    ----------
    training, held_out : (n, rows, columns) int64
    codes : int

    Returns
    -------
    (n,) float64
        Of each held-out map.
    """
    _check(training, codes)
    _check(held_out, codes)
    counts = np.bincount(training.ravel(), minlength=codes) + 1.0
    bits = -np.log2(counts / counts.sum())
    return bits[held_out].mean((1, 2))


@dataclass(frozen=True, eq=False)
class ContextCoder:
    """Says codes by how often they came after their four earlier neighbours of the 3 × 3 around them.

    Most contexts of 512 codes were met once or never, so contexts are tried from none to all four neighbours,
    each leaning on the shorter one (MacKay & Peto, Nat. Lang. Eng. 1, 289, 1995):

        p(code | context) = (times met together + s · p(code | shorter)) / (times context met + s)

    Order 0 leans on equal shares with s = number of codes: that is Laplace's rule.

    Attributes
    ----------
    codes : int
    strengths : tuple of float
        s of one, two, three and four neighbours.
    training : (n, rows, columns) int64
    """

    codes: int
    strengths: tuple[float, float, float, float]
    training: IntArray

    @classmethod
    def fit(cls, training: IntArray, codes: int, folds: int = 4) -> Self:
        """Choose the strengths by leaving out every `folds`-th map, one neighbour after the other.

        Raises
        ------
        ValueError
            If there are fewer than two maps, or codes are none.
        """
        _check(training, codes)
        if len(training) < 2:
            raise ValueError(f"{len(training)} maps: expected 2 or more to choose strengths by")
        left_out = np.arange(len(training)) % min(folds, len(training)) == 0
        known, asked = training[~left_out], training[left_out]
        p = _order_0(known, asked, codes)
        chosen: list[float] = []
        for neighbours in range(1, len(NEIGHBOURS) + 1):
            together, alone = _met(known, asked, codes, neighbours)
            tried = [(together + s * p) / (alone + s) for s in _STRENGTHS]
            best = int(np.argmin([-np.log2(t).mean() for t in tried]))
            chosen.append(_STRENGTHS[best])
            p = tried[best]
        return cls(codes, (chosen[0], chosen[1], chosen[2], chosen[3]), training)

    def bits_per_code(self, held_out: IntArray) -> FloatArray:
        """Return bits for each code of maps (n, rows, columns), (n,) float64."""
        _check(held_out, self.codes)
        return -np.log2(self.probability(held_out)).mean((1, 2))

    def probability(self, held_out: IntArray) -> FloatArray:
        """Return the probability of each code of maps, (n, rows, columns) float64."""
        p = _order_0(self.training, held_out, self.codes)
        for neighbours, s in enumerate(self.strengths, start=1):
            together, alone = _met(self.training, held_out, self.codes, neighbours)
            p = (together + s * p) / (alone + s)
        return p


def _order_0(training: IntArray, asked: IntArray, codes: int) -> FloatArray:
    counts = np.bincount(training.ravel(), minlength=codes) + 1.0
    return (counts / counts.sum())[asked]


def _met(training: IntArray, asked: IntArray, codes: int, neighbours: int) -> tuple[FloatArray, FloatArray]:
    # How often each asked code was met in training with its neighbours, and how often these were met.
    known, wanted = _contexts(training, codes, neighbours), _contexts(asked, codes, neighbours)
    alone = _times(known, wanted)
    together = _times(known * codes + training, wanted * codes + asked)
    return together, alone


def _contexts(maps: IntArray, codes: int, neighbours: int) -> IntArray:
    # One number for the neighbours; beyond the edge of a map lies a code of its own.
    n, rows, columns = maps.shape
    framed = np.full((n, rows + 1, columns + 2), codes, dtype=np.int64)
    framed[:, 1:, 1:-1] = maps
    number = np.zeros(maps.shape, dtype=np.int64)
    for down, across in NEIGHBOURS[:neighbours]:
        part = framed[:, 1 + down : 1 + down + rows, 1 + across : 1 + across + columns]
        number = number * (codes + 1) + part
    return number


def _times(known: IntArray, wanted: IntArray) -> FloatArray:
    values, counts = np.unique(known, return_counts=True)
    at = np.minimum(np.searchsorted(values, wanted), len(values) - 1)
    return np.where(values[at] == wanted, counts[at], 0).astype(np.float64)


def _check(maps: IntArray, codes: int) -> None:
    if codes < 2 or (codes + 1) ** 4 * codes >= 2**63:
        raise ValueError(f"codes {codes}: expected 2 to 6000")
    if maps.ndim != 3 or not maps.size:
        raise ValueError(f"maps of shape {maps.shape}: expected (n, rows, columns)")
    if int(maps.min()) < 0 or int(maps.max()) >= codes:
        raise ValueError(f"maps: expected codes from 0 to {codes - 1}")

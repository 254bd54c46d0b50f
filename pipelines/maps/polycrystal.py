"""Simulated scans of polycrystals: the truth that maps are tried on."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from grainwatch.messages import ArrayData, Crystal, FrameKey, LaueResult, ModelInfo, Provenance
from pipelines.laue.crystal import Material
from pipelines.laue.orientation import SAMPLE_FRAMES, lattice_rotation_of
from pipelines.maps.grid import ScanGrid
from pipelines.rotations import multiply, to_euler_deg, to_fundamental_zone

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


def voronoi(shape: tuple[int, ...], n_grains: int, rng: np.random.Generator) -> IntArray:
    """Return which of `n_grains` random seeds is nearest to each grid point.

    Returns
    -------
    int array of `shape`
        0 to n_grains - 1; a small cell may hold no grid point. On a grid a cell may touch
        itself only at a corner, and then falls into several pieces by face neighbours.
    """
    seeds = rng.uniform(-0.5, np.array(shape) - 0.5, (n_grains, len(shape)))
    best = np.full(shape, np.inf)
    labels = np.zeros(shape, dtype=np.int64)
    axes = np.ogrid[tuple(slice(n) for n in shape)]
    for number, seed in enumerate(seeds):
        distance = np.zeros(shape)
        for axis, at in zip(axes, seed, strict=True):
            distance = distance + (axis - at) ** 2
        nearer = distance < best
        best[nearer] = distance[nearer]
        labels[nearer] = number
    return labels


def scan_results(
    grid: ScanGrid,
    labels: IntArray,
    orientations: npt.ArrayLike,
    material: Material,
    rng: np.random.Generator,
    *,
    noise_deg: float = 0.02,
    overlap: bool = True,
    sample_frame: str = "tilt40",
    source: str = "simulated",
    series_uid: str = "simulated",
) -> Iterator[LaueResult]:
    """Iterate over what an indexer would find on each grid point, in the order of the frames.

    Parameters
    ----------
    grid : ScanGrid
    labels : int array of the grid's shape
        Grain of each point, -1 for none; see `voronoi`.
    orientations : (n, 4) array
        Of each grain, sample -> crystal.
    noise_deg : float
        Standard deviation of each of three small rotations.
    overlap : bool
        Where the next point in x is of another grain, that grain's crystal is seen too, weaker.
    sample_frame : str
        As in the configuration; UB is in the lab frame.
    """
    q0 = np.asarray(orientations, dtype=np.float64)
    provenance = Provenance(model=ModelInfo("simulated", "1"))
    for frame in range(grid.first_frame, grid.first_frame + grid.size):
        index = grid.index(frame)
        seen = [int(labels[index])]
        beside = (min(index[0] + 1, grid.shape[0] - 1), *index[1:])
        if overlap and seen[0] >= 0 and labels[beside] != seen[0]:
            seen.append(int(labels[beside]))
        crystals = []
        for rank, label in enumerate(label for label in seen if label >= 0):
            q = to_fundamental_zone(
                multiply(_small_rotation(noise_deg, rng), q0[label]), material.proper_point_group
            )
            ub = lattice_rotation_of(q, material, SAMPLE_FRAMES[sample_frame]) @ material.B0
            crystals.append(_crystal(material, q, ub, 40 - 15 * rank, noise_deg))
        yield LaueResult(
            key=FrameKey(source, series_uid, frame),
            provenance=provenance,
            n_peaks=0,
            peaks=ArrayData.of(np.empty((0, 4)), "<f4"),
            crystals=tuple(crystals),
            grid_index=index,
        )


def _small_rotation(sigma_deg: float, rng: np.random.Generator) -> FloatArray:
    half = np.radians(rng.normal(0.0, sigma_deg, 3)) / 2
    q = np.concatenate([[1.0], half])
    return np.asarray(q / math.sqrt(float(q @ q)))


def _crystal(material: Material, q: FloatArray, ub: FloatArray, spots: int, sigma_deg: float) -> Crystal:
    zero = ArrayData.of(np.zeros((3, 3)))
    w, x, y, z = q.tolist()
    phi1, tilt, phi2 = to_euler_deg(q).tolist()
    return Crystal(
        material=material.name,
        UB=ArrayData.of(ub),
        B0=ArrayData.of(material.B0),
        quaternion=(w, x, y, z),
        euler_deg=(phi1, tilt, phi2),
        strain_crystal=zero,
        strain_sample=zero,
        strain_sigma=ArrayData.of(np.full((3, 3), np.nan)),
        orientation_sigma_deg=sigma_deg,
        spots_matched=spots,
        spots_expected=45,
        match_rate=spots / 45,
        chance_match_rate=0.03,
        false_probability=0.0,
        residual_px=0.2,
        depth_um=0.0,
        spot_indices=ArrayData.of(np.empty(0), "<i4"),
        hkl=ArrayData.of(np.empty((0, 3)), "<i2"),
    )

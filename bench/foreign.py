"""A structure that no part of grainwatch knows: a mosaic of Voronoi cells, each of one phase by chance."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy.spatial import cKDTree

from pipelines.micrograph.synthetic import Imaging, ProcessLaw

ByteImage = npt.NDArray[np.uint8]

PIXEL_SIZE_UM = 0.25
LN_COOLING_RATES = (0.0, 3.4)


def cells(rng: np.random.Generator, count: int, side_px: int = 512) -> list[ByteImage]:
    """Return images with the fractions and free paths of other synthetic micrographs, but of cells.

    A line meets cells of mean chord λ = π / (4 √ρ) at a density ρ of their centres (Okabe et al., Spatial
    Tessellations, table 5.5.1), and leaves the bright phase, of share f, at one in 1 / (1 − f) of their
    boundaries: the mean free path is λ / (1 − f).
    """
    law, imaging = ProcessLaw(), Imaging()
    images = []
    for _ in range(count):
        size_um, fraction = law.draw(rng.uniform(*LN_COOLING_RATES), rng)
        chord = size_um / PIXEL_SIZE_UM * (1.0 - fraction)
        density = (np.pi / (4.0 * chord)) ** 2
        # Beyond the edges, too: cells there would be larger.
        margin = 4.0 * chord
        wide = side_px + 2.0 * margin
        centres = rng.uniform(-margin, side_px + margin, (rng.poisson(density * wide**2), 2))
        bright = rng.random(len(centres)) < fraction
        grid = np.indices((side_px, side_px)).reshape(2, -1).T
        nearest = cKDTree(centres).query(grid)[1]
        images.append(imaging.expose(bright[nearest].reshape(side_px, side_px), rng))
    return images

"""Simulate what the tutorial needs: a detector's calibration, one frame, and a raster scan.

    python docs/tutorial/make_frames.py FOLDER

writes FOLDER/lab.det, FOLDER/frame.tif and FOLDER/scan.h5 (dataset /frames, one frame a point of the
scan, x first). The sample is copper; where two grains meet, the beam sees both. The detector has
1024 x 1024 pixels of 0.15 mm and stands 70 mm above the sample.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import h5py
import hdf5plugin
import numpy as np
from fabio.tifimage import TifImage

from pipelines.laue.crystal import load_material
from pipelines.laue.forward import simulate_spots
from pipelines.laue.geometry import Calibration, DetectorArea
from pipelines.laue.lauetools_files import write_det
from pipelines.laue.orientation import SAMPLE_FRAMES, lattice_rotation_of
from pipelines.laue.reflections import build_reflections
from pipelines.laue.render import render_frame
from pipelines.maps.grid import ScanGrid
from pipelines.maps.polycrystal import voronoi
from pipelines.rotations import random_rotations

DETECTOR = Calibration(70.0, 511.0, 540.0, 0.4, -0.3, 0.15, (1024, 1024), "lab")


def main(folder: Path, grid: ScanGrid, n_grains: int) -> None:
    """Write the three files."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(20)
    copper = load_material("Cu")
    reflections = build_reflections(copper)
    area = DetectorArea.rectangle(DETECTOR.shape)
    spots = []
    for orientation in random_rotations(n_grains, rng):
        ub = lattice_rotation_of(orientation, copper, SAMPLE_FRAMES["tilt40"]) @ copper.B0
        spots.append(simulate_spots(ub, reflections, DETECTOR, area))

    def frame(weights: dict[int, float]) -> np.ndarray:
        """Render the grains that the beam sees, each with the share of it that it fills."""
        xy = np.concatenate([spots[grain].xy_px for grain in weights])
        counts = [
            w * 4e4 * np.sqrt(spots[g].intensity / spots[g].intensity.max()) for g, w in weights.items()
        ]
        return render_frame(DETECTOR.shape, xy, np.concatenate(counts), np.full((len(xy), 2), 2.0), rng)

    grains = voronoi(grid.shape, n_grains, rng)
    write_det(folder / "lab.det", DETECTOR, material="Cu")
    TifImage(data=frame({0: 1.0, 1: 0.7, 2: 0.4})).write(str(folder / "frame.tif"))
    with h5py.File(folder / "scan.h5", "w") as file:
        frames = file.create_dataset(
            "frames",
            (grid.size, *DETECTOR.shape),
            np.uint16,
            chunks=(1, *DETECTOR.shape),
            **hdf5plugin.Bitshuffle(),
        )
        for number in range(grid.size):
            x, y = grid.index(number)
            beside = int(grains[min(x + 1, grid.shape[0] - 1), y])
            frames[number] = frame(
                {int(grains[x, y]): 1.0} | ({beside: 0.4} if beside != grains[x, y] else {})
            )
    print(f"{folder}: lab.det, frame.tif, scan.h5 ({grid.size} frames)")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--points", nargs=2, type=int, default=(8, 6), metavar=("X", "Y"))
    parser.add_argument("--grains", type=int, default=6, help="3 or more")
    given = parser.parse_args()
    if given.grains < 3:
        parser.error("--grains: expected 3 or more")
    main(given.folder, ScanGrid(tuple(given.points)), given.grains)

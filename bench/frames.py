"""Frames of several crystals, rendered once and kept as a detector would send them.

Started as a module it is the detector: ``python -m bench.frames FOLDER ADDRESS RATE``.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np

from bench.patterns import GEOMETRY_C, reflections
from bench.report import OUT, Report
from daemon.sources.dectris.v2_simulator import Exposure, Options, encode_exposure
from daemon.sources.simulator import Simulator
from pipelines import rotations
from pipelines.laue.forward import simulate_spots
from pipelines.laue.geometry import DetectorArea
from pipelines.laue.render import Background, render_frame

DTYPE = np.dtype(np.uint16)


@dataclass(frozen=True)
class Recipe:
    """What the frames show: crystals of equal volume, uniformly random orientation, over air scatter.

    Attributes
    ----------
    strong : float
        Counts of the spot that 2 % of a crystal's spots exceed.
    level, bump : float
        Background in counts, and the height of air scatter above it.
    """

    count: int
    seed: int
    material: str = "Cu"
    crystals: int = 5
    strong: float = 3e5
    fwhm_px: float = 2.0
    level: float = 50.0
    bump: float = 60.0

    def folder(self) -> Path:
        """Return where these frames are kept, the same for the same recipe."""
        text = json.dumps(asdict(self), sort_keys=True) + repr(GEOMETRY_C)
        return OUT / f"frames-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def frames(recipe: Recipe) -> Path:
    """Return the folder with the coded frames of a recipe, rendered with two processes if need be."""
    folder = recipe.folder()
    if folder.is_dir():
        return folder
    OUT.mkdir(parents=True, exist_ok=True)
    # Under its name all at once, so that half a set is never taken for a whole one.
    scratch = Path(tempfile.mkdtemp(prefix="frames-", dir=OUT))
    try:
        with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
            for _ in pool.map(partial(_write, recipe, scratch), range(recipe.count), chunksize=4):
                pass
        scratch.rename(folder)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    return folder


def _write(recipe: Recipe, folder: Path, number: int) -> None:
    rng = Report(seed=recipe.seed).rng("frames", number)
    listed = reflections(recipe.material)
    turns = rotations.to_matrix(rotations.random_rotations(recipe.crystals, rng))
    area = DetectorArea.of(GEOMETRY_C)
    spots = simulate_spots(turns @ listed.material.B0, listed, GEOMETRY_C, area)
    image = render_frame(
        GEOMETRY_C.shape,
        spots.xy_px,
        recipe.strong * spots.intensity / np.quantile(spots.intensity, 0.98),
        np.full((len(spots), 2), recipe.fwhm_px),
        rng,
        background=Background(recipe.level, bump=recipe.bump),
        dtype=DTYPE,
    )
    exposure = encode_exposure(image, Options().channels, "bslz4")
    (folder / f"{number:05d}.cbor").write_bytes(exposure.data)


def _exposures(folder: Path) -> Iterator[Exposure]:
    for path in sorted(folder.glob("*.cbor")):
        yield Exposure(GEOMETRY_C.shape, DTYPE, path.read_bytes())


def main(folder: str, address: str, rate: str, count: str) -> None:
    """Send the frames over and over until `count` of them are sent or a signal comes; report as JSON."""
    stop: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda signum, _frame: stop.append(signum))
    options = Options(address=address, rate_hz=float(rate), count=int(count), high_water_mark=10)
    report = Simulator(_exposures(Path(folder)), options, stop=lambda: bool(stop)).run()
    print(json.dumps(asdict(report)))


if __name__ == "__main__":
    main(*sys.argv[1:])

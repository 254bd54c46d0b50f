"""What stands before the demo's detectors: real frames where they are at hand, else simulated ones."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from pipelines.laue.crystal import load_material
from pipelines.laue.forward import simulate_spots
from pipelines.laue.geometry import Calibration, DetectorArea
from pipelines.laue.lauetools_files import write_det
from pipelines.laue.reflections import build_reflections
from pipelines.laue.render import Background, render_frame
from pipelines.rotations import random_rotations, to_matrix


@dataclass(frozen=True)
class Scene:
    """One stream of single frames.

    Attributes
    ----------
    stream : str
        Name of the stream.
    about : str
        What the frames show, for people.
    files : tuple of Path
        The frames, all of one detector.
    geometry : Path
        LaueTools calibration of that detector.
    materials : tuple of str
        What to look for.
    """

    stream: str
    about: str
    files: tuple[Path, ...]
    geometry: Path
    materials: tuple[str, ...]


_GE_CAMERA: Final = Calibration(70.8, 940.0, 1081.0, 0.63, -0.68, 0.079142, (2048, 2048), "MARCCD165")
_WIRE_CAMERA: Final = Calibration(79.6, 977.0, 931.0, 0.48, 0.45, 0.0734, (2018, 2016), "sCMOS")
_STRONG: Final = 3e5  # counts in a strong spot


def data_folder() -> Path:
    """Return where the real frames should lie: $GRAINWATCH_DATA/laue, or .data/laue (``make data``)."""
    return Path(os.environ.get("GRAINWATCH_DATA") or ".data") / "laue"


def real_scenes(folder: Path) -> tuple[Scene, ...]:
    """Return the streams of real frames.

    Raises
    ------
    FileNotFoundError
        If a file is absent; names it.
    """
    truth = folder / "truth"
    scenes = (
        Scene(
            "germanium",
            "real frames of a germanium crystal (MARCCD 2048 x 2048)",
            (folder / "Ge_blanc_0000.mccd.gz",),
            truth / "calibGe111.det",
            ("Ge",),
        ),
        Scene(
            "nanowire",
            "real frames of GaN on silicon (sCMOS 2018 x 2016)",
            (folder / "nw1_0000.tif.gz", folder / "nw1_0001.tif.gz"),
            truth / "GaN_Si" / "calib.det",
            ("Si", "GaN"),
        ),
    )
    for scene in scenes:
        for path in (*scene.files, scene.geometry):
            if not path.is_file():
                raise FileNotFoundError(str(path))
    return scenes


def simulated_scenes(folder: Path, seed: int) -> tuple[Scene, ...]:
    """Render streams like the real ones into a folder: a Ge crystal, and GaN crystals on Si."""
    rng = np.random.default_rng(seed)
    ge = _render(folder / "germanium", _GE_CAMERA, (("Ge",),), rng)
    wire = _render(folder / "nanowire", _WIRE_CAMERA, (("Si",), ("Si", "GaN", "GaN")), rng)
    return (
        Scene("germanium", "SIMULATED frames of a germanium crystal (2048 x 2048)", *ge, ("Ge",)),
        Scene(
            "nanowire", "SIMULATED frames of gallium nitride on silicon (2018 x 2016)", *wire, ("Si", "GaN")
        ),
    )


def _render(
    folder: Path, camera: Calibration, frames: tuple[tuple[str, ...], ...], rng: np.random.Generator
) -> tuple[tuple[Path, ...], Path]:
    """Write a calibration and frames with crystals of the named materials, the later ones weaker."""
    folder.mkdir()
    geometry = folder / "simulated.det"
    write_det(geometry, camera, material=frames[0][0], note="grainwatch demo")
    area = DetectorArea.of(camera)
    files = []
    turns = to_matrix(random_rotations(max(map(len, frames)), rng))
    for number, names in enumerate(frames):
        xy, counts = [], []
        for rank, name in enumerate(names):
            material = load_material(name)
            spots = simulate_spots(turns[rank] @ material.B0, build_reflections(material), camera, area)
            xy.append(spots.xy_px)
            counts.append(_STRONG * 0.5**rank * spots.intensity / np.quantile(spots.intensity, 0.98))
        at = np.concatenate(xy)
        width = np.full((len(at), 2), 2.0)
        image = render_frame(
            camera.shape, at, np.concatenate(counts), width, rng, background=Background(50.0, bump=60.0)
        )
        files.append(folder / f"frame_{number:04d}.npy")
        np.save(files[-1], image)
    return tuple(files), geometry

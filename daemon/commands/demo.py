"""``grainwatch demo``: the whole way of a frame, from a detector's socket to the picture of a map."""

from __future__ import annotations

import re
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer

from daemon.commands.warm import announced, compile_kernels
from daemon.demo.folder import MAP, demo_folder
from grainwatch.config import ConfigError

SEED = 20


def demo(
    rate: Annotated[float, typer.Option(help="Frames a second of the scan.")] = 15.0,
    keep: Annotated[Path, typer.Option(help="Folder for the configuration, the results and the map.")] = Path(
        ".out/demo"
    ),
    offline: Annotated[bool, typer.Option("--offline", help="Simulated frames only.")] = False,
    scan: Annotated[str, typer.Option(help="Points of the scan, x first.")] = "24x18",
    repeat: Annotated[int, typer.Option(min=1, help="Frames of each of the first two streams.")] = 8,
) -> None:
    """Stream Laue frames and micrographs through a daemon; what they show appears as they come.

    Real frames are taken from $GRAINWATCH_DATA or .data (make data). Exit status 1 when something
    was lost or not found.
    """
    began = time.monotonic()
    shape = _checked(rate, scan)
    # A stop by a service manager cleans up like Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    # Paths in the configuration count from its own folder: whole ones mean the same everywhere.
    keep = keep.resolve()
    try:
        with demo_folder(keep):
            with announced():
                compile_kernels()
            complaints = _run(began, rate, keep, offline, shape, repeat)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        raise typer.Exit(130) from None
    print(f"the demo took {time.monotonic() - began:.0f} s")
    for complaint in complaints:
        print(f"grainwatch demo: {complaint}", file=sys.stderr)
    if complaints:
        raise typer.Exit(1)
    print("the same step by step, with commands of your own: the tour in README.md")


def _run(
    began: float, rate: float, keep: Path, offline: bool, shape: tuple[int, int], repeat: int
) -> list[str]:
    # These load kernels: what had to be compiled has been by now, and that was said.
    from daemon.demo.sample import Sample
    from daemon.demo.scenes import data_folder, real_scenes, simulated_scenes
    from daemon.demo.show import Show
    from daemon.demo.station import MICROGRAPHS, DemoError, Station
    from daemon.demo.view import open_view

    sample = Sample.make(shape, SEED)
    with tempfile.TemporaryDirectory(prefix="grainwatch-demo-") as folder:
        try:
            scenes = None if offline else real_scenes(data_folder())
        except FileNotFoundError as error:
            print(f"the real frames are not here ({error} is absent; make data fetches them)")
            scenes = None
        for scene in (scenes := scenes or simulated_scenes(Path(folder), SEED)):
            print(f"stream {scene.stream}: {scene.about}")
        print(f"stream {MICROGRAPHS}: SIMULATED micrographs of two phases (512 x 512)")
        print("starting a daemon with 2 workers and its detectors", flush=True)
        with (
            open_view(sample.material) as view,
            Station(Path(folder), keep, scenes, sample, SEED, rate) as station,
        ):
            try:
                return Show(station, view, scenes, sample, began).run(repeat, keep / MAP)
            except DemoError as error:
                return [str(error)]


def _checked(rate: float, scan: str) -> tuple[int, int]:
    if not rate > 0:
        raise ConfigError(f"demo: --rate: expected more than 0, got {rate:g}")
    points = re.fullmatch(r"([1-9]\d{0,2})x([1-9]\d{0,2})", scan)
    if points is None:
        raise ConfigError(f"demo: --scan: expected the points along x and y, as 24x18, got {scan!r}")
    return int(points[1]), int(points[2])

"""``grainwatch init``: a commented configuration from a calibration and an address."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from daemon.sinks import publisher, results_file
from daemon.sources.dectris import v1 as dectris_v1
from daemon.sources.dectris import v2 as dectris_v2
from grainwatch.config import (
    ConfigError,
    DaemonTable,
    EdgeTable,
    RingTable,
    ScanTable,
    convert,
    parse_config,
)
from pipelines.files import reason
from pipelines.laue import pipeline
from pipelines.laue.crystal import load_material, material_names
from pipelines.laue.geometry import Calibration
from pipelines.laue.lauetools_files import read_det
from pipelines.laue.proposals import shipped_for

_PLACEHOLDER = "calibration.det"
_TYPES = {
    "dectris-v2": (dectris_v2.Config, "DECTRIS Stream V2"),
    "dectris-v1": (dectris_v1.Config, "DECTRIS Stream V1"),
}
_PIXEL_BYTES = 4
_Value = str | bool | int | float | Sequence[str | int | float]
_Rows = list[tuple[str, _Value, str]]


def init(
    det: Annotated[Path | None, typer.Option("--det", help="LaueTools calibration of the detector.")] = None,
    source: Annotated[
        str, typer.Option("--source", help="Where the detector sends: tcp://HOST:PORT.")
    ] = "tcp://127.0.0.1:31001",
    type_: Annotated[
        str, typer.Option("--type", help="What it speaks: dectris-v2, or dectris-v1 (port 9999).")
    ] = "dectris-v2",
    material: Annotated[
        list[str] | None,
        typer.Option(
            "--material", "-m", help="Name or CIF file, again for more phases; default that of the .det."
        ),
    ] = None,
    scan: Annotated[
        str, typer.Option("--scan", help="Points of a raster scan, x first: 20x20 or 20x20x5.")
    ] = "",
    out: Annotated[Path, typer.Option("--out", help="The file to write.")] = Path("grainwatch.toml"),
    force: Annotated[bool, typer.Option("--force", help="Overwrite the file if it is there.")] = False,
) -> None:
    """Write a commented configuration to start from."""
    if out.exists() and not force:
        raise ConfigError(f"init: {out} is there already: add --force to overwrite it, or give another --out")
    if type_ not in _TYPES:
        raise ConfigError(f"init: --type: expected one of {', '.join(_TYPES)}, got {type_!r}")
    convert({"address": source}, _TYPES[type_][0], "init: --source")
    shape = _scan_shape(scan)
    calibration, calibrated_with = _calibration(det)
    materials = _materials(material or [], calibrated_with)
    text = config_text(out.absolute().parent, det, calibration, (type_, source), materials, shape)
    parse_config(text.encode(), str(out))
    _write(out, text)
    print(f"written: {out}")
    if det is None:
        print(f"first put the path of your LaueTools .det file where it says {_PLACEHOLDER}")
    print(f"next: grainwatch check-config {out}, then grainwatch run {out}")


def config_text(
    folder: Path,
    det: Path | None,
    calibration: Calibration | None,
    source: tuple[str, str],
    materials: Sequence[str],
    shape: tuple[int, ...],
) -> str:
    """Return the text of a configuration.

    Parameters
    ----------
    folder : Path
        Absolute; state, run-time files and results go below it. All paths are written out in full,
        so that it does not matter where the daemon is started.
    det : Path or None
        The calibration file, and what it holds; a placeholder is written for None.
    source : tuple of str
        Type and address of the detector.
    materials : sequence of str
        Names or absolute paths of CIF files.
    shape : tuple of int
        Points of the scan along each axis, empty for none.
    """
    daemon, edge, ring = DaemonTable(), EdgeTable(), RingTable()
    laue = pipeline.Config(materials=(), geometry="")
    zmq, hdf5 = publisher.Config(), results_file.Config()
    results = str(folder / "results")
    slot_bytes, bundles = ring.slot_bytes, list[str]()
    geometry = str(det.absolute() if det else folder / _PLACEHOLDER)
    about = "LaueTools calibration"
    if calibration is not None:
        rows, columns = calibration.shape
        bundles = shipped_for(map(load_material, materials), calibration, laue.energy_keV)
        slot_bytes = max(slot_bytes, rows * columns * _PIXEL_BYTES)
        about += f": {calibration.label or 'detector'} {rows} x {columns}, {calibration.dd_mm:.4g} mm away"
    built_in = ", ".join(material_names())
    tables: list[tuple[str, _Rows]] = [
        (
            "daemon",
            [
                ("name", daemon.name, "how the daemon signs its results"),
                ("state_dir", str(folder / "state"), "its memory: one state for every frame"),
                ("runtime_dir", str(folder / "run"), "its control socket, for grainwatch status"),
                ("workers", daemon.workers, "processes that compute; 0 computes in the daemon itself"),
            ],
        ),
        (
            "ring",
            [
                ("slots", ring.slots, "compressed frames in memory on their way to the workers"),
                ("slot_bytes", slot_bytes, "largest frame; memory that no frame touches costs nothing"),
            ],
        ),
        (
            "streams.laue.source",
            [
                ("type", source[0], f"what the detector speaks: {_TYPES[source[0]][1]}"),
                ("address", source[1], "where it sends; each frame goes to one reader only"),
            ],
        ),
        (
            "streams.laue.intake",
            [
                ("policy", edge.policy, "when full: block, drop-oldest, drop-newest or decimate"),
                ("depth", edge.depth, "frames that wait for a worker"),
            ],
        ),
        (
            "streams.laue.pipeline",
            [
                ("type", "laue", "crystals in white-beam Laue frames"),
                ("materials", materials, f"CIF files, or of {built_in}"),
                ("geometry", geometry, about),
                ("bundle", bundles, "networks that know the spots; [] for the classical search alone"),
                ("energy_keV", laue.energy_keV, "band of the beam"),
                ("sample_frame", laue.sample_frame, "surface inclined by 40 deg (tilt40), or lab"),
                ("threshold_sigma", laue.threshold_sigma, "peaks this far above the noise"),
                ("max_false_probability", laue.max_false_probability, "report crystals surer than that"),
                ("map_tolerance_deg", laue.map_tolerance_deg, "neighbours closer than that are one grain"),
            ],
        ),
    ]
    if shape:
        walk: _Rows = [
            ("shape", shape, "points along x, y (and z); x is fastest"),
            ("snake", False, "true when every second line runs backwards"),
        ]
        tables.append(("streams.laue.scan", walk))
    tables += [
        (
            "sinks.zmq",
            [
                ("results", zmq.results, "results as they come: grainwatch subscribe, ResultStream"),
                ("catch_up", zmq.catch_up, "what a subscriber missed; one port above results"),
                ("results_dir", results, "where older results are looked up: the folder of sinks.hdf5"),
            ],
        ),
        (
            "sinks.hdf5",
            [
                ("folder", results, "one file a series, readable while it is written"),
                ("flush_s", hdf5.flush_s, "readers see a result after so many seconds"),
            ],
        ),
    ]
    blocks = [
        "# Made by grainwatch init. Check a change with grainwatch check-config.\n"
        "# Relative paths count from the folder of this file."
    ]
    for name, rows_ in tables:
        blocks.append("\n".join([f"[{name}]", *_lines(rows_)]))
        if name == "streams.laue.scan":
            steps = _toml([1.0] * len(shape))
            blocks[-1] += f"\n# step_um = {steps}  # distance of the points, for the scale of the map"
    return "\n\n".join(blocks) + "\n"


def _lines(rows: _Rows) -> list[str]:
    return [f"{key} = {_toml(value)}  # {comment}" for key, value, comment in rows]


def _toml(value: _Value) -> str:
    # A TOML basic string is a JSON string, but for DEL, which only TOML wants escaped.
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    return "[" + ", ".join(_toml(item) for item in value) + "]"


def _scan_shape(scan: str) -> tuple[int, ...]:
    if not scan:
        return ()
    if not re.fullmatch(r"[1-9]\d{0,6}(x[1-9]\d{0,6}){0,2}", scan):
        raise ConfigError(f"init: --scan: expected the points along each axis, as 20x20, got {scan!r}")
    return ScanTable(shape=tuple(int(n) for n in scan.split("x"))).shape


def _calibration(det: Path | None) -> tuple[Calibration | None, str | None]:
    """Return what a .det holds: the calibration, and the material it was made with."""
    if det is None:
        return None, None
    try:
        found = read_det(det)
    except (OSError, ValueError) as error:
        raise ConfigError(f"init: --det: {reason(error)}") from error
    return found.calibration, found.material


def _materials(asked: list[str], calibrated_with: str | None) -> list[str]:
    """Return the materials to look for: names as they are, CIF files with their full path."""
    if not asked:
        return [calibrated_with] if calibrated_with in material_names() else ["Cu"]
    found = []
    for name in asked:
        try:
            load_material(name)
        except (OSError, ValueError) as error:
            raise ConfigError(f"init: --material: {reason(error)}") from error
        found.append(name if name in material_names() else str(Path(name).absolute()))
    return found


def _write(out: Path, text: str) -> None:
    """Write through a file beside it, so that a full disk cannot leave half a configuration."""
    beside = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        beside.write_text(text, encoding="utf-8")
        beside.replace(out)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise ConfigError(f"init: --out {out}: cannot be written: {error.strerror}") from error

"""The map of a series from its results files."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from grainwatch.config import ConfigError, ScanTable
from grainwatch.messages import LaueResult, MapUpdate
from pipelines.laue.crystal import Material, load_material
from pipelines.maps.builder import DEFAULT_TOLERANCE_DEG, MapBuilder
from pipelines.maps.grid import NotAGrid, infer_grid
from pipelines.results_files import ResultsFile, ResultsFileError


@dataclass(frozen=True)
class SeriesMap:
    """A whole map and what is needed to draw it.

    Attributes
    ----------
    snapshot : MapUpdate
    materials : dict of str to Material
        Of all crystals on the map.
    stream : str
    measured : int
        Frames with a result, on the grid or not.
    """

    snapshot: MapUpdate
    materials: dict[str, Material]
    stream: str
    measured: int


def read_map(
    paths: Sequence[Path], materials: Sequence[str] = (), tolerance_deg: float | None = None
) -> SeriesMap:
    """Read the map of a series, finished or not.

    The snapshot that the daemon stored at the end is taken as it is; without one, or with another
    tolerance, the map is built anew from the results.

    Parameters
    ----------
    paths : sequence of Path
        The results file of the series, or its parts after a crash.
    materials : sequence of str
        CIF files of materials that are not built in.
    tolerance_deg : float, optional
        Largest misorientation of neighbours in one grain; what the daemon used when None.

    Raises
    ------
    ConfigError
        If a file is no results file, the series is no scan, or nothing was indexed: says which.
    """
    words = ", ".join(str(path) for path in paths)
    try:
        files = [ResultsFile(path) for path in paths]
    except ResultsFileError as error:
        raise ConfigError(f"map: {error}") from error
    try:
        uids = sorted({file.series_uid for file in files})
        if len(uids) > 1:
            raise ConfigError(
                f"map: {words}: expected the parts of one series, found series {', '.join(uids)}"
            )
        stored = _stored(files[0]) if len(files) == 1 and tolerance_deg is None else None
        results = {} if stored else {result.key: result for file in files for result in file.results()}
        streams = [_stream_table(file) for file in files]
        stream = files[0].stream
        measured = stored.filled if stored else len(results)
        micrographs = sum(len(file.micrographs()["frame"]) for file in files)
    finally:
        for file in files:
            file.close()
    if stored is None and not results:
        if micrographs:
            raise ConfigError(
                f"map: {words}: holds {micrographs} micrograph{'s' * (micrographs > 1)} and no map: maps show"
                " orientations, which only Laue frames have"
            )
        raise ConfigError(f"map: {words}: holds no results")
    found = {c.material for r in results.values() for c in r.crystals} | (
        {point.material for point in stored.points} if stored else set()
    )
    if not found:
        raise ConfigError(f"map: {words}: {measured} frames, and no crystal was indexed in any of them")
    pipeline = streams[0].get("pipeline", {})
    known = _materials(found, [*materials, *pipeline.get("materials", ())])
    if stored is None:
        if tolerance_deg is None:
            tolerance_deg = float(pipeline.get("map_tolerance_deg", DEFAULT_TOLERANCE_DEG))
        stored = _built(list(results.values()), streams[0], known, tolerance_deg, words)
    return SeriesMap(stored, known, stream, measured)


def _stored(file: ResultsFile) -> MapUpdate | None:
    """Return the last map message of a file if it is a snapshot."""
    found = None
    for message in file.messages(schemas=(MapUpdate.SCHEMA,)):
        found = message if isinstance(message, MapUpdate) and message.kind == "snapshot" else None
    return found


def _stream_table(file: ResultsFile) -> dict[str, Any]:
    """Return the stream's table of the configuration that the file carries, empty without one."""
    try:
        table = tomllib.loads(file.config_text)
    except tomllib.TOMLDecodeError:
        return {}
    stream: dict[str, Any] = table.get("streams", {}).get(file.stream, {})
    return stream


def _materials(found: set[str], offered: Sequence[str]) -> dict[str, Material]:
    known: dict[str, Material] = {}
    for name in [*offered, *sorted(found)]:
        if len(found - set(known)) == 0:
            break
        try:
            material = load_material(name)
        except (OSError, ValueError) as error:
            if name in found:
                continue
            if Path(name).is_file():
                raise ConfigError(f"map: --material {name}: {error}") from error
            continue
        known[material.name] = material
    missing = sorted(found - set(known))
    if missing:
        raise ConfigError(
            f"map: material {missing[0]!r} is not built in: give its file as --material FILE.cif"
        )
    return {name: known[name] for name in sorted(found)}


def _built(
    results: list[LaueResult],
    stream: dict[str, Any],
    materials: dict[str, Material],
    tolerance_deg: float,
    words: str,
) -> MapUpdate:
    shape, step_um, results = _placed(results, stream, words)
    key = results[0].key
    try:
        built = MapBuilder(
            shape,
            step_um,
            key.source,
            key.series_uid,
            symmetry={name: material.proper_point_group for name, material in materials.items()},
            tolerance_deg=tolerance_deg,
        )
        for result in results:
            built.add(result)
    except ValueError as error:
        raise ConfigError(f"map: {words}: {error}") from error
    return built.snapshot()


def _placed(
    results: list[LaueResult], stream: dict[str, Any], words: str
) -> tuple[tuple[int, ...], tuple[float, ...], list[LaueResult]]:
    """Return shape and step of the scan, and the results that have a place on it."""
    placed = [result for result in results if result.grid_index is not None]
    indices = [result.grid_index for result in placed if result.grid_index is not None]
    if indices and len({len(index) for index in indices}) == 1:
        try:
            scan = msgspec.convert(stream.get("scan"), ScanTable)
            if len(scan.shape) == len(indices[0]):
                return scan.shape, scan.step_um, placed
        except msgspec.ValidationError:
            pass  # without a configuration the grid is as large as what was seen of it
        shape = tuple(int(n) + 1 for n in np.max(np.array(indices), axis=0))
        return shape, (), placed
    placed = [result for result in results if result.position_um is not None]
    positions = [result.position_um for result in placed if result.position_um is not None]
    if not positions:
        raise ConfigError(
            f"map: {words}: the series is no scan: its frames carry neither a grid index nor a position "
            "(the configuration needs a [streams.NAME.scan] table)"
        )
    try:
        grid, found = infer_grid(np.array(positions))
    except (NotAGrid, ValueError) as error:
        raise ConfigError(f"map: {words}: the positions of the frames are no grid: {error}") from error
    here = [
        msgspec.structs.replace(result, grid_index=tuple(int(i) for i in index))
        for result, index in zip(placed, found, strict=True)
    ]
    return grid.shape, grid.step_um, here

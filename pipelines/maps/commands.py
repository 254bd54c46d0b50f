"""``grainwatch map``: the grains of a scan, as a table, as JSON, as a picture."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Any

import typer

from grainwatch.config import ConfigError
from grainwatch.messages import Grain, to_builtins
from pipelines.maps.colours import DIRECTIONS
from pipelines.maps.series_map import SeriesMap, read_map
from pipelines.rotations import to_euler_deg

_SHOWN = 12


def map_(
    series: Annotated[
        list[Path], typer.Argument(help="Results file of a series; several parts after a crash.")
    ],
    plot: Annotated[Path | None, typer.Option("--plot", help="Picture: .png, .pdf or .svg.")] = None,
    direction: Annotated[
        str, typer.Option("--direction", help="Direction of the sample that the colours show: x, y or z.")
    ] = "z",
    material: Annotated[
        list[str] | None,
        typer.Option("--material", "-m", help="Show this material only; a CIF file for one not built in."),
    ] = None,
    plane: Annotated[int | None, typer.Option(help="Plane of a volume, from 0; default the middle.")] = None,
    tolerance: Annotated[
        float | None, typer.Option(help="Link grains anew, with this misorientation in degrees.")
    ] = None,
    json_out: Annotated[
        bool, typer.Option("--json", help="Print the map as JSON (schema grainwatch.map/1).")
    ] = False,
) -> None:
    """Draw the orientation map of a series, also while it is being measured."""
    if direction not in DIRECTIONS:
        raise ConfigError(f"map: --direction: expected x, y or z, got {direction!r}")
    asked = material or []
    found = read_map(series, asked, tolerance)
    only = _only(asked, found)
    if plot is not None:
        _draw(found, plot, direction, only, plane)
    if json_out:
        print(json.dumps(_finite(to_builtins(found.snapshot)), allow_nan=False))
    else:
        _print(found, only, plot)


def _only(asked: list[str], found: SeriesMap) -> str | None:
    """Return the one material to show; a CIF that was named only to be read restricts nothing."""
    names = [name for name in asked if not Path(name).is_file()]
    if len(names) > 1:
        raise ConfigError(f"map: --material: expected one to show, got {', '.join(names)}")
    if names and names[0] not in found.materials:
        known = ", ".join(found.materials)
        raise ConfigError(f"map: --material: no crystal of {names[0]!r} on the map; found: {known}")
    return names[0] if names else None


def _draw(found: SeriesMap, path: Path, direction: str, material: str | None, plane: int | None) -> None:
    # Only a picture needs matplotlib, which takes a second to load.
    from pipelines.maps.plot import draw_map, save

    try:
        save(draw_map(found, direction, material, plane), path)
    except ValueError as error:
        raise ConfigError(f"map: --plot: {error}") from error


def _print(found: SeriesMap, material: str | None, plot: Path | None) -> None:
    update = found.snapshot
    shape = " x ".join(str(n) for n in update.shape)
    step = f", step {' x '.join(f'{s:g}' for s in update.step_um)} um" if any(update.step_um) else ""
    indexed = len({point.grid_index for point in update.points})
    print(f"{found.stream}, series {update.series_uid}: {shape} points{step}")
    print(f"{update.filled} measured, {indexed} with crystals, {len(update.grains)} grains")
    grains = [grain for grain in update.grains if material in (None, grain.material)]
    largest = sorted(grains, key=lambda grain: (-grain.size_points, grain.grain_id))
    print(f"{'grain':>6} {'material':<9} {'points':>7} {'spread':>8}   phi1   Phi    phi2 (deg)")
    for grain in largest[:_SHOWN]:
        print(_line(grain))
    if len(largest) > _SHOWN:
        print(f"   ... and {len(largest) - _SHOWN} smaller ones")
    if plot is not None:
        print(f"picture: {plot}")


def _finite(value: Any) -> Any:
    """JSON knows no NaN: a strain that was not refined is null."""
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _line(grain: Grain) -> str:
    phi1, tilt, phi2 = to_euler_deg(grain.mean_quaternion)
    return (
        f"{grain.grain_id:>6} {grain.material:<9} {grain.size_points:>7} {grain.spread_deg:>8.3f} "
        f"{phi1:>6.1f} {tilt:>6.1f} {phi2:>6.1f}"
    )

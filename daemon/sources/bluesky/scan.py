"""The grid that a plan walks over, from its start document.

Bluesky counts motors from the slowest to the fastest; here x is the fastest. Coordinates grow with
the index on every axis, also where a plan runs downwards.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from grainwatch.config import ScanTable

#: How far a frame may be from where its number puts it, in steps, until its position counts more.
FARTHEST_STEPS: Final = 0.75
MOST_POINTS: Final = 100_000_000

_UM: Final[Mapping[str, float]] = {
    "m": 1e6,
    "cm": 1e4,
    "mm": 1e3,
    "millimeter": 1e3,
    "millimeters": 1e3,
    "um": 1.0,
    "µm": 1.0,
    "μm": 1.0,
    "micron": 1.0,
    "microns": 1.0,
    "micrometer": 1.0,
    "micrometers": 1.0,
    "nm": 1e-3,
    "pm": 1e-6,
    "angstrom": 1e-4,
}


def um_per(unit: Any) -> float | None:
    """Return how many um a unit is, None if it is no length that is known.

    >>> um_per("mm"), um_per(" Microns "), um_per("deg")
    (1000.0, 1.0, None)
    """
    return _UM.get(unit.strip().lower()) if isinstance(unit, str) else None


@dataclass(frozen=True)
class PlanGrid:
    """The points of a plan. All tuples begin with the fastest axis.

    Attributes
    ----------
    shape : tuple of int
    fields : tuple of str
        The data keys with the coordinates.
    snaking : tuple of bool
        An axis that runs backwards every second time.
    extents : tuple of (float, float)
        First and last coordinate, in the motor's units; empty where not known or not equidistant.
    sequential : bool
        The number of an event says at which point it was taken.
    """

    shape: tuple[int, ...]
    fields: tuple[str, ...]
    snaking: tuple[bool, ...]
    extents: tuple[tuple[float, float], ...] = ()
    sequential: bool = True

    @property
    def steps(self) -> tuple[float, ...]:
        """Distance of the points in the motor's units, with the sign of the movement; empty if unknown."""
        return tuple((b - a) / (n - 1) if n > 1 else 0.0 for (a, b), n in self._spans())

    def table(self, um: Sequence[float | None]) -> ScanTable:
        """Return the scan as the flow knows it.

        Parameters
        ----------
        um : sequence of float or None
            How many um the unit of each axis is.
        """
        known = [f for f in um if f is not None]
        step = (
            tuple(abs(s) * f for s, f in zip(self.steps, known, strict=True))
            if self.steps and len(known) == len(self.shape)
            else ()
        )
        return ScanTable(shape=self.shape, step_um=step, snake=self.snaking[0])

    def by_number(self, number: int) -> tuple[int, ...] | None:
        """Return where the `number`-th point, from 0, lies in the order of the plan; None beyond it."""
        if not 0 <= number < math.prod(self.shape):
            return None
        index, rest = [], number
        for n, snake in zip(self.shape, self.snaking, strict=True):
            rest, i = divmod(rest, n)
            index.append(n - 1 - i if snake and rest % 2 else i)
        return tuple(index)

    def upwards(self, index: tuple[int, ...]) -> tuple[int, ...]:
        """Turn axes round along which the plan ran downwards."""
        turned = [s < 0 for s in self.steps] or [False] * len(self.shape)
        pairs = zip(index, self.shape, turned, strict=True)
        return tuple(n - 1 - i if down else i for i, n, down in pairs)

    def _spans(self) -> list[tuple[tuple[float, float], int]]:
        return list(zip(self.extents, self.shape, strict=True)) if self.extents else []


class PlanWalk:
    """The walk of one run over its grid.

    The number of an event counts, as the plan states it exactly. Where the frame was taken elsewhere
    (a plan that takes two frames at each point), its position does. Positions are measured from the first
    frame, because the extents of a relative scan are relative.
    """

    def __init__(self, grid: PlanGrid) -> None:
        self.grid = grid
        self._origin: tuple[float, ...] | None = None

    def index(self, seq_num: int, position: Sequence[float] | None) -> tuple[int, ...] | None:
        """Return the grid index of an event (`seq_num` from 1); None when it lies outside of the grid.

        Parameters
        ----------
        position : sequence of float or None
            Coordinates in the motors' units, x first.
        """
        found = self._commanded(seq_num, position)
        return self.grid.upwards(found) if found is not None else None

    def _commanded(self, seq_num: int, position: Sequence[float] | None) -> tuple[int, ...] | None:
        grid = self.grid
        by_number = grid.by_number(seq_num - 1) if grid.sequential else None
        if position is None or not grid.extents:
            return by_number
        # An axis of one point stays where it is.
        steps = [s or math.inf for s in grid.steps]
        if self._origin is None:
            if not grid.sequential:
                self._origin = tuple(a for a, _ in grid.extents)
            elif by_number is not None:
                pairs = zip(position, by_number, grid.steps, strict=True)
                self._origin = tuple(p - i * s for p, i, s in pairs)
            else:
                return None
        exact = [(p - o) / s for p, o, s in zip(position, self._origin, steps, strict=True)]
        if by_number is not None and all(
            abs(e - i) <= FARTHEST_STEPS for e, i in zip(exact, by_number, strict=True)
        ):
            return by_number
        if not all(map(math.isfinite, exact)):  # far beyond any stage: the difference overflows
            return None
        nearest = tuple(map(round, exact))
        return nearest if all(0 <= i < n for i, n in zip(nearest, grid.shape, strict=True)) else None


def plan_grid(start: Mapping[str, Any], stream: str) -> PlanGrid | None:
    """Return the grid of a run; None for a run that is no scan over a grid.

    Read are ``hints.dimensions``, ``shape``, ``extents``, ``snaking`` and ``num_points``. A scan along
    one line has no shape: it is as long as the number of its points.

    Parameters
    ----------
    start : mapping
        The start document, which may hold anything.
    stream : str
        The event stream with the images: dimensions of another one are left out.
    """
    fields = plan_fields(start, stream)
    points = start.get("num_points")
    points = points if type(points) is int and 0 < points <= MOST_POINTS else None
    shape = _wholes(start.get("shape"))
    if not shape and len(fields) == 1 and points:
        shape = [points]
    if not shape or not 1 <= len(shape) <= 3 or len(fields) != len(shape) or math.prod(shape) > MOST_POINTS:
        return None
    snaking = _snaking(start, len(shape))
    extents = (
        _extents(start.get("extents"), len(shape)) if "list" not in str(start.get("plan_pattern")) else []
    )
    hints = start.get("hints")
    gridding = str(hints.get("gridding", "")) if isinstance(hints, Mapping) else ""
    in_order = "nonsequential" not in gridding and "spiral" not in str(start.get("plan_pattern"))
    sequential = in_order and snaking is not None and points in (None, math.prod(shape))
    if not sequential and not extents:
        return None
    return PlanGrid(
        tuple(reversed(shape)),
        tuple(reversed(fields)),
        tuple(reversed(snaking or [False] * len(shape))),
        tuple(reversed(extents)),
        sequential,
    )


def plan_fields(start: Mapping[str, Any], stream: str) -> list[str]:
    """Return the data keys of the plan's dimensions, slowest first; where motors move together, the first."""
    hints = start.get("hints")
    dimensions = hints.get("dimensions") if isinstance(hints, Mapping) else None
    found: list[str] = []
    for dimension in dimensions if isinstance(dimensions, list | tuple) else ():
        if not isinstance(dimension, list | tuple) or len(dimension) != 2:
            continue
        names, of_stream = dimension
        name = names[0] if isinstance(names, list | tuple) and names else None
        if isinstance(name, str) and name != "time" and isinstance(of_stream, str) and of_stream == stream:
            found.append(name)
    return found


def _wholes(value: Any) -> list[int]:
    """Return a list of whole numbers above 0, empty if it is none."""
    if not isinstance(value, list | tuple) or not all(type(n) is int and n > 0 for n in value):
        return []
    return list(value)


def _snaking(start: Mapping[str, Any], axes: int) -> list[bool] | None:
    """Return which axes snake, slowest first; None where the document does not say it for each."""
    snaking = start.get("snaking")
    if snaking is None:
        # Plans over lists of points say it for all axes at once, in words.
        words = str(start.get("snake_axes", False))
        return {"False": [False] * axes, "True": [False] + [True] * (axes - 1)}.get(words)
    if not isinstance(snaking, list | tuple) or len(snaking) != axes:
        return None
    # There is nothing that the slowest axis could run back for.
    return [bool(s) and i > 0 for i, s in enumerate(snaking)]


def _extents(value: Any, axes: int) -> list[tuple[float, float]]:
    """Return (first, last) of each axis, empty if one is missing."""
    if not isinstance(value, list | tuple) or len(value) != axes:
        return []
    found = []
    for pair in value:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            return []
        first, last = number(pair[0]), number(pair[1])
        if first is None or last is None or not math.isfinite(last - first):
            return []
        found.append((first, last))
    return found


def number(value: Any) -> float | None:
    """Return a finite number as a float, None for anything else."""
    if isinstance(value, np.number) and value.ndim == 0:
        value = value.item()
    if type(value) not in (int, float):
        return None
    try:
        converted = float(value)
    except OverflowError:
        return None
    return converted if math.isfinite(converted) else None

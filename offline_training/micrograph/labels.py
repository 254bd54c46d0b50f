"""Labels of images from a CSV file: what conditions they were made under, and whose crops belong together."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

FILE: Final = "file"
GROUPS: Final = ("group", "source")
"""Columns that name what a split must not part: specimen, spot, original image."""

Values = npt.NDArray[np.float32] | npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Conditions:
    """Under what the images were made: numbers, or a class.

    Attributes
    ----------
    names : tuple of str
        Of the numbers; the one of the class.
    values : (n, numbers) float32 or (n,) int64
        Of each image; classes from 0.
    classes : tuple of str
        Their names; empty for numbers.
    """

    names: tuple[str, ...]
    values: Values
    classes: tuple[str, ...] = ()

    def of(self, images: npt.NDArray[np.int64]) -> Values:
        """Return those of some images."""
        return self.values[images]

    def text(self, value: npt.NDArray[np.generic] | np.generic) -> str:
        """Return one condition in words."""
        if self.classes:
            return self.classes[int(value)]
        numbers = np.asarray(value, dtype=np.float64).tolist()
        return ", ".join(f"{name} {number:.4g}" for name, number in zip(self.names, numbers, strict=True))


@dataclass(frozen=True, eq=False)
class Labels:
    """What a CSV file says of images.

    Attributes
    ----------
    files : tuple of str
        Names of the images.
    groups : tuple of str
        One an image; the file itself where no column says it.
    conditions : Conditions or None
    """

    files: tuple[str, ...]
    groups: tuple[str, ...]
    conditions: Conditions | None


def read_labels(path: Path, wanted: Sequence[str] = ()) -> Labels:
    """Read a CSV file with a head line.

    A column "file" names the images, one called "group" or "source" what belongs together. All others, or
    those that are `wanted`, are the condition: numbers; or one class, if a column holds words or its name
    begins with "class".

    Raises
    ------
    ValueError
        Naming the file, and the line where one is at fault.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as opened:
            rows = list(csv.reader(opened))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: labels cannot be read ({error}); expected a CSV file") from error
    lines = [(number, row) for number, row in enumerate(rows, start=1) if any(cell.strip() for cell in row)]
    if len(lines) < 2:
        raise ValueError(f"{path}: expected a head line with a column {FILE!r}, and a line for each image")
    head = [cell.strip() for cell in lines[0][1]]
    if FILE not in head:
        raise ValueError(f"{path}: no column {FILE!r}; columns are {', '.join(head)}")
    if len(set(head)) < len(head):
        raise ValueError(f"{path}: two columns have the same name: {', '.join(head)}")
    for number, row in lines[1:]:
        if len(row) != len(head):
            raise ValueError(f"{path}, line {number}: {len(row)} columns, the head line has {len(head)}")
    numbers = [number for number, _ in lines[1:]]
    columns = {name: [row[i].strip() for _, row in lines[1:]] for i, name in enumerate(head)}
    files = columns[FILE]
    for place, name in enumerate(files):
        if not name or name in files[:place]:
            what = f"{name!r} for the second time" if name else "no file"
            raise ValueError(f"{path}, line {numbers[place]}: {what}; expected one line an image")
    group = next((name for name in GROUPS if name in head), FILE)
    for place, name in enumerate(columns[group]):
        if not name:
            raise ValueError(f"{path}, line {numbers[place]}: {group} is empty")
    named = list(wanted) or [name for name in head if name not in (FILE, *GROUPS)]
    for name in named:
        if name not in head or name == FILE:
            raise ValueError(f"{path}: no column {name!r} to learn; columns are {', '.join(head)}")
    conditions = _conditions(path, numbers, {name: columns[name] for name in named}) if named else None
    return Labels(tuple(files), tuple(columns[group]), conditions)


def _conditions(path: Path, lines: Sequence[int], columns: dict[str, list[str]]) -> Conditions:
    parsed: list[list[float]] = []
    for name, cells in columns.items():
        for line, cell in zip(lines, cells, strict=True):
            if not cell:
                raise ValueError(f"{path}, line {line}: {name} is empty")
        numbers = [_number(cell) for cell in cells]
        if name.lower().startswith("class") or all(number is None for number in numbers):
            if len(columns) > 1:
                raise ValueError(
                    f"{path}: {name} is a class, and {', '.join(n for n in columns if n != name)} stands"
                    " beside it: a condition is one class or several numbers; choose with --label"
                )
            classes = sorted(set(cells), key=lambda cell: (_number(cell) is None, _number(cell) or 0.0, cell))
            if len(classes) < 2:
                raise ValueError(f"{path}: all images are of class {classes[0]!r}; expected two or more")
            return Conditions((name,), np.array([classes.index(cell) for cell in cells]), tuple(classes))
        for line, cell, number in zip(lines, cells, numbers, strict=True):
            if number is None or not math.isfinite(number):
                raise ValueError(f"{path}, line {line}: {name} is {cell!r}, expected a number")
        parsed.append([number for number in numbers if number is not None])
    return Conditions(tuple(columns), np.array(parsed, dtype=np.float32).T.copy())


def _number(cell: str) -> float | None:
    try:
        return float(cell)
    except ValueError:
        return None

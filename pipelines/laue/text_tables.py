"""Text files of numbers with comments, read so that every complaint names file and line."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]

_NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?|[-+]?(?:nan|inf)\b", re.IGNORECASE)
_KEY_VALUE = re.compile(r"#\s*([A-Za-z_]\w*)\s*:\s*(.*)")


class FileFormatError(ValueError):
    """A file that is not what it should be; the message names file, line and expectation."""


def numbers_in(text: str) -> list[float]:
    """Return all numbers in a text, whatever separates them.

    >>> numbers_in("#[[ 0.5 -1. 2e-3]")
    [0.5, -1.0, 0.002]
    """
    return [float(v) for v in _NUMBER.findall(text)]


class TextLines:
    """The lines of a file, counted from 0 here and from 1 in messages."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            self._lines = self.path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise FileFormatError(f"{self.path}: not a text file ({error.reason})") from error
        if not self._lines:
            raise FileFormatError(f"{self.path}: the file is empty")

    def __len__(self) -> int:
        """Return the number of lines."""
        return len(self._lines)

    def __iter__(self) -> Iterator[str]:
        """Iterate over the lines."""
        return iter(self._lines)

    def text(self, i: int) -> str:
        """Return a line."""
        return self._lines[i]

    def error(self, i: int, expectation: str, found: str | None = None) -> FileFormatError:
        """Return an error about line i."""
        shown = "" if found is None else f"; found {found.strip()[:80]!r}"
        return FileFormatError(f"{self.path}, line {i + 1}: {expectation}{shown}")

    def key_values(self) -> dict[str, tuple[int, str]]:
        """Return the lines ``# key : value`` as key -> (line, value)."""
        found = {}
        for i, line in enumerate(self._lines):
            match = _KEY_VALUE.match(line)
            if match:
                found[match.group(1)] = (i, match.group(2).strip())
        return found

    def value(self, keys: Mapping[str, tuple[int, str]], key: str) -> float:
        """Return the number of ``# key : number``."""
        if key not in keys:
            raise FileFormatError(f"{self.path}: expected a line '# {key} : number'; there is none")
        i, text = keys[key]
        try:
            number = float(text)
        except ValueError:
            raise self.error(i, f"expected a number for {key}", text) from None
        if not np.isfinite(number):
            raise self.error(i, f"expected a finite number for {key}", text)
        return number

    def numbers(self, i: int, count: int) -> list[float]:
        """Return the `count` finite numbers of line i."""
        if i >= len(self._lines):
            raise self.error(len(self._lines) - 1, f"the file ends where {count} numbers were expected")
        values = numbers_in(self._lines[i])
        if len(values) != count or not np.all(np.isfinite(values)):
            raise self.error(i, f"expected {count} numbers", self._lines[i])
        return values

    def matrix(self, i: int) -> FloatArray:
        """Return the 3 x 3 matrix in lines i to i + 2."""
        return np.array([self.numbers(i + row, 3) for row in range(3)])

    def columns(self, required: Sequence[str], default: Sequence[str] = ()) -> tuple[int, list[str]]:
        """Return where the first line of data is, and the names of the columns.

        Parameters
        ----------
        required : sequence of str
            Names that must be there, lower case.
        default : sequence of str
            Names to assume where the file begins with numbers; without it that is an error.
        """
        for i, line in enumerate(self._lines):
            if not line.strip() or line.startswith("#"):
                continue
            names = line.split()
            if default and all(_is_number(name) for name in names):
                return i, list(default)
            missing = set(required) - {name.lower() for name in names}
            if missing:
                raise self.error(i, f"expected column names with {', '.join(sorted(missing))}", line)
            repeated = {name for name in names if [n.lower() for n in names].count(name.lower()) > 1}
            if repeated:
                raise self.error(i, f"column names are repeated: {', '.join(sorted(repeated))}")
            return i + 1, names
        raise self.error(0, f"expected column names ({', '.join(required)}) and rows; there are none")

    def table(self, where: Iterable[int], names: Sequence[str]) -> dict[str, FloatArray]:
        """Return the rows of numbers among the lines `where` as name -> (n,); comments are passed over."""
        rows = []
        for i in where:
            line = self._lines[i]
            if not line.strip() or line.lstrip().startswith("#"):
                continue
            cells = line.replace(",", " ").split()
            if len(cells) != len(names) or not all(_is_number(cell) for cell in cells):
                raise self.error(i, f"expected {len(names)} numbers ({' '.join(names)})", line)
            rows.append([float(cell) for cell in cells])
        values = np.array(rows, dtype=np.float64).reshape(-1, len(names))
        return {name: np.ascontiguousarray(values[:, c]) for c, name in enumerate(names)}


def _is_number(text: str) -> bool:
    return _NUMBER.fullmatch(text) is not None

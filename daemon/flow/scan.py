"""Where in a scan a frame belongs: by its number, or by the position that came with it."""

from __future__ import annotations

import math

from grainwatch.config import ScanTable


def grid_index(scan: ScanTable, number: int) -> tuple[int, ...] | None:
    """Return (ix, iy[, iz]) of the `number`-th point, from 0; None beyond the grid.

    x runs fastest; with `snake` every second line, counted through all planes, runs backwards.

    >>> [grid_index(ScanTable(shape=(3, 2), snake=True), n) for n in (0, 2, 3, 5, 6)]
    [(0, 0), (2, 0), (2, 1), (0, 1), None]
    """
    if not 0 <= number < math.prod(scan.shape):
        return None
    line, ix = divmod(number, scan.shape[0])
    if scan.snake and line % 2:
        ix = scan.shape[0] - 1 - ix
    index = [ix]
    for n in scan.shape[1:]:
        line, i = divmod(line, n)
        index.append(i)
    return tuple(index)


class GridWalk:
    """The grid of one series.

    Positions count where the scan has steps and the frames bring coordinates. They are measured
    from the origin that the scan names; else from the first frame that came, whose own place its
    number gives.
    """

    def __init__(self, scan: ScanTable, first_frame: int) -> None:
        self._scan = scan
        self._first_frame = first_frame
        self._origin_um = scan.origin_um or None

    def index(self, frame: int, position_um: tuple[float, ...] | None) -> tuple[int, ...] | None:
        """Return the grid index of a frame; None when it lies outside of the grid."""
        by_number = grid_index(self._scan, frame - self._first_frame)
        step = self._scan.step_um
        if position_um is None or len(position_um) != len(step) or not all(step):
            return by_number
        if not all(math.isfinite(p) for p in position_um):
            return None
        if self._origin_um is None:
            if by_number is None:
                return None
            pairs = zip(position_um, by_number, step, strict=True)
            self._origin_um = tuple(p - i * s for p, i, s in pairs)
        offsets = zip(position_um, self._origin_um, step, strict=True)
        exact = [(p - o) / s for p, o, s in offsets]
        if not all(map(math.isfinite, exact)):  # far beyond any stage: the difference overflows
            return None
        index = tuple(map(round, exact))
        inside = all(0 <= i < n for i, n in zip(index, self._scan.shape, strict=True))
        return index if inside else None

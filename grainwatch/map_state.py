"""The map as a subscriber knows it: map updates in, points and grains out."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Self

import msgspec

from grainwatch.messages import Grain, MapPoint, MapUpdate


@dataclass
class MapState:
    """What the updates of one map add up to.

    Attributes
    ----------
    points : dict of grid index to list of MapPoint
        Best crystal first; an empty list where a frame held none; no key where nothing was measured.
    grains : dict of grain id to Grain
    """

    source: str = ""
    series_uid: str = ""
    shape: tuple[int, ...] = ()
    step_um: tuple[float, ...] = ()
    points: dict[tuple[int, ...], list[MapPoint]] = field(default_factory=dict)
    grains: dict[int, Grain] = field(default_factory=dict)
    _into: dict[int, int] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, updates: Iterable[MapUpdate]) -> Self:
        """Return the state after updates, in the order in which they were published."""
        state = cls()
        for update in updates:
            state.apply(update)
        return state

    def apply(self, update: MapUpdate) -> None:
        """Take in one update. A snapshot, or an update of another series, replaces everything."""
        if update.kind == "snapshot" or update.series_uid != self.series_uid:
            self.points.clear()
            self.grains.clear()
            self._into.clear()
        self.source, self.series_uid = update.source, update.series_uid
        self.shape, self.step_um = update.shape, update.step_um
        for absorbed, into in update.merged:
            self._into[absorbed] = into
            self.grains.pop(absorbed, None)
        for index in {point.grid_index for point in update.points} | set(update.empty):
            self.points[index] = []
        for point in update.points:
            self.points[point.grid_index].append(point)
        for grain in update.grains:
            self.grains[grain.grain_id] = grain
            if grain.size_points == 0:
                del self.grains[grain.grain_id]

    def current(self) -> list[MapPoint]:
        """Return all points with the ids that their grains have now, in the order of the grid."""
        ordered = sorted(self.points, key=lambda index: index[::-1])
        return [
            msgspec.structs.replace(point, grain_id=self._survivor(point.grain_id))
            for index in ordered
            for point in self.points[index]
        ]

    def _survivor(self, grain_id: int) -> int:
        while grain_id in self._into:
            grain_id = self._into[grain_id]
        return grain_id

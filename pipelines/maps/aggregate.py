"""The map of a series while it runs: results in, map deltas out, a snapshot at the end."""

from __future__ import annotations

from collections.abc import Sequence

from grainwatch.messages import AnyMessage, LaueResult
from pipelines.frame import StreamContext
from pipelines.laue.crystal import Material
from pipelines.maps.builder import MapBuilder


class SeriesMap:
    """Feeds the results of one series to a `MapBuilder`; frames without a grid point are left out."""

    def __init__(self, builder: MapBuilder) -> None:
        self._builder = builder

    def add(self, result: AnyMessage) -> Sequence[AnyMessage]:
        """Take a result; return the delta of the map."""
        if not isinstance(result, LaueResult) or result.grid_index is None:
            return ()
        return (self._builder.add(result),)

    def finish(self) -> Sequence[AnyMessage]:
        """Return the snapshot."""
        return (self._builder.snapshot(),)


def map_aggregator(
    context: StreamContext, series_uid: str, materials: Sequence[Material], tolerance_deg: float
) -> SeriesMap | None:
    """Return the map of a series, None for a stream without a scan table."""
    if context.scan is None:
        return None
    symmetry = {m.name: m.proper_point_group for m in materials}
    return SeriesMap(
        MapBuilder(
            context.scan.shape,
            context.scan.step_um,
            context.stream,
            series_uid,
            symmetry=symmetry,
            tolerance_deg=tolerance_deg,
        )
    )

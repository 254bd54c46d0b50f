"""Maps that grow while the scan runs: results in, map updates out."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from grainwatch.messages import Crystal, Grain, LaueResult, MapPoint, MapUpdate
from pipelines.maps.grains import Changes, Grains, GrainSet, Node
from pipelines.maps.links import link
from pipelines.rotations import to_fundamental_zone

FloatArray = npt.NDArray[np.float64]

DEFAULT_TOLERANCE_DEG = 5.0
"""As `map_tolerance_deg` of the Laue pipeline."""

MAX_TOLERANCE_DEG = 30.0
"""Half the smallest rotation of a crystal's symmetry (60 deg): below it the equivalent of a linked
crystal is unambiguous."""


class _Entry(NamedTuple):
    """What a map point says beside its place and its grain."""

    frame: int
    rank: int
    material: str
    quaternion: tuple[float, float, float, float]
    match_rate: float
    false_probability: float
    residual_px: float
    strain_sample: tuple[float, float, float, float, float, float]


class MapBuilder:
    """The map of one series: crystals on a scan grid, linked to grains.

    Crystals of grid points that touch (4 neighbours in a plane, 6 in a volume) are linked when
    they are of the same material and their symmetry-reduced misorientation is at most the
    tolerance; a crystal is linked to at most one crystal of each neighbour, the pairs with the
    smallest misorientation first. A grain is a set of crystals that links connect. Twins, and
    grains that overlap in one frame, are apart because crystals of one point are never linked.

    Frames may come in any order and leave holes. A frame at a grid point that has been measured
    already replaces its crystals; a grain that falls apart by it is split: the largest piece
    keeps the id, and the update lists the points that changed their grain.

    Parameters
    ----------
    shape : tuple of int
        (nx[, ny[, nz]]).
    step_um : tuple of float
        Distance between grid points, empty when unknown.
    source, series_uid : str
        As in the results' keys.
    symmetry : mapping of str to (n, 4) array
        Proper point group of each material (`Material.proper_point_group`).
    tolerance_deg : float
        Largest misorientation of neighbours in one grain.

    Raises
    ------
    ValueError
        If the shape or the tolerance cannot be.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        step_um: tuple[float, ...],
        source: str,
        series_uid: str,
        *,
        symmetry: Mapping[str, npt.ArrayLike],
        tolerance_deg: float = DEFAULT_TOLERANCE_DEG,
    ) -> None:
        if not 1 <= len(shape) <= 3 or min(shape) < 1:
            raise ValueError(f"map shape {shape}: expected 1 to 3 positive whole numbers")
        if not 0.0 < tolerance_deg < MAX_TOLERANCE_DEG:
            raise ValueError(
                f"tolerance {tolerance_deg} deg: expected between 0 and {MAX_TOLERANCE_DEG:g} deg"
            )
        self.shape = tuple(shape)
        self.step_um = tuple(step_um)
        self.source = source
        self.series_uid = series_uid
        self.tolerance_deg = tolerance_deg
        self._names = list(symmetry)
        self._materials = {name: number for number, name in enumerate(symmetry)}
        self._groups = [np.ascontiguousarray(ops, dtype=np.float64) for ops in symmetry.values()]
        sizes = [len(group) for group in self._groups]
        self._group_start = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        self._operators = np.concatenate([np.empty((0, 4)), *self._groups])
        self._grains: Grains[_Entry] = Grains(self.shape)
        self._nodes: dict[int, list[Node[_Entry]]] = {}
        self._strides = tuple(math.prod(self.shape[:axis]) for axis in range(len(self.shape)))

    @property
    def filled(self) -> int:
        """Number of grid points that have been measured."""
        return len(self._nodes)

    def add(self, result: LaueResult) -> MapUpdate:
        """Put a frame's crystals on the map.

        Returns
        -------
        MapUpdate
            The delta: the frame's points, best crystal first, and the grains that they changed.

        Raises
        ------
        ValueError
            If the result is of another series, has no place on the grid, or a crystal is of a
            material without symmetry or has no orientation. The map is as before then.
        """
        place, point = self._place(result)
        entries = self._entries(result)
        materials = np.array([self._materials[entry.material] for entry in entries], dtype=np.int32)
        quaternions = np.array([entry.quaternion for entry in entries], dtype=np.float64).reshape(-1, 4)
        quaternions /= np.linalg.norm(quaternions, axis=1, keepdims=True)

        changes = Changes[_Entry]()
        linked = self._linked(point, quaternions, materials, self._neighbours(place, point))
        new = [
            self._grains.insert(
                point, int(material), quaternion, entry, others, self._groups[material], changes
            )
            for material, quaternion, entry, others in zip(
                materials, quaternions, entries, linked, strict=True
            )
        ]
        old = self._nodes.get(point, [])
        self._nodes[point] = new
        self._replace(old, new, changes)
        return self._delta(point, new, changes)

    def snapshot(self) -> MapUpdate:
        """Return the whole map: all points in the order of the grid, all grains."""
        points = [self._map_point(node) for point in sorted(self._nodes) for node in self._nodes[point]]
        empty = [self._grid_index(point) for point in sorted(self._nodes) if not self._nodes[point]]
        grains = [self._grains.grains[grain_id] for grain_id in sorted(self._grains.grains)]
        return self._update("snapshot", points, self._describe(grains), (), empty)

    def _place(self, result: LaueResult) -> tuple[tuple[int, ...], int]:
        """Return the grid index of a result, and the same as one number, x fastest."""
        key = result.key
        if key.series_uid != self.series_uid:
            raise ValueError(f"frame {key.frame} is of series {key.series_uid}, the map of {self.series_uid}")
        place = result.grid_index
        if place is None:
            raise ValueError(f"frame {key.frame} carries no grid index: the stream needs a [scan] table")
        if len(place) != len(self.shape) or not all(
            0 <= i < n for i, n in zip(place, self.shape, strict=True)
        ):
            raise ValueError(f"frame {key.frame}: grid index {place} lies outside the scan of {self.shape}")
        return place, sum(i * stride for i, stride in zip(place, self._strides, strict=True))

    def _entries(self, result: LaueResult) -> list[_Entry]:
        intensity = result.peaks.numpy()[:, 2]
        ranked = sorted(result.crystals, key=lambda crystal: _weight(crystal, intensity), reverse=True)
        return [self._entry(result.key.frame, rank, crystal) for rank, crystal in enumerate(ranked)]

    def _entry(self, frame: int, rank: int, crystal: Crystal) -> _Entry:
        if crystal.material not in self._materials:
            known = ", ".join(self._materials) or "none"
            raise ValueError(
                f"frame {frame}: the map knows no symmetry of material {crystal.material!r}; known: {known}"
            )
        if not math.isclose(math.hypot(*crystal.quaternion), 1.0, abs_tol=1e-3):
            raise ValueError(f"frame {frame}: {crystal.quaternion} is no unit quaternion")
        e = crystal.strain_sample.numpy()
        strain = (
            float(e[0, 0]),
            float(e[1, 1]),
            float(e[2, 2]),
            float(e[1, 2]),
            float(e[0, 2]),
            float(e[0, 1]),
        )
        return _Entry(
            frame,
            rank,
            crystal.material,
            crystal.quaternion,
            crystal.match_rate,
            crystal.false_probability,
            crystal.residual_px,
            strain,
        )

    def _neighbours(self, place: tuple[int, ...], point: int) -> list[list[Node[_Entry]]]:
        """Return the crystals of the measured neighbours, in the order of the grid."""
        lower = [point - s for i, s in zip(place, self._strides, strict=True) if i > 0]
        upper = [point + s for i, s, n in zip(place, self._strides, self.shape, strict=True) if i + 1 < n]
        return [nodes for p in (*reversed(lower), *upper) if (nodes := self._nodes.get(p))]

    def _linked(
        self,
        point: int,
        quaternions: FloatArray,
        materials: npt.NDArray[np.int32],
        neighbours: list[list[Node[_Entry]]],
    ) -> list[list[Node[_Entry]]]:
        """Return which nodes each new crystal is linked to."""
        linked: list[list[Node[_Entry]]] = [[] for _ in quaternions]
        if not neighbours or len(quaternions) == 0:
            return linked
        there = list(itertools.chain.from_iterable(neighbours))
        counts = [len(nodes) for nodes in neighbours]
        ordinal = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
        precedes = np.array([node.point < point for node in there])
        for row, other in self._pairs(quaternions, materials, there, ordinal, precedes):
            linked[row].append(there[other])
        return linked

    def _pairs(
        self,
        quaternions: FloatArray,
        materials: npt.NDArray[np.int32],
        there: list[Node[_Entry]],
        ordinal: npt.NDArray[np.int32],
        precedes: npt.NDArray[np.bool_],
    ) -> list[list[int]]:
        """Return pairs of rows of `quaternions` and `there` that are the same crystal; see `link`."""
        pairs = link(
            quaternions,
            materials,
            np.array([node.quaternion for node in there]),
            np.array([node.material for node in there], dtype=np.int32),
            ordinal,
            precedes,
            self._operators,
            self._group_start,
            math.cos(math.radians(self.tolerance_deg) / 2),
        )
        out: list[list[int]] = pairs.tolist()
        return out

    def _replace(self, old: list[Node[_Entry]], new: list[Node[_Entry]], changes: Changes[_Entry]) -> None:
        """Remove a point's former crystals, after the new ones have joined, so that links hold.

        A crystal that stands alone and was there before, alone as well, keeps its grain's id.
        """
        alone_before = [node for node in old if len(node.grain.nodes) == 1]
        alone_now = [node for node in new if not node.links]
        heirs: list[list[int]] = []
        if alone_before and alone_now:
            heirs = self._pairs(
                np.array([node.quaternion for node in alone_now]),
                np.array([node.material for node in alone_now], dtype=np.int32),
                alone_before,
                np.zeros(len(alone_before), dtype=np.int32),
                np.zeros(len(alone_before), dtype=np.bool_),
            )
        for node in old:
            self._grains.remove(node, changes)
        for now, before in heirs:
            del changes.grains[alone_before[before].grain]
            self._grains.rename(alone_now[now], alone_before[before].grain.grain_id)

    def _delta(self, point: int, new: list[Node[_Entry]], changes: Changes[_Entry]) -> MapUpdate:
        moved = sorted({node.point for node in changes.moved} - {point})
        nodes = [*new, *itertools.chain.from_iterable(self._nodes[p] for p in moved)]
        return self._update(
            "delta",
            [self._map_point(node) for node in nodes],
            self._describe(list(changes.grains)),
            tuple(changes.merged),
            [] if new else [self._grid_index(point)],
        )

    def _update(
        self,
        kind: str,
        points: list[MapPoint],
        grains: list[Grain],
        merged: tuple[tuple[int, int], ...],
        empty: list[tuple[int, ...]],
    ) -> MapUpdate:
        return MapUpdate(
            source=self.source,
            series_uid=self.series_uid,
            shape=self.shape,
            step_um=self.step_um,
            kind=kind,
            points=tuple(points),
            grains=tuple(grains),
            merged=merged,
            empty=tuple(empty),
            filled=self.filled,
        )

    def _grid_index(self, point: int) -> tuple[int, ...]:
        return tuple(point // stride % n for stride, n in zip(self._strides, self.shape, strict=True))

    def _map_point(self, node: Node[_Entry]) -> MapPoint:
        entry = node.data
        return MapPoint(
            grid_index=self._grid_index(node.point),
            frame=entry.frame,
            rank=entry.rank,
            material=entry.material,
            quaternion=entry.quaternion,
            grain_id=node.grain.grain_id,
            match_rate=entry.match_rate,
            false_probability=entry.false_probability,
            residual_px=entry.residual_px,
            strain_sample=entry.strain_sample,
        )

    def _describe(self, grains: Iterable[GrainSet[_Entry]]) -> list[Grain]:
        """Return the messages of grains, in the order of their ids.

        The mean is the eigenvector of the moment with the largest eigenvalue lambda (Markley et
        al. 2007). As n - lambda is the sum of sin^2(theta/2) over the n crystals, it gives the
        root mean square misorientation without visiting them.
        """
        ordered = sorted(grains, key=lambda grain: grain.grain_id)
        if not ordered:
            return []
        counts = np.array([max(len(grain.nodes), 1) for grain in ordered])
        values, vectors = np.linalg.eigh(np.stack([grain.moment for grain in ordered]))
        sine = np.sqrt(np.clip(1.0 - values[:, -1] / counts, 0.0, 1.0))
        spread = np.degrees(2.0 * np.arcsin(sine))
        out = []
        for grain, mean, spread_deg in zip(ordered, self._means(ordered, vectors), spread, strict=True):
            size = len(grain.points)
            out.append(
                Grain(
                    grain_id=grain.grain_id,
                    material=self._names[grain.material],
                    size_points=size,
                    mean_quaternion=mean,
                    spread_deg=float(spread_deg) if size else 0.0,
                    centre=tuple((grain.centre_sum / max(size, 1)).tolist()),
                )
            )
        return out

    def _means(
        self, grains: list[GrainSet[_Entry]], vectors: FloatArray
    ) -> list[tuple[float, float, float, float]]:
        """Return the eigenvectors of the largest eigenvalues in the fundamental zone; 1 for no crystal."""
        means = np.tile([1.0, 0.0, 0.0, 0.0], (len(grains), 1))
        full = np.array([bool(grain.nodes) for grain in grains])
        materials = np.array([grain.material for grain in grains])
        for material in set(materials[full].tolist()):
            which = full & (materials == material)
            means[which] = to_fundamental_zone(vectors[which, :, -1], self._groups[material])
        return [(w, x, y, z) for w, x, y, z in means.tolist()]


def _weight(crystal: Crystal, intensity: FloatArray) -> tuple[float, int]:
    # How much of the beam a crystal has: the light of its spots; where the peaks have none, their number.
    spots = crystal.spot_indices.numpy()
    known = spots[(spots >= 0) & (spots < len(intensity))]
    return float(np.sum(intensity[known])), crystal.spots_matched

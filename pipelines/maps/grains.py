"""Grains: sets of crystals that are linked from grid point to grid point.

A grain is a connected component of the graph whose nodes are crystals (one at one grid point)
and whose edges are links between neighbours. Links depend on two points alone, so grains do not
depend on the order of arrival, only their numbers do.

Nodes join by relabelling the smaller grain (n log n in all), and leave by a search that starts
at the neighbours of the removed node and stops as soon as they have met again, so that no step
costs as much as the map.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt

from pipelines.maps.links import left_matrix, nearest_operator

FloatArray = npt.NDArray[np.float64]
T = TypeVar("T")


@dataclass(slots=True, eq=False)
class Node(Generic[T]):
    """One crystal at one grid point.

    `point` is the grid index, x fastest, as one number; `branch` is the symmetry equivalent of
    `quaternion` that lies next to those of the linked nodes; `data` is the caller's.
    """

    point: int
    material: int
    quaternion: FloatArray
    data: T
    branch: FloatArray
    grain: GrainSet[T]
    links: list[Node[T]] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class GrainSet(Generic[T]):
    """The nodes of a grain and their sums.

    `nodes` is an ordered set; `points` counts nodes per grid point; `moment` is the sum of
    b bᵀ over the branches b, (4, 4); `centre_sum` the sum of grid indices over the points, (d,).
    """

    grain_id: int
    material: int
    nodes: dict[Node[T], None]
    points: dict[int, int]
    moment: FloatArray
    centre_sum: FloatArray
    removals: int = 0


@dataclass(slots=True)
class Changes(Generic[T]):
    """What one replacement did.

    Attributes
    ----------
    grains : ordered set of grains whose members changed; an empty one is gone
    merged : list of (absorbed id, surviving id), in the order in which it happened
    moved : ordered set of nodes that a split gave a new grain id
    """

    grains: dict[GrainSet[T], None] = field(default_factory=dict)
    merged: list[tuple[int, int]] = field(default_factory=list)
    moved: dict[Node[T], None] = field(default_factory=dict)


class Grains(Generic[T]):
    """All grains of a map.

    Parameters
    ----------
    shape : tuple of int
        Grid points along each axis.

    Attributes
    ----------
    grains : dict of int to GrainSet
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        self._shape = shape
        self._next_id = 0
        self.grains: dict[int, GrainSet[T]] = {}

    def insert(
        self,
        point: int,
        material: int,
        quaternion: FloatArray,
        data: T,
        linked: list[Node[T]],
        group: FloatArray,
        changes: Changes[T],
    ) -> Node[T]:
        """Add a crystal that is linked to `linked`; join or merge their grains, or found one.

        Parameters
        ----------
        quaternion : (4,) array
            Sample -> crystal.
        group : (n, 4) array
            Symmetry operators of its material.
        """
        grain = linked[0].grain if linked else self._found(material)
        branch = quaternion
        if linked:
            operator = nearest_operator(linked[0].branch, quaternion, group, 0, len(group))
            branch = left_matrix(group[operator]) @ quaternion
        node = Node(point, material, quaternion, data, branch, grain, list(linked))
        self._enter(node, grain)
        for other in linked:
            other.links.append(node)
            if other.grain is not node.grain:
                self._merge(node, other, group, changes)
        changes.grains[node.grain] = None
        return node

    def remove(self, node: Node[T], changes: Changes[T]) -> None:
        """Take a crystal away; what falls apart becomes grains of its own.

        The largest piece keeps the id (of equal ones that with the first point in the grid).
        """
        grain = node.grain
        for other in node.links:
            other.links.remove(node)
        self._leave(node, grain)
        changes.grains[grain] = None
        changes.moved.pop(node, None)
        if not grain.nodes:
            del self.grains[grain.grain_id]
        elif len(node.links) > 1:
            for piece in self._pieces(node.links):
                self._split(grain, piece, changes)
        self._renew(grain)

    def rename(self, node: Node[T], grain_id: int) -> None:
        """Give the grain of `node`, which nobody has seen yet, an id that has become free."""
        del self.grains[node.grain.grain_id]
        node.grain.grain_id = grain_id
        self.grains[grain_id] = node.grain

    def _found(self, material: int) -> GrainSet[T]:
        grain = GrainSet[T](self._next_id, material, {}, {}, np.zeros((4, 4)), np.zeros(len(self._shape)))
        self.grains[self._next_id] = grain
        self._next_id += 1
        return grain

    def _index(self, point: int) -> FloatArray:
        return np.array(np.unravel_index(point, self._shape, order="F"), dtype=np.float64)

    def _enter(self, node: Node[T], grain: GrainSet[T]) -> None:
        node.grain = grain
        grain.nodes[node] = None
        grain.moment += np.outer(node.branch, node.branch)
        count = grain.points.get(node.point, 0)
        grain.points[node.point] = count + 1
        if count == 0:
            grain.centre_sum += self._index(node.point)

    def _leave(self, node: Node[T], grain: GrainSet[T]) -> None:
        del grain.nodes[node]
        grain.moment -= np.outer(node.branch, node.branch)
        grain.removals += 1
        grain.points[node.point] -= 1
        if grain.points[node.point] == 0:
            del grain.points[node.point]
            grain.centre_sum -= self._index(node.point)

    def _renew(self, grain: GrainSet[T]) -> None:
        """Sum anew once as many nodes have left as are there: rounding does not pile up."""
        if grain.nodes and grain.removals >= len(grain.nodes):
            branches = np.stack([node.branch for node in grain.nodes])
            grain.moment = branches.T @ branches
            grain.removals = 0

    def _merge(self, a: Node[T], b: Node[T], group: FloatArray, changes: Changes[T]) -> None:
        """Unite the grains of two linked nodes: the larger takes in the smaller, the smaller id survives."""
        if len(a.grain.nodes) < len(b.grain.nodes):
            a, b = b, a
        into, absorbed = a.grain, b.grain
        operator = nearest_operator(a.branch, b.branch, group, 0, len(group))
        turn = left_matrix(group[operator])
        for node in absorbed.nodes:
            node.branch = turn @ node.branch
            node.grain = into
        into.nodes |= absorbed.nodes
        into.moment += turn @ absorbed.moment @ turn.T
        for point, count in absorbed.points.items():
            before = into.points.get(point, 0)
            into.points[point] = before + count
            if before:
                into.centre_sum -= self._index(point)
        into.centre_sum += absorbed.centre_sum
        del self.grains[absorbed.grain_id], self.grains[into.grain_id]
        gone, kept = sorted((into.grain_id, absorbed.grain_id), reverse=True)
        into.grain_id = kept
        self.grains[kept] = into
        changes.merged.append((gone, kept))
        changes.grains.pop(absorbed, None)
        changes.grains[into] = None

    def _pieces(self, seeds: list[Node[T]]) -> list[dict[Node[T], None]]:
        """Return the parts, all but the one that keeps the id, into which a grain has fallen.

        Breadth-first searches start at all seeds and take turns; where two meet they become one.
        A search that runs dry is a part. When one search is left the rest need not be walked,
        unless a part might be larger than it.
        """
        reached = [dict[Node[T], None]() for _ in seeds]
        queues: list[deque[Node[T]]] = [deque() for _ in seeds]
        owner: dict[Node[T], int] = {}
        for number, seed in enumerate(seeds):
            if seed not in owner:
                owner[seed] = number
                reached[number][seed] = None
                queues[number].append(seed)
        parent = list(range(len(seeds)))
        alive = [number for number, queue in enumerate(queues) if queue]
        parts: list[dict[Node[T], None]] = []
        while len(alive) > 1:
            for number in list(alive):
                if parent[number] != number or len(alive) < 2:
                    continue
                if not queues[number]:
                    parts.append(reached[number])
                    alive.remove(number)
                    continue
                self._advance(number, reached, queues, owner, parent, alive)
        if not parts:
            return []
        last = alive[0]
        rest = len(seeds[0].grain.nodes) - sum(len(part) for part in parts)
        if max(len(part) for part in parts) >= rest:
            while queues[last]:
                self._advance(last, reached, queues, owner, parent, alive)
            parts.append(reached[last])
            keeper = min(parts, key=lambda part: (-len(part), min(node.point for node in part)))
            parts = [part for part in parts if part is not keeper]
        return parts

    def _advance(
        self,
        number: int,
        reached: list[dict[Node[T], None]],
        queues: list[deque[Node[T]]],
        owner: dict[Node[T], int],
        parent: list[int],
        alive: list[int],
    ) -> None:
        """Walk one node further in search `number`; unite it with a search that it meets."""
        for other in queues[number].popleft().links:
            met = owner.get(other)
            if met is None:
                owner[other] = number
                reached[number][other] = None
                queues[number].append(other)
                continue
            while parent[met] != met:
                met = parent[met]
            if met != number:
                parent[met] = number
                reached[number] |= reached[met]
                queues[number] += queues[met]
                alive.remove(met)

    def _split(self, grain: GrainSet[T], piece: dict[Node[T], None], changes: Changes[T]) -> None:
        """Make a piece a grain with a new id."""
        part = self._found(grain.material)
        for node in sorted(piece, key=lambda node: node.point):
            self._leave(node, grain)
            self._enter(node, part)
            changes.moved[node] = None
        changes.grains[part] = None

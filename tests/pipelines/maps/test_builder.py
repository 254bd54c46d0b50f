"""Maps: grains come out as they went in, whatever the order, and updates add up to the map."""

from __future__ import annotations

import math
from collections.abc import Iterable

import msgspec
import numpy as np
import numpy.typing as npt
import pytest
import scipy.ndimage
from hypothesis import given, settings
from hypothesis import strategies as st

from grainwatch.map_state import MapState
from grainwatch.messages import LaueResult, MapUpdate, decode, encode
from pipelines.laue.crystal import load_material
from pipelines.maps.builder import MapBuilder
from pipelines.maps.grid import ScanGrid
from pipelines.maps.polycrystal import scan_results, voronoi
from pipelines.rotations import misorientation_deg, multiply, random_rotations, to_fundamental_zone

CU = load_material("Cu")
TI = load_material("Ti")
SYMMETRY = {"Cu": CU.proper_point_group, "Ti": TI.proper_point_group}
TWIN = np.array([math.cos(math.radians(30)), *(np.ones(3) / math.sqrt(3) * math.sin(math.radians(30)))])


def builder(shape: tuple[int, ...], tolerance_deg: float = 2.0) -> MapBuilder:
    steps = (1.0,) * len(shape)
    return MapBuilder(shape, steps, "simulated", "simulated", symmetry=SYMMETRY, tolerance_deg=tolerance_deg)


def frames(
    labels: npt.NDArray[np.int64], orientations: npt.ArrayLike, seed: int = 0, noise_deg: float = 0.02
) -> list[LaueResult]:
    """One crystal a point (none where the label is -1), frames numbered along the grid."""
    rng = np.random.default_rng(seed)
    grid = ScanGrid(labels.shape)
    return list(scan_results(grid, labels, orientations, CU, rng, noise_deg=noise_deg, overlap=False))


def partition(update: MapUpdate) -> set[frozenset[tuple[tuple[int, ...], int]]]:
    """The grains as sets of (grid index, rank): what does not depend on numbering."""
    grains: dict[int, set[tuple[tuple[int, ...], int]]] = {}
    for point in update.points:
        grains.setdefault(point.grain_id, set()).add((point.grid_index, point.rank))
    return {frozenset(members) for members in grains.values()}


def map_of(shape: tuple[int, ...], results: Iterable[LaueResult], tolerance_deg: float = 2.0) -> MapUpdate:
    built = builder(shape, tolerance_deg)
    for result in results:
        built.add(result)
    return built.snapshot()


@pytest.mark.parametrize("shape", [(30,), (17, 13), (6, 7, 5)])
def test_a_voronoi_polycrystal_gives_back_its_grains(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(5)
    labels = voronoi(shape, 12, rng)
    orientations = random_rotations(12, rng)
    found = map_of(shape, frames(labels, orientations))
    expected = set()
    for label in np.unique(labels):
        pieces, count = scipy.ndimage.label(labels == label)
        for piece in range(1, count + 1):
            where = np.argwhere(pieces == piece)
            expected.add(frozenset((tuple(int(i) for i in index), 0) for index in where))
    assert partition(found) == expected
    assert found.filled == math.prod(shape)
    by_size = {grain.grain_id: grain.size_points for grain in found.grains}
    members: dict[int, list[tuple[int, ...]]] = {}
    for point in found.points:
        members.setdefault(point.grain_id, []).append(point.grid_index)
    for grain in found.grains:
        indices = members[grain.grain_id]
        truth = orientations[labels[indices[0]]]
        assert by_size[grain.grain_id] == len(indices)
        assert grain.centre == pytest.approx(np.mean(indices, axis=0).tolist())
        # noise of 0.02 deg on three axes: the mean is good to 0.02/sqrt(n), the spread is 0.035
        miss = float(misorientation_deg(grain.mean_quaternion, truth, CU.proper_point_group))
        assert miss < 5 * 0.035 / math.sqrt(len(indices))
        if len(indices) > 20:
            assert grain.spread_deg == pytest.approx(0.02 * math.sqrt(3), rel=0.3)


def test_spread_and_mean_are_those_of_the_points() -> None:
    rng = np.random.default_rng(11)
    labels = np.zeros((20, 3), dtype=np.int64)
    found = map_of((20, 3), frames(labels, random_rotations(1, rng), noise_deg=0.3), tolerance_deg=5.0)
    (grain,) = found.grains
    angles = misorientation_deg(
        np.array([p.quaternion for p in found.points]), grain.mean_quaternion, CU.proper_point_group
    )
    assert grain.spread_deg == pytest.approx(float(np.sqrt(np.mean(angles**2))), rel=1e-4)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([(8, 7), (4, 3, 3)]))
def test_the_order_of_arrival_does_not_matter(seed: int, shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(seed)
    labels = voronoi(shape, 6, rng)
    grid = ScanGrid(shape)
    # neighbouring orientations a few degrees apart, so that noise decides about links
    base = random_rotations(1, rng)[0]
    spread = rng.normal(0, math.radians(2.0), (6, 4)) + np.array([1.0, 0.0, 0.0, 0.0])
    orientations = multiply(spread / np.linalg.norm(spread, axis=1, keepdims=True), base)
    results = list(scan_results(grid, labels, orientations, CU, rng, noise_deg=0.5))
    one = map_of(shape, results)
    other = map_of(shape, [results[i] for i in rng.permutation(len(results))])
    assert partition(one) == partition(other)
    assert len(one.points) == sum(len(result.crystals) for result in results)
    first = sorted((g.size_points, round(g.spread_deg, 6), *np.round(g.centre, 9)) for g in one.grains)
    second = sorted((g.size_points, round(g.spread_deg, 6), *np.round(g.centre, 9)) for g in other.grains)
    assert np.allclose(first, second, atol=2e-6)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_symmetric_equivalents_give_the_same_map(seed: int) -> None:
    rng = np.random.default_rng(seed)
    labels = voronoi((8, 6), 5, rng)
    results = frames(labels, random_rotations(5, rng), noise_deg=0.3)
    turned = []
    for result in results:
        (crystal,) = result.crystals
        q = multiply(CU.proper_point_group[rng.integers(24)], crystal.quaternion) * rng.choice([-1.0, 1.0])
        turned_crystal = msgspec.structs.replace(crystal, quaternion=tuple(q.tolist()))
        turned.append(msgspec.structs.replace(result, crystals=(turned_crystal,)))
    one, other = map_of((8, 6), results), map_of((8, 6), turned)
    assert partition(one) == partition(other)
    for a, b in zip(one.grains, other.grains, strict=True):
        assert np.allclose(a.mean_quaternion, b.mean_quaternion, atol=1e-9)
        assert a.spread_deg == pytest.approx(b.spread_deg, abs=1e-5)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([(5, 4), (12,), (3, 3, 2)]), st.integers(5, 60))
def test_repeats_replace_and_updates_add_up(seed: int, shape: tuple[int, ...], n: int) -> None:
    """Whatever was replaced: the map is that of the last results, and every delta says all of it."""
    rng = np.random.default_rng(seed)
    orientations = random_rotations(3, rng)
    built = builder(shape)
    state = MapState()
    last: dict[tuple[int, ...], LaueResult] = {}
    for _ in range(n):
        labels = np.where(rng.random(shape) < 0.1, -1, rng.choice(3, shape, p=[0.7, 0.2, 0.1]))
        index = tuple(int(rng.integers(size)) for size in shape)
        results = scan_results(
            ScanGrid(shape), labels, orientations, CU, rng, overlap=bool(rng.random() < 0.5)
        )
        (result,) = [r for r in results if r.grid_index == index]
        last[index] = result
        before = {(p.grid_index, p.rank): p.grain_id for p in state.current()}
        update = built.add(result)
        state.apply(update)
        told = {p.grid_index for p in update.points} | set(update.empty) | {index}
        renamed = dict(update.merged)
        for point in state.current():
            if point.grid_index not in told:  # ids are stable but for what the update says
                old = before[point.grid_index, point.rank]
                while old in renamed:
                    old = renamed[old]
                assert point.grain_id == old
    snapshot = built.snapshot()
    assert state.current() == list(snapshot.points)
    assert sorted(i for i, points in state.points.items() if not points) == sorted(snapshot.empty)
    assert sorted(state.grains) == [g.grain_id for g in snapshot.grains]
    fresh = map_of(shape, last.values())
    assert partition(snapshot) == partition(fresh)
    assert snapshot.filled == len(last)
    ours = sorted((g.size_points, *np.round(g.centre, 9)) for g in snapshot.grains)
    assert ours == sorted((g.size_points, *np.round(g.centre, 9)) for g in fresh.grains)
    for grain in snapshot.grains:
        assert state.grains[grain.grain_id].size_points == grain.size_points
        assert state.grains[grain.grain_id].centre == pytest.approx(grain.centre)


def test_the_smaller_id_survives_a_merge() -> None:
    q = random_rotations(1, np.random.default_rng(0))
    left, middle, right = frames(np.zeros((3,), dtype=np.int64), q)
    built = builder((3,))
    assert [p.grain_id for p in built.add(right).points] == [0]
    assert [p.grain_id for p in built.add(left).points] == [1]
    update = built.add(middle)
    assert update.merged == ((1, 0),)
    assert [(g.grain_id, g.size_points) for g in update.grains] == [(0, 3)]
    assert {p.grain_id for p in built.snapshot().points} == {0}


def test_the_same_frame_again_changes_nothing() -> None:
    rng = np.random.default_rng(2)
    labels = voronoi((6, 5), 5, rng)
    results = list(scan_results(ScanGrid((6, 5)), labels, random_rotations(5, rng), CU, rng))
    built = builder((6, 5))
    for result in results:
        built.add(result)
    before = built.snapshot()
    for result in results:
        update = built.add(result)
        assert update.merged == ()
        assert {p.grid_index for p in update.points} == {result.grid_index}
    after = built.snapshot()
    assert after.points == before.points
    assert [g.size_points for g in after.grains] == [g.size_points for g in before.grains]


def test_a_replacement_splits_a_grain_and_the_larger_piece_keeps_the_id() -> None:
    q = random_rotations(2, np.random.default_rng(1))
    line = frames(np.zeros((7,), dtype=np.int64), q)
    built = builder((7,))
    for result in line:
        built.add(result)
    cut = frames(np.array([0, 0, 1, 0, 0, 0, 0]), q)[2]
    update = built.add(cut)
    ids = [p.grain_id for p in built.snapshot().points]
    assert ids[3:] == [0] * 4
    assert ids[0] == ids[1] == 2
    assert ids[2] == 1
    assert [(p.grid_index, p.grain_id) for p in update.points] == [((2,), 1), ((0,), 2), ((1,), 2)]
    assert [(g.grain_id, g.size_points) for g in update.grains] == [(0, 4), (1, 1), (2, 2)]
    # and the old result heals it: the larger id is absorbed, the crystal that came between is gone
    update = built.add(line[2])
    assert update.merged == ((2, 0),)
    assert [(g.grain_id, g.size_points) for g in update.grains] == [(0, 7), (1, 0)]
    assert built.snapshot().grains[0].size_points == 7


@pytest.mark.parametrize("hub_first", [True, False])
def test_of_three_pieces_the_largest_keeps_the_id(hub_first: bool) -> None:
    """Arms of 1, 3 and 3 points around a hub: of the two larger the one with the first point stays."""
    labels = np.full((7, 4), -1)
    labels[:, 0] = 0
    labels[3, 1] = 0
    q = random_rotations(2, np.random.default_rng(1))
    results = [r for r in frames(labels, q) if r.crystals]
    built = builder(labels.shape)
    for result in results if hub_first else results[::-1]:
        built.add(result)
    labels[3, 0] = 1
    hub = next(r for r in frames(labels, q) if r.grid_index == (3, 0))
    update = built.add(hub)
    ids = {p.grid_index: p.grain_id for p in built.snapshot().points}
    assert {ids[x, 0] for x in range(3)} == {0}
    assert len({ids[x, 0] for x in range(4, 7)}) == 1
    assert len({ids[0, 0], ids[4, 0], ids[3, 1], ids[3, 0]}) == 4
    assert {p.grid_index for p in update.points} == {(3, 0), (4, 0), (5, 0), (6, 0), (3, 1)}


def test_a_point_that_is_in_a_grain_twice_counts_once() -> None:
    """Two crystals of one point, 3 deg apart, become one grain through a chain of neighbours."""
    q = random_rotations(1, np.random.default_rng(4))[0]

    def tilted(deg: float) -> LaueResult:
        half = math.radians(deg) / 2
        turn = np.array([math.cos(half), math.sin(half), 0.0, 0.0])
        return frames(np.array([0]), multiply(turn, q)[None], noise_deg=0.0)[0]

    replace = msgspec.structs.replace
    ring = {(1, 0): 1.0, (1, 1): 2.0, (0, 1): 3.0}
    results = [replace(tilted(deg), grid_index=index) for index, deg in ring.items()]
    both = (tilted(0.0).crystals[0], tilted(3.5).crystals[0])
    results.append(replace(tilted(0.0), crystals=both, grid_index=(0, 0)))
    for order in (results, results[::-1], [results[i] for i in (0, 3, 2, 1)]):
        (grain,) = map_of((2, 2), order, tolerance_deg=1.5).grains
        assert grain.size_points == 4
        assert grain.centre == (0.5, 0.5)
        # angles 0, 1, 2, 3, 3.5 about one axis: their standard deviation
        assert grain.spread_deg == pytest.approx(float(np.std([0, 1, 2, 3, 3.5])), rel=1e-3)


def test_twins_stay_apart_also_in_one_frame() -> None:
    q = random_rotations(1, np.random.default_rng(4))[0]
    pair = np.stack([q, multiply(TWIN, q)])
    assert float(misorientation_deg(pair[0], pair[1], CU.proper_point_group)) == pytest.approx(60.0)
    labels = np.array([[0, 0, 1], [0, 1, 1]])
    grid = ScanGrid((2, 3))
    rng = np.random.default_rng(0)
    found = map_of((2, 3), scan_results(grid, labels, pair, CU, rng), tolerance_deg=15.0)
    assert len(found.grains) == 2
    for grain in found.grains:
        assert grain.spread_deg < 0.1


def test_one_crystal_joins_one_crystal_of_a_neighbour() -> None:
    """Two crystals 1 deg apart in each of two points: the near pairs are linked, not all four."""
    q = random_rotations(1, np.random.default_rng(4))[0]
    tilt = np.array([math.cos(math.radians(0.5)), math.sin(math.radians(0.5)), 0.0, 0.0])
    two = frames(np.array([0]), [q])[0], frames(np.array([0]), multiply(tilt, q)[None])[0]
    crystals = tuple(result.crystals[0] for result in two)
    points = [
        msgspec.structs.replace(two[0], crystals=crystals, grid_index=(0,)),
        msgspec.structs.replace(two[0], crystals=crystals[::-1], grid_index=(1,)),
    ]
    found = map_of((2,), points)
    assert [grain.size_points for grain in found.grains] == [2, 2]
    assert max(grain.spread_deg for grain in found.grains) < 0.1


def test_materials_stay_apart_even_in_the_same_orientation() -> None:
    results = frames(np.zeros((2,), dtype=np.int64), random_rotations(1, np.random.default_rng(0)))
    other = msgspec.structs.replace(results[1].crystals[0], material="Ti")
    found = map_of((2,), [results[0], msgspec.structs.replace(results[1], crystals=(other,))])
    assert [grain.material for grain in found.grains] == ["Cu", "Ti"]


def test_a_frame_without_crystals_is_measured_not_a_hole() -> None:
    labels = np.array([0, -1, 0])
    built = builder((4,))
    q = random_rotations(1, np.random.default_rng(0))
    updates = [built.add(result) for result in frames(labels, q)]
    assert updates[1].empty == ((1,),)
    assert built.snapshot().filled == 3
    assert built.snapshot().empty == ((1,),)
    assert len(built.snapshot().grains) == 2  # nothing links over the gap


def test_best_crystal_first_and_updates_travel() -> None:
    rng = np.random.default_rng(8)
    labels = np.array([0, 1])
    (result, _) = scan_results(ScanGrid((2,)), labels, random_rotations(2, rng), CU, rng)
    swapped = msgspec.structs.replace(result, crystals=result.crystals[::-1])
    update = builder((2,)).add(swapped)
    assert [point.rank for point in update.points] == [0, 1]
    assert update.points[0].quaternion == result.crystals[0].quaternion
    assert decode(encode(update)) == update


def test_bad_results_are_refused_and_change_nothing() -> None:
    (good,) = frames(np.zeros((1,), dtype=np.int64), random_rotations(1, np.random.default_rng(0)))
    built = builder((1,))
    built.add(good)
    before = built.snapshot()
    replace = msgspec.structs.replace
    crystal = good.crystals[0]
    for bad, message in [
        (replace(good, grid_index=None), "frame 0 carries no grid index"),
        (replace(good, grid_index=(1,)), r"grid index \(1,\) lies outside the scan of \(1,\)"),
        (replace(good, grid_index=(0, 0)), "lies outside"),
        (replace(good, key=replace(good.key, series_uid="b")), "frame 0 is of series b"),
        (
            replace(good, crystals=(replace(crystal, material="Si"),)),
            "no symmetry of material 'Si'; known: Cu, Ti",
        ),
        (replace(good, crystals=(replace(crystal, quaternion=(0.0, 0.0, 0.0, 0.0)),)), "no unit quaternion"),
        (replace(good, crystals=(replace(crystal, quaternion=(math.nan, 0.0, 0.0, 0.0)),)), "no unit"),
    ]:
        with pytest.raises(ValueError, match=message):
            built.add(bad)
    assert built.snapshot() == before
    with pytest.raises(ValueError, match="tolerance"):
        builder((1,), 30.0)
    with pytest.raises(ValueError, match="shape"):
        builder((0, 1))


def test_hexagonal_equivalents_are_one_grain() -> None:
    q = random_rotations(1, np.random.default_rng(6))[0]
    results = frames(np.zeros((12,), dtype=np.int64), [q], noise_deg=0.0)
    turned = [
        msgspec.structs.replace(
            result,
            crystals=(
                msgspec.structs.replace(
                    result.crystals[0], material="Ti", quaternion=tuple(multiply(s, q).tolist())
                ),
            ),
        )
        for result, s in zip(results, TI.proper_point_group, strict=True)
    ]
    (grain,) = map_of((12,), turned).grains
    assert grain.spread_deg < 1e-4
    assert np.allclose(grain.mean_quaternion, to_fundamental_zone(q, TI.proper_point_group), atol=1e-9)

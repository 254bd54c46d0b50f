"""The reflection list against an enumeration with gemmi, one hkl at a time."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable

import gemmi
import numpy as np
import pytest

from pipelines.laue.crystal import Material, Site, load_material, material_names
from pipelines.laue.geometry import HC_KEV_A
from pipelines.laue.reflections import ReflectionList, build_reflections

# Atoms on special positions extinguish more than the group does (International Tables A, "special":
# site 8a of F d -3 m, site 2b of P 63 m c).
SPECIAL_ABSENCES: dict[str, Callable[[int, int, int], bool]] = {
    "Si": lambda h, k, l_: (h + k + l_) % 4 == 2 and h % 2 == k % 2 == l_ % 2 == 0,
    "GaN": lambda h, k, l_: (h - k) % 3 == 0 and l_ % 2 == 1,
}


@pytest.fixture(scope="module")
def lists() -> dict[str, ReflectionList]:
    return {name: build_reflections(load_material(name)) for name in material_names()}


@pytest.mark.parametrize("name", ["Cu", "Si", "GaN", "Al2O3", "ZrO2"])
def test_directions_and_orders_are_those_of_an_enumeration(name: str) -> None:
    material = load_material(name)
    band, two_theta = (5.0, 12.0), 140.0
    listed = build_reflections(material, band, two_theta, f2_threshold=0.0)
    d_min = HC_KEV_A / (2 * math.sin(math.radians(two_theta / 2)) * band[1])
    cell, group = gemmi.UnitCell(*material.cell_A_deg), gemmi.find_spacegroup_by_name(material.space_group)
    expected = defaultdict(set)
    limit = int(max(material.cell_A_deg[:3]) / d_min) + 1
    for h in range(-limit, limit + 1):
        for k in range(-limit, limit + 1):
            for l_ in range(-limit, limit + 1):
                hkl = [h, k, l_]
                if hkl == [0, 0, 0] or cell.calculate_d(hkl) < d_min:
                    continue
                if group.operations().is_systematically_absent(hkl):
                    continue
                if name in SPECIAL_ABSENCES and SPECIAL_ABSENCES[name](h, k, l_):
                    continue
                order = math.gcd(h, k, l_)
                expected[h // order, k // order, l_ // order].add(order)
    found = {
        tuple(hkl): {k for k in range(64) if int(bits) >> k & 1}
        for hkl, bits in zip(listed.hkl.tolist(), listed.orders, strict=True)
    }
    assert found == dict(expected)


@pytest.mark.parametrize("name", material_names())
def test_what_every_list_promises(lists: dict[str, ReflectionList], name: str) -> None:
    r = lists[name]
    n = len(r)
    assert r.hkl.dtype == np.int16
    assert (np.gcd.reduce(r.hkl, axis=1) == 1).all()
    present = {tuple(h) for h in r.hkl.tolist()}
    assert len(present) == n
    assert {(-h, -k, -l_) for h, k, l_ in present} == present
    np.testing.assert_allclose(r.g, r.hkl @ r.material.B0.T, atol=1e-14)
    np.testing.assert_allclose(r.g_norm, np.linalg.norm(r.g, axis=1), rtol=1e-9)
    np.testing.assert_allclose(r.g_unit, r.g / r.g_norm[:, None], atol=1e-9)
    assert r.g_unit.flags.c_contiguous
    assert (np.diff(r.g_norm) >= 0).all()
    # sorted: equal |g| by h, k, l
    tie = np.diff(r.g_norm) < 1e-10
    step = np.sign(np.diff(r.hkl.astype(int), axis=0))
    first = step[np.arange(n - 1), np.argmax(step != 0, axis=1)]
    assert (first[tie] > 0).all()
    # orders and |F|² say the same
    bits = (r.orders[:, None] >> np.arange(1, r.max_order + 1, dtype=np.uint64)) & np.uint64(1)
    np.testing.assert_array_equal(bits == 1, r.f2 > 0)
    assert (r.orders > 0).all()
    assert (r.orders & np.uint64(1) == 0).all()
    np.testing.assert_array_equal(r.lowest_order, [(int(b) & -int(b)).bit_length() - 1 for b in r.orders])
    assert r.strength.max() == 1.0
    assert (r.strength > 0).all()
    g_max = 2 * math.sin(math.radians(80.0)) * 22.0 / HC_KEV_A
    highest = r.max_order - np.argmax(r.f2[:, ::-1] > 0, axis=1)
    assert (highest * r.g_norm <= g_max * (1 + 1e-9)).all()


@pytest.mark.parametrize("name", ["Cu", "Ti", "Al2O3", "ZrO2"])
def test_structure_factors_stand_beside_their_order(lists: dict[str, ReflectionList], name: str) -> None:
    r = lists[name]
    rng = np.random.default_rng(1)
    row, column = np.nonzero(r.f2)
    pick = rng.choice(len(row), 500)
    real = r.hkl[row[pick]].astype(int) * (column[pick, None] + 1)
    expected = np.abs(r.material.structure_factors(real)) ** 2
    np.testing.assert_allclose(r.f2[row[pick], column[pick]], expected, rtol=1e-9)


@pytest.mark.parametrize("name", material_names())
def test_families(lists: dict[str, ReflectionList], name: str) -> None:
    r = lists[name]
    representatives, multiplicity = r.families()
    assert multiplicity.sum() == len(r)
    np.testing.assert_array_equal(r.family[representatives], np.arange(len(multiplicity)))
    first_seen = np.unique(r.family, return_index=True)[1]
    assert (np.diff(first_seen) > 0).all()
    assert (np.diff(r.g_norm[representatives]) >= 0).all()
    index = {tuple(h): i for i, h in enumerate(r.hkl.tolist())}
    for w in r.material.hkl_operators:
        image = [index[tuple(h)] for h in (r.hkl.astype(int) @ w).tolist()]
        np.testing.assert_array_equal(r.family[image], r.family)
        np.testing.assert_array_equal(r.orders[image], r.orders)
        np.testing.assert_allclose(r.f2[image], r.f2, rtol=1e-6, atol=1e-6)
        np.testing.assert_array_equal(r.g_norm[image], r.g_norm)
    friedel = [index[-h, -k, -l_] for h, k, l_ in r.hkl.tolist()]
    np.testing.assert_array_equal(r.family[friedel], r.family)
    # No family is larger than the group, and two families are never equivalent.
    assert multiplicity.max() <= 2 * len(r.material.hkl_operators)


def test_cubic_multiplicities(lists: dict[str, ReflectionList]) -> None:
    cu = lists["Cu"]
    representatives, multiplicity = cu.families()
    size = {tuple(cu.hkl[i].tolist()): int(m) for i, m in zip(representatives, multiplicity, strict=True)}
    assert size[1, 0, 0] == 6
    assert size[1, 1, 1] == 8
    assert size[1, 1, 0] == 12
    assert size[2, 1, 0] == 24
    assert size[2, 1, 1] == 24
    assert size[3, 2, 1] == 48


def test_orders_of_well_known_directions(lists: dict[str, ReflectionList]) -> None:
    def orders(name: str, direction: tuple[int, int, int]) -> list[int]:
        r = lists[name]
        row = r.hkl.tolist().index(list(direction))
        return [k for k in range(1, 64) if int(r.orders[row]) >> k & 1]

    assert orders("Cu", (1, 0, 0)) == [2, 4, 6, 8, 10, 12]
    assert orders("Cu", (1, 1, 1))[:4] == [1, 2, 3, 4]
    assert orders("Fe", (1, 1, 1)) == [2, 4]
    assert orders("Si", (1, 1, 1))[:5] == [1, 3, 4, 5, 7]
    assert orders("Si", (1, 0, 0))[:3] == [4, 8, 12]
    assert orders("Mg", (0, 0, 1))[:3] == [2, 4, 6]


def test_weak_orders_are_left_out_relative_to_their_neighbourhood() -> None:
    material = load_material("ZrO2")
    everything = build_reflections(material, f2_threshold=0.0)
    usual = build_reflections(material)
    strong = build_reflections(material, f2_threshold=0.1)
    assert len(strong) < len(usual) < len(everything)
    fraction = strong.f2[strong.f2 > 0].min() / strong.f2.max()
    assert fraction < 0.1  # the far ones stay, however much form factors have fallen off


def test_zirconia_is_listed_fast() -> None:
    material = load_material("ZrO2")
    times = []
    for _ in range(5):
        start = time.thread_time()
        listed = build_reflections(material)
        times.append(time.thread_time() - start)
    assert np.count_nonzero(listed.f2) > 19_000
    assert min(times) < 0.3


def test_the_list_does_not_depend_on_how_the_band_was_reached(lists: dict[str, ReflectionList]) -> None:
    wide, narrow = lists["GaN"], build_reflections(load_material("GaN"), (5.0, 15.0))
    kept = {tuple(h) for h in narrow.hkl.tolist()}
    assert [h for h in wide.hkl.tolist() if tuple(h) in kept] == narrow.hkl.tolist()


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"energy_keV": (22.0, 5.0)}, "energy band"),
        ({"energy_keV": (0.0, 5.0)}, "energy band"),
        ({"energy_keV": (5.0, float("nan"))}, "energy band"),
        ({"energy_keV": (0.1, 0.5)}, "reflects nothing"),
        ({"energy_keV": (5.0, 5000.0)}, "too many"),
        ({"max_two_theta_deg": 0.0}, "max_two_theta_deg"),
        ({"f2_threshold": 1.0}, "f2_threshold"),
    ],
)
def test_impossible_requests_are_refused(arguments: dict[str, object], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        build_reflections(load_material("Cu"), **arguments)  # type: ignore[arg-type]


def test_orders_beyond_the_word_are_left_out() -> None:
    long = Material("long", (4.0, 4.0, 90.0, 90.0, 90.0, 90.0), "P 4", (Site("Si", 0.1, 0.2, 0.3),))
    listed = build_reflections(long, (5.0, 10.0))
    assert listed.max_order == 63
    assert int(listed.orders.max()) < 2**64

"""Classes: families under the Laue group, extinction on real orders, coverage as asked for."""

from __future__ import annotations

import io
from itertools import permutations, product

import numpy as np
import pytest
from testkit.laue import BAND_KEV, CALIBRATION, ONE_OF_EACH_SYSTEM, material

from pipelines.laue.classes import REJECT, ClassList, choose_classes
from pipelines.laue.forward import simulate_spots
from pipelines.laue.geometry import DetectorArea
from pipelines.laue.reflections import ReflectionList, build_reflections
from pipelines.rotations import random_rotations, to_matrix


def _reflections(name: str) -> ReflectionList:
    return build_reflections(material(name), BAND_KEV)


def _chosen(listed: ReflectionList, coverage: float, count: int = 60) -> ClassList:
    return choose_classes(listed, [CALIBRATION] * count, np.random.default_rng(1), coverage, 2000)


def test_cubic_families_are_all_permutations_and_signs() -> None:
    listed = _reflections("Cu")
    classes = _chosen(listed, 0.86)
    labels = classes.of_reflections(listed)
    of = {tuple(hkl): label for hkl, label in zip(listed.hkl.tolist(), labels, strict=True)}
    for number, hkl in enumerate(classes.hkl.tolist(), start=1):
        assert np.gcd.reduce(hkl) == 1
        equivalents = {
            tuple(s * i for s, i in zip(signs, p, strict=True))
            for p in permutations(hkl)
            for signs in product((1, -1), repeat=3)
        }
        assert {of[e] for e in equivalents} == {number}
        assert np.count_nonzero(labels == number) == len(equivalents)


def test_a_direction_that_reflects_in_a_higher_order_only_has_a_class() -> None:
    # fcc: 100 and 110 are forbidden, 200 and 220 are not.
    classes = _chosen(_reflections("Cu"), 0.86)
    assert {(1, 0, 0), (1, 1, 0), (1, 1, 1)} <= {tuple(h) for h in classes.hkl.tolist()}


@pytest.mark.parametrize("name", ["Cu", "Ti", "ZrO2"])
def test_the_share_of_spots_with_a_class_holds_on_other_crystals(name: str) -> None:
    listed = _reflections(name)
    classes = _chosen(listed, 0.6, 100)
    assert 0.6 <= classes.coverage < 0.7
    labels = classes.of_reflections(listed)
    turns = to_matrix(random_rotations(30, np.random.default_rng(5))) @ listed.material.B0
    spots = simulate_spots(turns, listed, CALIBRATION, DetectorArea.of(CALIBRATION))
    assert np.mean(labels[spots.reflection] != REJECT) == pytest.approx(classes.coverage, abs=0.05)


@pytest.mark.parametrize("name", ONE_OF_EACH_SYSTEM)
def test_friedel_mates_and_lattice_rotations_keep_the_class(name: str) -> None:
    listed = _reflections(name)
    labels = _chosen(listed, 0.3, 20).of_reflections(listed)
    of = {tuple(hkl): label for hkl, label in zip(listed.hkl.tolist(), labels, strict=True)}
    for operator in material(name).hkl_operators:
        turned = listed.hkl[:400].astype(int) @ operator
        assert [of[tuple(h)] for h in turned.tolist()] == labels[:400].tolist()
    assert [of[tuple(-h)] for h in listed.hkl[:400]] == labels[:400].tolist()


def test_a_file_gives_the_same_list_again() -> None:
    classes = _chosen(_reflections("Cu"), 0.5)
    file = io.BytesIO()
    classes.save(file)
    file.seek(0)
    again = ClassList.load(file)
    np.testing.assert_array_equal(again.hkl, classes.hkl)
    np.testing.assert_array_equal(again.share, classes.share)


def test_what_cannot_be_is_refused() -> None:
    listed = _reflections("Cu")
    classes = _chosen(listed, 0.86)
    with pytest.raises(ValueError, match="another material or band"):
        classes.of_reflections(build_reflections(material("Cu"), (5.0, 8.0)))
    with pytest.raises(ValueError, match="ask for less coverage"):
        choose_classes(listed, [CALIBRATION] * 10, np.random.default_rng(0), 0.9, max_classes=5)
    with pytest.raises(ValueError, match="expected between 0 and 1"):
        choose_classes(listed, [CALIBRATION], np.random.default_rng(0), 1.5)
    faint = build_reflections(material("Cu"), (5.0, 5.3))
    with pytest.raises(
        ValueError, match=r"Cu puts .* spots on the detector between 5 and 5.3 keV, at least 5"
    ):
        choose_classes(faint, [CALIBRATION] * 10, np.random.default_rng(0), 0.5)


@pytest.mark.parametrize(
    ("arrays", "complaint"),
    [
        ({"other": np.zeros(3)}, "expected the arrays hkl and share, found"),
        ({"hkl": np.zeros((0, 3), int), "share": np.zeros(0)}, "do not fit"),
        ({"hkl": np.ones((2, 3), int), "share": np.zeros(3)}, "do not fit"),
        ({"hkl": np.ones((1, 3)), "share": np.ones(1)}, "no whole numbers"),
        ({"hkl": np.array([[1, 1, 70000]]), "share": np.ones(1)}, "no whole numbers up to 1000"),
        ({"hkl": np.array([[2, 2, 0]]), "share": np.ones(1)}, "not all coprime and different"),
        ({"hkl": np.zeros((1, 3), int), "share": np.ones(1)}, "not all coprime and different"),
        ({"hkl": np.ones((2, 3), int), "share": np.ones(2) / 2}, "not all coprime and different"),
        ({"hkl": np.ones((1, 3), int), "share": np.array([np.nan])}, "shares are not between 0 and 1"),
        ({"hkl": np.ones((1, 3), int), "share": np.array([-0.1])}, "shares are not between 0 and 1"),
        ({"hkl": np.array([[1, 1, None]], dtype=object), "share": np.ones(1)}, "allow_pickle"),
    ],
)
def test_a_file_of_something_else_is_refused(arrays: dict[str, np.ndarray], complaint: str) -> None:
    file = io.BytesIO()
    np.savez(file, allow_pickle=True, **arrays)
    file.seek(0)
    with pytest.raises(ValueError, match=f"class list: .*{complaint}"):
        ClassList.load(file)


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x03\x04 truncated"])
def test_a_file_that_is_no_archive_is_refused(content: bytes) -> None:
    with pytest.raises(ValueError, match="class list: "):
        ClassList.load(io.BytesIO(content))

"""A bundle for Laue spots that does not fit together is refused by one line, before the first frame."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from testkit.bundles import redescribe, sign
from testkit.laue import CALIBRATION, random_turns, simulated

from pipelines.engines.bundle import BundleError
from pipelines.laue.analysis import OUTSIDE_BUNDLE, LaueAnalysis
from pipelines.laue.classes import ClassList
from pipelines.laue.crystal import Material, Site
from pipelines.laue.proposals import SpotClassifier

SHIPPED = Path(__file__).resolve().parents[3] / "bundles" / "Cu"


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(SHIPPED, tmp_path / "bundle"))


def refusal(folder: Path) -> str:
    with pytest.raises(BundleError) as caught:
        SpotClassifier(folder)
    message = str(caught.value)
    assert message.startswith(str(folder))
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("table", "change", "words"),
    [
        ("preparation", {"bins": -1}, "bundle.json: bins -1: expected 1 to 20000"),
        ("preparation", {"bins": 10**9}, "bundle.json: bins 1000000000: expected"),
        ("preparation", {"bins": "many"}, "bundle.json: Expected `int`, got `str` - at `$.bins`"),
        ("preparation", {"bins": 1.5}, "got `float` - at `$.bins`"),
        ("preparation", {"step_deg": 0.0}, "expected up to 180 deg"),
        ("preparation", {"energies": True}, "preparation has energies, which this version does not know"),
        ("preparation", {"bins": 1300}, "the preparation makes 1329; make the bundle again"),
        ("decision", {"confident": 7.0}, "decision.confident is 7.0, expected a probability"),
        ("decision", {"confident": None}, "decision.confident is None, expected a probability"),
        ("domain", {"dd_mm": "far"}, "bundle.json: Expected `object`, got `str` - at `$.dd_mm`"),
        ("domain", {"cell_A_deg": [3.6]}, "at `$.cell_A_deg`"),
        ("domain", {"colour": "red"}, "unknown field `colour`"),
    ],
)
def test_a_description_that_fits_nothing_is_refused(
    copy: Path, table: str, change: dict[str, Any], words: str
) -> None:
    redescribe(copy, lambda description: description[table].update(change))
    assert words in refusal(copy)


def test_classes_of_another_network_are_refused(copy: Path) -> None:
    classes = ClassList.load(copy / "classes.npz")
    ClassList(classes.hkl[:-1], classes.share[:-1]).save(copy / "classes.npz")
    sign(copy)
    known = len(classes)
    assert f"the network knows {known} classes, classes.npz {known - 1}; make the" in refusal(copy)


@pytest.mark.parametrize("content", [b"", b"no archive"])
def test_a_class_list_that_is_none_is_refused(copy: Path, content: bytes) -> None:
    (copy / "classes.npz").write_bytes(content)
    sign(copy)
    assert "classes.npz: class list: " in refusal(copy)


def test_a_class_that_the_material_lacks_leaves_the_work_to_the_classical_search(copy: Path) -> None:
    # As for a cell at the edge of the domain, whose last class the band no longer reaches.
    classes = ClassList.load(copy / "classes.npz")
    hkl = classes.hkl.copy()
    hkl[-1] = (29, 1, 0)
    ClassList(hkl, classes.share).save(copy / "classes.npz")
    sign(copy)
    copper = Material("Cu", (3.6, 3.6, 3.6, 90, 90, 90), "F m -3 m", (Site("Cu", 0, 0, 0),))
    analysis = LaueAnalysis([copper], CALIBRATION, classifiers=[SpotClassifier(copy)])
    assert len(analysis.mismatches) == 1
    assert "hkl (29, 1, 0), does not reflect in Cu" in analysis.mismatches[0]
    assert analysis.remarks == (f"not used, the classical search does its work: {analysis.mismatches[0]}",)
    found = analysis.analyse_peaks(simulated("Cu", random_turns(1, 2), 2).xy_px)
    assert (len(found.crystals), found.flags) == (1, (OUTSIDE_BUNDLE,))


def test_remarks_name_the_material() -> None:
    doubtful = Material(
        "alloy", (3.6, 3.6, 3.6, 90, 90, 90), "F m -3 m", (Site("Cu", 0, 0, 0),), ("all is guessed",), True
    )
    analysis = LaueAnalysis([doubtful], CALIBRATION)
    assert analysis.remarks == ("material alloy: all is guessed",)
    found = analysis.analyse_peaks(simulated("Cu", random_turns(1, 2), 2).xy_px)
    assert "doubtful_structure" in found.crystals[0].flags
    assert np.isfinite(found.crystals[0].match_rate)

"""Peak lists that no crystal made: nothing is found, in bounded time, or the message says why not."""

from __future__ import annotations

import numpy as np
import pytest
from testkit.laue import AREA, CALIBRATION, found_and_false, indexer, random_turns, simulated

from pipelines.laue.forward import random_positions
from pipelines.laue.indexing import search
from pipelines.laue.indexing.indexer import Indexer
from pipelines.laue.indexing.parameters import IndexingParameters

MATERIALS = ("Cu", "Ti", "ZrO2", "triclinic")


def line(n: int = 150) -> np.ndarray:
    return np.stack([np.linspace(5, 2000, n), np.full(n, 800.0)], axis=1)


def diagonal(n: int = 150) -> np.ndarray:
    return np.repeat(np.linspace(5, 2000, n)[:, None], 2, axis=1)


def grid() -> np.ndarray:
    return np.stack(np.meshgrid(*[np.linspace(9, 2000, 12)] * 2), axis=-1).reshape(-1, 2)


def circle(n: int = 150) -> np.ndarray:
    t = np.linspace(0, 2 * np.pi, n, endpoint=False)
    return np.stack([1000 + 700 * np.cos(t), 1000 + 700 * np.sin(t)], axis=1)


def zone(seed: int, n: int = 150) -> np.ndarray:
    """Peaks on the conic of a zone, as a crystal's are, but anywhere on it."""
    rng = np.random.default_rng(seed)
    for turn in random_turns(50, seed):
        t = rng.uniform(0, 2 * np.pi, 20 * n)
        q = np.cos(t)[:, None] * turn[:, 1] + np.sin(t)[:, None] * turn[:, 2]
        q = q[q[:, 0] < -0.1]
        xy = CALIBRATION.pixels([1.0, 0.0, 0.0] - 2 * q[:, :1] * q)
        xy = xy[AREA.contains(xy)]
        if len(xy) >= n:
            return xy[:n] + rng.normal(0, 0.2, (n, 2))
    raise AssertionError("no zone crosses the detector")


SHAPES = {
    "line": line(),
    "diagonal": diagonal(),
    "grid": grid(),
    "circle": circle(),
    "zone": zone(1),
    "two zones": np.concatenate([zone(2), zone(3)]),
    "one place": np.full((500, 2), 900.0),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", MATERIALS)
def test_peaks_in_a_regular_figure_are_no_crystal(name: str, shape: str) -> None:
    assert indexer(name).index(SHAPES[shape]) == []


@pytest.mark.parametrize("name", MATERIALS)
@pytest.mark.parametrize("peaks", [60, 150, 600])
def test_random_peaks_are_no_crystal(name: str, peaks: int) -> None:
    rng = np.random.default_rng(peaks)
    for _ in range(1 if peaks == 600 else 3):
        assert indexer(name).index(random_positions(peaks, AREA, rng)) == []


def test_too_few_peaks_are_no_crystal() -> None:
    for n in range(5):
        assert indexer("Cu").index(np.arange(2.0 * n).reshape(n, 2) + 900) == []
    assert indexer("Cu").index([]) == []


def test_a_peak_listed_several_times_counts_once_a_reflection() -> None:
    truth = random_turns(1, seed=3)
    xy = simulated("Cu", truth, seed=1).xy_px
    once = indexer("Cu").index(xy)
    thrice = indexer("Cu").index(np.repeat(xy, 3, axis=0))
    assert found_and_false(thrice, indexer("Cu").phases, ["Cu"], truth) == (1, 0)
    assert len(thrice[0].spots) == len(once[0].spots)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_position_that_is_no_number_is_refused_by_its_number(value: float) -> None:
    xy = simulated("Cu", random_turns(1, seed=3), seed=1).xy_px.copy()
    xy[7, 1] = value
    with pytest.raises(ValueError, match=r"peak 7 of \d+ has the position"):
        indexer("Cu").index(xy)


@pytest.mark.parametrize("sigma", [np.ones(3), np.zeros(40), np.full(40, np.nan), -np.ones(40)])
def test_uncertainties_must_fit_the_peaks(sigma: np.ndarray) -> None:
    with pytest.raises(ValueError, match="uncertainties of 40 peaks"):
        indexer("Cu").index(random_positions(40, AREA, np.random.default_rng(0)), sigma)


def test_peaks_far_off_the_detector_do_no_harm() -> None:
    truth = random_turns(1, seed=3)
    xy = np.concatenate([simulated("Cu", truth, seed=1).xy_px, [[1e9, -1e9], [-5e4, 3e3]]])
    assert found_and_false(indexer("Cu").index(xy), indexer("Cu").phases, ["Cu"], truth) == (1, 0)


@pytest.mark.parametrize("name", ["Cu", "ZrO2"])
def test_the_work_on_twenty_thousand_peaks_is_bounded(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    votes: list[int] = []
    plain = search.candidates

    def counted(table, q, spot, partners, *rest):  # type: ignore[no-untyped-def]
        votes.append(len(partners))
        return plain(table, q, spot, partners, *rest)

    monkeypatch.setattr(search, "candidates", counted)
    peaks = random_positions(20_000, AREA, np.random.default_rng(4))
    assert indexer(name).index(peaks) == []
    p = IndexingParameters()
    assert len(votes) <= p.max_seeds
    assert max(votes) <= p.max_voters


def test_a_bright_crystal_among_twenty_thousand_peaks_is_found() -> None:
    truth = random_turns(1, seed=5)
    crystal = simulated("Ti", truth, seed=5, spurious_fraction=0.0).xy_px
    noise = random_positions(20_000 - len(crystal), AREA, np.random.default_rng(4))
    few = Indexer(indexer("Ti").phases, IndexingParameters(max_spots=1000))
    returned = few.index(np.concatenate([crystal, noise]))
    assert found_and_false(returned, few.phases, ["Ti"], truth) == (1, 0)


@pytest.mark.parametrize(
    "change",
    [
        {"max_false_probability": 0.0},
        {"max_false_probability": 1.0},
        {"angle_tolerance_deg": 0.0},
        {"match_radius_px": -1.0},
        {"match_radius_px": float("nan")},
        {"match_radius_px": 17.0},
        {"max_strain": 0.0},
        {"max_crystals": 0},
        {"min_matched": 3},
    ],
)
def test_parameters_that_cannot_be_are_refused_by_name(change: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(change))):
        IndexingParameters(**change)  # type: ignore[arg-type]


def test_an_indexer_without_a_material_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one material"):
        Indexer([])

"""The drift alarm: as rarely wrong as asked for, whatever the distribution; changes are seen soon."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import stats
from testkit.micrographs import two_phase

from pipelines.micrograph.drift_alarm import DriftAlarm
from pipelines.micrograph.image_statistics import STATISTICS
from pipelines.micrograph.preparation import prepare

Draw = Callable[[], np.ndarray]


def run_length(alarm: DriftAlarm, draw: Draw) -> int:
    while True:
        now = alarm.update(draw())
        if now.alarm:
            assert now.alarm_image == now.images - 1
            return now.images


def mixing(rng: np.random.Generator) -> np.ndarray:
    return rng.normal(size=(4, 4))


def lognormal(rng: np.random.Generator) -> Draw:
    mix = mixing(rng)
    return lambda: np.exp(mix @ rng.normal(size=4))


def with_a_constant(rng: np.random.Generator) -> Draw:
    # Shares of saturated pixels are like that: 0 for nearly all images.
    mix = mixing(rng)

    def draw() -> np.ndarray:
        values = mix @ rng.normal(size=4)
        return np.array([values[0], values[1], 0.0, max(values[2], 1.0)])

    return draw


@pytest.mark.parametrize(
    ("make", "size", "least"),
    [
        (lambda rng: lambda: rng.normal(size=1), 1, 0.7),
        (lambda rng: lambda: rng.exponential(size=1), 1, 0.7),
        (lambda rng: lambda: rng.standard_cauchy(size=1), 1, 0.7),
        (lambda rng: lambda: mixing(np.random.default_rng(1)) @ rng.normal(size=4), 4, 0.7),
        (lognormal, 4, 0.7),
        (with_a_constant, 4, 0.7),
    ],
    ids=["normal", "exponential", "cauchy", "correlated", "lognormal", "constant"],
)
def test_false_alarms_are_as_rare_as_asked_for(
    make: Callable[[np.random.Generator], Draw], size: int, least: float
) -> None:
    asked, lengths = 150.0, []
    rng = np.random.default_rng(2)
    for _ in range(80):
        draw = make(rng)
        alarm = DriftAlarm("abcd"[:size], asked)
        alarm.learn([draw() for _ in range(40)])
        lengths.append(run_length(alarm, draw))
    # Run lengths spread about as much as their mean: 80 of them give it to 11 %.
    assert np.mean(lengths) > least * asked
    assert np.mean(lengths) < 2.5 * asked  # and it is not merely asleep


def test_what_enters_the_chart_is_standard_normal_and_independent() -> None:
    rng = np.random.default_rng(3)
    mix = np.eye(4) + 0.3 * mixing(rng)
    alarm = DriftAlarm("abcd", 1e9)
    seen: list[np.ndarray] = []
    take = alarm._chart.take
    alarm._chart.take = lambda y: (seen.append(y), take(y))[1]  # type: ignore[method-assign]
    for _ in range(2000):
        alarm.update(mix @ rng.normal(size=4))
    y = np.array(seen)[20:]
    assert np.abs(np.cov(y.T) - np.eye(4)).max() < 0.12
    assert stats.kstest(np.sum(y**2, axis=1), stats.chi2(4).cdf).pvalue > 0.01
    assert np.abs(np.mean(y[1:, :, None] * y[:-1, None, :], axis=0)).max() < 0.1


@pytest.mark.parametrize("size", [1, 6])
def test_a_change_is_seen_within_twenty_images(size: int) -> None:
    rng = np.random.default_rng(4)
    shift = np.zeros(size)
    shift[-1] = 3.0
    for _ in range(20):
        alarm = DriftAlarm("abcdef"[:size], 1e4)
        alarm.learn(rng.normal(size=(200, size)))
        for _ in range(20):
            now = alarm.update(rng.normal(size=size) + shift)
            if now.alarm:
                break
        assert now.alarm
        assert now.foremost == "abcdef"[size - 1]
        assert now.change[-1] > 0.5


def test_one_wild_image_is_no_drift() -> None:
    rng = np.random.default_rng(5)
    alarm = DriftAlarm("abc", 1e5)
    alarm.learn(rng.normal(size=(100, 3)))
    alarm.update([1e9, -1e9, 1e9])
    for _ in range(100):
        now = alarm.update(rng.normal(size=3))
    assert not now.alarm


def test_the_alarm_stays_and_the_baseline_with_it() -> None:
    rng = np.random.default_rng(6)
    alarm = DriftAlarm("a", 1e4)
    alarm.learn(rng.normal(size=(100, 1)))
    for _ in range(300):
        now = alarm.update(rng.normal(size=1) + 4.0)
    assert now.alarm
    assert now.alarm_image < 20
    assert now.change[0] > 1.5  # what is new is not what is usual, however long it lasts


def of_specimens(rng: np.random.Generator) -> np.ndarray:
    """Brightness and contrast of ten images each of ten specimens, one after the other; these differ."""
    specimen = np.repeat(np.sort(rng.normal(size=10)), 10)
    return np.stack([specimen + 0.5 * rng.normal(size=100), 0.5 * specimen + rng.normal(size=100)], axis=1)


def test_the_order_of_what_is_learnt_says_nothing() -> None:
    rng = np.random.default_rng(11)
    known = of_specimens(rng)
    later = rng.normal(size=(40, 2)) + 0.5
    for block in (1, 5):
        found = []
        for rows in (known, known[::-1], known[np.argsort(known[:, 1])], rng.permutation(known)):
            alarm = DriftAlarm(["mean", "std"], 1e4, block=block)
            alarm.learn(rows)
            found.append([alarm.update(row) for row in later])
        assert found[1:] == found[:1] * 3


def test_a_change_is_seen_as_soon_where_files_were_sorted_by_specimen() -> None:
    delays = []
    for seed in range(15):
        rng = np.random.default_rng(seed)
        known, alarm = of_specimens(rng), DriftAlarm(["mean", "std"], 1e4)
        alarm.learn(known)
        shift = np.array([1.5 * known[:, 0].std(), 0.0])

        def draw(rng: np.random.Generator = rng, shift: np.ndarray = shift) -> np.ndarray:
            specimen = rng.normal()
            return shift + np.array([specimen + 0.5 * rng.normal(), 0.5 * specimen + rng.normal()])

        delays.append(run_length(alarm, draw))
    # Taken as a stream that drifts, ten of these starts saw nothing in a thousand images.
    assert np.median(delays) <= 20
    assert max(delays) <= 40


def test_blocks_keep_the_promise_where_images_resemble_each_other() -> None:
    # Neighbouring fields of a sample: correlation 0.7 from one image to the next.
    rng = np.random.default_rng(7)

    def stream() -> Draw:
        state = rng.normal(size=1)

        def draw() -> np.ndarray:
            state[:] = 0.7 * state + np.sqrt(1.0 - 0.49) * rng.normal(size=1)
            return state.copy()

        return draw

    asked, lengths = 600.0, {1: [], 20: []}
    for block, found in lengths.items():
        for _ in range(30):
            found.append(run_length(DriftAlarm("a", asked, block=block), stream()))
    assert np.mean(lengths[1]) < 0.4 * asked
    assert np.mean(lengths[20]) > 0.6 * asked
    draw, plain, blocks = stream(), DriftAlarm("a", 1e6, memory=1.0), DriftAlarm("a", 1e6, 1.0, block=20)
    for _ in range(1500):
        value = draw()
        single, many = plain.update(value), blocks.update(value)
    assert single.correlated
    assert single.correlation == pytest.approx(0.7, abs=0.1)
    assert not many.correlated


def test_what_cannot_be_is_refused_and_changes_nothing() -> None:
    alarm = DriftAlarm(["mean", "std"], 1e4)
    for wrong in ([1.0], [1.0, np.nan], [1.0, np.inf], [1.0, 2.0, 3.0]):
        with pytest.raises(ValueError, match="expected 2 finite values"):
            alarm.update(wrong)
    assert alarm.update([1.0, 2.0]).images == 1
    with pytest.raises(ValueError, match="finite"):
        alarm.learn([[1.0, np.nan]])
    for names, how, message in (
        ([], {}, "names"),
        (["a"], {"block": 0}, "block"),
        (["a"], {"images_between_false_alarms": 5.0}, "images_between_false_alarms"),
        (["a"], {"images_between_false_alarms": 50.0, "block": 10}, "expected 100 to 1e9"),
        (["a"], {"memory": 0.0}, "memory"),
    ):
        with pytest.raises(ValueError, match=message):
            DriftAlarm(names, **how)


def statistics(image: np.ndarray) -> np.ndarray:
    found = prepare(image).statistics
    assert found is not None
    return found.vector()


def test_images_through_preparation_to_the_alarm() -> None:
    rng = np.random.default_rng(8)

    def image(gain: float = 1.0, blur: bool = False) -> np.ndarray:
        made = two_phase(128, 128, int(rng.integers(1 << 30)), noise=8.0).astype(float)
        if blur:
            made = (made + np.roll(made, 1, 0) + np.roll(made, 1, 1) + np.roll(made, (1, 1), (0, 1))) / 4
        return np.clip(np.rint(made * gain), 0, 255).astype(np.uint8)

    usual = [statistics(image()) for _ in range(100)]
    for change, foremost in (
        ({"gain": 0.93}, {"mean", "std", "entropy_bits"}),
        ({"blur": True}, {"sharpness"}),
    ):
        alarm = DriftAlarm(STATISTICS, 1e4)
        alarm.learn(usual)
        for _ in range(30):
            now = alarm.update(statistics(image()))
        assert not now.alarm
        for _ in range(20):
            now = alarm.update(statistics(image(**change)))
        assert now.alarm
        assert now.foremost in foremost


@pytest.fixture(scope="module")
def steel(micrographs: Path) -> np.ndarray:
    """Statistics of 150 images of UHC steel, which have three classes."""
    files = sorted((micrographs / "uhc_steel" / "images").glob("*.jpg"))
    assert len(files) == 150
    return np.array([statistics(np.asarray(Image.open(file))) for file in files])


@pytest.mark.truth
def test_false_alarms_on_real_images_are_as_rare_as_asked_for(steel: np.ndarray) -> None:
    # Drawn again and again at random: three kinds of images, ends that saturate or do not.
    rng = np.random.default_rng(9)
    asked, lengths = 300.0, []
    for _ in range(40):
        alarm = DriftAlarm(STATISTICS, asked)
        alarm.learn(steel[rng.integers(len(steel), size=150)])
        lengths.append(run_length(alarm, lambda: steel[rng.integers(len(steel))]))
    # 40 run lengths give their mean to 16 %.
    assert np.mean(lengths) > 0.7 * asked


@pytest.mark.truth
def test_another_material_is_seen_within_twenty_images(micrographs: Path, steel: np.ndarray) -> None:
    rng = np.random.default_rng(10)
    files = sorted((micrographs / "ni_superalloy" / "images").glob("*.png"))
    nickel = np.array([statistics(np.asarray(Image.open(file))) for file in files])
    for _ in range(10):
        alarm = DriftAlarm(STATISTICS, 1e4)
        alarm.learn(steel[rng.integers(len(steel), size=200)])
        for _ in range(20):
            now = alarm.update(nickel[rng.integers(len(nickel))])
        assert now.alarm

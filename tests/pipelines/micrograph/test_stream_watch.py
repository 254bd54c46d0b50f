"""What follows from image after image: neighbours, and whether the stream has changed."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grainwatch.messages import (
    ArrayData,
    ChangeReport,
    Fingerprint,
    FrameKey,
    ImageStatistics,
    MicrographResult,
    ModelInfo,
    Novelty,
    PhaseMorphology,
    Provenance,
)
from pipelines.micrograph.image_statistics import STATISTICS
from pipelines.micrograph.morphology import morphology
from pipelines.micrograph.neighbours import Neighbours
from pipelines.micrograph.stream_watch import STREAM_CHANGED, DriftTable, LearntStart, StreamWatch

MODEL = ModelInfo("m", "1", "a" * 64)
IMAGE = np.random.default_rng(0).integers(0, 2, (64, 64)).astype(np.uint8) * 200


def key(frame: int, channel: str = "") -> FrameKey:
    return FrameKey("sem", "u" * 32, frame, channel)


def result(
    frame: int, rng: np.random.Generator, *, bright: float = 0.0, channel: str = "", model: ModelInfo = MODEL
) -> MicrographResult:
    """A result whose numbers are drawn; `bright` moves the brightness, in standard deviations."""
    found = morphology(IMAGE, patch_px=32)
    phases = {name: getattr(found, name) for name in PhaseMorphology.__struct_fields__}
    return MicrographResult(
        key=key(frame, channel),
        provenance=Provenance(model),
        shape_px=(64, 64),
        statistics=ImageStatistics(
            0.5 + 0.02 * (rng.normal() + bright), *(0.1 * rng.uniform(1, 2, 5)).tolist()
        ),
        morphology=PhaseMorphology(**{**phases, "fraction": float(rng.beta(30, 20))}),
        novelty=Novelty(0.5, False, 0.05, float(rng.gamma(9.0)), 1.0),
        fingerprints=(
            Fingerprint(
                model,
                "vae",
                ArrayData.of(rng.normal(size=5), "<f4"),
                ArrayData.of(np.ones(5), "<f4"),
                whitened=ArrayData.of(rng.normal(size=3), "<f4"),
            ),
        ),
    )


def follow(
    watch: StreamWatch, results: list[MicrographResult]
) -> tuple[list[MicrographResult], list[ChangeReport]]:
    seen: list[MicrographResult] = []
    reports: list[ChangeReport] = []
    for each in results:
        flagged, more = watch.take(each)
        assert isinstance(flagged, MicrographResult)
        seen.append(flagged)
        reports += more
    return seen, reports


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 6), st.integers(1, 25))
def test_neighbours_are_the_nearest_of_the_last_images(seed: int, count: int, remembered: int) -> None:
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(60, 4)).astype(np.float32)
    known = Neighbours(count, remembered)
    for number, vector in enumerate(vectors):
        found = known.of(key(number), vector)
        before = np.arange(max(0, number - remembered), number)
        distance = np.linalg.norm(vectors[before] - vector, axis=1)
        order = np.argsort(distance)[:count]
        assert [n.key.frame for n in found] == before[order].tolist()
        np.testing.assert_allclose([n.distance for n in found], distance[order], rtol=1e-5)


def test_an_image_is_not_its_own_neighbour_and_no_number_is_near() -> None:
    known = Neighbours(2)
    vector = np.ones(3, np.float32)
    assert known.of(key(0), vector) == ()
    assert known.of(key(0), vector) == ()  # again, after a crash for example
    assert [n.key.frame for n in known.of(key(1), vector)] == [0, 0]
    assert known.of(key(2), vector * np.nan) == ()
    assert known.of(key(3), vector)[0].key.frame in (0, 1)
    assert known.of(key(4), np.ones(7, np.float32)) == ()  # another network
    assert [n.key.frame for n in known.of(key(5), np.ones(7, np.float32))] == [4]
    assert Neighbours(0).of(key(0), vector) == ()


def test_a_stream_that_goes_black_has_changed() -> None:
    rng = np.random.default_rng(4)
    watch = StreamWatch(DriftTable(), 0)
    follow(watch, [result(n, rng) for n in range(60)])
    assert not watch.alarm
    black = []
    for number in range(60, 80):
        found = result(number, rng)
        assert found.morphology is not None
        nothing = msgspec.structs.replace(found.morphology, fraction=float("nan"), free_path_px=float("nan"))
        dark = ImageStatistics(0.0, 0.0, 0.0, 0.0, 1.0, 0.0)
        black.append(msgspec.structs.replace(found, morphology=nothing, statistics=dark))
    seen, _ = follow(watch, black)
    assert watch.alarm
    assert [STREAM_CHANGED in each.flags for each in seen].index(True) < 10


def test_a_stream_of_strange_images_is_not_simply_the_same() -> None:
    rng = np.random.default_rng(3)
    watch = StreamWatch(DriftTable(), 2)
    usual = [result(n, rng) for n in range(30)]
    follow(watch, usual)
    assert "over 30 images (what is usual is learnt until 100); most off:" in watch.text
    assert "novel" not in watch.text
    strange = [_novel(result(n, rng)) for n in range(30, 44)]
    follow(watch, strange)
    assert "novel" not in watch.text
    follow(watch, [_novel(result(n, rng)) for n in range(44, 56)])
    assert "the same over 56 images" in watch.text
    assert watch.text.endswith("; 26 of the last 30 images are novel to the model")
    follow(watch, [result(n, rng) for n in range(56, 110)])
    assert "is learnt until" not in watch.text
    assert "novel" not in watch.text


def _novel(found: MicrographResult) -> MicrographResult:
    assert found.novelty is not None
    return msgspec.structs.replace(found, novelty=msgspec.structs.replace(found.novelty, novel=True))


def test_a_stream_that_stays_is_reported_every_ten_images() -> None:
    rng = np.random.default_rng(1)
    watch = StreamWatch(DriftTable(), 2)
    seen, reports = follow(watch, [result(n, rng) for n in range(60)])
    assert [r.state for r in reports] == [
        "learning",
        "learning",
        "same",
        "same",
        "same",
        "same",
        "same",
        "same",
    ]
    assert [r.images for r in reports] == [1, 10, 11, 20, 30, 40, 50, 60]
    assert not watch.alarm
    assert watch.text == reports[-1].text
    assert all(r.flags == () for r in (*seen, *reports))
    assert reports[-1].components[-1] == "latent_distance"
    assert [len(r.neighbours) for r in seen[:4]] == [0, 1, 2, 2]
    # In units of the training patches, as the bundle says.
    first, third = (seen[n].fingerprints[0].whitened for n in (0, 2))
    assert first is not None
    assert third is not None
    distance = np.linalg.norm(first.numpy() - third.numpy())
    assert distance == pytest.approx(
        next(n.distance for n in seen[2].neighbours if n.key.frame == 0), rel=1e-5
    )


def test_a_change_is_seen_named_and_stays() -> None:
    rng = np.random.default_rng(2)
    watch = StreamWatch(DriftTable(), 0)
    follow(watch, [result(n, rng) for n in range(80)])
    seen, reports = follow(watch, [result(80 + n, rng, bright=3.0) for n in range(30)])
    assert watch.alarm
    first = next(n for n, r in enumerate(seen) if STREAM_CHANGED in r.flags)
    assert first < 20
    assert all(STREAM_CHANGED in r.flags for r in seen[first:])
    changed = next(r for r in reports if r.state == "changed")
    assert (changed.frame, changed.alarm_frame) == (80 + first, 80 + first)
    assert (changed.foremost, changed.flags) == ("mean", (STREAM_CHANGED,))
    assert "brightness" in changed.text
    assert "restart" in changed.text
    # Another model begins anew: its numbers are others.
    other = msgspec.structs.replace(MODEL, sha256="b" * 64)
    seen, _ = follow(watch, [result(200, rng, model=other)])
    assert seen[0].flags == ()
    assert not watch.alarm


@pytest.mark.parametrize("memory", [0.02, 0.3])
def test_a_large_change_is_seen_with_any_memory(memory: float) -> None:
    rng = np.random.default_rng(8)
    watch = StreamWatch(DriftTable(memory=memory), 0)
    follow(watch, [result(n, rng) for n in range(150)])
    assert not watch.alarm
    follow(watch, [result(150 + n, rng, bright=20.0) for n in range(40)])
    assert watch.alarm


def test_channels_are_followed_each_by_itself() -> None:
    rng = np.random.default_rng(3)
    watch = StreamWatch(DriftTable(), 1)
    both = [result(n, rng, bright=9.0 * (c == "BSE"), channel=c) for n in range(40) for c in ("SE", "BSE")]
    _, reports = follow(watch, both)
    assert {r.channel for r in reports} == {"SE", "BSE"}
    assert not watch.alarm
    assert "of SE" in watch.text
    assert "of BSE" in watch.text


def test_images_that_say_nothing_are_left_out() -> None:
    rng = np.random.default_rng(4)
    watch = StreamWatch(DriftTable(), 1)
    blank = msgspec.structs.replace(result(0, rng), statistics=None)
    small = msgspec.structs.replace(result(1, rng), fingerprints=(), novelty=None)
    dark = msgspec.structs.replace(result(2, rng), statistics=ImageStatistics(float("nan"), 0, 0, 0, 0, 0))
    assert follow(watch, [blank, small, dark])[1] == []
    _, reports = follow(watch, [result(3, rng), blank, small, dark])
    assert [r.images for r in reports] == [1]


def test_an_alarm_may_begin_with_what_the_model_knows() -> None:
    rng = np.random.default_rng(5)
    known = [result(n, rng) for n in range(200)]
    names = (
        "mean",
        "std",
        "entropy_bits",
        "sharpness",
        "dark_share",
        "bright_share",
        "fraction",
        "latent_distance",
    )
    rows = [
        [
            getattr(r.statistics, n, None) or getattr(r.morphology, n, None) or getattr(r.novelty, n)
            for n in names
        ]
        for r in known
    ]
    learnt = LearntStart(MODEL.sha256, names, ArrayData.of(rows))
    watch = StreamWatch(DriftTable(start="model"), 0, learnt)
    _, reports = follow(watch, [result(n, rng, bright=4.0) for n in range(20)])
    assert reports[0].state == "same"
    assert watch.alarm
    # Not with what another model knows.
    other = StreamWatch(DriftTable(start="model"), 0, msgspec.structs.replace(learnt, sha256="c" * 64))
    _, reports = follow(other, [result(n, rng, bright=4.0) for n in range(20)])
    assert reports[0].state == "learning"
    assert not other.alarm


def test_what_the_model_knows_may_be_in_order_of_its_files() -> None:
    names = ("mean", "fraction", "latent_distance")
    for seed in range(4):
        rng = np.random.default_rng(seed)
        known = [result(n, rng) for n in range(200)]
        table = np.array([[_number(r, name) for name in STATISTICS + names[1:]] for r in known])
        in_order = table[np.argsort(table[:, 0])]
        learnt = LearntStart(MODEL.sha256, STATISTICS + names[1:], ArrayData.of(in_order))
        watch = StreamWatch(DriftTable(start="model"), 0, learnt)
        seen, _ = follow(watch, [result(n, rng, bright=2.0) for n in range(40)])
        assert STREAM_CHANGED in seen[-1].flags


def _number(found: MicrographResult, name: str) -> float:
    part = {"fraction": found.morphology, "latent_distance": found.novelty}.get(name, found.statistics)
    return float(getattr(part, name))


def test_it_goes_on_where_the_configuration_leaves_its_keys() -> None:
    watch = StreamWatch(DriftTable(), 3, None, ("bright", False))
    assert watch.same_as(StreamWatch(DriftTable(), 3, None, ("bright", False)))
    for other in (
        StreamWatch(DriftTable(block=2), 3, None, ("bright", False)),
        StreamWatch(DriftTable(), 4, None, ("bright", False)),
        StreamWatch(DriftTable(), 3, None, ("dark", False)),
    ):
        assert not watch.same_as(other)


def test_without_the_alarm_there_are_neighbours_still() -> None:
    rng = np.random.default_rng(6)
    watch = StreamWatch(DriftTable(on=False), 1)
    seen, reports = follow(watch, [result(n, rng) for n in range(30)])
    assert reports == []
    assert [len(r.neighbours) for r in seen[:3]] == [0, 1, 1]
    assert watch.text == "no drift alarm"


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"block": 0}, "block: expected 1"),
        ({"images_between_false_alarms": 3.0}, "images_between_false_alarms"),
        ({"memory": 0.5}, "memory: expected 0.01 to 0.3, got 0.5"),
        ({"memory": 0.001}, "memory: expected 0.01 to 0.3"),
    ],
)
def test_what_cannot_be_watched_is_refused(keys: dict[str, float], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        DriftTable(**keys)  # type: ignore[arg-type]

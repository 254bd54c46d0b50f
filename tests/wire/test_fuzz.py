"""Every decoder answers every message with events, whatever is in it."""

from __future__ import annotations

import json
from typing import Any

import cbor2
import pytest
from cbor2 import CBORTag
from hypothesis import given, settings
from hypothesis import strategies as st

from daemon.sources.base import Arrival, Bad, SeriesEnd, SeriesStart
from daemon.sources.dectris.v2_codec import decode_message
from tests.wire import fuzz, fuzz_areadetector, fuzz_dectris_v1, fuzz_dectris_v2, fuzz_push, golden

# Messages to each decoder; `make fuzz` runs 100,000.
MESSAGES_EACH = 1000
CASES = fuzz.cases()

TAGS = [0, 1, 2, 4, 25, 28, 29, 30, 35, 40, 64, 65, 69, 70, 76, 83, 86, 258, 1040, 43000, 55799, 56500, 9999]
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(1 << 64), (1 << 64) - 1)
    | st.floats()
    | st.text(max_size=8)
    | st.binary(max_size=40)
    | st.sampled_from(["bslz4", "lz4", "none"])
)


def nested(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(max_size=5), inner, max_size=3)
        | st.builds(CBORTag, st.sampled_from(TAGS), inner)
    )


VALUES = st.recursive(SCALARS, nested, max_leaves=12)
OTHER_KEYS = [
    "pixel_mask",
    "image_size_x",
    "user_data",
    "series_date",
    "start_time",
    "real_time",
    "flatfield",
]
MESSAGES = st.fixed_dictionaries(
    {"type": st.sampled_from(["start", "image", "end"]) | VALUES},
    optional={
        "series_id": st.just(1) | VALUES,
        "series_unique_id": st.just("u") | VALUES,
        "image_id": st.just(2) | VALUES,
        "channels": st.just(["a"]) | VALUES,
        "number_of_images": st.just(3) | VALUES,
        **dict.fromkeys(OTHER_KEYS, VALUES),
        "data": st.dictionaries(st.text(max_size=2), VALUES, max_size=2) | VALUES,
    },
)


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_broken_messages(case: fuzz.Case, seed: int) -> None:
    outcome = fuzz.run(MESSAGES_EACH, seed, [case])[case.name]
    assert outcome.counts.total() >= MESSAGES_EACH


def test_the_fuzzer_reaches_the_pixels() -> None:
    """Or it proves nothing of the decompressors."""
    for case in (fuzz_dectris_v1.CASE, fuzz_dectris_v2.CASE, fuzz_areadetector.CASE):
        counts = fuzz.run(700, 3, [case])[case.name].counts
        assert counts["Bad"] > 100, case.name
        assert counts["Arrival"] > 50, case.name
        assert counts["Arrival of pixels that do not decode"] > 10, case.name


def test_the_fuzzer_reaches_what_is_pushed() -> None:
    counts = fuzz.run(700, 3, [fuzz_push.CASE])["pushed images"].counts
    for kind in ("taken", "failed", "refused", "Refused", "Welcome", "Left"):
        assert counts[kind] > 10, counts


def test_the_long_form_runs_all_of_them() -> None:
    assert {"DECTRIS Stream V1", "DECTRIS Stream V2", "areaDetector ZMQ"} <= {case.name for case in CASES}
    outcomes = fuzz.run(4 * len(CASES), 5)
    assert all(outcome.counts.total() >= 4 for outcome in outcomes.values())


def test_a_crash_is_told_with_its_message() -> None:
    def check(parts: list[bytes], outcome: fuzz.Outcome) -> None:
        assert parts != [b"bad"], "the decoder broke down"

    case = fuzz.Case("itself", lambda: [[b"good"]], lambda parts, others, rng: [b"bad"], check)
    with pytest.raises(AssertionError, match=f"seed 9, message 0, itself: .*broke down.*: {b'bad'.hex()}"):
        fuzz.run(1, 9, [case])


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=300))
def test_any_bytes(message: bytes) -> None:
    for each in (
        message,
        golden.mapping(type=golden.text("image")) + message,
        b"\xa9" + golden.image()[1:60] + message,
    ):
        assert all(isinstance(e, Bad | Arrival | SeriesStart | SeriesEnd) for e in decode_message(each))


@settings(max_examples=500, deadline=None)
@given(MESSAGES)
def test_any_map(fields: dict[str, Any]) -> None:
    fuzz_dectris_v2.check([cbor2.dumps(fields)], fuzz.Outcome())


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just([5, 3]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
HTYPES = ["dheader-1.0", "dimage-1.0", "dimage_d-1.0", "dconfig-1.0", "dseries_end-1.0"]
PARTS = st.lists(
    st.binary(max_size=40)
    | st.fixed_dictionaries(
        {
            "htype": st.sampled_from(["dheader-1.0", "dimage-1.0", "dimage_d-1.0", "dconfig-1.0"])
            | JSON_VALUES
        },
        optional={
            "series": st.just(1) | JSON_VALUES,
            "frame": st.just(2) | JSON_VALUES,
            "header_detail": st.sampled_from(["none", "basic", "all"]) | JSON_VALUES,
            "shape": st.just([5, 3]) | JSON_VALUES,
            "type": st.sampled_from(["uint8", "uint16", "float32"]) | JSON_VALUES,
            "encoding": st.sampled_from(["<", "lz4<", "bs16-lz4<"]) | JSON_VALUES,
            "start_time": JSON_VALUES,
            "nimages": JSON_VALUES,
        },
    ).map(lambda fields: json.dumps(fields).encode()),
    max_size=6,
)


@settings(max_examples=500, deadline=None)
@given(PARTS)
def test_any_parts(parts: list[bytes]) -> None:
    fuzz_dectris_v1.check(parts, fuzz.Outcome())

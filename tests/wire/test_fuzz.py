"""The decoder answers every message with events, whatever is in it."""

from __future__ import annotations

from typing import Any

import cbor2
import pytest
from cbor2 import CBORTag
from hypothesis import given, settings
from hypothesis import strategies as st

from daemon.sources.base import Arrival, Bad, SeriesEnd, SeriesStart
from daemon.sources.dectris_v2_codec import decode_message
from tests.wire import fuzz_decoder, golden

# Three seeds of 2,000 in all; `make fuzz` runs more.
SEEDS = {1: 700, 2: 700, 3: 600}

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


@pytest.mark.parametrize("seed", SEEDS)
def test_mutated_messages(seed: int) -> None:
    outcome = fuzz_decoder.run(SEEDS[seed], seed)
    # The fuzzer reaches both the map and the pixels, or it proves nothing.
    assert outcome.counts["Bad"] > 100
    assert outcome.counts["Arrival"] > 50
    assert outcome.counts["Arrival of pixels that do not decode"] > 20


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
    fuzz_decoder.check(cbor2.dumps(fields), fuzz_decoder.Outcome())

"""Whatever comes over the network, decoding answers and never raises."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from daemon.sinks.simulator import synthetic_micrograph, synthetic_result
from grainwatch.messages import ArrayData, LaueResult, encode, to_builtins
from grainwatch.wire import decoded

RESULT = synthetic_result(3, np.random.default_rng(1), seq=77, series_uid="a" * 32, crystals=1)
PAYLOAD = encode(RESULT)


@settings(deadline=None)
@given(st.binary(max_size=300))
def test_garbage(raw: bytes) -> None:
    message, head = decoded(raw)
    assert message is None or head is not None


@settings(deadline=None)
@given(st.integers(0, len(PAYLOAD) - 1), st.binary(min_size=1, max_size=8), st.integers(0, len(PAYLOAD)))
def test_damaged_results_are_refused_or_usable(at: int, patch: bytes, length: int) -> None:
    raw = bytearray(PAYLOAD)
    raw[at : at + len(patch)] = patch
    for damaged in (bytes(raw), PAYLOAD[:length]):
        message, _ = decoded(damaged)
        if message is not None:
            to_builtins(message)


@pytest.mark.parametrize(
    "array",
    [
        ArrayData("<f8", (3, 3), b"x" * 71),
        ArrayData("<f8", (-1, -9), b"x" * 72),
        ArrayData("|O8", (9,), b"x" * 72),
        ArrayData("", (), b""),
    ],
)
def test_arrays_that_contradict_themselves(array: ArrayData) -> None:
    crystal = msgspec.structs.replace(RESULT.crystals[0], UB=array)
    message, head = decoded(encode(msgspec.structs.replace(RESULT, crystals=(crystal,))))
    assert message is None
    assert head is not None
    assert head.seq == 77


def test_all_arrays_of_a_result_are_looked_at() -> None:
    found = {name for name in RESULT.__struct_fields__ if isinstance(getattr(RESULT, name), ArrayData)}
    crystal = RESULT.crystals[0]
    inner = {name for name in crystal.__struct_fields__ if isinstance(getattr(crystal, name), ArrayData)}
    empty = ArrayData("<f8", (1,), b"")
    damaged: list[LaueResult] = [msgspec.structs.replace(RESULT, **{name: empty}) for name in found]
    damaged += [
        msgspec.structs.replace(RESULT, crystals=(msgspec.structs.replace(crystal, **{name: empty}),))
        for name in inner
    ]
    assert len(damaged) >= 8
    for message in damaged:
        assert decoded(encode(message))[0] is None


def test_all_arrays_of_a_fingerprint_are_looked_at() -> None:
    image = synthetic_micrograph(3, np.random.default_rng(1), seq=7, series_uid="a" * 32)
    assert decoded(encode(image))[0] == image
    for name in ("vector", "spread", "codes", "whitened"):
        damaged = msgspec.structs.replace(image.fingerprints[0], **{name: ArrayData("<f4", (1,), b"")})
        message = msgspec.structs.replace(image, fingerprints=(damaged,))
        assert decoded(encode(message))[0] is None, name

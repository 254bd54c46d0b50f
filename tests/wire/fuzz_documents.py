"""Broken messages of bluesky's proxy: framing, msgpack, JSON, documents and what they say of files."""

from __future__ import annotations

import json
import logging
import pickle
import random
import tempfile
from pathlib import Path
from typing import Any

import msgpack
import numpy as np

from daemon.sources.base import Bad
from daemon.sources.bluesky.documents import Documents, Rules
from daemon.sources.bluesky.framing import Document, decode_message
from daemon.sources.bluesky.paths import Places
from pipelines.frame import BadFrame
from tests.wire.fuzz import NUMBERS, Case, Outcome, Parts, check_events, damage

RUN, DESCRIPTOR = "run-1", "descriptor-1"
_EMPTY = Path(tempfile.gettempdir()) / "no-such-folder-of-assets"
_RULES = Rules(position_wait_s=0.0, asset_wait_s=0.0, places=Places(roots=(_EMPTY,)))


def documents() -> list[tuple[str, dict[str, Any]]]:
    """Return a run with frames in its events, and documents of files beside them."""
    image = np.arange(12, dtype="<u2").reshape(3, 4)
    data_keys = {
        "camera": {"dtype": "array", "shape": [3, 4], "source": "s", "dtype_numpy": "<u2"},
        "x": {"dtype": "number", "shape": [], "source": "s", "units": "mm"},
        "y": {"dtype": "number", "shape": [], "source": "s", "units": "um"},
    }
    start = {
        "uid": RUN, "time": 1.0, "num_points": 6, "shape": [2, 3], "extents": [[0, 1], [0.0, 2.0]],
        "snaking": [False, True], "motors": ["y", "x"], "plan_name": "grid_scan",
        "hints": {"gridding": "rectilinear", "dimensions": [[["y"], "primary"], [["x"], "primary"]]},
    }  # fmt: skip
    described = {"run_start": RUN, "time": 1.0, "name": "primary", "data_keys": data_keys}
    event = {
        "descriptor": DESCRIPTOR, "seq_num": 2, "time": 2.0, "uid": "e", "filled": {},
        "data": {"camera": image, "x": 1.0, "y": 0.0}, "timestamps": {"camera": 1.5},
    }  # fmt: skip
    page = {
        "descriptor": DESCRIPTOR, "seq_num": [3, 4], "time": [2.0, 3.0], "uid": ["a", "b"], "filled": {},
        "data": {"camera": np.stack([image, image]), "x": [1.0, 2.0], "y": [0.0, 1.0]},
        "timestamps": {"camera": [1.0, 2.0]},
    }  # fmt: skip
    hdf5 = {
        "uid": "sr-1", "run_start": RUN, "data_key": "camera", "mimetype": "application/x-hdf5",
        "uri": "file://localhost/data/a.h5", "parameters": {"dataset": "/entry/data/data"},
    }  # fmt: skip
    tiff = {
        **hdf5, "uid": "sr-2", "mimetype": "multipart/related;type=image/tiff",
        "uri": "file://localhost/data/", "parameters": {"template": "a_{:05d}.tif", "chunk_shape": [1, 3, 4]},
    }  # fmt: skip
    ranges = {"indices": {"start": 0, "stop": 2}, "seq_nums": {"start": 1, "stop": 3}}
    resource = {
        "uid": "r-1", "run_start": RUN, "spec": "AD_TIFF", "root": "/data", "resource_path": "a",
        "resource_kwargs": {"template": "%s%s_%6.6d.tiff", "filename": "f", "frame_per_point": 1},
    }  # fmt: skip
    return [
        ("start", start),
        ("descriptor", {**described, "uid": DESCRIPTOR}),
        ("event", event),
        ("event_page", page),
        ("event", {**event, "seq_num": 5, "data": {"camera": "r-1/0", "x": 1.0, "y": 1.0}}),
        ("stream_resource", hdf5),
        ("stream_resource", tiff),
        ("stream_datum", {"uid": "sd", "stream_resource": "sr-1", "descriptor": DESCRIPTOR, **ranges}),
        ("resource", resource),
        ("datum", {"datum_id": "r-1/0", "resource": "r-1", "datum_kwargs": {"point_number": 0}}),
        ("datum_page", {"datum_id": ["q"], "resource": "r-1", "datum_kwargs": {"point_number": [1]}}),
        ("stop", {"run_start": RUN, "uid": "z", "exit_status": "success", "num_events": {"primary": 6}}),
    ]


def packed(value: Any) -> dict[bytes, Any]:
    """Take an array apart as msgpack-numpy does."""
    array = np.asarray(value)
    data = {b"type": array.dtype.str, b"kind": b"", b"shape": array.shape, b"data": array.tobytes()}
    return {b"nd": True, **data}


def message(name: str, body: Any, encoding: str = "msgpack") -> bytes:
    """Return a message as a publisher sends it."""
    if encoding == "pickle":
        payload = pickle.dumps(body)
    elif encoding == "json":
        payload = json.dumps(body, default=lambda array: np.asarray(array).tolist()).encode()
    else:
        payload = msgpack.packb(body, default=packed)
    return b"".join([b" ", name.encode(), b" ", payload])


def sound() -> list[Parts]:
    """Return each document in each encoding."""
    made = [[message(name, body, e)] for e in ("msgpack", "json") for name, body in documents()]
    return [*made, [message(*documents()[2], "pickle")]]


_VALUES: list[Any] = [
    *NUMBERS, -1, 1.5, 1e300, float("nan"), float("inf"), True, None, "", "x" * 5000, b"\xff",
    [], {}, [0, 0], [-1], [1 << 31, 1 << 31], [[[[5]]]], {"start": 5, "stop": 1},
    {"start": 0, "stop": 1 << 60},
    RUN, DESCRIPTOR, "primary", "sr-1", "r-1", "STREAM:", "file:///etc/passwd", "file://[", "../../x",
    "C:\\a",
    np.zeros((2, 0)), np.zeros((2, 2, 2, 2)), np.zeros((3, 4)), [[1, 2], [3]], [[1, 2], [3, 4]],
    {b"nd": True, b"type": "O", b"kind": b"O", b"shape": [1], b"data": b"cos\nsystem\n."},
    {b"nd": True, b"type": "<f8", b"kind": b"", b"shape": [1 << 40, 1 << 40], b"data": b""},
    {b"nd": True, b"type": [["a", "O"]], b"kind": b"V", b"shape": [1], b"data": b"12345678"},
    {b"nd": False, b"type": "<f8", b"data": b"1"}, {b"complex": True}, {b"nd": True},
]  # fmt: skip
_ODD = [b"\x80", b"\x81", b"\xdf\xff\xff\xff\xff", b"\xdd\xff\xff\xff\xff", b"\xc7\xff", b"{", b"[", b" "]


def broken(parts: Parts, others: list[Parts], rng: random.Random) -> Parts:
    """Damage bytes, or values: at the top of a document or further down."""
    if rng.random() < 0.5:
        pieces = [part for other in others for part in other]
        return [damage(parts[0], rng, pieces, lambda: rng.choice(_ODD))]
    name, body = rng.choice(documents())
    for _ in range(rng.choice((1, 1, 2, 3))):
        at: Any = body
        while rng.random() < 0.5 and (inner := [v for v in at.values() if isinstance(v, dict) and v]):
            at = rng.choice(inner)
        key = rng.choice(list(at))
        if rng.random() < 0.3:
            del at[key]
            if not at:
                break
        else:
            at[key] = rng.choice(_VALUES)
    try:
        return [message(name, body, rng.choice(("msgpack", "msgpack", "json")))]
    except (TypeError, ValueError, OverflowError):
        return [message(name, body, "pickle")]


_state: list[Documents] = []


def check(parts: Parts, outcome: Outcome) -> None:
    """Decode one message in a run that is under way and look at what comes out."""
    if not _state or outcome.counts.total() % 20 == 0:
        _state[:] = [Documents(_RULES)]
        for name, body in documents()[:2]:
            check_events(_state[0].take(Document(name, body), 0.0), Outcome())
    try:
        document = decode_message(parts[0])
    except BadFrame as error:
        check_events([Bad(str(error))], outcome)
        return
    assert document is not None
    logging.disable(logging.WARNING)  # what an operator is told is told elsewhere
    try:
        events = _state[0].take(document, 1.0) + _state[0].due(1.0, 100)
    finally:
        logging.disable(logging.NOTSET)
    for event in events:
        # What metadata say goes into files and to other processes.
        json.dumps(dict(getattr(event, "metadata", {})), allow_nan=False).encode()
    outcome.counts["document without an event"] += not events
    check_events(events, outcome)


CASE = Case("Bluesky documents", sound, broken, check)

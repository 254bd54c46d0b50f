"""Broken messages for the push source, over a real socket, with the accounts behind it."""

from __future__ import annotations

import atexit
import hashlib
import logging
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from grainwatch.push_wire import Ack, Begin, Hello, ImageHead, Leave, Refused, pack
from tests.wire.fuzz import NUMBERS, Case, Outcome, Parts, damage

sys.path.append(str(Path(__file__).resolve().parents[1] / "support"))
from testkit.push import RawSender, Receiver, tiff

PIXELS = np.arange(1200, dtype=np.uint16).reshape(30, 40)
_VALUES: list[Any] = [
    *NUMBERS, -1, 0.5, float("nan"), float("inf"), True, None, "", "x" * 5000, "\0", "<u2", "|O", ">f8", b"",
    b"x" * 16, b"y" * 32, [], [30, 40], [-30, -40], [1 << 40, 1 << 40], {}, {"a": {"b": [1]}}, "file",
]  # fmt: skip
_ODD = [
    b"\x80",
    b"\x81",
    b"\xdf\xff\xff\xff\xff",
    b"\xdd\xff\xff\xff\xff",
    b"\xc6\xff\xff\xff\xff",
    b"\xc7\xff",
]


def image(form: str, number: int) -> Parts:
    """Return an image as a sender sends it."""
    data = tiff(PIXELS) if form == "file" else PIXELS.tobytes()
    head = ImageHead(
        id=number,
        number=number,
        name=f"img_{number}.tif",
        fingerprint=bytes(16),
        sha256=hashlib.sha256(data).digest(),
        form="file" if form == "file" else "array",
        dtype="<u2",
        shape=PIXELS.shape,
        position_um=(1.0, 2.0),
        metadata={"exposure_s": 0.5},
        sidecars={"img.txt": "HV=20"},
    )
    return [pack(head), data]


def sound() -> list[Parts]:
    """Return each message that a sender says; nothing is timed before the reader of files is there."""
    _Rig.get().say(image("file", 0), Outcome())
    control: list[Parts] = [[pack(h)] for h in (Hello(1, "fuzz"), Begin("a"), Begin("b", 7, "", True))]
    return [*control, [pack(Leave(end=True))], *(image(f, 0) for f in ("file", "array") for _ in range(4))]


def broken(parts: Parts, others: list[Parts], rng: random.Random) -> Parts:
    """Damage bytes of the head, values in it, bytes of the image, or the number of parts."""
    pieces = [part for other in others for part in other]
    if len(parts) == 2:  # else most of them would be repeats
        number = rng.randrange(1 << rng.choice((8, 16, 16, 16, 40)))
        keys = {**msgspec.msgpack.decode(parts[0]), "number": number, "id": number}
        if rng.random() < 0.5:
            parts = [parts[0], damage(parts[1], rng, pieces, lambda: rng.choice(_ODD))]
            keys["sha256"] = hashlib.sha256(parts[1]).digest()
        parts = [msgspec.msgpack.encode(keys), parts[1]]
    kind = rng.random()
    if kind < 0.25:
        return [damage(parts[0], rng, pieces, lambda: rng.choice(_ODD)), *parts[1:]]
    if kind < 0.5:
        keys = msgspec.msgpack.decode(parts[0])
        keys[rng.choice([*keys, "more"])] = rng.choice(_VALUES)
        return [msgspec.msgpack.encode(keys), *parts[1:]]
    if kind < 0.6:
        return (parts * 3)[: rng.randrange(1, 5)]
    return parts


class _Rig:
    """The source and somebody who sends to it, for the time of the process."""

    _only: _Rig | None = None

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory()
        limits = {"max_file_bytes": 1 << 20, "max_image_bytes": 1 << 20}
        self.receiver = Receiver(Path(self._folder.name), **limits).__enter__()
        self._sender = RawSender(self.receiver.address)
        self._said = 0
        atexit.register(self._close)

    @classmethod
    def get(cls) -> _Rig:
        if cls._only is None:
            cls._only = cls()
        return cls._only

    def say(self, parts: Parts, outcome: Outcome) -> None:
        """Send a message; every one has an answer."""
        if self._said % 20 == 0:  # what went before may have cost the turn
            for head in (Hello(1, "fuzz"), Begin("a")):
                self._ask([pack(head)])
            assert self.receiver.ledger.balance() == []
        self._said += 1
        answer = self._ask(parts)
        if isinstance(answer, Ack):
            assert answer.outcome in ("taken", "held") or answer.reason
            outcome.counts[answer.outcome] += 1
        else:
            assert not isinstance(answer, Refused) or answer.reason
            outcome.counts[type(answer).__name__] += 1

    def _ask(self, parts: Parts) -> Any:
        while not self._sender.quiet(0.0):  # what was said of images that are held
            self._sender.answer()
        return self._sender.ask(*parts)

    def _close(self) -> None:
        self._sender.__exit__()
        self.receiver.__exit__()
        self._folder.cleanup()


def check(parts: Parts, outcome: Outcome) -> None:
    """Say a message to the source."""
    logging.disable(logging.WARNING)  # what an operator is told is told elsewhere
    try:
        _Rig.get().say(parts, outcome)
    finally:
        logging.disable(logging.NOTSET)


CASE = Case("pushed images", sound, broken, check)

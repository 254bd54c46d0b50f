"""Broken messages for every decoder: ``python -m tests.wire.fuzz --messages 100000``.

Sound messages are broken in many ways; whatever comes out, the decoder must answer with events, in
bounded time and memory. A seed that is printed gives the same run again.

A decoder takes part by a module ``fuzz_NAME.py`` beside this one with a `Case` called ``CASE``.
"""

from __future__ import annotations

import argparse
import faulthandler
import importlib
import random
import resource
import struct
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from daemon.sources.base import Arrival, Bad, SeriesEnd, SeriesStart
from pipelines.frame import BadFrame

MAX_IMAGE_BYTES = 16 << 20
SLOWEST_S = 1.0
MEMORY_KB = 256 << 10

NUMBERS = [0, 1, 23, 24, 255, 256, 65535, 1 << 20, 1 << 31, 1 << 32, (1 << 63) - 1, (1 << 64) - 1]

Parts = list[bytes]
"""A message: one part for most formats."""


@dataclass
class Outcome:
    """What became of the messages."""

    counts: Counter[str] = field(default_factory=Counter)
    slowest_s: float = 0.0
    grown_kb: int = 0


@dataclass(frozen=True)
class Case:
    """A decoder and how its messages are broken.

    Attributes
    ----------
    name : str
    sound : callable
        Returns messages that are right, of every kind.
    broken : callable
        Returns a message with something wrong, from a sound one, all of them, and a random generator.
    check : callable
        Gives a message to the decoder and asserts that the answer is one that a source may give;
        counts it. `check_events` does most of it.
    """

    name: str
    sound: Callable[[], list[Parts]]
    broken: Callable[[Parts, list[Parts], random.Random], Parts]
    check: Callable[[Parts, Outcome], None]


def cases() -> list[Case]:
    """Return the cases of the modules beside this one."""
    names = sorted(path.stem for path in Path(__file__).parent.glob("fuzz_*.py"))
    return [importlib.import_module(f"tests.wire.{name}").CASE for name in names]


def damage(data: bytes, rng: random.Random, others: list[bytes], extra: Callable[[], bytes]) -> bytes:
    """Return a part with a few bytes wrong.

    Parameters
    ----------
    others : list of bytes
        A piece of one of them may come in between.
    extra : callable
        Makes what is odd in this format: a head of CBOR, a bracket of JSON.
    """
    broken = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        at = rng.randrange(len(broken) + 1)
        kind = rng.randrange(9)
        if kind == 0 and broken:  # a flipped bit
            broken[at % len(broken)] ^= 1 << rng.randrange(8)
        elif kind == 1 and broken:  # another byte
            broken[at % len(broken)] = rng.randrange(256)
        elif kind == 2:  # breaks off
            del broken[at:]
        elif kind == 3:  # a piece is missing
            del broken[at : at + rng.randrange(1, 20)]
        elif kind == 4:  # a piece too much
            broken[at:at] = rng.randbytes(rng.randrange(1, 20))
        elif kind == 5:  # something odd in place of something
            broken[at : at + rng.randrange(3)] = extra()
        elif kind == 6:  # a number inside a blob
            broken[at : at + 4] = struct.pack(">I", rng.choice(NUMBERS) & 0xFFFFFFFF)
        elif kind == 7:  # deep nesting
            broken[at:at] = extra()[:1] * rng.randrange(1, 600)
        else:  # a piece of another message
            other = rng.choice(others)
            begin = rng.randrange(len(other) + 1)
            broken[at:at] = other[begin : begin + rng.randrange(1, 200)]
    return bytes(broken)


def damage_blob(data: bytes, rng: random.Random, start: int = 0) -> bytes:
    """Return a part of compressed pixels with some bytes changed behind `start`."""
    broken = bytearray(data)
    if len(broken) - start < 4:
        return data
    for _ in range(rng.choice((1, 1, 2, 5))):
        at = rng.randrange(start, len(broken))
        if rng.random() < 0.3 and at >= 4:
            broken[at - 4 : at] = struct.pack(">I", rng.choice(NUMBERS) & 0xFFFFFFFF)
        else:
            broken[at] = rng.randrange(256)
    return bytes(broken)


def check_events(events: Iterable[Any], outcome: Outcome) -> None:
    """Look at what came out of a message; decode the pixels.

    Raises
    ------
    AssertionError
        If it is not what a source may yield.
    """
    for event in events:
        assert isinstance(event, SeriesStart | Arrival | Bad | SeriesEnd), f"event {event!r}"
        name = type(event).__name__
        if isinstance(event, Bad):
            assert event.reason, "no reason"
            assert len(event.reason) < 1000, "a reason of more than 1000 characters"
            event.reason.encode()
        if isinstance(event, Arrival):
            try:
                pixels = event.image.array()
            except BadFrame:
                name = "Arrival of pixels that do not decode"
            else:
                assert pixels.shape == event.image.shape
                assert pixels.dtype == event.image.dtype
                assert pixels.dtype.isnative
                np.sum(pixels[-1])  # the last row is there
        outcome.counts[name] += 1


def run(messages: int, seed: int, chosen: Iterable[Case] | None = None) -> dict[str, Outcome]:
    """Give so many broken messages to the decoders, in turn; return what became of them by case.

    Raises
    ------
    AssertionError
        Giving the message that broke a rule, in hexadecimal digits.
    """
    rng = random.Random(seed)
    taking_part = list(cases() if chosen is None else chosen)
    sound = {case.name: case.sound() for case in taking_part}
    outcomes = {case.name: Outcome() for case in taking_part}
    for case in taking_part:
        for parts in sound[case.name]:
            _timed(case, parts, outcomes[case.name])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(messages):
        case = taking_part[number % len(taking_part)]
        parts = case.broken(rng.choice(sound[case.name]), sound[case.name], rng)
        try:
            _timed(case, parts, outcomes[case.name])
        except Exception as error:
            said = " | ".join(part.hex() for part in parts)
            raise AssertionError(f"seed {seed}, message {number}, {case.name}: {error!r}: {said}") from error
    grown_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown_kb < MEMORY_KB, f"seed {seed}: memory grew by {grown_kb} kB"
    for outcome in outcomes.values():
        outcome.grown_kb = grown_kb
    return outcomes


def _timed(case: Case, parts: Parts, outcome: Outcome) -> None:
    began = time.process_time()  # what other programs take is no fault of a message
    case.check(parts, outcome)
    took = time.process_time() - began
    outcome.slowest_s = max(outcome.slowest_s, took)
    assert took < SLOWEST_S, f"took {took:.2f} s"


def main() -> int:
    """Run the long form."""
    known = {case.name: case for case in cases()}
    parser = argparse.ArgumentParser(description="Feed broken messages to the decoders.")
    parser.add_argument("--messages", type=int, default=100_000, help="over all decoders together")
    parser.add_argument("--seed", type=int, default=None, help="default: taken from the clock")
    parser.add_argument("--only", choices=known, help="one decoder")
    told = parser.parse_args()
    seed = time.time_ns() % (1 << 32) if told.seed is None else told.seed
    chosen = [known[told.only]] if told.only else list(known.values())
    print(f"seed {seed}, {told.messages} messages to {', '.join(case.name for case in chosen)}", flush=True)
    faulthandler.enable()  # a crash in a decompressor then shows where
    began = time.monotonic()
    try:
        outcomes = run(told.messages, seed, chosen)
    except AssertionError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{time.monotonic() - began:.1f} s")
    for name, outcome in outcomes.items():
        print(
            f"{name}: slowest message {1000 * outcome.slowest_s:.1f} ms,"
            f" memory grew by {outcome.grown_kb / 1024:.0f} MB"
        )
        for kind, count in outcome.counts.most_common():
            print(f"{count:9d} {kind}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

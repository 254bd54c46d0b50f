"""Broken messages for the Stream V2 decoder: ``python -m tests.wire.fuzz_decoder --messages 100000``.

Golden messages are mutated; whatever comes out, the decoder must answer with events, pixels must
decode or be refused, in bounded time and memory. A seed that is printed gives the same run again.
"""

from __future__ import annotations

import argparse
import faulthandler
import random
import resource
import struct
import sys
import time
from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from daemon.sources.base import Arrival, Bad, SeriesEnd, SeriesStart
from daemon.sources.dectris_v2_codec import decode_message
from pipelines.frame import BadFrame
from pipelines.images import encode_image
from tests.wire import golden as g
from tests.wire.golden import corpus, head

MAX_IMAGE_BYTES = 16 << 20
SLOWEST_S = 1.0
MEMORY_KB = 256 << 10

_NUMBERS = [0, 1, 23, 24, 255, 256, 65535, 1 << 20, 1 << 31, 1 << 32, (1 << 63) - 1, (1 << 64) - 1]


@dataclass
class Outcome:
    """What became of the messages."""

    counts: Counter[str] = field(default_factory=Counter)
    slowest_s: float = 0.0
    grown_kb: int = 0


def originals() -> list[bytes]:
    """Return the golden messages, and some whose blocks a real compressor made: those copy ranges."""
    pixels = np.random.default_rng(5).poisson(0.3, (61, 67)).astype(np.uint16)
    messages = corpus()
    for algorithm in ("lz4", "bslz4"):
        blob = g.raw(encode_image(pixels, algorithm, block_bytes=1024))
        typed = g.tag(69, g.tag(56500, g.array(g.text(algorithm), g.uint(2), blob)))
        item = g.tag(40, g.array(g.array(g.uint(61), g.uint(67)), typed))
        messages += [g.image(data=g.mapping(c=item))] * 8
    return messages


def damage_pixels(message: bytes, rng: random.Random) -> bytes:
    """Return the message with some bytes changed behind its map, where the blobs are."""
    data = bytearray(message)
    for _ in range(rng.choice((1, 1, 2, 5))):
        at = rng.randrange(len(data) // 3, len(data))
        if rng.random() < 0.3:
            data[at - 4 : at] = struct.pack(">I", rng.choice(_NUMBERS) & 0xFFFFFFFF)
        else:
            data[at] = rng.randrange(256)
    return bytes(data)


def mutate(message: bytes, others: list[bytes], rng: random.Random) -> bytes:
    """Return the message with a few things wrong."""
    data = bytearray(message)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        at = rng.randrange(len(data) + 1)
        kind = rng.randrange(9)
        if kind == 0 and data:  # a flipped bit
            data[at % len(data)] ^= 1 << rng.randrange(8)
        elif kind == 1 and data:  # another byte
            data[at % len(data)] = rng.randrange(256)
        elif kind == 2:  # breaks off
            del data[at:]
        elif kind == 3:  # a piece is missing
            del data[at : at + rng.randrange(1, 20)]
        elif kind == 4:  # a piece too much
            data[at:at] = rng.randbytes(rng.randrange(1, 20))
        elif kind == 5:  # a data item that claims any size
            data[at : at + rng.randrange(3)] = head(rng.randrange(8), rng.choice(_NUMBERS))
        elif kind == 6:  # a number inside a blob
            data[at : at + 4] = struct.pack(">I", rng.choice(_NUMBERS) & 0xFFFFFFFF)
        elif kind == 7:  # deep nesting
            data[at:at] = bytes([rng.choice((0x81, 0x9F, 0xA1, 0xC1, 0xD8, 0x5F))]) * rng.randrange(1, 600)
        else:  # a piece of another message
            other = rng.choice(others)
            begin = rng.randrange(len(other))
            data[at:at] = other[begin : begin + rng.randrange(1, 200)]
    return bytes(data)


def check(message: bytes, outcome: Outcome) -> None:
    """Decode one message and look at what comes out.

    Raises
    ------
    AssertionError
        If the answer is not what a source may yield, or came late.
    """
    began = time.perf_counter()
    events = decode_message(message, max_image_bytes=MAX_IMAGE_BYTES)
    assert events, "no event"
    for event in events:
        assert isinstance(event, SeriesStart | Arrival | Bad | SeriesEnd), f"event {event!r}"
        name = type(event).__name__
        if isinstance(event, Bad):
            assert event.reason, "no reason"
            assert len(event.reason) < 1000, "a reason of more than 1000 characters"
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
    took = time.perf_counter() - began
    outcome.slowest_s = max(outcome.slowest_s, took)
    assert took < SLOWEST_S, f"took {took:.2f} s"


def run(messages: int, seed: int) -> Outcome:
    """Decode so many mutated messages.

    Raises
    ------
    AssertionError
        Giving the message that broke a rule, in hexadecimal digits.
    """
    rng = random.Random(seed)
    sound = originals()
    outcome = Outcome()
    for message in sound:
        check(message, outcome)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(messages):
        original = rng.choice(sound)
        message = damage_pixels(original, rng) if rng.random() < 0.4 else mutate(original, sound, rng)
        try:
            check(message, outcome)
        except Exception as error:
            raise AssertionError(f"seed {seed}, message {number}: {error!r}: {message.hex()}") from error
    outcome.grown_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert outcome.grown_kb < MEMORY_KB, f"seed {seed}: memory grew by {outcome.grown_kb} kB"
    return outcome


def main() -> int:
    """Run the long form."""
    parser = argparse.ArgumentParser(description="Feed broken messages to the Stream V2 decoder.")
    parser.add_argument("--messages", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=None, help="default: taken from the clock")
    chosen = parser.parse_args()
    seed = time.time_ns() % (1 << 32) if chosen.seed is None else chosen.seed
    print(f"seed {seed}, {chosen.messages} messages", flush=True)
    faulthandler.enable()  # a crash in a decompressor then shows where
    began = time.monotonic()
    try:
        outcome = run(chosen.messages, seed)
    except AssertionError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{time.monotonic() - began:.1f} s, slowest message {1000 * outcome.slowest_s:.1f} ms,", end=" ")
    print(f"memory grew by {outcome.grown_kb / 1024:.0f} MB")
    for name, count in outcome.counts.most_common():
        print(f"{count:9d} {name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

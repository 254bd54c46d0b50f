"""Broken messages for the Stream V2 decoder."""

from __future__ import annotations

import random

import numpy as np

from daemon.sources.base import Arrival, Event
from daemon.sources.dectris.v2_codec import Decoder, decode_message
from pipelines.images import EncodedImage, encode_image
from tests.wire import golden as g
from tests.wire.fuzz import MAX_IMAGE_BYTES, NUMBERS, Case, Outcome, Parts, check_events, damage, damage_blob


def sound() -> list[Parts]:
    """Return the golden messages, and some whose blocks a real compressor made: those copy ranges."""
    pixels = np.random.default_rng(5).poisson(0.3, (61, 67)).astype(np.uint16)
    messages = g.corpus()
    for algorithm in ("lz4", "bslz4"):
        blob = g.raw(encode_image(pixels, algorithm, block_bytes=1024))
        typed = g.tag(69, g.tag(56500, g.array(g.text(algorithm), g.uint(2), blob)))
        item = g.tag(40, g.array(g.array(g.uint(61), g.uint(67)), typed))
        messages += [g.image(data=g.mapping(c=item))] * 8
    # Blobs so long that they are not copied.
    noise = g.raw(np.random.default_rng(6).bytes(61 * 67 * 2))
    item = g.tag(40, g.array(g.array(g.uint(61), g.uint(67)), g.tag(69, noise)))
    messages += [g.image(data=g.mapping(c=item, d=item))] * 8
    return [[message] for message in messages]


def broken(parts: Parts, others: list[Parts], rng: random.Random) -> Parts:
    """Damage the map, or only what is behind it, where the blobs are."""
    (message,) = parts
    if rng.random() < 0.4:
        return [damage_blob(message, rng, len(message) // 3)]

    def odd() -> bytes:
        if rng.random() < 0.5:
            return bytes([rng.choice((0x81, 0x9F, 0xA1, 0xC1, 0xD8, 0x5F))])
        # A data item that claims any size; now and then the tag that no sender may use.
        return (
            g.tag(0xFFFF, g.uint(rng.randrange(2)))
            if rng.random() < 0.1
            else g.head(rng.randrange(8), rng.choice(NUMBERS))
        )

    return [damage(message, rng, [other for (other,) in others], odd)]


def check(parts: Parts, outcome: Outcome) -> None:
    """Decode one message and look at what comes out; the short way must say what the thorough one says."""
    events = decode_message(parts[0], max_image_bytes=MAX_IMAGE_BYTES)
    assert events, "no event"
    for pattern in _PATTERNS:
        # One that just decoded a sound image takes the short way if it can.
        decoder = Decoder(MAX_IMAGE_BYTES)
        decoder.decode(pattern)
        assert _comparable(decoder.decode(parts[0])) == _comparable(events), "the two ways differ"
    check_events(events, outcome)


def _comparable(events: list[Event]) -> str:
    """Return all that events say; NaN equals itself here."""
    return repr([_data(event) if isinstance(event, Arrival) else event for event in events])


def _data(arrival: Arrival) -> tuple[object, ...]:
    image = arrival.image
    assert isinstance(image, EncodedImage)
    told = (arrival.detector_series, arrival.frame, arrival.channel, arrival.acquired, arrival.position_um)
    return *told, arrival.metadata, image.header(), bytes(image.data)


_PATTERNS = [
    g.image(),
    g.image(data=g.mapping(a=g.multi_dim(g.PIXELS, 69, ""), b=g.multi_dim(g.PIXELS, 78, ""))),
]


CASE = Case("DECTRIS Stream V2", sound, broken, check)

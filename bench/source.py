"""Decoding of detector messages: the envelope, the pixels, and both through a socket."""

from __future__ import annotations

import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import cbor2
import numpy as np
import numpy.typing as npt

from bench.report import Report, repetitions_s
from daemon.sources.base import Arrival, SeriesEnd
from daemon.sources.dectris.v2 import Config, open_source
from daemon.sources.dectris.v2_codec import decode_message
from daemon.sources.dectris.v2_simulator import SeriesCoder, encode_exposure

SIZE = 2048
BACKGROUND = 0.02  # counts a pixel: a photon-counting detector between the spots


def rows(report: Report) -> None:
    """Time messages of each coding, then a stream through a socket."""
    repeats = report.scale(full=200, quick=20)
    for dtype, algorithm, published in (
        (np.uint16, "bslz4", "0.029 ms envelope, 2.0 ms pixels"),
        (np.uint16, "lz4", ""),
        (np.uint32, "bslz4", "5.0 ms pixels"),
        (np.uint16, "none", ""),
    ):
        pixels = frame(report.rng("source"), dtype)
        message = image_message(pixels, algorithm)
        what = f"{SIZE}x{SIZE} {np.dtype(dtype).name} {algorithm}"
        conditions = f"median of {repeats}, {BACKGROUND} counts/px and 200 spots, {len(message) / 1e6:.2f} MB"
        envelope = repetitions_s(partial(decode_message, message), repeats)
        full = repetitions_s(partial(decoded, message), repeats)
        peer = f"{published} (measured elsewhere)" if published else ""
        vendor: list[float] = []
        if importlib.util.find_spec("dectris") is not None:
            vendor = repetitions_s(partial(by_the_vendors_way, message), repeats)
            here = f"{1e3 * statistics.median(vendor):.3g} ms (bare cbor2 and dectris-compression, this run)"
            peer = f"{here}; {peer}" if peer else here
        report.add(
            f"envelope, {what}",
            1e3 * statistics.median(envelope),
            "ms",
            conditions=conditions,
            data={"times_s": envelope},
        )
        report.add(
            f"envelope and pixels, {what}",
            1e3 * statistics.median(full),
            "ms",
            peer=peer,
            conditions=conditions,
            data={"times_s": full, "peer_times_s": vendor, "p99_ms": 1e3 * float(np.percentile(full, 99))},
        )
    for pixels_too in (False, True):
        stream_row(report, pixels_too=pixels_too)


def frame(rng: np.random.Generator, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """Return background noise with 200 round spots of about 3 px."""
    pixels = rng.poisson(BACKGROUND, (SIZE, SIZE))
    y, x = np.mgrid[-7:8, -7:8]
    spot = np.exp(-(x**2 + y**2) / (2 * 1.5**2))
    for row, column in rng.integers(8, SIZE - 8, (200, 2)):
        pixels[row - 7 : row + 8, column - 7 : column + 8] += rng.poisson(rng.uniform(20, 2000) * spot)
    return pixels.astype(dtype)


def image_message(pixels: npt.NDArray[Any], algorithm: str) -> bytes:
    """Return an image message as the simulator sends it."""
    coder = SeriesCoder(1, "bench", datetime.now(UTC))
    return coder.image(7, encode_exposure(pixels, ("threshold_1",), algorithm), 0.05)[0]


def decoded(message: bytes) -> npt.NDArray[Any]:
    """Return the pixels of an image message as the daemon and its workers get them."""
    event = decode_message(message)[0]
    assert isinstance(event, Arrival)
    return event.image.array()


def by_the_vendors_way(message: bytes) -> npt.NDArray[Any]:
    """Decode with nothing but the libraries: no check of sizes, tags or numbers of items."""
    from dectris.compression import decompress  # not among our own needs: it must be compiled

    def hook(tag: cbor2.CBORTag, _immutable: bool) -> Any:
        if tag.tag == 56500:
            algorithm, element_bytes, blob = tag.value
            return decompress(blob, algorithm, elem_size=element_bytes)
        if tag.tag in (69, 70):
            return np.frombuffer(tag.value, "<u2" if tag.tag == 69 else "<u4")
        if tag.tag == 40:
            return tag.value[1].reshape(tag.value[0])
        return tag

    pixels: npt.NDArray[Any] = cbor2.loads(message, tag_hook=hook)["data"]["threshold_1"]
    return pixels


def stream_row(report: Report, *, pixels_too: bool) -> None:
    """Read as fast as it goes from a simulator in a process of its own."""
    count = report.scale(full=600, quick=60)
    with tempfile.TemporaryDirectory() as folder:
        np.save(Path(folder) / "frame.npy", frame(report.rng("source"), np.uint16))
        command = [str(Path(sys.executable).parent / "grainwatch"), "simulate", "dectris-v2", "--json"]
        command += ["--frames", f"{folder}/frame.npy", "--rate", "0", "--count", str(count)]
        source = open_source(Config(address="tcp://127.0.0.1:*", bind=True), "bench")
        command += ["--connect", source.address]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        arrived = 0
        began = 0.0
        for event in source.events():
            if isinstance(event, Arrival):
                began = began or time.monotonic()
                arrived += 1
                if pixels_too:
                    event.image.array()
            if isinstance(event, SeriesEnd):
                break
        took = time.monotonic() - began
        source.close()
        sent = json.loads(process.communicate()[0])
    if arrived != count:
        raise RuntimeError(f"{arrived} of {count} images arrived")
    report.add(
        f"source, socket to {'pixels' if pixels_too else 'compressed image'}, {SIZE}x{SIZE} uint16 bslz4",
        (count - 1) / took,
        "images/s",
        conditions=f"{count} images, tcp loopback, simulator on the same core ({sent['cpu_s']:.2f} s)",
        data={"seconds": took, "images": count, "simulator": sent},
    )

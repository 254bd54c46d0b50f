"""A source without analysis beside a bare pyzmq PULL socket: what receiving and decoding costs.

Started as a module it is the sender, a process of its own: it reads addresses from standard input
and sends the same messages to each, as fast as they are taken.
"""

from __future__ import annotations

import gc
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path

import zmq

from bench.report import Report
from bench.source import frame
from daemon.sources.areadetector import simulator as areadetector_simulator
from daemon.sources.areadetector import source as areadetector
from daemon.sources.base import Arrival, Source, SourceContext
from daemon.sources.dectris import v1 as dectris_v1
from daemon.sources.dectris import v1_simulator as dectris_v1_simulator
from daemon.sources.dectris import v2 as dectris_v2
from daemon.sources.dectris import v2_simulator as dectris_v2_simulator

ASKED_PERCENT = 90.0
FORMATS = {"Stream V1": dectris_v1, "Stream V2": dectris_v2, "areaDetector": areadetector}
KINDS = {  # about 0.4 MB and 8.4 MB; areaDetector seldom compresses: 0.26 MB and 8.4 MB
    "Stream V1": ("bslz4", "none"),
    "Stream V2": ("bslz4", "none"),
    "areaDetector": ("small", "none"),
}
HIGH_WATER_MARK = 32
# What waits in the buffers of both ends when the clock would start: it comes as fast as it is asked for.
AHEAD = 2 * HIGH_WATER_MARK + 10
LIMIT_S = 60.0


def rows(report: Report) -> None:
    """Receive the same messages by either, in turn."""
    for name in FORMATS:
        for kind in KINDS[name]:
            transport_row(report, name, kind)


def transport_row(report: Report, name: str, kind: str) -> None:
    """Take the ratio of neighbouring runs: the machine may change its mind between them."""
    repeats = report.scale(full=31, quick=3)
    count = report.scale(full=60, quick=20) if kind == "none" else report.scale(full=600, quick=200)
    command = [sys.executable, "-m", "bench.transport", name, kind, str(count), str(report.seed)]
    bare_s, source_s = [], []
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as sender:
        try:
            assert sender.stdin is not None
            assert sender.stdout is not None
            nbytes = int(sender.stdout.readline())
            for repeat in range(repeats + 1):
                # Who goes first changes, and the first turn of both is not counted.
                pair = {}
                for by_source in (repeat % 2 == 0, repeat % 2 == 1):
                    taken = _by_source(name, sender) if by_source else _bare(sender)
                    pair[by_source] = _seconds(taken, count)
                if repeat:
                    bare_s.append(pair[False])
                    source_s.append(pair[True])
        finally:
            sender.kill()
    ratios = [100 * bare / source for bare, source in zip(bare_s, source_s, strict=True)]
    per_s = [count / statistics.median(seconds) for seconds in (bare_s, source_s)]
    report.add(
        f"transport, {name}, {nbytes / 1e6:.2g} MB messages: source without analysis, of a bare PULL",
        statistics.median(ratios),
        "%",
        at_least=ASKED_PERCENT,
        peer=f"{per_s[0]:.0f} messages/s bare, {per_s[1]:.0f} by the source (this run)",
        conditions=f"median of {repeats} pairs of runs in turn, {min(ratios):.1f} to {max(ratios):.1f} %;"
        f" {count} messages each, tcp loopback, not copied, high water mark {HIGH_WATER_MARK},"
        " sender in a process of its own",
        data={"ratios_percent": ratios, "bare_s": bare_s, "source_s": source_s, "message_bytes": nbytes},
    )


def _seconds(taken: Iterator[None], count: int) -> float:
    """Return how long so many messages take once they flow, without the collector's pauses."""
    gc.collect()
    gc.disable()
    try:
        for _ in range(AHEAD):
            next(taken)
        began = time.perf_counter()
        got = sum(1 for _ in islice(taken, count))
        took = time.perf_counter() - began
    finally:
        gc.enable()
        taken.close()  # type: ignore[attr-defined]  # a generator: closes its socket
    if got != count:
        raise RuntimeError(f"{got} of {count} messages arrived")
    return took


def _bare(sender: subprocess.Popen[str]) -> Iterator[None]:
    """Take messages as pyzmq gives them."""
    with zmq.Context() as context, context.socket(zmq.PULL) as socket:
        socket.set_hwm(HIGH_WATER_MARK)
        socket.setsockopt(zmq.RCVTIMEO, round(1000 * LIMIT_S))
        port = socket.bind_to_random_port("tcp://127.0.0.1")
        _send_to(sender, f"tcp://127.0.0.1:{port}")
        while True:
            socket.recv_multipart(copy=False)
            yield


def _by_source(name: str, sender: subprocess.Popen[str]) -> Iterator[None]:
    """Take messages as the daemon does, up to the image whose pixels are still compressed."""
    until = time.monotonic() + LIMIT_S
    with tempfile.TemporaryDirectory() as folder:
        source, address = _opened(name, Path(folder))
        try:
            _send_to(sender, address)
            for event in source.events():
                arrived = isinstance(event, Arrival)
                del event  # as the bare reader drops its message before it asks for the next one
                if arrived:
                    yield
                elif time.monotonic() > until:
                    raise RuntimeError(f"no image in {LIMIT_S:.0f} s")
        finally:
            source.close()


def _opened(name: str, folder: Path) -> tuple[Source, str]:
    """Return a source that is the one reader, and where it listens."""
    module = FORMATS[name]
    config = module.Config(
        address="tcp://127.0.0.1:*", bind=True, role="primary", high_water_mark=HIGH_WATER_MARK
    )
    more = [SourceContext(folder)] if name == "areaDetector" else []
    source = module.open_source(config, "bench", *more)
    return source, source.address


def _send_to(sender: subprocess.Popen[str], address: str) -> None:
    assert sender.stdin is not None
    print(address, file=sender.stdin, flush=True)


def main(name: str, kind: str, count: str, seed: str) -> None:
    """Send `count` messages to every address that is read, and those ahead of them."""
    pixels = frame(Report(seed=int(seed)).rng("source"), "uint16")
    now = datetime.now(UTC)
    if name == "Stream V1":
        first = dectris_v1_simulator.encode_exposure(pixels, kind)
        parts = dectris_v1_simulator.SeriesCoder(1, now).image(7, first, 0.05)
    elif name == "Stream V2":
        second = dectris_v2_simulator.encode_exposure(pixels, ("threshold_1",), kind)
        parts = dectris_v2_simulator.SeriesCoder(1, "bench", now).image(7, second, 0.05)
    else:
        third = areadetector_simulator.encode_exposure(pixels[:512, :256] if kind == "small" else pixels)
        attributes = {"ColorMode": 0, "AcquireTime": 0.05, "SampleX": 1.25, "SampleY": -3.5}
        parts = areadetector_simulator.encode_array(third, 7, 1e9, "1.4", attributes)
    print(sum(map(len, parts)), flush=True)
    with zmq.Context() as context:
        for line in sys.stdin:
            with context.socket(zmq.PUSH) as socket:
                socket.set_hwm(HIGH_WATER_MARK)
                socket.connect(line.strip())
                for _ in range(int(count) + AHEAD):
                    socket.send_multipart(parts, copy=False)


if __name__ == "__main__":
    main(*sys.argv[1:])

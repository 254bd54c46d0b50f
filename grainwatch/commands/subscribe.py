"""``grainwatch subscribe``: results as they come, as a table on a terminal or as lines."""

from __future__ import annotations

import errno
import logging
import os
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Annotated

import msgspec
import typer
import zmq
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from grainwatch.messages import (
    AnyMessage,
    ChangeReport,
    Crystal,
    DriftReport,
    Health,
    LaueResult,
    MapUpdate,
    MicrographResult,
    to_builtins,
)
from grainwatch.stream import DEFAULT_ADDRESS, SLICE_S, ResultStream
from grainwatch.wire import StreamError
from grainwatch.words import micrograph_words

ROWS = 20
COLUMNS = ("published", "stream", "frame", "peaks", "crystals", "found", "latency")
SHOWN_CRYSTALS = 3
PATIENCE_S = 2.0


def subscribe(
    address: Annotated[str, typer.Argument(help="Where the daemon publishes.")] = DEFAULT_ADDRESS,
    json_lines: Annotated[bool, typer.Option("--json", help="One line of JSON a message.")] = False,
    since: Annotated[
        str | None, typer.Option(help='Begin at a sequence number, a series_uid, or "start".')
    ] = None,
    count: Annotated[int | None, typer.Option(min=1, help="End after so many messages.")] = None,
    stream: Annotated[list[str] | None, typer.Option(help="Only this stream; may be repeated.")] = None,
    catch_up: Annotated[
        str | None, typer.Option(help="Where missed messages are asked for; by default one port above.")
    ] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Also maps, drift and the daemon's health.")
    ] = False,
) -> None:
    """Show results as they come: a table, or lines of JSON.

    Ctrl-C ends it. Messages that are lost for good are told on standard error.
    """
    logging.basicConfig(level=logging.WARNING, format="grainwatch: %(message)s", stream=sys.stderr)
    results = ResultStream(
        address,
        catch_up,
        since=int(since) if since is not None and _is_number(since) else since,
        streams=stream or None,
        schemas="all" if everything else None,
    )
    with results, _polite_end():
        if not _answers(address, PATIENCE_S):
            print(f"grainwatch: nothing answers at {address} yet, waiting", file=sys.stderr, flush=True)
        messages = _first(results, count)
        if json_lines:
            for message in messages:
                print(msgspec.json.encode(to_builtins(message)).decode(), flush=True)
        elif sys.stdout.isatty():
            _live(messages, results)
        else:
            for message in messages:
                print("  ".join(row(message)), flush=True)


def _answers(address: str, wait_s: float) -> bool:
    """Whether somebody publishes at an address, or begins to within a time.

    Asks with a socket of its own; the one that reads is connected already and misses nothing.
    """
    with zmq.Context() as context, context.socket(zmq.SUB) as asking:
        asking.setsockopt(zmq.LINGER, 0)
        # The handshake, not the connection: something else may listen at the port.
        with asking.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED) as monitor:
            asking.connect(address)
            slices = max(1, round(wait_s / SLICE_S))  # so that Ctrl-C works on Windows, too
            answered = any(monitor.poll(round(1000 * SLICE_S)) for _ in range(slices))
            asking.disable_monitor()
    return answered


def row(message: AnyMessage) -> tuple[str, ...]:
    """Return what one line says of a message, for the columns `COLUMNS`."""
    published = datetime.fromtimestamp(message.times.published).strftime("%H:%M:%S.%f")[:-3]
    if isinstance(message, LaueResult):
        latency_ms = 1000 * (message.times.published - message.times.received)
        return (
            published,
            message.key.source,
            str(message.key.frame),
            str(message.n_peaks),
            str(len(message.crystals)),
            _found(message),
            f"{latency_ms:.0f} ms" if message.times.received else "",
        )
    if isinstance(message, MicrographResult):
        latency_ms = 1000 * (message.times.published - message.times.received)
        found = ", ".join([*micrograph_words(message.morphology, message.posterior), *message.flags])
        latency = f"{latency_ms:.0f} ms" if message.times.received else ""
        return published, message.key.source, str(message.key.frame), "", "", found, latency
    if isinstance(message, MapUpdate):
        grains = f"map {message.kind}: {message.filled} points, {len(message.grains)} grains changed"
        return published, message.source, "", "", "", grains, ""
    if isinstance(message, DriftReport | ChangeReport):
        return published, message.source, str(message.frame), "", "", message.text, ""
    return published, message.name, "", "", "", _health(message), ""


def _found(result: LaueResult) -> str:
    shown = [
        " ".join([f"{c.material} {c.spots_matched}/{c.spots_expected} {c.residual_px:.2f} px", *_flags(c)])
        for c in result.crystals[:SHOWN_CRYSTALS]
    ]
    rest = len(result.crystals) - len(shown)
    return ", ".join([*shown, *([f"and {rest} more"] if rest else []), *result.flags])


def _flags(crystal: Crystal) -> list[str]:
    # In brackets, because the flags of the frame end the same line.
    return [f"[{', '.join(crystal.flags)}]"] if crystal.flags else []


def _health(health: Health) -> str:
    received = sum(s.received for s in health.streams)
    done = sum(s.done for s in health.streams)
    return f"{health.state}: {received} frames received, {done} done, {health.workers} workers"


def _live(messages: Iterator[AnyMessage], results: ResultStream) -> None:
    shown: deque[tuple[str, ...]] = deque(maxlen=ROWS)
    number = 0
    console = Console()
    with Live(_table(shown, 0, results), console=console, refresh_per_second=8) as live:
        for number, message in enumerate(messages, 1):
            shown.append(row(message))
            live.update(_table(shown, number, results))


def _table(shown: deque[tuple[str, ...]], number: int, results: ResultStream) -> Table:
    table = Table(
        title=f"{results.address}: {number} messages" if number else f"waiting for {results.address}",
        caption=f"{results.lost} lost, {results.filled} caught up" if number else "Ctrl-C ends",
    )
    for name in COLUMNS:
        right = name in ("frame", "peaks", "crystals", "latency")
        table.add_column(name, justify="right" if right else "left", overflow="fold")
    for cells in shown:
        table.add_row(*map(Text, cells))
    return table


def _first(results: ResultStream, count: int | None) -> Iterator[AnyMessage]:
    # islice would wait for one message more than it hands out.
    for number, message in enumerate(results, 1):
        yield message
        if number == count:
            return


def _is_number(text: str) -> bool:
    # A series_uid may consist of digits alone, but it is longer than any sequence number.
    return text.isascii() and text.isdigit() and len(text) < 19


@contextmanager
def _polite_end() -> Iterator[None]:
    """End without a traceback on Ctrl-C, when the reader of a pipe has gone, or nothing can be had."""
    try:
        yield
    except KeyboardInterrupt:
        return
    except StreamError as error:
        print(f"grainwatch: {error}", file=sys.stderr)
        raise typer.Exit(1) from None
    except OSError as error:
        # Windows says EINVAL where others say EPIPE.
        if error.errno not in (errno.EPIPE, errno.EINVAL):
            raise
        # Else the interpreter would complain when it flushes standard output at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

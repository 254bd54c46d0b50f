"""``grainwatch simulate``: instruments that are not there, one sub-command a wire format.

A new simulator adds a command to `app` here, and its library entry beside its source.
"""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator
from dataclasses import asdict
from typing import Annotated, Any

import numpy.typing as npt
import typer
import zmq

from daemon.sources.dectris_v2_sim import Options, Simulator
from grainwatch.config import ConfigError
from pipelines.files import expand, read_images
from pipelines.frame import BadFrame

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    no_args_is_help=True,
    help="Stream frames as an instrument does, for trials and tests.",
)


@app.callback()
def simulate() -> None:
    """Stream frames as an instrument does, for trials and tests."""


@app.command("dectris-v2")
def dectris_v2(
    more_frames: Annotated[list[str] | None, typer.Argument(metavar="FILES", hidden=True)] = None,
    frames: Annotated[
        list[str] | None,
        typer.Option(
            "--frames",
            metavar="FILES...",
            help="Image files, folders, patterns or file.h5::/dataset; all of one size.",
        ),
    ] = None,
    bind: Annotated[
        str | None, typer.Option(help="Address to listen on, as a detector does. [tcp://127.0.0.1:31001]")
    ] = None,
    connect: Annotated[str | None, typer.Option(help="Connect to a reader that binds, instead.")] = None,
    rate: Annotated[float, typer.Option(help="Exposures a second; 0: as fast as they are taken.")] = 20.0,
    count: Annotated[
        int | None, typer.Option(help="Exposures in a series. [each file --repeat times]")
    ] = None,
    repeat: Annotated[int, typer.Option(help="How often a series goes through the files.")] = 1,
    series: Annotated[int, typer.Option(help="How many series.")] = 1,
    algorithm: Annotated[str, typer.Option(help="bslz4, lz4 or none.")] = "bslz4",
    channels: Annotated[int, typer.Option(help="Thresholds in each image message.")] = 1,
    high_water_mark: Annotated[int, typer.Option(help="Messages buffered before it waits.")] = 100,
    linger: Annotated[float, typer.Option(help="Seconds to wait at the end until all is taken.")] = 30.0,
    wait: Annotated[float | None, typer.Option(help="Seconds to wait for a reader. [for ever]")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Report as JSON.")] = False,
) -> None:
    """Send files as a DECTRIS detector does (Stream V2, CBOR over a ZeroMQ PUSH socket)."""
    if bind and connect:
        raise ConfigError("simulate dectris-v2: give --bind or --connect, not both")
    address = connect or bind or "tcp://127.0.0.1:31001"
    try:
        options = Options(
            address=address,
            bind=connect is None,
            rate_hz=rate,
            count=count,
            repeat=repeat,
            series=series,
            algorithm=algorithm,
            channels=tuple(f"threshold_{k + 1}" for k in range(channels)),
            high_water_mark=high_water_mark,
            linger_s=linger,
            peer_timeout_s=wait,
        )
        files = expand([*(frames or []), *(more_frames or [])])
        if not files:
            raise ConfigError("simulate dectris-v2: --frames: give at least one file")
        stopping = _stop_flag()
        simulator = Simulator(_pixels(files), options, stop=lambda: bool(stopping))
    except (ValueError, BadFrame) as error:
        raise ConfigError(f"simulate dectris-v2: {error}") from error
    except zmq.ZMQError as error:
        raise ConfigError(f"simulate dectris-v2: {address} cannot be used: {error.strerror}") from error
    many = "1 file" if len(files) == 1 else f"{len(files)} files"
    print(f"{many} compressed; PUSH on {simulator.address}", file=sys.stderr, flush=True)
    report = simulator.run()
    print(json.dumps(asdict(report)) if as_json else str(report), flush=True)
    if not report.complete:
        raise typer.Exit(1)


def _pixels(files: list[str]) -> Iterator[npt.NDArray[Any]]:
    """Yield the frames of all files; one that cannot be read ends the command."""
    for file in files:
        for _, pixels in read_images(file):
            yield pixels


def _stop_flag() -> list[int]:
    """Collect SIGINT and SIGTERM in a list, so that a stop still reports what was sent."""
    received: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda signum, _frame: received.append(signum))
    return received

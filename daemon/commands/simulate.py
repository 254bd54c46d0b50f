"""``grainwatch simulate``: instruments that are not there, one sub-command a wire format.

A new simulator adds a command to `app` here, and its library entry beside its source.
"""

from __future__ import annotations

import json
import re
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import numpy.typing as npt
import typer
import zmq

from daemon.sources.areadetector import simulator as areadetector_simulator
from daemon.sources.bluesky import simulator as bluesky_simulator
from daemon.sources.dectris import v1_simulator as dectris_v1_simulator
from daemon.sources.dectris import v2_simulator as dectris_v2_simulator
from daemon.sources.folder import simulator as folder_simulator
from daemon.sources.folder.microscope import Microscope, checked_vendor
from daemon.sources.simulator import Options, Simulator
from grainwatch.config import ConfigError, ScanTable
from pipelines.files import expand, read_images, reason
from pipelines.frame import BadFrame
from pipelines.micrograph.synthetic import MicrographSimulator, checked_structure

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    no_args_is_help=True,
    help="Stream frames as an instrument does, for trials and tests.",
)

# The options that every detector has.
MoreFrames = Annotated[list[str] | None, typer.Argument(metavar="FILES", hidden=True)]
Frames = Annotated[
    list[str] | None,
    typer.Option(
        "--frames",
        metavar="FILES...",
        help="Image files, folders, patterns or file.h5::/dataset; all of one size.",
    ),
]
Bind = Annotated[
    str | None, typer.Option(help="Address to listen on, as a detector does. [its own port of 127.0.0.1]")
]
Connect = Annotated[str | None, typer.Option(help="Connect to a reader that binds, instead.")]
Rate = Annotated[float, typer.Option(help="Exposures a second; 0: as fast as they are taken.")]
Count = Annotated[int | None, typer.Option(help="Exposures in a series. [each file --repeat times]")]
Repeat = Annotated[int, typer.Option(help="How often a series goes through the files.")]
Series = Annotated[int, typer.Option(help="How many series.")]
Algorithm = Annotated[str, typer.Option(help="bslz4, lz4 or none.")]
HighWaterMark = Annotated[int, typer.Option(help="Messages buffered before it waits.")]
Linger = Annotated[float, typer.Option(help="Seconds to wait at the end until all is taken.")]
Wait = Annotated[float | None, typer.Option(help="Seconds to wait for a reader. [for ever]")]
Micrographs = Annotated[
    int, typer.Option(metavar="N", help="So many synthetic micrographs of two phases in place of files.")
]
Structure = Annotated[str, typer.Option(help="What they show: islands, labyrinth or particles.")]
PixelSize = Annotated[float, typer.Option(help="Width of a pixel of the micrographs.")]
Seed = Annotated[
    int,
    typer.Option(help="The same seed, the same micrographs; 0: those that two-phase-synthetic learned."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Report as JSON.")]


@app.callback()
def simulate() -> None:
    """Stream frames as an instrument does, for trials and tests."""


@app.command("dectris-v1")
def dectris_v1(
    more_frames: MoreFrames = None,
    frames: Frames = None,
    bind: Bind = None,
    connect: Connect = None,
    rate: Rate = 20.0,
    count: Count = None,
    repeat: Repeat = 1,
    series: Series = 1,
    algorithm: Algorithm = "bslz4",
    header_detail: Annotated[str, typer.Option(help="none, basic or all.")] = "basic",
    header_appendix: Annotated[str, typer.Option(help="Text appended to each header.")] = "",
    image_appendix: Annotated[str, typer.Option(help="Text appended to each image.")] = "",
    high_water_mark: HighWaterMark = 100,
    linger: Linger = 30.0,
    wait: Wait = None,
    as_json: AsJson = False,
) -> None:
    """Send files as a DECTRIS detector does (Stream V1, JSON and binary parts over a ZeroMQ PUSH socket)."""
    address = _address("dectris-v1", bind, connect, "tcp://127.0.0.1:9999")

    def options() -> dectris_v1_simulator.Options:
        return dectris_v1_simulator.Options(
            address=address,
            bind=connect is None,
            rate_hz=rate,
            count=count,
            repeat=repeat,
            series=series,
            algorithm=algorithm,
            header_detail=header_detail,
            header_appendix=header_appendix,
            image_appendix=image_appendix,
            high_water_mark=high_water_mark,
            linger_s=linger,
            peer_timeout_s=wait,
        )

    _run("dectris-v1", [*(frames or []), *(more_frames or [])], options, as_json=as_json)


@app.command("dectris-v2")
def dectris_v2(
    more_frames: MoreFrames = None,
    frames: Frames = None,
    bind: Bind = None,
    connect: Connect = None,
    rate: Rate = 20.0,
    count: Count = None,
    repeat: Repeat = 1,
    series: Series = 1,
    algorithm: Algorithm = "bslz4",
    channels: Annotated[int, typer.Option(help="Thresholds in each image message.")] = 1,
    high_water_mark: HighWaterMark = 100,
    linger: Linger = 30.0,
    wait: Wait = None,
    as_json: AsJson = False,
) -> None:
    """Send files as a DECTRIS detector does (Stream V2, CBOR over a ZeroMQ PUSH socket)."""
    address = _address("dectris-v2", bind, connect, "tcp://127.0.0.1:31001")

    def options() -> dectris_v2_simulator.Options:
        return dectris_v2_simulator.Options(
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

    _run("dectris-v2", [*(frames or []), *(more_frames or [])], options, as_json=as_json)


@app.command("areadetector")
def areadetector(
    more_frames: MoreFrames = None,
    frames: Frames = None,
    bind: Annotated[str | None, typer.Option(help="Address to listen on. [tcp://127.0.0.1:1234]")] = None,
    connect: Connect = None,
    pattern: Annotated[str, typer.Option(help="pub (all who subscribe) or push (one reader).")] = "pub",
    version: Annotated[str, typer.Option(help="The plug-in's: 1.4, or 1.3 (shape as x, y).")] = "1.4",
    rate: Rate = 20.0,
    count: Count = None,
    repeat: Repeat = 1,
    series: Annotated[int, typer.Option(help="How often the counter of arrays starts over.")] = 1,
    first_id: Annotated[int, typer.Option(help="Number of the first array.")] = 1,
    algorithm: Annotated[str, typer.Option(help="none, bslz4, lz4hdf5 or lz4.")] = "none",
    scan: Annotated[str | None, typer.Option(help="Points of a raster scan, x first: 41x31.")] = None,
    step_um: Annotated[float, typer.Option(help="Distance of the points.")] = 1.0,
    snake: Annotated[bool, typer.Option(help="Every second line runs backwards.")] = False,
    micrographs: Micrographs = 0,
    structure: Structure = "islands",
    pixel_size_um: PixelSize = 0.25,
    seed: Seed = 1,
    high_water_mark: Annotated[int, typer.Option(help="Messages buffered before it drops arrays.")] = 1000,
    linger: Linger = 30.0,
    wait: Wait = None,
    as_json: AsJson = False,
) -> None:
    """Send files as EPICS areaDetector does (ZeroMQ plug-in, JSON header and pixels, PUB or PUSH socket)."""
    address = _address("areadetector", bind, connect, "tcp://127.0.0.1:1234")
    shape = _points("areadetector", scan) if scan else ()
    stopping = _stop_flag()
    try:
        patterns = [*(frames or []), *(more_frames or [])]
        images, many = _content("areadetector", patterns, micrographs, structure, pixel_size_um, seed)
        options = areadetector_simulator.Options(
            address=address,
            bind=connect is None,
            pattern=pattern,
            version=version,
            rate_hz=rate,
            count=count,
            repeat=repeat,
            series=series,
            first_id=first_id,
            algorithm=algorithm,
            scan=ScanTable(shape=shape, step_um=(step_um,) * len(shape), snake=snake) if shape else None,
            attributes=areadetector_simulator.microscope_attributes(pixel_size_um) if micrographs else {},
            high_water_mark=high_water_mark,
            linger_s=linger,
            peer_timeout_s=wait,
        )
        simulator = areadetector_simulator.Simulator(images, options, lambda: bool(stopping))
    except (ValueError, BadFrame) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"simulate areadetector: {error}") from error
    except zmq.ZMQError as error:
        raise ConfigError(f"simulate areadetector: {address} cannot be used: {error.strerror}") from error
    print(f"{many}; {pattern.upper()} on {simulator.address}", file=sys.stderr, flush=True)
    report = simulator.run()
    print(json.dumps(asdict(report)) if as_json else str(report), flush=True)
    if not report.complete:
        raise typer.Exit(1)


@app.command("bluesky")
def bluesky(
    more_frames: MoreFrames = None,
    frames: Frames = None,
    bind: Annotated[
        str | None, typer.Option(help="Play the proxy: where to publish. [tcp://127.0.0.1:5578]")
    ] = None,
    connect: Annotated[str | None, typer.Option(help="Publish to a proxy (its in port is 5577).")] = None,
    scan: Annotated[str, typer.Option(help="Points of the raster scan, x first: 41x31.")] = "5x4",
    step_um: Annotated[float, typer.Option(help="Distance of the points.")] = 1.0,
    snake: Annotated[bool, typer.Option(help="Every second line runs backwards.")] = False,
    rate: Rate = 20.0,
    folder: Annotated[
        Path | None,
        typer.Option(help="Write the frames to an HDF5 file there. [frames lie in the events]"),
    ] = None,
    encoding: Annotated[str, typer.Option(help="msgpack or json.")] = "msgpack",
    prefix: Annotated[str, typer.Option(help="Prefix of the messages.")] = "",
    linger: Linger = 30.0,
    wait: Wait = None,
    as_json: AsJson = False,
) -> None:
    """Publish the documents of a raster scan as a Bluesky RunEngine does, files in place of the detector."""
    address = _address("bluesky", bind, connect, "tcp://127.0.0.1:5578")
    shape = _points("bluesky", scan)
    if folder is not None and not folder.is_dir():
        raise ConfigError(f"simulate bluesky: --folder: {folder} is not a folder")
    stopping = _stop_flag()
    try:
        options = bluesky_simulator.Options(
            address=address,
            bind=connect is None,
            shape=shape,
            step_um=step_um,
            snake=snake,
            rate_hz=rate,
            encoding=bluesky_simulator.checked_encoding(encoding),
            folder=folder,
            prefix=prefix,
            peer_timeout_s=wait,
            linger_s=linger,
        )
        images = list(_pixels(expand([*(frames or []), *(more_frames or [])])))
        simulator = bluesky_simulator.Simulator(images, options, stop=lambda: bool(stopping))
    except (ValueError, BadFrame) as error:
        raise ConfigError(f"simulate bluesky: {error}") from error
    print(f"{len(images)} frames; documents on {simulator.address}", file=sys.stderr, flush=True)
    report = simulator.run()
    print(json.dumps(asdict(report)) if as_json else str(report), flush=True)
    if not report.complete:
        raise typer.Exit(1)


@app.command("folder")
def folder(
    to: Annotated[Path, typer.Option(help="Folder to write to; made if it is not there.")],
    more_frames: MoreFrames = None,
    frames: Frames = None,
    writer: Annotated[str, typer.Option(help="slow (in pieces), rename or swmr (one HDF5 file).")] = "slow",
    name: Annotated[str, typer.Option(help="Files are called NAME_0000.tif, or NAME.h5.")] = "scan",
    rate: Rate = 20.0,
    scan: Annotated[str | None, typer.Option(help="Points of a raster scan, x first: 41x31.")] = None,
    step_um: Annotated[float, typer.Option(help="Distance of the points.")] = 1.0,
    snake: Annotated[bool, typer.Option(help="Every second line runs backwards.")] = False,
    end_file: Annotated[str, typer.Option(help="Write an empty file of this name at the end.")] = "",
    micrographs: Micrographs = 0,
    vendor: Annotated[
        str | None,
        typer.Option(
            help="Whose metadata and data bar to write: thermo, zeiss, tescan, hitachi or jeol."
            " [thermo with --micrographs]"
        ),
    ] = None,
    structure: Structure = "islands",
    pixel_size_um: PixelSize = 0.25,
    seed: Seed = 1,
    as_json: AsJson = False,
) -> None:
    """Write files into a folder as a program does that saves its images there."""
    stopping = _stop_flag()
    try:
        shape = _points("folder", scan) if scan else ()
        vendor = vendor or ("thermo" if micrographs else None)
        patterns = [*(frames or []), *(more_frames or [])]
        images, _ = _content("folder", patterns, micrographs, structure, pixel_size_um, seed)
        options = folder_simulator.Options(
            folder=to,
            name=name,
            writer=folder_simulator.checked_writer(writer),
            rate_hz=rate,
            scan=ScanTable(shape=shape, step_um=(step_um,) * len(shape), snake=snake) if shape else None,
            end_file=end_file,
            microscope=Microscope(checked_vendor(vendor), pixel_size_um) if vendor else None,
        )
        report = folder_simulator.write(images, options, lambda: bool(stopping))
    except (ValueError, OSError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"simulate folder: {reason(error)}") from error
    print(json.dumps(asdict(report)) if as_json else str(report), flush=True)
    if not report.complete:
        raise typer.Exit(1)


def _content(
    name: str, patterns: list[str], micrographs: int, structure: str, pixel_size_um: float, seed: int
) -> tuple[Iterator[npt.NDArray[Any]], str]:
    """Return the images of files, or synthetic micrographs, and how many files or micrographs there are."""
    if micrographs < 0 or (micrographs and patterns):
        raise ConfigError(f"simulate {name}: --micrographs: expected 1 or more, and no --frames beside it")
    if seed < 0:
        raise ConfigError(f"simulate {name}: --seed: expected 0 or more, got {seed}")
    if micrographs:
        simulator = MicrographSimulator(
            structure=checked_structure(structure), pixel_size_um=pixel_size_um, seed=seed
        )
        return (sample.image for sample in simulator.samples(0, micrographs)), f"{micrographs} micrographs"
    files = expand(patterns)
    if not files:
        raise ConfigError(f"simulate {name}: --frames: give at least one file")
    return _pixels(files), "1 file" if len(files) == 1 else f"{len(files)} files"


def _points(name: str, scan: str) -> tuple[int, ...]:
    if not re.fullmatch("[0-9]{1,6}(x[0-9]{1,6}){0,2}", scan):
        raise ConfigError(f"simulate {name}: --scan: expected points such as 41x31, got {scan!r}")
    return tuple(int(n) for n in scan.split("x"))


def _address(name: str, bind: str | None, connect: str | None, own: str) -> str:
    if bind and connect:
        raise ConfigError(f"simulate {name}: give --bind or --connect, not both")
    return connect or bind or own


def _run(name: str, patterns: list[str], make_options: Callable[[], Options[Any]], *, as_json: bool) -> None:
    """Send the files and report; everything that cannot be done is one line."""
    address = ""
    try:
        options = make_options()
        address = options.address
        files = expand(patterns)
        if not files:
            raise ConfigError(f"simulate {name}: --frames: give at least one file")
        stopping = _stop_flag()
        simulator = Simulator(_pixels(files), options, stop=lambda: bool(stopping))
    except (ValueError, BadFrame) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"simulate {name}: {error}") from error
    except zmq.ZMQError as error:
        raise ConfigError(f"simulate {name}: {address} cannot be used: {error.strerror}") from error
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

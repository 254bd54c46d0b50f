"""``grainwatch check-config``: everything that can be known about a configuration without running it."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer

from daemon.commands.run import enter_folder_of
from daemon.configuration import Configuration
from daemon.flow.plugins import Plugin, pipeline_plugin, sink_plugins, source_plugin
from daemon.models.at_work import AtWork
from daemon.models.registry import Registry
from grainwatch.config import Config, ConfigError, EdgeTable, ScanTable, read_config

_ADDRESS = re.compile(r"^(tcp)://(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9_.-]+|\*):(\d+)$|^(ipc|inproc)://(.+)$")


def check_config(
    config: Annotated[Path, typer.Argument(help="The configuration file.")],
) -> None:
    """Check a configuration file and print what a daemon would do with it."""
    parsed, config_hash = read_config(config)
    enter_folder_of(config)
    for line in describe(parsed, config_hash, str(config)):
        print(line)
    print(f"{config}: good")


def describe(config: Config, config_hash: str, where: str) -> list[str]:
    """Check every table and return what the daemon would do, a line each.

    The pipelines are built, which reads the calibration and materials that they name; sources and
    sinks are not opened, because a detector gives each frame to one reader only.

    Raises
    ------
    ConfigError
        For the first thing that cannot be used: names the key and what was expected.
    """
    daemon, streams, sinks = [], [], []
    registry = Registry(Path(config.daemon.state_dir))
    at_work = AtWork.of(Configuration(config, config_hash, b"", where), registry)
    registry.close()
    folders = {"state_dir": config.daemon.state_dir, "runtime_dir": config.daemon.runtime_dir}
    for key, folder in folders.items():
        _check_folder(Path(folder), f"{where}: daemon.{key}")
    daemon.append(
        f"daemon {config.daemon.name}: state in {Path(config.daemon.state_dir).absolute()}, "
        + (f"{config.daemon.workers} workers" if config.daemon.workers else "computing in its own process")
    )
    for name, table in config.streams.items():
        source = source_plugin(name, table, where)
        notes = _check_plugin(source)
        pipeline = pipeline_plugin(name, table, config_hash, where, at_work.models, config.engines)
        built = pipeline.build()
        streams.append(f"stream {name}: {table.source['type']} -> {table.pipeline['type']}")
        # What decides over the science comes first; a pipeline says it of itself.
        say = getattr(built, "describe", None)
        streams += [f"  {line}" for line in (say() if say is not None else [])]
        streams.append(f"  scan: {_scan(table.scan, source)}")
        streams.append(f"  source: {notes}")
        streams.append(f"  intake: {_edge(table.intake)}")
    for name, sink in sink_plugins(config, where).items():
        notes = _check_plugin(sink)
        sinks.append(f"sink {name}: {notes}; {_edge(getattr(sink.config, 'edge', EdgeTable()))}")
    if not config.sinks:
        sinks.append("no sinks: nobody will see a result")
    return [*streams, *sinks, *daemon]


def _check_plugin(plugin: Plugin) -> str:
    """Check what every plug-in's table may hold, then let the plug-in check the rest.

    Strings with a scheme are addresses, keys that end in "folder" or "_dir" are folders to write.
    A plug-in module may have ``check(config, where)``, which raises ConfigError.
    """
    table: dict[str, Any] = msgspec.structs.asdict(plugin.config)
    for key, value in table.items():
        if isinstance(value, str) and "://" in value:
            _check_address(value, f"{plugin.where}.{key}")
        if isinstance(value, str) and value and (key.endswith("folder") or key.endswith("_dir")):
            _check_folder(Path(value), f"{plugin.where}.{key}")
    check = getattr(plugin.module, "check", None)
    if check is not None:
        check(plugin.config, plugin.where)
    plain = [f"{k} = {v}" for k, v in table.items() if isinstance(v, str | int | float) and v != ""]
    return ", ".join(plain)


def _check_address(address: str, where: str) -> None:
    match = _ADDRESS.match(address)
    if match is None:
        raise ConfigError(f"{where}: expected an address such as tcp://HOST:PORT, got {address!r}")
    if match[3] is not None and not 1 <= int(match[3]) <= 65535:
        raise ConfigError(f"{where}: expected a port from 1 to 65535, got {match[3]}")


def _check_folder(folder: Path, where: str) -> None:
    """Check that a folder can be written, or be made where it is to be."""
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir():
        raise ConfigError(f"{where}: {existing} is not a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ConfigError(f"{where}: the folder {existing} cannot be written")


def _scan(table: ScanTable | None, source: Plugin) -> str:
    if table is None:
        # A source module may say in OWN_SCAN that its series bring theirs.
        return str(getattr(source.module, "OWN_SCAN", "none, so no map"))
    shape = " x ".join(str(n) for n in table.shape)
    step = f", step {' x '.join(f'{s:g}' for s in table.step_um)} um" if table.step_um else ""
    return f"{shape} points{step}{', snake' if table.snake else ''}"


def _edge(table: EdgeTable) -> str:
    what = {
        "block": "then wait",
        "drop-oldest": "then drop the oldest",
        "drop-newest": "then drop the newest",
        "decimate": f"1 of {table.keep_every} kept, then wait",
    }[table.policy]
    return f"{table.depth} deep, {table.mib} MiB, {what}"

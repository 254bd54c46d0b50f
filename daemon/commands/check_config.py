"""``grainwatch check-config``: everything that can be known about a configuration without running it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Final

import msgspec
import typer

from daemon.commands.run import enter_folder_of
from daemon.configuration import Configuration
from daemon.flow.plugins import Plugin, pipeline_plugin, sink_plugins, source_plugin
from daemon.folders import try_folder
from daemon.models.at_work import AtWork
from daemon.models.registry import Registry
from daemon.sinks import publisher, results_file
from grainwatch.config import Config, ConfigError, EdgeTable, ScanTable, read_config

_WARNING: Final = "warning:"
_ADDRESS = re.compile(r"^(tcp)://(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9_.-]+|\*):(\d+)$|^(ipc|inproc)://(.+)$")


def check_config(
    config: Annotated[Path, typer.Argument(help="The configuration file.")],
) -> None:
    """Check a configuration file and print what a daemon would do with it."""
    parsed, config_hash = read_config(config)
    file = config.absolute()
    enter_folder_of(config)
    said = describe(parsed, config_hash, str(config), file)
    for line in said:
        print(line)
    warnings = sum(line.strip().startswith(_WARNING) for line in said)
    print(f"{config}: good" + (f", with {warnings} warning{'s' * (warnings > 1)} above" if warnings else ""))


def describe(config: Config, config_hash: str, where: str, file: Path | None = None) -> list[str]:
    """Check every table and return what the daemon would do, a line each.

    The pipelines are built, which reads the calibration and materials that they name; sources and
    sinks are not opened, because a detector gives each frame to one reader only. `file` is the
    configuration, which is no source.

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
        notes = _check_plugin(source, file)
        pipeline = pipeline_plugin(name, table, config_hash, where, at_work.models, config.engines)
        built = pipeline.build()
        streams.append(f"stream {name}: {table.source['type']} -> {table.pipeline['type']}")
        # What decides over the science comes first; a pipeline says it of itself.
        say = getattr(built, "describe", None)
        streams += [f"  {line}" for line in (say() if say is not None else [])]
        streams.append(f"  scan: {_scan(table.scan, source)}")
        streams.append(f"  source: {notes}")
        # A source module may have ``remarks(config)``: what is no fault and may not be meant.
        more = getattr(source.module, "remarks", None)
        streams += [f"  {line}" for line in (more(source.config) if more is not None else [])]
        streams.append(f"  intake: {_edge(table.intake)}")
    plugins = sink_plugins(config, where)
    for name, sink in plugins.items():
        notes = _check_plugin(sink, file)
        sinks.append(f"sink {name}: {notes}; {_edge(getattr(sink.config, 'edge', EdgeTable()))}")
    sinks += _catch_up_finds_nothing(plugins)
    if not config.sinks:
        sinks.append("no sinks: nobody will see a result")
    return [*streams, *sinks, *daemon]


def _catch_up_finds_nothing(sinks: Mapping[str, Plugin]) -> Iterator[str]:
    """Yield a warning for each sink that looks for older results where no other sink puts them."""
    folders = {name: s.config.folder for name, s in sinks.items() if s.module is results_file}
    written = {Path(folder).resolve() for folder in folders.values()}
    for name, sink in sinks.items():
        if not written or sink.module is not publisher or not sink.config.catch_up:
            continue
        if Path(sink.config.results_dir).resolve() not in written:
            others = " and ".join(f"sinks.{other}.folder is {folder}" for other, folder in folders.items())
            yield (
                f"{_WARNING} sinks.{name}.results_dir is {sink.config.results_dir} and {others}: who asks for"
                " older results gets none; make them the same folder"
            )


def _check_plugin(plugin: Plugin, file: Path | None = None) -> str:
    """Check what every plug-in's table may hold, then let the plug-in check the rest.

    Strings with a scheme are addresses, keys that end in "folder" or "_dir" are folders to write, and
    nothing is the configuration file.
    A plug-in module may have ``check(config, where)``, which raises ConfigError.
    """
    table: dict[str, Any] = msgspec.structs.asdict(plugin.config)
    for key, value in table.items():
        _check_other_file(value, file, f"{plugin.where}.{key}")
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
    try:
        try_folder(folder, keep=False)
    except OSError as error:
        raise ConfigError(f"{where}: the folder {existing} cannot be written ({error.strerror})") from error


def _check_other_file(value: Any, file: Path | None, where: str) -> None:
    """Check that a key does not name the configuration itself, where an image or a folder belongs."""
    for name in value if isinstance(value, list | tuple) else (value,):
        if file is not None and isinstance(name, str) and name and os.path.abspath(name) == str(file):
            raise ConfigError(f"{where}: {name} is this configuration file itself")


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

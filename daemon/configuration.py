"""The configuration that a daemon runs by, and what of it may change while it runs."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeAlias

import msgspec

from daemon.flow.plugins import PipelinePlugin, pipeline_plugin, sink_plugins, source_plugin
from grainwatch.config import Config, ConfigError, parse_config

log = logging.getLogger(__name__)

#: Keys of [daemon] that count anew with every executor, or are read when they are needed.
LIVE_OF_DAEMON: Final = frozenset(
    {"workers", "start_timeout_s", "compute_timeout_s", "stop_timeout_s", "quarantine"}
)
#: Tables of a stream that can change between two frames.
LIVE_OF_STREAM: Final = frozenset({"pipeline", "intake", "scan"})

_Path: TypeAlias = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Configuration:
    """A configuration file as it was read: checked, and byte by byte. `where` leads errors."""

    config: Config
    config_hash: str
    raw: bytes
    where: str

    @classmethod
    def read(cls, path: Path, where: str) -> Configuration:
        """Read and check a file.

        Raises
        ------
        ConfigError
            If it cannot be read, or a key is unknown or of the wrong type.
        """
        try:
            raw = path.read_bytes()
        except OSError as error:
            raise ConfigError(f"{where}: cannot be read: {error.strerror}") from error
        return cls(*parse_config(raw, where), raw, where)

    def pipelines(self) -> dict[str, PipelinePlugin]:
        """Return the plug-in of each stream's pipeline.

        Raises
        ------
        ConfigError
            If one is not known, or its table is not what it expects.
        """
        streams = self.config.streams.items()
        return {name: pipeline_plugin(name, table, self.config_hash, self.where) for name, table in streams}


def keep_text(configuration: Configuration, state_dir: Path) -> None:
    """Keep the text of a configuration under its hash, which is all that a result carries of it."""
    path = state_dir / "configurations" / f"{configuration.config_hash}.toml"
    try:
        path.parent.mkdir(exist_ok=True)
        if not path.exists():
            path.write_bytes(configuration.raw)
    except OSError as error:
        log.warning("%s: the configuration cannot be kept: %s", path, error.strerror)


def changed_keys(old: Config, new: Config, where: str) -> list[str]:
    """Return the keys ("streams.laue.pipeline.geometry") in which two configurations differ.

    A table that came or went is named as a whole. A key that is given its default is no change.

    Raises
    ------
    ConfigError
        If one of them cannot change while the daemon runs: names all of these. If a table is not
        what its plug-in expects.
    """
    before, after = dict(_leaves(old, where)), dict(_leaves(new, where))
    changed = sorted(p for p in before.keys() | after.keys() if before.get(p) != after.get(p))
    fixed = _outermost([p for p in changed if not _is_live(p)], before, after)
    if fixed:
        raise ConfigError(
            f"{where}: {', '.join(fixed)}: cannot change while the daemon runs; restart it, or change back"
        )
    return _outermost(changed, before, after)


def _is_live(path: _Path) -> bool:
    match path:
        case ("ring" | "engines" | "models", *_):
            return True
        case ("daemon", key):
            return key in LIVE_OF_DAEMON
        # Another type publishes other messages, and sums them up in another way.
        case ("streams", _, "pipeline", "type"):
            return False
        case ("streams", _, table, _, *_):
            return table in LIVE_OF_STREAM
    return False


def _outermost(paths: list[_Path], before: dict[_Path, Any], after: dict[_Path, Any]) -> list[str]:
    """Return the keys, and a whole table by its name where it came or went."""
    names = []
    for path in paths:
        for depth in range(1, len(path) + 1):
            inside = [any(p[:depth] == path[:depth] for p in which) for which in (before, after)]
            if depth == len(path) or not all(inside):
                names.append(".".join(path[:depth]))
                break
    return list(dict.fromkeys(names))


def _leaves(config: Config, where: str) -> Iterator[tuple[_Path, Any]]:
    """Yield every key with its value, those of the plug-ins with their defaults."""
    whole: dict[str, Any] = msgspec.to_builtins(config)
    for name, table in config.streams.items():
        plugins = {
            "source": source_plugin(name, table, where),
            "pipeline": pipeline_plugin(name, table, "", where).plugin,
        }
        for key, plugin in plugins.items():
            whole["streams"][name][key] = {
                "type": getattr(table, key)["type"],
                **msgspec.to_builtins(plugin.config, enc_hook=repr),
            }
    for name, plugin in sink_plugins(config, where).items():
        whole["sinks"][name] = {
            "type": config.sinks[name].get("type", name),
            **msgspec.to_builtins(plugin.config, enc_hook=repr),
        }
    yield from _walk((), whole)


def _walk(path: _Path, value: Any) -> Iterator[tuple[_Path, Any]]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _walk((*path, str(key)), inner)
    elif value is not None and value != {}:
        yield path, value

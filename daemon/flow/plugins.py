"""From the configuration to plug-ins: which modules serve which tables, with their checked tables."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any, cast

from daemon.flow.shadow import equal
from daemon.sources.base import Source, SourceContext
from grainwatch.config import Config, ConfigError, EnginesTable, ScanTable, StreamTable, plugin_config
from pipelines.frame import Aggregator, Comparer, ModelRef, Pipeline, StreamContext, Watch


@dataclass(frozen=True, slots=True)
class Plugin:
    """A module and its own table of the configuration. `where` ("FILE: sinks.zmq") leads errors."""

    module: ModuleType
    config: Any
    where: str


@dataclass(frozen=True, slots=True)
class PipelinePlugin:
    """The analysis of one stream. `file` leads the errors of its building."""

    plugin: Plugin
    context: StreamContext
    file: str

    def build(self) -> Pipeline:
        """Make an instance.

        Raises
        ------
        grainwatch.config.ConfigError
            If what the table names (a calibration, a material) cannot be used.
        """
        try:
            return cast(Pipeline, self.plugin.module.build(self.plugin.config, self.context))
        except ConfigError as error:
            # A pipeline knows the name of its stream, but not of the file.
            if self.file and not str(error).startswith(self.file):
                raise ConfigError(f"{self.file}: {error}") from error
            raise

    def aggregator(self, series_uid: str, scan: ScanTable | None = None) -> Aggregator | None:
        """Make what sums up a series, where the pipeline has such a thing.

        `scan` is the grid of the series, which the instrument may have brought.
        """
        make = getattr(self.plugin.module, "aggregator", None)
        if make is None:
            return None
        context = replace(self.context, scan=scan or self.context.scan)
        return cast(Aggregator | None, make(self.plugin.config, context, series_uid))

    def watch(self) -> Watch | None:
        """Make what follows the results of the stream, where the pipeline has such a thing."""
        make = getattr(self.plugin.module, "watch", None)
        return None if make is None else cast(Watch | None, make(self.plugin.config, self.context))

    def comparer(self) -> Comparer:
        """Make what compares two results of one frame; pipelines that have none call only equals alike."""
        make = getattr(self.plugin.module, "comparer", None)
        return equal if make is None else cast(Comparer, make(self.plugin.config, self.context))

    @property
    def models(self) -> tuple[str, ...]:
        """The model bundles that it asks for: the table's ``bundle``."""
        return tuple(getattr(self.plugin.config, "bundle", ()))

    @property
    def batch(self) -> int:
        """How many frames it likes at once: the table's ``batch``, 1 without."""
        return max(1, int(getattr(self.plugin.config, "batch", 1)))


def source_plugin(stream: str, table: StreamTable, where: str) -> Plugin:
    """Resolve ``[streams.NAME.source]``."""
    at = f"{where}: streams.{stream}.source"
    return Plugin(*plugin_config("sources", table.source, at), at)


def pipeline_plugin(
    stream: str,
    table: StreamTable,
    config_hash: str,
    where: str,
    models: Mapping[str, ModelRef] | None = None,
    engines: EnginesTable | None = None,
) -> PipelinePlugin:
    """Resolve ``[streams.NAME.pipeline]``; `models` and `engines` as in `StreamContext`."""
    at = f"{where}: streams.{stream}.pipeline"
    plugin = Plugin(*plugin_config("pipelines", table.pipeline, at), at)
    context = StreamContext(stream, config_hash, table.scan, models or {}, engines or EnginesTable())
    return PipelinePlugin(plugin, context, where)


def open_source(plugin: Plugin, stream: str, context: SourceContext) -> Source:
    """Open a source; one whose ``open_source`` has a parameter ``context`` is given it."""
    make = plugin.module.open_source
    if "context" in inspect.signature(make).parameters:
        return cast(Source, make(plugin.config, stream, context))
    return cast(Source, make(plugin.config, stream))


def sink_plugins(config: Config, where: str) -> dict[str, Plugin]:
    """Resolve ``[sinks.NAME]``. NAME is the type, unless the table has a ``type`` key."""
    found: dict[str, Plugin] = {}
    for name, table in config.sinks.items():
        at = f"{where}: sinks.{name}"
        found[name] = Plugin(*plugin_config("sinks", {"type": name, **table}, at), at)
    return found


def build_pipelines(
    config: Config, config_hash: str, where: str, models: Mapping[str, ModelRef] | None = None
) -> dict[str, Pipeline]:
    """Make and warm one pipeline for each stream."""
    built = {
        name: pipeline_plugin(name, table, config_hash, where, models, config.engines).build()
        for name, table in config.streams.items()
    }
    for pipeline in built.values():
        pipeline.warm()
    return built


def engines_of(pipelines: Mapping[str, Pipeline]) -> tuple[str, ...]:
    """Return what runs the networks of pipelines, a line each: those that have such say it."""
    lines = (
        f"{name}: {line}"
        for name, pipeline in pipelines.items()
        for line in getattr(pipeline, "engines", tuple)()
    )
    return tuple(lines)

"""What a daemon computes by: a configuration, and the bundles that the names in it mean."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from daemon.configuration import Configuration
from daemon.models.registry import Model, Registry
from daemon.models.resolve import names_of, resolve
from grainwatch.config import ConfigError
from pipelines.frame import ModelRef


@dataclass(frozen=True, eq=False)
class AtWork:
    """A configuration with the bundle that each name in it means."""

    configuration: Configuration
    models: Mapping[str, ModelRef]

    @classmethod
    def of(cls, configuration: Configuration, registry: Registry | None) -> AtWork:
        """Look up what the names mean now; every bundle is verified.

        Raises
        ------
        ConfigError
            If there is no such bundle, or it was altered.
        """
        found: dict[str, ModelRef] = {}
        for stream, plugin in configuration.pipelines().items():
            try:
                found |= resolve(plugin.models, registry)
            except ValueError as error:
                where = f"{configuration.where}: streams.{stream}.pipeline.bundle"
                raise ConfigError(f"{where}: {error}") from error
        return cls(configuration, found)

    def with_model(self, model: Model) -> AtWork:
        """Return the same with a model of the registry in the place of all names that mean it."""
        return self._with(model.name, ModelRef(str(model.folder), model.sha256))

    def without_registry(self, name: str) -> AtWork:
        """Return the same with what the names of a model mean where none is active."""
        changed = {n: ref for n in names_of(name, self.models) for ref in resolve([n], None).values()}
        return replace(self, models={**self.models, **changed})

    def streams_of(self, name: str) -> list[str]:
        """Return the streams that use a model."""
        pipelines = self.configuration.pipelines().items()
        return [stream for stream, plugin in pipelines if names_of(name, plugin.models)]

    def _with(self, name: str, ref: ModelRef) -> AtWork:
        return replace(self, models={**self.models, **dict.fromkeys(names_of(name, self.models), ref)})

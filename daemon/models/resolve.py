"""Which bundle a name in the configuration means: the registry's active model, else what lies there."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from daemon.models.registry import Model, Registry
from pipelines.engines.bundle import BundleError, load_bundle
from pipelines.engines.shipped import find_bundle, shipped_bundles
from pipelines.frame import ModelRef


def resolve(names: Iterable[str], registry: Registry | None) -> dict[str, ModelRef]:
    """Return the bundle that each name means, verified file by file.

    The active model of `model_name` counts; where there is none, what `find_bundle` finds.

    Raises
    ------
    BundleError
        If a name means nothing, or a bundle is not intact.
    RegistryError
        If the registry cannot be read, or its copy of an active model is not what was added.
    """
    found: dict[str, ModelRef] = {}
    for name in dict.fromkeys(names):
        active = _active(name, registry)
        if registry is not None and active is not None:
            found[name] = ModelRef(str(active.folder), registry.verify(active).sha256)
        else:
            folder = _without_active(name, registry)
            found[name] = ModelRef(str(folder), load_bundle(folder).sha256)
    return found


def model_name(name: str) -> str:
    """Return the name by which the registry knows what the configuration calls `name`.

    A bundle that comes with grainwatch has a short name there (Cu) and a full one in itself
    (laue-Cu-residual). A folder stays what it is: who names one wants that one.

    Raises
    ------
    BundleError
        If the bundle that comes with grainwatch is not intact.
    """
    shipped = shipped_bundles().get(name)
    if shipped is None or find_bundle(name) != shipped:
        return name
    return load_bundle(shipped).description.name


def names_of(model: str, names: Iterable[str]) -> tuple[str, ...]:
    """Return those names of a configuration that mean a model of the registry."""
    return tuple(name for name in dict.fromkeys(names) if model in (name, model_name(name)))


def without_registry(model: str, names: Iterable[str]) -> Path | None:
    """Return the bundle that serves a configuration when no version of a model is active, if there is one."""
    return next((find_bundle(n) for n in names_of(model, names) if n in shipped_bundles()), None)


def _without_active(name: str, registry: Registry | None) -> Path:
    try:
        return find_bundle(name)
    except BundleError as error:
        versions = registry.models(name) if registry is not None else []
        if not versions:
            raise
        states = ", ".join(f"{m.version} is {m.state}" for m in versions)
        raise BundleError(
            f"{name}: no version of this model is active ({states}): `grainwatch models activate`"
        ) from error


def _active(name: str, registry: Registry | None) -> Model | None:
    if registry is None:
        return None
    return registry.active(name) or registry.active(model_name(name))

"""``grainwatch warm``: compile every kernel now, so that no start ever has to."""

from __future__ import annotations

import os
import pkgutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Annotated

import typer

import pipelines
from daemon.commands.run import enter_folder_of
from daemon.configuration import Configuration
from daemon.flow.plugins import build_pipelines
from daemon.models.at_work import AtWork
from daemon.models.registry import Registry
from grainwatch.config import ConfigError
from pipelines.kernels import cache_dir, compilations


def warm(
    config: Annotated[
        Path | None, typer.Argument(help="Also build and warm the pipelines of this configuration.")
    ] = None,
) -> None:
    """Fill the cache of compiled kernels ($GRAINWATCH_CACHE_DIR or ~/.cache/grainwatch)."""
    began = time.perf_counter()
    with announced() as announcement:
        folder = compile_kernels()
        if config is not None:
            enter_folder_of(config)
            configuration = Configuration.read(Path(config.name), str(config))
            registry = Registry(Path(configuration.config.daemon.state_dir))
            models = AtWork.of(configuration, registry).models
            registry.close()
            build_pipelines(configuration.config, configuration.config_hash, configuration.where, models)
    if announcement.made:
        print(f"compiled in {time.perf_counter() - began:.0f} s, into {folder}")
    else:
        print(f"nothing to compile, all kernels are in {folder}")


def compile_kernels() -> Path:
    """Compile what is not compiled yet; return the folder of the cache.

    Raises
    ------
    ConfigError
        If that folder cannot be made or written.
    """
    folder = Path(os.environ["NUMBA_CACHE_DIR"]).absolute()
    _check_writable(folder)
    for module in pkgutil.walk_packages(pipelines.__path__, "pipelines."):
        if not module.name.endswith("__main__"):
            import_module(module.name)
    return folder


@dataclass
class Announcement:
    """Says once, before the first kernel is compiled, that it takes a while."""

    made: bool = False

    def make(self) -> None:
        """Say it on standard error, unless it was said."""
        if not self.made:
            self.made = True
            print("compiling kernels (about a minute the first time) ...", file=sys.stderr, flush=True)


@contextmanager
def announced() -> Iterator[Announcement]:
    """Announce a compilation within, and nothing when all is compiled."""
    announcement = Announcement()
    with compilations(announcement.make):
        yield announcement


def _check_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"GRAINWATCH_CACHE_DIR: {cache_dir()} cannot be made: {error.strerror}") from error
    if not os.access(folder, os.W_OK):
        raise ConfigError(f"GRAINWATCH_CACHE_DIR: the folder {folder} cannot be written")

"""``grainwatch warm``: compile every kernel now, so that no start ever has to."""

from __future__ import annotations

import os
import pkgutil
import time
from importlib import import_module
from pathlib import Path
from typing import Annotated

import typer

import pipelines
from daemon.commands.run import enter_folder_of
from daemon.flow.plugins import build_pipelines
from grainwatch.config import ConfigError, read_config
from pipelines.kernels import cache_dir


def warm(
    config: Annotated[
        Path | None, typer.Argument(help="Also build and warm the pipelines of this configuration.")
    ] = None,
) -> None:
    """Fill the cache of compiled kernels ($GRAINWATCH_CACHE_DIR or ~/.cache/grainwatch)."""
    folder = Path(os.environ["NUMBA_CACHE_DIR"])
    _check_writable(folder)
    begin, before = time.perf_counter(), _kernels(folder)
    modules = 0
    for module in pkgutil.walk_packages(pipelines.__path__, "pipelines."):
        if not module.name.endswith("__main__"):
            import_module(module.name)
            modules += 1
    if config is not None:
        parsed, config_hash = read_config(config)
        enter_folder_of(config)
        build_pipelines(parsed, config_hash, str(config))
    new = len(_kernels(folder) - before)
    print(
        f"{modules} modules, {new} kernels compiled in {time.perf_counter() - begin:.1f} s,"
        f" {len(_kernels(folder))} in {folder}"
    )


def _kernels(folder: Path) -> set[Path]:
    """Return the machine code files of the cache."""
    return set(folder.rglob("*.nbc"))


def _check_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"GRAINWATCH_CACHE_DIR: {cache_dir()} cannot be made: {error.strerror}") from error
    if not os.access(folder, os.W_OK):
        raise ConfigError(f"GRAINWATCH_CACHE_DIR: the folder {folder} cannot be written")

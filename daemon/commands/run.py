"""``grainwatch run``: the daemon in the foreground, for a terminal or a service manager."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer

from grainwatch.config import ConfigError, parse_config


def run(
    config: Annotated[Path, typer.Argument(help="The configuration file (grainwatch init writes one).")],
    exit_when_done: Annotated[
        bool, typer.Option("--exit-when-done", help="Stop when all sources are exhausted (replay).")
    ] = False,
) -> None:
    """Run the daemon until SIGTERM or Ctrl-C; a second one hurries it."""
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    # One reading serves this process and the workers, whatever happens to the file meanwhile.
    raw = read_file(config)
    parsed, config_hash = parse_config(raw, str(config))
    enter_folder_of(config)

    from daemon.daemon import Daemon

    daemon = Daemon(parsed, raw, config_hash, str(config))
    # A start may take as long as kernels compile: a signal breaks it off and undoes it.
    _on_signal(_break_off)
    daemon.start()
    _on_signal(lambda *_: daemon.ask_stop())
    raise SystemExit(daemon.run(exit_when_done))


def _on_signal(handler: Callable[[int, FrameType | None], None]) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, handler)


def _break_off(number: int, frame: FrameType | None) -> None:
    raise SystemExit(0)


def enter_folder_of(config: Path) -> None:
    """Work in the folder of a configuration file, so that the relative paths in it count from there.

    What the environment says in relative paths keeps its meaning, also for the workers.
    """
    for name in ("PYTHONPATH", "GRAINWATCH_CACHE_DIR", "NUMBA_CACHE_DIR"):
        if paths := os.environ.get(name):
            os.environ[name] = os.pathsep.join(map(os.path.abspath, paths.split(os.pathsep)))
    os.chdir(config.absolute().parent)


def read_file(path: Path) -> bytes:
    """Return the bytes of the configuration file.

    Raises
    ------
    ConfigError
        If it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error

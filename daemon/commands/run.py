"""``grainwatch run``: the daemon in the foreground, for a terminal or a service manager."""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Annotated, Final, TypeAlias

import typer

from daemon.configuration import Configuration
from daemon.logs import configure_logging
from daemon.service import EXTENSION_S, Service
from grainwatch.config import ConfigError

Handler: TypeAlias = Callable[[int, FrameType | None], object]

#: How often a worker is started before the daemon gives up its start.
STARTS: Final = 3


def run(
    config: Annotated[Path, typer.Argument(help="The configuration file (grainwatch init writes one).")],
    exit_when_done: Annotated[
        bool, typer.Option("--exit-when-done", help="Stop when all sources are exhausted (replay).")
    ] = False,
) -> None:
    """Run the daemon until SIGTERM or Ctrl-C; a second one hurries it. SIGHUP reloads CONFIG."""
    # What a watchdog ends with SIGABRT says where each of its threads was.
    faulthandler.enable()
    configure_logging()
    service = Service.of_environment()
    try:
        _run(config, exit_when_done, service)
    except ConfigError as error:
        service.failed(str(error))
        raise
    finally:
        service.end()


def _run(path: Path, exit_when_done: bool, service: Service) -> None:
    absolute = path.absolute()
    # One reading serves this process and the workers, whatever happens to the file meanwhile.
    configuration = Configuration.read(absolute, str(path))
    service.begin(STARTS * configuration.config.daemon.start_timeout_s + EXTENSION_S)
    enter_folder_of(path)

    from daemon.daemon import Daemon

    daemon = Daemon(configuration, partial(Configuration.read, absolute, str(path)), service)

    def stop(number: int, frame: FrameType | None) -> None:
        # A start may take as long as kernels compile: a signal breaks it off and undoes it.
        if not daemon.is_up:
            raise SystemExit(0)
        daemon.ask_stop()

    _on_signals(stop, daemon.ask_reload)
    daemon.start()
    raise SystemExit(daemon.run(exit_when_done))


def _on_signals(stop: Handler, reload: Callable[[], object]) -> None:
    in_terminal = os.isatty(sys.stderr.fileno())

    def hang_up(number: int, frame: FrameType | None) -> None:
        # A terminal that was closed sends the same signal as one who wants a reload.
        if in_terminal and not os.isatty(sys.stderr.fileno()):
            stop(number, frame)
        else:
            reload()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    signal.signal(signal.SIGHUP, hang_up)


def enter_folder_of(config: Path) -> None:
    """Work in the folder of a configuration file, so that the relative paths in it count from there.

    What the environment says in relative paths keeps its meaning, also for the workers.
    """
    for name in ("PYTHONPATH", "GRAINWATCH_CACHE_DIR", "NUMBA_CACHE_DIR"):
        if paths := os.environ.get(name):
            os.environ[name] = os.pathsep.join(map(os.path.abspath, paths.split(os.pathsep)))
    os.chdir(config.absolute().parent)

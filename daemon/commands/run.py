"""``grainwatch run``: the daemon in the foreground, for a terminal or a service manager."""

from __future__ import annotations

import logging
import signal
import sys
from pathlib import Path
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

    from daemon.daemon import Daemon

    daemon = Daemon(parsed, raw, config_hash, str(config))
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: daemon.ask_stop())
    daemon.start()
    raise SystemExit(daemon.run(exit_when_done))


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

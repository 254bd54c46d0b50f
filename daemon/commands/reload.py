"""``grainwatch reload``: have a running daemon take over what its configuration file holds now."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from grainwatch.commands.status import ask, socket_of

#: Workers of the new configuration have to get warm first.
TIMEOUT_S = 900.0


def reload(
    config: Annotated[
        Path | None, typer.Argument(help="The daemon's configuration file, which says where it listens.")
    ] = None,
    control: Annotated[
        Path | None, typer.Option("--socket", help="The control socket itself (RUNTIME_DIR/control.sock).")
    ] = None,
) -> None:
    """Have a running daemon take over its configuration file, as SIGHUP does, without losing frames.

    Says what changed, or why the daemon refused and goes on as before.
    """
    answer = ask(control or socket_of(config), {"command": "reload"}, TIMEOUT_S)["reload"]
    changed = ", ".join(answer["changed"]) or "no key changed, the pipelines were built anew"
    print(f"reloaded in {answer['took_s']:.1f} s: {changed}; configuration {answer['config_hash'][:8]}")

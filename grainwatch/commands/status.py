"""``grainwatch status``: what a running daemon says of itself."""

from __future__ import annotations

import json
import socket
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from grainwatch.config import ConfigError, DaemonTable, read_config

TIMEOUT_S = 5.0
#: What the table needs; a narrower terminal wraps its lines.
WIDTH = 120


def status(
    config: Annotated[
        Path | None, typer.Argument(help="The daemon's configuration file, which says where it listens.")
    ] = None,
    control: Annotated[
        Path | None, typer.Option("--socket", help="The control socket itself (RUNTIME_DIR/control.sock).")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the whole answer as one JSON object.")
    ] = False,
) -> None:
    """Show streams, rates, frame accounts and errors of a running daemon.

    Without arguments it looks for run/control.sock below the working directory.
    """
    reply = ask(control or socket_of(config), {"command": "status"})
    if as_json:
        print(json.dumps(reply))
    else:
        _show(reply)


def socket_of(config: Path | None) -> Path:
    """Return the control socket of the daemon with this configuration (None: the defaults)."""
    if config is None:
        return Path(DaemonTable().runtime_dir) / "control.sock"
    # As for the daemon, a relative path counts from the folder of the file.
    return config.parent / read_config(config)[0].daemon.runtime_dir / "control.sock"


def ask(path: Path, request: dict[str, Any], timeout: float = TIMEOUT_S) -> dict[str, Any]:
    """Send one request to a daemon's control socket and return the reply.

    Raises
    ------
    ConfigError
        If no daemon answers there, or it answers with an error.
    """
    if sys.platform == "win32":
        raise ConfigError("status asks a daemon on this machine over a unix socket: not on Windows")
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(timeout)
            connection.connect(str(path))
            connection.sendall(json.dumps(request).encode() + b"\n")
            with connection.makefile("rb") as lines:
                line = lines.readline()
        if not line:
            raise ConnectionError("it broke the connection off before it answered; has it ended?")
        reply = json.loads(line)
    except FileNotFoundError as error:
        raise ConfigError(f"no daemon listens at {path}: is it running? (--socket or CONFIG)") from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"no daemon answers at {path}: {error}") from error
    if not isinstance(reply, dict) or not reply.get("ok"):
        refusal = reply.get("error") if isinstance(reply, dict) else reply
        raise ConfigError(f"the daemon at {path} says: {refusal}")
    return reply


def _show(reply: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(soft_wrap=True)
    if console.width < WIDTH:
        console = Console(soft_wrap=True, width=WIDTH)
    state = reply["status"]
    line = f"{state['name']} {state['version']}: {state['state']}"
    if "streams" not in state:
        console.print(line, highlight=False)
        return
    line += f", up {_duration(state['uptime_s'])}, {state['workers']} workers"
    line += f", {state['worker_restarts']} restarts" if state["worker_restarts"] else ""
    console.print(line, highlight=False)

    table = Table(box=None, pad_edge=False)
    numbers = ("received", "done", "failed", "dropped", "lost", "in flight")
    for column in ("stream", "state"):
        table.add_column(column)
    signs = ("", "= ", "+ ", "+ ", "+ ", "+ ")
    for column in ("frames/s", *map(str.__add__, signs, numbers), "missing", "p50", "p99"):
        table.add_column(column, justify="right", no_wrap=True)
    for stream in state["streams"]:
        table.add_row(
            stream["stream"],
            stream["state"],
            f"{stream['rate_hz']:.1f}",
            *(str(stream[n.replace(" ", "_")]) for n in (*numbers, "missing")),
            f"{stream['latency_p50_s'] * 1e3:.0f} ms",
            f"{stream['latency_p99_s'] * 1e3:.0f} ms",
        )
    console.print(table)
    for stream in state["streams"]:
        if stream.get("watch"):
            console.print(f"{stream['stream']}: {stream['watch']}", highlight=False)
        if stream["last_error"]:
            console.print(f"{stream['stream']}: last error: {stream['last_error']}", highlight=False)
    for line in (*reply.get("engines", ()), *_of_models(reply.get("models", {}))):
        console.print(line, highlight=False)
    for edge in state["edges"]:
        if edge["dropped"] or edge["filled"] >= edge["depth"]:
            full = f"{edge['filled']} of {edge['depth']} filled, {edge['dropped']} dropped"
            console.print(f"{edge['edge']} ({edge['policy']}): {full}", highlight=False)
    for where, error in reply.get("errors", {}).items():
        console.print(f"{where}: {error}", highlight=False)
    for line in reply.get("unbalanced", []):
        console.print(f"accounts do not balance: {line}", highlight=False)


def _of_models(models: dict[str, Any]) -> list[str]:
    lines = []
    if models.get("on_probation"):
        lines.append(
            f"model {models['on_probation']}: on probation, {models['probation_left']} more frames to serve"
        )
    for name, shadow in models.get("in_shadow", {}).items():
        computed = shadow["offered"] - shadow["passed_over"]
        lines.append(
            f"model {name} {shadow['version']}: in the shadow of {100 * shadow['share']:.3g} % of the frames,"
            f" {computed} computed, {shadow['passed_over']} passed over"
        )
    return lines


def _duration(seconds: float) -> str:
    minutes, s = divmod(int(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours} h {m} min" if hours else f"{m} min {s} s" if m else f"{s} s"

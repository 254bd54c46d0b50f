"""The ``grainwatch`` command. Sub-commands come from the entry-point group ``grainwatch.commands``."""

from __future__ import annotations

import sys
from importlib.metadata import entry_points
from typing import Annotated, Any

import typer
from typer.core import TyperGroup
from typer.main import get_command

from grainwatch import __version__
from grainwatch.config import ConfigError

GROUP = "grainwatch.commands"


class LazyCommands(TyperGroup):
    """Imports a sub-command only when it is asked for, so that `--help` and `subscribe` start fast."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the names of all registered sub-commands."""
        return sorted(e.name for e in entry_points(group=GROUP))

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Import one sub-command: a function with typer options, or a typer app of its own."""
        for entry in entry_points(group=GROUP, name=cmd_name):
            loaded = entry.load()
            if not isinstance(loaded, typer.Typer):
                function, loaded = loaded, typer.Typer(add_completion=False, rich_markup_mode=None)
                loaded.command(cmd_name)(function)
            command = get_command(loaded)
            command.name = cmd_name
            return command
        return None


app = typer.Typer(
    cls=LazyCommands,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(value: bool) -> None:
    if value:
        print(f"grainwatch {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_version)
    ] = False,
) -> None:
    """Which grains are in the beam, while the experiment still runs."""


def main() -> None:
    """Run the command; a known error is one line on stderr and exit status 2."""
    try:
        app()
    except ConfigError as error:
        print(f"grainwatch: {error}", file=sys.stderr)
        raise SystemExit(2) from None

"""``grainwatch train``: networks from simulations, ready for the daemon."""

from __future__ import annotations

import typer

from offline_training.commands.laue import laue
from offline_training.commands.laue_compare import laue_compare
from offline_training.commands.laue_curve import laue_curve
from offline_training.commands.laue_search import laue_search

app = typer.Typer(help="Train the models that the daemon runs.", no_args_is_help=True, rich_markup_mode=None)


@app.callback()
def train() -> None:
    """Train the models that the daemon runs."""


for command in (laue, laue_curve, laue_search, laue_compare):
    app.command()(command)

"""``grainwatch train``: networks from simulations, ready for the daemon."""

from __future__ import annotations

import typer

from offline_training.commands.laue import laue
from offline_training.commands.laue_compare import laue_compare
from offline_training.commands.laue_curve import laue_curve
from offline_training.commands.laue_search import laue_search

app = typer.Typer(
    help="Train the models that the daemon runs.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
)


@app.callback()
def train() -> None:
    """Train the models that the daemon runs."""


app.command(short_help="A bundle from a material and a calibration.")(laue)
app.command(short_help="Accuracy against the number of orientations.")(laue_curve)
app.command(short_help="Search for better numbers of a recipe.")(laue_search)
app.command(short_help="Indexing with a network and without.")(laue_compare)

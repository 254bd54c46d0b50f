"""``grainwatch train``: networks from simulations and images, ready for the daemon."""

from __future__ import annotations

import typer

from offline_training.commands.laue import laue
from offline_training.commands.laue_compare import laue_compare
from offline_training.commands.laue_curve import laue_curve
from offline_training.commands.laue_search import laue_search
from offline_training.commands.micrograph_classes import micrograph_classes
from offline_training.commands.micrographs import pixelcnn, vae, vqvae

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
app.command(short_help="Micrographs as maps of codes: a bundle from images.")(vqvae)
app.command(short_help="Micrographs as vectors: a bundle from images.")(vae)
app.command(short_help="Likelihood of codes under a condition, for a VQ-VAE's bundle.")(pixelcnn)
app.command(short_help="Classes of images by fingerprints and by texture.")(micrograph_classes)

"""Images of the same place are found by what they show, and stay on one side of a split."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from offline_training.micrograph.images import load_images
from offline_training.micrograph.overlaps import MOST_IMAGES, joined, overlapping
from pipelines.micrograph.preparation import PreparationParameters
from pipelines.micrograph.synthetic import MicrographSimulator

WIDE = MicrographSimulator(shape=(512, 1200), seed=3).sample(0).image


def test_pairs_that_share_enough_are_found_whatever_their_sizes() -> None:
    crops = [
        WIDE[:400, :512],
        WIDE[:400, 250:762],  # half of the first one
        WIDE[100:420, 700:1050],  # a sixth of it in the second one: too little
        np.clip(WIDE[:300, 40:400].astype(np.int64) // 2 + 90, 0, 255).astype(np.uint8),  # other contrast
        *(sample.image for sample in MicrographSimulator(seed=5).samples(0, 4)),
    ]
    assert overlapping(crops) == [(0, 1), (0, 3), (1, 3)]
    assert overlapping(crops[:1]) == overlapping([]) == []


def test_one_grey_overlaps_with_nothing() -> None:
    flat = np.full((200, 200), 7, np.uint8)
    assert overlapping([flat, flat, WIDE[:200, :200]]) == []


def test_more_than_can_be_compared_are_refused() -> None:
    with pytest.raises(ValueError, match="401 images: expected 400 at most"):
        overlapping([WIDE[:64, :64]] * (MOST_IMAGES + 1))


def test_groups_are_joined_over_several_pairs() -> None:
    assert joined(("d", "c", "b", "a"), [(0, 1), (1, 2)]) == ("b", "b", "b", "a")
    assert joined(("x", "x", "y"), [(0, 1)]) == ("x", "x", "y")
    assert joined(("x", "x", "y"), [(1, 2)]) == ("x", "x", "x")


def test_files_of_one_place_are_one_group(tmp_path: Path) -> None:
    for name, part in (("a", WIDE[:, :512]), ("b", WIDE[:, 200:712]), ("c", WIDE[:, 720:])):
        Image.fromarray(part).save(tmp_path / f"{name}.png")
    found = load_images(str(tmp_path), PreparationParameters())
    assert found.groups == ("a.png", "a.png", "c.png")
    assert found.remarks == ["a.png and b.png show the same place: they are taken as one group"]
    # Those of one group need no word.
    assert load_images(str(tmp_path), PreparationParameters(), group="[a-z]$|png").remarks == []

"""Images of the same place are found by what they show, and stay on one side of a split."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from offline_training.micrograph.images import load_images, part_images
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


def test_what_is_burned_into_all_pictures_makes_no_overlap() -> None:
    pale = [
        (110 + (sample.image.astype(np.float64) - 128) * 0.15).astype(np.uint8)
        for sample in MicrographSimulator(seed=5).samples(0, 4)
    ]
    for image in pale:
        image[-40:-28, 20:150] = 255  # a scale bar, and something like a text
        image[-25:-10, 20:150:6] = 255
    assert overlapping(pale) == []
    assert overlapping([pale[0], pale[1], pale[0]]) == [(0, 2)]


def test_images_of_very_different_sizes_take_no_memory() -> None:
    huge = np.zeros((6000, 8000), np.uint8)
    huge[2800:3312, 3800:4312] = WIDE[:, :512]
    some = [huge, *(WIDE[: 480 + i, : 500 + i] for i in range(6))]
    tracemalloc.start()
    overlapping(some)
    assert tracemalloc.get_traced_memory()[1] < 200e6
    tracemalloc.stop()


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
    told = load_images(str(tmp_path), PreparationParameters(), overlaps=False)
    assert told.groups == ("a.png", "b.png", "c.png")
    assert "not looked for images that show the same place" in told.remarks[0]
    with pytest.raises(ValueError, match=r"b.png: no such group; .*a.png and b.png show the same place"):
        part_images(found, ["b.png"])
    # Those of one group need no word.
    assert load_images(str(tmp_path), PreparationParameters(), group="[a-z]$|png").remarks == []

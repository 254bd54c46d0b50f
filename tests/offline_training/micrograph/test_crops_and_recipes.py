"""Crops are those of their seed and step; recipes say what they can be set to."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from offline_training.micrograph.crops import CropDraw, fold_of, side_by_side
from offline_training.micrograph.recipes import RECIPES, recipe_of
from offline_training.micrograph.splits import GroupedFolds


def _images() -> tuple[np.ndarray, ...]:
    # Each pixel says where it is: image, row and column.
    def image(number: int, rows: int, columns: int) -> np.ndarray:
        y, x = np.mgrid[:rows, :columns]
        return (number * 100 + y * 8 + x).astype(np.uint8)

    return image(0, 8, 8), image(1, 12, 8)


def test_crops_follow_from_seed_and_step() -> None:
    draw = CropDraw(_images(), side_px=4, seed=3)
    crops, numbers = draw.batch(5, 40)
    again, same = draw.batch(5, 40)
    np.testing.assert_array_equal(crops, again)
    np.testing.assert_array_equal(numbers, same)
    assert np.any(draw.batch(6, 40)[0] != crops)
    assert np.any(replace(draw, seed=4).batch(5, 40)[0] != crops)
    assert set(numbers) == {0, 1}


def test_crops_are_parts_of_their_images_from_everywhere_and_all_ways_round() -> None:
    images = _images()
    for turned, ways in ((False, 1), (True, 8)):
        crops, numbers = CropDraw(images, side_px=4, turned=turned).batch(0, 9000)
        seen = set()
        for crop, number in zip(crops, numbers, strict=True):
            right, down = int(crop[0, 1]) - int(crop[0, 0]), int(crop[1, 0]) - int(crop[0, 0])
            assert {abs(right), abs(down)} == {1, 8}
            corner = int(crop.min()) - 100 * int(number)
            seen.add((int(number), corner // 8, corner % 8, right, down))
        assert len(seen) == ways * (5 * 5 + 9 * 5)


def test_the_fingerprint_is_of_images_and_drawing() -> None:
    draw = CropDraw(_images(), 4)
    other = CropDraw((_images()[0], _images()[1] + 1), 4)
    changed = [replace(draw, seed=1), replace(draw, side_px=5), replace(draw, turned=False), other]
    assert len({d.fingerprint for d in [draw, *changed, CropDraw(_images(), 4)]}) == 5


def test_the_variance_is_that_within_images_not_between_them() -> None:
    chequered = np.where(np.indices((8, 8)).sum(axis=0) % 2, 0, 255).astype(np.uint8)
    assert CropDraw((chequered,), 4).variance == pytest.approx(1.0)  # greys of -1 and 1
    flat = np.full((8, 8), 200, np.uint8)
    assert CropDraw((flat, flat - 100), 4).variance == 0.0


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ((), "no images"),
        ((np.zeros((8, 3), np.uint8),), r"image 0: uint8 of shape \(8, 3\)"),
        ((np.zeros((8, 8)),), "image 0: float64"),
    ],
)
def test_what_cannot_be_cropped_is_refused(images: tuple[np.ndarray, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CropDraw(images, side_px=4)


def test_patches_lie_side_by_side() -> None:
    images = _images()
    patches, numbers = side_by_side(images, 4)
    assert numbers.tolist() == [0] * 4 + [1] * 6
    np.testing.assert_array_equal(patches[1], images[0][:4, 4:])
    np.testing.assert_array_equal(patches[8], images[1][8:, :4])
    np.testing.assert_array_equal(side_by_side([images[1]], 5)[0][1], images[1][5:10, :5])
    with pytest.raises(ValueError, match="no images"):
        side_by_side([], 4)


def test_a_fold_holds_whole_sources_out() -> None:
    images = [np.full((8, 8), i, np.uint8) for i in range(9)]
    split = GroupedFolds.draw([f"spot {i // 3}" for i in range(9)], 3, seed=1)
    for number in range(3):
        fold = fold_of(images, split, number, side_px=4)
        trained = {int(i) for i in np.unique(fold.crops.batch(0, 200)[0])}
        held_out = {int(i) for i in np.unique(fold.patches)}
        assert {i // 3 for i in trained} | {i // 3 for i in held_out} == {0, 1, 2}
        assert not {i // 3 for i in trained} & {i // 3 for i in held_out}
        # Numbers lead back to the images, and so to their labels.
        assert set(fold.trained_on) == trained
        np.testing.assert_array_equal(fold.image_of, fold.patches[:, 0, 0])
    with pytest.raises(ValueError, match="images: expected 9, one an item of the split, got 8"):
        fold_of(images[:8], split, 0)


@pytest.mark.parametrize("kind", RECIPES)
def test_every_recipe_can_be_set_within_its_ranges(kind: str) -> None:
    for name, recipe in RECIPES[kind].items():  # type: ignore[index]
        assert (recipe.kind, recipe.name) == (kind, name)
        same = recipe.set([f"{key}={value}" for key, value in recipe.values.items()])
        assert same == recipe
        assert recipe.as_dict()["recipe"] == name


def test_numbers_are_set_by_name() -> None:
    recipe = recipe_of("vqvae", given=["learning_rate=3e-4", "batch=16"])
    assert (recipe.name, recipe["learning_rate"], recipe.whole("batch")) == ("ema", 3e-4, 16)
    assert recipe_of("vqvae", "noguchi-2021").ema is False


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("width", "'width': expected NAME=VALUE with NAME one of learning_rate, batch"),
        ("blocks=3", "'blocks=3': expected NAME=VALUE"),
        ("batch=2.5", "'batch=2.5': expected a whole number"),
        ("beta=much", "'beta=much': expected a number"),
        ("beta=nan", "beta nan: expected 0 to 1000"),
        ("codes=1", "codes 1: expected 2 to 6000"),
    ],
)
def test_what_cannot_be_set_is_named(given: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        recipe_of("vqvae", given=[given])
    with pytest.raises(ValueError, match="recipe 'best' of vae is not known; known: residual"):
        recipe_of("vae", "best")

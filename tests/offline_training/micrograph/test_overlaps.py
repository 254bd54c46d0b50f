"""Images of the same place are found by what they show, and stay on one side of a split."""

from __future__ import annotations

import io
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import fft, ndimage

from offline_training.micrograph.images import load_images, part_images
from offline_training.micrograph.overlaps import MOST_IMAGES, joined, overlapping
from pipelines.micrograph.preparation import PreparationParameters
from pipelines.micrograph.synthetic import MicrographSimulator

WIDE = MicrographSimulator(shape=(512, 1200), seed=3).sample(0).image
SMALL = PreparationParameters(patch_px=32)


def _smooth(seed: int, sigma_px: tuple[float, float], wide: int = 320) -> np.ndarray:
    """Noise (240, wide) without structure below `sigma_px`, of standard deviation 1."""
    noise = np.random.default_rng(seed).normal(size=(512, 2048))
    field = fft.irfft2(ndimage.fourier_gaussian(fft.rfft2(noise), sigma_px, 2048), (512, 2048))[:240, :wide]
    return (field - field.mean()) / field.std()


def _picture(field: np.ndarray, seed: int) -> np.ndarray:
    """Greys of a field, with a little noise of the microscope."""
    noisy = field / field.std() + 0.1 * np.random.default_rng(seed).normal(size=field.shape)
    return np.clip(128 + 45 * noisy, 0, 255).astype(np.uint8)


def _lamellae(period_px: float, wander: float, seed: int, wide: int = 320) -> np.ndarray:
    """Vertical ones, whose place wanders by so many periods."""
    phase = np.arange(wide) / period_px + wander * _smooth(seed, (20.0, 20.0), wide)
    return np.sin(2.0 * np.pi * phase)


def _jpeg(image: np.ndarray) -> np.ndarray:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=75)
    return np.asarray(Image.open(file))


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


@pytest.mark.parametrize("sigma_px", [(3.0, 100.0), (6.0, 200.0)])
def test_rolled_sheet_is_found_again_and_other_places_of_it_are_not(sigma_px: tuple[float, float]) -> None:
    # Few and long streaks: chance alone was said to reach 1.3, and no copy was found.
    places = [_picture(_smooth(seed, sigma_px), seed) for seed in range(8)]
    assert overlapping(places) == []
    for image in places[:4]:
        assert overlapping([image, _jpeg(image)]) == [(0, 1)]


@pytest.mark.parametrize("period_px", [6.0, 10.0, 20.0])
@pytest.mark.parametrize("wander", [0.05, 0.2])
def test_lamellae_are_found_again_and_other_places_of_them_are_not(period_px: float, wander: float) -> None:
    # Other places correlate by up to 0.98, shifted by whole periods: 0.9 would not do as a limit.
    places = [_picture(_lamellae(period_px, wander, seed), seed) for seed in range(5)]
    assert overlapping(places) == []
    for image in places[:3]:
        assert overlapping([image, _jpeg(image)]) == [(0, 1)]
    if wander > 0.1:
        wide = _lamellae(period_px, wander, 9, 480)
        assert overlapping([_picture(wide[:, :320], 1), _picture(wide[:, 160:], 2)]) == [(0, 1)]


def test_an_edge_in_all_images_makes_no_overlap() -> None:
    # Shared parts with the edge have more contrast than the images as a whole.
    edges = []
    for seed in range(6):
        below = np.arange(240) > 120 + np.random.default_rng(seed).integers(-40, 40)
        edges.append(_picture(below[:, None] + np.zeros((240, 320)), seed))
    assert overlapping(edges) == []


def test_one_grey_overlaps_with_nothing() -> None:
    flat = np.full((200, 200), 7, np.uint8)
    assert overlapping([flat, flat, WIDE[:200, :200]]) == []


@pytest.mark.truth
def test_of_real_micrographs_five_pairs_show_the_same_place(truth_dir: Path) -> None:
    folder = truth_dir.parent / "micrographs" / "uhc_steel" / "images"
    if not folder.is_dir():
        pytest.skip("third-party micrographs are absent")
    found = load_images(str(folder), PreparationParameters())
    pairs = {tuple(int("".join(filter(str.isdigit, name))) for name in p) for p in found.about["same_place"]}
    assert pairs == {(16, 48), (28, 156), (56, 136), (76, 92), (172, 196)}
    assert (len(found), len(set(found.groups))) == (150, 145)
    assert found.about["equal"] == []


def test_equal_files_of_stripes_are_one_group(tmp_path: Path) -> None:
    for period_px in (12, 20, 40):
        stripes = np.tile(128 + 60 * np.sin(2.0 * np.pi * np.arange(480) / period_px), (360, 1))
        for copy in "abc":
            Image.fromarray(stripes.astype(np.uint8)).save(tmp_path / f"{period_px}{copy}.png")
    for overlaps in (True, False):
        found = load_images(str(tmp_path), SMALL, overlaps=overlaps)
        assert found.groups == ("12a.png",) * 3 + ("20a.png",) * 3 + ("40a.png",) * 3
        assert found.about["same_place"] == []
        said = "12a.png, 12b.png and 12c.png are equal: they are one group, whatever is said of them"
        assert found.remarks[0] == said
    # Those that are told to be of one group need no word.
    assert load_images(str(tmp_path), SMALL, group=r"\d+").remarks == []


def test_equal_files_are_one_group_among_more_than_are_compared(tmp_path: Path) -> None:
    for number in range(MOST_IMAGES + 2):
        row, column = divmod(number % (MOST_IMAGES + 1), 32)
        Image.fromarray(WIDE[row * 32 :, column * 36 :][:32, :36]).save(tmp_path / f"{number}.png")
    found = load_images(str(tmp_path), SMALL)
    assert found.about["compared_for_overlaps"] is False
    assert len(set(found.groups)) == MOST_IMAGES + 1
    assert found.groups[0] == found.groups[-1] == "0.png"
    assert [remark.split(":")[0] for remark in found.remarks] == [
        f"0.png and {MOST_IMAGES + 1}.png are equal",
        "not looked for images that show the same place",
    ]


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

"""Images and labels for training: what is read, what is refused by name, what is held out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from offline_training.micrograph.images import ImageSet, load_images, part_images, synthetic_images
from offline_training.micrograph.labels import read_labels
from pipelines.micrograph.matching import ReferenceHistogram
from pipelines.micrograph.preparation import PreparationParameters, prepare
from pipelines.micrograph.synthetic import MicrographSimulator

SMALL = PreparationParameters(patch_px=32)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six grey PNG, JPEG and TIFF files of three spots, two each, and a file that is no image."""
    place = tmp_path / "images"
    place.mkdir()
    for sample, suffix in zip(
        MicrographSimulator(shape=(48, 64)).samples(0, 6), ["png", "jpg", "tif"] * 2, strict=True
    ):
        number = int(sample.source.rsplit("-", 1)[1])
        Image.fromarray(sample.image).save(place / f"spot{number // 2}_{number}.{suffix}")
    (place / "notes.txt").write_text("nothing")
    return place


def _labels(folder: Path, text: str) -> Path:
    path = folder.parent / "labels.csv"
    path.write_text(text)
    return path


def test_a_folder_is_read_and_each_file_is_its_own_group(folder: Path) -> None:
    images = load_images(str(folder), SMALL)
    assert len(images) == 6
    assert images.groups == images.names
    assert all(image.shape == (48, 64) and image.dtype == np.uint8 for image in images.images)
    assert images.conditions is None
    assert images.statistics.shape == (6, 6)
    assert images.pixel_sizes_um == (None,) * 6
    assert load_images(str(folder), SMALL, pixel_size_um=0.1).pixel_sizes_um == (0.1,) * 6


def test_colour_is_made_grey_as_in_a_stream(folder: Path) -> None:
    plain = load_images(str(folder), SMALL).images[0]
    path = folder / "spot0_0.png"
    with Image.open(path) as image:
        grey = np.asarray(image)
    Image.fromarray(np.stack([grey] * 3, axis=2)).save(path)
    np.testing.assert_array_equal(load_images(str(folder), SMALL).images[0], plain)


def test_labels_choose_images_and_bring_groups_and_numbers(folder: Path) -> None:
    text = "file, spot_name ,group,rate,carbon\nspot1_2.tif,a,g1,1.5,0.1\nspot0_0.png,b,g0,-2,0.2\n"
    labels = _labels(folder, text)
    images = load_images(str(folder), SMALL, labels=labels, wanted=["rate", "carbon"])
    assert images.names == ("spot1_2.tif", "spot0_0.png")
    assert images.groups == ("g1", "g0")
    assert images.conditions is not None
    assert images.conditions.names == ("rate", "carbon")
    np.testing.assert_allclose(images.conditions.values, [[1.5, 0.1], [-2.0, 0.2]])
    assert images.conditions.text(images.conditions.values[0]) == "rate 1.5, carbon 0.1"
    assert images.about["not_labelled"] == 4
    other = load_images(str(folder), SMALL, labels=labels, wanted=["rate"])
    assert other.fingerprint != images.fingerprint


def test_classes_keep_their_names_in_order(folder: Path) -> None:
    numbered = read_labels(_labels(folder, "file,class_id\na,10\nb,2\nc,2\n")).conditions
    assert numbered is not None
    assert numbered.classes == ("2", "10")
    assert numbered.values.tolist() == [1, 0, 0]
    worded = read_labels(_labels(folder, "file,phase\na,pearlite\nb,ferrite\n")).conditions
    assert worded is not None
    assert worded.text(worded.values[0]) == "pearlite"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "expected a head line with a column 'file'"),
        ("name,rate\na,1\n", "no column 'file'; columns are name, rate"),
        ("file,rate\nspot0_0.png,\n", "line 2: rate is empty"),
        ("file,rate\nspot0_0.png,nan\n", "line 2: rate is 'nan', expected a number"),
        ("file,rate\nspot0_0.png,1\n\nspot0_1.jpg,x\n", "line 4: rate is 'x', expected a number"),
        ("file,rate\nspot0_0.png,1,2\n", "line 2: 3 columns, the head line has 2"),
        ("file,rate\nspot0_0.png,1\nspot0_0.png,2\n", "line 3: 'spot0_0.png' for the second time"),
        ("file,rate\nnowhere.png,1\n", r"nowhere\.png is not in .*\(1 of 1\)"),
        ("file,class\nspot0_0.png,a\nspot0_1.jpg,a\n", "all images are of class 'a'"),
        ("file,class,rate\nspot0_0.png,a,1\nspot0_1.jpg,b,2\n", "class is a class, and rate .*--label"),
        ("file,group,rate\nspot0_0.png,,1\n", "line 2: group is empty"),
        ("file,rate,rate\nspot0_0.png,1,1\n", "two columns have the same name"),
    ],
)
def test_labels_that_cannot_be_used_are_told_with_their_line(folder: Path, text: str, said: str) -> None:
    path = _labels(folder, text)
    with pytest.raises(ValueError, match=said) as error:
        load_images(str(folder), SMALL, labels=path)
    assert str(path) in str(error.value)
    with pytest.raises(ValueError, match=r"absent\.csv: labels cannot be read"):
        read_labels(path.with_name("absent.csv"))


def test_images_that_cannot_be_used_are_named(folder: Path) -> None:
    with pytest.raises(ValueError, match="no such folder"):
        load_images(str(folder / "absent"), SMALL)
    with pytest.raises(ValueError, match=r"synthetic:x.*expected synthetic:N"):
        load_images("synthetic:x", SMALL)
    with pytest.raises(ValueError, match=r"spot0_0\.png: 64 x 48 px without data bar; expected 128 px"):
        load_images(str(folder), PreparationParameters())
    (folder / "a_truncated.tif").write_bytes((folder / "spot1_2.tif").read_bytes()[:300])
    with pytest.raises(ValueError, match=r"a_truncated\.tif"):
        load_images(str(folder), SMALL)
    (folder / "a_truncated.tif").unlink()
    Image.fromarray(np.full((64, 64), 7, np.uint8)).save(folder / "a_grey.png")
    with pytest.raises(ValueError, match=r"a_grey\.png: shows nothing"):
        load_images(str(folder), SMALL)
    empty = folder.parent / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match="holds no image"):
        load_images(str(empty), SMALL)


def test_groups_can_be_found_in_names(folder: Path) -> None:
    assert set(load_images(str(folder), SMALL, group=r"spot\d").groups) == {"spot0", "spot1", "spot2"}
    assert set(load_images(str(folder), SMALL, group=r"spot(\d)").groups) == {"0", "1", "2"}
    with pytest.raises(ValueError, match="does not occur in the name spot0_0"):
        load_images(str(folder), SMALL, group="specimen")
    with pytest.raises(ValueError, match="is no regular expression"):
        load_images(str(folder), SMALL, group="(")


@pytest.mark.parametrize("colour", [False, True])
def test_all_pages_of_a_tiff_file_are_images_of_its_group(folder: Path, colour: bool) -> None:
    pages = [sample.image for sample in MicrographSimulator(shape=(48, 64), seed=8).samples(0, 4)]
    shown = [Image.fromarray(page).convert("RGB" if colour else "L") for page in pages]
    shown[0].save(folder / "stack.tif", save_all=True, append_images=shown[1:])
    labels = _labels(folder, "file,rate\nspot0_0.png,-2\nstack.tif,1.5\nspot0_1.jpg,3\n")
    images = load_images(str(folder), SMALL, labels=labels)
    assert images.names == (
        "spot0_0.png",
        *(f"stack.tif#{number}" for number in range(4)),
        "spot0_1.jpg",
    )
    assert images.groups == ("spot0_0.png", *["stack.tif"] * 4, "spot0_1.jpg")
    assert images.conditions is not None
    assert images.conditions.values.tolist() == [[-2.0], *[[1.5]] * 4, [3.0]]
    assert images.statistics.shape == (6, 6)
    assert len(images.acquisitions) == images.about["images"] == 6
    for page, image in zip(pages, images.images[1:5], strict=True):
        np.testing.assert_array_equal(image, prepare(page, SMALL).filtered)
    assert images.remarks == [
        "several pages: stack.tif has 4; each is an image with the labels of its file, and those of a file"
        " are one group"
    ]
    assert part_images(images, ["stack.tif"]).judged.tolist() == [1, 2, 3, 4]


def test_a_small_copy_in_a_tiff_file_is_no_image(folder: Path) -> None:
    whole = Image.fromarray(MicrographSimulator(shape=(96, 128), seed=8).sample(0).image)
    whole.save(folder / "previewed.tif", save_all=True, append_images=[whole.resize((64, 48))])
    images = load_images(str(folder), SMALL)
    assert images.images[images.names.index("previewed.tif")].shape == (96, 128)
    assert images.remarks == ["left out, of another size than the first page of the file: previewed.tif#1"]


def _synthetic(count: int) -> ImageSet:
    return synthetic_images(MicrographSimulator(shape=(48, 48)), count, SMALL)


def test_parts_hold_whole_groups_out(folder: Path) -> None:
    images = load_images(str(folder), SMALL, group=r"spot\d")
    parts = part_images(images, ["spot1"])
    assert [images.names[i] for i in parts.judged] == ["spot1_2.tif", "spot1_3.png"]
    assert not parts.calibrated_elsewhere
    assert "flatters" in parts.text()
    drawn = part_images(images, seed=3)
    assert len(drawn.held_out) == 2
    assert drawn.calibrated_elsewhere
    sides = [{images.groups[i] for i in part} for part in (drawn.trained_on, drawn.calibration, drawn.judged)]
    assert sum(map(len, sides)) == len(set.union(*sides)) == 3
    with pytest.raises(ValueError, match="--held-out spot9: no such group"):
        part_images(images, ["spot9"])
    with pytest.raises(ValueError, match="names all groups"):
        part_images(images, ["spot0", "spot1", "spot2"])
    with pytest.raises(ValueError, match="all images are of one group"):
        part_images(load_images(str(folder), SMALL, group="spot"))


def test_synthetic_images_come_with_their_law_and_are_the_same_again() -> None:
    images = _synthetic(20)
    assert images.conditions is not None
    assert images.conditions.names == ("ln_cooling_rate",)
    assert images.fingerprint == _synthetic(20).fingerprint
    assert images.about["synthetic"] is True
    assert images.pixel_sizes_um == (0.25,) * 20
    parts = part_images(images)
    assert (len(parts.trained_on), len(parts.calibration), len(parts.judged)) == (16, 2, 2)


def test_matching_gives_networks_another_image_than_morphology() -> None:
    images = _synthetic(3)
    assert images.matched(None) is images.images
    reference = ReferenceHistogram.of(images.images[:1])
    matched = images.matched(reference)
    np.testing.assert_array_equal(matched[0], images.images[0])
    assert abs(matched[1].mean() - images.images[0].mean()) < abs(
        images.images[1].mean() - images.images[0].mean()
    )

"""Images to train on: those of a folder, prepared as a stream of them is, or synthetic ones."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from grainwatch.push_files import natural_key
from offline_training.micrograph.labels import Conditions, Labels, read_labels
from offline_training.micrograph.overlaps import MOST_IMAGES, joined, overlapping
from offline_training.micrograph.splits import GroupedFolds
from pipelines.files import open_images
from pipelines.frame import BadFrame
from pipelines.micrograph.acquisition import Acquisition, read_acquisition
from pipelines.micrograph.grey import ONE_GREY
from pipelines.micrograph.matching import ReferenceHistogram
from pipelines.micrograph.preparation import PreparationParameters, prepare
from pipelines.micrograph.synthetic import MicrographSimulator

ByteImage = npt.NDArray[np.uint8]
IntArray = npt.NDArray[np.int64]

SUFFIXES: Final = frozenset({".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp"})
SYNTHETIC: Final = "synthetic"
SYNTHETIC_IMAGES: Final = 300


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images and what is known of them.

    Attributes
    ----------
    names : tuple of str
        Of the files; of a page of one that has several, "name.tif#2", counted from 0.
    images : tuple of (rows, columns) uint8 arrays
        Without data bar, filtered, not matched.
    groups : tuple of str
        One an image: what a split must not part.
    acquisitions : tuple of Acquisition
    statistics : (n, 6) float64
        See `pipelines.micrograph.image_statistics.STATISTICS`.
    conditions : Conditions or None
    about : dict
        Where they come from, in plain values.
    """

    names: tuple[str, ...]
    images: tuple[ByteImage, ...]
    groups: tuple[str, ...]
    acquisitions: tuple[Acquisition, ...]
    statistics: npt.NDArray[np.float64]
    conditions: Conditions | None
    about: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.images)

    @property
    def pixel_sizes_um(self) -> tuple[float | None, ...]:
        """Of each image; None where it is unknown."""
        return tuple(a.pixel_size_um for a in self.acquisitions)

    @property
    def fingerprint(self) -> str:
        """Sha256 of images, groups and conditions."""
        digest = hashlib.sha256(repr((self.groups, self.conditions and self.conditions.names)).encode())
        for image in self.images:
            digest.update(repr(image.shape).encode())
            digest.update(np.ascontiguousarray(image).tobytes())
        if self.conditions is not None:
            digest.update(self.conditions.values.tobytes())
        return digest.hexdigest()

    @property
    def remarks(self) -> list[str]:
        """What whoever trains on them should know."""
        remarks = [
            f"{one} and {other} show the same place: they are taken as one group"
            for one, other in self.about.get("same_place", ())
        ]
        remarks += [
            f"{_listed(names)} are equal: they are one group, whatever is said of them"
            for names in self.about.get("equal", ())
        ]
        if not self.about.get("compared_for_overlaps", True):
            remarks.append("not looked for images that show the same place: groups have to tell them apart")
        if pages := self.about.get("pages", ()):
            told = _listed([f"{name} has {count}" for name, count in pages])
            remarks.append(
                f"several pages: {told}; each is an image with the labels of its file, and those of a file"
                " are one group"
            )
        if other := self.about.get("pages_left_out", ()):
            remarks.append(f"left out, of another size than the first page of the file: {_listed(other)}")
        return remarks

    def digests(self, images: IntArray) -> list[str]:
        """Return short hashes of some images: the same image under another name is known by it."""
        return [_digest(self.images[i]) for i in images]

    def matched(self, reference: ReferenceHistogram | None) -> tuple[ByteImage, ...]:
        """Return the images as networks see them."""
        return self.images if reference is None else tuple(reference.match(i) for i in self.images)


def load_images(
    given: str,
    preparation: PreparationParameters,
    *,
    labels: Path | None = None,
    wanted: Sequence[str] = (),
    group: str = "",
    pixel_size_um: float | None = None,
    overlaps: bool = True,
    seed: int = 0,
) -> ImageSet:
    """Read what ``--images`` names.

    Parameters
    ----------
    given : str
        A folder; "synthetic" or "synthetic:N".
    preparation : PreparationParameters
        Without a reference histogram, which is chosen among the images that are trained on.
    labels : Path, optional
    wanted : sequence of str
        See `read_labels`.
    group : str
        Regular expression: what it finds in a file's name is its group.
    pixel_size_um : float, optional
        Of images that do not say it.
    overlaps : bool
        Whether images that show the same place become one group; of more than `MOST_IMAGES` none do. Equal
        images always do.
    seed : int
        Of synthetic images.

    Raises
    ------
    ValueError
        Naming the file or the option that is wrong.
    """
    word, colon, number = given.partition(":")
    if word == SYNTHETIC and not Path(given).is_dir():
        if labels is not None or group:
            raise ValueError("--images synthetic: brings labels and groups of its own")
        if colon and not (number.isdecimal() and int(number) > 0):
            raise ValueError(f"--images {given!r}: expected synthetic:N with N images")
        simulator = MicrographSimulator(seed=seed)
        return synthetic_images(simulator, int(number) if colon else SYNTHETIC_IMAGES, preparation)
    folder = Path(given)
    if not folder.is_dir():
        raise ValueError(f"--images {given}: no such folder; expected one with images, or synthetic:N")
    files = sorted(
        (p.name for p in folder.iterdir() if p.suffix.lower() in SUFFIXES and not p.name.startswith(".")),
        key=natural_key,
    )
    if not files:
        raise ValueError(f"{folder}: holds no image ({', '.join(sorted(SUFFIXES))})")
    told = Labels(tuple(files), tuple(files), None) if labels is None else read_labels(labels, wanted)
    if wanted and labels is None:
        raise ValueError("--label names columns of --labels, which is not given")
    absent = [name for name in told.files if not (folder / name).is_file()]
    if absent:
        raise ValueError(f"{labels}: {absent[0]} is not in {folder} ({len(absent)} of {len(told.files)})")
    if group:
        told = replace(told, groups=tuple(_group(name, group) for name in told.files))
    read = [_read(folder / name, preparation, pixel_size_um) for name in told.files]
    # One row an image from here on: a file may have given several.
    of_file = np.repeat(np.arange(len(read)), [len(pages) for pages, _ in read])
    names = [page.name for pages, _ in read for page in pages]
    images = [page.image for pages, _ in read for page in pages]
    groups = tuple(told.groups[i] for i in of_file)
    equal = _equal(images)
    different = [numbers[0] for numbers in equal]
    compared = overlaps and len(different) <= MOST_IMAGES
    pairs = overlapping([images[i] for i in different]) if compared else []
    places = [(different[i], different[j]) for i, j in pairs]
    copies = [(numbers[0], copy) for numbers in equal for copy in numbers[1:]]
    about = {
        "synthetic": False,
        "folder": _called(folder.resolve()),
        "images": len(images),
        "not_labelled": len(files) - len(set(files) & set(told.files)),
        "compared_for_overlaps": compared,
        "same_place": [[names[i], names[j]] for i, j in places if groups[i] != groups[j]],
        "equal": [[names[i] for i in numbers] for numbers in equal if len({groups[i] for i in numbers}) > 1],
        "pages": [[name, len(p)] for name, (p, _) in zip(told.files, read, strict=True) if len(p) > 1],
        "pages_left_out": [name for _, left_out in read for name in left_out],
    }
    conditions = told.conditions
    return ImageSet(
        tuple(names),
        tuple(images),
        joined(groups, copies + places),
        tuple(page.acquisition for pages, _ in read for page in pages),
        np.array([page.statistics for pages, _ in read for page in pages]),
        None if conditions is None else replace(conditions, values=conditions.of(of_file)),
        about,
    )


def synthetic_images(
    simulator: MicrographSimulator, count: int, preparation: PreparationParameters, first: int = 0
) -> ImageSet:
    """Return synthetic micrographs `first` ... `first + count − 1`, prepared as others are."""
    names, images, rates, statistics = [], [], [], []
    acquisition = Acquisition(pixel_size_um=simulator.pixel_size_um, data_bar_px=0, source=SYNTHETIC)
    for sample in simulator.samples(first, count):
        prepared = prepare(sample.image, preparation, acquisition)
        assert prepared.statistics is not None
        names.append(sample.source)
        images.append(prepared.filtered)
        statistics.append(prepared.statistics.vector())
        rates.append([sample.condition.ln_cooling_rate])
    conditions = Conditions(("ln_cooling_rate",), np.array(rates, dtype=np.float32))
    about = {"synthetic": True, "images": count, "simulator": simulator.as_dict()}
    return ImageSet(
        tuple(names),
        tuple(images),
        tuple(names),
        (acquisition,) * count,
        np.array(statistics),
        conditions,
        about,
    )


@dataclass(frozen=True, eq=False)
class _Page:
    name: str
    image: ByteImage
    acquisition: Acquisition
    statistics: npt.NDArray[np.float64]


def _read(
    path: Path, preparation: PreparationParameters, pixel_size_um: float | None
) -> tuple[list[_Page], list[str]]:
    """Return the images of a file, and the names of pages that are left out.

    Pages of another size than the first are pictures of it for a quick view, or something else: what the file
    says of the pixel size does not hold for them.
    """
    pages: list[_Page] = []
    left_out: list[str] = []
    first: tuple[int, int] | None = None
    try:
        for found in open_images(path, colour=True):
            name = path.name if not found.of_stack else f"{path.name}#{found.index}"
            shape = (found.pixels.shape[0], found.pixels.shape[1])
            if first is None:
                first, acquisition = shape, read_acquisition(path, shape)
            if shape != first:
                left_out.append(name)
            else:
                pages.append(
                    _prepared(path.with_name(name), found.pixels, preparation, acquisition, pixel_size_um)
                )
    except BadFrame as error:
        said = str(error)
        raise ValueError(said if str(path) in said else f"{path}: {said}") from error
    return pages if len(pages) > 1 else [replace(pages[0], name=path.name)], left_out


def _prepared(
    path: Path,
    pixels: npt.NDArray[Any],
    preparation: PreparationParameters,
    acquisition: Acquisition,
    pixel_size_um: float | None,
) -> _Page:
    prepared = prepare(pixels, preparation, acquisition)
    if prepared.statistics is None or ONE_GREY in prepared.flags:
        raise ValueError(f"{path}: shows nothing ({', '.join(prepared.flags)}); take it out")
    if min(prepared.filtered.shape) < preparation.patch_px:
        rows, columns = prepared.filtered.shape
        raise ValueError(
            f"{path}: {columns} x {rows} px without data bar; expected {preparation.patch_px} px or more:"
            " take it out, or ask for smaller --patch-px"
        )
    if acquisition.pixel_size_um is None and pixel_size_um is not None:
        acquisition = replace(acquisition, pixel_size_um=pixel_size_um, source="--pixel-size-um")
    return _Page(path.name, prepared.filtered, acquisition, prepared.statistics.vector())


def _digest(image: ByteImage) -> str:
    return hashlib.sha256(repr(image.shape).encode() + image.tobytes()).hexdigest()[:16]


def _equal(images: Sequence[ByteImage]) -> list[list[int]]:
    """Return the numbers of the images in order, those that are equal together."""
    found: dict[str, list[int]] = {}
    for number, image in enumerate(images):
        found.setdefault(_digest(image), []).append(number)
    return list(found.values())


def _listed(names: Sequence[str]) -> str:
    """Return names as one says them, of many the first ones.

    >>> _listed(["a"]), _listed(["a", "b", "c"]), _listed(list("abcdefgh"))
    ('a', 'a, b and c', 'a, b, c, d and 4 others')
    """
    shown = [*names[:4], f"{len(names) - 4} others"] if len(names) > 5 else list(names)
    return " and ".join([", ".join(shown[:-1]), shown[-1]] if len(shown) > 1 else shown)


def _called(folder: Path) -> str:
    # "images" says nothing; a home folder says too much.
    above = folder.parent
    return above.name if folder.name == "images" and above.name and above != Path.home() else folder.name


def _group(name: str, pattern: str) -> str:
    try:
        found = re.search(pattern, name)
    except re.error as error:
        raise ValueError(f"--group {pattern!r}: is no regular expression ({error})") from None
    if found is None:
        raise ValueError(f"--group {pattern!r}: does not occur in the name {name}")
    return found.group(1) if found.re.groups else found.group()


@dataclass(frozen=True, eq=False)
class Parts:
    """Images to train on, to calibrate with and to judge by; numbers of images, no group in two.

    Attributes
    ----------
    trained_on, calibration, judged : (m,) int64
        With one held-out group alone the last two are the same.
    held_out : tuple of str
        Groups that were not trained on.
    """

    trained_on: IntArray
    calibration: IntArray
    judged: IntArray
    held_out: tuple[str, ...]

    @property
    def calibrated_elsewhere(self) -> bool:
        """Whether what is calibrated is judged on other groups."""
        return not np.array_equal(self.calibration, self.judged)

    def text(self) -> str:
        """Return who was held out, in words."""
        shown = ", ".join(self.held_out[:6]) + (", ..." if len(self.held_out) > 6 else "")
        how = "half of them to calibrate, half to judge"
        if not self.calibrated_elsewhere:
            how = "to calibrate and to judge: there is one group only, so calibration flatters itself"
        trained, out = len(self.trained_on), len(self.held_out)
        return f"{trained} images to train on; held out: {out} groups ({shown}), {how}"


def part_images(images: ImageSet, held_out: Sequence[str] = (), seed: int = 0) -> Parts:
    """Hold whole groups out: those named, or a fifth of them drawn at random (classes in like shares).

    Raises
    ------
    ValueError
        If a group is not there, none is left to train on, or there are fewer than two.
    """
    groups = images.groups
    known = sorted(set(groups))
    why = f" ({'; '.join(images.remarks[:3])}; --no-overlaps joins equal ones only)" if images.remarks else ""
    if len(known) < 2:
        raise ValueError(
            f"all images are of one group ({known[0]}): nothing could be held out; give images of another"
            f" source, or a group column that tells them apart{why}"
        )
    classes = None
    if images.conditions is not None and images.conditions.classes:
        classes = [images.conditions.classes[int(v)] for v in images.conditions.values]
    if held_out:
        absent = sorted(set(held_out) - set(known))
        if absent:
            raise ValueError(
                f"--held-out {absent[0]}: no such group; groups are {', '.join(known[:12])}{why}"
            )
        outside = set(held_out)
        if outside == set(known):
            raise ValueError("--held-out names all groups: none is left to train on")
    else:
        # Two groups at least, so that what calibrates does not judge.
        folds = 5 if len(known) >= 10 else max(2, len(known) // 2)
        split = GroupedFolds.draw(groups, min(folds, len(known)), seed, classes)
        outside = {groups[i] for i in split.held_out(0)}
    items = np.array([i for i, group in enumerate(groups) if group in outside])
    inside = np.array([i for i, group in enumerate(groups) if group not in outside])
    if len(outside) == 1:
        return Parts(inside, items, items, tuple(sorted(outside)))
    halves = GroupedFolds.draw(
        [groups[i] for i in items], 2, seed, None if classes is None else [classes[i] for i in items]
    )
    fold = np.zeros(len(groups), dtype=np.int64)
    fold[items] = 1 + halves.fold
    whole = GroupedFolds(groups, fold)  # refuses a group in two parts
    return Parts(whole.held_out(0), whole.held_out(1), whole.held_out(2), tuple(sorted(outside)))

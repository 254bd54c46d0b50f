"""Files of documents: where they lie here, which may be read, and files that are still written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fabio.tifimage
import h5py
import hdf5plugin
import numpy as np
import pytest

from daemon.sources.bluesky.assets import asset, datum_number, stream_asset
from daemon.sources.bluesky.hdf5 import NotYet
from daemon.sources.bluesky.paths import Places
from pipelines.frame import BadFrame
from pipelines.images import EncodedImage

STACK = np.arange(4 * 3 * 5, dtype=np.uint16).reshape(4, 3, 5)


def hdf5(path: Path, **more: Any) -> Path:
    with h5py.File(path, "w", **more) as file:
        file.create_dataset("/entry/data/data", data=STACK, chunks=(1, 3, 5), maxshape=(None, 3, 5))
    return path


def streamed(file: Path | str, places: Places | None = None, **more: Any) -> Any:
    uri = file if isinstance(file, str) else f"file://localhost{file}"
    document = {
        "mimetype": "application/x-hdf5",
        "uri": uri,
        "parameters": {"dataset": "/entry/data/data"},
        **more,
    }
    return stream_asset(places or Places(), document)


# Paths.


@pytest.mark.parametrize(
    ("uri", "path"),
    [
        ("file://localhost/data/a%20b.h5", "/data/a b.h5"),
        ("file:///data/x.h5", "/data/x.h5"),
        ("file:/data/x.h5", "/data/x.h5"),
        ("file://localhost/C:/Data/run/x.h5", "/mnt/data/run/x.h5"),
        ("file:///c:/data/x.h5", "/mnt/data/x.h5"),
        ("file://server/share/x.h5", "/mnt/share/x.h5"),
        ("file://localhost/nfs/det/deep/x.h5", "/local/deep/x.h5"),
        ("file://localhost/nfs/det2/x.h5", "/other/det2/x.h5"),
    ],
)
def test_uris_become_paths_of_this_machine(uri: str, path: str) -> None:
    mapped = {
        "C:/data": "/mnt/data",
        r"\\server\share": "/mnt/share",
        "/nfs": "/other/",
        "/nfs/det/": "/local",
    }
    assert Places(mapped).of_uri(uri) == Path(path)


@pytest.mark.parametrize(
    ("uri", "reason"),
    [
        ("http://server/x.h5", "is no file"),
        ("file://[", "cannot be read"),
        ("file://server/share/x.h5", "//server/share/x.h5: lies on another machine; say in path_map"),
        ("file://localhost/D:/x.h5", "D:/x.h5: lies on another machine"),
        ("file://localhost/data/../etc/x.h5", "expected an absolute path"),
        ("file://localhost", "is no path"),
        ("file://localhost/%00", "is no path"),
        ("file://localhost/" + "x" * 5000, "is no path"),
    ],
)
def test_uris_that_lead_nowhere_are_refused(uri: str, reason: str) -> None:
    with pytest.raises(BadFrame) as caught:
        Places({"C:/data": "/mnt"}).of_uri(uri)
    assert reason in str(caught.value)
    assert len(str(caught.value)) < 200


def test_only_what_lies_below_the_roots_is_read(tmp_path: Path) -> None:
    inside, outside = tmp_path / "in", tmp_path / "out"
    inside.mkdir()
    outside.mkdir()
    places = Places(roots=(inside,))
    hdf5(inside / "a.h5")
    hdf5(outside / "b.h5")
    (inside / "c.h5").symlink_to(outside / "b.h5")
    assert np.array_equal(streamed(inside / "a.h5", places).image(2).array(), STACK[2])
    for file in (outside / "b.h5", inside / "c.h5"):
        with pytest.raises(BadFrame, match=r"lies outside of asset_roots \(.*in\): not read"):
            streamed(file, places).image(0)


def test_links_to_themselves_and_files_in_the_way_lead_nowhere(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(BadFrame, match=r"loop/a\.h5: leads nowhere"):
        streamed(tmp_path / "loop" / "a.h5", Places(roots=(tmp_path,)))
    for name in ("loop", "file"):
        with pytest.raises(NotYet, match=rf"{name}/a\.h5: cannot be reached"):
            streamed(tmp_path / name / "a.h5").image(0)


# HDF5.


@pytest.mark.parametrize(
    ("options", "algorithm"),
    [
        ({}, "none"),
        (hdf5plugin.Bitshuffle(cname="lz4"), "bslz4"),
        (hdf5plugin.LZ4(), "lz4"),
        (hdf5plugin.Bitshuffle(cname="none"), None),
        (hdf5plugin.Bitshuffle(cname="zstd"), None),
        ({"compression": "gzip"}, None),
        ({"compression": "gzip", "shuffle": True}, None),
        ({"chunks": (2, 3, 5)}, None),
        ({"chunks": None, "maxshape": None}, None),
    ],
)
@pytest.mark.parametrize("pixel_type", ["<u2", ">u4", "<f4"])
def test_chunks_are_passed_on_as_they_lie_there(
    tmp_path: Path, options: dict[str, Any], algorithm: str | None, pixel_type: str
) -> None:
    """What the filters of others wrote; only what is framed as on the wire goes to the workers."""
    truth = np.random.default_rng(3).poisson(0.5, (4, 61, 67)).astype(pixel_type)
    layout = {"chunks": (1, 61, 67), "maxshape": (None, 61, 67), **options}
    if layout["chunks"] == (2, 3, 5):
        layout["chunks"] = (2, 61, 67)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("/entry/data/data", data=truth, **layout)
    stack = streamed(tmp_path / "a.h5")
    for number in (0, 1, 3, 2):
        image = stack.image(number)
        assert np.array_equal(image.array(), truth[number])
        assert image.array().dtype == image.dtype == truth.dtype.newbyteorder("=")
        assert (image.algorithm if isinstance(image, EncodedImage) else None) == algorithm
    stack.close()


def test_a_damaged_chunk_is_found_out_where_it_is_decompressed(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        data = file.create_dataset("/entry/data/data", (2, 3, 5), "u2", chunks=(1, 3, 5), **hdf5plugin.LZ4())
        data[0] = STACK[0]
        data.id.write_direct_chunk((1, 0, 0), b"\0" * 20)
        data.id.write_direct_chunk((0, 0, 0), b"\0\0\0\0\0\0\0\x1e\0\0\0\x1e\0\0\0\x05abcde")
    with pytest.raises(NotYet, match="image 1: lz4 blob declares blocks of 0 bytes"):
        streamed(tmp_path / "a.h5").image(1)
    with pytest.raises(BadFrame, match="a block does not decompress to its size"):
        streamed(tmp_path / "a.h5").image(0).array()


def test_images_are_read_forwards_and_from_anywhere(tmp_path: Path) -> None:
    stack = streamed(hdf5(tmp_path / "a.h5"))
    for number in (0, 1, 3, 1, 2):
        assert np.array_equal(stack.image(number).array(), STACK[number])
    with pytest.raises(NotYet, match=r"a\.h5: /entry/data/data has no image 4"):
        stack.image(4)
    stack.close()


@pytest.mark.parametrize("swmr", [True, False])
def test_a_file_that_is_being_written(tmp_path: Path, swmr: bool) -> None:
    path = tmp_path / "growing.h5"
    stack = streamed(path)
    with pytest.raises(NotYet, match=r"growing\.h5: no such file"):
        stack.image(0)
    path.write_bytes(b"\x89HDF\r\n\x1a\n half a header")
    with pytest.raises(NotYet, match=r"growing\.h5: .* cannot be read"):
        stack.image(0)
    with h5py.File(path, "w", libver="latest" if swmr else None, locking=False) as file:
        data = file.create_dataset(
            "/entry/data/data", (0, 3, 5), "u2", chunks=(1, 3, 5), maxshape=(None, 3, 5)
        )
        if swmr:
            file.swmr_mode = True
        for number, frame in enumerate(STACK):
            with pytest.raises(NotYet, match=f"is not a stack of images|has no image {number}"):
                stack.image(number)
            data.resize(number + 1, axis=0)
            data[number] = frame
            file.flush()
            assert np.array_equal(stack.image(number).array(), frame)
        stack.close()


def test_links_into_other_folders_are_refused_by_name(tmp_path: Path) -> None:
    """A file may lead to its neighbours, as a detector's master file does, and no further."""
    (tmp_path / "run" / "parts").mkdir(parents=True)
    hdf5(tmp_path / "run" / "parts" / "part.h5")
    hdf5(tmp_path / "secret.h5")
    for name, target, good in (
        ("master.h5", "parts/part.h5", True),
        ("up.h5", "../secret.h5", False),
        ("far.h5", str(tmp_path / "secret.h5"), False),
    ):
        with h5py.File(tmp_path / "run" / name, "w") as file:
            file["/real"] = h5py.ExternalLink(target, "/entry/data/data")
            file["/entry/data/data"] = h5py.SoftLink("/real")
        if good:
            assert np.array_equal(streamed(tmp_path / "run" / name).image(1).array(), STACK[1])
        else:
            with pytest.raises(
                BadFrame, match=r"secret\.h5: (lies outside of asset_roots|expected an absolute)"
            ):
                streamed(tmp_path / "run" / name).image(1)
    roots = Places(roots=(tmp_path,))
    assert np.array_equal(streamed(tmp_path / "run" / "far.h5", roots).image(1).array(), STACK[1])


def test_virtual_datasets_and_raw_files_are_looked_into(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    hdf5(tmp_path / "run" / "part.h5")
    hdf5(tmp_path / "secret.h5")
    for name, source in (("near.h5", "part.h5"), ("far.h5", str(tmp_path / "secret.h5"))):
        layout = h5py.VirtualLayout(STACK.shape, "u2")
        layout[:] = h5py.VirtualSource(source, "/entry/data/data", STACK.shape)
        with h5py.File(tmp_path / "run" / name, "w") as file:
            file.create_virtual_dataset("/entry/data/data", layout)
    assert np.array_equal(streamed(tmp_path / "run" / "near.h5").image(3).array(), STACK[3])
    with pytest.raises(BadFrame, match=r"secret\.h5: lies outside of asset_roots"):
        streamed(tmp_path / "run" / "far.h5").image(3)
    # The bytes of any file, as pixels.
    (tmp_path / "secret.txt").write_bytes(bytes(60))
    with h5py.File(tmp_path / "raw.h5", "w") as file:
        external = [(str(tmp_path / "secret.txt"), 0, 60)]
        file.create_dataset("/entry/data/data", (1, 6, 5), "u2", external=external)
    with pytest.raises(BadFrame, match="keeps its pixels in other files without a format: not read"):
        streamed(tmp_path / "raw.h5").image(0)


def test_links_in_a_circle_come_to_an_end(tmp_path: Path) -> None:
    for name, other in (("a.h5", "b.h5"), ("b.h5", "a.h5")):
        with h5py.File(tmp_path / name, "w") as file:
            file["/entry/data/data"] = h5py.ExternalLink(other, "/entry/data/data")
            file["/soft"] = h5py.SoftLink("/soft")
    for dataset in ("/entry/data/data", "/soft"):
        with pytest.raises(BadFrame, match="more than 16 links one after the other"):
            streamed(tmp_path / "a.h5", parameters={"dataset": dataset}).image(0)


# Sequences.


def tiffs(folder: Path, pattern: str, count: int = 3) -> None:
    for number in range(count):
        fabio.tifimage.TifImage(data=STACK[number]).write(str(folder / (pattern % number)))


@pytest.mark.parametrize("template", ["img_{:05d}.tif", "img_%05d.tif", "img_%5.5d.tif"])
def test_a_sequence_of_tiffs(tmp_path: Path, template: str) -> None:
    tiffs(tmp_path, "img_%05d.tif")
    sequence = streamed(
        f"file://localhost{tmp_path}/",
        mimetype="multipart/related;type=image/tiff",
        parameters={"template": template, "chunk_shape": [1, 3, 5]},
    )
    assert [np.array_equal(sequence.image(n).array(), STACK[n]) for n in (2, 0, 1)] == [True] * 3
    with pytest.raises(NotYet, match=r"img_00003\.tif: no such file"):
        sequence.image(3)
    half = (tmp_path / "img_00000.tif").read_bytes()[:100]
    (tmp_path / "img_00003.tif").write_bytes(half)
    with pytest.raises(NotYet, match=r"img_00003\.tif: cannot be read"):
        sequence.image(3)
    fabio.tifimage.TifImage(data=STACK[3]).write(str(tmp_path / "img_00003.tif"))
    assert np.array_equal(sequence.image(3).array(), STACK[3])


def test_sequences_of_older_detectors(tmp_path: Path) -> None:
    (tmp_path / "scan").mkdir()
    tiffs(tmp_path / "scan", "eiger_%06d.tiff")
    document = {
        "spec": "AD_TIFF",
        "root": "/on/the/ioc",
        "resource_path": "scan",
        "resource_kwargs": {"template": "%s%s_%6.6d.tiff", "filename": "eiger", "frame_per_point": 3},
    }
    found, per_point = asset(Places({"/on/the/ioc": str(tmp_path)}), document)
    assert per_point == 3
    assert np.array_equal(found.image(2).array(), STACK[2])
    np.save(tmp_path / "n_7.npy", STACK[1])
    numpy = {"spec": "NPY_SEQ", "root": str(tmp_path), "resource_path": "n", "resource_kwargs": {}}
    found, _ = asset(Places(), numpy)
    assert np.array_equal(found.image(7).array(), STACK[1])
    np.save(tmp_path / "n_8.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(NotYet, match=r"n_8\.npy: cannot be read: .*allow_pickle=False"):
        found.image(8)


@pytest.mark.parametrize(
    ("document", "reason"),
    [
        ({"spec": "AD_SPE"}, "resource of spec 'AD_SPE', expected AD_HDF5"),
        ({"spec": "AD_TIFF", "resource_kwargs": {"filename": "a"}}, "key 'template' is missing"),
        ({"spec": "AD_TIFF", "resource_kwargs": {"filename": "a", "template": "%s%s.tiff"}}, "has no number"),
        ({"spec": "AD_TIFF", "resource_kwargs": {"filename": "a", "template": "%d%d"}}, "has no number"),
        ({"spec": "AD_HDF5", "resource_kwargs": {"frame_per_point": 0}}, "images per file: expected"),
        ({"spec": "AD_HDF5", "resource_kwargs": []}, "resource_kwargs: expected a map"),
        ({"spec": 7}, "spec: expected text, got 7"),
    ],
)
def test_resources_that_are_not_read_are_named(document: dict[str, Any], reason: str) -> None:
    told = {"root": "/", "resource_path": "a", "resource_kwargs": {}, **document}
    with pytest.raises(BadFrame) as caught:
        asset(Places(), told)
    assert reason in str(caught.value)


def test_templates_cannot_leave_their_folder(tmp_path: Path) -> None:
    sequence = streamed(
        f"file://localhost{tmp_path}/",
        mimetype="multipart/related;type=image/tiff",
        parameters={"template": "../../etc/{:d}.tif"},
    )
    with pytest.raises(BadFrame, match="expected an absolute path"):
        sequence.image(0)


def test_datums_say_which_point_they_are() -> None:
    assert datum_number({"datum_kwargs": {"point_number": 4}}) == 4
    assert datum_number({"datum_kwargs": {"index": 2}}) == 2
    for kwargs, reason in (({}, "'point_number' is missing"), ({"point_number": -1}, "got -1")):
        with pytest.raises(BadFrame, match=reason):
            datum_number({"datum_kwargs": kwargs})

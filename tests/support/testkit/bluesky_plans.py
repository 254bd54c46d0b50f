"""A real RunEngine with a publisher, in a process of its own: ``python -m testkit.bluesky_plans ...``.

It reads plans as JSON from standard input, one a line, runs each, and answers with a JSON line: the uids
of its runs and how many documents it published.
"""

from __future__ import annotations

import json
import pickle
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import bluesky.plan_stubs as bps
import bluesky.plans as bp
import fabio.tifimage
import h5py
import msgpack_numpy
import numpy as np
from bluesky import RunEngine
from bluesky.callbacks.zmq import Publisher
from bluesky.preprocessors import run_decorator, set_run_key_wrapper
from ophyd import Device
from ophyd.sim import DirectImage, SynAxis, img
from ophyd_async.core import StaticPathProvider, UUIDFilenameProvider, init_devices
from ophyd_async.sim import SimBlobDetector, SimMotor


def to_json(document: dict[str, Any]) -> bytes:
    return json.dumps(document, default=lambda value: np.asarray(value).tolist()).encode()


SERIALIZERS = {"msgpack": msgpack_numpy.dumps, "json": to_json, "pickle": pickle.dumps}


class Axis(SynAxis):  # type: ignore[misc]
    """ophyd's simulated motor, with the unit that real ones have."""

    unit = "mm"

    def describe(self) -> dict[str, Any]:
        found = super().describe()
        for key in found.values():
            key["units"] = self.unit
        return dict(found)


class FileCamera(Device):  # type: ignore[misc]
    """An area detector of ophyd's older kind: Resource and Datum, HDF5 or a sequence of TIFFs."""

    def __init__(self, name: str, folder: Path, spec: str, frames: Callable[[], Any]) -> None:
        super().__init__(name=name)
        self.folder, self.spec, self.frames = folder, spec, frames
        self.shape = list(frames().shape)
        self.number = -1
        self.documents: list[tuple[str, dict[str, Any]]] = []

    def stage(self) -> list[Any]:
        self.number, self.resource = -1, str(uuid.uuid4())
        resource = {"uid": self.resource, "root": str(self.folder), "path_semantics": "posix"}
        if self.spec == "AD_HDF5":
            self.file = h5py.File(self.folder / f"{self.resource}.h5", "w")
            resource |= {"resource_path": f"{self.resource}.h5", "resource_kwargs": {"frame_per_point": 1}}
        else:
            kwargs = {"template": "%s%s_%6.6d.tiff", "filename": self.resource, "frame_per_point": 1}
            resource |= {"resource_path": ".", "resource_kwargs": kwargs}
        self.documents.append(("resource", {**resource, "spec": self.spec}))
        return [*super().stage()]

    def trigger(self) -> Any:
        self.number += 1
        frame = self.frames()
        if self.spec == "AD_HDF5":
            if "entry" not in self.file:
                shape = (0, *frame.shape)
                self.file.create_dataset(
                    "/entry/data/data", shape, frame.dtype, chunks=(1, *frame.shape), maxshape=(None,) * 3
                )
            stack = self.file["/entry/data/data"]
            stack.resize(self.number + 1, axis=0)
            stack[self.number] = frame
            self.file.flush()
        else:
            path = self.folder / f"{self.resource}_{self.number:06d}.tiff"
            fabio.tifimage.TifImage(data=frame).write(str(path))
        self.datum = f"{self.resource}/{self.number}"
        datum = {"resource": self.resource, "datum_id": self.datum}
        self.documents.append(("datum", {**datum, "datum_kwargs": {"point_number": self.number}}))
        return super().trigger()

    def describe(self) -> dict[str, Any]:
        return {
            self.name: {"source": "file", "dtype": "array", "shape": self.shape, "external": "FILESTORE:"}
        }

    def read(self) -> dict[str, Any]:
        return {self.name: {"value": self.datum, "timestamp": time.time()}}

    def collect_asset_docs(self) -> Iterator[tuple[str, dict[str, Any]]]:
        documents, self.documents = self.documents, []
        yield from documents

    def unstage(self) -> list[Any]:
        if self.spec == "AD_HDF5":
            self.file.close()
        return [*super().unstage()]


def nested(camera: Any, x: Any, y: Any, points: int) -> Iterator[Any]:
    """Two runs whose documents alternate."""

    def inner() -> Iterator[Any]:
        yield from bps.open_run({"plan_name": "inner", "num_points": points})

    def one(motor: Any, n: int) -> Iterator[Any]:
        yield from bps.mv(motor, n)
        yield from bps.trigger_and_read([camera, motor])

    @run_decorator(md={"plan_name": "outer", "num_points": points})  # type: ignore[untyped-decorator]
    def outer() -> Iterator[Any]:
        yield from set_run_key_wrapper(inner(), "inner")
        for n in range(points):
            yield from one(x, n)
            yield from set_run_key_wrapper(one(y, n), "inner")
        yield from set_run_key_wrapper(bps.close_run(), "inner")

    yield from bps.stage(camera)
    yield from outer()
    yield from bps.unstage(camera)


def failing(camera: Any, x: Any, points: int, good: int) -> Iterator[Any]:
    """A scan that breaks down half-way."""

    def broken_step(detectors: Any, motor: Any, step: float) -> Iterator[Any]:
        if step >= good:
            raise RuntimeError("the motor lost its limit switch")
        yield from bps.one_1d_step(detectors, motor, step)

    yield from bp.scan([camera], x, 0, points - 1, points, per_step=broken_step)


def main(address: str, serializer: str, folder: str, frames_file: str) -> None:
    frames = np.load(frames_file) if frames_file else np.arange(3 * 6 * 8, dtype="u2").reshape(3, 6, 8)
    taken = iter(range(1 << 30))
    publisher = Publisher(address, serializer=SERIALIZERS[serializer])
    engine = RunEngine({"sample_name": "foil"})
    published: list[str] = []
    engine.subscribe(publisher)
    engine.subscribe(lambda name, _: published.append(name))
    x, y = Axis(name="x"), Axis(name="y")

    def next_frame() -> Any:
        return frames[next(taken) % len(frames)]

    camera = DirectImage(name="camera", func=next_frame)
    with init_devices():
        blob = SimBlobDetector(StaticPathProvider(UUIDFilenameProvider(), Path(folder)))
        blob_x, blob_y = SimMotor(instant=True), SimMotor(instant=True)

    def plan(told: dict[str, Any]) -> Any:
        nonlocal taken
        taken = iter(range(1 << 30))
        nx, ny = told.get("shape", (3, 2))
        step_mm = told.get("step_um", 1.0) / 1000
        grid = (0, (ny - 1) * step_mm, ny), (0, (nx - 1) * step_mm, nx)
        match told["plan"]:
            case "probe":
                return bp.count([x], 1)
            case "grid":
                return bp.grid_scan([camera], y, *grid[0], x, *grid[1], snake_axes=True)
            case "blob":
                return bp.grid_scan([blob], blob_y, *grid[0], blob_x, *grid[1], snake_axes=True)
            case "npy":
                return bp.grid_scan([img], y, *grid[0], x, *grid[1])
            case "AD_HDF5" | "AD_TIFF":
                files = FileCamera("files", Path(folder), told["plan"], next_frame)
                return bp.grid_scan([files], y, *grid[0], x, *grid[1])
            case "nested":
                return nested(camera, x, y, told["points"])
            case "failing":
                return failing(camera, x, told["points"], told["good"])
        raise ValueError(told["plan"])

    for line in sys.stdin:
        told = json.loads(line)
        published.clear()
        try:
            uids = list(engine(plan(told)))
        except RuntimeError:
            uids = []
        print(json.dumps({"runs": uids, "documents": len(published), "names": published}), flush=True)
    publisher.close()


if __name__ == "__main__":
    main(*sys.argv[1:])

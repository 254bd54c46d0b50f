"""A whole daemon on bluesky's proxy: a RunEngine's plan becomes a map, with no scan in the configuration."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from testkit.bluesky_proxy import Beamline
from testkit.process import DaemonProcess, eventually

from daemon.demo.sample import DETECTOR, MATERIAL, SAMPLE_FRAME, STEP_UM, Sample
from grainwatch.messages import LaueResult, MapUpdate
from pipelines.laue.crystal import load_material
from pipelines.laue.lauetools_files import write_det
from pipelines.results_files import ResultsFile
from pipelines.rotations import misorientation_deg

pytestmark = pytest.mark.system

SHAPE = (20, 10)


def test_a_plan_of_200_points_is_seen_analysed_and_mapped(tmp_path: Path) -> None:
    sample = Sample.make(SHAPE, seed=11)
    frames = tmp_path / "frames.npy"
    np.save(frames, np.stack(list(sample.frames(seed=12))))
    write_det(tmp_path / "lab.det", DETECTOR)
    with Beamline(tmp_path, frames=frames) as beamline:
        config = f"""
[daemon]
state_dir = "state"
runtime_dir = "run"
workers = 1
[streams.laue.source]
type = "bluesky"
address = "{beamline.address}"
[streams.laue.pipeline]
type = "laue"
materials = ["{MATERIAL}"]
geometry = "lab.det"
sample_frame = "{SAMPLE_FRAME}"
[sinks.hdf5]
folder = "results"
"""
        with DaemonProcess(tmp_path, config=config) as daemon:
            daemon.start()

            def seen() -> int:
                found = re.search(r"(\d+) documents seen, 0 refused", daemon.status()["sources"]["laue"])
                assert found is not None, daemon.status()["sources"]
                return int(found[1])

            before = beamline.wait_until_heard(seen)
            answer = beamline.run("grid", shape=SHAPE, step_um=STEP_UM)
            assert answer["documents"] == 203
            eventually(lambda: seen() == before + 203, timeout=90)
            eventually(lambda: daemon.counts()["done"] == 200, timeout=90)
            assert daemon.stop() == 0
            assert daemon.audit() == []
    (path,) = (tmp_path / "results").glob("*.h5")
    with ResultsFile(path) as file:
        messages = list(file.messages())
        results = [m for m in messages if isinstance(m, LaueResult)]
        snapshot = [m for m in messages if isinstance(m, MapUpdate)][-1]
    assert sorted(r.key.frame for r in results) == list(range(1, 201))
    for result in results:
        assert result.grid_index == sample.grid.index(result.key.frame - 1)
        assert result.position_um == pytest.approx(sample.positions_um[result.key.frame - 1])
    assert (snapshot.kind, snapshot.shape, snapshot.filled) == ("snapshot", SHAPE, 200)
    assert snapshot.step_um == pytest.approx((STEP_UM, STEP_UM))
    copper = load_material(MATERIAL)
    best = [point for point in snapshot.points if point.rank == 0]
    truth = [sample.orientations[sample.labels[point.grid_index]] for point in best]
    group = copper.proper_point_group
    miss_deg = misorientation_deg(np.array([point.quaternion for point in best]), np.array(truth), group)
    assert len(best) > 190
    # Where two grains share the beam, the second one may be the one that shows more spots.
    assert np.mean(miss_deg < 0.5) > 0.9

"""`grainwatch map`: from a results file as the daemon writes it to a table, JSON and a picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import h5py
import matplotlib.image
import msgspec
import numpy as np
import pytest

from daemon.sinks import results_file
from daemon.sinks.base import Published, SeriesClosed, SeriesOpened, SinkContext, SinkEvent
from daemon.sinks.simulator import synthetic_micrograph
from grainwatch.cli import main
from grainwatch.messages import AnyMessage, LaueResult, MapUpdate, encode
from pipelines.laue.crystal import load_material
from pipelines.maps.builder import MapBuilder
from pipelines.maps.grid import ScanGrid
from pipelines.maps.plot import boundaries, draw_map, plane
from pipelines.maps.polycrystal import scan_results, voronoi
from pipelines.maps.series_map import read_map
from pipelines.rotations import random_rotations

CU = load_material("Cu")
UID = "simulated"
CONFIG = """
[streams.laue]
[streams.laue.pipeline]
type = "laue"
materials = ["Cu"]
geometry = "x.det"
map_tolerance_deg = 1.5
[streams.laue.source]
type = "replay"
files = ["x"]
[streams.laue.scan]
shape = [20, 12]
step_um = [2.0, 1.0]
"""


@pytest.fixture
def results() -> list[LaueResult]:
    """A raster scan of 20 x 12 points of 9 grains, frames 3, 4 and 5 without a crystal."""
    rng = np.random.default_rng(1)
    labels = voronoi((20, 12), 9, rng)
    labels[3:6, 0] = -1
    return list(scan_results(ScanGrid((20, 12)), labels, random_rotations(9, rng), CU, rng))


def write(folder: Path, messages: Sequence[AnyMessage], config_text: str = CONFIG, uid: str = UID) -> Path:
    """A results file with these messages, by the daemon's own sink."""
    folder.mkdir(exist_ok=True)
    before = set(folder.glob("*.h5"))
    context = SinkContext("test", folder, config_text=config_text)
    sink = results_file.open_sink(results_file.Config(folder=str(folder)), context)
    events: list[SinkEvent] = [SeriesOpened("laue", uid, 1.0, "1", scan_shape=(20, 12))]
    for seq, message in enumerate(messages, start=1):
        numbered = msgspec.structs.replace(message, seq=seq)
        events.append(Published("laue", numbered, encode(numbered)))
    events.append(SeriesClosed("laue", uid, 2.0, {}))
    sink.handle(events)
    sink.close()
    (path,) = set(folder.glob("*.h5")) - before
    return path


def run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *args: object
) -> tuple[int, str]:
    """Exit status, and what was printed: stdout where it went well, stderr else."""
    monkeypatch.setattr("sys.argv", ["grainwatch", "map", *(str(a) for a in args)])
    with pytest.raises(SystemExit) as done:
        main()
    printed = capsys.readouterr()
    code = int(done.value.code or 0)
    return code, printed.err if code else printed.out


def test_a_picture_of_a_partial_scan(
    tmp_path: Path,
    results: list[LaueResult],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = write(tmp_path, results[:200])
    png = tmp_path / "map.png"
    code, out = run(capsys, monkeypatch, path, "--plot", png, "--direction", "x")
    assert code == 0
    assert "20 x 12 points, step 2 x 1 um" in out
    assert "200 measured, 197 with crystals" in out
    pixels = matplotlib.image.imread(png)
    assert pixels.shape[0] > 300
    assert pixels.shape[1] > 600
    found = read_map([path])
    shown = plane(found, "x")
    assert shown.grain.shape == (12, 20)
    assert (shown.grain[10:] == -2).all()  # not reached yet: a hole
    assert (shown.grain[0, 3:6] == -1).all()  # measured, no crystal
    colours = {tuple(round(255 * float(c)) for c in rgb) for rgb in shown.rgb[shown.grain >= 0]}
    drawn = {tuple(p) for p in np.rint(255 * pixels[..., :3]).astype(int).reshape(-1, 3)}
    near = [min(max(abs(a - b) for a, b in zip(c, d, strict=True)) for d in drawn) for c in colours]
    assert max(near) <= 1  # every orientation is in the picture in its colour


def test_json_is_the_map_and_the_stored_snapshot_is_used(
    tmp_path: Path,
    results: list[LaueResult],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    built = MapBuilder(
        (20, 12), (2.0, 1.0), "simulated", UID, symmetry={"Cu": CU.proper_point_group}, tolerance_deg=1.5
    )
    messages: list[AnyMessage] = []
    for result in results:
        messages += [result, built.add(result)]
    snapshot = built.snapshot()
    plain, stored = write(tmp_path / "a", results), write(tmp_path / "b", [*messages, snapshot])
    assert read_map([plain]).snapshot == snapshot  # scan and tolerance come from the stored configuration
    assert msgspec.structs.replace(read_map([stored]).snapshot, seq=0) == snapshot
    # a snapshot is read as it is, and linked anew with another tolerance
    marked = msgspec.structs.replace(snapshot, filled=7)
    other = write(tmp_path / "c", [*messages, marked])
    assert read_map([other]).snapshot.filled == 7
    assert read_map([other], tolerance_deg=3.0).snapshot.filled == 240
    code, out = run(capsys, monkeypatch, plain, "--json")
    assert code == 0
    printed = json.loads(out)
    assert printed["schema"] == MapUpdate.SCHEMA
    assert len(printed["points"]) == len(snapshot.points)
    assert [g["grain_id"] for g in printed["grains"]] == [g.grain_id for g in snapshot.grains]


def test_parts_of_one_series_are_one_map(tmp_path: Path, results: list[LaueResult]) -> None:
    first, second = write(tmp_path, results[:100]), write(tmp_path, results[90:])
    whole = read_map([first, second])
    assert whole.snapshot.filled == 240
    assert whole.snapshot == read_map([write(tmp_path / "w", results)]).snapshot
    key = msgspec.structs.replace(results[0].key, series_uid="another")
    alien = write(tmp_path, [msgspec.structs.replace(results[0], key=key)], uid="another")
    with pytest.raises(ValueError, match="expected the parts of one series"):
        read_map([first, alien])


def test_positions_alone_make_a_map(tmp_path: Path, results: list[LaueResult]) -> None:
    rng = np.random.default_rng(0)
    moved = []
    for result in results:
        assert result.grid_index is not None
        x, y = np.array(result.grid_index) * [2.0, 1.0] + [100.0, -50.0] + rng.normal(0, 0.02, 2)
        moved.append(msgspec.structs.replace(result, grid_index=None, position_um=(float(x), float(y))))
    found = read_map([write(tmp_path, moved, config_text="")], tolerance_deg=1.5).snapshot
    assert found.shape == (20, 12)
    assert found.step_um == pytest.approx((2.0, 1.0), rel=1e-2)
    assert found.points == read_map([write(tmp_path / "b", results)]).snapshot.points


def test_one_material_of_two(tmp_path: Path, results: list[LaueResult]) -> None:
    mixed = []
    for result in results:
        crystals = tuple(
            msgspec.structs.replace(c, material="Ni") if i else c for i, c in enumerate(result.crystals)
        )
        mixed.append(msgspec.structs.replace(result, crystals=crystals))
    found = read_map([write(tmp_path, mixed)])
    assert list(found.materials) == ["Cu", "Ni"]
    both, nickel = plane(found), plane(found, material="Ni")
    assert (nickel.grain >= 0).sum() == sum(len(r.crystals) == 2 for r in results)
    assert (both.grain >= 0).sum() > (nickel.grain >= 0).sum()
    with pytest.raises(ValueError, match="no crystal of 'Fe' on the map; found: Cu, Ni"):
        plane(found, material="Fe")


def test_boundaries_run_between_grains_only() -> None:
    edges = boundaries(np.array([[1, 1, 2], [1, 3, 2], [-1, 3, -2]]))
    assert sorted(edges.tolist()) == sorted(
        [
            [[1.5, -0.5], [1.5, 0.5]],
            [[0.5, 0.5], [0.5, 1.5]],
            [[1.5, 0.5], [1.5, 1.5]],
            [[0.5, 0.5], [1.5, 0.5]],
        ]
    )


def test_errors_say_what_is_wrong(
    tmp_path: Path,
    results: list[LaueResult],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def wrong(*args: object) -> str:
        code, printed = run(capsys, monkeypatch, *args)
        assert code == 2
        assert printed.count("\n") == 1, printed  # one line, no traceback
        return printed

    replace = msgspec.structs.replace
    assert "cannot be read: no such file" in wrong(tmp_path / "absent.h5")
    (tmp_path / "text.h5").write_text("hello")
    assert "text.h5: cannot be opened as HDF5" in wrong(tmp_path / "text.h5")
    with h5py.File(tmp_path / "other.h5", "w", libver="latest") as file:
        file.create_group("entry")
    assert "expected results in the layout" in wrong(tmp_path / "other.h5")
    none = write(tmp_path / "none", [replace(r, crystals=()) for r in results])
    assert "240 frames, and no crystal was indexed in any of them" in wrong(none)
    assert "holds no results" in wrong(write(tmp_path / "empty", []))
    rng = np.random.default_rng(0)
    images = [synthetic_micrograph(n, rng, seq=n + 1, series_uid=UID) for n in range(3)]
    assert "holds 3 micrographs and no map" in wrong(write(tmp_path / "sem", images))
    assert "holds 1 micrograph and no map" in wrong(write(tmp_path / "one", images[:1]))
    nowhere = write(tmp_path / "nowhere", [replace(r, grid_index=None) for r in results], config_text="")
    assert "the series is no scan" in wrong(nowhere)
    scattered = [
        replace(r, grid_index=None, position_um=tuple(rng.uniform(0, 50, 2).tolist())) for r in results
    ]
    assert "the positions of the frames are no grid" in wrong(write(tmp_path / "scattered", scattered))
    alloy = [
        replace(r, crystals=tuple(replace(c, material="alloy") for c in r.crystals)) for r in results[6:9]
    ]
    assert "'alloy' is not built in: give its file as --material FILE.cif" in wrong(
        write(tmp_path / "alloy", alloy)
    )
    good = write(tmp_path / "good", results)
    assert "--direction: expected x, y or z, got 'q'" in wrong(good, "--direction", "q")
    assert "no crystal of 'Fe' on the map; found: Cu" in wrong(good, "--material", "Fe")
    assert "plane 3: expected 0 to 0" in wrong(good, "--plane", 3, "--plot", tmp_path / "m.png")
    assert "cannot be written" in wrong(good, "--plot", tmp_path / "no" / "folder" / "m.png")
    assert "m.xyz" in wrong(good, "--plot", tmp_path / "m.xyz")
    assert "tolerance 50.0 deg: expected between 0 and 30 deg" in wrong(good, "--tolerance", 50)


@pytest.mark.parametrize(("step_um", "unit"), [("[2.0, 1.0]", "µm"), ("", "points")])
def test_axes_frame_zero_and_the_range_of_match_rates(
    tmp_path: Path, results: list[LaueResult], step_um: str, unit: str
) -> None:
    line = f"step_um = {step_um}" if step_um else ""
    path = write(tmp_path, results, CONFIG.replace("step_um = [2.0, 1.0]", line))
    found = read_map([path])
    figure = draw_map(found)
    figure.canvas.draw()
    main, rates = figure.axes[:2]
    assert (main.get_xlabel(), main.get_ylabel()) == (f"x ({unit}) →", f"y ({unit}) →")
    scale = 2.0 if step_um else 1.0
    for place, label in zip(main.get_xticks(), main.get_xticklabels(), strict=True):
        assert float(label.get_text()) == pytest.approx(scale * place)
    texts = [text.get_text() for text in main.texts]
    assert "frame 0" in texts
    assert any("µm" in text for text in texts) == bool(step_um)
    mark = main.collections[-1]
    assert np.asarray(mark.get_offsets()).tolist() == [[0.0, 0.0]]
    low, high = rates.images[-1].get_clim()
    measured = [point.match_rate for point in found.snapshot.points if point.rank == 0]
    assert low <= min(measured) <= max(measured) <= high < low + 0.2
    assert f"{low:.2f} to {high:.2f}" in rates.get_title(loc="left")

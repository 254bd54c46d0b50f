"""Documents of a real RunEngine through bluesky's own proxy."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np
import pytest
import zmq
import zmq.auth
from testkit.bluesky_proxy import Beamline, Listener
from testkit.process import eventually

from daemon.sources.base import Arrival, Bad, SeriesEnd, SeriesStart
from daemon.sources.bluesky.simulator import Options, Simulator
from daemon.sources.bluesky.source import Config, check, open_source
from grainwatch.config import ConfigError, convert

pytestmark = pytest.mark.system


@pytest.fixture(scope="module")
def beamline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Beamline]:
    with Beamline(tmp_path_factory.mktemp("beamline")) as beamline:
        yield beamline


@pytest.fixture
def listener(beamline: Beamline) -> Iterator[Listener]:
    with Listener(address=beamline.address) as listener:
        beamline.wait_until_heard(listener.seen)
        yield listener


# (x, y) of a scan of 3 x 2 points that runs to and fro.
TO_AND_FRO = [(0, 0), (1, 0), (2, 0), (2, 1), (1, 1), (0, 1)]


def test_frames_in_events_with_their_places(beamline: Beamline, listener: Listener) -> None:
    before = listener.seen()
    answer = beamline.run("grid", shape=[3, 2], step_um=2.0)
    start, *frames, end = listener.of(answer["runs"][0])
    assert answer["documents"] == 9
    eventually(lambda: listener.seen() - before == 9)
    assert isinstance(start, SeriesStart)
    assert (start.n_frames, start.first_frame) == (6, 1)
    assert start.scan is not None
    assert (start.scan.shape, start.scan.snake) == ((3, 2), True)
    assert start.scan.step_um == pytest.approx((2.0, 2.0))
    assert (start.metadata["plan_name"], start.metadata["sample_name"]) == ("grid_scan", "foil")
    assert end == SeriesEnd(answer["runs"][0], 6)
    arrivals = [f for f in frames if isinstance(f, Arrival)]
    assert [a.frame for a in arrivals] == [1, 2, 3, 4, 5, 6]
    assert [a.grid_index for a in arrivals] == TO_AND_FRO
    for arrival, (x, y) in zip(arrivals, TO_AND_FRO, strict=True):
        assert arrival.position_um == pytest.approx((2.0 * x, 2.0 * y))
        assert arrival.acquired > 1e9
    truth = np.arange(3 * 6 * 8, dtype="u2").reshape(3, 6, 8)
    shown = [int(a.image.array()[0, 0]) for a in arrivals]
    assert [a.image.dtype for a in arrivals] == [np.dtype("u2")] * 6
    first = shown[0] // 48
    assert shown == [int(truth[(first + n) % 3, 0, 0]) for n in range(6)]


@pytest.mark.parametrize("plan", ["blob", "AD_HDF5", "AD_TIFF", "npy"])
def test_frames_in_files_of_real_detectors(beamline: Beamline, listener: Listener, plan: str) -> None:
    answer = beamline.run(plan, shape=[3, 2])
    start, *frames, _ = listener.of(answer["runs"][0])
    arrivals = [f for f in frames if isinstance(f, Arrival)]
    assert [a.frame for a in arrivals] == [1, 2, 3, 4, 5, 6], frames
    assert isinstance(start, SeriesStart)
    assert start.scan is not None
    assert start.scan.shape == (3, 2)
    there_and_back = TO_AND_FRO if plan == "blob" else [*TO_AND_FRO[:3], *reversed(TO_AND_FRO[3:])]
    assert [a.grid_index for a in arrivals] == there_and_back
    assert [a.position_um for a in arrivals] == [pytest.approx(p) for p in there_and_back]
    if plan == "blob":
        assert arrivals[0].image.shape == (240, 320)
        written = max(beamline.folder.glob("*.h5"), key=lambda path: path.stat().st_mtime_ns)
        with h5py.File(written, locking=False) as file:
            truth = file["/entry/data/data"][()]
        assert truth.any()
        assert np.array_equal([a.image.array() for a in arrivals], truth)
    elif plan.startswith("AD"):
        # The camera described itself with frames too; those that were written follow one another.
        pixels = [int(a.image.array()[0, 0]) // 48 for a in arrivals]
        assert [(b - a) % 3 for a, b in itertools.pairwise(pixels)] == [1] * 5


def test_a_plan_that_breaks_down_leaves_nothing_missing(
    beamline: Beamline, listener: Listener, caplog: pytest.LogCaptureFixture
) -> None:
    before = len(listener.events)
    assert beamline.run("failing", points=50, good=4)["runs"] == []
    eventually(lambda: any(isinstance(e, SeriesEnd) for e in listener.events[before:]))
    start, *frames, end = listener.events[before:]
    assert isinstance(start, SeriesStart)
    assert start.n_frames == 50
    assert [f.frame for f in frames if isinstance(f, Arrival)] == [1, 2, 3, 4]
    assert end == SeriesEnd(start.detector_series, 4)
    assert f"run {start.detector_series} ended by 'fail': 'the motor lost its limit switch'" in caplog.text


def test_two_runs_at_once(beamline: Beamline, listener: Listener) -> None:
    answer = beamline.run("nested", points=4)
    assert len(answer["runs"]) == 2
    for run in answer["runs"]:
        start, *frames, end = listener.of(run)
        assert isinstance(start, SeriesStart)
        assert start.beside
        assert [f.frame for f in frames if isinstance(f, Arrival)] == [1, 2, 3, 4]
        assert end == SeriesEnd(run, 4)
    taken = [e.detector_series for e in listener.events if isinstance(e, Arrival)][-8:]
    assert [a == b for a, b in itertools.pairwise(taken)] == [False] * 7  # they alternated indeed


def test_garbage_on_the_port_of_the_proxy_is_counted_and_harms_nothing(
    beamline: Beamline, listener: Listener
) -> None:
    context = zmq.Context()
    scanner = context.socket(zmq.PUB)
    scanner.connect(f"tcp://127.0.0.1:{beamline.ports[0]}")
    try:
        sent = [b"GET / HTTP/1.1", b"\x16\x03\x01\x02\x00", b"x start \xff\xff", b" event \x80\x04\x95)x."]

        def heard() -> bool:
            for message in sent:
                scanner.send(message)
            return {type(e) for e in listener.events} == {Bad} and len(listener.events) >= 4

        eventually(heard)
    finally:
        context.destroy(linger=0)
    reasons = {e.reason for e in listener.events if isinstance(e, Bad)}
    assert any("is not 'prefix name document'" in r for r in reasons)
    assert any("start: is neither a msgpack map nor a JSON object" in r for r in reasons)
    assert any("event: pickled document refused, because a pickle runs any code" in r for r in reasons)
    # More of it may be on its way still.
    eventually(lambda: listener.source.refused == sum(isinstance(e, Bad) for e in list(listener.events)))
    run = beamline.run("grid", shape=[3, 2])["runs"][0]
    assert sum(isinstance(e, Arrival) for e in listener.of(run)) == 6


def test_a_proxy_that_comes_back_is_used_again(beamline: Beamline, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    with Listener(address=beamline.address) as listener:
        beamline.wait_until_heard(listener.seen)
        assert listener.source.problem == ""
        beamline.kill_proxy()
        eventually(lambda: "waiting for" in listener.source.describe())
        eventually(lambda: listener.source.problem)
        assert listener.source.problem == f"no proxy answers at {beamline.address}"
        beamline.start_proxy()
        beamline.wait_until_heard(listener.seen)
        eventually(lambda: listener.source.problem == "")
        run = beamline.run("grid", shape=[3, 2])["runs"][0]
        assert sum(isinstance(e, Arrival) for e in listener.of(run)) == 6
    assert "went away; what is published until it is back is lost" in caplog.text


def test_an_encrypted_proxy(tmp_path: Path) -> None:
    """Documents as JSON; a stranger hears nothing and is told so."""
    clients = tmp_path / "clients"
    clients.mkdir()
    server_public, server_secret = zmq.auth.create_certificates(tmp_path, "server")
    _, secret = zmq.auth.create_certificates(clients, "us")
    _, stranger = zmq.auth.create_certificates(tmp_path, "stranger")
    keys = (Path(server_secret), clients)
    with Beamline(tmp_path, "json", keys=keys) as beamline:
        known = {"address": beamline.address, "curve_server_key": str(server_public)}
        with (
            Listener(**known, curve_secret_key=str(secret)) as listener,
            Listener(**known, curve_secret_key=str(stranger)) as other,
        ):
            beamline.wait_until_heard(listener.seen)
            run = beamline.run("grid", shape=[3, 2])["runs"][0]
            assert sum(isinstance(e, Arrival) for e in listener.of(run)) == 6
            assert other.seen() == 0
            eventually(lambda: "(or it refuses our key)" in other.source.problem)


def test_the_simulator_plays_to_a_proxy_and_in_its_place(beamline: Beamline, tmp_path: Path) -> None:
    frames = [np.full((4, 5), n, np.uint16) for n in range(8, 14)]
    with Listener(address=beamline.address) as listener:
        beamline.wait_until_heard(listener.seen)
        to_proxy = Options(f"tcp://127.0.0.1:{beamline.ports[0]}", shape=(3, 2), rate_hz=0, encoding="json")
        report = Simulator(frames, to_proxy).run()
        assert report.complete
        assert report.documents == 9
        found = [e for e in listener.of(report.run) if isinstance(e, Arrival)]
        assert [int(a.image.array()[0, 0]) for a in found] == list(range(8, 14))
    simulator = Simulator(
        frames, Options("tcp://127.0.0.1:*", bind=True, shape=(3, 2), rate_hz=0, folder=tmp_path, snake=True)
    )
    with Listener(address=simulator.address) as listener:
        report = simulator.run()
        found = [e for e in listener.of(report.run) if isinstance(e, Arrival)]
        assert [int(a.image.array()[0, 0]) for a in found] == list(range(8, 14))
        assert [a.grid_index for a in found] == TO_AND_FRO


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"address": "localhost:5578"}, "address: expected tcp://host:port"),
        ({"address": "tcp://*:5578"}, "address: expected tcp://host:port"),
        ({"prefix": "a b"}, "prefix: expected letters without spaces"),
        ({"position_unit": "deg"}, "position_unit: expected a length"),
        ({"open_runs": 9}, "open_runs: expected 1 to 4"),
        ({"asset_wait_s": -1}, "asset_wait_s: expected 0 or more"),
        ({"max_message_bytes": 0}, "max_message_bytes: expected 1 or more"),
        ({"allow_pickle": True}, "unknown key `allow_pickle`"),
    ],
)
def test_configuration_errors_name_the_key(table: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        convert({"address": "tcp://localhost:5578", **table}, Config, "config.toml: streams.s.source")


def test_key_files_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    public, secret = zmq.auth.create_certificates(tmp_path, "us")
    (tmp_path / "text").write_text("no certificate")
    address = "tcp://127.0.0.1:5578"
    for secret_key, server_key, message in (
        (secret, "", r"s\.curve_server_key: expected a file"),
        ("", public, r"s\.curve_secret_key: expected a file"),
        (public, public, r"s\.curve_secret_key: .*us\.key has no secret key"),
        (tmp_path / "absent", public, r"s\.curve_secret_key: .*absent cannot be read"),
        (secret, tmp_path / "text", r"s\.curve_server_key: .*text is no certificate"),
    ):
        config = Config(address=address, curve_secret_key=str(secret_key), curve_server_key=str(server_key))
        with pytest.raises(ConfigError, match=message):
            check(config, "s")
        with pytest.raises(ConfigError, match=message.replace(r"s\.", r"streams\.s\.source\.", 1)):
            open_source(config, "s")

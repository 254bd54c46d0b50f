"""The push source: what senders of all kinds do to it, over real sockets, with the accounts behind it."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import h5py
import msgspec
import numpy as np
import pytest
from fabio.cbfimage import CbfImage
from fabio.edfimage import EdfImage
from testkit.process import LONG_S
from testkit.push import RawSender, Receiver, tiff, wait_for

from daemon.sources.base import SourceContext
from daemon.sources.push.source import Config, open_source
from grainwatch.config import ConfigError, convert
from grainwatch.push import ImagePusher, PushError
from grainwatch.push_wire import (
    Ack,
    Begin,
    Begun,
    Busy,
    Held,
    Hello,
    ImageHead,
    Leave,
    Left,
    Ping,
    Refused,
    Welcome,
)

PIXELS = np.arange(12, dtype=np.uint16).reshape(3, 4)


def pixels(number: int) -> np.ndarray[Any, np.dtype[np.uint16]]:
    return PIXELS + np.uint16(number)


def push_arrays(receiver: Receiver, series: str, numbers: range, **options: Any) -> ImagePusher:
    with ImagePusher(receiver.address, series, **options) as pusher:
        for n in numbers:
            pusher.push_array(pixels(n), n)
    return pusher


def head(number: int, data: bytes, **others: Any) -> ImageHead:
    given: dict[str, Any] = {"form": "array", "dtype": "<u2", "shape": (3, 4), **others}
    digest = hashlib.sha256(data).digest()
    return ImageHead(number, number, f"raw {number}", digest[:16], digest, **given)


def test_arrays_arrive_as_they_are(tmp_path: Path) -> None:
    arrays = [PIXELS, PIXELS.astype(">u2"), PIXELS.T, PIXELS.astype(np.float32), PIXELS.astype(np.uint8)[::2]]
    with Receiver(tmp_path) as receiver:
        for n, array in enumerate(arrays):
            with ImagePusher(receiver.address, f"scan {n}") as pusher:
                pusher.push_array(
                    array, acquired=5.5, position_um=(1, 2.5), metadata={"exposure_s": 0.5}, name="it"
                )
            assert pusher.counts["taken"] == 1
        frames = [taken.frame for taken in receiver.frames]
        for array, frame in zip(arrays, frames, strict=True):
            found = frame.image.array()
            assert found.dtype == array.dtype.newbyteorder("=")
            np.testing.assert_array_equal(found, array)
        frame = frames[0]
        assert (frame.acquired, frame.position_um) == (5.5, (1.0, 2.5))
        assert (frame.metadata["exposure_s"], frame.metadata["file"]) == (0.5, "it")
    pusher = ImagePusher("tcp://127.0.0.1:1")
    for wrong in (np.zeros(3), np.zeros((0, 3)), np.array([["a"]]), np.zeros((2, 2), complex)):
        with pytest.raises(ValueError, match="rows and columns"):
            pusher.push_array(wrong)
    pusher.close()


def test_files_are_decoded_here(tmp_path: Path) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    EdfImage(data=PIXELS).write(str(folder / "a_0.edf"))
    CbfImage(data=PIXELS.astype(np.int32)).write(str(folder / "a_1.cbf"))
    np.save(folder / "a_2.npy", PIXELS)
    (folder / "a_3.tif").write_bytes(tiff(PIXELS))
    (folder / "a_4.tif.gz").write_bytes(gzip.compress(tiff(PIXELS)))
    (folder / "a_5.tif.bz2").write_bytes(bz2.compress(tiff(PIXELS)))
    (folder / "a_6.jpg").write_bytes(tiff(PIXELS))  # bytes count, not names
    files = sorted(folder.iterdir())
    with Receiver(tmp_path) as receiver:
        for n, file in enumerate(files):
            with ImagePusher(receiver.address, file.suffix) as pusher:
                pusher.push_file(file, n, sidecars={"a.txt": f"HV={n}"})
            assert (pusher.counts["taken"], pusher.problems) == (1, [])
        for taken, file in zip(receiver.frames, files, strict=True):
            np.testing.assert_array_equal(taken.frame.image.array(), PIXELS)
            about = taken.frame.metadata
            assert about["file"] == file.name
            assert about["file_sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
            assert about["file_modified"] == file.stat().st_mtime
            assert about["sidecars"] == {"a.txt": f"HV={taken.frame.key.frame}"}


def bad_files() -> dict[str, tuple[bytes, str]]:
    """Files that are no image here, and what the sender is told."""
    hdf5 = io.BytesIO()
    with h5py.File(hdf5, "w", userblock_size=1024) as file:
        file["data"] = h5py.ExternalLink("/etc/secret.h5", "/data")
    objects = io.BytesIO()
    np.save(objects, np.array([[{"a": 1}]]), allow_pickle=True)
    cube = io.BytesIO()
    np.save(cube, np.zeros((3, 4, 5), np.uint16))
    good = tiff(PIXELS)
    return {
        "empty": (b"", "no known image format"),
        "text": (b"hello", "no known image format"),
        "hdf5": (b"\x89HDF\r\n\x1a\n" + bytes(100), "is HDF5"),
        "hdf5 behind a user block": (hdf5.getvalue(), "is HDF5"),
        "half": (good[: len(good) // 2], "cannot be read"),
        "half, packed": (gzip.compress(good)[:-12], "truncated"),
        "damaged, packed": (gzip.compress(good)[:12] + bytes(30), "cannot be unpacked"),
        "objects": (objects.getvalue(), "cannot be read"),
        "cube": (cube.getvalue(), "."),
        "claims 7 GB": (tiff(PIXELS, (60_000, 60_000)), "."),
        "bomb": (gzip.compress(bytes(100 << 20)), "unpacks to more"),
        "too large": (tiff(np.zeros((1500, 1500), np.uint16)), "limit is 4194304"),
        "edf elsewhere": (b"{\nEDF_BinaryFileName = /etc/passwd ;\nDim_1 = 4 ;\nDim_2 = 3 ;\n}\n", "."),
    }


def test_a_bad_file_is_a_failed_frame_with_its_name(tmp_path: Path) -> None:
    bad = bad_files()
    with Receiver(tmp_path, max_image_bytes=4 << 20) as receiver:
        with ImagePusher(receiver.address, "scan") as pusher:
            for n, (data, _) in enumerate(bad.values()):
                (tmp_path / f"bad_{n}.tif").write_bytes(data)
                pusher.push_file(tmp_path / f"bad_{n}.tif", n)
                pusher.push_array(pixels(n), 100 + n)
        assert pusher.counts == {"taken": len(bad), "held": 0, "failed": len(bad), "refused": 0}
        for problem, (name, (_, why)) in zip(pusher.problems, bad.items(), strict=True):
            assert why in problem.reason, name
            assert problem.name in problem.reason
            assert str(tmp_path) not in problem.reason
        total = receiver.totals()
        assert (total["done"], total["failed"], total["received"]) == (len(bad), len(bad), 2 * len(bad))
        assert receiver.ledger.balance() == []


def test_formats_that_are_not_wanted(tmp_path: Path) -> None:
    np.save(tmp_path / "a_1.npy", PIXELS)
    with Receiver(tmp_path, formats=("tiff",)) as receiver:
        with ImagePusher(receiver.address, "scan") as pusher:
            pusher.push_file(tmp_path / "a_1.npy", 1)
        assert "is npy; taken over a network: tiff" in pusher.problems[0].reason


def test_a_reader_that_dies_costs_one_frame_at_most(tmp_path: Path) -> None:
    (tmp_path / "a.tif").write_bytes(tiff(PIXELS))
    with Receiver(tmp_path) as receiver:
        with ImagePusher(receiver.address, "scan") as pusher:
            pusher.push_file(tmp_path / "a.tif", 0)
            assert pusher.flush(LONG_S)
            process = receiver.source._reader._process
            assert process is not None
            os.kill(process.pid, signal.SIGKILL)  # while it does nothing
            process.wait()
            pusher.push_file(tmp_path / "a.tif", 1, name="b.tif")
            assert pusher.flush(LONG_S)
            process = receiver.source._reader._process
            assert process is not None
            os.kill(process.pid, signal.SIGSTOP)  # it will be in the middle of a file
            pusher.push_file(tmp_path / "a.tif", 2, name="c.tif")
            assert not pusher.flush(0.5)
            os.kill(process.pid, signal.SIGKILL)
            assert pusher.flush(LONG_S)
            pusher.push_file(tmp_path / "a.tif", 3, name="d.tif")
        assert receiver.numbers == [0, 1, 3]
        assert "c.tif: the reader of files died of it (signal 9)" in pusher.problems[0].reason


def test_a_file_that_takes_for_ever_is_given_up(tmp_path: Path) -> None:
    (tmp_path / "a.tif").write_bytes(tiff(PIXELS))
    with Receiver(tmp_path, read_timeout_s=1.0) as receiver:
        with ImagePusher(receiver.address, "scan") as pusher:
            pusher.push_file(tmp_path / "a.tif", 0)
            assert pusher.flush(LONG_S)
            process = receiver.source._reader._process
            assert process is not None
            os.kill(process.pid, signal.SIGSTOP)
            pusher.push_file(tmp_path / "a.tif", 1, name="b.tif")
        assert "could not be read in 1 s" in pusher.problems[0].reason
        assert process.poll() is not None


def test_nothing_is_acknowledged_that_the_accounts_have_not(tmp_path: Path) -> None:
    with Receiver(tmp_path, window=3) as receiver:
        pusher = ImagePusher(receiver.address, "scan")
        pusher.begin()
        receiver.open.clear()  # the intake is full
        sending = threading.Thread(
            daemon=True, target=lambda: [pusher.push_array(pixels(n), n) for n in range(10)]
        )
        sending.start()
        wait_for(lambda: len(receiver.frames) == 1 and len(pusher._on_the_way) == 3)
        time.sleep(0.3)
        assert sending.is_alive()
        assert pusher.counts["taken"] == 0
        assert len(pusher._on_the_way) == 3
        receiver.open.set()
        sending.join(LONG_S)
        pusher.end()
        pusher.close()
        assert receiver.numbers == list(range(10))


def test_what_is_there_is_not_sent_again(tmp_path: Path) -> None:
    with Receiver(tmp_path) as receiver:
        assert push_arrays(receiver, "scan", range(5)).counts["taken"] == 5
        second = push_arrays(receiver, "scan", range(8))
        assert (second.counts["held"], second.counts["taken"]) == (5, 3)
        assert receiver.numbers == list(range(8))
        assert receiver.series == ["start scan", "end scan", "start scan", "end scan"]
        again = push_arrays(receiver, "scan", range(3), again=True)
        assert (again.counts["held"], again.counts["taken"]) == (0, 3)
        assert push_arrays(receiver, "other", range(3)).counts["taken"] == 3
        assert receiver.totals()["received"] == 14


def test_a_series_that_was_left_goes_on(tmp_path: Path) -> None:
    for part in range(3):  # with a new daemon each time
        with Receiver(tmp_path) as receiver:
            pusher = ImagePusher(receiver.address, "scan")
            for n in range(5 * part + 4):
                pusher.push_array(pixels(n), n)
            pusher.close()
            assert pusher.resumed == (part > 0)
            assert pusher.counts["held"] == (0, 4, 9)[part]
    with Receiver(tmp_path) as receiver:
        push_arrays(receiver, "scan", range(20))
        counts = receiver.latest()
        ((row, _),) = receiver.ledger.latest(10)
        assert (counts["received"], counts["done"], counts["missing"]) == (20, 20, 0)
        assert row.detector_series.startswith("push/scan/")


def test_a_number_stands_for_one_image(tmp_path: Path) -> None:
    with Receiver(tmp_path) as receiver:
        with ImagePusher(receiver.address, "scan", first=3) as pusher:
            pusher.push_array(pixels(3), 3, name="one")
            assert pusher.flush(LONG_S)
            pusher.push_array(pixels(99), 3, name="another")
            pusher.push_array(pixels(2), 2, name="below")
            pusher.push_array(pixels(2), 10_000_000, name="beyond")
            pusher.push_array(pixels(4), 4, name="good")
        reasons = [problem.reason for problem in pusher.problems]
        assert "number 3 of this series is another image, one" in reasons[0]
        assert "before the first of the series, 3" in reasons[1]
        assert "number 10000000 makes no sense, expected 3 to about 4" in reasons[2]
        assert receiver.numbers == [3, 4]
        assert receiver.totals()["received"] == 2


def test_a_sender_waits_for_its_turn(tmp_path: Path) -> None:
    said: list[str] = []
    with Receiver(tmp_path) as receiver:
        first = ImagePusher(receiver.address, "one")
        first.push_array(pixels(0), 0)
        others = [
            threading.Thread(
                daemon=True, target=push_arrays, args=(receiver, name, range(3)), kwargs={"say": said.append}
            )
            for name in ("two", "three")
        ]
        for other in others:
            other.start()
        wait_for(lambda: len(said) == 2)
        assert all("busy, series one of" in what for what in said)
        assert receiver.source.describe().endswith("3 senders, 2 of them waiting")
        first.push_array(pixels(1), 1)
        first.end()
        first.close()
        for other in others:
            other.join(LONG_S)
            assert not other.is_alive()
        assert receiver.series[:2] == ["start one", "end one"]
        assert sorted(receiver.series[2:]) == sorted(["start two", "end two", "start three", "end three"])
        assert receiver.totals()["done"] == 8


def test_a_sender_that_vanishes_gives_its_turn_to_the_next(tmp_path: Path) -> None:
    with Receiver(tmp_path) as receiver:
        with RawSender(receiver.address) as gone:
            assert isinstance(gone.hello(), Welcome)
            assert isinstance(gone.ask(Begin("one")), Begun)
            data = pixels(0).tobytes()
            assert gone.ask(head(0, data), data) == Ack(0, "taken")
        push_arrays(receiver, "two", range(3))
        assert receiver.series == ["start one", "end one", "start two", "end two"]
        assert receiver.totals()["failed"] == 0
        # What is left of the first goes into a series of its own, and only that.
        late = push_arrays(receiver, "one", range(1, 3))
        assert (late.resumed, late.counts["taken"]) == (False, 2)


def test_senders_that_do_not_keep_to_the_protocol(tmp_path: Path) -> None:
    with Receiver(tmp_path, max_file_bytes=1 << 20) as receiver:
        pusher = ImagePusher(receiver.address, "good")
        pusher.push_array(pixels(0), 0)
        data = pixels(0).tobytes()
        with RawSender(receiver.address) as raw:
            for noise in (b"", b"\x80\x04\x95pickle", b"x" * 100_000, msgspec.msgpack.encode({"type": "x"})):
                answer = raw.ask(noise)
                assert isinstance(answer, Refused)
                assert not answer.fatal
            assert isinstance(raw.ask(b"a", b"b", b"c"), Refused)
            early = raw.ask(Begin("bad"))
            assert isinstance(early, Refused)
            assert early.fatal
            other = raw.ask(Hello(99, "from the future"))
            assert isinstance(other, Refused)
            assert "version 99" in other.reason
            assert isinstance(raw.hello(), Welcome)
            unasked = raw.ask(head(0, data), data)
            assert isinstance(unasked, Ack)
            assert (unasked.outcome, "turn" in unasked.reason) == ("refused", True)
            assert isinstance(raw.ask(Leave(end=True)), Left)  # ends nobody else's series
        with RawSender(receiver.address) as absurd:
            absurd.hello()
            absurd.say(head(0, data), bytes(8 << 20))  # the transport cuts it off
            assert absurd.quiet()
        pusher.push_array(pixels(1), 1)
        pusher.end()
        pusher.close()
        wait_for(lambda: receiver.bad)
        assert receiver.series == ["start good", "end good"]
        assert receiver.numbers == [0, 1]
        closed = receiver.latest()
        assert (closed["received"], closed["done"], closed["failed"]) == (2, 2, 0)
        assert "not understood" in receiver.source.describe()


def test_images_that_are_not_what_is_said_of_them(tmp_path: Path) -> None:
    data = pixels(0).tobytes()
    with Receiver(tmp_path, max_file_bytes=1000) as receiver, RawSender(receiver.address) as raw:
        raw.hello()
        raw.ask(Begin("scan"))

        def answer(number: int, sent: bytes | None = data, **said: Any) -> Ack:
            told = head(number, said.pop("of", data), **said)
            found = raw.ask(told) if sent is None else raw.ask(told, sent)
            assert isinstance(found, Ack)
            return found

        refused = [
            (answer(1, None), "no second part"),
            (answer(2, bytes(1001), of=bytes(1001)), "of 1001 bytes, the limit is 1000"),
            (answer(3, data[:-1] + b"\xff"), "arrived damaged"),
            (answer(4, position_um=(float("nan"),)), "position_um"),
            (answer(5, position_um=(1.0,) * 4), "position_um"),
            (answer(6, acquired=float("inf")), "acquired"),
            (answer(7, metadata={"a": "x" * 30_000}), "limit"),
        ]
        for ack, why in refused:
            assert ack.outcome == "refused"
            assert why in ack.reason
        failed = [
            (answer(10, data[:-2], of=data[:-2]), "needs 24 bytes"),
            (answer(11, shape=(3, 4, 1)), "3 dimensions"),
            (answer(12, shape=(-3, -4)), "-3 rows"),
            (answer(13, shape=(1 << 40, 1 << 40)), "limit"),
            (answer(14, dtype="O"), "pixel type"),
            (answer(15, dtype="(2,)u2"), "pixel type"),
            (answer(16, dtype="nonsense"), "pixel type"),
        ]
        for ack, why in failed:
            assert ack.outcome == "failed"
            assert why in ack.reason
        assert answer(20).outcome == "taken"
        assert answer(20).outcome == "held"
        total = receiver.totals()
        assert (total["received"], total["failed"], total["done"]) == (8, 7, 1)


def test_a_flood_harms_nobody_else(tmp_path: Path) -> None:
    stop = threading.Event()
    sent = [0]

    def flood(address: str) -> None:
        with RawSender(address) as raw:
            while not stop.is_set():
                if raw.socket.poll(20, 2):  # room to send; its answers are never read
                    raw.socket.send(b"\xc1 noise")
                    sent[0] += 1

    with Receiver(tmp_path) as receiver:
        flooding = threading.Thread(daemon=True, target=flood, args=(receiver.address,))
        flooding.start()
        wait_for(lambda: sent[0] > 500)
        good = push_arrays(receiver, "good", range(50))
        wait_for(lambda: sent[0] > 6000)
        more = push_arrays(receiver, "more", range(50))
        stop.set()
        flooding.join(LONG_S)
        assert good.counts["taken"] == more.counts["taken"] == 50
        wait_for(lambda: receiver.source._desk.unreadable > 500)
        assert 1 <= len(receiver.bad) < 60  # summed up, not one by one


def test_many_senders(tmp_path: Path) -> None:
    with Receiver(tmp_path) as receiver:
        crowd = [RawSender(receiver.address) for _ in range(70)]
        try:
            answers = [raw.hello() for raw in crowd]
            assert sum(isinstance(a, Welcome) for a in answers) == 64
            turned_away = [a for a in answers if isinstance(a, Refused)]
            assert len(turned_away) == 6
            assert "64 senders" in turned_away[0].reason
            with pytest.raises(PushError, match="64 senders"):
                push_arrays(receiver, "scan", range(1))
        finally:
            for raw in crowd:
                raw.__exit__()
        # Those who are gone make room.
        assert wait_for(lambda: _can_push(receiver))


def _can_push(receiver: Receiver) -> bool:
    try:
        return push_arrays(receiver, "scan", range(1)).counts["refused"] == 0
    except PushError:
        return False


def test_a_long_memory_comes_in_pieces(tmp_path: Path) -> None:
    with Receiver(tmp_path) as receiver:
        receiver.source._catalogue.add_series("push/scan/x", "scan", 0)
        series = receiver.ledger.open_series("s", "push/scan/x", 0, None, ("",), 0.0)
        for n in range(2500):
            receiver.source._catalogue.add("push/scan/x", n, n.to_bytes(16, "big"), "f")
            if n != 7:  # the catalogue is ahead of the accounts after a crash
                receiver.ledger.received(series, "", n)
        with RawSender(receiver.address) as raw:
            raw.hello()
            held: list[Held] = []
            answer = raw.ask(Begin("scan"))
            while not isinstance(answer, Begun):
                assert isinstance(answer, Held | Ping)
                held += [answer] if isinstance(answer, Held) else []
                answer = raw.answer()
            images = [image for some in held for image in some.images]
            assert [len(some.images) for some in held] == [1000, 1000, 499]
            assert [image.number for image in images] == [n for n in range(2500) if n != 7]
            assert all(image.current for image in images)
            assert answer.resumed


def test_what_answers_is_no_image_port(tmp_path: Path) -> None:
    import zmq

    with zmq.Context() as context, context.socket(zmq.PUB) as results, context.socket(zmq.ROUTER) as catch_up:
        ports = [socket.bind_to_random_port("tcp://127.0.0.1") for socket in (results, catch_up)]
        nobody = ImagePusher("tcp://127.0.0.1:1", patience_s=0.3)
        publisher = ImagePusher(f"tcp://127.0.0.1:{ports[0]}", patience_s=2.0)
        for pusher, why in ((nobody, "nothing answers at"), (publisher, "is no image port")):
            with pytest.raises(PushError, match=why):
                pusher.begin()
            pusher.close()
        other = ImagePusher(f"tcp://127.0.0.1:{ports[1]}", patience_s=3.0)

        def answer_json() -> None:
            if catch_up.poll(60_000):
                sender, *_ = catch_up.recv_multipart()
                catch_up.send_multipart([sender, b'{"status": "error"}'])

        answering = threading.Thread(daemon=True, target=answer_json)
        answering.start()
        with pytest.raises(PushError, match="is no image port"):
            other.begin()
        other.close()
        answering.join(LONG_S)
    with pytest.raises(ConfigError, match="expected an address"):
        ImagePusher("nonsense")


def test_an_address_in_use(tmp_path: Path) -> None:
    with Receiver(tmp_path) as receiver:
        (tmp_path / "b").mkdir()
        with pytest.raises(ConfigError, match=r"streams\.t\.source\.address: .* in use"):
            open_source(Config(address=receiver.address), "t", SourceContext(tmp_path / "b"))


def test_a_catalogue_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "push-t.sqlite").write_bytes(b"not a database" * 100)
    with pytest.raises(ConfigError, match=r"streams\.t\.source: the catalogue .* cannot be used"):
        open_source(Config(address="tcp://127.0.0.1:*"), "t", SourceContext(tmp_path))


@pytest.mark.parametrize(
    ("table", "why"),
    [
        ({"address": "ipc:///tmp/x"}, "address: expected tcp"),
        ({"address": "tcp://host:99999"}, "address"),
        ({"formats": ["hdf5"]}, "copy them here"),
        ({"formats": ["bmp"]}, "'bmp' is not one of tiff"),
        ({"window": 0}, "window"),
        ({"max_file_bytes": 0}, "max_file_bytes"),
        ({"read_timeout_s": 0.0}, "read_timeout_s"),
        ({"remember_days": -1.0}, "remember_days"),
        ({"adress": "x"}, "address"),
    ],
)
def test_configurations_that_cannot_be_used(table: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        convert(table, Config, "f: streams.s.source")


def test_a_pause_of_the_sender_says_who_is_in_the_way(tmp_path: Path) -> None:
    with (
        Receiver(tmp_path) as receiver,
        RawSender(receiver.address) as one,
        RawSender(receiver.address) as two,
    ):
        one.hello()
        two.hello()
        assert isinstance(one.ask(Begin("a")), Begun)
        assert two.ask(Begin("b")) == Busy("a", "raw", 1)
        assert two.ask(Leave(end=False)) == Left()
        assert isinstance(one.answer(), Ping)
        assert one.ask(Leave(end=True)) == Left()
        assert receiver.series == []  # nothing was sent

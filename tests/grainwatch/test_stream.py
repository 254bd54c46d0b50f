"""ResultStream against the real publisher: what is missed is brought back, or counted."""

from __future__ import annotations

import asyncio
import importlib.util
import logging
import signal
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeAlias

import msgspec
import numpy as np
import pytest
import zmq
from testkit.ports import free_ports
from testkit.process import LONG_S

from daemon.sinks import publisher
from daemon.sinks.base import Published, SinkContext
from daemon.sinks.message_ring import Sent
from daemon.sinks.simulator import (
    published,
    running,
    synthetic_health,
    synthetic_micrograph,
    synthetic_result,
)
from grainwatch import ResultStream
from grainwatch.config import ConfigError
from grainwatch.messages import AnyMessage, Health, LaueResult
from grainwatch.wire import Gap, StreamError, catch_up_address

UID = "5" * 32
Open: TypeAlias = Callable[..., Any]


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(3)


@pytest.fixture
def out(tmp_path: Path) -> Iterator[publisher.Publisher]:
    sink = open_publisher(tmp_path)
    yield sink
    sink.close()


@pytest.fixture
def open_stream(out: publisher.Publisher) -> Iterator[Open]:
    """Open a stream that is known to be connected: it has seen a message of health."""
    with ExitStack() as stack:

        def connect(**keys: Any) -> ResultStream:
            known = {"catch_up": out.catch_up_address, "timeout": 5.0}
            stream = stack.enter_context(ResultStream(out.results_address, **{**known, **keys}))
            deadline = time.monotonic() + LONG_S
            seq = (out._ring.issued() or (0, 0))[1]
            while stream._last_live is None and time.monotonic() < deadline:
                seq += 1
                out.handle([published(synthetic_health(seq, 0.0))])
                stream.next(0.05) if keys.get("since") is None else stream._pump(0.05)
            return stream

        yield connect


def open_publisher(folder: Path, **keys: Any) -> publisher.Publisher:
    known = {"results": "tcp://127.0.0.1:*", "catch_up": "tcp://127.0.0.1:*", "results_dir": str(folder)}
    return publisher.open_sink(publisher.Config(**{**known, **keys}), SinkContext("d", folder))


def results(rng: np.random.Generator, first: int, count: int, **keys: Any) -> list[LaueResult]:
    return [synthetic_result(n, rng, seq=first + n, series_uid=UID, **keys) for n in range(count)]


def send(out: publisher.Publisher, messages: Sequence[AnyMessage], lost: tuple[int, ...] = ()) -> None:
    """Publish; those whose seq is in `lost` do not make it to subscribers, as when a queue is full."""
    for message in messages:
        if message.seq in lost:
            event = published(message)
            out._ring.append(Sent.of(event.message, event.stream, event.payload))
        else:
            out.handle([published(message)])


def next_seq(out: publisher.Publisher) -> int:
    issued = out._ring.issued()
    assert issued is not None
    return issued[1] + 1


def changed(message: LaueResult, **keys: Any) -> LaueResult:
    return msgspec.structs.replace(message, **keys)


def test_gaps_are_filled_in_order(
    out: publisher.Publisher, open_stream: Open, rng: np.random.Generator
) -> None:
    stream = open_stream()
    begin = next_seq(out)
    sent = results(rng, begin, 60)
    send(out, sent, lost=(begin, begin + 5, begin + 6, *range(begin + 20, begin + 50)))
    assert stream.read(60) == sent
    assert stream.filled == 33
    assert (stream.lost, stream.gaps, stream.complete) == (0, [], True)


def test_what_nobody_can_bring_back_is_counted(
    out: publisher.Publisher, open_stream: Open, rng: np.random.Generator, caplog: pytest.LogCaptureFixture
) -> None:
    stream = open_stream()
    begin = next_seq(out)
    sent = results(rng, begin, 20)
    with caplog.at_level(logging.WARNING, "grainwatch.stream"):
        send(out, sent[:5] + sent[8:])  # three never reached the publisher: its edge dropped them
        assert stream.read(17) == sent[:5] + sent[8:]
    assert stream.lost == 3
    assert stream.gaps == [Gap(begin + 5, begin + 7, "not kept by the daemon")]
    assert not stream.complete
    assert "3 messages lost" in caplog.text


def test_a_silent_catch_up_holds_nothing_up_for_long(
    out: publisher.Publisher, open_stream: Open, rng: np.random.Generator
) -> None:
    with socket.socket() as nobody:  # bound and never read: connects, and does not answer
        nobody.bind(("127.0.0.1", 0))
        nobody.listen()
        address = f"tcp://127.0.0.1:{nobody.getsockname()[1]}"
        stream = open_stream(catch_up=address, fill_timeout=0.5)
        begin = next_seq(out)
        sent = results(rng, begin, 10)
        send(out, sent, lost=(begin + 4,))
        started = time.monotonic()
        assert stream.read(9) == sent[:4] + sent[5:]
        assert 0.4 < time.monotonic() - started < 20.0
        assert stream.gaps == [Gap(begin + 4, begin + 4, f"no answer from {address}")]
    without = open_stream(catch_up="")
    begin = next_seq(out)
    sent = results(rng, begin, 4)
    send(out, sent, lost=(begin + 1,))
    assert without.read(3) == [sent[0], *sent[2:]]
    assert without.gaps == [Gap(begin + 1, begin + 1, "there is no catch-up address")]


def test_a_catch_up_of_another_daemon_is_found_out(
    out: publisher.Publisher, open_stream: Open, rng: np.random.Generator, tmp_path: Path
) -> None:
    other = open_publisher(tmp_path / "other")
    stream = open_stream(catch_up=other.catch_up_address)
    begin = next_seq(out)
    sent = results(rng, begin, 4)
    send(out, sent, lost=(begin + 1, begin + 2))
    assert stream.read(2) == [sent[0], sent[3]]
    assert stream.lost == 2
    assert "belongs to a daemon" in stream.gaps[0].reason
    other.close()


def test_repeats_are_dropped_by_number_and_by_key(
    out: publisher.Publisher, open_stream: Open, rng: np.random.Generator
) -> None:
    stream = open_stream()
    begin = next_seq(out)
    sent = results(rng, begin, 6)
    anew = [
        changed(sent[2], seq=begin + 6, again=True),
        changed(results(rng, 0, 10)[9], seq=begin + 7, again=True),
    ]
    send(out, [*sent[:4], sent[3], *sent[4:], *anew])
    assert stream.read(7) == [*sent, anew[1]]  # frame 9 is a repeat of something that never came here
    assert stream.repeats == 2
    assert stream.lost == 0


def test_a_daemon_that_lost_its_state_numbers_anew(
    out: publisher.Publisher, open_stream: Open, rng: np.random.Generator
) -> None:
    stream = open_stream()
    high = results(rng, next_seq(out), 500)
    send(out, high)
    assert stream.read(500) == high
    out._ring._issued = None  # as a fresh daemon has it
    out._ring._sent.clear()
    low = results(rng, 1, 10)
    send(out, low, lost=(1, 2, 3))
    assert stream.read(10) == low
    assert stream.restarts == 1
    assert stream.lost == 0


def test_what_cannot_be_read_is_counted_and_skipped(
    out: publisher.Publisher, open_stream: Open, rng: np.random.Generator
) -> None:
    stream = open_stream()
    begin = next_seq(out)
    sent = results(rng, begin, 5)
    later = {"schema": "grainwatch.laue/9", "seq": begin + 2, "surprise": True}
    send(out, sent[:2])
    newer = Published("laue", sent[2], msgspec.msgpack.encode(later))
    out.handle([newer])
    out._socket.send_multipart([b"noise", b"\xc1garbage"])
    out._socket.send_multipart([b"one part"])
    out._socket.send_multipart([b"x", b"\x91" * 100_000])  # nested beyond any recursion
    send(out, sent[3:])
    assert stream.read(4) == [*sent[:2], *sent[3:]]
    assert stream.undecodable == 4
    assert stream.lost == 0


def test_streams_and_schemas_select(
    out: publisher.Publisher, open_stream: Open, rng: np.random.Generator
) -> None:
    everything = open_stream(schemas="all")
    health = open_stream(schemas=["grainwatch.health"])
    other = open_stream(streams=["other"])
    begin = next_seq(out)
    sent = results(rng, begin, 2)
    out.handle(
        [published(sent[0], "laue"), published(sent[1], "other"), published(synthetic_health(begin + 2, 1.0))]
    )
    assert other.read(1, 5.0) == [sent[1]]
    newest = everything.next(5.0)
    seen: list[AnyMessage] = []
    while newest is not None and newest.seq < begin + 2:
        seen.append(newest)
        newest = everything.next(5.0)
    assert seen[-2:] == sent
    assert isinstance(newest, Health)
    assert all(isinstance(m, Health) for m in health.read())
    with pytest.raises(
        ConfigError, match=r"schemas: 'grainwatch\.tea' is not known here; known: grainwatch\.laue/1"
    ):
        ResultStream(schemas="grainwatch.tea")


def test_late_joiners_begin_where_they_ask(
    out: publisher.Publisher, open_stream: Open, rng: np.random.Generator
) -> None:
    old = results(rng, 1, 400)
    send(out, old)
    start = open_stream(since="start")
    assert start.read(400) == old
    assert [m.seq for m in open_stream(since=390).read(11)] == list(range(390, 401))
    other = synthetic_result(0, rng, seq=450, series_uid="6" * 32)
    send(out, [other])
    assert open_stream(since="6" * 32).read(1) == [other]
    with pytest.raises(StreamError, match="no results of series 7777"):
        open_stream(since="7" * 32).next(5.0)
    beyond = open_stream(since=10**9)
    assert beyond.read(1, 0.3) == []
    last = synthetic_result(1, rng, seq=next_seq(out), series_uid="6" * 32)
    send(out, [last])
    assert beyond.read(1) == [last]  # numbers below what was asked for are not thrown away for ever
    for bad in (-1, "", 1.5, True):
        with pytest.raises(ConfigError, match="since: expected a sequence number"):
            ResultStream(since=bad)


def test_since_without_an_answer_says_so_and_goes_on(
    out: publisher.Publisher, open_stream: Open, rng: np.random.Generator
) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        nobody.listen()
        address = f"tcp://127.0.0.1:{nobody.getsockname()[1]}"
        stream = open_stream(catch_up=address, since="start", fill_timeout=0.3)
        with pytest.raises(StreamError, match=f"since 0 cannot be had: no answer from {address}"):
            stream.next(5.0)
        sent = results(rng, next_seq(out), 2)
        send(out, sent)
        assert stream.read(2) == sent


@pytest.mark.system
def test_the_daemon_is_killed_and_started_again(tmp_path: Path) -> None:
    results_at, catch_up_at = (f"tcp://127.0.0.1:{port}" for port in free_ports(2))
    addresses = ["--results", results_at, "--catch-up", catch_up_at, "--folder", str(tmp_path)]
    with ResultStream(
        results_at, catch_up_at, since="start", timeout=10.0
    ) as stream:  # before the daemon is there
        with running(*addresses, "--count", "100000", "--rate", "100") as simulator:
            before = stream.read(100, idle_s=10.0)
            simulator.process.send_signal(signal.SIGKILL)
            simulator.process.wait()
        before += stream.read(idle_s=0.3)
        # Numbers are reserved in blocks, so a restarted daemon jumps ahead.
        with running(*addresses, "--count", "50", "--rate", "1000", "--first-seq", "100001"):
            after = stream.read(50, idle_s=10.0)
    seqs = [m.seq for m in before + after]
    assert len(after) == 50
    assert seqs == sorted(set(seqs))
    assert len(before) >= 100
    assert [m.key.frame for m in before if isinstance(m, LaueResult)] == list(range(len(before)))
    assert stream.lost == 0


def test_async_iteration_and_a_cancelled_wait(
    out: publisher.Publisher, open_stream: Open, rng: np.random.Generator
) -> None:
    stream = open_stream(timeout=1.5)
    sent = results(rng, next_seq(out), 30)

    async def follow() -> list[AnyMessage]:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(anext(stream), 0.15)
        send(out, sent)
        async with stream:
            return [message async for message in stream]

    assert asyncio.run(follow()) == sent


def test_latest_passes_over_what_came_before(
    out: publisher.Publisher, open_stream: Open, rng: np.random.Generator
) -> None:
    stream = open_stream()
    assert stream.latest(0.05) is None
    sent = results(rng, next_seq(out), 20)
    send(out, sent)
    deadline = time.monotonic() + LONG_S
    newest = stream.latest(5.0)
    while newest != sent[-1] and time.monotonic() < deadline:
        newest = stream.latest(0.1)
    assert newest == sent[-1]
    assert stream.lost == 0


def test_to_dataframe(
    out: publisher.Publisher, open_stream: Open, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = results(rng, 1, 3, crystals=2)
    send(out, sent)
    stream = open_stream(since=1)
    table = stream.to_dataframe(count=3)
    assert table["frame"].tolist() == [0, 0, 1, 1, 2, 2]
    assert table["orientation_w"].tolist() == [c.quaternion[0] for r in sent for c in r.crystals]
    assert table["strain_xz"].iloc[0] == sent[0].crystals[0].strain_sample.numpy()[0, 2]
    assert table["ix"].tolist() == [0, 0, 1, 1, 2, 2]
    begin = next_seq(out)
    images = [synthetic_micrograph(n, rng, seq=begin + n, series_uid=UID) for n in range(2)]
    send(out, images)
    table = stream.to_dataframe(count=2, rows="micrographs")
    assert table["fraction"].tolist() == [m.morphology.fraction for m in images if m.morphology]
    assert table["novel"].tolist() == [False, False]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'grainwatch-client\[dataframe\]'"):
        stream.to_dataframe(count=1)


def test_addresses() -> None:
    assert catch_up_address("tcp://beamline.example:31100") == "tcp://beamline.example:31101"
    assert catch_up_address("tcp://[::1]:5") == "tcp://[::1]:6"
    assert catch_up_address("ipc:///run/results") == ""
    for keys in ({"address": "beamline:31100"}, {"catch_up": "nonsense"}):
        with pytest.raises(ConfigError, match="expected an address such as tcp://"):
            ResultStream(**keys)
    with pytest.raises(ConfigError, match="needs the catch-up address"):
        ResultStream("ipc:///tmp/nothing", since="start")


def test_closing_ends_an_iteration_and_leaves_nothing_open(out: publisher.Publisher) -> None:
    stream = ResultStream(out.results_address)
    stream.close()
    stream.close()
    assert list(stream) == []
    del stream
    abandoned = ResultStream(out.results_address)
    context = abandoned._context
    del abandoned  # as in `for result in ResultStream(...)`
    assert context.closed


def test_a_timeout_ends_the_iteration(out: publisher.Publisher) -> None:
    with ResultStream(out.results_address, timeout=0.2) as stream:
        begun = time.monotonic()
        assert list(stream) == []
        assert 0.15 < time.monotonic() - begun < 20.0


def test_a_subscriber_that_was_slow_loses_nothing(tmp_path: Path, rng: np.random.Generator) -> None:
    out = open_publisher(tmp_path, high_water_mark=5)
    with ResultStream(out.results_address, out.catch_up_address, since="start", timeout=5.0) as stream:
        stream._sub.setsockopt(zmq.RCVHWM, 5)  # takes effect at the next connection
        stream._sub.disconnect(out.results_address)
        stream._sub.connect(out.results_address)
        time.sleep(0.3)
        template = synthetic_result(0, rng, seq=0, series_uid=UID)
        sent = [changed(template, seq=n) for n in range(1, 3001)]
        send(out, sent)
        send(out, [changed(template, seq=3001)])
        got: list[AnyMessage] = []
        while len(got) < 3000 and (message := stream.next(5.0)) is not None:
            got.append(message)
        assert [m.seq for m in got] == list(range(1, 3001))
        assert stream.filled > 0
        assert stream.lost == 0
    out.close()

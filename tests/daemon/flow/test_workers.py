"""Workers that are real processes, and die in every way that a process can."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest
from testkit.process import LONG_S, alive, eventually

from daemon.flow.executor import Executor, Outcome
from daemon.flow.local import LocalExecutor
from daemon.flow.quarantine import Quarantine
from daemon.flow.workers import WorkersExecutor
from grainwatch.config import ConfigError, parse_config
from grainwatch.messages import FrameKey, LaueResult
from pipelines.frame import Failure, Frame, PlainImage
from pipelines.images import EncodedImage, encode_image

SUPPORT = Path(__file__).resolve().parents[2] / "support"
pytestmark = pytest.mark.system

WELL, KILL, SEGFAULT, EXIT, HANG, RAISE, BAD, KILL_ONCE = range(8)


@pytest.fixture(autouse=True)
def _plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(SUPPORT))
    monkeypatch.syspath_prepend(str(SUPPORT))


def configuration(scratch: Path, workers: int = 2, daemon: str = "", pipeline: str = "") -> bytes:
    return f"""
    [daemon]
    workers = {workers}
    compute_timeout_s = 2.0
    {daemon}
    [ring]
    slots = 6
    slot_bytes = 65536
    [streams.s]
    source.type = "testkit.sources"
    [streams.s.pipeline]
    type = "testkit.slow_pipeline"
    scratch = "{scratch}"
    {pipeline}
    """.encode()


def executor(scratch: Path, **options: object) -> WorkersExecutor:
    raw = configuration(scratch, **options)  # type: ignore[arg-type]
    config, _ = parse_config(raw, "test.toml")
    return WorkersExecutor(config, raw, "test.toml", Quarantine(scratch / "quarantine", 3))


@pytest.fixture
def two(tmp_path: Path) -> Iterator[WorkersExecutor]:
    workers = executor(tmp_path)
    workers.start()
    yield workers
    workers.close()


def frame(number: int, code: int = WELL, size: int = 20, **metadata: object) -> Frame:
    pixels = np.full((size, size), 2, np.uint16)
    pixels[0, 0] = code
    return Frame(FrameKey("s", "u" * 32, number), PlainImage(pixels), metadata=metadata)


def compute(workers: Executor, *frames: Frame) -> list[Outcome]:
    return workers.submit("s", list(frames)).result(timeout=LONG_S)


def reason(outcome: Outcome) -> str:
    assert isinstance(outcome, Failure)
    return outcome.reason


def test_frames_go_in_and_results_come_out_in_order(two: WorkersExecutor) -> None:
    futures: list[Future[list[Outcome]]] = []
    for n in range(0, 60, 3):
        while not two.free():
            time.sleep(0.001)
        futures.append(two.submit("s", [frame(k, size=10 + k) for k in range(n, n + 3)]))
    outcomes = [o for f in futures for o in f.result(LONG_S)]
    assert all(isinstance(o, LaueResult) for o in outcomes)
    assert [(o.key.frame, o.n_peaks) for o in outcomes if isinstance(o, LaueResult)] == [
        (n, 2 * (10 + n) ** 2 - 2) for n in range(60)
    ]
    assert len({o.flags for o in outcomes if isinstance(o, LaueResult)}) == 2
    assert two._ring.free() == 6


def test_compressed_images_are_decoded_by_the_worker(two: WorkersExecutor) -> None:
    pixels = np.arange(900, dtype=np.uint16).reshape(30, 30)
    blob = encode_image(pixels, "bslz4")
    good = EncodedImage(memoryview(blob), (30, 30), "<u2", "bslz4")
    torn = EncodedImage(memoryview(blob[:-9]), (30, 30), "<u2", "bslz4")
    outcomes = compute(two, *(Frame(FrameKey("s", "u", n), i) for n, i in enumerate((good, torn))))
    assert isinstance(outcomes[0], LaueResult)
    assert outcomes[0].n_peaks == pixels.sum()
    assert "truncated" in reason(outcomes[1])


@pytest.mark.parametrize(
    ("code", "how"),
    [(KILL, "SIGKILL"), (SEGFAULT, "SIGSEGV"), (EXIT, "exit status 7"), (HANG, "more than 2 s")],
)
def test_a_frame_that_kills_workers_fails_alone(
    two: WorkersExecutor, tmp_path: Path, code: int, how: str
) -> None:
    behind = two.submit("s", [frame(90), frame(91)])
    outcomes = compute(two, frame(1), frame(2, code), frame(3))
    assert isinstance(outcomes[0], LaueResult)
    assert isinstance(outcomes[2], LaueResult)
    assert "worker died" in reason(outcomes[1])
    assert how in reason(outcomes[1])
    assert all(isinstance(o, LaueResult) for o in behind.result(LONG_S))
    assert two.status().restarts == 2
    (kept,) = (tmp_path / "quarantine").glob("*.json")
    assert how in json.loads(kept.read_text())["reason"]
    pixels = np.frombuffer(kept.with_suffix(".bin").read_bytes(), "<u2").reshape(20, 20)
    assert (pixels[0, 0], pixels[1, 1]) == (code, 2)
    assert isinstance(compute(two, frame(4))[0], LaueResult)
    assert two._ring.free() == 6


def test_a_frame_whose_worker_died_by_chance_is_computed_once_more(two: WorkersExecutor) -> None:
    (outcome,) = compute(two, frame(1, KILL_ONCE))
    assert isinstance(outcome, LaueResult)
    assert two.status().restarts == 1


def test_a_worker_killed_from_outside_costs_no_frame(tmp_path: Path) -> None:
    workers = executor(tmp_path, pipeline="sleep_s = 0.02")
    workers.start()
    futures = []
    for n in range(40):
        while not workers.free():
            time.sleep(0.001)
        futures.append(workers.submit("s", [frame(n)]))
        if n in (10, 25):
            os.kill(workers.pids()[n % 2], signal.SIGKILL)
    assert all(isinstance(f.result(LONG_S)[0], LaueResult) for f in futures)
    assert workers.status().restarts == 2
    workers.close()


def test_the_quarantine_is_bounded(two: WorkersExecutor, tmp_path: Path) -> None:
    compute(two, *(frame(n, EXIT) for n in range(5)))
    assert len(list((tmp_path / "quarantine").glob("*.bin"))) == 3
    assert len(list((tmp_path / "quarantine").iterdir())) == 6


def test_what_a_frame_says_goes_wrong_stays_in_that_frame(two: WorkersExecutor) -> None:
    outcomes = compute(two, frame(0, BAD), frame(1, RAISE), frame(2))
    assert reason(outcomes[0]) == "the frame says it is bad"
    assert reason(outcomes[1]) == "pipeline error: RuntimeError: the frame says so"
    assert isinstance(outcomes[2], LaueResult)
    assert two.status().restarts == 0


def test_frames_that_cannot_travel_fail_with_the_reason(two: WorkersExecutor) -> None:
    outcomes = compute(
        two,
        frame(0, size=400),
        frame(1, strange=object()),
        frame(2, much="x" * 100_000),
        frame(3, exposure_s=np.float32(0.5), mask=np.zeros(3)),
    )
    assert "raise ring.slot_bytes" in reason(outcomes[0])
    assert "object cannot travel" in reason(outcomes[1])
    assert "metadata take 100" in reason(outcomes[2])
    assert isinstance(outcomes[3], LaueResult)
    assert two._ring.free() == 6


def test_a_batch_larger_than_the_ring_is_computed_in_parts(two: WorkersExecutor) -> None:
    outcomes = compute(two, *(frame(n) for n in range(50)))
    assert [o.key.frame for o in outcomes if isinstance(o, LaueResult)] == list(range(50))


def test_a_configuration_that_a_worker_refuses_is_told_at_the_start(tmp_path: Path) -> None:
    workers = executor(tmp_path, pipeline='broken = "config"')
    with pytest.raises(ConfigError, match=r"streams\.s\.pipeline\.broken"):
        workers.start()


def test_workers_that_die_before_they_are_warm_are_not_started_for_ever(tmp_path: Path) -> None:
    workers = executor(tmp_path, workers=1, pipeline='broken = "die"')
    with pytest.raises(ConfigError, match=r"keeps dying before it is warm \(exit status 9"):
        workers.start()
    assert workers.pids() == []


def test_workers_that_the_system_does_not_start_are_not_waited_for_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("daemon.flow.workers.BACKOFF_S", (0.1, 0.1))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "nothing"))
    with pytest.raises(ConfigError, match=r"worker 0 cannot be started: .*No such file"):
        executor(tmp_path, workers=1).start()


def test_a_worker_that_hangs_while_it_gets_ready_is_killed_and_not_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("daemon.flow.workers.BACKOFF_S", (0.1, 0.1))
    workers = executor(tmp_path, workers=1, daemon="start_timeout_s = 0.5", pipeline='broken = "slow"')
    with pytest.raises(ConfigError, match=r"was not ready 0\.5 s after its start; killed"):
        workers.start()
    assert workers.pids() == []


def test_workers_that_are_closed_before_they_start_do_not_start(tmp_path: Path) -> None:
    workers = executor(tmp_path)
    workers.close()
    with pytest.raises(ConfigError, match="stopped before the workers were warm"):
        workers.start()
    assert workers.pids() == []


def test_closing_from_two_threads_closes_once(two: WorkersExecutor) -> None:
    hanging = two.submit("s", [frame(0, HANG)])  # both wait for it
    closers = [threading.Thread(target=two.close) for _ in range(2)]
    raised: list[threading.ExceptHookArgs] = []
    threading.excepthook, hook = raised.append, threading.excepthook
    try:
        for closer in closers:
            closer.start()
        for closer in closers:
            closer.join(LONG_S)
    finally:
        threading.excepthook = hook
    assert raised == []
    assert isinstance(hanging.result(0)[0], Failure)


def test_a_stop_leaves_no_process_and_no_open_future(tmp_path: Path) -> None:
    workers = executor(tmp_path, daemon="", pipeline="")
    workers.start()
    pids = workers.pids()
    hanging = workers.submit("s", [frame(0, HANG)])
    begin = time.monotonic()
    workers.close()
    assert time.monotonic() - begin < 30.0  # it hangs for 600 s
    assert isinstance(hanging.result(0)[0], Failure)
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


_FRONT = """
import sys, time
sys.path.insert(0, {tests!r})
from pathlib import Path
import numpy as np
from daemon.flow.quarantine import Quarantine
from daemon.flow.workers import WorkersExecutor
from grainwatch.config import parse_config
from grainwatch.messages import FrameKey
from pipelines.frame import Frame, PlainImage
raw = Path(sys.argv[1]).read_bytes()
workers = WorkersExecutor(parse_config(raw, "x")[0], raw, "x", Quarantine(Path("."), 0))
workers.start()
pixels = np.zeros((9, 9), np.uint16)
pixels[0, 0] = 4  # hangs, holding the interpreter lock
workers.submit("s", [Frame(FrameKey("s", "u", 0), PlainImage(pixels))])
time.sleep(0.3)
print(*workers.pids(), flush=True)
time.sleep(60)
"""


def test_workers_go_with_a_front_that_is_killed_even_when_stuck(tmp_path: Path) -> None:
    config = tmp_path / "c.toml"
    config.write_bytes(configuration(tmp_path).replace(b"compute_timeout_s = 2.0", b"compute_timeout_s = 60"))
    front = subprocess.Popen(
        [sys.executable, "-c", _FRONT.format(tests=str(SUPPORT)), str(config)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert front.stdout is not None
    assert front.stderr is not None
    pids = [int(p) for p in front.stdout.readline().split()]
    assert len(pids) == 2
    mapped = Path(f"/proc/{pids[0]}/maps").read_text()
    assert "grainwatch-ring" in mapped
    front.kill()
    _, said = front.communicate()
    eventually(lambda: not any(map(alive, pids)), message="a worker outlives its front")
    assert said == ""  # no complaint about leaked memory either


def test_workers_compute_on_one_core_each(two: WorkersExecutor) -> None:
    environ = Path(f"/proc/{two.pids()[0]}/environ").read_bytes()
    for pool in (b"OMP", b"OPENBLAS", b"NUMBA"):
        assert pool + b"_NUM_THREADS=1" in environ


def test_the_local_executor_gives_the_same_answers(tmp_path: Path) -> None:
    config, config_hash = parse_config(configuration(tmp_path, workers=0), "test.toml")
    local = LocalExecutor(config, config_hash, "test.toml")
    local.start()
    outcomes = compute(local, frame(0), frame(1, BAD), frame(2, RAISE), frame(3))
    assert isinstance(outcomes[0], LaueResult)
    assert outcomes[0].n_peaks == 2 * 400 - 2
    assert outcomes[0].compute_ms > 0
    assert reason(outcomes[1]) == "the frame says it is bad"
    assert "RuntimeError" in reason(outcomes[2])
    assert isinstance(outcomes[3], LaueResult)
    local.close()


def test_who_submits_to_a_closed_executor_is_told(tmp_path: Path) -> None:
    """A shadow may be taken down between the look for room and the frame."""
    workers = executor(tmp_path, workers=1)
    workers.start()
    workers.close()
    assert workers.free() == 0
    assert reason(compute(workers, frame(1))[0]) == "the daemon stopped before it was computed"


def test_what_is_put_while_it_is_closed_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    workers = executor(tmp_path, workers=1)
    workers.start()
    put = workers._ring.put

    def put_and_close(data: memoryview) -> int | None:
        slot = put(data)
        workers.close()
        return slot

    monkeypatch.setattr(workers._ring, "put", put_and_close)
    assert reason(compute(workers, frame(1))[0]) == "the daemon stopped before it was computed"


def test_what_is_given_up_fails_as_a_fault_that_another_can_make_good(tmp_path: Path) -> None:
    workers = executor(tmp_path, workers=1, pipeline="sleep_s = 0.5")
    workers.start()
    futures = [workers.submit("s", [frame(n)]) for n in range(4)]
    workers.give_up("something better came")
    outcomes = [f.result(LONG_S)[0] for f in futures]
    workers.close()
    failed = [o for o in outcomes if isinstance(o, Failure)]
    assert all(isinstance(o, LaueResult) for o in outcomes[:2])  # in the worker's hands
    assert [(o.reason, o.fault) for o in failed] == [("something better came", True)] * 2

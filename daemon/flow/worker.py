"""A worker process: builds the pipelines, computes what it is sent, and dies with its front.

Started as ``python -m daemon.flow.worker TASKS LIFELINE RING`` with three inherited descriptors.
"""

from __future__ import annotations

import faulthandler
import fcntl
import logging
import os
import select
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.connection import Connection

from daemon.flow.compute import compute
from daemon.flow.executor import Outcome
from daemon.flow.plugins import build_pipelines, engines_of
from daemon.flow.ring import RingView
from daemon.flow.transport import (
    Done,
    Fatal,
    FrameTask,
    Ready,
    Setup,
    Task,
    answer_of,
    frame_of,
    pack,
    read_in_worker,
)
from daemon.logs import configure_logging
from grainwatch.config import ConfigError, parse_config
from pipelines.frame import BadFrame, Failure, Frame, Pipeline

log = logging.getLogger(__name__)


def main(arguments: Sequence[str]) -> int:
    """Serve until the front closes the connection."""
    tasks_fd, lifeline_fd, ring_fd = (int(a) for a in arguments)
    _die_with_front(lifeline_fd)
    # A terminal's Ctrl-C and systemd's SIGTERM reach the whole group; the front decides when to stop.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    faulthandler.enable()
    # A closed terminal and a reload reach the group as well.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    configure_logging(f"worker {os.getpid()}")
    connection = Connection(tasks_fd)
    try:
        _serve(connection, ring_fd)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        # The front closed its end: the ordinary way to stop.
        return 0
    return 1


def _serve(connection: Connection, ring_fd: int) -> None:
    setup = read_in_worker(connection.recv_bytes())
    if not isinstance(setup, Setup):
        raise TypeError(f"the first message is a {type(setup).__name__}, expected a Setup")
    ring = RingView(ring_fd, setup.slots, setup.slot_bytes)
    try:
        config, config_hash = parse_config(setup.config, setup.where)
        pipelines = build_pipelines(config, config_hash, setup.where, setup.models)
    except ConfigError as error:
        connection.send_bytes(pack(Fatal(str(error))))
        return
    except Exception as error:
        log.exception("the pipelines cannot be built")
        connection.send_bytes(pack(Fatal(f"the pipelines cannot be built: {type(error).__name__}: {error}")))
        return
    if setup.background:
        # The cores are its own only while nobody else has work for them. Not before it is warm: on cores
        # that are never idle it would not get so, and what waits for that would wait with it.
        with suppress(OSError):  # a sandbox may forbid it; then it takes its share
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    engines = engines_of(pipelines)
    connection.send_bytes(pack(Ready(engines)))
    while True:
        task = read_in_worker(connection.recv_bytes())
        if not isinstance(task, Task):
            raise TypeError(f"a {type(task).__name__} came, expected a Task")
        outcomes = _run(pipelines[task.stream], task.frames, ring)
        now = engines_of(pipelines)
        connection.send_bytes(pack(Done([answer_of(o) for o in outcomes], None if now == engines else now)))
        engines = now


def _run(pipeline: Pipeline, tasks: Sequence[FrameTask], ring: RingView) -> list[Outcome]:
    outcomes: dict[int, Outcome] = {}
    frames: dict[int, Frame] = {}
    for at, task in enumerate(tasks):
        try:
            frames[at] = frame_of(task, ring.view(task.slot, task.nbytes))
        except BadFrame as error:
            outcomes[at] = Failure(task.key, str(error))
    if frames:
        outcomes.update(zip(frames, compute(pipeline, list(frames.values())), strict=True))
    return [outcomes[at] for at in range(len(tasks))]


def _die_with_front(fd: int) -> None:
    """Have the kernel end this process when the other end of `fd`, which the front holds, closes.

    SIGIO ends a process by default. No thread could do the same: one that waits for the pipe does
    not run while a long call holds the interpreter lock.
    """
    fcntl.fcntl(fd, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | os.O_ASYNC)
    gone = select.poll()
    gone.register(fd, select.POLLIN)
    if gone.poll(0):  # it closed before the signal was asked for
        os._exit(1)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

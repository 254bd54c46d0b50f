"""The daemon's own state."""

from __future__ import annotations

from typing import ClassVar

import msgspec

from grainwatch.messages.common import Message


class StreamHealth(msgspec.Struct, frozen=True):
    """Counters of one stream since the daemon started; received = the sum of all states.

    `watch` says in words what the stream's drift watch knows; "" without one.
    """

    stream: str
    state: str
    series_uid: str
    received: int
    done: int
    failed: int
    dropped: int
    lost: int
    missing: int
    in_flight: int
    rate_hz: float
    latency_p50_s: float
    latency_p99_s: float
    last_error: str = ""
    watch: str = ""


class EdgeHealth(msgspec.Struct, frozen=True):
    """A bounded edge: how full, how many items went through, how many its policy dropped."""

    edge: str
    policy: str
    depth: int
    filled: int
    passed: int
    dropped: int


class Health(Message, frozen=True, tag="grainwatch.health/1", kw_only=True):
    """The daemon's own state, published once a second."""

    SCHEMA: ClassVar[str] = "grainwatch.health/1"

    name: str
    version: str
    state: str  # "starting" | "running" | "draining" | "fault"
    uptime_s: float
    workers: int
    worker_restarts: int
    streams: tuple[StreamHealth, ...] = ()
    edges: tuple[EdgeHealth, ...] = ()

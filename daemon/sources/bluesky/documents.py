"""From documents to events of the flow: which run, which descriptor, which frames.

Only what is used of a document is looked at: whole schemas take longer than a frame. What cannot be
used becomes a `Bad` that names the document and says why; nothing is raised.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from daemon.sources.base import Bad, Event
from daemon.sources.bluesky.assets import Asset, asset, datum_number, mapping, stream_asset
from daemon.sources.bluesky.framing import Document
from daemon.sources.bluesky.paths import Places
from daemon.sources.bluesky.run import MOST_PER_EVENT, Descriptor, Run, Span, joined_of
from daemon.sources.bluesky.scan import um_per
from daemon.sources.fields import need, shown, text, whole
from pipelines.frame import BadFrame

log = logging.getLogger(__name__)

#: Runs that still wait for files beside those that are open; fewer than series that a stream may open.
MOST_DRAINING: Final = 4
#: Runs that ended, whose late documents are told apart from those of unknown runs.
REMEMBERED: Final = 16
#: Descriptors, resources and datums of one run.
MOST_KNOWN: Final = 100_000
#: Events of one stream_datum.
MOST_EVENTS: Final = 50_000
#: Frames of one stream_datum, which may have to fail all at once.
MOST_FRAMES: Final = 500_000

_MID_RUN: Final = "(subscribed in mid-run, or documents were lost)"


@dataclass(frozen=True, slots=True)
class Rules:
    """What the configuration says about documents; see `daemon.sources.bluesky.Config`."""

    stream: str = "primary"
    image_key: str = ""
    position_unit: str = ""
    open_runs: int = 2
    position_wait_s: float = 5.0
    asset_wait_s: float = 30.0
    places: Places = field(default_factory=Places)


@dataclass(slots=True)
class _Resource:
    """Files that documents speak of. `fault` says why they are not read."""

    run: Run
    asset: Asset | None
    fault: str = ""
    data_key: str = ""
    per_event: int = 1


class Documents:
    """Takes documents one by one. What it knows ends with its runs; `name` leads the log."""

    def __init__(self, rules: Rules, name: str = "") -> None:
        self._rules = rules
        self._name = name
        self._runs: dict[str, Run] = {}
        self._ended: deque[Run] = deque()
        self._descriptors: dict[str, Descriptor] = {}
        self._resources: dict[str, _Resource] = {}
        self._datums: dict[str, tuple[_Resource, int]] = {}
        self._unresolved: dict[str, tuple[Descriptor, int]] = {}
        self._take: Mapping[str, Callable[[Mapping[str, Any], float], list[Event]]] = {
            "start": self._start,
            "descriptor": self._descriptor,
            "event": self._event,
            "event_page": self._event_page,
            "resource": self._resource,
            "datum": self._datum,
            "datum_page": self._datum_page,
            "stream_resource": self._stream_resource,
            "stream_datum": self._stream_datum,
            "stop": self._stop,
        }

    @property
    def open_runs(self) -> int:
        """How many runs are under way."""
        return sum(not run.stopped for run in self._runs.values())

    @property
    def waiting(self) -> int:
        """How many documents wait for the files of their frames."""
        return sum(run.waiting for run in self._runs.values())

    def take(self, document: Document, now: float) -> list[Event]:
        """Return what a document says. `now` is monotonic seconds."""
        try:
            return self._take[document.name](document.body, now)
        except BadFrame as error:
            return [Bad(str(error))]
        except RecursionError:
            return [Bad(f"{document.name}: the document is nested too deeply")]

    def due(self, now: float, most: int) -> list[Event]:
        """Return frames whose file and position are there by now, and the ends of runs that have all.

        Parameters
        ----------
        most : int
            About so many frames of each run: there may be more to have.
        """
        rules = self._rules
        found: list[Event] = []
        for run in list(self._runs.values()):
            found += run.due(now, rules.position_wait_s, rules.asset_wait_s, most)
            if run.stopped and not run.waiting:
                found += self._end(run)
        return found

    # Runs.

    def _start(self, body: Mapping[str, Any], now: float) -> list[Event]:
        uid = text(body, "uid", "start")
        if uid in self._runs or any(run.uid == uid for run in self._ended):
            raise BadFrame(f"start of run {uid} came again (is the publisher subscribed twice?)")
        events: list[Event] = []
        under_way = sorted((r for r in self._runs.values() if not r.stopped), key=lambda r: r.heard_at)
        for run in under_way[: max(0, len(under_way) - self._rules.open_runs + 1)]:
            log.warning(
                "%s: run %s: no stop document came, and run %s starts: closing it", self._name, run.uid, uid
            )
            run.stop(None)
        draining = [r for r in self._runs.values() if r.stopped]
        for run in draining[: max(0, len(draining) - MOST_DRAINING)]:
            if run.waiting:
                events.append(Bad(f"run {run.uid}: given up with {run.waiting} documents of frames waiting"))
            events += self._end(run)
        self._runs[uid] = Run(uid, body, self._rules.stream, now)
        plan = body.get("plan_name", "no plan name")
        log.info("%s: run %s starts: %s, scan %s", self._name, uid, shown(plan), shown(body.get("scan_id")))
        return events

    def _stop(self, body: Mapping[str, Any], now: float) -> list[Event]:
        run = self._run_of(text(body, "run_start", "stop"), "stop", now)
        if run.stopped:
            raise BadFrame(f"stop of run {run.uid} came again")
        counts = body.get("num_events")
        known = counts.get(self._rules.stream) if isinstance(counts, Mapping) else None
        known = known if type(known) is int and 0 <= known < 1 << 40 else None
        run.stop(known)
        status, reason = _word(body.get("exit_status")), _word(body.get("reason"))
        if status != "success":
            log.warning("%s: run %s ended by %s: %r", self._name, run.uid, shown(status), reason[:200])
        lost: list[Event] = []
        for datum, (descriptor, seq_num) in list(self._unresolved.items()):
            if descriptor.run is run:
                del self._unresolved[datum]
                lost += run.fail(descriptor, seq_num, f"datum {shown(datum)} of its frame did not come")
        described = next((d for d in self._descriptors.values() if d.run is run and d.image), None)
        if described is not None and known and not run.opened:
            return run.open(described, described.per_event) + lost  # of whose frames none came
        return lost

    def _end(self, run: Run) -> list[Event]:
        events = run.end()
        self._runs.pop(run.uid, None)
        self._ended.append(run)
        if len(self._ended) > REMEMBERED:
            old = self._ended.popleft()
            self._descriptors = {k: d for k, d in self._descriptors.items() if d.run is not old}
        for resource in self._resources.values():
            if resource.run is run and resource.asset is not None:
                resource.asset.close()
        self._resources = {k: r for k, r in self._resources.items() if r.run is not run}
        self._datums = {k: d for k, d in self._datums.items() if d[0].run is not run}
        self._unresolved = {k: u for k, u in self._unresolved.items() if u[0].run is not run}
        return events

    def _run_of(self, uid: str, what: str, now: float) -> Run:
        run = self._runs.get(uid)
        if run is None:
            if any(ended.uid == uid for ended in self._ended):
                raise BadFrame(f"{what} of run {uid}, which has ended")
            raise BadFrame(f"{what} of run {uid}, whose start did not come {_MID_RUN}")
        run.heard_at = now
        return run

    # Descriptors and events.

    def _descriptor(self, body: Mapping[str, Any], now: float) -> list[Event]:
        uid = text(body, "uid", "descriptor")
        run = self._run_of(text(body, "run_start", "descriptor"), "descriptor", now)
        if uid in self._descriptors:
            raise BadFrame(f"descriptor {uid} came again")
        if len(self._descriptors) >= MOST_KNOWN:
            raise BadFrame(f"more than {MOST_KNOWN} descriptors")
        self._descriptors[uid] = Descriptor(run)  # its events are known also when it is of no use
        if _word(body.get("name")) != self._rules.stream:
            return []
        keys = mapping(body, "data_keys", "descriptor")
        image = self._image_key(keys)
        if not image:
            return []
        key = keys[image]
        shape = _shape(key)
        external = _word(key.get("external"))
        fields = run.fields if all(_brought(keys.get(f)) for f in run.fields) else ()
        pixel_type = key.get("dtype_numpy")
        self._descriptors[uid] = Descriptor(
            run,
            image,
            external.startswith("STREAM"),
            fields,
            tuple(um_per(_word(keys[f].get("units")) or self._rules.position_unit) for f in fields),
            shape[0] if len(shape) == 3 and 0 < shape[0] <= MOST_PER_EVENT else 1,
            pixel_type if isinstance(pixel_type, str) and pixel_type[1:] in _PIXEL_TYPES else "",
        )
        return []

    def _image_key(self, keys: Mapping[str, Any]) -> str:
        """Return the data key of the images: the one that is configured, or the only one that can be."""
        wanted = self._rules.image_key
        if wanted:
            if not isinstance(keys.get(wanted), Mapping):
                there = ", ".join(shown(key) for key in list(keys)[:20])
                raise BadFrame(f"descriptor: image_key {wanted!r} is none of its data keys: {there}")
            return wanted
        found = [name for name, key in keys.items() if sum(n > 1 for n in _shape(key)) >= 2]
        if len(found) > 1:
            raise BadFrame(
                f"descriptor: {', '.join(map(shown, found[:8]))} are images: say which in image_key"
            )
        return found[0] if found else ""

    def _event(self, body: Mapping[str, Any], now: float) -> list[Event]:
        seq_num = whole(body, "seq_num", "event")
        data = mapping(body, "data", f"event {seq_num}")
        descriptor = self._described(text(body, "descriptor", f"event {seq_num}"), f"event {seq_num}", now)
        if descriptor.run.over:
            reason = f"event {seq_num} of run {descriptor.run.uid} came after the end of the run"
            return [Bad(reason, descriptor.run.uid, seq_num)]
        if not descriptor.image:
            return []
        return self._frames(descriptor, seq_num, data, body.get("timestamps"), body.get("time"), now)

    def _frames(
        self,
        descriptor: Descriptor,
        seq_num: int,
        data: Mapping[str, Any],
        timestamps: Any,
        taken: Any,
        now: float,
    ) -> list[Event]:
        run, image = descriptor.run, data.get(descriptor.image)
        joined = joined_of(descriptor, data, timestamps, taken)
        if not 1 <= seq_num < 1 << 40:
            raise BadFrame(f"event {seq_num}: events are counted from 1")
        if image is None:
            if not descriptor.external:
                return run.fail(descriptor, seq_num, f"event {seq_num} has no image {descriptor.image!r}")
            run.join(seq_num, joined)
            return []
        if not isinstance(image, str):
            return run.inline(descriptor, seq_num, image, joined)
        run.join(seq_num, joined)
        datum = self._datums.pop(image, None)
        if datum is not None:
            return self._in_files(descriptor, seq_num, datum, now)
        if len(self._unresolved) >= MOST_KNOWN:
            raise BadFrame(f"event {seq_num}: more than {MOST_KNOWN} events wait for their datum")
        self._unresolved[image] = (descriptor, seq_num)
        return []

    def _event_page(self, body: Mapping[str, Any], now: float) -> list[Event]:
        numbers = _column(need(body, "seq_num", "event_page"), "event_page: seq_num")
        data = mapping(body, "data", "event_page")
        times, stamps = body.get("time"), body.get("timestamps")
        stamps = stamps if isinstance(stamps, Mapping) else {}
        columns = {key: _column(values, f"event_page: {shown(key)}") for key, values in data.items()}
        if any(len(values) != len(numbers) for values in columns.values()):
            raise BadFrame("event_page: its columns are not of one length")
        events: list[Event] = []
        for row, seq_num in enumerate(numbers):
            one = {
                "descriptor": body.get("descriptor"),
                "seq_num": int(seq_num) if isinstance(seq_num, np.integer) else seq_num,
                "data": {key: values[row] for key, values in columns.items()},
                "time": _row(times, row),
                "timestamps": {key: _row(values, row) for key, values in stamps.items()},
            }
            events += self.take(Document("event", one), now)
        return events

    def _described(self, uid: str, what: str, now: float) -> Descriptor:
        descriptor = self._descriptors.get(uid)
        if descriptor is None:
            raise BadFrame(f"{what}: its descriptor {uid} did not come {_MID_RUN}")
        descriptor.run.heard_at = now
        return descriptor

    # Frames in files.

    def _stream_resource(self, body: Mapping[str, Any], now: float) -> list[Event]:
        uid = text(body, "uid", "stream_resource")
        run = self._run_of(text(body, "run_start", "stream_resource"), "stream_resource", now)
        self._check_new(uid, "stream_resource")
        found = _Resource(run, None, data_key=text(body, "data_key", "stream_resource"))
        try:
            found.asset = stream_asset(self._rules.places, body)
        except BadFrame as error:
            # Its frames fail with the reason, if it has any: it may be no image.
            found.fault = str(error)
        self._resources[uid] = found
        return []

    def _stream_datum(self, body: Mapping[str, Any], now: float) -> list[Event]:
        uid = text(body, "stream_resource", "stream_datum")
        descriptor = self._described(text(body, "descriptor", "stream_datum"), "stream_datum", now)
        run = descriptor.run
        if not descriptor.image:
            return []
        first, stop = _range(body, "indices")
        seq_num, seq_stop = _range(body, "seq_nums")
        if seq_stop - seq_num != stop - first:
            seq_num = first + 1  # a detector that does not know the events counts its own
        seq_num = max(seq_num, 1)
        if run.over:
            raise BadFrame(f"stream_datum of run {run.uid}, which has ended")
        resource = self._resources.get(uid)
        if resource is None:
            raise BadFrame(
                f"stream_datum of events {seq_num} on: its stream_resource {uid} did not come {_MID_RUN}"
            )
        if resource.data_key != descriptor.image:
            return []
        if (stop - first) * descriptor.per_event > MOST_FRAMES:
            raise BadFrame(f"stream_datum of more than {MOST_FRAMES} frames")
        if resource.asset is None:
            numbers = range(seq_num, seq_num + stop - first)
            return [bad for n in numbers for bad in run.fail(descriptor, n, resource.fault)]
        per_event = descriptor.per_event
        span = Span(descriptor, resource.asset, first * per_event, seq_num, stop - first, per_event, now)
        run.await_files(uid, span)
        return []

    def _resource(self, body: Mapping[str, Any], now: float) -> list[Event]:
        uid = text(body, "uid", "resource")
        self._check_new(uid, "resource")
        found = _Resource(self._owner(body, now), None)
        try:
            found.asset, found.per_event = asset(self._rules.places, body)
        except BadFrame as error:
            found.fault = str(error)
        self._resources[uid] = found
        return []

    def _owner(self, body: Mapping[str, Any], now: float) -> Run:
        """Return the run of a resource; older writers do not say it, which does while there is one only."""
        if "run_start" in body:
            return self._run_of(text(body, "run_start", "resource"), "resource", now)
        runs = [run for run in self._runs.values() if not run.stopped]
        if len(runs) != 1:
            raise BadFrame(f"resource does not say its run, and {len(runs)} are open")
        return runs[0]

    def _datum(self, body: Mapping[str, Any], now: float) -> list[Event]:
        name = text(body, "datum_id", "datum")
        resource = self._resources.get(text(body, "resource", "datum"))
        if resource is None:
            raise BadFrame(f"datum {name}: its resource did not come {_MID_RUN}")
        found = (resource, datum_number(body))
        waiting = self._unresolved.pop(name, None)
        if waiting is not None:
            return self._in_files(*waiting, found, now)
        if name in self._datums:
            raise BadFrame(f"datum {name} came again")
        if len(self._datums) >= MOST_KNOWN:
            raise BadFrame(f"datum {name}: more than {MOST_KNOWN} wait for their event")
        self._datums[name] = found
        return []

    def _datum_page(self, body: Mapping[str, Any], now: float) -> list[Event]:
        names = _column(need(body, "datum_id", "datum_page"), "datum_page: datum_id")
        kwargs = mapping(body, "datum_kwargs", "datum_page")
        columns = {key: _column(values, f"datum_page: {shown(key)}") for key, values in kwargs.items()}
        if any(len(values) != len(names) for values in columns.values()):
            raise BadFrame("datum_page: its columns are not of one length")
        events: list[Event] = []
        for row, name in enumerate(names):
            one = {key: _row(values, row) for key, values in columns.items()}
            datum = {"datum_id": name, "resource": body.get("resource"), "datum_kwargs": one}
            events += self.take(Document("datum", datum), now)
        return events

    def _in_files(
        self, descriptor: Descriptor, seq_num: int, datum: tuple[_Resource, int], now: float
    ) -> list[Event]:
        resource, point = datum
        if resource.asset is None:
            return descriptor.run.fail(descriptor, seq_num, resource.fault)
        n = resource.per_event
        span = Span(descriptor, resource.asset, point * n, seq_num, 1, n, now)
        descriptor.run.await_files(f"resource {id(resource)}", span)
        return []

    def _check_new(self, uid: str, what: str) -> None:
        if uid in self._resources:
            raise BadFrame(f"{what} {uid} came again")
        if len(self._resources) >= MOST_KNOWN:
            raise BadFrame(f"more than {MOST_KNOWN} resources")


_PIXEL_TYPES: Final = frozenset({"u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8", "f2", "f4", "f8"})


def _shape(key: Any) -> list[int]:
    """Return the shape of a data key, empty where it is none."""
    shape = key.get("shape") if isinstance(key, Mapping) else None
    if not isinstance(shape, list | tuple) or not all(type(n) is int for n in shape):
        return []
    return list(shape)


def _brought(key: Any) -> bool:
    """Say whether the events themselves bring a data key."""
    return isinstance(key, Mapping) and not _word(key.get("external"))


def _word(value: Any) -> str:
    """Return a text, empty where it is none."""
    return value if isinstance(value, str) else ""


def _range(body: Mapping[str, Any], key: str) -> tuple[int, int]:
    """Return the half-open range of a stream_datum."""
    found = mapping(body, key, "stream_datum")
    start, stop = whole(found, "start", f"stream_datum: {key}"), whole(found, "stop", f"stream_datum: {key}")
    if not start <= stop <= start + MOST_EVENTS or stop >= 1 << 40:
        raise BadFrame(f"stream_datum: {key}: {start} to {stop} is no range")
    return start, stop


def _column(values: Any, where: str) -> Sequence[Any]:
    is_array = isinstance(values, np.ndarray) and values.ndim > 0
    if not is_array and not isinstance(values, list | tuple):
        raise BadFrame(f"{where}: expected a list, got {shown(values)}")
    if len(values) > MOST_EVENTS:
        raise BadFrame(f"{where}: {len(values)} rows, the limit is {MOST_EVENTS}")
    return list(values) if is_array else values


def _row(values: Any, row: int) -> Any:
    """Return one row of a column that may be missing."""
    there = isinstance(values, list | tuple | np.ndarray) and row < len(values)
    value = values[row] if there else None
    return value.item() if isinstance(value, np.generic) else value

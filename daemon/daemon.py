"""The daemon: sources, flow, workers, ledger, sinks and control put together, run and reconfigured."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, wait
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TypeVar

import msgspec
import zmq

from daemon.changes import Answer, ChangeRefused, Changes
from daemon.configuration import Configuration, changed_keys, keep_text
from daemon.control import SOCKET_NAME, ControlServer
from daemon.executors import Executors
from daemon.flow.aggregation import Aggregation
from daemon.flow.dispatcher import Dispatcher
from daemon.flow.ledger import Ledger, Series
from daemon.flow.lock import StateLock, make_folder
from daemon.flow.outbox import Outbox, SinkRunner
from daemon.flow.plugins import Plugin, open_source, sink_plugins, source_plugin
from daemon.flow.series import SeriesTracker
from daemon.flow.stream import Stream
from daemon.flow.watching import Watching
from daemon.models.at_work import AtWork
from daemon.models.exchange import ModelExchange
from daemon.models.registry import Registry
from daemon.report import Report
from daemon.service import Service
from daemon.sinks.base import SeriesClosed, SeriesOpened, SinkContext
from daemon.sources.base import Source, SourceContext
from daemon.watchdog import Part
from grainwatch.config import Config, ConfigError, EdgeTable
from grainwatch.messages import AnyResult, FrameResult, Times
from pipelines.results_files import ResultsFile, results_files

log = logging.getLogger(__name__)

T = TypeVar("T")

HEALTH_S = 1.0
#: What sinks and aggregators get to finish beyond `stop_timeout_s`, seconds.
FLUSH_S = 5.0


class Daemon:
    """One daemon, from `start` to `stop`.

    Parameters
    ----------
    configuration : Configuration
    read : callable
        Reads the file anew, for a reload.
    service : Service
        The line to the service manager.
    """

    def __init__(
        self, configuration: Configuration, read: Callable[[], Configuration], service: Service
    ) -> None:
        self._configuration = configuration
        self._read = read
        self._service = service
        self._where = configuration.where
        self._state_dir = Path(self.config.daemon.state_dir).absolute()
        self._report = Report(self.config.daemon.name, service)
        self._changes = Changes(self._reload)
        self._executors = Executors(self._state_dir)
        self._registry = Registry(self._state_dir)
        # Filled from a signal handler, which may interrupt whoever holds the lock of an Event.
        self._stops_asked: SimpleQueue[None] = SimpleQueue()
        self._stopped = threading.Event()
        self._wake = threading.Event()
        self._announced: set[str] = set()
        self._earlier: dict[str, list[Path]] = {}
        self._undo = ExitStack()
        self.streams: dict[str, Stream] = {}

    @property
    def is_up(self) -> bool:
        """Whether the start is over: from here on a stop has something to drain."""
        return self._report.state != "starting"

    @property
    def config(self) -> Config:
        """The configuration that counts now."""
        return self._configuration.config

    # Start.

    def start(self) -> None:
        """Bring everything up: first what can fail without harm, the sources last.

        Raises
        ------
        ConfigError
            If something that the configuration names cannot be used. Nothing is left behind.
        """
        with ExitStack() as undo:
            self._bring_up(undo)
            self._report.state = "running"
            self._undo = undo.pop_all()
        names = ", ".join(f"{s.name} ({s.describe()})" for s in self.streams.values())
        log.info(
            "%s runs: streams %s; %d workers; control at %s",
            self.config.daemon.name,
            names,
            self.config.daemon.workers,
            self._control.path,
        )
        self._service.ready(self)
        self._changes.start()

    def _bring_up(self, undo: ExitStack) -> None:
        config = self.config
        make_folder(self._state_dir, "daemon.state_dir")
        make_folder(Path(config.daemon.runtime_dir), "daemon.runtime_dir")
        undo.callback(StateLock(self._state_dir).release)
        self._ledger = Ledger(self._state_dir / "ledger.sqlite", config.daemon.ledger_days)
        undo.callback(self._ledger.close)
        undo.callback(self._registry.close)
        # Plug-ins may take long to load and pipelines to warm: `status` says meanwhile that it starts.
        self._control = ControlServer(
            Path(config.daemon.runtime_dir) / SOCKET_NAME,
            {
                "status": self._answer_status,
                "stop": self._answer_stop,
                "series": self._answer_series,
                "reload": self._answer_reload,
                "models": self._answer_models,
            },
        )
        undo.callback(self._control.close)
        self._control.start()

        sources = {n: source_plugin(n, t, self._where) for n, t in config.streams.items()}
        pipelines = self._configuration.pipelines()
        at_work = AtWork.of(self._configuration, self._registry)
        sinks = sink_plugins(config, self._where)
        open_before = self._recover()
        self._ledger.start()
        self._outbox = self._open_sinks(sinks)
        # Until the threads run, a failed start has to close what was opened.
        undo.callback(self._outbox.stop, FLUSH_S)
        self._outbox.start()
        keep_text(self._configuration, self._state_dir)
        warming = f"warming the pipelines in {_places(config.daemon.workers)}"
        log.info("%s", warming)
        self._service.doing(warming)
        undo.callback(self._executors.close_all)
        executor = self._executors.make(self._configuration, at_work.models)
        self._executors.warm(executor)
        for line in executor.engines:
            log.info("%s", line)

        for name, plugin in pipelines.items():
            tracker = SeriesTracker(
                name,
                self._ledger,
                config.streams[name].scan,
                open_before.get(name, []),
                self._announce_opened,
            )
            stream = Stream(name, plugin, tracker, config.streams[name].intake, self._ledger, self._wake.set)
            if hasattr(plugin.plugin.module, "aggregator"):
                stream.aggregation = Aggregation(name, self._outbox, self._announce_closed, self._history)
            self.streams[name] = stream
        self._dispatcher = Dispatcher(
            self.streams, executor, self._outbox, self._ledger, self._announce_closed, self._wake
        )
        self._models = ModelExchange(
            config.daemon.name, self._registry, self._executors, self._changes, self._dispatcher, at_work
        )
        undo.callback(self._models.close)
        self._models.adopt(at_work)
        self._report.of(
            self.streams, self._dispatcher, self._outbox, self._ledger, self._executors, self._models
        )
        opened: dict[str, Source] = {}
        with ExitStack() as close_sources:
            for name, source in sources.items():
                context = SourceContext(self._state_dir, partial(self._ledger.standing, name))
                opened[name] = _open(source, partial(open_source, source, name, context))
                close_sources.callback(opened[name].close)
            close_sources.pop_all()
        for stream in self.streams.values():
            if stream.aggregation is not None:
                stream.aggregation.start()
        self._dispatcher.start()
        for name, stream in self.streams.items():
            stream.start(opened[name])
        self._health_thread = threading.Thread(target=self._publish_health, name="health", daemon=True)
        self._health_thread.start()

    def _recover(self) -> dict[str, list[Series]]:
        found: dict[str, list[Series]] = {}
        for series in self._ledger.recover():
            lost = series.counts()["lost"]
            log.warning(
                "%s: series %s (%s) was open when the daemon stopped; frames lost in it: %d",
                series.stream,
                series.detector_series,
                series.uid[:8],
                lost,
            )
            latest = self._ledger.results_file(series.uid)
            # Listed now: what this daemon will write itself is no history.
            self._earlier[series.uid] = results_files(latest.parent, series.uid) if latest else []
            if series.stream in self.config.streams:
                found.setdefault(series.stream, []).append(series)
            else:
                self._ledger.end_series(series)
        return found

    def _history(self, uid: str) -> Iterator[AnyResult]:
        """Yield what an earlier daemon published of a series that goes on."""
        for part in self._earlier.get(uid, []):
            try:
                with ResultsFile(part) as file:
                    yield from (m for m in file.messages(frames=(None, None)) if isinstance(m, FrameResult))
            except (OSError, ValueError) as error:
                log.error("%s: the map goes on without the results in it: %s", part, error)

    def _open_sinks(self, plugins: dict[str, Plugin]) -> Outbox:
        context = self._sink_context(self._configuration)
        runners: list[SinkRunner] = []
        with ExitStack() as close_sinks:
            for name, plugin in plugins.items():
                sink = _open(plugin, partial(plugin.module.open_sink, plugin.config, context))
                close_sinks.callback(sink.close)
                table = getattr(plugin.config, "edge", EdgeTable())
                runners.append(SinkRunner(name, sink, table, self._ledger.set_results_file))
            close_sinks.pop_all()
        return Outbox(self.config.daemon.name, self._ledger, runners)

    def _sink_context(self, configuration: Configuration) -> SinkContext:
        return SinkContext(
            daemon_name=self.config.daemon.name,
            state_dir=self._state_dir,
            config_text=configuration.raw.decode(),
            config_hash=configuration.config_hash,
        )

    # Running.

    def ask_stop(self) -> None:
        """Ask for an orderly stop; asked a second time, for a quick one. Safe in a signal handler."""
        self._stops_asked.put(None)

    def ask_reload(self) -> Future[Answer]:
        """Ask for the configuration file to be read anew and taken over. Safe in a signal handler."""
        return self._changes.ask_reload()

    def parts(self) -> list[Part]:
        """Return what could hang. Takes no lock."""
        streams = self.streams.values()
        maps = [s.aggregation.part() for s in streams if s.aggregation is not None]
        return [*(s.part() for s in streams), *self._dispatcher.parts(), *maps]

    def status_line(self) -> str:
        """Say how it does, in one line."""
        return self._report.line()

    def run(self, exit_when_done: bool = False) -> int:
        """Wait for a reason to stop, stop, and return the exit status.

        Parameters
        ----------
        exit_when_done : bool
            Stop when all sources are exhausted and all frames have their end.

        Returns
        -------
        int
            0; 1 after a fault that ended the daemon.
        """
        while not self._stops_asked.qsize():
            time.sleep(0.1)
            if self._dispatcher.broken:
                break
            streams = self.streams.values()
            if all(s.fault for s in streams):
                log.error("all sources broke down: nothing to do")
                break
            if exit_when_done and all(s.over for s in streams) and self._dispatcher.calm:
                break
        self.stop()
        faults = [s.fault for s in self.streams.values() if s.fault]
        return 1 if faults or self._dispatcher.broken else 0

    def stop(self) -> None:
        """Read no more, compute what was read for at most `stop_timeout_s`, write, close."""
        log.info("stopping")
        self._report.state = "draining"
        begin = time.monotonic()
        self._service.stopping(self.config.daemon.stop_timeout_s + 4 * FLUSH_S)
        self._executors.break_off()
        self._changes.stop(FLUSH_S)
        for stream in self.streams.values():
            stream.stop()
        self._drain(begin + self.config.daemon.stop_timeout_s)
        self._dispatcher.stop(FLUSH_S)
        self._drop_waiting()
        for stream in self.streams.values():
            if stream.aggregation is not None:
                stream.aggregation.stop(FLUSH_S)
        self._stopped.set()
        self._health_thread.join(FLUSH_S)
        self._undo.close()
        totals = {name: self._ledger.totals(name) for name in self.streams}
        for name, total in totals.items():
            log.info("%s: %s", name, ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in total.items()))
        log.info("stopped after %.1f s", time.monotonic() - begin)

    def _drain(self, deadline: float) -> None:
        """Wait until what has been read has its end; drop the rest at the deadline."""
        streams = list(self.streams.values())
        while time.monotonic() < deadline and self._stops_asked.qsize() < 2 and not self._dispatcher.broken:
            if all(s.join(0.0) for s in streams) and self._dispatcher.calm:
                return
            time.sleep(0.02)
        log.warning("what has not been computed by now is dropped")
        self._drop_waiting()
        self._models.close()  # before what a model in the shadow has in hand fails by the stop
        self._outbox.unblock()
        self._executors.close_all()
        for stream in streams:
            if not stream.join(1.0):
                log.error("%s: the source does not stop", stream.name)

    def _drop_waiting(self) -> None:
        for stream in self.streams.values():
            stream.intake.close()
            for dropped in stream.intake.drain("the daemon stopped"):
                self._ledger.end(dropped.item.frame.key, "dropped", dropped.reason)

    # Another configuration.

    def _reload(self) -> Answer:
        """Take over what the file holds now. Runs in the thread of changes."""
        log.info("reloading %s", self._where)
        begin = time.monotonic()
        self._service.reloading()
        try:
            changed = self._take_over(self._read())
        except Exception as error:
            known = isinstance(error, ConfigError)
            self._report.refused = str(error) if known else f"{type(error).__name__}: {error}"
            log.log(logging.ERROR, "reload refused: %s", self._report.refused, exc_info=not known)
            raise ChangeRefused(f"reload refused: {self._report.refused}") from error
        finally:
            self._service.ready(self)
        self._report.refused = ""
        took_s = time.monotonic() - begin
        keys = ", ".join(changed) or "no key changed, the pipelines are built anew"
        log.info(
            "reloaded in %.1f s: %s; configuration %s", took_s, keys, self._configuration.config_hash[:8]
        )
        return {"changed": changed, "config_hash": self._configuration.config_hash, "took_s": took_s}

    def _take_over(self, fresh: Configuration) -> list[str]:
        """Put another configuration in the place of this one; until it is warm, nothing changes."""
        changed = changed_keys(self.config, fresh.config, self._where)
        pipelines = fresh.pipelines()
        watching = {name: Watching(name, plugin.watch()) for name, plugin in pipelines.items()}
        executor, at_work = self._models.prepare(lambda: AtWork.of(fresh, self._registry))
        switched = self._executors.put_in_place(executor, self._dispatcher)
        for name, stream in self.streams.items():
            stream.adopt(pipelines[name], fresh.config.streams[name].intake, watching[name])
        self._configuration = fresh
        self._outbox.reconfigure(self._sink_context(fresh))
        keep_text(fresh, self._state_dir)
        self._models.adopt(at_work)
        while not switched.done() and self._report.state == "running" and not self._dispatcher.broken:
            wait([switched], 0.2)
        if switched.done():
            self._executors.close(switched.result().executor)
        return changed

    # What the outside hears.

    def _announce_opened(self, event: SeriesOpened) -> None:
        self._announced.add(event.series_uid)
        aggregation = self.streams[event.stream].aggregation
        if aggregation is not None:
            make = self.streams[event.stream].plugin.aggregator
            aggregation.begin(event.series_uid, partial(make, event.series_uid, event.scan))
        self._outbox.announce(event)

    def _announce_closed(self, series: Series) -> None:
        """Tell the sinks that a series is over, if they know it."""
        if series.uid not in self._announced:
            return
        self._announced.discard(series.uid)
        self._outbox.announce(SeriesClosed(series.stream, series.uid, time.time(), series.counts()))

    def _publish_health(self) -> None:
        while not self._stopped.wait(HEALTH_S):
            self._outbox.publish(self.config.daemon.name, self._report.health(), Times())

    def _answer_status(self, request: Mapping[str, Any]) -> dict[str, Any]:
        return self._report.status()

    def _answer_stop(self, request: Mapping[str, Any]) -> dict[str, Any]:
        self.ask_stop()
        return {}

    def _answer_reload(self, request: Mapping[str, Any]) -> dict[str, Any]:
        return {"reload": self.ask_reload().result()}

    def _answer_models(self, request: Mapping[str, Any]) -> dict[str, Any]:
        if self._report.state != "running":
            raise ValueError(f"the daemon is {self._report.state}: models are exchanged while it runs")
        return self._models.answer(request)

    def _answer_series(self, request: Mapping[str, Any]) -> dict[str, Any]:
        limit = request.get("limit", 20)
        if not isinstance(limit, int) or not 1 <= limit <= 1000:
            raise ValueError(f"limit: expected a whole number from 1 to 1000, got {limit!r}")
        return {
            "series": [
                {**msgspec.to_builtins(row, builtin_types=()), "counts": counts}
                for row, counts in self._ledger.latest(limit)
            ]
        }


def _places(workers: int) -> str:
    return f"{workers} worker processes" if workers else "this process"


def _open(plugin: Plugin, make: Callable[[], T]) -> T:
    """Open a source or sink; what goes wrong names its table."""
    try:
        return make()
    except (OSError, ValueError, zmq.ZMQError) as error:
        message = str(error)
        if plugin.where in message:
            raise ConfigError(message) from error
        file, _, table = plugin.where.partition(": ")
        if message.startswith(table):
            raise ConfigError(f"{file}: {message}") from error
        raise ConfigError(f"{plugin.where}: {message}") from error

"""Bluesky's own proxy and a RunEngine that publishes to it, as processes of their own."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from daemon.sources.base import Event, Idle, SeriesEnd
from daemon.sources.bluesky.source import Config, open_source
from testkit.ports import free_ports
from testkit.process import LONG_S, environment, eventually

_PROXY = """
import sys
from pathlib import Path
from bluesky.callbacks.zmq import Proxy, ServerCurve
curve = ServerCurve(Path(sys.argv[3]), Path(sys.argv[4]), None) if len(sys.argv) > 3 else None
proxy = Proxy("127.0.0.1:" + sys.argv[1], "127.0.0.1:" + sys.argv[2], out_curve=curve)
print("ready", flush=True)
proxy.start()
"""


class Listener:
    """A source that is read in a thread; `events` is what it has yielded, without the idling."""

    def __init__(self, **config: Any) -> None:
        self.source = open_source(Config(**config), "s")
        self.events: list[Event] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        for event in self.source.events():
            if not isinstance(event, Idle):
                self.events.append(event)
            if self._stop.is_set():
                break
        self.source.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(LONG_S)
        assert not self._thread.is_alive()

    def seen(self) -> int:
        return self.source.seen

    def of(self, run: str) -> list[Event]:
        """Return the events of a run once it has ended."""
        eventually(lambda: any(isinstance(e, SeriesEnd) for e in self._about(run)))
        return self._about(run)

    def _about(self, run: str) -> list[Event]:
        return [e for e in list(self.events) if getattr(e, "detector_series", None) == run]


class Beamline:
    """A proxy and a RunEngine, as processes.

    `keys` encrypt the side of the subscribers: the server's secret and the folder of the clients' keys. (With
    both sides encrypted the proxy of bluesky 1.15.1 does not start: it opens two authenticators.)
    """

    def __init__(
        self,
        folder: Path,
        serializer: str = "msgpack",
        frames: Path | None = None,
        keys: tuple[Path, ...] = (),
    ) -> None:
        self.folder = folder
        self.ports = free_ports(2)
        self.address = f"tcp://127.0.0.1:{self.ports[1]}"
        self._keys = keys
        self._serializer = serializer
        self._frames = frames
        self._proxy: subprocess.Popen[str] | None = None
        self._engine: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        self.start_proxy()
        self._engine = self._process(
            "-m",
            "testkit.bluesky_plans",
            f"127.0.0.1:{self.ports[0]}",
            self._serializer,
            str(self.folder),
            str(self._frames or ""),
        )
        return self

    def __exit__(self, *_: object) -> None:
        _end(self._engine)
        _end(self._proxy)

    def start_proxy(self) -> None:
        self._proxy = self._process("-c", _PROXY, *map(str, self.ports), *map(str, self._keys))
        assert self._proxy.stdout is not None
        assert self._proxy.stdout.readline() == "ready\n"

    def kill_proxy(self) -> None:
        _end(self._proxy)

    def run(self, plan: str, **told: Any) -> dict[str, Any]:
        """Run a plan to its end; return the uids of its runs and how many documents were published."""
        assert self._engine is not None
        assert self._engine.stdin is not None
        assert self._engine.stdout is not None
        self._engine.stdin.write(json.dumps({"plan": plan, **told}) + "\n")
        self._engine.stdin.flush()
        line = self._engine.stdout.readline()
        assert line, "the RunEngine's process ended"
        answer: dict[str, Any] = json.loads(line)
        return answer

    def wait_until_heard(self, seen: Callable[[], int]) -> int:
        """Publish runs without images until the subscriber sees documents, then until it saw the last one.

        PUB and SUB say nothing of when a subscription has arrived: only what came through proves it.

        Returns
        -------
        int
            How many documents the subscriber had seen when it had seen all.
        """
        before = seen()
        eventually(lambda: self.run("probe") and seen() > before)

        def all_came() -> int:
            # From now on nothing is lost. What came late of earlier runs shows as too much.
            settled = self._settled(seen)
            sent: int = self.run("probe")["documents"]
            eventually(lambda: seen() >= settled + sent)
            now = self._settled(seen)
            return now if now == settled + sent else 0

        return int(eventually(all_came))

    def _settled(self, seen: Callable[[], int]) -> int:
        last = [-1, 0]

        def still() -> bool:
            last[1] = last[1] + 1 if seen() == last[0] else 0
            last[0] = seen()
            return last[1] >= 15  # 0.3 s without a document

        eventually(still)
        return last[0]

    def _process(self, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, *arguments],
            env=environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None,
            text=True,
            cwd=self.folder,
        )


def _end(process: subprocess.Popen[str] | None) -> None:
    if process is not None:
        process.kill()
        process.communicate()

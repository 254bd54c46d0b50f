"""A daemon that asks two networks, and versions of these, for tests that exchange models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from daemon.models.registry import Registry
from grainwatch.commands.status import ask
from testkit.model_pipeline import make_bundle
from testkit.process import LONG_S, DaemonProcess, eventually


class Lab:
    """A daemon that asks two networks, and versions of these."""

    def __init__(self, folder: Path, workers: int = 2, probation: int = 10, sleep_s: float = 0.0) -> None:
        self.folder = folder
        self.registry = Registry(folder / "state")
        self.sha256: dict[tuple[str, int], str] = {}
        for name in ("first", "second"):
            self.bundle(name, 1)
        config = f"""
[daemon]
name = "test"
state_dir = "{folder}/state"
runtime_dir = "{folder}/run"
workers = {workers}
[models]
probation_frames = {probation}
[streams.s.source]
type = "testkit.sources"
script = "{folder}/script.jsonl"
[streams.s.pipeline]
type = "testkit.model_pipeline"
bundle = ["first", "second"]
sleep_s = {sleep_s}
[sinks.lines]
type = "testkit.sinks"
path = "{folder}/results.jsonl"
"""
        self.daemon = DaemonProcess(folder, config=config)
        self.fed = 0

    def bundle(self, name: str, version: int, **how: Any) -> Path:
        """Make a bundle; that of version 1 where the configuration finds it, others in the registry."""
        folder = self.folder / (name if version == 1 else f"{name}-{version}")
        self.sha256[name, version] = make_bundle(folder, name, version, **how)
        if version > 1:
            self.registry.add(folder, "the test")
        return folder

    def ask(self, do: str, name: str, version: int | str = "", **more: Any) -> str:
        request = {
            "command": "models",
            "do": do,
            "name": name,
            "version": str(version),
            "by": "the test",
            **more,
        }
        answer = ask(self.folder / "run" / "control.sock", request, LONG_S)
        return str(answer["models"]["did"])

    def start(self) -> None:
        self.daemon.start()
        self.daemon.feed(["start", "1/a"])

    def feed(self, count: int) -> None:
        self.daemon.images("1/a", range(self.fed, self.fed + count))
        self.fed += count

    def all_done(self) -> list[dict[str, Any]]:
        """Wait until all that was fed has its result; return the results by frame."""
        eventually(lambda: self.daemon.counts()["done"] == self.fed, LONG_S, self.log())
        results = eventually(lambda: r if len(r := self.daemon.events("result")) == self.fed else None)
        assert sorted(r["frame"] for r in results) == list(range(self.fed))
        for result in results:
            # The answers are those of the versions that the result names.
            first, second = (int(flag) - 100 for flag in result["flags"])
            assert result["model"] == f"{self.sha256['first', first]}+{self.sha256['second', second]}"
        return sorted(results, key=lambda r: r["frame"])

    def models(self) -> dict[str, Any]:
        found: dict[str, Any] = self.daemon.status()["models"]
        return found

    def states(self, name: str) -> dict[str, str]:
        return {m.version: m.state for m in self.registry.models(name)}

    def log(self) -> str:
        return self.daemon.log_path.read_text()


def versions(results: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """Return the pairs of answers that occur, in order, each run of them once."""
    pairs = [tuple(r["flags"]) for r in results]
    return [p for p, before in zip(pairs, [None, *pairs], strict=False) if p != before]

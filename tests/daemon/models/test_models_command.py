"""``grainwatch models``, with real bundles, and with a control socket that answers."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from testkit.bundles import sign

from daemon.control import ControlServer
from daemon.models.comparisons import Comparison
from daemon.models.registry import Registry, operator
from grainwatch.cli import main
from pipelines.engines.bundle import load_bundle
from pipelines.engines.shipped import find_bundle
from pipelines.laue.geometry import Calibration
from pipelines.laue.lauetools_files import write_det

CU = "laue-Cu-residual"
SHIPPED = load_bundle(find_bundle("Cu"))
V0, SHA0 = SHIPPED.description.version, SHIPPED.sha256[:8]
ALONE = "no daemon runs: it counts from its next start"
Make = Callable[..., Path]
Run = Callable[..., str]


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """The folder of a daemon whose stream names two bundles."""
    write_det(tmp_path / "lab.det", Calibration(70.0, 1024.0, 1024.0, 0.4, 0.3, 0.08, (2048, 2048), "sCMOS"))
    (tmp_path / "lab.toml").write_text(
        """
[models]
shadow_share = 0.25
[streams.laue.source]
type = "dectris-v2"
[streams.laue.pipeline]
type = "laue"
materials = ["Cu", "Si"]
geometry = "lab.det"
bundle = ["Cu", "laue-Si-residual"]
[sinks.zmq]
"""
    )
    return tmp_path


@pytest.fixture
def run(
    site: Path,
    tmp_path_factory: pytest.TempPathFactory,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> Run:
    """Run a command of ``grainwatch models`` somewhere else than where the configuration is."""
    elsewhere = tmp_path_factory.mktemp("elsewhere")

    def command(what: str, *arguments: object, status: int = 0) -> str:
        monkeypatch.chdir(elsewhere)
        config = os.path.relpath(site / "lab.toml", elsewhere)
        monkeypatch.setattr("sys.argv", ["grainwatch", "models", what, config, *map(str, arguments)])
        with pytest.raises(SystemExit) as done:
            main()
        printed = capsys.readouterr()
        assert (done.value.code or 0) == status, printed.err
        if status == 2:
            assert printed.out == ""
            assert "Traceback" not in printed.err
        return printed.err if status == 2 else printed.out

    return command


@pytest.fixture
def store(site: Path) -> Iterator[Registry]:
    found = Registry(site / "state")
    yield found
    found.close()


# Without a daemon.


def test_a_new_version_from_the_folder_to_the_stream_and_back(
    run: Run, site: Path, bundle: Make, store: Registry
) -> None:
    assert "no models in the registry state/models/registry.sqlite" in run("list")
    assert not (site / "state").exists()
    assert f"{CU} {V0} ({SHA0}) is in the registry: candidate\n" == run("add", "Cu", "--note", "known")
    folder = bundle("0.2.0")
    sha256 = load_bundle(folder).sha256
    assert f"{CU} 0.2.0 ({sha256[:8]}) is in the registry: candidate\n" == run("add", folder)
    shutil.rmtree(folder)

    assert run("activate", "Cu", V0) == f"{CU} {V0} ({SHA0}) is active; {ALONE}\n"
    said = run("shadow", "Cu", "--share", "0.2")
    assert said == f"{CU} 0.2.0 ({sha256[:8]}) computes 20 % of the frames in the shadow; {ALONE}\n"
    assert "is in the shadow no more" in run("shadow", "Cu", "--stop")
    assert store.find(CU, "0.2.0").state == "candidate"
    run("shadow", "Cu")
    assert store.find(CU, "0.2.0").share == 0.25
    assert "0.2.0" in run("activate", "Cu", "--why", "better at the edge")

    listed = run("list")
    assert re.search(rf"^{CU} +{re.escape(V0)} +retired +- .*known *$", listed, re.MULTILINE)
    assert re.search(
        rf"^{CU} +0\.2\.0 +active +laue .*{sha256[:8]} +{re.escape(str(folder))}", listed, re.MULTILINE
    )
    assert f"laue: Cu is {CU} 0.2.0 ({sha256[:8]}), of the registry\n" in listed

    said = run("rollback", "Cu", "--why", "worse in the middle")
    assert said == f"{CU} {V0} ({SHA0}) is active again; {ALONE}\n"
    said = run("rollback", "Cu")
    assert "is retired, the one that comes with grainwatch serves again" in said
    assert f"laue: Cu is {CU} {V0} ({SHA0}), comes with grainwatch\n" in run("list")
    assert "there is nothing to roll back" in run("rollback", "Cu", status=2)

    events = store.history(CU)
    assert {e.who for e in events} == {operator()}
    assert [e.why for e in events if e.to_state == "active"][1:] == [
        "better at the edge",
        "worse in the middle",
    ]


def test_all_that_is_known_of_a_model(run: Run, store: Registry, bundle: Make) -> None:
    run("add", "Cu", "--as", "0.3.0", "--note", "\x1b[31mred\x1b[0m")
    run("shadow", "Cu", "--share", "0.5", "--why", "to see")
    shown = run("show", "Cu")
    assert "\x1b" not in shown
    assert "in the shadow: nothing was compared yet" in shown
    model = store.find(CU)
    for n in range(40):
        row = Comparison(
            time.time(), "laue", "u", n, "", "a" * 64, n % 4 != 0, {"angle_deg": n / 10}, 10.0, 20.0 + n
        )
        store.compare_put(model, row, 100)
    shown = run("show", "Cu", "0.3.0")
    held_out = SHIPPED.description.metrics["held_out"]
    distance = SHIPPED.description.domain["dd_mm"]
    for pattern in (
        rf"^{CU} 0\.3\.0: shadow, 0\.5$",
        "^  Names the hkl family of Laue spots of Cu, or says that it cannot$",
        rf"held_out\.accuracy +{held_out['accuracy']:.5g}",
        rf"held_out\.majority_accuracy +{held_out['majority_accuracy']:.5g}",
        "baseline +majority_accuracy: every spot is given the most frequent class",
        rf"dd_mm +{distance['low']:.5g} to {distance['high']:.5g}",
        "40 frames from .* beside aaaaaaaa: 75.0 % agree, 0 failed",
        r"median angle_deg +1\.95",
        r"shadow, time +median 39\.5 ms, 95 % within 57\.0 ms",
        rf"0\.3\.0 +candidate +shadow, 0\.5 +{re.escape(operator())} +to see",
    ):
        assert re.search(pattern, shown, re.MULTILINE), f"{pattern} in\n{shown}"
    told = json.loads(run("show", "Cu", "--json"))
    assert told["description"]["metrics"]["held_out"]["accuracy"] > 0.9
    assert told["shadow"]["agree"] == 0.75
    assert [e["to_state"] for e in told["history"]] == ["candidate", "shadow"]
    assert told["streams"] == ["laue"]


def test_json_of_all_commands(run: Run, bundle: Make) -> None:
    added = json.loads(run("add", bundle("2"), "--json"))
    assert (added["name"], added["version"], added["state"]) == (CU, "2", "candidate")
    did = json.loads(run("activate", "Cu", "--json"))
    assert did["did"] == f"{CU} 2 ({added['sha256'][:8]}) is active"
    assert (did["name"], did["version"], did["sha256"]) == (CU, "2", added["sha256"])
    assert (did["daemon"], did["remark"]) == (False, "")
    listed = json.loads(run("list", "--json"))
    assert [(m["version"], m["state"], m["streams"]) for m in listed["models"]] == [("2", "active", ["laue"])]
    cu, si = listed["bundles"]
    assert (cu["name"], cu["model"], cu["sha256"], cu["from"]) == (
        "Cu",
        CU,
        added["sha256"],
        "of the registry",
    )
    assert "laue-Si-residual: there is no such folder" in si["problem"]
    assert json.loads(run("verify", "--json"))["models"][0]["problem"] == ""
    assert json.loads(run("rollback", "Cu", "--json"))["did"].endswith(
        "is retired, the one that comes with grainwatch serves again"
    )


def test_a_model_that_no_stream_names(run: Run, store: Registry) -> None:
    assert "note: no stream uses it: no pipeline.bundle of the configuration names laue-Ge" in run(
        "add", "Ge"
    )
    assert "is active" in run("activate", "laue-Ge-residual")
    assert store.active("laue-Ge-residual") is not None
    assert "is retired" in run("rollback", "laue-Ge-residual")


def test_a_stream_is_not_left_without_a_model(run: Run, store: Registry) -> None:
    """Its name is one of the registry alone: without an active version it means nothing."""
    run("add", "Si")
    run("activate", "laue-Si-residual")
    said = run("rollback", "laue-Si-residual", status=2)
    assert f"no version was active before {V0}, and nothing of that name comes with grainwatch" in said
    assert store.active("laue-Si-residual") is not None


def test_what_is_altered_is_found_and_not_activated(run: Run, store: Registry, bundle: Make) -> None:
    run("add", "Cu")
    run("add", bundle("2"))
    assert run("verify").count("intact, passes its self-test") == 2
    network = store.find(CU, "2").folder / "model.onnx"
    content = network.read_bytes()
    network.write_bytes(content[:-1])
    found = run("verify", status=1)
    assert f"{CU} {V0}: intact" in found
    assert re.search(rf"{CU} 2: .*model\.onnx: is not the file that the manifest names", found)
    assert "intact" in run("verify", "Cu", V0)
    for what in ("activate", "shadow"):
        assert "model.onnx: is not the file" in run(what, "Cu", "2", status=2)
    assert store.find(CU, "2").state == "candidate"


def test_a_network_that_answers_otherwise_is_not_added(run: Run, bundle: Make, site: Path) -> None:
    folder = bundle("2")
    shutil.copy(find_bundle("Si") / "selftest.npz", folder)
    sign(folder)
    assert "selftest.npz" in run("add", folder, status=2)
    assert not (site / "state").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("add", "nothing"), "nothing: there is no such folder; bundles that come with grainwatch"),
        (("show", "Cu", "9"), f"model {CU} has no version '9'; there are 1 (candidate), 2 (candidate)"),
        (("activate", "Cu"), "say which version; there are 1 (candidate), 2 (candidate)"),
        (("activate", "laue-Cu-residul"), f"did you mean {CU}?"),
        (("list", "x"), f"no model 'x' in the registry: there are {CU}"),
        (("verify", "x"), f"no model 'x' in the registry: there are {CU}"),
        (("verify", "Cu", "3"), "has no version '3'"),
        (("shadow", "Cu", "1", "--share", "1.5"), "--share: expected more than 0 and at most 1, got 1.5"),
        (("shadow", "Cu", "1", "--share", "nan"), "--share: expected more than 0"),
        (("shadow", "Cu", "1", "--stop"), "version 1 is candidate, not shadow"),
        (("rollback", "Cu"), "there is nothing to roll back, no version is active"),
    ],
)
def test_what_cannot_be_done(
    run: Run, store: Registry, bundle: Make, arguments: tuple[str, ...], words: str
) -> None:
    for version in "12":
        store.add(bundle(version), "me")
    told = store.history()
    assert words in run(*arguments, status=2)
    assert store.history() == told


def test_a_registry_that_is_damaged(run: Run, site: Path) -> None:
    (site / "state" / "models").mkdir(parents=True)
    (site / "state" / "models" / "registry.sqlite").write_bytes(b"something else" * 100)
    for what in (("list",), ("show", "Cu"), ("verify",), ("add", "Cu"), ("activate", "Cu")):
        assert "registry.sqlite is damaged" in run(*what, status=2)


# With a daemon that answers.


@pytest.fixture
def daemon(site: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Mapping[str, Any]]]:
    """What the control socket was asked; it refuses what is called "refuse"."""
    asked: list[Mapping[str, Any]] = []

    def answer(request: Mapping[str, Any]) -> dict[str, Any]:
        asked.append(request)
        if request["why"] == "refuse":
            raise ValueError("the self-test is off by 0.3")
        did = {"did": "it computes, on probation for 50 frames", "name": request["name"], "took_s": 1.5}
        return {"models": {**did, "version": request["version"] or "1", "sha256": "ab" * 32}}

    monkeypatch.chdir(site)
    Path("run").mkdir()
    # By a relative path: those of tests are longer than a socket may be called.
    server = ControlServer(Path("run/control.sock"), {"models": answer})
    server.start()
    yield asked
    monkeypatch.chdir(site)
    server.close()


def test_a_daemon_does_it_itself(
    run: Run, daemon: list[Mapping[str, Any]], store: Registry, bundle: Make
) -> None:
    run("add", bundle("1"))
    assert daemon == []
    said = run("activate", "Cu", "--why", "better")
    assert said == "it computes, on probation for 50 frames; 1.5 s\n"
    run("shadow", "Cu", "--share", "0.4")
    run("shadow", "Cu")
    # The registry is the daemon's to change.
    assert store.find(CU).state == "candidate"
    store.set_state(store.find(CU), "shadow", "me", share=0.4)
    run("shadow", "Cu", "--stop")
    store.set_state(store.find(CU), "active", "me")
    assert json.loads(run("rollback", "Cu", "--json"))["daemon"] is True
    common = {"command": "models", "name": CU, "by": operator()}
    assert daemon == [
        {**common, "do": "activate", "version": "1", "why": "better"},
        {**common, "do": "shadow", "version": "1", "why": "", "share": 0.4},
        {**common, "do": "shadow", "version": "1", "why": "", "share": 0.25},
        {**common, "do": "shadow", "version": "1", "why": "", "share": 0.0},
        {**common, "do": "rollback", "version": "", "why": ""},
    ]


def test_what_a_daemon_refuses(
    run: Run, daemon: list[Mapping[str, Any]], store: Registry, bundle: Make
) -> None:
    run("add", bundle("1"))
    said = run("activate", "Cu", "--why", "refuse", status=2)
    assert "the daemon at run/control.sock says: the self-test is off by 0.3" in said
    assert store.find(CU).state == "candidate"


def test_a_socket_that_a_crash_left_is_no_daemon(run: Run, site: Path, store: Registry, bundle: Make) -> None:
    script = "import socket; s = socket.socket(socket.AF_UNIX); s.bind('run/control.sock')"
    (site / "run").mkdir()
    subprocess.run([sys.executable, "-c", script], cwd=site, check=True)
    run("add", bundle("1"))
    assert ALONE in run("activate", "Cu")
    assert store.active(CU) is not None


def test_the_command_as_it_is_typed(site: Path) -> None:
    """In a process of its own, into a pipe: no colours, no frames, nothing cut off."""
    command = [str(Path(sys.executable).parent / "grainwatch"), "models"]
    done = [
        subprocess.run([*command, *rest], cwd=site, capture_output=True, text=True, timeout=60, check=False)
        for rest in (
            ("add", "lab.toml", "Cu", "--note", "a" * 150),
            ("list", "lab.toml"),
            ("verify", "lab.toml"),
        )
    ]
    assert [d.returncode for d in done] == [0, 0, 0], done
    assert [d.stderr for d in done] == ["", "", ""]
    row = done[1].stdout.splitlines()[1]
    assert row.split()[:4] == [CU, V0, "candidate", "-"]
    assert row.split()[-1] == "a" * 150

"""Models are exchanged under a running daemon: no frame is lost, none is answered by a mixture."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from testkit.model_lab import LONG_S, Lab, versions
from testkit.process import environment, eventually

from grainwatch.commands.status import ask
from grainwatch.config import ConfigError

pytestmark = pytest.mark.system


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    lab = Lab(tmp_path)
    with lab.daemon:
        yield lab
    lab.registry.close()


def test_a_model_is_exchanged_under_load(lab: Lab) -> None:
    lab.bundle("first", 2)
    lab.start()
    lab.feed(40)
    did = lab.ask("activate", "first", 2)
    assert did == f"first 2 ({lab.sha256['first', 2][:8]}) computes, on probation for 10 frames"
    assert lab.models()["on_probation"] == "first 2"
    lab.feed(40)
    results = lab.all_done()
    assert versions(results) == [("101", "101"), ("102", "101")]
    eventually(lambda: "model first 2 has proved itself" in lab.log(), LONG_S)
    assert lab.models()["on_probation"] == ""
    assert lab.states("first") == {"2": "active"}
    assert [e.who for e in lab.registry.history("first")] == ["the test", "the test"]
    # The old workers are gone.
    eventually(lambda: len(lab.daemon.workers()) == 2, LONG_S)
    assert lab.daemon.stop() == 0
    # At the next start it counts.
    lab.daemon.start()
    lab.daemon.feed(["start", "2/b"], ["image", "2/b", 0, 0])
    eventually(lambda: len(lab.daemon.events("result")) == lab.fed + 1, LONG_S)
    assert lab.daemon.events("result")[-1]["flags"] == ["102", "101"]
    assert lab.daemon.stop() == 0
    assert lab.daemon.audit() == []


def test_a_model_that_fails_on_probation_is_put_back_and_costs_no_frame(lab: Lab) -> None:
    lab.bundle("second", 2)
    lab.bundle("second", 3, raise_from=3)
    lab.start()
    lab.ask("activate", "second", 2)
    lab.feed(20)
    lab.all_done()
    eventually(lambda: lab.models()["on_probation"] == "", LONG_S)
    lab.ask("activate", "second", 3)
    lab.feed(60)
    # Done, all of them: what the failing model failed on was computed anew.
    results = lab.all_done()
    assert results[-1]["flags"] == ["101", "102"]
    eventually(lambda: lab.states("second") == {"2": "active", "3": "retired"}, LONG_S)
    status = lab.daemon.status()  # the states above were written after what it says
    assert re.match(
        r"3 was put back: frame \d+ of s: pipeline error: .*this model raises",
        status["errors"]["model second"],
    )
    assert status["models"]["in_use"]["second"]["sha256"] == lab.sha256["second", 2]
    assert lab.registry.history("second")[-1].who == "daemon test: automatic"
    eventually(lambda: len(lab.daemon.workers()) == 2, LONG_S)
    assert lab.daemon.stop() == 0
    assert lab.daemon.audit() == []


def test_the_first_model_of_the_registry_that_fails_gives_way_to_the_bundle_without(lab: Lab) -> None:
    lab.bundle("first", 2, raise_from=1)
    lab.start()
    lab.ask("activate", "first", 2)
    lab.feed(10)
    assert versions(lab.all_done()) == [("101", "101")]
    eventually(lambda: lab.states("first") == {"2": "retired"}, LONG_S)
    assert lab.models()["in_use"]["first"]["sha256"] == lab.sha256["first", 1]


def test_a_model_that_kills_its_workers_is_put_back(lab: Lab) -> None:
    lab.bundle("first", 2, sleep_s=600.0)
    text = lab.daemon.config_path.read_text().replace("workers = 2", "workers = 2\ncompute_timeout_s = 1.0")
    lab.daemon.config_path.write_text(text)
    lab.start()
    lab.ask("activate", "first", 2)
    lab.feed(4)
    assert versions(lab.all_done()) == [("101", "101")]
    errors = eventually(lambda: e if "model first" in (e := lab.daemon.status()["errors"]) else None, LONG_S)
    assert "computed for more than 1 s; killed" in errors["model first"]


def test_what_cannot_be_used_is_refused_and_changes_nothing(lab: Lab) -> None:
    lab.bundle("first", 2, off=0.5)
    lab.bundle("first", 3)
    (altered,) = [m.folder for m in lab.registry.models("first") if m.version == "3"]
    (altered / "model.onnx").write_bytes(b"another network")
    lab.start()
    workers = sorted(lab.daemon.workers())
    for version, words in ((2, "off by 0.5"), (3, "model.onnx: is not the file"), (4, "no version '4'")):
        with pytest.raises(ConfigError, match=words):
            lab.ask("activate", "first", version)
    with pytest.raises(ConfigError, match="no model 'third'"):
        lab.ask("activate", "third")
    with pytest.raises(ConfigError, match="nothing to roll back"):
        lab.ask("rollback", "first")
    with pytest.raises(ConfigError, match="do: expected one of activate, rollback, shadow, got 'dance'"):
        lab.ask("dance", "first")
    with pytest.raises(ConfigError, match="name: expected a text"):
        ask(lab.folder / "run" / "control.sock", {"command": "models", "do": "shadow", "name": 7})
    assert lab.states("first") == {"2": "candidate", "3": "candidate"}
    assert sorted(lab.daemon.workers()) == workers
    lab.feed(5)
    assert versions(lab.all_done()) == [("101", "101")]


@pytest.mark.parametrize("probation", [0, 1000])
def test_back_and_forth(tmp_path: Path, probation: int) -> None:
    """With a probation that is still on the one before is warm; without one it is built anew."""
    lab = Lab(tmp_path, probation=probation)
    with lab.daemon:
        for version in (2, 3):
            lab.bundle("first", version)
        lab.start()
        seen = []
        for step in (2, 3, "back", "back"):
            if step == "back":
                lab.ask("rollback", "first", why="a test")
            else:
                lab.ask("activate", "first", step)
            lab.feed(10)
            lab.all_done()
            seen.append(lab.daemon.events("result")[-1]["flags"][0])
            # What `status` says is what computes.
            said = lab.daemon.status()
            assert said["engines"][0].startswith(f"s: {int(seen[-1]) - 100}: onnxruntime")
            assert said["models"]["in_use"]["first"]["sha256"] == lab.sha256["first", int(seen[-1]) - 100]
        assert seen == ["102", "103", "102", "101"]
        assert lab.states("first") == {"2": "retired", "3": "retired"}
        assert "model first" not in lab.daemon.status()["errors"]
        with pytest.raises(ConfigError, match="nothing to roll back"):
            lab.ask("rollback", "first")
        eventually(lambda: len(lab.daemon.workers()) == 2, LONG_S)
        assert lab.daemon.stop() == 0
    lab.registry.close()


def test_a_rollback_that_is_rolled_back_on_probation(lab: Lab) -> None:
    """What the registry calls active is what computes, whichever way it came there."""
    for version in (2, 3):
        lab.bundle("first", version)
    lab.start()

    def settled(do: str, *version: int, serve: int) -> tuple[str, dict[str, str]]:
        lab.ask(do, "first", *version)
        lab.feed(serve)
        lab.all_done()
        assert lab.daemon.status()["engines"][0].startswith(f"s: {lab.registry.active('first').version}: ")
        return lab.daemon.events("result")[-1]["flags"][0], lab.states("first")

    for version in (2, 3):
        settled("activate", version, serve=20)
        eventually(lambda: not lab.models()["on_probation"], LONG_S)
    assert settled("rollback", serve=3) == ("102", {"2": "active", "3": "retired"})
    assert lab.models()["probation_left"] == 7
    assert settled("rollback", serve=3) == ("103", {"2": "retired", "3": "active"})
    assert settled("rollback", serve=20) == ("102", {"2": "active", "3": "retired"})
    eventually(lambda: not lab.models()["on_probation"], LONG_S)
    with pytest.raises(ConfigError, match="no version is candidate or shadow"):
        lab.ask("activate", "first")


def test_swaps_under_a_reload_and_a_dying_worker(lab: Lab) -> None:
    """Whoever interferes: each answer is that of one version as a whole, and every frame has one."""
    for version in range(2, 6):
        lab.bundle("first", version)
        lab.bundle("second", version)
    lab.start()
    for version in range(2, 6):
        lab.feed(20)
        lab.ask("activate", "first", version)
        lab.feed(5)
        lab.daemon.kill_worker()
        lab.feed(5)
        subprocess.run(
            [sys.executable, "-m", "grainwatch", "reload", str(lab.daemon.config_path)],
            check=True, timeout=LONG_S, env=environment(), stdout=subprocess.DEVNULL,
        )  # fmt: skip
        lab.ask("activate", "second", version)
    results = lab.all_done()
    assert lab.states("first")["5"] == "active"
    assert results[-1]["flags"][0] == "105"
    assert lab.daemon.stop() == 0
    assert lab.daemon.audit() == []


def test_a_worker_that_starts_again_takes_the_same_version_or_none(lab: Lab) -> None:
    lab.start()
    lab.feed(5)
    lab.all_done()
    shutil.rmtree(lab.folder / "first")
    lab.bundle("first", 1, sleep_s=0.001)
    lab.daemon.kill_worker()
    eventually(lambda: "is another bundle than the daemon took" in lab.log(), LONG_S)
    lab.feed(5)
    lab.sha256["first", 1] = lab.daemon.events("result")[0]["model"].split("+")[0]
    assert versions(lab.all_done()) == [("101", "101")]


# In the shadow.


def test_a_model_in_the_shadow_is_compared_and_never_published(lab: Lab) -> None:
    lab.bundle("first", 2)
    lab.start()
    assert "computes 50 % of the frames in the shadow" in lab.ask("shadow", "first", 2, share=0.5)
    model = lab.registry.find("first", "2")
    for _ in range(20):
        lab.feed(5)
        lab.all_done()
    assert versions(lab.all_done()) == [("101", "101")]
    status = lab.models()["in_shadow"]["first"]
    assert status["version"] == "2"
    assert 30 <= status["offered"] <= 70
    eventually(
        lambda: lab.registry.comparison_summary(model)["n"] == status["offered"] - status["passed_over"],
        LONG_S,
    )
    rows = lab.registry.comparisons(model)
    assert not any(row.agree or row.error for row in rows)  # the answers differ
    assert {row.live_sha256.split("+")[0] for row in rows} == {lab.sha256["first", 1]}
    assert lab.states("first") == {"2": "shadow"}
    # It goes on over a restart, and over another model beside it.
    assert lab.daemon.stop() == 0
    lab.daemon.start()
    eventually(lambda: lab.models()["in_shadow"], LONG_S)
    lab.bundle("second", 2)
    lab.ask("activate", "second", 2)
    eventually(lambda: lab.models()["in_shadow"], LONG_S)
    lab.ask("shadow", "first", 2, share=0)
    assert lab.models()["in_shadow"] == {}
    assert lab.states("first") == {"2": "candidate"}
    eventually(lambda: len(lab.daemon.workers()) == 4, LONG_S)  # two of them in reserve
    assert lab.daemon.stop() == 0


def test_a_model_that_fails_in_the_shadow_harms_nobody(lab: Lab) -> None:
    lab.bundle("first", 2, raise_from=1)
    lab.start()
    lab.ask("shadow", "first", 2, share=1.0)
    lab.feed(10)
    assert versions(lab.all_done()) == [("101", "101")]
    model = lab.registry.find("first", "2")
    rows = eventually(lambda: lab.registry.comparisons(model), LONG_S)
    assert all("this model raises" in row.error for row in rows)
    with pytest.raises(ConfigError, match="share: expected 0 to 1, got 2"):
        lab.ask("shadow", "first", 2, share=2)
    # What was tried in the shadow can be activated; then there is no shadow any more.
    lab.bundle("first", 3)
    lab.ask("shadow", "first", 3, share=1.0)
    lab.ask("activate", "first", 3)
    eventually(lambda: lab.models()["in_shadow"] == {}, LONG_S)
    lab.feed(10)
    lab.all_done()
    assert lab.states("first")["3"] == "active"


def test_a_slow_model_in_the_shadow_is_passed_over_and_holds_up_nobody(lab: Lab) -> None:
    lab.bundle("first", 2, sleep_s=5.0)
    lab.start()
    lab.ask("shadow", "first", 2, share=1.0)
    begin = time.monotonic()
    lab.feed(100)
    lab.all_done()
    assert time.monotonic() - begin < 60.0  # and not 100 times 5 s
    assert lab.models()["in_shadow"]["first"]["passed_over"] > 50
    assert lab.daemon.stop() == 0

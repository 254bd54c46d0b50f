"""Broken files, full disks, other programs' files, and processes that use the registry at once."""

from __future__ import annotations

import ctypes
import json
import os
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from daemon.models.comparisons import Comparison
from daemon.models.registry import Registry, RegistryError
from daemon.models.registry_file import VERSION
from pipelines.engines.shipped import find_bundle

CU = "laue-Cu-residual"
Make = Callable[..., Path]


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# Files that are not what they should be.


@pytest.mark.parametrize("content", [b"no database at all, but long enough to be looked at" * 10, b"SQLite"])
def test_a_file_that_is_no_database(state: Path, content: bytes) -> None:
    (state / "models").mkdir(parents=True)
    path = state / "models" / "registry.sqlite"
    path.write_bytes(content)
    registry = Registry(state)
    for what in (registry.models, lambda: registry.add(find_bundle("Cu"), "me")):
        with pytest.raises(
            RegistryError, match=r"registry\.sqlite is damaged .*move registry.sqlite\* away and add"
        ):
            what()
    registry.close()
    assert path.read_bytes() == content


def test_a_damaged_page_is_told_and_harms_no_bundle(registry: Registry, state: Path, bundle: Make) -> None:
    model = registry.add(bundle("1"), "me")
    registry.close()
    path = state / "models" / "registry.sqlite"
    content = path.read_bytes()
    # The first page is the list of tables: it stays.
    path.write_bytes(content[:4096] + b"\xa5" * (len(content) - 4096))
    broken = Registry(state)
    with pytest.raises(RegistryError, match="is damaged"):
        broken.models()
    with pytest.raises(RegistryError, match="is damaged"):
        broken.set_state(model, "active", "me")
    broken.close()
    for left in path.parent.glob("registry.sqlite*"):
        left.rename(left.with_name(f"old-{left.name}"))
    again = Registry(state)
    assert again.add(model.folder, "me").sha256 == model.sha256
    assert again.verify(again.find(CU)).sha256 == model.sha256
    again.close()


def test_a_newer_registry_is_left_alone(state: Path) -> None:
    (state / "models").mkdir(parents=True)
    path = state / "models" / "registry.sqlite"
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE models (anything)")
        db.execute(f"PRAGMA user_version = {VERSION + 1}")
    db.close()
    before = path.read_bytes()
    registry = Registry(state)
    words = f"is of version {VERSION + 1}, this program writes {VERSION}: use the newer grainwatch"
    for what in (registry.models, lambda: registry.add(find_bundle("Cu"), "me")):
        with pytest.raises(RegistryError, match=words):
            what()
    registry.close()
    assert tree(state) == {"models/registry.sqlite": before}


def test_a_database_of_another_program(state: Path) -> None:
    (state / "models").mkdir(parents=True)
    with sqlite3.connect(state / "models" / "registry.sqlite") as db:
        db.execute("CREATE TABLE letters (text)")
    db.close()
    registry = Registry(state)
    for what in (registry.models, lambda: registry.add(find_bundle("Cu"), "me")):
        with pytest.raises(RegistryError, match="is no model registry: move it away"):
            what()
    registry.close()


def test_a_file_that_a_crash_left_empty(state: Path) -> None:
    (state / "models").mkdir(parents=True)
    (state / "models" / "registry.sqlite").touch()
    registry = Registry(state)
    assert registry.models() == []
    assert registry.add(find_bundle("Cu"), "me").state == "candidate"
    registry.close()


# Disks.


def test_a_state_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("")
    registry = Registry(tmp_path / "state")
    with pytest.raises(RegistryError, match=r"Cu: cannot be copied: .*/state: File exists"):
        registry.add(find_bundle("Cu"), "me")


def test_one_who_may_only_read(registry: Registry, state: Path, bundle: Make) -> None:
    """As the user of a daemon is, whose files an operator looks at."""
    model = registry.add(bundle("1"), "me")
    registry.close()
    folders = [state, *(p for p in state.rglob("*") if p.is_dir())]
    for path in state.rglob("*"):
        path.chmod(0o500 if path.is_dir() else 0o400)
    state.chmod(0o500)

    def look() -> None:
        reader = Registry(state)
        assert reader.models() == [model]
        assert [e.to_state for e in reader.history()] == ["candidate"]
        assert reader.verify(model).sha256 == model.sha256
        with pytest.raises(RegistryError, match=r"registry\.sqlite: .*(readonly|unable to open)"):
            reader.set_state(model, "active", "me")
        with pytest.raises(RegistryError, match=r"Si: cannot be copied: .*: Permission denied"):
            reader.add(find_bundle("Si"), "me")
        reader.close()

    try:
        without_override(look)
    finally:
        for folder in folders:
            folder.chmod(0o700)
    (state / "models" / "registry.sqlite").chmod(0o600)
    writer = Registry(state)
    assert writer.set_state(model, "active", "me").state == "active"
    writer.close()


def without_override(what: Callable[[], None]) -> None:
    """Run something in a thread that may not write what it is forbidden to, also when root runs the tests."""

    def work() -> None:
        if os.geteuid() == 0:
            # capset(2) acts on the calling thread alone.
            header, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
            assert ctypes.CDLL(None, use_errno=True).capset(header, none) == 0
        what()

    with ThreadPoolExecutor(1) as threads:
        threads.submit(work).result()


def test_a_disk_that_is_full(registry: Registry, state: Path, bundle: Make) -> None:
    """Neither half a bundle stays nor half a row, and what was there goes on."""
    model = registry.add(bundle("1"), "me")
    registry.close()
    before = tree(state)
    script = """
import json, resource, signal, sys
from pathlib import Path
from daemon.models.registry import Registry, RegistryError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
registry, said = Registry(Path(sys.argv[1])), []
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
model = registry.find("laue-Cu-residual")
for limit in (20_000, 64):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    for what in (registry.add, registry.set_state):
        try:
            what(Path(sys.argv[2]), "me") if what == registry.add else what(model, "active", "me")
            said.append("done")
        except RegistryError as error:
            said.append(str(error))
    if limit == 20_000:
        continue
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
said.append(registry.add(Path(sys.argv[2]), "me").version)
registry.close()
print(json.dumps(said))
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(state), str(bundle("2"))],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert "cannot be copied" in said[0]
    assert "File too large" in said[0]
    assert "cannot be copied" in said[2]
    assert said[4] == "2"
    again = Registry(state)
    assert [m.version for m in again.models()] == ["1", "2"]
    for m in again.models():
        again.verify(m)
    again.close()
    assert set(before) - set(tree(state)) == set()
    assert not list((state / "models" / "bundles" / CU).glob(".adding-*"))
    assert model.version == "1"


def test_a_row_that_does_not_fit_takes_its_bundle_along(
    registry: Registry, state: Path, bundle: Make
) -> None:
    registry.add(bundle("1"), "me")
    before = tree(state / "models" / "bundles")
    with registry._file.writing() as db:
        pages = db.execute("PRAGMA page_count").fetchone()[0]
    registry._file._db.execute(f"PRAGMA max_page_count = {pages}")  # type: ignore[union-attr]
    with pytest.raises(RegistryError, match=r"registry\.sqlite: database or disk is full"):
        registry.add(bundle("2"), "me", "x" * 100_000)
    assert tree(state / "models" / "bundles") == before
    assert [m.version for m in registry.models()] == ["1"]
    registry._file._db.execute("PRAGMA max_page_count = 1000000")  # type: ignore[union-attr]
    assert registry.add(bundle("2"), "me").version == "2"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_what_root_adds_belongs_to_the_daemon(registry: Registry, state: Path, bundle: Make) -> None:
    state.mkdir()
    os.chown(state, 4321, 1234)
    registry.set_state(registry.add(bundle("1"), "me"), "active", "me")
    made = list(state.rglob("*"))
    assert len(made) > 8
    assert {(p.stat().st_uid, p.stat().st_gid) for p in made} == {(4321, 1234)}


# Processes at once.

ADDERS = """
import sys, time
from pathlib import Path
from daemon.models.registry import Registry
registry = Registry(Path(sys.argv[1]))
while not Path(sys.argv[2]).exists():
    time.sleep(0.001)
for folder in sys.argv[3:]:
    registry.add(Path(folder), "process")
registry.close()
"""


def test_processes_that_add_at_once(state: Path, tmp_path: Path, bundle: Make) -> None:
    """The file is made by all of them at the same moment; the same bundle comes from each."""
    folders = [str(bundle(v)) for v in "123"]
    go = tmp_path / "go"
    adders = [
        subprocess.Popen(
            [sys.executable, "-c", ADDERS, str(state), str(go), *order],
            stderr=subprocess.PIPE,
            text=True,
        )
        for order in (folders, folders[::-1], folders[1:])
    ]
    time.sleep(0.2)
    go.touch()
    for adder in adders:
        _, said = adder.communicate(timeout=60)
        assert adder.returncode == 0, said
    registry = Registry(state)
    found = registry.models()
    assert sorted(m.version for m in found) == ["1", "2", "3"]
    assert len(registry.history()) == 3
    for model in found:
        registry.verify(model)
    registry.close()
    left = [p.name for p in (state / "models" / "bundles" / CU).iterdir()]
    assert len(left) == 3, left


SWITCHER = """
import sys
from pathlib import Path
from daemon.models.registry import Registry, RegistryError
registry = Registry(Path(sys.argv[1]))
done = 0
while done < 40:
    for version in "12":
        try:
            registry.set_state(registry.find("laue-Cu-residual", version), "active", sys.argv[2])
            done += 1
        except RegistryError as error:
            assert "is active already" in str(error), error
registry.close()
print(done)
"""


def test_a_daemon_and_commands_at_once(registry: Registry, state: Path, bundle: Make) -> None:
    """Two processes switch while a third stores comparisons and looks: one active model at any moment."""
    for version in "12":
        registry.add(bundle(version), "me")
    tried = registry.set_state(registry.add(bundle("3"), "me"), "shadow", "me", share=0.1)
    registry.set_state(registry.find(CU, "1"), "active", "me")
    switchers = [
        subprocess.Popen([sys.executable, "-c", SWITCHER, str(state), who], stdout=subprocess.PIPE)
        for who in "ab"
    ]
    written, looked = 0, 0
    while any(s.poll() is None for s in switchers):
        registry.compare_put(tried, Comparison(time.time(), "s", "u", written, "", "x", True), kept=50)
        written += 1
        assert [m.state for m in registry.models(CU)].count("active") == 1
        looked += 1
    done = [int(s.communicate(timeout=60)[0]) for s in switchers]
    assert min(done) >= 40
    assert looked > 5
    assert len(registry.comparisons(tried)) == min(written, 50)
    # Each change starts from the state that the one before it left.
    states = {"1": "", "2": "", "3": ""}
    for event in registry.history(CU):
        assert event.from_state == states[event.version]
        states[event.version] = event.to_state
        assert list(states.values()).count("active") <= 1
    assert sum(e.to_state == "active" for e in registry.history(CU)) == 1 + sum(done)


def test_a_killed_process_leaves_whole_transactions(registry: Registry, state: Path, bundle: Make) -> None:
    for version in "12":
        registry.add(bundle(version), "me")
    switcher = subprocess.Popen([sys.executable, "-c", SWITCHER, str(state), "a"])
    deadline = time.monotonic() + 60
    while not any(e.who == "a" for e in registry.history()) and time.monotonic() < deadline:
        time.sleep(0.001)
    switcher.kill()
    switcher.wait()
    actives = [e for e in registry.history() if e.to_state == "active"]
    assert actives
    last = registry.active(CU)
    assert last is not None
    assert last.version == actives[-1].version
    back = registry.rollback(CU, "me")
    assert (back and back.version) == (actives[-2].version if len(actives) > 1 else None)

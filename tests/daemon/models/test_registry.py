"""The registry: what it takes, keeps, refuses and finds again, with real bundles."""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from testkit.bundles import sign

from daemon.models.registry import Registry, RegistryError, operator
from pipelines.engines.bundle import load_bundle
from pipelines.engines.shipped import find_bundle, shipped_bundles

CU = "laue-Cu-residual"
Make = Callable[..., Path]


def files_below(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


def test_reading_makes_nothing(registry: Registry, state: Path) -> None:
    assert registry.models() == []
    assert registry.active("a") is None
    assert registry.previous("a") is None
    assert registry.history() == []
    with pytest.raises(RegistryError, match="no model 'a' in the registry; `grainwatch models add`"):
        registry.find("a")
    assert not state.exists()


def test_every_bundle_that_comes_along_is_taken_whole(registry: Registry, state: Path) -> None:
    for folder in shipped_bundles().values():
        model = registry.add(folder, "me@here", "for a test")
        described = load_bundle(folder)
        assert (model.name, model.version) == (described.description.name, described.description.version)
        assert (model.kind, model.sha256) == (described.description.kind, described.sha256)
        assert (model.state, model.share) == ("candidate", 0.0)
        assert (model.added_by, model.note) == ("me@here", "for a test")
        assert abs(model.added - time.time()) < 60
        assert files_below(model.folder) == files_below(folder)
        assert registry.verify(model).sha256 == described.sha256
        assert model.folder.is_relative_to(state / "models" / "bundles" / model.name)
    assert len(registry.models()) == len(shipped_bundles()) >= 5


def test_the_copy_outlives_the_original_and_the_process(bundle: Make, state: Path) -> None:
    folder = bundle("0.2.0")
    first = Registry(state)
    model = first.add(folder, "me")
    first.close()
    shutil.rmtree(folder)
    again = Registry(state)
    assert again.models() == [model]
    assert again.verify(model).description.version == "0.2.0"
    again.close()


def test_versions_side_by_side(registry: Registry, bundle: Make) -> None:
    versions = ["0.1.0", "0.2.0", "0.2.0+lab", "2"]
    for version in versions:
        registry.add(bundle(version), "me")
    registry.add(find_bundle("Si"), "me")
    assert [m.version for m in registry.models(CU)] == versions
    assert registry.find(CU, "0.2.0+lab").version == "0.2.0+lab"


def test_the_same_again_is_no_error(registry: Registry, bundle: Make) -> None:
    model = registry.add(bundle("0.2.0"), "me", "first")
    registry.set_state(model, "active", "me")
    again = registry.add(bundle("0.2.0"), "you", "second")
    assert (again.state, again.added_by, again.note) == ("active", "me", "first")
    assert len(registry.models()) == 1


def test_other_contents_of_the_same_version_are_refused(registry: Registry, bundle: Make) -> None:
    model = registry.add(bundle("0.2.0"), "me")
    before = files_below(registry.path.parent)
    with pytest.raises(RegistryError, match=rf"another model {CU} 0\.2\.0 .*give it another version"):
        registry.add(bundle("0.2.0", about="Another one"), "me")
    assert registry.models() == [model]
    assert files_below(registry.path.parent) == before


def test_a_bundle_gets_another_version(registry: Registry) -> None:
    original = load_bundle(find_bundle("Cu"))
    model = registry.add(original.folder, "me", "from the lab", version="0.7.0")
    assert model.version == "0.7.0"
    assert (
        model.note
        == f"from the lab; version {original.description.version} ({original.sha256[:8]}) renumbered"
    )
    copy = registry.verify(model)
    assert copy.description.version == "0.7.0"
    same = set(original.files) - {"bundle.json"}
    assert {n: copy.files[n] for n in same} == {n: original.files[n] for n in same}
    assert registry.add(original.folder, "me", version="0.7.0") == model
    assert registry.add(original.folder, "me").version == original.description.version


@pytest.mark.parametrize("text", ["../evil", "a/b", "", ".hidden", "a b", "x" * 101, "ä", "a\n"])
@pytest.mark.parametrize("what", ["name", "version"])
def test_names_that_are_no_folders(
    registry: Registry, bundle: Make, state: Path, what: str, text: str
) -> None:
    folder = bundle(of="Si", **{what: text})
    with pytest.raises(RegistryError, match=f"the {what} of the model, .* holds more than letters"):
        registry.add(folder, "me")
    assert not state.exists()


def test_what_is_no_intact_bundle_is_refused(registry: Registry, bundle: Make, state: Path) -> None:
    altered = bundle()
    (altered / "classes.npz").write_bytes(b"other")
    with pytest.raises(RegistryError, match=r"classes\.npz: is not the file that the manifest names"):
        registry.add(altered, "me")
    with pytest.raises(RegistryError, match="no such bundle"):
        registry.add(altered / "nowhere", "me")
    assert not state.exists()


# States.


def test_the_way_of_a_model(registry: Registry, bundle: Make) -> None:
    old = registry.add(bundle("1"), "anna")
    new = registry.add(bundle("2"), "anna")
    registry.set_state(old, "active", "anna", "the first")
    shadow = registry.set_state(new, "shadow", "ben", "let us see", share=0.2)
    assert (shadow.state, shadow.share) == ("shadow", 0.2)
    assert registry.set_state(new, "shadow", "ben", "more", share=0.5).share == 0.5
    active = registry.set_state(new, "active", "ben", "it is better")
    assert (active.state, active.share) == ("active", 0.0)
    assert registry.active(CU) == active
    assert registry.find(CU, "1").state == "retired"
    told = [(e.who, e.version, e.from_state, e.to_state, e.share, e.why) for e in registry.history(CU)]
    assert told == [
        ("anna", "1", "", "candidate", 0.0, ""),
        ("anna", "2", "", "candidate", 0.0, ""),
        ("anna", "1", "candidate", "active", 0.0, "the first"),
        ("ben", "2", "candidate", "shadow", 0.2, "let us see"),
        ("ben", "2", "shadow", "shadow", 0.5, "more"),
        ("ben", "1", "active", "retired", 0.0, "version 2 became active"),
        ("ben", "2", "shadow", "active", 0.0, "it is better"),
    ]
    times = [e.time for e in registry.history()]
    assert times == sorted(times)


def test_rollbacks_go_back_and_further_back(registry: Registry, bundle: Make) -> None:
    versions = [registry.add(bundle(v), "me") for v in "123"]
    with pytest.raises(RegistryError, match="nothing to roll back"):
        registry.rollback(CU, "me")
    for model in versions:
        registry.set_state(model, "active", "me")
    for expected in ("2", "1"):
        assert registry.previous(CU) == registry.find(CU, expected)
        back = registry.rollback(CU, "daemon x: automatic", "errors")
        assert back is not None
        assert (back.version, back.state) == (expected, "active")
        assert registry.history()[-1].who == "daemon x: automatic"
    assert registry.previous(CU) is None
    assert registry.rollback(CU, "me") is None
    assert [m.state for m in registry.models()] == ["retired"] * 3
    with pytest.raises(RegistryError, match="nothing to roll back"):
        registry.rollback(CU, "me")


def test_a_rollback_undoes_retiring_to_none(registry: Registry, bundle: Make) -> None:
    model = registry.add(bundle("1"), "me")
    registry.set_state(model, "active", "me")
    registry.set_state(model, "retired", "me")
    assert registry.active(CU) is None
    back = registry.rollback(CU, "me")
    assert back is not None
    assert registry.active(CU) == back


def test_activating_the_one_before_is_no_rollback(registry: Registry, bundle: Make) -> None:
    one, two = (registry.add(bundle(v), "me") for v in "12")
    for model in (one, two, one):
        registry.set_state(model, "active", "me")
    assert registry.previous(CU) == registry.find(CU, "2")


@pytest.mark.parametrize(
    ("before", "to", "words"),
    [
        ("active", "candidate", "is active and cannot become a candidate: activate another version, or roll"),
        ("active", "shadow", "is active and cannot become a shadow"),
        ("active", "active", "is active already"),
        ("candidate", "candidate", "is candidate already"),
        ("retired", "retired", "is retired already"),
    ],
)
def test_changes_that_make_no_sense(
    registry: Registry, bundle: Make, before: str, to: str, words: str
) -> None:
    model = registry.add(bundle("1"), "me")
    if before != "candidate":
        model = registry.set_state(model, before, "me")
    told = len(registry.history())
    with pytest.raises(RegistryError, match=f"{CU} 1 {words}"):
        registry.set_state(model, to, "me", share=0.1)
    assert registry.find(CU).state == before
    assert len(registry.history()) == told


@pytest.mark.parametrize("share", [0.0, -0.1, 1.01, float("nan"), float("inf")])
def test_shares_that_are_none(registry: Registry, bundle: Make, share: float) -> None:
    model = registry.add(bundle(), "me")
    with pytest.raises(RegistryError, match="share of a shadow: expected more than 0 and at most 1"):
        registry.set_state(model, "shadow", "me", share=share)
    with pytest.raises(RegistryError, match="no state 'best'; expected one of candidate, shadow, active"):
        registry.set_state(model, "best", "me")


def test_what_counts_is_the_state_in_the_file(registry: Registry, bundle: Make) -> None:
    stale = registry.add(bundle("1"), "me")
    registry.set_state(stale, "active", "me")
    with pytest.raises(RegistryError, match="is active and cannot become a shadow"):
        registry.set_state(stale, "shadow", "me", share=0.1)


# Finding.


def test_what_may_be_left_out(registry: Registry, bundle: Make) -> None:
    one = registry.add(bundle("1"), "me")
    assert registry.find(CU) == one
    registry.set_state(one, "active", "me")
    two = registry.add(bundle("2"), "me")
    assert registry.find(CU) == two
    assert registry.find(CU, among=("active",)).version == "1"
    registry.add(bundle("3"), "me")
    with pytest.raises(
        RegistryError, match=r"say which version; there are 1 \(active\), 2 \(candidate\), 3 "
    ):
        registry.find(CU)
    with pytest.raises(RegistryError, match=r"no version is shadow; there are 1 \(active\), 2"):
        registry.find(CU, among=("shadow",))
    with pytest.raises(RegistryError, match=r"version 1 is active, not shadow or candidate; there are"):
        registry.find(CU, "1", among=("shadow", "candidate"))
    with pytest.raises(RegistryError, match=r"has no version '4'; there are 1 \(active\)"):
        registry.find(CU, "4")


def test_names_that_are_nearly_right(registry: Registry, bundle: Make) -> None:
    registry.add(bundle("1"), "me")
    registry.add(find_bundle("Si"), "me")
    with pytest.raises(RegistryError, match=f"did you mean {CU}"):
        registry.find("laue-cu-residal")
    with pytest.raises(RegistryError, match=f"there are {CU}, laue-Si-residual"):
        registry.find("x")


# The registry's own copies.


def test_an_altered_copy_is_named(registry: Registry, bundle: Make) -> None:
    original = bundle("1")
    model = registry.add(original, "me")
    network = model.folder / "model.onnx"
    content = bytearray(network.read_bytes())
    content[len(content) // 2] ^= 1
    network.write_bytes(content)
    with pytest.raises(
        RegistryError, match=r"model\.onnx: is not the file .*`grainwatch models add` with the"
    ):
        registry.verify(model)
    # And the same bundle mends it.
    assert registry.add(original, "me") == model
    assert registry.verify(model).sha256 == model.sha256
    network.unlink()
    with pytest.raises(RegistryError, match=r"model\.onnx: cannot be read: No such file"):
        registry.verify(model)


def test_a_copy_that_was_signed_anew_is_not_what_was_added(registry: Registry, bundle: Make) -> None:
    model = registry.add(bundle("1"), "me")
    (model.folder / "classes.npz").write_bytes(b"other")
    sign(model.folder)
    load_bundle(model.folder)
    changed = hashlib.sha256((model.folder / "manifest.sha256").read_bytes()).hexdigest()
    words = (
        f"is not the bundle that was added as {CU} 1: .*{changed[:12]}, the registry says {model.sha256[:12]}"
    )
    with pytest.raises(RegistryError, match=words):
        registry.verify(model)


def test_what_a_crash_left_behind_is_in_nobodys_way(registry: Registry, bundle: Make) -> None:
    folder = bundle("1")
    sha256 = load_bundle(folder).sha256
    below = registry.path.parent / "bundles" / CU
    # Killed before the row was written, killed while it copied, and killed a day ago.
    (below / f"1-{sha256[:12]}").mkdir(parents=True)
    (below / f"1-{sha256[:12]}" / "model.onnx").write_bytes(b"half")
    (below / ".adding-now").mkdir()
    (below / ".adding-old").mkdir()
    os.utime(below / ".adding-old", (time.time() - 86400,) * 2)
    model = registry.add(folder, "me")
    registry.verify(model)
    assert (below / ".adding-now").exists()
    assert not (below / ".adding-old").exists()


def test_who_works_here(monkeypatch: pytest.MonkeyPatch) -> None:
    user, at, host = operator().partition("@")
    assert user
    assert (at, bool(host)) == ("@", True)
    monkeypatch.setenv("SUDO_USER", "anna")
    assert operator() == f"anna@{host}"

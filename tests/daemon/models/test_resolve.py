"""Which bundle a name of a configuration means."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from daemon.models.registry import Registry, RegistryError
from daemon.models.resolve import model_name, names_of, resolve, without_registry
from pipelines.engines.bundle import BundleError, load_bundle
from pipelines.engines.shipped import find_bundle, shipped_bundles
from pipelines.frame import ModelRef

CU = "laue-Cu-residual"
Make = Callable[..., Path]


def shipped(name: str) -> ModelRef:
    folder = find_bundle(name)
    return ModelRef(str(folder), load_bundle(folder).sha256)


def test_without_a_registry_names_mean_what_comes_along(registry: Registry) -> None:
    names = list(shipped_bundles())
    expected = {name: shipped(name) for name in names}
    assert resolve(names, None) == resolve(names, registry) == expected
    assert resolve([], registry) == {}


def test_an_active_model_takes_the_place(registry: Registry, bundle: Make, state: Path) -> None:
    model = registry.add(bundle("0.2.0"), "me")
    assert resolve(["Cu"], registry) == {"Cu": shipped("Cu")}
    registry.set_state(model, "shadow", "me", share=0.1)
    assert resolve(["Cu"], registry) == {"Cu": shipped("Cu")}
    registry.set_state(model, "active", "me")
    ref = ModelRef(str(model.folder), model.sha256)
    assert resolve(["Cu", "Si", CU, "Cu"], registry) == {"Cu": ref, "Si": shipped("Si"), CU: ref}
    assert load_bundle(Path(ref.folder)).sha256 == ref.sha256
    registry.rollback(CU, "me")
    assert resolve(["Cu"], registry) == {"Cu": shipped("Cu")}


def test_a_folder_stays_that_folder(registry: Registry, bundle: Make) -> None:
    registry.set_state(registry.add(bundle("0.2.0"), "me"), "active", "me")
    own = bundle("0.3.0")
    assert resolve([str(own)], registry) == {str(own): ModelRef(str(own), load_bundle(own).sha256)}


def test_a_folder_that_is_called_as_one_that_comes_along(
    registry: Registry, bundle: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `find_bundle` has it: a bundle that lies there counts before the one that comes along."""
    registry.set_state(registry.add(bundle("0.2.0"), "me"), "active", "me")
    own = bundle("0.3.0").rename(tmp_path / "Cu")
    monkeypatch.chdir(tmp_path)
    assert resolve(["Cu"], registry)["Cu"].sha256 == load_bundle(own).sha256
    assert model_name("Cu") == "Cu"


def test_what_means_nothing(registry: Registry, bundle: Make) -> None:
    with pytest.raises(BundleError, match="nowhere: there is no such folder; bundles that come with"):
        resolve(["nowhere"], registry)
    registry.add(bundle(name="mine"), "me")
    with pytest.raises(BundleError, match=r"mine: no version of this model is active \(.* is candidate\)"):
        resolve(["mine"], registry)


def test_an_altered_copy_is_not_used(registry: Registry, bundle: Make) -> None:
    model = registry.set_state(registry.add(bundle("0.2.0"), "me"), "active", "me")
    (model.folder / "model.onnx").write_bytes(b"other")
    with pytest.raises(
        RegistryError, match=r"0\.2\.0-.*model\.onnx: is not the file that the manifest names"
    ):
        resolve(["Cu"], registry)
    own = bundle()
    (own / "model.onnx").write_bytes(b"other")
    with pytest.raises(BundleError, match=r"model\.onnx: is not the file"):
        resolve([str(own)], registry)


def test_names_of_a_model() -> None:
    assert model_name("Cu") == CU
    assert model_name("anything") == "anything"
    assert names_of(CU, ["Si", "Cu", CU, "Cu", "other"]) == ("Cu", CU)
    assert names_of("other", ["Si", "Cu", "other"]) == ("other",)
    assert without_registry(CU, ["Si", "Cu"]) == find_bundle("Cu")
    assert without_registry(CU, ["Si", CU]) is None

"""A bundle is used as it was made, or refused with the file named."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from testkit.bundles import redescribe, sign
from testkit.onnx import DOUBLE, INT64, Port, network

from pipelines.engines.bundle import BundleError, load_bundle
from pipelines.engines.onnxruntime_engine import OnnxEngine
from pipelines.engines.shipped import find_bundle, shipped_bundles

SHIPPED = Path(__file__).resolve().parents[3] / "bundles" / "Cu"
KIND = "laue-classes"


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(SHIPPED, tmp_path / "bundle", ignore=shutil.ignore_patterns("checkpoint*")))


def test_a_shipped_bundle_passes_its_own_test(copy: Path) -> None:
    bundle = load_bundle(copy, KIND)
    engine = OnnxEngine(bundle)
    width = bundle.description.inputs["features"]["shape"][1]
    for batch in (1, 3, 200):
        p = engine.run({"features": np.zeros((batch, width), np.float32)})["probability"]
        assert p.shape == (batch, bundle.description.outputs["probability"]["shape"][1])
        np.testing.assert_allclose(p.sum(axis=1), 1.0, atol=1e-5)
    manifest = (copy / "manifest.sha256").read_bytes()
    assert bundle.model.sha256 == hashlib.sha256(manifest).hexdigest()


@pytest.mark.parametrize("name", shipped_bundles())
def test_what_is_shipped_tells_nobody_s_paths(name: str) -> None:
    # Exporters note where the code lay that called them.
    for file, content in load_bundle(find_bundle(name)).files.items():
        for path in (b"/home/", b"/tmp/", b"/root/", b"/usr/", b"site-packages", b'.py", line'):
            assert path not in content, f"{name}/{file} holds {path.decode()}"


@pytest.mark.parametrize("name", ["model.onnx", "bundle.json", "classes.npz", "selftest.npz"])
def test_one_altered_byte_is_refused(copy: Path, name: str) -> None:
    content = bytearray((copy / name).read_bytes())
    content[len(content) // 2] ^= 1
    (copy / name).write_bytes(content)
    with pytest.raises(BundleError, match=rf"{name}: is not the file"):
        load_bundle(copy, KIND)


def test_a_bundle_that_changed_since_it_was_chosen_is_refused(copy: Path) -> None:
    chosen = load_bundle(copy, KIND).sha256
    assert load_bundle(copy, KIND, chosen).sha256 == chosen
    redescribe(copy, lambda description: description.update(version="9"))
    with pytest.raises(
        BundleError, match=r"bundle: has changed since it was taken: .* as a model of its own"
    ):
        load_bundle(copy, KIND, chosen)


@pytest.mark.parametrize("name", ["model.onnx", "bundle.json", "manifest.sha256"])
def test_a_missing_file_is_named(copy: Path, name: str) -> None:
    (copy / name).unlink()
    with pytest.raises(BundleError, match=rf"{name}: cannot be read"):
        load_bundle(copy, KIND)


def test_a_manifest_reaches_no_file_outside(copy: Path) -> None:
    (copy / "manifest.sha256").write_text(f"{'0' * 64}  ../secret\n")
    with pytest.raises(BundleError, match="line 1 is no sha256 and file name"):
        load_bundle(copy, KIND)


def test_a_foreign_network_is_refused(copy: Path) -> None:
    (copy / "model.onnx").write_bytes(b"not a network")
    sign(copy)
    with pytest.raises(BundleError, match="ONNX Runtime refuses it"):
        OnnxEngine(load_bundle(copy, KIND))


def _refusal(folder: Path) -> str:
    """What a bundle is told whose manifest is right and whose network or self-test is not."""
    sign(folder)
    with pytest.raises(BundleError) as caught:
        OnnxEngine(load_bundle(folder, KIND))
    message = str(caught.value)
    assert message.startswith(str(folder))
    assert "\n" not in message
    assert len(message) < 700
    return message


def _ports(folder: Path) -> tuple[Port, Port]:
    description = json.loads((folder / "bundle.json").read_text())
    (x,), (y,) = description["inputs"].items(), description["outputs"].items()
    return Port(x[0], x[1]["shape"]), Port(y[0], y[1]["shape"])


@pytest.mark.parametrize("keep", [0, 100, 0.5, 0.999])
def test_a_truncated_network_is_refused(copy: Path, keep: float) -> None:
    content = (copy / "model.onnx").read_bytes()
    (copy / "model.onnx").write_bytes(content[: int(keep if keep >= 1 else keep * len(content))])
    assert "model.onnx: ONNX Runtime refuses it: " in _refusal(copy)


def test_an_operator_that_nobody_knows_is_named(copy: Path) -> None:
    x, y = _ports(copy)
    model = network([x], [y], [("Frobnicate", [x.name], [y.name])])
    (copy / "model.onnx").write_bytes(model)
    message = _refusal(copy)
    assert "model.onnx: ONNX Runtime refuses it: " in message
    assert "Frobnicate" in message
    (copy / "model.onnx").write_bytes(
        network([x], [y], [("Relu", [x.name], [y.name])], domain="com.example.lab")
    )
    assert "com.example.lab" in _refusal(copy)
    (copy / "model.onnx").write_bytes(network([x], [y], [("Relu", [x.name], [y.name])], opset=999))
    assert "model.onnx: ONNX Runtime refuses it: " in _refusal(copy)


def test_inputs_and_outputs_are_those_that_the_bundle_says(copy: Path) -> None:
    x, y = _ports(copy)
    width = x.shape[1]

    def told(inputs: list[Port], outputs: list[Port], operator: str = "Relu") -> str:
        node = (operator, [p.name for p in inputs], [p.name for p in outputs][:1])
        more = [("Relu", [inputs[0].name], [p.name]) for p in outputs[1:]]
        (copy / "model.onnx").write_bytes(network(inputs, outputs, [node, *more]))
        return _refusal(copy)

    renamed = Port("image", x.shape)
    assert "its inputs are image, bundle.json says features" in told([renamed], [Port(y.name, x.shape)])
    assert "its outputs are guess, bundle.json says probability" in told([x], [Port("guess", x.shape)])
    two = [x, Port("energy", x.shape)]
    assert "its inputs are features, energy, bundle.json" in told(two, [Port(y.name, x.shape)], "Add")
    both = [Port(y.name, x.shape), Port("again", x.shape)]
    assert "its outputs are probability, again, bundle.json" in told([x], both)
    fixed = [Port(x.name, [1, width]), Port(y.name, [1, width])]
    said = f"bundle.json says float32 [batch, {width}]; make the bundle again"
    assert f"its input features is float32 [1, {width}], {said}" in told(fixed[:1], fixed[1:])
    cube = Port(x.name, ["batch", 3, width])
    message = told([cube], [Port(y.name, cube.shape)])
    assert f"its input features is float32 [batch, 3, {width}], {said}" in message
    whole = Port(x.name, x.shape, INT64)
    message = told([whole], [Port(y.name, x.shape, INT64)], "Abs")
    assert f"its input features is int64 [batch, {width}], {said}" in message
    fine = Port(x.name, x.shape, DOUBLE)
    assert "its input features is float64" in told([fine], [Port(y.name, x.shape, DOUBLE)], "Abs")
    narrow = Port(x.name, ["batch", 900])
    message = told([narrow], [Port(y.name, narrow.shape)])
    assert f"its input features is float32 [batch, 900], {said}" in message
    free = Port(x.name, ["batch", "width"])
    message = told([free], [Port(y.name, free.shape)])
    assert "features is of shape ['batch', 'width']: only the first dimension may be free" in message
    # Relu keeps the width: as many classes as features are not what the bundle says.
    assert f"bundle.json says float32 [batch, {y.shape[1]}]" in told([x], [Port(y.name, x.shape)])


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({}, "expected arrays input and output"),
        ({"input": np.zeros((2, 3)), "output": np.zeros((2, 3))}, "the network takes"),
        ({"input": np.zeros(3), "output": np.zeros(3)}, "the network takes"),
        ({"input": np.array(["a"]), "output": np.zeros(1)}, "expected arrays input and output"),
    ],
)
def test_a_self_test_of_something_else_is_refused(
    copy: Path, arrays: dict[str, np.ndarray], words: str
) -> None:
    np.savez(copy / "selftest.npz", **arrays)
    message = _refusal(copy)
    assert "selftest.npz: " in message
    assert words in message


@pytest.mark.parametrize("content", [b"", b"not an archive", b"PK\x03\x04 truncated"])
def test_a_self_test_that_is_no_archive_is_refused(copy: Path, content: bytes) -> None:
    (copy / "selftest.npz").write_bytes(content)
    assert "selftest.npz: expected arrays input and output" in _refusal(copy)


def test_an_answer_that_is_no_number_and_an_empty_self_test_are_refused(copy: Path) -> None:
    with np.load(copy / "selftest.npz", allow_pickle=False) as stored:
        x, y = stored["input"], stored["output"]
    np.savez(copy / "selftest.npz", input=np.full_like(x, np.nan), output=y)
    assert "answers are off by" in _refusal(copy)
    np.savez(copy / "selftest.npz", input=x[:0], output=y[:0])
    assert "holds no row to test with" in _refusal(copy)
    np.savez(copy / "selftest.npz", input=x, output=y[:3])
    assert "holds arrays of unequal length" in _refusal(copy)


def test_a_bundle_without_its_tolerance_is_refused(copy: Path) -> None:
    description = json.loads((copy / "bundle.json").read_text())
    (copy / "bundle.json").write_text(json.dumps(description | {"tolerances": {}}))
    assert "bundle.json: tolerances has no self_test" in _refusal(copy)


def test_a_network_that_answers_otherwise_is_refused(copy: Path) -> None:
    with np.load(copy / "selftest.npz", allow_pickle=False) as stored:
        x, y = stored["input"], stored["output"]
    np.savez(copy / "selftest.npz", input=x, output=np.roll(y, 1, axis=0))
    sign(copy)
    with pytest.raises(BundleError, match=r"answers are off by .*, allowed 0.001"):
        OnnxEngine(load_bundle(copy, KIND))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": "grainwatch.bundle/9"}, "this version reads 'grainwatch.bundle/1'"),
        ({"kind": "stress"}, "kind 'stress', expected 'laue-classes'"),
        ({"surprise": 1}, "surprise"),
    ],
)
def test_a_description_of_something_else_is_refused(
    copy: Path, change: dict[str, object], message: str
) -> None:
    description = json.loads((copy / "bundle.json").read_text())
    (copy / "bundle.json").write_text(json.dumps(description | change))
    sign(copy)
    with pytest.raises(BundleError, match=message):
        load_bundle(copy, KIND)


def test_no_folder_is_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="no such bundle"):
        load_bundle(tmp_path / "nowhere", KIND)


def test_further_networks_are_bundles_of_their_own(copy: Path) -> None:
    prior = network([Port("x", ["batch", 3])], [Port("y", ["batch", 3])], [("Neg", ["x"], ["y"])])
    (copy / "prior.onnx").write_bytes(prior)
    x = np.arange(12, dtype=np.float32).reshape(4, 3)
    np.savez(copy / "prior.selftest.npz", input=x, output=-x)
    port = {"type": "float32", "shape": ["batch", 3]}
    described = {"inputs": {"x": port}, "outputs": {"y": port}, "tolerances": {"self_test": 1e-6}}
    redescribe(copy, lambda d: d.update(networks={"prior": {**described, "batch": [1, 2, 4]}}))
    bundle = load_bundle(copy, KIND)
    assert [network.part for network in bundle.networks()] == ["", "prior"]
    part = bundle.network("prior")
    assert (part.model, part.description.batch) == (bundle.model, (1, 2, 4))
    np.testing.assert_array_equal(OnnxEngine(part).run({"x": x})["y"], -x)
    # The first one is as it was.
    assert OnnxEngine(bundle).inputs.keys() == {"features"}
    with pytest.raises(BundleError, match=r"no network 'posterior'; further networks: prior"):
        bundle.network("posterior")
    np.savez(copy / "prior.selftest.npz", input=x, output=x)
    sign(copy)
    with pytest.raises(BundleError, match=r"prior\.selftest\.npz: its fp32 answers are off by 22"):
        OnnxEngine(load_bundle(copy, KIND).network("prior"))
    (copy / "prior.selftest.npz").unlink()
    sign(copy)
    with pytest.raises(BundleError, match=r"prior\.selftest\.npz: the bundle has no such file"):
        load_bundle(copy, KIND).network("prior")

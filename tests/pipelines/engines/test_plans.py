"""Plans are built without a GPU, found again, and refused when they are not whole."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from testkit.bundles import redescribe, sign
from testkit.networks import STAND_INS, surrogate, unknown_operator, vae

from pipelines.engines.builder import build_engine
from pipelines.engines.bundle import Bundle, BundleError, load_bundle, write_bundle
from pipelines.engines.cuda import Cuda, probe
from pipelines.engines.flavours import EngineError, flavour_of
from pipelines.engines.onnxruntime_session import import_onnxruntime
from pipelines.engines.plan_cache import PlanKey, read_plan, write_plan
from pipelines.engines.plans import Batch, Plan, build_plan
from pipelines.engines.precision import in_precision
from pipelines.engines.shipped import shipped_bundles

RTX = flavour_of("tensorrt_rtx")
BATCH = Batch(1, 4, 16)
NO_GPU = Cuda("no NVIDIA driver")
KEY = PlanKey("ab" * 32, "tensorrt_rtx", "1.7", "any", "fp32", BATCH)


NETWORKS = [
    (name, network.part)
    for name, path in sorted(shipped_bundles().items())
    for network in load_bundle(path).networks()
]


def network_of(name: str, part: str) -> Bundle:
    bundle = load_bundle(shipped_bundles()[name])
    return bundle.network(part) if part else bundle


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize("name", sorted(shipped_bundles("laue-classes")))
def test_every_shipped_bundle_for_laue_builds_in_every_precision(
    name: str, precision: str, tmp_path: Path
) -> None:
    built = check_plan(load_bundle(shipped_bundles()[name]), precision, tmp_path)
    # The network stays what callers know: single precision in and out.
    assert {kind for kind, _ in (built.inputs | built.outputs).values()} == {"float"}


@pytest.mark.parametrize(("name", "part"), NETWORKS)
def test_every_network_that_comes_along_builds(name: str, part: str, tmp_path: Path) -> None:
    check_plan(network_of(name, part), "fp32", tmp_path)


@pytest.mark.parametrize("name", sorted(shipped_bundles("micrograph-vqvae")))
def test_numbers_survive_half_precision(name: str, tmp_path: Path) -> None:
    parts = [part for of, part in NETWORKS if of == name and part]
    assert {"decoder", "prior"} <= set(parts)
    for part in parts:
        check_plan(network_of(name, part), "fp16", tmp_path)


def check_plan(bundle: Bundle, precision: str, folder: Path) -> Plan:
    built = build_engine(bundle, RTX, NO_GPU, precision, BATCH, folder)
    assert built.plan is not None
    assert built.plan.seconds < 60
    assert built.deviation <= built.tolerance
    assert read_plan(built.key, folder) == built.content == built.plan.content
    for ports, stated in (
        (built.plan.inputs, bundle.description.inputs),
        (built.plan.outputs, bundle.description.outputs),
    ):
        assert {name: shape[1:] for name, (_, shape) in ports.items()} == {
            name: tuple(port["shape"][1:]) for name, port in stated.items()
        }
    return built.plan


def test_fewer_bits_make_smaller_plans(tmp_path: Path) -> None:
    bundle = load_bundle(shipped_bundles()["Cu"])
    sizes = [
        len(build_engine(bundle, RTX, NO_GPU, p, BATCH, tmp_path).content) for p in ("fp32", "fp16", "int8")
    ]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[2] < 0.7 * sizes[0]


@pytest.mark.parametrize("name", STAND_INS)
def test_the_networks_of_coming_bundles_build(name: str) -> None:
    plan = build_plan(STAND_INS[name](), RTX, BATCH)
    assert plan.content
    assert plan.layers > 0
    ((_, shape),) = plan.inputs.values()
    assert shape[0] == -1


def test_half_precision_answers_as_single_does_but_for_its_digits() -> None:
    x = np.random.default_rng(0).standard_normal((5, 64)).astype(np.float32)

    def answers(model: bytes) -> np.ndarray:
        session = import_onnxruntime().InferenceSession(model, providers=["CPUExecutionProvider"])
        return np.asarray(session.run(None, {"latent": x})[0])

    single = answers(surrogate())
    half = np.abs(answers(in_precision(surrogate(), "fp16")) - single).max()
    integer = np.abs(answers(in_precision(surrogate(), "int8", {"latent": x})) - single).max()
    assert 0 < half < 2e-3 * np.abs(single).max()
    assert half < integer < 0.1 * np.abs(single).max()


def test_integers_need_typical_inputs() -> None:
    with pytest.raises(EngineError, match="the bundle holds none"):
        in_precision(surrogate(), "int8")
    with pytest.raises(EngineError, match="'fp8': expected one of fp32, fp16, int8"):
        in_precision(surrogate(), "fp8")
    with pytest.raises(EngineError, match="no ONNX"):
        in_precision(b"nonsense", "fp16")


def test_an_operator_that_is_not_known_is_named() -> None:
    with pytest.raises(EngineError, match=r"operator Det \(node 'node\d+'\): it knows no such operator"):
        build_plan(unknown_operator(), RTX, BATCH)


@pytest.mark.parametrize(
    "content", [b"", b"nonsense" * 20, vae()[: len(vae()) // 2]], ids=["empty", "noise", "half"]
)
def test_what_is_no_network_is_refused(content: bytes) -> None:
    with pytest.raises(EngineError, match=r"tensorrt_rtx .* does not take the network"):
        build_plan(content, RTX, BATCH)


def test_other_inputs_than_the_bundle_says() -> None:
    with pytest.raises(
        EngineError, match=r"has inputs latent \[batch, 64\], the bundle says latent \[batch, 65\]"
    ):
        build_plan(surrogate(), RTX, BATCH, {"inputs": {"latent": (-1, 65)}})
    with pytest.raises(EngineError, match=r"outputs stress_MPa .*, the bundle says stress "):
        build_plan(surrogate(), RTX, BATCH, {"outputs": {"stress": (-1, 40)}})


def test_a_precision_that_spoils_the_answers_is_refused(tmp_path: Path) -> None:
    bundle = load_bundle(shipped_bundles()["ZrO2"])
    strict = {**bundle.description.tolerances, "int8": 1e-6}
    description = msgspec.structs.replace(bundle.description, tolerances=strict)
    files = {name: content for name, content in bundle.files.items() if name != "bundle.json"}
    write_bundle(tmp_path / "strict", description, files)
    with pytest.raises(EngineError, match=r"in int8 the answers are off by .*, allowed 1e-06"):
        build_engine(load_bundle(tmp_path / "strict"), RTX, NO_GPU, "int8", BATCH, tmp_path / "plans")
    assert not (tmp_path / "plans").exists()


def _stored(**arrays: np.ndarray) -> bytes:
    stored = io.BytesIO()
    np.savez(stored, **arrays)  # type: ignore[arg-type]
    return stored.getvalue()


@pytest.mark.parametrize(
    ("selftest", "said"),
    [
        (_stored(a=np.zeros(3)), "expected arrays input and output"),
        (b"hello", "expected arrays input and output"),
        (b"", "expected arrays input and output"),
        (_stored(input=np.zeros((0, 1429)), output=np.zeros((0, 28))), "holds no row to test with"),
    ],
    ids=["other arrays", "no archive", "empty", "no rows"],
)
def test_a_bundle_that_cannot_be_tested_is_refused(selftest: bytes, said: str, tmp_path: Path) -> None:
    shutil.copytree(shipped_bundles()["Cu"], tmp_path / "Cu")
    (tmp_path / "Cu" / "selftest.npz").write_bytes(selftest)
    sign(tmp_path / "Cu")
    with pytest.raises(BundleError, match=rf"selftest\.npz: {said}"):
        build_engine(load_bundle(tmp_path / "Cu"), RTX, NO_GPU, "fp32", BATCH, tmp_path)


@pytest.mark.parametrize(
    "inputs", [{}, {"features": {}}, {"features": "any"}, {"features": {"shape": ["batch", "n"]}}]
)
def test_a_bundle_that_does_not_describe_its_network_is_refused(
    inputs: dict[str, Any], tmp_path: Path
) -> None:
    shutil.copytree(shipped_bundles()["Cu"], tmp_path / "Cu")
    redescribe(tmp_path / "Cu", lambda description: description.update(inputs=inputs))
    with pytest.raises(BundleError, match=r"bundle\.json: inputs .*expected"):
        build_engine(load_bundle(tmp_path / "Cu"), RTX, NO_GPU, "fp32", BATCH, tmp_path)


def test_what_the_converters_stumble_over_is_one_line() -> None:
    x = np.zeros((2, 7), dtype=np.float32)
    with pytest.raises(EngineError, match=r"cannot be put into int8: .*Got: 7 Expected: 64") as caught:
        in_precision(surrogate(), "int8", {"latent": x})
    assert "\n" not in str(caught.value)


def test_the_data_centre_flavour_needs_its_gpu() -> None:
    bundle = load_bundle(shipped_bundles()["Cu"])
    with pytest.raises(EngineError, match="builds on the GPU that will run the plan: no NVIDIA driver"):
        build_engine(bundle, flavour_of("tensorrt"), NO_GPU)
    with pytest.raises(EngineError, match="did you mean tensorrt_rtx"):
        flavour_of("tensort_rtx")


def test_an_old_driver_is_said_to_be_old() -> None:
    old = Cuda("", (12, 4), "a card", (8, 0))
    assert old.lacks((13, 0)) == (
        "the driver of a card serves CUDA 12.4, but 13.0 is needed: update the driver"
    )
    assert Cuda("", (13, 1), "a card", (9, 0)).lacks((13, 0)) == ""


def test_asking_the_driver_never_fails() -> None:
    found = probe()
    assert bool(found.problem) != bool(found.device)


# The cache.


def test_a_plan_is_found_under_what_it_was_made_from_alone(tmp_path: Path) -> None:
    assert read_plan(KEY, tmp_path) is None
    path = write_plan(KEY, b"plan", tmp_path)
    assert read_plan(KEY, tmp_path) == b"plan"
    others = [
        PlanKey("cd" * 32, KEY.flavour, KEY.version, KEY.architecture, KEY.precision, KEY.batch),
        PlanKey(KEY.onnx_sha256, KEY.flavour, "1.8", KEY.architecture, KEY.precision, KEY.batch),
        PlanKey(KEY.onnx_sha256, KEY.flavour, KEY.version, "sm90", KEY.precision, KEY.batch),
        PlanKey(KEY.onnx_sha256, KEY.flavour, KEY.version, KEY.architecture, "fp16", KEY.batch),
        PlanKey(KEY.onnx_sha256, KEY.flavour, KEY.version, KEY.architecture, KEY.precision, Batch()),
    ]
    for other in others:
        assert read_plan(other, tmp_path) is None
        # Not even under a wrong name is it taken for another one.
        shutil.copy(path, tmp_path / other.file_name)
        with pytest.raises(EngineError, match="made from something else"):
            read_plan(other, tmp_path)


@pytest.mark.parametrize("at", [0, 40, 60, -1])
def test_a_damaged_plan_is_refused(at: int, tmp_path: Path) -> None:
    path = write_plan(KEY, b"x" * 1000, tmp_path)
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)
    with pytest.raises(EngineError, match=r"\.plan: is damaged .*: build the engine again"):
        read_plan(KEY, tmp_path)


@pytest.mark.parametrize("size", [0, 10, 32, 300])
def test_a_plan_cut_short_is_refused(size: int, tmp_path: Path) -> None:
    path = write_plan(KEY, b"x" * 1000, tmp_path)
    os.truncate(path, size)
    with pytest.raises(EngineError, match=r"\.plan: is damaged"):
        read_plan(KEY, tmp_path)


def test_a_disk_that_takes_nothing_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(EngineError, match="cannot be written: Not a directory"):
        write_plan(KEY, b"plan", tmp_path / "file" / "engines")
    folder = tmp_path / "engines"
    (folder / KEY.file_name).mkdir(parents=True)
    with pytest.raises(EngineError, match="cannot be written"):
        write_plan(KEY, b"plan", folder)
    assert [path.name for path in folder.iterdir()] == [KEY.file_name]


# The command.


def run(tmp_path: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "grainwatch", "engine", *words],
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
        cwd=tmp_path,
    )


def test_the_command_builds_and_says_what_it_did_not_do(tmp_path: Path) -> None:
    options = ("--flavour", "tensorrt_rtx", "--precision", "fp16", "--out", "plans")
    answer = run(tmp_path, "build", "Cu", "Ge", *options, "--json")
    assert answer.returncode == 0, answer.stderr
    facts = [json.loads(line) for line in answer.stdout.splitlines()]
    assert [f["bundle"] for f in facts] == ["Cu", "Ge"]
    assert all((tmp_path / f["path"]).is_file() for f in facts)
    assert all(f["architecture"] == "any" for f in facts)
    assert all(f["built"] and f["layers"] > 0 for f in facts)
    before = (tmp_path / facts[0]["path"]).stat().st_mtime_ns
    answer = run(tmp_path, "build", "Cu", *options)
    assert "Cu: fp16 plan, " in answer.stdout
    assert "found in the cache (--again builds it)" in answer.stdout
    assert (tmp_path / facts[0]["path"]).stat().st_mtime_ns == before
    answer = run(tmp_path, "build", "Cu", *options, "--again")
    assert "Cu: fp16 plan of" in answer.stdout
    assert (tmp_path / facts[0]["path"]).stat().st_mtime_ns > before
    if probe().problem:
        assert f"not run: {probe().problem}" in answer.stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("build", "Xy"), "engine build: Xy: there is no such folder; bundles that come with grainwatch"),
        (("build", "Cu", "--precision", "fp64"), "precision 'fp64': expected one of fp32, fp16, int8"),
        (("build", "Cu", "--flavour", "cuda"), "flavour 'cuda' is not known"),
        (("build", "Cu", "--batch", "4", "2", "8"), "expected 1 <= low <= typical <= high"),
        (("build", "Cu", "--out", __file__), "test_plans.py: is no folder"),
    ],
)
def test_what_cannot_be_is_one_clear_line(words: tuple[str, ...], said: str, tmp_path: Path) -> None:
    answer = run(tmp_path, *words)
    assert answer.returncode == 2
    assert said in answer.stderr
    assert "Traceback" not in answer.stderr


def test_backends_are_listed(tmp_path: Path) -> None:
    listed = json.loads(run(tmp_path, "backends", "--json").stdout)
    names = [b["backend"] for b in listed["backends"]]
    assert names == ["onnxruntime", "tensorrt", "tensorrt_rtx", "openvino"]
    assert listed["gpu"]

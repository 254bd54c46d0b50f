"""Whatever runs a network answers as the bundle says, refuses what it does not take, and is replaced."""

from __future__ import annotations

import logging
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from onnx import TensorProto
from testkit.bundles import redescribe
from testkit.engines import BreakingEngine, bundle_of
from testkit.networks import Graph, vq_encoder

from grainwatch.config import EnginesTable
from pipelines.engines.bundle import Bundle, BundleError, Description, load_bundle, write_bundle
from pipelines.engines.choice import Candidate, FallbackEngine, open_engine, prospect
from pipelines.engines.cuda import Cuda, probe
from pipelines.engines.engine import Engine, EngineFailure
from pipelines.engines.flavours import EngineError
from pipelines.engines.onnxruntime_engine import OnnxEngine
from pipelines.engines.onnxruntime_session import open_session
from pipelines.engines.openvino_engine import OpenVinoEngine
from pipelines.engines.selftest import deviation, read_self_test
from pipelines.engines.shipped import shipped_bundles
from pipelines.engines.tensorrt_engine import TensorrtEngine

NO_GPU = Cuda("no NVIDIA driver")
CARD = Cuda("", (13, 1), "a card", (9, 0))


def two_and_two() -> bytes:
    """A network of an image and two numbers a row to an image and a class."""
    g = Graph()
    x = g.add("Conv", "image", g.weight(2, 1, 3, 3), g.weight(2), kernel_shape=[3, 3], pads=[1, 1, 1, 1])
    mean = g.add("ReduceMean", x, g.constant(np.array([2, 3], np.int64)), keepdims=0)
    logits = g.add("Gemm", g.add("Add", mean, "settings"), g.weight(2, 4), g.weight(4))
    best = g.add("ArgMax", logits, axis=1, keepdims=0)
    return g.model(
        {
            "image": (TensorProto.FLOAT, ["batch", 1, 8, 8]),
            "settings": (TensorProto.FLOAT, ["batch", 2]),
        },
        {
            "features": (x, TensorProto.FLOAT, ["batch", 2, 8, 8]),
            "best": (best, TensorProto.INT64, ["batch"]),
        },
    )


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    rng = np.random.default_rng(1)
    return bundle_of(
        tmp_path_factory.mktemp("bundles") / "several",
        two_and_two(),
        {"image": ("float32", ["batch", 1, 8, 8]), "settings": ("float32", ["batch", 2])},
        {"features": ("float32", ["batch", 2, 8, 8]), "best": ("int64", ["batch"])},
        {
            "image": rng.standard_normal((6, 1, 8, 8)).astype(np.float32),
            "settings": rng.standard_normal((6, 2)).astype(np.float32),
        },
    )


@pytest.fixture(scope="module")
def copper() -> Bundle:
    return load_bundle(shipped_bundles()["Cu"])


def changed(bundle: Bundle, folder: Path, **changes: Any) -> Bundle:
    description: Description = msgspec.structs.replace(bundle.description, **changes)
    files = {name: content for name, content in bundle.files.items() if name != "bundle.json"}
    write_bundle(folder, description, files)
    return load_bundle(folder)


# One engine.


@pytest.mark.parametrize("engine_of", [OnnxEngine, OpenVinoEngine])
def test_several_named_inputs_and_outputs_of_any_rank(engine_of: Any, several: Bundle) -> None:
    engine = engine_of(several)
    assert {name: str(t) for name, t in engine.inputs.items()} == {
        "image": "float32 [batch, 1, 8, 8]",
        "settings": "float32 [batch, 2]",
    }
    test = read_self_test(several)
    answers = engine.run(test.inputs)
    assert answers.keys() == {"features", "best"}
    assert answers["best"].dtype == np.int64
    assert deviation(engine.run, test) < 1e-5
    # Answers belong to the caller: the next batch leaves them alone.
    before = answers["features"].copy()
    engine.run({name: 0 * x for name, x in test.inputs.items()})
    np.testing.assert_array_equal(answers["features"], before)
    empty = engine.run({name: x[:0] for name, x in test.inputs.items()})
    assert {name: a.shape for name, a in empty.items()} == {"features": (0, 2, 8, 8), "best": (0,)}


def test_integers_in_and_out(tmp_path: Path) -> None:
    image = np.random.default_rng(0).standard_normal((3, 1, 128, 128)).astype(np.float32)
    codes = ("int32", ["batch", 16, 16])
    bundle = bundle_of(
        tmp_path,
        vq_encoder(),
        {"image": ("float32", ["batch", 1, 128, 128])},
        {"codes": codes},
        {"image": image},
    )
    assert OnnxEngine(bundle).run({"image": image[:1]})["codes"].shape == (1, 16, 16)


@pytest.mark.parametrize("engine_of", [OnnxEngine, OpenVinoEngine, open_engine])
def test_inputs_that_it_does_not_take_are_named(engine_of: Any, several: Bundle) -> None:
    engine = engine_of(several)
    image, settings = np.zeros((2, 1, 8, 8), np.float32), np.zeros((2, 2), np.float32)
    for given, said in (
        ({}, "given nothing; the network takes image, settings"),
        ({"image": image}, "given image; the network takes image, settings"),
        ({"image": image, "setings": settings}, "given image, setings; the network takes"),
        (
            {"image": image.astype(float), "settings": settings},
            "image is float64 of shape [2, 1, 8, 8]; the network takes float32 [batch, 1, 8, 8]",
        ),
        (
            {"image": image[:, 0], "settings": settings},
            "image is float32 of shape [2, 8, 8]; the network takes",
        ),
        ({"image": image, "settings": settings[:1]}, "inputs of unequal length: image 2, settings 1"),
        ({"image": image, "settings": np.float32(1) * np.ones(())}, "settings is float64 of shape []"),
    ):
        with pytest.raises(EngineError) as caught:
            engine.run(given)
        assert said in str(caught.value)
        assert not isinstance(caught.value, EngineFailure)
    # And none of it has harmed the engine.
    assert engine.run({"image": image, "settings": settings})["best"].shape == (2,)


def test_a_batch_is_not_copied_on_its_way(copper: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = OnnxEngine(copper)
    x = read_self_test(copper).inputs["features"]
    seen: list[Any] = []
    inner = engine._session

    class Spy:
        def run(self, names: list[str], feed: dict[str, Any]) -> Any:
            answers = inner.run(names, feed)
            seen.extend([feed["features"], answers[0]])
            return answers

    monkeypatch.setattr(engine, "_session", Spy())
    out = engine.run({"features": x})["probability"]
    assert seen[0] is x
    assert seen[1] is out


@pytest.mark.parametrize(("precision", "least", "most"), [("fp16", 1e-6, 0.02), ("int8", 1e-4, 0.1)])
def test_fewer_bits_answer_within_their_tolerance(
    precision: str, least: float, most: float, copper: Bundle
) -> None:
    engine = OnnxEngine(copper, precision)
    assert engine.about.precision == precision
    assert least < deviation(engine.run, read_self_test(copper)) <= most


def test_openvino_computes_in_what_it_is_told(copper: Bundle) -> None:
    test = read_self_test(copper)
    single = deviation(OpenVinoEngine(copper).run, test)
    # By itself it takes bfloat16 where the processor has it.
    assert single < 1e-4
    try:
        half = OpenVinoEngine(copper, "bf16")
    except EngineError as error:
        assert str(error) == "this processor has no bf16"  # noqa: PT017
    else:
        assert single < deviation(half.run, test) < 0.05
    assert single < deviation(OpenVinoEngine(copper, "int8").run, test) < 0.1


@pytest.mark.parametrize(
    ("module", "engine"), [("openvino_engine", "OpenVinoEngine"), ("onnxruntime_engine", "OnnxEngine")]
)
def test_engines_report_to_nobody(module: str, engine: str, copper: Bundle, tmp_path: Path) -> None:
    # Both would leave an identifier in the user's home, and what they have to report beside it.
    script = (
        "import socket, sys\n"
        "def refuse(*a, **k): print('called out', a); raise OSError('no')\n"
        "socket.socket.connect = refuse; socket.getaddrinfo = refuse\n"
        "from pathlib import Path\n"
        "from pipelines.engines.bundle import load_bundle\n"
        f"from pipelines.engines.{module} import {engine}\n"
        f"{engine}(load_bundle(Path(sys.argv[1])))\n"
    )
    answer = subprocess.run(
        [sys.executable, "-c", script, str(copper.folder)],
        capture_output=True,
        text=True,
        check=True,
        timeout=100,
        env={"PATH": "/usr/bin", "HOME": str(tmp_path)},
        cwd=Path(__file__).resolve().parents[3],
    )
    assert answer.stdout == ""
    assert list(tmp_path.iterdir()) == []


# The choice.


def test_without_a_gpu_the_cpu_is_taken_and_says_why(copper: Bundle) -> None:
    engine = open_engine(copper, EnginesTable(), NO_GPU)
    assert str(engine.about) == "onnxruntime on the CPU, fp32, because no NVIDIA driver"
    # For real, without a driver or with one:
    found = probe()
    assert str(found.problem or found.device) in str(open_engine(copper).about)


def test_an_old_driver_is_a_reason(copper: Bundle) -> None:
    old = Cuda("", (12, 4), "a card", (8, 0))
    ahead = prospect(EnginesTable(), old)
    assert ahead.backends == ("onnxruntime",)
    assert (
        "tensorrt-rtx: the driver of a card serves CUDA 12.4, but 13.0 is needed: update the driver"
        in ahead.lacking
    )
    assert "update the driver" in open_engine(copper, EnginesTable(), old).about.why
    with pytest.raises(EngineError, match=r"'tensorrt-rtx' cannot be used: .*update the driver; \"auto\""):
        open_engine(copper, EnginesTable(backend="tensorrt-rtx"), old)


@pytest.mark.parametrize(
    ("backend", "said"),
    [
        ("tensorrt", "no NVIDIA driver"),
        ("tensorrt-rtx", "no NVIDIA driver"),
        ("onnxruntime-cuda", "no NVIDIA driver"),
    ],
)
def test_a_backend_that_is_asked_for_is_taken_or_refused(backend: Any, said: str, copper: Bundle) -> None:
    with pytest.raises(EngineError, match=rf"engines\.backend '{backend}' cannot be used: .*{said}"):
        open_engine(copper, EnginesTable(backend=backend), NO_GPU)
    with pytest.raises(EngineError, match="no NVIDIA driver"):
        TensorrtEngine(copper, _rtx(), NO_GPU)


def _rtx() -> Any:
    from pipelines.engines.flavours import flavour_of

    return flavour_of("tensorrt_rtx")


def test_a_precision_is_taken_where_the_answers_allow_it(copper: Bundle, tmp_path: Path) -> None:
    asked = EnginesTable(backend="onnxruntime", precision="int8")
    assert str(open_engine(copper, asked).about) == "onnxruntime on the CPU, int8, because it was asked for"
    strict = changed(copper, tmp_path / "strict", tolerances={"self_test": 1e-3, "int8": 1e-9})
    about = open_engine(strict, asked).about
    assert about.precision == "fp32"
    assert "onnxruntime in int8: its int8 answers are off by" in about.why
    assert "allowed 1e-09" in about.why
    unknown = open_engine(copper, EnginesTable(backend="onnxruntime", precision="bf16")).about
    assert unknown.precision == "fp32"
    assert "'bf16': expected one of fp32, fp16, int8" in unknown.why


def test_a_package_that_is_lacking_is_named(copper: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("onnx", "openvino", "cuda.bindings"):
        monkeypatch.setitem(sys.modules, package, None)
    about = open_engine(copper, EnginesTable(precision="int8"), NO_GPU).about
    assert about.precision == "fp32"
    assert "onnxruntime in int8: precision int8 needs the package onnx: pip install onnx" in about.why
    with pytest.raises(
        EngineError, match=r"OpenVINO is not installed .*: pip install 'grainwatch\[openvino\]'"
    ):
        open_engine(copper, EnginesTable(backend="openvino"))
    with pytest.raises(EngineError, match="the package cuda-bindings does not load"):
        open_engine(copper, EnginesTable(backend="tensorrt-rtx"), CARD)


def test_a_bundle_says_what_it_is_best_run_in(copper: Bundle, tmp_path: Path) -> None:
    assert copper.description.precision == {}
    assert copper.description.batch == (1, 32, 1024)
    best = changed(copper, tmp_path / "best", precision={"onnxruntime": "fp16"})
    assert open_engine(best, None, NO_GPU).about.precision == "fp16"
    asked = EnginesTable(precision="fp32")
    assert open_engine(best, asked, NO_GPU).about.precision == "fp32"


# Breaking down.


def test_when_an_engine_breaks_down_the_next_one_repeats_the_batch(
    several: Bundle, caplog: pytest.LogCaptureFixture
) -> None:
    test = read_self_test(several)
    opened: list[str] = []

    def of(name: str, make: Any) -> Candidate:
        def open_() -> Engine:
            opened.append(name)
            made: Engine = make()
            return made

        return Candidate(name, "fp32", open_)

    def cannot() -> Engine:
        raise EngineError("there is no such card")

    engine = FallbackEngine(
        [
            of("tensorrt", lambda: BreakingEngine(OnnxEngine(several), 2, "cudaMalloc: out of memory")),
            of("tensorrt", cannot),
            of("onnxruntime-cuda", cannot),
            of("onnxruntime", lambda: OnnxEngine(several)),
        ],
        name="bundle stand-in 1",
    )
    assert engine.about.backend == "tensorrt"
    assert engine.about.why == "it is the best of those that could run it"
    with caplog.at_level(logging.INFO):
        for _ in range(5):
            assert deviation(engine.run, test) < 1e-5
    # Not tried again: neither the one that broke down nor the same library in another precision.
    assert opened == ["tensorrt", "onnxruntime-cuda", "onnxruntime"]
    assert engine.about.backend == "onnxruntime"
    assert engine.about.failures == 1
    assert engine.about.why == (
        "tensorrt broke down while it ran: cudaMalloc: out of memory;"
        " onnxruntime-cuda in fp32: there is no such card"
    )
    (line,) = caplog.messages
    assert line.startswith(
        "bundle stand-in 1: tensorrt on a card broke down (cudaMalloc: out of memory): going on with"
        " onnxruntime on the CPU, fp32"
    )


def test_when_nothing_is_left_it_says_so(several: Bundle) -> None:
    test = read_self_test(several)
    engine = FallbackEngine(
        [Candidate("tensorrt", "fp32", lambda: BreakingEngine(OnnxEngine(several), 0, "device lost"))]
    )
    for _ in range(2):
        with pytest.raises(EngineFailure, match="device lost"):
            engine.run(test.inputs)


def test_what_a_caller_does_wrong_breaks_nothing_down(several: Bundle) -> None:
    engine = FallbackEngine(
        [
            Candidate("tensorrt", "fp32", lambda: BreakingEngine(OnnxEngine(several), 5, "never")),
            Candidate("onnxruntime", "fp32", lambda: OnnxEngine(several)),
        ]
    )
    with pytest.raises(EngineError, match="given nothing"):
        engine.run({})
    assert engine.about.backend == "tensorrt"


def test_onnxruntime_breaking_down_is_a_failure(several: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    # Two sizes that do not fit, which only running finds out: a network that fails at some inputs.
    engine = OnnxEngine(several)
    monkeypatch.setattr(engine, "_session", open_session(vq_encoder()))
    with pytest.raises(EngineFailure, match="ONNX Runtime: "):
        engine.run(read_self_test(several).inputs)


# What a bundle says of its network.


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ({}, "bundle.json: inputs are none, expected at least one"),
        ({"features": {"type": "float32"}}, "inputs features is float32 of shape None, expected a type"),
        ({"features": {"type": "text", "shape": ["batch", 2]}}, "inputs features is text of shape"),
        ({"features": {"type": "float32", "shape": [3, 2]}}, "expected a type"),
        ({"features": {"type": "float32", "shape": ["batch", -2]}}, "expected a type"),
        ({"features": {"type": "float32", "shape": ["batch", True]}}, "expected a type"),
    ],
)
def test_a_description_that_says_too_little_is_refused(inputs: Any, said: str, tmp_path: Path) -> None:
    shutil.copytree(shipped_bundles()["Cu"], tmp_path / "Cu")
    redescribe(tmp_path / "Cu", lambda description: description.update(inputs=inputs))
    with pytest.raises(BundleError) as caught:
        open_engine(load_bundle(tmp_path / "Cu"))
    assert said in str(caught.value)

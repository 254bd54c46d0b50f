"""Plans are built once and shared; the engine that runs them keeps to CUDA's and TensorRT's contract."""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from testkit.engines import bundle_of
from testkit.networks import pixelcnn, surrogate
from testkit.simulated_card import Card, SimulatedFlavour

from grainwatch.config import EnginesTable
from pipelines.engines import cuda_memory, tensorrt_engine
from pipelines.engines.builder import build_engine
from pipelines.engines.bundle import Bundle, load_bundle
from pipelines.engines.choice import Candidate, FallbackEngine, open_engine
from pipelines.engines.cuda import Cuda, probe
from pipelines.engines.cuda_memory import Buffer, Stream, import_runtime
from pipelines.engines.engine import EngineFailure
from pipelines.engines.flavours import EngineError, flavour_of
from pipelines.engines.onnxruntime_engine import OnnxEngine
from pipelines.engines.plan_cache import locked
from pipelines.engines.plans import Batch
from pipelines.engines.selftest import prove, read_self_test
from pipelines.engines.shipped import shipped_bundles
from pipelines.engines.tensorrt_engine import TensorrtEngine, capacity_for, parts

ROOT = Path(__file__).resolve().parents[3]
RTX = flavour_of("tensorrt_rtx")
NO_GPU = Cuda("no NVIDIA driver")
CARD = Cuda("", (13, 1), "a card", (9, 0))
BATCH = Batch(1, 4, 16)

BUILD = """
import json, logging, sys
from pathlib import Path
logging.basicConfig(level=logging.INFO, format="%(message)s")
from pipelines.engines.builder import build_engine
from pipelines.engines.bundle import load_bundle
from pipelines.engines.cuda import Cuda
from pipelines.engines.flavours import flavour_of
bundle, folder = load_bundle(Path(sys.argv[1])), Path(sys.argv[2])
print("ready", flush=True)
sys.stdin.readline()
built = build_engine(bundle, flavour_of("tensorrt_rtx"), Cuda("none"), folder=folder)
print(json.dumps({"built": built.plan is not None, "path": str(built.path)}), flush=True)
"""


@pytest.fixture(scope="module")
def copper() -> Bundle:
    return load_bundle(shipped_bundles()["Cu"])


@pytest.fixture
def builders() -> Iterator[Any]:
    """Starts processes that build the plan of Cu when they are told to."""
    started: list[subprocess.Popen[str]] = []

    def start(script: str, folder: Path) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", script, str(shipped_bundles()["Cu"]), str(folder)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def told(process: subprocess.Popen[str]) -> dict[str, Any]:
    out, said = process.communicate("go\n", timeout=100)
    assert process.returncode == 0, said
    return {**json.loads(out), "said": said}


def test_two_processes_that_want_one_plan_build_it_once(builders: Any, tmp_path: Path) -> None:
    pair = [builders(BUILD, tmp_path) for _ in range(2)]
    for process in pair:
        process.stdin.write("go\n")
        process.stdin.flush()
    answers = [told(process) for process in pair]
    assert sorted(a["built"] for a in answers) == [False, True]
    assert len({a["path"] for a in answers}) == 1
    assert len(list(tmp_path.glob("*.plan"))) == 1


def test_who_comes_second_waits_for_the_first(builders: Any, copper: Bundle, tmp_path: Path) -> None:
    path = build_engine(copper, RTX, NO_GPU, folder=tmp_path).path
    content = path.read_bytes()
    path.unlink()
    second = builders(BUILD, tmp_path)
    with locked(path):
        second.stdin.write("go\n")
        second.stdin.flush()
        assert "another process is at it; waiting" in second.stderr.readline()
        assert second.poll() is None
        path.write_bytes(content)
    assert told(second)["built"] is False


def test_a_builder_that_was_killed_while_it_wrote_leaves_no_plan_and_no_lock(
    builders: Any, copper: Bundle, tmp_path: Path
) -> None:
    # Stopped in the middle of the write, as by a loss of power, with the lock in its hand.
    halted = BUILD.replace(
        "bundle, folder =",
        "import os, time\n"
        "def halt(handle): print('writing', flush=True); time.sleep(1000)\n"
        "os.fsync = halt\n"
        "bundle, folder =",
    )
    first = builders(halted, tmp_path)
    first.stdin.write("go\n")
    first.stdin.flush()
    assert first.stdout.readline() == "writing\n"
    second = builders(BUILD, tmp_path)
    second.stdin.write("go\n")
    second.stdin.flush()
    assert "another process is at it; waiting" in second.stderr.readline()
    assert not list(tmp_path.glob("*.plan"))
    os.kill(first.pid, signal.SIGKILL)
    answer = told(second)
    assert answer["built"] is True
    # What the first one left half written is gone too.
    names = {path.name for path in tmp_path.iterdir()}
    plan = Path(answer["path"]).name
    assert names == {plan, f".{plan}.lock"}
    assert build_engine(copper, RTX, NO_GPU, folder=tmp_path).plan is None


@pytest.mark.parametrize("damage", ["flipped", "cut", "empty", "foreign", "another plan"])
def test_a_plan_that_is_of_no_use_is_built_again_with_a_warning(
    damage: str, copper: Bundle, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = build_engine(copper, RTX, NO_GPU, batch=BATCH, folder=tmp_path)
    assert first.plan is not None
    whole = bytearray(first.path.read_bytes())
    if damage == "flipped":
        whole[len(whole) // 2] ^= 1
    elif damage == "another plan":
        whole = bytearray(build_engine(copper, RTX, NO_GPU, "fp16", BATCH, tmp_path).path.read_bytes())
    elif damage == "cut":
        del whole[len(whole) // 2 :]
    else:
        whole = bytearray(b"GIF89a" * 99 if damage == "foreign" else b"")
    first.path.write_bytes(whole)
    again = build_engine(copper, RTX, NO_GPU, batch=BATCH, folder=tmp_path)
    assert again.plan is not None
    assert again.path == first.path
    (line,) = caplog.messages
    assert str(first.path) in line
    assert line.endswith("it is built again")
    caplog.clear()
    assert build_engine(copper, RTX, NO_GPU, batch=BATCH, folder=tmp_path).plan is None
    assert not caplog.messages


def test_a_cache_that_takes_nothing_is_a_reason(copper: Bundle, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(EngineError, match=r"\.plan: cannot be written: Not a directory"):
        build_engine(copper, RTX, NO_GPU, folder=tmp_path / "file" / "engines")


# Without a driver.


def test_the_cuda_bindings_load_without_a_driver() -> None:
    runtime = import_runtime()
    assert runtime.cudaRuntimeGetVersion()[1] >= 13000
    if not probe().problem:
        pytest.skip("there is a driver here")
    with pytest.raises(EngineFailure, match=r"cudaStreamCreateWithFlags: .*\(cudaErrorInsufficientDriver\)"):
        Stream()
    with pytest.raises(EngineFailure, match="cudaMallocHost: CUDA driver version is insufficient"):
        Buffer((4, 2), np.dtype(np.float32))


def test_a_card_that_vanishes_behind_the_probe_is_a_reason(
    copper: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if not probe().problem:
        pytest.skip("there is a driver here")
    # The real runtime, told that a card is there: it loads nothing and says so, and the CPU does the work.
    monkeypatch.setenv("GRAINWATCH_CACHE_DIR", str(tmp_path))
    about = open_engine(copper, EnginesTable(), CARD).about
    assert about.backend == "onnxruntime"
    assert "tensorrt: not installed" in about.why
    assert "tensorrt-rtx in fp32: tensorrt_rtx does not load the plan" in about.why
    assert "CUDA driver version is insufficient" in about.why
    assert any("it is built again" in line for line in caplog.messages)


# On a simulated card: what the engine asks of it, not what a card would do.


@pytest.fixture
def small(tmp_path: Path) -> Bundle:
    x = np.random.default_rng(0).standard_normal((40, 64)).astype(np.float32)
    return bundle_of(
        tmp_path / "surrogate",
        surrogate(),
        {"latent": ("float32", ["batch", 64])},
        {"stress_MPa": ("float32", ["batch", 40])},
        {"latent": x},
        tolerance=1e-4,
    )


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Card:
    card = Card()
    for module in (cuda_memory, tensorrt_engine):
        monkeypatch.setattr(module, "import_runtime", card.runtime)
    return card


def engine_on(card: Card, bundle: Bundle, batch: Batch, folder: Path, refusals: int = 0) -> TensorrtEngine:
    flavour = SimulatedFlavour(
        "tensorrt_rtx", "tensorrt-rtx", False, card=card, bundle=bundle, batch=batch, refusals=[refusals]
    )
    return TensorrtEngine(bundle, flavour, CARD, batch=batch, folder=folder)


@pytest.mark.parametrize("batch", [Batch(1, 4, 16), Batch(4, 4, 64), Batch(8, 8, 8), Batch(1, 1, 1)], ids=str)
def test_batches_of_any_size_come_back_whole(batch: Batch, small: Bundle, card: Card, tmp_path: Path) -> None:
    engine = engine_on(card, small, batch, tmp_path)
    assert str(engine.about) == "tensorrt-rtx on a card, fp32"
    peer, rng = OnnxEngine(small), np.random.default_rng(3)
    for rows in (1, 2, 3, 16, 17, 64, 100, 5, 0):
        x = rng.standard_normal((rows, 64)).astype(np.float32)
        answers = engine.run({"latent": x})["stress_MPa"]
        assert answers.shape == (rows, 40)
        np.testing.assert_allclose(answers, peer.run({"latent": x})["stress_MPa"], atol=1e-5)
    # Every other column of a wider array: not what a card can be given as it is.
    wide = rng.standard_normal((6, 128)).astype(np.float32)[:, ::2]
    np.testing.assert_allclose(
        engine.run({"latent": wide})["stress_MPa"], peer.run({"latent": wide})["stress_MPa"], atol=1e-5
    )
    # A graph where nothing changes from batch to batch, and only there.
    assert (card.launches > 0) == (batch.low == batch.high)
    # Room grows by doubling: few allocations, however many batches.
    assert card.allocations <= 2 * 2 * 6
    before = card.allocations
    engine.run({"latent": np.zeros((64, 64), np.float32)})
    assert card.allocations == before
    with pytest.raises(EngineError, match=r"latent is float64 of shape \[2, 64\]; the network takes"):
        engine.run({"latent": np.zeros((2, 64))})


def test_all_memory_is_given_back(small: Bundle, card: Card, tmp_path: Path) -> None:
    engine = engine_on(card, small, Batch(8, 8, 8), tmp_path)
    assert card.memory
    del engine
    gc.collect()
    assert not card.memory


def test_memory_that_was_never_written_is_no_index(card: Card, tmp_path: Path) -> None:
    codes = np.random.default_rng(0).integers(0, 64, (3, 16, 16)).astype(np.int32)
    bundle = bundle_of(
        tmp_path / "pixelcnn",
        pixelcnn(),
        {"codes": ("int32", ["batch", 16, 16])},
        {"log_probability": ("float32", ["batch", 64, 16, 16])},
        {"codes": codes},
    )
    # Where ONNX Runtime refuses an index out of range, a card reads what is not its own.
    engine = engine_on(card, bundle, Batch(4, 4, 4), tmp_path)
    assert engine.run({"codes": codes[:1]})["log_probability"].shape == (1, 64, 16, 16)


def test_a_plan_that_does_not_load_is_built_once_more(
    small: Bundle, card: Card, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    build_engine(small, RTX, NO_GPU, batch=BATCH, folder=tmp_path)
    engine_on(card, small, BATCH, tmp_path, refusals=1)
    assert [line.endswith("it is built again") for line in caplog.messages] == [True]
    with pytest.raises(EngineError, match="tensorrt_rtx does not load the plan: it does not say why"):
        engine_on(card, small, BATCH, tmp_path, refusals=2)


def test_a_card_without_memory_left_hands_over(
    small: Bundle, card: Card, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    engine = FallbackEngine(
        [
            Candidate("tensorrt-rtx", "fp32", lambda: engine_on(card, small, Batch(1, 4, 1024), tmp_path)),
            Candidate("onnxruntime", "fp32", lambda: OnnxEngine(small)),
        ],
        name="bundle stand-in 1",
    )
    assert engine.about.backend == "tensorrt-rtx"
    card.room = sum(map(len, card.memory.values()))
    x = np.random.default_rng(1).standard_normal((500, 64)).astype(np.float32)
    np.testing.assert_allclose(
        engine.run({"latent": x})["stress_MPa"], OnnxEngine(small).run({"latent": x})["stress_MPa"], atol=1e-5
    )
    assert engine.about.backend == "onnxruntime"
    assert engine.about.failures == 1
    assert "cudaErrorMemoryAllocation" in engine.about.why
    assert len(caplog.messages) == 1
    gc.collect()
    assert not card.memory


def test_a_card_that_is_lost_hands_over(small: Bundle, card: Card, tmp_path: Path) -> None:
    engine = FallbackEngine(
        [
            Candidate("tensorrt-rtx", "fp32", lambda: engine_on(card, small, BATCH, tmp_path)),
            Candidate("onnxruntime", "fp32", lambda: OnnxEngine(small)),
        ]
    )
    card.lost = True
    test = read_self_test(small)
    np.testing.assert_allclose(engine.run(test.inputs)["stress_MPa"], test.outputs["stress_MPa"], atol=1e-5)
    assert "tensorrt-rtx broke down while it ran: cudaMemcpyAsync: " in engine.about.why


def test_a_plan_that_answers_otherwise_is_not_used(small: Bundle, card: Card, tmp_path: Path) -> None:
    card.off = 1.0
    with pytest.raises(EngineError, match=r"its fp32 answers are off by 1, allowed 0\.0001"):
        engine_on(card, small, BATCH, tmp_path)


@pytest.mark.parametrize(
    ("rows", "most", "sizes"), [(1, 4, [1]), (4, 4, [4]), (9, 4, [4, 4, 1]), (3, 1, [1, 1, 1])]
)
def test_parts(rows: int, most: int, sizes: list[int]) -> None:
    assert [p.stop - p.start for p in parts(rows, most)] == sizes


def test_capacity() -> None:
    assert [capacity_for(n, Batch(1, 2, 100)) for n in (1, 2, 3, 64, 65, 100)] == [1, 2, 4, 64, 100, 100]
    assert [capacity_for(n, Batch(8, 8, 8)) for n in (8,)] == [8]
    assert capacity_for(9, Batch(5, 8, 100)) == 10


# On a real card.


@pytest.mark.parametrize("name", sorted(shipped_bundles("laue-classes")))
def test_a_real_card_answers_as_onnxruntime_does(name: str, tmp_path: Path) -> None:
    cuda = probe()
    if lack := cuda.lacks(RTX.needs_cuda):
        pytest.skip(f"no GPU for TensorRT: {lack}")
    bundle = load_bundle(shipped_bundles()[name])
    peer, given = OnnxEngine(bundle), read_self_test(bundle).inputs["features"]
    for batch in (None, Batch(32, 32, 32)):
        engine = TensorrtEngine(bundle, RTX, cuda, batch=batch, folder=tmp_path)
        for rows in (1, 31, 32, 500, 3000):
            x = np.resize(given, (rows, given.shape[1]))
            np.testing.assert_allclose(
                engine.run({"features": x})["probability"],
                peer.run({"features": x})["probability"],
                atol=1e-3,
            )


@pytest.mark.parametrize("name", sorted(shipped_bundles("micrograph-vqvae")))
def test_a_real_card_passes_the_tests_of_all_networks_of_micrographs(name: str, tmp_path: Path) -> None:
    cuda = probe()
    if lack := cuda.lacks(RTX.needs_cuda):
        pytest.skip(f"no GPU for TensorRT: {lack}")
    for network in load_bundle(shipped_bundles()[name]).networks():
        prove(TensorrtEngine(network, RTX, cuda, batch=BATCH, folder=tmp_path), network)


def test_the_script_for_cards_says_what_is_lacking() -> None:
    if not probe().problem:
        pytest.skip("there is a driver here")
    answer = subprocess.run(
        [str(ROOT / "bench" / "gpu.sh")],
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
        env={**os.environ, "PYTHON": sys.executable},
    )
    assert answer.returncode == 3
    assert answer.stderr == f"gpu.sh: no GPU: {probe().problem}\n"
    assert answer.stdout == ""

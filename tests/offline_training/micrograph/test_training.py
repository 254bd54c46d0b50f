"""Trainings of micrographs learn, go on after an interruption, and are measured beside baselines."""

from __future__ import annotations

import math
import signal
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is absent: see docs/how-to/train-a-network.md")

from offline_training.errors import DivergedError, Interrupted, TrainingError  # noqa: E402
from offline_training.loop import Progress, fit  # noqa: E402
from offline_training.micrograph import figures  # noqa: E402
from offline_training.micrograph.crops import CropDraw, side_by_side  # noqa: E402
from offline_training.micrograph.recipes import Kind, recipe_of  # noqa: E402
from offline_training.micrograph.training import (  # noqa: E402
    Encoding,
    TrainingSettings,
    train_pixelcnn,
    train_vae,
    train_vqvae,
    weights_digest,
)
from offline_training.micrograph.vqvae import VqVae, to_pixels  # noqa: E402
from pipelines.micrograph.synthetic import MicrographSimulator  # noqa: E402

VQ = ("codes=32", "width=16", "batch=8")
PIXEL = ("width=8", "layers=3", "head=16", "batch=4", "learning_rate=5e-3")


@cache
def _crops() -> CropDraw:
    simulator = MicrographSimulator(shape=(64, 64), seed=0)
    return CropDraw(tuple(s.image for s in simulator.samples(0, 12)), side_px=32)


@cache
def _rates() -> np.ndarray:
    simulator = MicrographSimulator(shape=(64, 64), seed=0)
    return np.array([[s.condition.ln_cooling_rate] for s in simulator.samples(0, 12)], dtype=np.float32)


def _settings(kind: Kind, steps: int, *given: str, name: str = "", **changes: float) -> TrainingSettings:
    return TrainingSettings(recipe_of(kind, name, given), steps, **changes)  # type: ignore[arg-type]


def _encoding(model: VqVae) -> Encoding:
    return Encoding(partial(figures.codes_of, model), model.sizes.codes, weights_digest(model))


@pytest.fixture(scope="module")
def vqvae(tmp_path_factory: pytest.TempPathFactory) -> VqVae:
    checkpoint = tmp_path_factory.mktemp("vqvae") / "c.pt"
    return train_vqvae(_crops(), _settings("vqvae", 40, *VQ), checkpoint)[0]


@pytest.mark.parametrize("name", ["ema", "noguchi-2021"])
def test_a_vqvae_learns(tmp_path: Path, name: str) -> None:
    seen: list[Progress] = []
    settings = _settings("vqvae", 40, *VQ, name=name)
    model, trained = train_vqvae(_crops(), settings, tmp_path / "c.pt", seen.append)
    assert (trained.steps, len(seen), model.training) == (40, 40, False)
    assert model.codebook.ema is (name == "ema")
    assert seen[-1].figures["reconstruction"] < 0.7 * seen[0].figures["reconstruction"]
    assert seen[-1].left_s == 0.0


def test_a_vae_learns(tmp_path: Path) -> None:
    seen: list[Progress] = []
    settings = _settings("vae", 20, "width=4", "latent=8", "batch=8", "warm_up=10")
    model, _ = train_vae(_crops(), settings, tmp_path / "c.pt", seen.append)
    assert seen[-1].figures["reconstruction"] < 0.9 * seen[0].figures["reconstruction"]
    assert model.fingerprint(torch.zeros(2, 1, 32, 32)).shape == (2, 8)


def test_a_pixelcnn_learns_the_codes_and_leaves_the_vqvae_alone(tmp_path: Path, vqvae: VqVae) -> None:
    before = weights_digest(vqvae)
    seen: list[Progress] = []
    network, _ = train_pixelcnn(
        _encoding(vqvae),
        _crops(),
        _rates(),
        _settings("pixelcnn", 40, *PIXEL),
        tmp_path / "c.pt",
        seen.append,
    )
    assert seen[0].figures["bits_per_code"] == pytest.approx(5.0, abs=0.4)
    assert seen[-1].loss < 4.7
    assert weights_digest(vqvae) == before
    assert float(network.mean) == pytest.approx(float(_rates().mean()), rel=1e-5)
    other = train_vqvae(_crops(), _settings("vqvae", 1, *VQ), tmp_path / "other.pt")[0]
    with pytest.raises(TrainingError, match=r"of another training \(data differ\)"):
        train_pixelcnn(
            _encoding(other), _crops(), _rates(), _settings("pixelcnn", 40, *PIXEL), tmp_path / "c.pt"
        )


def test_a_pixelcnn_takes_classes_or_nothing_for_conditions(tmp_path: Path, vqvae: VqVae) -> None:
    settings = _settings("pixelcnn", 1, *PIXEL)
    classes = np.arange(12) % 3
    network, _ = train_pixelcnn(_encoding(vqvae), _crops(), classes, settings, tmp_path / "a.pt")
    assert (network.sizes.classes, network.sizes.scalars) == (3, 0)
    network, _ = train_pixelcnn(_encoding(vqvae), _crops(), None, settings, tmp_path / "b.pt")
    assert (network.sizes.classes, network.sizes.scalars) == (0, 0)
    with pytest.raises(ValueError, match="conditions: expected 12, one an image, got 11"):
        train_pixelcnn(_encoding(vqvae), _crops(), classes[:11], settings, tmp_path / "d.pt")


def test_an_interrupted_training_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    settings = _settings("vqvae", 6, *VQ)
    whole, _ = train_vqvae(_crops(), settings, tmp_path / "whole.pt")
    broken = tmp_path / "broken.pt"
    _, trained = train_vqvae(_crops(), _settings("vqvae", 6, *VQ, budget_s=1e-9), broken)
    assert trained.steps == 1
    resumed, trained = train_vqvae(_crops(), settings, broken)
    assert trained.steps == 6
    for (name, one), other in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        torch.testing.assert_close(one, other, msg=lambda text, name=name: f"{name}: {text}")


def test_ctrl_c_ends_a_training_after_the_step_and_keeps_it(tmp_path: Path) -> None:
    settings = _settings("vqvae", 5, *VQ)

    def stop(progress: Progress) -> None:
        if progress.step == 2:
            signal.raise_signal(signal.SIGINT)

    path = tmp_path / "c.pt"
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted, match=r"interrupted after step 2 of 5, which .*c\.pt keeps"):
        train_vqvae(_crops(), settings, path, stop)
    assert signal.getsignal(signal.SIGINT) is before
    steps: list[int] = []
    train_vqvae(_crops(), settings, path, lambda progress: steps.append(progress.step))
    assert steps == [3, 4, 5]


def test_a_checkpoint_of_another_training_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    train_vqvae(_crops(), _settings("vqvae", 1, *VQ), path)
    with pytest.raises(TrainingError, match=r"of another training \(batch, steps differ\)"):
        train_vqvae(_crops(), _settings("vqvae", 2, *VQ, "batch=4"), path)
    path.write_bytes(b"rubbish")
    with pytest.raises(TrainingError, match="is no checkpoint of this program"):
        train_vqvae(_crops(), _settings("vqvae", 1, *VQ), path)
    with pytest.raises(TrainingError, match="the checkpoint cannot be written"):
        train_vqvae(_crops(), _settings("vqvae", 1, *VQ), tmp_path / "no folder" / "c.pt")


def test_a_training_that_diverges_says_so_and_keeps_the_last_good_state(tmp_path: Path) -> None:
    model = torch.nn.Linear(1, 1)
    path = tmp_path / "c.pt"

    def loss_of(step: int) -> tuple[torch.Tensor, dict[str, float]]:
        return model(torch.ones(1, 1)).sum() / (3 - step), {}

    def go(steps: int, budget_s: float = math.inf) -> tuple[int, float]:
        optimiser = torch.optim.Adam(model.parameters())
        return fit(
            model,
            optimiser,
            loss_of,
            steps=steps,
            learning_rate=1e-3,
            seed=0,
            checkpoint=path,
            identity={},
            budget_s=budget_s,
        )

    go(9, budget_s=1e-9)
    kept = path.read_bytes()
    with pytest.raises(DivergedError, match=r"the loss is -?inf at step 4 of 9: .*lower --set learning_rate"):
        go(9)
    assert path.read_bytes() == kept


def test_a_recipe_of_another_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="recipe 'residual' is one of vae, not of vqvae"):
        train_vqvae(_crops(), _settings("vae", 1), tmp_path / "c.pt")
    with pytest.raises(ValueError, match="steps 0"):
        train_vqvae(_crops(), _settings("vqvae", 0, *VQ), tmp_path / "c.pt")


def test_figures_stand_beside_their_baselines(tmp_path: Path, vqvae: VqVae) -> None:
    held_out = [s.image for s in MicrographSimulator(shape=(64, 64), seed=1).samples(0, 4)]
    patches, of = side_by_side(held_out, 32)
    codes = figures.codes_of(vqvae, patches)
    found = figures.vqvae_figures(patches, codes, figures.shown(vqvae, codes), 32)
    assert found.patches == 16
    assert found.mean_psnr_dB < found.pooling_psnr_dB
    assert 1.0 < found.perplexity <= found.codes_alive <= 32
    with torch.no_grad():
        error = float(
            (vqvae(to_pixels(torch.from_numpy(patches))) - to_pixels(torch.from_numpy(patches)))
            .square()
            .mean()
        )
    # Rounded to greys the same, but for what rounding does.
    assert found.psnr_dB == pytest.approx(10 * math.log10(4 / error), abs=0.05)
    assert found.codes_alive == len(np.unique(codes))
    network, _ = train_pixelcnn(
        _encoding(vqvae), _crops(), _rates(), _settings("pixelcnn", 1, *PIXEL), tmp_path / "c.pt"
    )
    conditions = torch.from_numpy(_rates()[:4][of])
    training = figures.codes_of(vqvae, side_by_side(_crops().images, 32)[0])
    beside = figures.pixelcnn_figures(network, training, codes, conditions)
    assert beside.maps == 16
    for bits in (beside.bits, beside.wrong_condition_bits, beside.order_0_bits, beside.context_bits):
        assert 0.0 < bits < 6.0
    assert beside.context_bits < 5.0

"""Fraction and boundaries by gradient: their limit is what is measured, and they bring back what was lost."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from pipelines.micrograph.morphology import patch_morphology
from pipelines.micrograph.synthetic import two_phases

torch = pytest.importorskip("torch", reason="torch is absent: see docs/how-to/train-a-network.md")

from offline_training.micrograph.soft_morphology import (  # noqa: E402
    brought_in,
    morphology_error,
    soft_morphology,
    thresholds_of,
    widths_of,
)
from offline_training.micrograph.vqvae import VqSizes, VqVae, to_pixels  # noqa: E402


def _greys(n: int = 3, shape: tuple[int, int] = (64, 96), noise: float = 6.0) -> np.ndarray:
    rng = np.random.default_rng(5)
    bright = np.stack([two_phases("islands", shape, 12.0, 0.4, rng) for _ in range(n)])
    seen = np.where(bright, 170.0, 80.0) + noise * rng.standard_normal(bright.shape)
    return np.clip(np.rint(seen), 0, 255).astype(np.uint8)


def _pixels(greys: np.ndarray) -> torch.Tensor:
    return to_pixels(torch.from_numpy(greys))


def _middle(patch: np.ndarray, level: int) -> float:
    return (int(patch[patch <= level].max()) + int(patch[patch > level].min())) / 2.0


def test_of_a_narrow_slope_they_are_what_morphology_measures() -> None:
    greys = _greys()
    measured = patch_morphology(greys)
    pixels = _pixels(greys)
    thresholds = thresholds_of(pixels)
    for patch, level, found in zip(
        greys, measured.threshold, (thresholds.numpy() + 1.0) * 127.5, strict=True
    ):
        assert found == pytest.approx(_middle(patch, int(level)), abs=1e-3)
    share, crossings = soft_morphology(pixels, thresholds, torch.full((3,), 1e-4))
    np.testing.assert_allclose(share.numpy(), measured.fraction, atol=1e-6)
    rows, columns = greys.shape[1:]
    expected = 2 * measured.chords_rows / (rows * (columns - 1)) + 2 * measured.chords_columns / (
        columns * (rows - 1)
    )
    np.testing.assert_allclose(crossings.numpy(), expected, rtol=1e-5)


@pytest.mark.parametrize(("dark", "bright"), [(0, 255), (60, 180), (100, 104)])
def test_two_greys_are_parted_in_their_middle(dark: int, bright: int) -> None:
    phases = two_phases("islands", (64, 64), 12.0, 0.6, np.random.default_rng(3))
    greys = np.where(phases, bright, dark).astype(np.uint8)[None]
    pixels = _pixels(greys)
    thresholds, widths = thresholds_of(pixels), widths_of(pixels)
    assert float((thresholds[0] + 1.0) * 127.5) == pytest.approx((dark + bright) / 2)
    share, crossings = soft_morphology(pixels, thresholds, widths)
    measured = patch_morphology(greys)
    # As far from dark as from bright: the slope leaves out the same of both.
    scale = float(torch.tanh((bright - dark) / 255.0 / (2.0 * widths[0])))
    assert float(share[0]) == pytest.approx(0.5 + scale * (float(measured.fraction[0]) - 0.5), rel=1e-4)
    hard = 2 * float((measured.chords_rows + measured.chords_columns)[0]) / (64 * 63)
    assert float(crossings[0]) == pytest.approx(scale * hard, rel=1e-3)


def test_a_picture_that_is_the_image_has_no_error_and_a_smooth_one_has_too_few_crossings() -> None:
    greys = _greys(noise=0.0)
    pixels = _pixels(greys)
    smooth = _pixels(np.stack([ndimage.gaussian_filter(g, 6.0) for g in greys]))
    assert float(morphology_error(pixels, pixels)) == 0.0
    thresholds, widths = thresholds_of(pixels), widths_of(pixels)
    _, true = soft_morphology(pixels, thresholds, widths)
    _, lost = soft_morphology(smooth, thresholds, widths)
    assert bool(torch.all(lost < 0.9 * true))
    assert float(morphology_error(smooth, pixels)) > 0.005


def test_its_gradient_is_that_of_differences() -> None:
    pixels = _pixels(_greys(2, (16, 16))).double()
    seen = (0.7 * pixels).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: morphology_error(x, pixels), (seen,), eps=1e-5, atol=1e-4)


def test_descending_it_brings_boundaries_back() -> None:
    greys = _greys(2, noise=0.0)
    pixels = _pixels(greys)
    seen = _pixels(np.stack([ndimage.gaussian_filter(g, 4.0) for g in greys])).requires_grad_()
    optimiser = torch.optim.Adam([seen], lr=0.01)
    before = float(morphology_error(seen, pixels).detach())
    for _ in range(60):
        optimiser.zero_grad()
        morphology_error(seen, pixels).backward()
        optimiser.step()
    assert float(morphology_error(seen, pixels).detach()) < 0.1 * before


@pytest.mark.parametrize("grey", [0, 128, 255])
def test_one_grey_has_finite_errors_and_gradients(grey: int) -> None:
    flat = _pixels(np.full((2, 16, 16), grey, dtype=np.uint8))
    noise = torch.randn(flat.shape, generator=torch.Generator().manual_seed(0))
    seen = (flat + 0.01 * noise).requires_grad_()
    error = morphology_error(seen, flat)
    error.backward()
    assert bool(torch.isfinite(error))
    assert seen.grad is not None
    assert bool(torch.all(torch.isfinite(seen.grad)))


def test_it_comes_in_late() -> None:
    assert [brought_in(step, 400) for step in (0, 200, 250, 300, 399)] == [0.0, 0.0, 0.5, 1.0, 1.0]


def test_the_loss_of_a_vqvae_holds_it_by_its_weight() -> None:
    x = _pixels(_greys())
    losses = []
    for weight in (0.0, 1.0, 3.0):
        torch.manual_seed(0)
        model = VqVae(VqSizes(codes=16, width=8, channels=(4, 8), inner=4, blocks=1), morphology=weight)
        losses.append(model.loss(x))
    none, one, three = (float(found.total.detach()) for found in losses)
    assert one > none
    assert three - none == pytest.approx(3.0 * (one - none), rel=1e-4)
    assert len({found.reconstruction for found in losses}) == 1

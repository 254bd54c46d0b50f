"""VAE: a fingerprint is a mean, the KL term is the closed form, and both sides learn."""

from __future__ import annotations

import math

import pytest

torch = pytest.importorskip("torch", reason="torch is absent: see docs/how-to/train-a-network.md")

from offline_training.micrograph.vae import Vae, VaeSizes, gaussian_kl, warmed_up  # noqa: E402

SMALL = VaeSizes(patch_px=32, latent=6, width=4, neck=4)


@pytest.mark.parametrize(
    "sizes",
    [
        SMALL,
        VaeSizes(patch_px=16, latent=3, width=2, neck=2),
        VaeSizes(patch_px=48, blocks=(3, 4, 6, 3), width=2),
    ],
)
def test_shapes_are_those_of_the_sizes(sizes: VaeSizes) -> None:
    torch.manual_seed(0)
    model = Vae(sizes).eval()
    x = torch.rand(3, 1, sizes.patch_px, sizes.patch_px) * 2 - 1
    assert model.fingerprint(x).shape == (3, sizes.latent)
    assert model(x).shape == x.shape


def test_the_default_fits_a_bundle() -> None:
    model = Vae()
    encoder = sum(p.numel() for p in model.encoder.parameters())
    assert 4 * encoder < 8e6  # bytes
    assert model.fingerprint(torch.zeros(2, 1, 128, 128)).shape == (2, 256)


def test_a_fingerprint_is_the_same_each_time_also_in_training() -> None:
    torch.manual_seed(0)
    model = Vae(SMALL).eval()
    x = torch.rand(2, 1, 32, 32)
    torch.testing.assert_close(model.fingerprint(x), model.fingerprint(x))
    torch.testing.assert_close(model.fingerprint(x), model.encoder(x)[0])
    one, other = model.loss(x).reconstruction, model.loss(x).reconstruction
    assert one == other
    model.train()
    assert model.loss(x).reconstruction != model.loss(x).reconstruction


def test_each_patch_has_noise_of_its_own() -> None:
    torch.manual_seed(0)
    model = Vae(SMALL)
    seen: list[torch.Tensor] = []
    model.decoder.register_forward_pre_hook(lambda _module, given: seen.append(given[0].detach()))
    x = torch.rand(1, 1, 32, 32).expand(4, -1, -1, -1)
    model.loss(x)
    assert float(torch.pdist(seen[0]).min()) > 0.01


def test_kl_is_that_of_two_normal_distributions() -> None:
    assert float(gaussian_kl(torch.zeros(1), torch.zeros(1))) == 0.0
    mean, variance = 0.7, 0.3
    one = torch.distributions.Normal(mean, math.sqrt(variance))
    expected = torch.distributions.kl_divergence(one, torch.distributions.Normal(0.0, 1.0))
    found = gaussian_kl(torch.tensor(mean), torch.tensor(math.log(variance)))
    torch.testing.assert_close(found, expected)


def test_the_loss_is_error_and_weighted_kl_for_each_pixel() -> None:
    torch.manual_seed(0)
    model = Vae(SMALL).eval()
    x = torch.rand(2, 1, 32, 32)
    found = model.loss(x, beta=3.0)
    assert found.total.item() == pytest.approx(found.reconstruction + 3.0 * found.kl_nats / 1024, rel=1e-5)
    mean, log_variance = model.encoder(x)
    expected = gaussian_kl(mean, log_variance).sum(1).mean().item()
    assert found.kl_nats == pytest.approx(expected, rel=1e-5)
    assert found.least_deviation == pytest.approx(float((log_variance / 2).exp().min().detach()), rel=1e-5)
    assert 0 <= found.used <= 6


def test_beta_warms_up_evenly() -> None:
    assert [warmed_up(2.0, step, 4) for step in range(6)] == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]
    assert warmed_up(2.0, 0, 0) == 2.0


@pytest.mark.parametrize("beta", [1e-3, 100.0])
def test_it_learns_and_a_strong_prior_empties_the_latent_space(beta: float) -> None:
    torch.manual_seed(0)
    model = Vae(SMALL)
    # Two numbers make a patch: the height of its left and of its right half.
    halves = torch.rand(24, 1, 1, 2) * 1.6 - 0.8
    x = halves.repeat_interleave(16, 3).expand(-1, -1, 32, -1).contiguous()
    optimiser = torch.optim.Adam(model.parameters(), 3e-3)
    for step in range(120):
        found = model.loss(x, warmed_up(beta, step, 20))
        optimiser.zero_grad()
        found.total.backward()
        optimiser.step()
    if beta < 1.0:
        # One number, the mean of a patch, would leave half of the variance.
        assert found.reconstruction < 0.4 * float(x.var())
        assert found.used >= 2
    else:
        assert found.kl_nats < 0.5
        assert found.least_deviation > 0.5


@pytest.mark.parametrize("shape", [(2, 1, 32, 40), (2, 3, 32, 32), (2, 1, 16, 16)])
def test_patches_of_another_size_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected \(n, 1, 32, 32\)"):
        Vae(SMALL).loss(torch.zeros(shape))


def test_sizes_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="patch_px 100: expected a multiple of 16"):
        VaeSizes(patch_px=100)
    with pytest.raises(ValueError, match="widths of 1 or more"):
        VaeSizes(latent=0)

"""VQ-VAE: gradients pass the codes, the codebook follows its closed form, dead codes come back."""

from __future__ import annotations

import math

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is absent: see docs/how-to/train-a-network.md")

from offline_training.micrograph.vqvae import (  # noqa: E402
    Codebook,
    VqSizes,
    VqVae,
    codes_alive,
    perplexity,
    to_pixels,
)

SMALL = VqSizes(codes=16, width=8, channels=(4, 8), inner=4, blocks=1)


def _images(n: int, rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    return to_pixels(torch.from_numpy(rng.integers(0, 256, (n, rows, columns), dtype=np.uint8)))


@pytest.mark.parametrize(("rows", "columns"), [(128, 128), (64, 96), (8, 40)])
def test_codes_are_one_for_8_by_8_pixels_whatever_the_shape(rows: int, columns: int) -> None:
    torch.manual_seed(0)
    model = VqVae(SMALL).eval()
    x = _images(3, rows, columns)
    codes = model.encode(x)
    assert codes.shape == (3, rows // 8, columns // 8)
    assert codes.dtype == torch.int64
    assert model.decode(codes).shape == x.shape
    torch.testing.assert_close(model(x), model.decode(codes))


def test_a_side_that_is_no_multiple_of_8_is_refused() -> None:
    with pytest.raises(ValueError, match="image of 64 x 60 px: expected multiples of 8"):
        VqVae(SMALL).loss(_images(1, 64, 60))


def test_the_paper_s_sizes_have_the_paper_s_number_of_weights() -> None:
    counted = sum(p.numel() for p in VqVae(ema=False).parameters())
    assert 0.45e6 < counted < 0.65e6  # 0.56 million, the codebook of 512 x 128 among them


def test_errors_are_counted_in_shares_of_the_variance_of_the_pixels() -> None:
    x = _images(2, 32, 32)
    losses = []
    for variance in (1.0, 0.25):
        torch.manual_seed(0)
        losses.append(VqVae(SMALL, variance=variance).loss(x))
    plain, scaled = losses
    assert scaled.reconstruction == pytest.approx(plain.reconstruction)
    assert float((scaled.total - plain.total).detach()) == pytest.approx(3.0 * plain.reconstruction, rel=1e-5)
    for variance in (0.0, math.nan):
        with pytest.raises(ValueError, match="expected more than 0"):
            VqVae(SMALL, variance=variance)


def test_gradients_pass_straight_through_the_codes() -> None:
    torch.manual_seed(0)
    model = VqVae(SMALL, beta=0.0)
    seen: dict[str, torch.Tensor] = {}

    def after(_module: object, _given: object, out: torch.Tensor) -> None:
        out.register_hook(lambda gradient: seen.__setitem__("encoder", gradient.clone()))

    def before(_module: object, given: tuple[torch.Tensor]) -> None:
        given[0].register_hook(lambda gradient: seen.__setitem__("decoder", gradient.clone()))

    model.encoder.register_forward_hook(after)
    model.decoder.register_forward_pre_hook(before)
    model.loss(_images(2, 32, 32)).total.backward()
    assert float(seen["encoder"].abs().max()) > 0
    torch.testing.assert_close(seen["encoder"], seen["decoder"])
    first = next(model.encoder.parameters()).grad
    assert first is not None
    assert bool(first.any())


def test_commitment_pulls_the_encoder_and_the_codebook_loss_pulls_the_codes() -> None:
    torch.manual_seed(0)
    model = VqVae(SMALL, ema=False, beta=1.0)
    model.loss(_images(2, 32, 32)).total.backward()
    assert model.codebook.vectors.grad is not None
    codes = model.encode(_images(2, 32, 32))
    used = torch.unique(codes)
    assert bool(model.codebook.vectors.grad[used].any())
    unused = torch.ones(16, dtype=torch.bool)
    unused[used] = False
    assert not bool(model.codebook.vectors.grad[unused].any())
    assert not list(VqVae(SMALL).codebook.parameters())


def test_the_nearest_code_is_the_nearest() -> None:
    torch.manual_seed(1)
    book = Codebook(32, 5, ema=False)
    with torch.no_grad():
        book.vectors.normal_()
    z = torch.randn(2, 5, 3, 4)
    distance = (z.movedim(1, -1)[..., None, :] - book.vectors).square().sum(-1)
    torch.testing.assert_close(book.nearest(z), distance.argmin(-1))
    torch.testing.assert_close(
        book.look_up(book.nearest(z))[1, :, 2, 3], book.vectors[book.nearest(z)[1, 2, 3]]
    )


def test_moving_averages_follow_their_closed_form() -> None:
    # Two codes, the same batch again and again: after t batches N = γᵗ + (1 − γᵗ) n and
    # m = γᵗ e₀ + (1 − γᵗ) Σz, because every code begins with N = 1 and m = e₀.
    gamma = 0.8
    book = Codebook(2, 1, decay=gamma, revive_below=0.0)
    book.begin(torch.tensor([[0.0], [10.0]]))
    begun = book.vectors.clone()
    z = torch.tensor([[1.0], [2.0], [3.0], [9.0]])
    n, total = torch.tensor([3.0, 1.0]), torch.tensor([6.0, 9.0])
    for t in range(1, 8):
        codes = torch.where(z[:, 0] < 5, begun.argmin(), begun.argmax())
        book.follow(z, codes)
        low = int(begun.argmin())
        order = [low, 1 - low]
        kept = gamma**t
        count = kept + (1 - kept) * n
        mean = (kept * torch.tensor([0.0, 10.0]) + (1 - kept) * total) / count
        torch.testing.assert_close(book.count[order], count)
        torch.testing.assert_close(book.vectors[order, 0], mean, rtol=1e-4, atol=1e-4)


def test_dead_codes_come_back_where_encoder_outputs_are() -> None:
    torch.manual_seed(0)
    book = Codebook(8, 2, decay=0.5, revive_below=0.05)
    book.begin(torch.zeros(8, 2) + torch.randn(8, 2) * 1e-3)
    with torch.no_grad():
        book.vectors[1:] = 1e6
        book.total[1:] = 1e6
    z = torch.cat([torch.randn(40, 2) * 0.1, 5.0 + torch.randn(40, 2) * 0.1])

    def batch() -> tuple[torch.Tensor, int]:
        codes = book.nearest(z.T[None, :, None, :]).flatten()
        return codes, book.follow(z, codes)

    first, _ = batch()
    assert len(torch.unique(first)) == 1
    revived = sum(batch()[1] for _ in range(12))
    assert revived >= 7
    last, _ = batch()
    assert len(torch.unique(last)) == 8
    assert float(book.vectors.abs().max()) < 10
    # The gradient codebook has no such thing: its vectors are its optimiser's business.
    assert not hasattr(Codebook(8, 2, ema=False), "count")


def test_averages_and_counts_are_part_of_a_checkpoint() -> None:
    torch.manual_seed(0)
    model = VqVae(SMALL)
    assert not bool(model.codebook.begun)
    model.loss(_images(2, 32, 32))
    other = VqVae(SMALL)
    other.load_state_dict(model.state_dict())
    assert bool(other.codebook.begun)
    for name in ("vectors", "count", "total"):
        torch.testing.assert_close(getattr(other.codebook, name), getattr(model.codebook, name))


def test_evaluation_leaves_the_codebook_alone() -> None:
    torch.manual_seed(0)
    model = VqVae(SMALL)
    model.loss(_images(2, 32, 32))
    model.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.loss(_images(2, 32, 32, seed=5))
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name])


def test_perplexity_and_codes_alive_count_what_is_used() -> None:
    assert perplexity(torch.tensor([5, 5, 5, 5, 0])) == pytest.approx(4.0)
    assert perplexity(torch.tensor([7, 0, 0])) == pytest.approx(1.0)
    assert perplexity(torch.tensor([3, 1])) == pytest.approx(
        math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))
    )
    assert codes_alive(torch.tensor([5, 0, 1])) == 2
    torch.manual_seed(0)
    found = VqVae(SMALL).loss(_images(2, 32, 32))
    assert found.perplexity == pytest.approx(perplexity(torch.bincount(found.codes.flatten(), minlength=16)))


@pytest.mark.parametrize("ema", [True, False])
def test_it_learns(ema: bool) -> None:
    torch.manual_seed(0)
    model = VqVae(SMALL, ema=ema)
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 2, (16, 4, 4)).repeat(8, 1).repeat(8, 2) * 255
    x = to_pixels(torch.from_numpy(blocks))
    optimiser = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(60):
        found = model.loss(x)
        optimiser.zero_grad()
        found.total.backward()
        optimiser.step()
    assert found.reconstruction < 0.5 * float(x.var())


def test_pixels_are_from_minus_1_to_1() -> None:
    x = to_pixels(torch.tensor([[[0, 255]]], dtype=torch.uint8))
    torch.testing.assert_close(x, torch.tensor([[[[-1.0, 1.0]]]]))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"decay": 1.0}, "decay 1"), ({"revive_below": -0.1}, "revive_below -0.1")],
)
def test_what_cannot_be_is_refused(wrong: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Codebook(8, 2, **wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="2 codes or more"):
        VqSizes(codes=1)

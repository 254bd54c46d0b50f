"""PixelCNN: sees all that is earlier and nothing else, proven by gradients; draws what it learned."""

from __future__ import annotations

import math

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is absent: see docs/how-to/train-a-network.md")

from offline_training.micrograph.pixelcnn import PixelCnn, PixelSizes  # noqa: E402
from offline_training.micrograph.sampling import CodeSampler  # noqa: E402


def _made(**changes: int) -> PixelCnn:
    torch.manual_seed(0)
    given = {"codes": 12, "width": 6, "layers": 4, "head": 16} | changes
    return PixelCnn(PixelSizes(**given)).eval()  # type: ignore[arg-type]


@pytest.mark.parametrize(("rows", "columns"), [(7, 7), (5, 12), (13, 4), (1, 9), (9, 1)])
@pytest.mark.parametrize(("layers", "first"), [(1, 3), (2, 5), (4, 7)])
def test_each_code_depends_on_all_earlier_ones_in_reach_and_on_nothing_else(
    rows: int, columns: int, layers: int, first: int
) -> None:
    network = _made(layers=layers, first_kernel=first).double()
    codes = torch.randint(12, (1, rows, columns))
    condition = torch.tensor([[0.3]], dtype=torch.float64)
    embedded = network.embed(codes).detach().requires_grad_()
    logits = network.logits_of(embedded, condition)
    reach = network.sizes.reach
    row, column = np.mgrid[:rows, :columns]
    for i in range(rows):
        for j in range(columns):
            weights = torch.randn(12, dtype=torch.float64)
            (gradient,) = torch.autograd.grad(logits[0, :, i, j] @ weights, embedded, retain_graph=True)
            depends = (gradient[0].abs().sum(0) > 0).numpy()
            earlier = (row < i) | ((row == i) & (column < j))
            in_reach = (i - row <= reach) & (np.abs(column - j) <= reach)
            np.testing.assert_array_equal(depends, earlier & in_reach)


def test_the_paper_s_network_sees_a_whole_map_of_16_by_16() -> None:
    sizes = PixelSizes()
    assert (sizes.layers, sizes.width, sizes.first_kernel, sizes.reach) == (15, 64, 7, 17)
    assert sizes.reach >= 15


@pytest.mark.parametrize(
    ("changes", "condition"),
    [
        ({}, torch.tensor([[0.2], [1.5]])),
        ({"scalars": 2}, torch.tensor([[0.2, 1.0], [1.5, -1.0]])),
        ({"scalars": 0, "classes": 3}, torch.tensor([0, 2])),
        ({"scalars": 0}, None),
    ],
)
def test_log_likelihoods_are_the_sum_over_codes_and_depend_on_the_condition(
    changes: dict[str, int], condition: torch.Tensor | None
) -> None:
    network = _made(**changes)
    map_ = torch.randint(12, (1, 5, 8))
    codes = map_.repeat(2, 1, 1)
    with torch.no_grad():
        p = torch.softmax(network(codes, condition), 1)
        torch.testing.assert_close(p.sum(1), torch.ones(2, 5, 8))
        expected = torch.gather(p, 1, codes[:, None]).log().sum((1, 2, 3))
        found = network.log_likelihood(codes, condition)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(network.bits_per_code(codes, condition), -found / math.log(2) / 40)
    assert (float(found[0]) == float(found[1])) is (condition is None)


def test_all_maps_together_have_probability_1() -> None:
    network = _made(codes=2, layers=2)
    maps = torch.tensor([[(i >> b) & 1 for b in range(6)] for i in range(64)]).reshape(64, 2, 3)
    with torch.no_grad():
        total = network.log_likelihood(maps, torch.full((64, 1), 0.7)).exp().sum()
    assert float(total) == pytest.approx(1.0, abs=1e-5)


def test_conditions_are_standardised_inside() -> None:
    network = _made()
    codes = torch.randint(12, (3, 4, 4))
    condition = torch.tensor([[1.0], [2.0], [6.0]])
    plain = network(codes, (condition - condition.mean()) / condition.std(correction=0))
    network.standardise(condition)
    torch.testing.assert_close(network(codes, condition), plain)
    network.standardise(torch.full((4, 1), 3.0))
    torch.testing.assert_close(float(network.scale), 1.0)


@pytest.mark.parametrize(
    ("changes", "condition", "message"),
    [
        ({}, None, r"expected shape \(1, 1\), got None"),
        ({}, torch.zeros(1, 2), r"expected shape \(1, 1\), got \(1, 2\)"),
        ({}, torch.full((1, 1), math.nan), "expected numbers"),
        ({"scalars": 0}, torch.zeros(1, 1), r"expected shape None, got \(1, 1\)"),
        ({"scalars": 0, "classes": 3}, torch.tensor([3]), "classes from 0 to 2"),
        ({"scalars": 0, "classes": 3}, torch.tensor([0.5]), "classes from 0 to 2"),
    ],
)
def test_a_condition_of_another_kind_is_refused(
    changes: dict[str, int], condition: torch.Tensor | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        _made(**changes)(torch.zeros(1, 4, 4, dtype=torch.int64), condition)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"codes": 1}, "2 codes"), ({"kernel": 4}, "kernel 4: expected an odd"), ({"classes": 2}, "not both")],
)
def test_sizes_that_cannot_be_are_refused(changes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _made(**changes)


def _wild(network: PixelCnn) -> PixelCnn:
    # Far from the start, where all codes are about as likely and no error would show.
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(2.0)
        network.embedding.weight.mul_(2.0)
    return network


@pytest.mark.parametrize(
    ("changes", "condition"),
    [
        ({"kernel": 5}, torch.tensor([[0.2], [1.5], [-3.0]])),
        ({"scalars": 0, "classes": 3}, torch.tensor([0, 2, 1])),
        ({"scalars": 0, "layers": 1}, None),
    ],
)
def test_drawn_maps_have_the_likelihood_that_the_sampler_gave_them(
    changes: dict[str, int], condition: torch.Tensor | None
) -> None:
    network = _wild(_made(**changes))
    codes, log_likelihood = CodeSampler(network).sample(3, (5, 7), condition, np.random.default_rng(0))
    with torch.no_grad():
        expected = network.log_likelihood(torch.from_numpy(codes), condition).numpy()
    np.testing.assert_allclose(log_likelihood, expected, rtol=1e-4, atol=1e-3)
    assert np.ptp(expected) > 1.0


def test_maps_are_drawn_as_often_as_they_are_likely() -> None:
    network = _wild(_made(codes=2, layers=2))
    n = 4000
    condition = torch.full((n, 1), 0.7)
    codes, _ = CodeSampler(network).sample(n, (2, 2), condition, np.random.default_rng(1))
    maps = torch.tensor([[(i >> b) & 1 for b in range(4)] for i in range(16)]).reshape(16, 2, 2)
    with torch.no_grad():
        expected = n * network.log_likelihood(maps, condition[:16]).exp().double().numpy()
    found = np.bincount(codes.reshape(n, 4) @ (1 << np.arange(4)), minlength=16)
    tolerated = 4.5 * np.sqrt(expected) + 1.0
    assert np.all(np.abs(found - expected) < tolerated)
    # The test would notice: maps are far from equally likely.
    assert np.any(np.abs(expected - n / 16) > tolerated)


def test_low_temperatures_draw_likely_maps_and_seeds_the_same_ones() -> None:
    network = _wild(_made())
    sampler = CodeSampler(network)
    condition = torch.zeros(8, 1)
    warm, _ = sampler.sample(8, (6, 6), condition, np.random.default_rng(2))
    again, _ = sampler.sample(8, (6, 6), condition, np.random.default_rng(2))
    cold, _ = sampler.sample(8, (6, 6), condition, np.random.default_rng(2), temperature=0.05)
    np.testing.assert_array_equal(warm, again)
    with torch.no_grad():
        of_warm = network.log_likelihood(torch.from_numpy(warm), condition).mean()
        of_cold = network.log_likelihood(torch.from_numpy(cold), condition).mean()
    assert of_cold > of_warm + 5.0
    with pytest.raises(ValueError, match="temperature 0"):
        sampler.sample(8, (6, 6), condition, np.random.default_rng(2), temperature=0.0)
    with pytest.raises(ValueError, match="expected 1 or more"):
        sampler.sample(8, (0, 6), condition, np.random.default_rng(2))


def test_it_learns_what_the_condition_says() -> None:
    # Stripes along rows or along columns, by the sign of a number.
    torch.manual_seed(0)
    network = PixelCnn(PixelSizes(codes=2, width=12, layers=3, first_kernel=3, head=16))
    lines = torch.randint(2, (64, 6))
    codes = torch.cat([lines[:32, :, None].expand(-1, 6, 6), lines[32:, None].expand(-1, 6, 6)]).contiguous()
    condition = torch.cat([torch.full((32, 1), 1.0), torch.full((32, 1), -1.0)])
    optimiser = torch.optim.Adam(network.parameters(), 1e-2)
    for _ in range(60):
        loss = network.bits_per_code(codes, condition).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    with torch.no_grad():
        right = network.log_likelihood(codes, condition)
        wrong = network.log_likelihood(codes, -condition)
    # A row costs one bit, or the first row six: 1/6 bit for each code at best.
    assert loss.item() < 0.3
    assert float((right > wrong).float().mean()) > 0.9

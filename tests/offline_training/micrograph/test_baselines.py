"""Baselines that are fair: against closed forms and against what can be counted by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from offline_training.micrograph.baselines import (
    NEIGHBOURS,
    ContextCoder,
    code_bytes,
    order_0_bits,
    pooled,
    psnr_dB,
)


def test_a_patch_of_128_pixels_takes_288_bytes() -> None:
    assert code_bytes(128, 128, 512) == 288.0


def test_pooling_keeps_averages_at_the_bits_it_has() -> None:
    rng = np.random.default_rng(0)
    patches = rng.integers(0, 256, (3, 64, 48), dtype=np.uint8)
    blocks = pooled(patches, order=0)
    means = patches.reshape(3, 8, 8, 6, 8).mean((2, 4))
    seen = blocks[:, ::8, ::8]
    np.testing.assert_array_equal(seen.repeat(8, 1).repeat(8, 2), blocks)
    assert np.abs(seen - means).max() <= 255 / 511 / 2 + 1e-9
    assert len(np.unique(pooled(patches, bits=1.0, order=0))) == 2
    # Smooth images are shown well by splines; a ramp is shown exactly away from the edges.
    ramp = np.broadcast_to(np.arange(64, dtype=np.uint8) * 2, (1, 64, 64))
    np.testing.assert_allclose(pooled(ramp, order=1)[0, :, 12:-12], ramp[0, :, 12:-12], atol=0.5)
    with pytest.raises(ValueError, match="multiples of 8"):
        pooled(patches[:, :60])


def test_psnr_has_its_closed_form() -> None:
    image = np.full((2, 8, 8), 100, dtype=np.uint8)
    assert psnr_dB(image, image + 10.0) == pytest.approx(20 * math.log10(25.5))
    assert psnr_dB(image, image) == math.inf


def test_order_0_costs_the_cross_entropy() -> None:
    training = np.array([[[0, 0, 0, 1]]])
    share = np.array([4, 2, 1]) / 7
    found = order_0_bits(training, np.array([[[0, 1]], [[2, 2]]]), 3)
    np.testing.assert_allclose(found, [-np.log2(share[:2]).mean(), -np.log2(share[2])])


def test_contexts_are_counted_as_by_hand() -> None:
    rng = np.random.default_rng(0)
    codes = 3
    training, asked = rng.integers(0, codes, (5, 4, 6)), rng.integers(0, codes, (2, 3, 5))
    strengths = (2.0, 3.0, 5.0, 7.0)
    found = ContextCoder(codes, strengths, training).probability(asked)

    def around(map_: np.ndarray, i: int, j: int, n: int) -> tuple[int, ...]:
        rows, columns = map_.shape
        places = [(i + a, j + b) for a, b in NEIGHBOURS[:n]]
        return tuple(int(map_[y, x]) if 0 <= y < rows and 0 <= x < columns else codes for y, x in places)

    for number, i, j in [(0, 0, 0), (0, 2, 4), (1, 1, 2), (1, 0, 3), (0, 2, 0)]:
        code = int(asked[number, i, j])
        p = (np.sum(training == code) + 1) / (training.size + codes)
        for n, s in enumerate(strengths, start=1):
            context = around(asked[number], i, j, n)
            places = [
                (m, y, x)
                for m in range(5)
                for y in range(4)
                for x in range(6)
                if around(training[m], y, x, n) == context
            ]
            together = sum(int(training[place]) == code for place in places)
            p = (together + s * p) / (len(places) + s)
        assert found[number, i, j] == pytest.approx(p)


def test_neighbours_that_say_nothing_cost_next_to_nothing() -> None:
    rng = np.random.default_rng(1)
    training, held_out = rng.integers(0, 64, (80, 16, 16)), rng.integers(0, 64, (20, 16, 16))
    coder = ContextCoder.fit(training, 64)
    assert coder.bits_per_code(held_out).mean() == pytest.approx(6.0, abs=0.05)
    assert order_0_bits(training, held_out, 64).mean() == pytest.approx(6.0, abs=0.05)


def test_neighbours_that_say_much_are_used() -> None:
    # Each code is the one above plus 0 or 1: one bit, but for the first row.
    rng = np.random.default_rng(2)

    def maps(n: int) -> np.ndarray:
        return np.cumsum(rng.integers(0, 2, (n, 16, 16)), axis=1) % 32

    training, held_out = maps(60), maps(20)
    found = ContextCoder.fit(training, 32).bits_per_code(held_out)
    assert found.shape == (20,)
    assert 1.0 < found.mean() < 1.15
    assert order_0_bits(training, held_out, 32).mean() > 3.0


def test_probabilities_of_all_codes_sum_to_1() -> None:
    rng = np.random.default_rng(3)
    coder = ContextCoder.fit(rng.integers(0, 5, (10, 6, 6)), 5)
    base = rng.integers(0, 5, (1, 6, 6))
    total = 0.0
    for code in range(5):
        changed = base.copy()
        changed[0, 3, 2] = code
        total += float(coder.probability(changed)[0, 3, 2])
    assert total == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("maps", "codes", "message"),
    [
        (np.zeros((2, 3, 3), dtype=np.int64), 1, "codes 1"),
        (np.zeros((3, 3), dtype=np.int64), 4, r"shape \(3, 3\)"),
        (np.full((2, 3, 3), 4), 4, "from 0 to 3"),
        (np.zeros((1, 3, 3), dtype=np.int64), 4, "1 maps"),
    ],
)
def test_what_is_no_map_is_refused(maps: np.ndarray, codes: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ContextCoder.fit(maps, codes)

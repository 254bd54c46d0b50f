"""The sequential alarm: its limits are the published ones, and it finds moves and no others."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import chi2

from pipelines.control_chart import EwmaChart, alarm_limit, frames_to_false_alarm


@pytest.mark.parametrize(("dimensions", "published"), [(2, 8.66), (4, 12.73)])
def test_limits_are_the_published_ones(dimensions: int, published: float) -> None:
    # Limits on |z|² (2 − λ)/λ for a mean of 200 at λ = 0.1: Prabhu & Runger, J. Qual. Technol. 29, 8 (1997).
    limit = alarm_limit(200.0, 0.1, dimensions)
    assert limit**2 * 1.9 / 0.1 == pytest.approx(published, rel=0.005)


def test_without_memory_it_is_the_test_of_each_frame() -> None:
    assert alarm_limit(100.0, 1.0, 3) ** 2 == pytest.approx(chi2.ppf(0.99, 3), rel=1e-5)
    assert frames_to_false_alarm(np.sqrt(chi2.ppf(0.9, 2)), 1.0, 2) == pytest.approx(10.0, rel=1e-6)


def test_false_alarms_are_as_rare_as_asked_for_in_any_number_of_dimensions() -> None:
    rng = np.random.default_rng(1)
    for dimensions in (1, 6):
        lengths = []
        for _ in range(150):
            chart, steps = EwmaChart(100.0, 0.1, dimensions), 0
            while chart.statistic <= chart.limit:
                chart.take(rng.standard_normal(dimensions))
                steps += 1
            lengths.append(steps)
        # Run lengths spread about as much as their mean: 150 of them give it to 8 %.
        assert np.mean(lengths) == pytest.approx(100.0, rel=0.25)


def test_a_wild_vector_alone_is_no_alarm_but_many_are() -> None:
    chart = EwmaChart(1e5, 0.1, 3)
    assert chart.take(np.array([1e6, 0.0, 0.0]))
    assert chart.statistic < chart.limit
    for _ in range(5):
        chart.take(np.array([1e6, 0.0, 0.0]))
    assert chart.statistic > chart.limit


@pytest.mark.parametrize("memory", [0.01, 0.5, 0.9, 1.0])
def test_a_lasting_jump_raises_an_alarm_whatever_the_memory(memory: float) -> None:
    chart = EwmaChart(1e7, memory, 9)
    for _ in range(200):
        chart.take(np.array([50.0] + [0.0] * 8))
    assert chart.statistic > chart.limit

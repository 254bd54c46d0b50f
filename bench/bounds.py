"""What a count of rare events says about their rate."""

from __future__ import annotations

from scipy.stats import beta, chi2


def at_most_95(events: int, trials: int) -> float:
    """Return the upper end of the one-sided 95 % interval of a probability (Clopper-Pearson).

    Parameters
    ----------
    events, trials : int
        How often it happened in how many independent trials, at most once each.
    """
    if not 0 <= events <= trials or trials < 1:
        raise ValueError(f"{events} events in {trials} trials is no count")
    return 1.0 if events == trials else float(beta.ppf(0.95, events + 1, trials - events))


def mean_at_most_95(events: int, trials: int) -> float:
    """Return the same for a mean number per trial where one trial can hold several events (Poisson)."""
    if events < 0 or trials < 1:
        raise ValueError(f"{events} events in {trials} trials is no count")
    return float(chi2.ppf(0.95, 2 * (events + 1)) / (2 * trials))

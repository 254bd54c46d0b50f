"""Whether two models say the same of a micrograph."""

from __future__ import annotations

from typing import Final

import numpy as np

from grainwatch.messages import MicrographResult, ProcessPosterior
from pipelines.frame import Agreement

SAME_FRACTION: Final = 0.01
"""Phase fractions closer than this are the same: models prepare images alike, or nearly so."""


def compare_micrographs(live: MicrographResult, other: MicrographResult) -> Agreement:
    """Compare what two models conclude. Their fingerprints cannot be compared: each has its own latent space.

    Returns
    -------
    Agreement
        They agree when the phase fraction is the same or not known to either, both or none find the image
        novel, and both find the same process condition the likeliest, or none of these. Figures, where both
        have them: ``fraction_more``, ``free_path_ratio`` (of the other to the live one), ``typicality_more``,
        ``same_verdict`` (novel or not), ``posterior_distance`` (total variation, of the same candidates; 0 to
        1), ``same_condition``.
    """
    figures: dict[str, float] = {}
    agree = True
    if live.morphology is not None and other.morphology is not None:
        more = other.morphology.fraction - live.morphology.fraction
        if np.isfinite(more):
            figures["fraction_more"] = more
        # Of an image of one grey there is no fraction, which two models may agree on.
        neither = np.isnan(other.morphology.fraction) and np.isnan(live.morphology.fraction)
        same = neither or abs(more) <= SAME_FRACTION
        agree = live.morphology.phase == other.morphology.phase and bool(same)
        ratio = other.morphology.free_path_px / live.morphology.free_path_px
        if np.isfinite(ratio):
            figures["free_path_ratio"] = ratio
    if live.novelty is not None and other.novelty is not None:
        same = live.novelty.novel == other.novelty.novel
        figures["typicality_more"] = other.novelty.typicality - live.novelty.typicality
        figures["same_verdict"] = float(same)
        agree = agree and same
    if live.posterior is not None and other.posterior is not None:
        same = _condition(live.posterior) == _condition(other.posterior)
        figures["same_condition"] = float(same)
        agree = agree and same
        if live.posterior.candidates == other.posterior.candidates:
            p, q = np.array(live.posterior.probability), np.array(other.posterior.probability)
            figures["posterior_distance"] = float(np.abs(p - q).sum() / 2.0)
    return Agreement(agree, figures)


def _condition(posterior: ProcessPosterior) -> tuple[str, str]:
    best = int(np.argmax(posterior.probability))
    return posterior.quantity, "" if posterior.none_of_these else posterior.candidates[best]

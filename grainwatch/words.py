"""Results in a few words, as lines for people show them."""

from __future__ import annotations

import math

from grainwatch.messages import PhaseMorphology, ProcessPosterior


def phase_words(phase: PhaseMorphology) -> tuple[str, str]:
    """Return share and mean free path of a phase with their units, "unknown" for what is not known."""
    share = "unknown" if math.isnan(phase.fraction) else f"{100 * phase.fraction:.1f} %"
    if math.isnan(phase.free_path_px):
        return share, "unknown"
    um = phase.free_path_um
    return share, f"{phase.free_path_px:.3g} px" if um is None else f"{um:.3g} um"


def micrograph_words(phase: PhaseMorphology | None, posterior: ProcessPosterior | None) -> list[str]:
    """Return the phase and the process condition of a micrograph; what is strange its flags say."""
    said = []
    if phase is not None:
        share, path = phase_words(phase)
        said.append(f"{phase.phase} {share}, free path {path}")
    if posterior is not None:
        best = max(range(len(posterior.candidates)), key=posterior.probability.__getitem__)
        likely = f"{posterior.candidates[best]} ({posterior.probability[best]:.0%})"
        if posterior.mean is not None and posterior.sigma is not None:
            likely = f"{posterior.mean:.2f} +- {posterior.sigma:.2f}"
        said.append(f"{posterior.quantity} {'none of these' if posterior.none_of_these else likely}")
    return said

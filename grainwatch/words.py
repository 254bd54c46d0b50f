"""Results in a few words, as lines for people show them."""

from __future__ import annotations

from grainwatch.messages import PhaseMorphology, ProcessPosterior


def micrograph_words(phase: PhaseMorphology | None, posterior: ProcessPosterior | None) -> list[str]:
    """Return the phase and the process condition of a micrograph; what is strange its flags say."""
    said = []
    if phase is not None:
        um = phase.free_path_um
        path = f"{phase.free_path_px:.3g} px" if um is None else f"{um:.3g} um"
        said.append(f"{phase.phase} {100 * phase.fraction:.1f} %, free path {path}")
    if posterior is not None:
        best = max(range(len(posterior.candidates)), key=posterior.probability.__getitem__)
        likely = f"{posterior.candidates[best]} ({posterior.probability[best]:.0%})"
        if posterior.mean is not None and posterior.sigma is not None:
            likely = f"{posterior.mean:.2f} +- {posterior.sigma:.2f}"
        said.append(f"{posterior.quantity} {'none of these' if posterior.none_of_these else likely}")
    return said

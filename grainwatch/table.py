"""Results as columns: one row a crystal, or one row a micrograph."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from grainwatch.messages import AnyMessage, FrameResult, LaueResult, MicrographResult

if TYPE_CHECKING:
    import pandas as pd

Rows: TypeAlias = Literal["crystals", "micrographs"]

_PHASE = (
    "phase",
    "fraction",
    "fraction_spread",
    "free_path_px",
    "free_path_spread_px",
    "free_path_um",
    "free_path_spread_um",
)
_DISTANCES = ("latent_distance", "image_distance")
_NOVELTY = ("typicality", "novel", *_DISTANCES, "code_divergence_bits", "bits_per_code")
_VOIGT = (("xx", 0, 0), ("yy", 1, 1), ("zz", 2, 2), ("yz", 1, 2), ("xz", 0, 2), ("xy", 0, 1))


def crystal_columns(results: Iterable[LaueResult]) -> dict[str, list[Any]]:
    """Return equal-length columns with one row for each crystal of each result.

    A result without crystals gives no row. `latency_s` is from reception to publication;
    `orientation_w` ... `orientation_z` is the quaternion, `phi1_deg`, `Phi_deg`, `phi2_deg` the
    Bunge angles, `strain_xx` ... the deviatoric strain in the sample frame; `ix`, `iy`, `iz` is the
    grid point, None without a scan.
    """
    columns: dict[str, list[Any]] = {}
    for result in results:
        head = _head(result)
        for rank, crystal in enumerate(result.crystals):
            strain = crystal.strain_sample.numpy()
            row = {
                **head,
                "n_peaks": result.n_peaks,
                "rank": rank,
                "material": crystal.material,
                **dict(
                    zip(
                        ("orientation_w", "orientation_x", "orientation_y", "orientation_z"),
                        crystal.quaternion,
                        strict=True,
                    )
                ),
                **dict(zip(("phi1_deg", "Phi_deg", "phi2_deg"), crystal.euler_deg, strict=True)),
                **{f"strain_{name}": float(strain[i, j]) for name, i, j in _VOIGT},
                "orientation_sigma_deg": crystal.orientation_sigma_deg,
                "spots_matched": crystal.spots_matched,
                "spots_expected": crystal.spots_expected,
                "match_rate": crystal.match_rate,
                "chance_match_rate": crystal.chance_match_rate,
                "false_probability": crystal.false_probability,
                "residual_px": crystal.residual_px,
                "depth_um": crystal.depth_um,
                "grain_id": crystal.grain_id,
                "flags": " ".join((*result.flags, *crystal.flags)),
            }
            for name, value in row.items():
                columns.setdefault(name, []).append(value)
    return columns


def micrograph_columns(results: Iterable[MicrographResult]) -> dict[str, list[Any]]:
    """Return equal-length columns with one row for each micrograph; None where something is not known.

    The first columns are those of `crystal_columns`; then the fields of `PhaseMorphology` and `Novelty` that
    are one number, and of the posterior the most probable condition with its probability, mean and sigma.
    """
    columns: dict[str, list[Any]] = {}
    for result in results:
        phase, novelty, posterior = result.morphology, result.novelty, result.posterior
        # The first of equals, as in results files.
        likely = posterior and max(
            zip(posterior.probability, posterior.candidates, strict=True), key=lambda pair: pair[0]
        )
        row = {
            **_head(result),
            "pixel_size_um": result.pixel_size_um,
            **{name: getattr(phase, name, None) for name in _PHASE},
            "condition": likely[1] if likely else None,
            "probability": likely[0] if likely else None,
            "condition_mean": getattr(posterior, "mean", None),
            "condition_sigma": getattr(posterior, "sigma", None),
            "none_of_these": getattr(posterior, "none_of_these", None),
            **{name: getattr(novelty, name, None) for name in _NOVELTY},
            "flags": " ".join(result.flags),
        }
        for name, value in row.items():
            columns.setdefault(name, []).append(value)
    return columns


def _head(result: FrameResult) -> dict[str, Any]:
    grid = (*(result.grid_index or ()), None, None, None)[:3]
    return {
        "source": result.key.source,
        "series_uid": result.key.series_uid,
        "frame": result.key.frame,
        "channel": result.key.channel,
        "seq": result.seq,
        "acquired": result.times.acquired,
        "published": result.times.published,
        "latency_s": result.times.published - result.times.received,
        "ix": grid[0],
        "iy": grid[1],
        "iz": grid[2],
    }


def need_pandas() -> None:
    """Check that pandas is there, before results are taken that could not be handed over.

    Raises
    ------
    ImportError
        Names the extra that brings it.
    """
    if importlib.util.find_spec("pandas") is None:
        raise ImportError(
            "a data frame needs pandas, which is not installed: pip install 'grainwatch-client[dataframe]'"
        )


def dataframe(messages: Iterable[AnyMessage], rows: Rows = "crystals") -> pd.DataFrame:
    """Return what has such rows as a pandas table: `crystal_columns` or `micrograph_columns`.

    Raises
    ------
    ImportError
        If pandas is not installed.
    """
    need_pandas()
    import pandas

    if rows == "micrographs":
        return pandas.DataFrame(micrograph_columns(m for m in messages if isinstance(m, MicrographResult)))
    return pandas.DataFrame(crystal_columns(m for m in messages if isinstance(m, LaueResult)))

"""Results as columns, one row a crystal."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from grainwatch.messages import LaueResult

if TYPE_CHECKING:
    import pandas as pd

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
        grid = (*(result.grid_index or ()), None, None, None)[:3]
        for rank, crystal in enumerate(result.crystals):
            strain = crystal.strain_sample.numpy()
            row = {
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


def dataframe(results: Iterable[LaueResult]) -> pd.DataFrame:
    """Return the columns of `crystal_columns` as a pandas table.

    Raises
    ------
    ImportError
        If pandas is not installed.
    """
    need_pandas()
    import pandas

    return pandas.DataFrame(crystal_columns(results))

"""The tables of a results file: their columns, types and units; written by the daemon, read by everybody."""

from __future__ import annotations

from dataclasses import dataclass

LAYOUT = "grainwatch.results/1"

FLAG_BITS = 64


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a table: numpy type, shape of one row, unit; `names` is the list its codes index."""

    dtype: str
    shape: tuple[int, ...] = ()
    units: str = ""
    names: str = ""


CRYSTALS = {
    "frame": Column("<i8"),
    "channel": Column("<u2", names="channel"),
    "seq": Column("<u8"),
    "rank": Column("<i2"),
    "material": Column("<u2", names="material"),
    "quaternion": Column("<f8", (4,)),
    "euler_deg": Column("<f8", (3,), "deg"),
    "UB": Column("<f8", (3, 3), "1/angstrom"),
    "B0": Column("<f8", (3, 3), "1/angstrom"),
    "strain_crystal": Column("<f8", (3, 3)),
    "strain_sample": Column("<f8", (3, 3)),
    "strain_sigma": Column("<f8", (3, 3)),
    "orientation_sigma_deg": Column("<f8", (), "deg"),
    "spots_matched": Column("<i4"),
    "spots_expected": Column("<i4"),
    "match_rate": Column("<f8"),
    "chance_match_rate": Column("<f8"),
    "false_probability": Column("<f8"),
    "residual_px": Column("<f8", (), "px"),
    "depth_um": Column("<f8", (), "um"),
    "grain_id": Column("<i4"),
    "flags": Column("<u8", names="flag"),
}
FRAMES = {
    "frame": Column("<i8"),
    "channel": Column("<u2", names="channel"),
    "seq": Column("<u8"),
    "again": Column("|u1"),
    "flags": Column("<u8", names="flag"),
    "acquired": Column("<f8", (), "s"),
    "received": Column("<f8", (), "s"),
    "processed": Column("<f8", (), "s"),
    "published": Column("<f8", (), "s"),
    "n_peaks": Column("<i4"),
    "n_crystals": Column("<i4"),
    "first_crystal": Column("<i8"),
    "offset": Column("<i8"),
    "size": Column("<i8"),
    "grid_index": Column("<i4", (3,)),
    "position_um": Column("<f8", (3,), "um"),
    "compute_ms": Column("<f8", (), "ms"),
    "model": Column("<u2", names="model"),
    "calibration": Column("<u2", names="calibration"),
}
MICROGRAPHS = {
    "frame": Column("<i8"),
    "channel": Column("<u2", names="channel"),
    "seq": Column("<u8"),
    "flags": Column("<u8", names="flag"),
    "pixel_size_um": Column("<f8", (), "um"),
    "mean": Column("<f8"),
    "std": Column("<f8"),
    "entropy_bits": Column("<f8", (), "bit"),
    "sharpness": Column("<f8", (), "1/px"),
    "dark_share": Column("<f8"),
    "bright_share": Column("<f8"),
    "fraction": Column("<f8"),
    "fraction_spread": Column("<f8"),
    "free_path_px": Column("<f8", (), "px"),
    "free_path_spread_px": Column("<f8", (), "px"),
    "free_path_um": Column("<f8", (), "um"),
    "free_path_spread_um": Column("<f8", (), "um"),
    "condition": Column("<u2", names="condition"),
    "probability": Column("<f8"),
    "condition_mean": Column("<f8"),
    "condition_sigma": Column("<f8"),
    "none_of_these": Column("|u1"),
    "typicality": Column("<f8"),
    "novel": Column("|u1"),
    "latent_distance": Column("<f8"),
    "image_distance": Column("<f8"),
    "code_divergence_bits": Column("<f8", (), "bit"),
    "bits_per_code": Column("<f8", (), "bit"),
}
MESSAGES = {
    "seq": Column("<u8"),
    "schema": Column("<u2", names="schema"),
    "frame": Column("<i8"),
    "channel": Column("<u2", names="channel"),
    "published": Column("<f8", (), "s"),
    "offset": Column("<i8"),
    "size": Column("<i8"),
    "crc32": Column("<u4"),
}
POINTS = {
    "seq": Column("<u8"),
    "frame": Column("<i8"),
    "grid_index": Column("<i4", (3,)),
    "rank": Column("<i2"),
    "material": Column("<u2", names="material"),
    "quaternion": Column("<f8", (4,)),
    "grain_id": Column("<i4"),
    "match_rate": Column("<f8"),
    "false_probability": Column("<f8"),
    "residual_px": Column("<f8", (), "px"),
    "strain_sample": Column("<f8", (6,)),
}
GRAINS = {
    "seq": Column("<u8"),
    "grain_id": Column("<i4"),
    "merged_into": Column("<i4"),
    "material": Column("<u2", names="material"),
    "size_points": Column("<i4"),
    "mean_quaternion": Column("<f8", (4,)),
    "spread_deg": Column("<f8", (), "deg"),
    "centre": Column("<f8", (3,)),
}
DRIFT = {
    "frame": Column("<i8"),
    "channel": Column("<u2", names="channel"),
    "seq": Column("<u8"),
    "frames": Column("<i8"),
    "change": Column("<f8", (3,), "mm, px, px"),
    "sigma": Column("<f8", (3,), "mm, px, px"),
    "offset": Column("<f8", (3,), "mm, px, px"),
    "offset_sigma": Column("<f8", (3,), "mm, px, px"),
    "statistic": Column("<f8"),
    "limit": Column("<f8"),
    "alarm_frame": Column("<i8"),
}
CHANGES = {
    "frame": Column("<i8"),
    "channel": Column("<u2", names="channel"),
    "seq": Column("<u8"),
    "state": Column("<u2", names="state"),
    "images": Column("<i8"),
    "statistic": Column("<f8"),
    "limit": Column("<f8"),
    "foremost": Column("<u2", names="component"),
    "alarm_frame": Column("<i8"),
}
NAMES = (
    "channel",
    "material",
    "flag",
    "schema",
    "model",
    "calibration",
    "condition",
    "state",
    "component",
)
STATES = ("received", "done", "failed", "dropped", "lost", "missing")

"""Put a trained network into a bundle that the daemon can verify and run."""

from __future__ import annotations

import hashlib
import io
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from offline_training.export import archive, git_revision, onnx_of
from offline_training.laue.domain import GeometryRange, PatternRange
from offline_training.laue.networks import Calibrated
from pipelines.engines.bundle import MODEL, SCHEMA, SELF_TEST, Description, write_bundle
from pipelines.laue.classes import ClassList
from pipelines.laue.features import FeatureSpec
from pipelines.laue.geometry import Calibration
from pipelines.laue.proposals import CLASSES, KIND
from pipelines.laue.reflections import ReflectionList

_SELF_TEST_ROWS = 16
_SELF_TEST_TOLERANCE = 1e-3


def data_fingerprint(
    reflections: ReflectionList,
    classes: ClassList,
    nominal: Calibration,
    geometry: GeometryRange,
    patterns: PatternRange,
    seed: int,
) -> str:
    """Return a sha256 of all that determines the simulated training data."""
    digest = hashlib.sha256()
    for array in (reflections.hkl, reflections.g, reflections.f2, classes.hkl):
        digest.update(np.ascontiguousarray(array).tobytes())
    stated = (reflections.energy_keV, nominal, asdict(geometry), asdict(patterns), seed)
    digest.update(repr(stated).encode())
    return digest.hexdigest()


POSITION_NOISE_PX = 0.2
"""Standard deviation of a measured position that a detector must allow, whatever its pixels."""


def domain_of(
    reflections: ReflectionList, nominal: Calibration, geometry: GeometryRange, patterns: PatternRange
) -> dict[str, Any]:
    """Return the domain as `pipelines.laue.proposals.Domain` reads it."""

    def around(value: float, half: float) -> dict[str, float]:
        return {"low": round(value - half, 6), "high": round(value + half, 6)}

    material, pixel = reflections.material, nominal.pixel_size_mm
    off_middle = nominal.centre_off_middle_mm
    height, width = (n * pixel for n in nominal.shape)
    return {
        "material": material.name,
        "space_group": material.space_group,
        "cell_A_deg": list(material.cell_A_deg),
        "energy_keV": list(reflections.energy_keV),
        "dd_mm": around(nominal.dd_mm, nominal.dd_mm * geometry.dd),
        "centre_x_mm": around(off_middle[0], geometry.centre_px * pixel),
        "centre_y_mm": around(off_middle[1], geometry.centre_px * pixel),
        "xbet_deg": around(nominal.xbet_deg, geometry.tilt_deg),
        "xgam_deg": around(nominal.xgam_deg, geometry.tilt_deg),
        "width_mm": around(width, width * geometry.side),
        "height_mm": around(height, height * geometry.side),
        "largest_pixel_mm": round(pixel * patterns.noise_px[1] / POSITION_NOISE_PX, 6),
        "crystals": {"low": patterns.crystals[0], "high": patterns.crystals[1]},
        "spurious": {"low": patterns.spurious[0], "high": patterns.spurious[1]},
    }


def export_bundle(
    folder: Path,
    network: nn.Module,
    calibration: tuple[float, float],
    threshold: float,
    spec: FeatureSpec,
    classes: ClassList,
    examples: npt.NDArray[np.float32],
    *,
    domain: dict[str, Any],
    training: dict[str, Any],
    metrics: dict[str, Any],
    version: str,
    command: str,
) -> None:
    """Write the bundle of a network; see `pipelines.engines.bundle`.

    Parameters
    ----------
    calibration : (float, float)
        Temperature and shift of the reject class.
    threshold : float
        Probability from which a spot is confident.
    examples : (n, spec.width) float32
        Held-out features; the first ones become the self-test.
    """
    model = Calibrated(network, len(classes), *calibration).eval()
    x = np.ascontiguousarray(examples[:_SELF_TEST_ROWS])
    with torch.no_grad():
        expected = model(torch.from_numpy(x)).numpy()
    short = x.astype(np.float16 if np.all(x == x.astype(np.float16)) else np.float32)
    names = io.BytesIO()
    classes.save(names)
    material = domain["material"]
    description = Description(
        schema=SCHEMA,
        kind=KIND,
        name=f"laue-{material}-{training['recipe']}",
        version=version,
        about=f"Names the hkl family of Laue spots of {material}, or says that it cannot",
        inputs={"features": {"type": "float32", "shape": ["batch", spec.width]}},
        outputs={"probability": {"type": "float32", "shape": ["batch", len(classes)]}},
        preparation=asdict(spec),
        domain=domain,
        decision={"confident": threshold, "temperature": calibration[0], "reject_shift": calibration[1]},
        training=training,
        metrics=metrics,
        tolerances={"self_test": _SELF_TEST_TOLERANCE},
        git_revision=git_revision(),
        command=command,
    )
    files = {
        MODEL: onnx_of(model, {"features": torch.zeros(2, spec.width)}, ("probability",)),
        SELF_TEST: archive({"input": short, "output": expected}),
        CLASSES: names.getvalue(),
    }
    write_bundle(folder, description, files)

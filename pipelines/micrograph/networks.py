"""A bundle of a micrograph model at work: patches in; latent vectors, codes and likelihoods out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from grainwatch.config import EnginesTable
from grainwatch.messages import ModelInfo
from pipelines.engines.bundle import DESCRIPTION, Bundle, BundleError, load_bundle
from pipelines.engines.choice import FallbackEngine, open_engine
from pipelines.engines.engine import EngineInfo
from pipelines.engines.tensors import Ports, Tensor, ports_of
from pipelines.frame import ModelRef
from pipelines.micrograph.grey import ByteImage
from pipelines.micrograph.model_bundle import (
    FURTHER_VAE,
    KINDS,
    PIXELS_PER_CODE,
    PRIOR,
    VQVAE,
    BundleParts,
    read_parts,
)

FloatArray = npt.NDArray[np.float32]
CodeArray = npt.NDArray[np.int32]

_FLOAT, _CODE = np.dtype(np.float32), np.dtype(np.int32)


@dataclass(frozen=True, slots=True, eq=False)
class PatchFeatures:
    """What a network says about n patches.

    Attributes
    ----------
    kind : str
        "vqvae" or "vae".
    latents : (n, d) float32
        Means of the encoder's vectors, or mu.
    codes : (n, rows, columns) int32, or None
        Of a VQ-VAE.
    """

    kind: str
    latents: FloatArray
    codes: CodeArray | None = None


class MicrographModel:
    """All networks of a bundle, ready to run.

    Attributes
    ----------
    model : ModelInfo
    parts : BundleParts
    patch_px : int
    """

    def __init__(self, source: Path | ModelRef | Bundle, engines: EnginesTable | None = None) -> None:
        """Load a bundle, verify it and get ready what runs it.

        Parameters
        ----------
        source : Path, ModelRef or Bundle
            Its folder, the bundle as it was chosen, or the bundle.
        engines : EnginesTable, optional
            What the configuration says of backend and precision; the best by default.

        Raises
        ------
        BundleError
            If the bundle cannot be used, or is not the one that was chosen.
        EngineError
            If a backend is asked for that cannot be used.
        """
        bundle = open_bundle(source)
        self.parts: BundleParts = read_parts(bundle)
        self.model: ModelInfo = bundle.model
        self.patch_px = self.parts.preparation.parameters.patch_px
        further = bundle.description.networks
        self._is_vqvae = bundle.description.kind == VQVAE
        side = self.patch_px // PIXELS_PER_CODE
        maps = {"codes": Tensor(_CODE, (-1, side, side))}
        width = self._check_encoder(bundle, {**maps, "latent": None} if self._is_vqvae else {"mu": None})
        novelty = self.parts.novelty
        if novelty is not None and len(novelty.space.mean) != width:
            raise BundleError(
                f"{bundle.folder}: the network gives {width} numbers a patch, novelty is judged by"
                f" {len(novelty.space.mean)}; make the bundle again"
            )
        self._encoder = open_engine(bundle, engines)
        self._vae: FallbackEngine | None = None
        if self._is_vqvae and FURTHER_VAE in further:
            vae = bundle.network(FURTHER_VAE)
            self._check_encoder(vae, {"mu": None})
            self._vae = open_engine(vae, engines)
        self._prior: FallbackEngine | None = None
        self._conditions: npt.NDArray[Any] | None = None
        needed = self.parts.posterior is not None or (novelty is not None and novelty.weighs_codes)
        if self._is_vqvae and PRIOR in further:
            prior = bundle.network(PRIOR)
            # Without a calibration of its conditions there is nothing to ask it.
            if needed or "condition" not in prior.description.inputs:
                self._open_prior(prior, maps, engines)
        elif needed:
            raise BundleError(f"{bundle.folder}: has no network {PRIOR}; make the bundle again")

    def _check_encoder(self, bundle: Bundle, outputs: Mapping[str, Tensor | None]) -> int:
        """Return the width of what an encoder gives; None stands for one vector of any width."""
        ports = ports_of(bundle)
        _expect(bundle, ports, {"image": Tensor(_FLOAT, (-1, 1, self.patch_px, self.patch_px))}, outputs)
        (vector,) = (name for name, tensor in outputs.items() if tensor is None)
        return ports.outputs[vector].shape[1]

    def _open_prior(self, bundle: Bundle, maps: Mapping[str, Tensor], engines: EnginesTable | None) -> None:
        inputs = dict(maps)
        if self.parts.posterior is not None:
            self._conditions = self.parts.posterior.inputs
            inputs["condition"] = Tensor(self._conditions.dtype, (-1, *self._conditions.shape[1:]))
        _expect(bundle, ports_of(bundle), inputs, {"log_likelihood": Tensor(_FLOAT, (-1,))})
        self._prior = open_engine(bundle, engines)
        self._rows = bundle.description.batch[1]

    @property
    def engines(self) -> dict[str, EngineInfo]:
        """What runs each network, by its name; "" is the first one."""
        found = {"": self._encoder.about}
        if self._vae is not None:
            found[FURTHER_VAE] = self._vae.about
        if self._prior is not None:
            found[PRIOR] = self._prior.about
        return found

    @property
    def has_prior(self) -> bool:
        """Whether it says how likely codes are."""
        return self._prior is not None

    def read(self, patches: ByteImage) -> list[PatchFeatures]:
        """Return what each encoder says about patches (n, P, P); that of the main network comes first."""
        image = patches[:, None].astype(np.float32)
        out = self._encoder.run({"image": image})
        if not self._is_vqvae:
            return [PatchFeatures("vae", out["mu"])]
        found = [PatchFeatures("vqvae", out["latent"], out["codes"])]
        if self._vae is not None:
            found.append(PatchFeatures("vae", self._vae.run({"image": image})["mu"]))
        return found

    def log_likelihood(self, codes: CodeArray) -> FloatArray:
        """Return nats (n, c) of code maps (n, rows, columns) under each of the c candidate conditions.

        A network without conditions has c = 1.
        """
        if self._prior is None:
            raise ValueError(f"{self.model.name}: has no network {PRIOR}")
        if self._conditions is None:
            return self._prior.run({"codes": codes})["log_likelihood"][:, None]
        n, c = len(codes), len(self._conditions)
        found = np.empty(n * c, dtype=np.float32)
        # Row r is map r % n under condition r // n.
        for start in range(0, n * c, self._rows):
            rows = np.arange(start, min(start + self._rows, n * c))
            given = {"codes": codes[rows % n], "condition": self._conditions[rows // n]}
            found[rows] = self._prior.run(given)["log_likelihood"]
        return np.ascontiguousarray(found.reshape(c, n).T)


def open_bundle(source: Path | ModelRef | Bundle) -> Bundle:
    """Load a bundle of a micrograph model, as `MicrographModel` takes it.

    Raises
    ------
    BundleError
        If it cannot be used, is of another kind, or is not the one that was chosen.
    """
    if isinstance(source, ModelRef):
        source = load_bundle(Path(source.folder), sha256=source.sha256)
    elif isinstance(source, Path):
        source = load_bundle(source)
    if source.description.kind not in KINDS:
        raise BundleError(
            f"{source.folder}: is a bundle of kind {source.description.kind!r}, expected {' or '.join(KINDS)}"
        )
    return source


def _expect(
    bundle: Bundle, ports: Ports, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor | None]
) -> None:
    for kind, found, wanted in (("inputs", ports.inputs, inputs), ("outputs", ports.outputs, outputs)):
        fits = found.keys() == wanted.keys() and all(
            found[name] == tensor if tensor is not None else _is_vector(found[name])
            for name, tensor in wanted.items()
        )
        if not fits:
            listed = ", ".join(f"{name} {tensor}" for name, tensor in found.items())
            expected = ", ".join(f"{n} {t or 'float32 [batch, any number]'}" for n, t in wanted.items())
            raise BundleError(
                f"{bundle.folder / DESCRIPTION}: {kind} of {bundle.part or 'the first network'} are {listed};"
                f" expected {expected}; make the bundle again"
            )


def _is_vector(tensor: Tensor) -> bool:
    return tensor.dtype == _FLOAT and len(tensor.shape) == 2

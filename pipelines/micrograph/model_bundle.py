"""What a bundle of kind "micrograph-vqvae" or "micrograph-vae" holds beside its networks.

======================  ==================================================================================
network                 takes and gives
======================  ==================================================================================
model.onnx, "-vqvae"    image (batch, 1, P, P) float32 from 0 to 255 -> codes (batch, P/8, P/8) int32, latent
                        (batch, D) float32, the mean of the encoder's vectors over the patch
model.onnx, "-vae"      image -> mu (batch, L) float32
"vae", further          the same, beside a VQ-VAE
"prior", further        codes, condition (batch, S) float32 or (batch,) int64 -> log_likelihood (batch,) nats
======================  ==================================================================================

``preparation``, ``domain`` and ``decision`` of ``bundle.json`` are `BundlePreparation`, `Domain` and
`Decision`; arrays lie in ``reference.npz``. Training makes all of them: `describe` and `pack` write what
`read_parts` reads.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Final
from zipfile import BadZipFile

import msgspec
import numpy as np
import numpy.typing as npt

from pipelines.engines.bundle import DESCRIPTION, Bundle, BundleError
from pipelines.micrograph.acquisition import Acquisition
from pipelines.micrograph.image_statistics import STATISTICS
from pipelines.micrograph.morphology import Phase
from pipelines.micrograph.novelty import CodeSpace, HeldOut, LatentSpace, NoveltyReference
from pipelines.micrograph.posterior import PosteriorReference
from pipelines.micrograph.preparation import PreparationParameters

VQVAE: Final = "micrograph-vqvae"
VAE: Final = "micrograph-vae"
KINDS: Final = (VQVAE, VAE)
DECODER: Final = "decoder"
PRIOR: Final = "prior"
FURTHER_VAE: Final = "vae"
REFERENCE: Final = "reference.npz"
PIXELS_PER_CODE: Final = 8

ALARM_COMPONENTS: Final = (*STATISTICS, "fraction", "latent_distance", "code_divergence_bits")
"""What the drift alarm of a stream follows; the last but one with a model only, the last with codes only."""

AnyArray = npt.NDArray[Any]
Arrays = dict[str, AnyArray]

_TRUE_NUMBERS: Final = "biuf"


class Domain(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What the images were like that a model was trained on.

    Attributes
    ----------
    pixel_size_um : (float, float), optional
        Smallest and largest; None where it was not known.
    voltage_kV : (float, float), optional
    detectors : tuple of str
        Names as the microscopes write them; empty for any.
    smallest_px : int
        Rows and columns, data bar left out, that an image must have.
    about : str
        What they show: for people.
    """

    pixel_size_um: tuple[float, float] | None = None
    voltage_kV: tuple[float, float] | None = None
    detectors: tuple[str, ...] = ()
    smallest_px: int = 1
    about: str = ""

    def __post_init__(self) -> None:
        for name in ("pixel_size_um", "voltage_kV"):
            interval = getattr(self, name)
            if interval is not None and not 0.0 < interval[0] <= interval[1] < np.inf:
                raise ValueError(f"{name}: expected two rising numbers above 0, got {list(interval)}")

    def mismatch(self, acquisition: Acquisition, shape: tuple[int, int]) -> tuple[str, ...]:
        """Return what lies outside, in words; what nobody knows of an image cannot."""
        problems = []
        for name in ("pixel_size_um", "voltage_kV"):
            value, interval = getattr(acquisition, name), getattr(self, name)
            if value is None or interval is None:
                continue
            low, high = interval
            if not low * (1.0 - 1e-6) <= value <= high * (1.0 + 1e-6):
                problems.append(f"{name} {value:g} is outside {low:g} to {high:g}")
        known = {detector.casefold() for detector in self.detectors}
        if acquisition.detector and known and acquisition.detector.casefold() not in known:
            problems.append(f"detector {acquisition.detector} is not one of {', '.join(self.detectors)}")
        if min(shape) < self.smallest_px:
            problems.append(f"{shape[0]} x {shape[1]} pixels are fewer than {self.smallest_px} a side")
        return tuple(problems)


class BundlePreparation(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How images are prepared, and which phase is measured.

    Attributes
    ----------
    parameters : PreparationParameters
        With the reference histogram.
    phase : str
        "bright" or "dark".
    """

    parameters: PreparationParameters
    phase: Phase = "bright"


class NoveltyDecision(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The attributes of `NoveltyReference` and `HeldOut` of these names."""

    level: float
    neighbours: int
    by_source: bool

    def __post_init__(self) -> None:
        _check_level(self.level)
        if self.neighbours < 1:
            raise ValueError(f"neighbours: expected 1 or more, got {self.neighbours}")


class PosteriorDecision(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True
):
    """The attributes of `PosteriorReference` of these names."""

    quantity: str
    candidates: tuple[str, ...]
    values: tuple[float, ...]
    sharpness: float
    correlation: float
    level: float
    sources: int | None = None

    def __post_init__(self) -> None:
        _check_level(self.level)
        if self.sharpness <= 0.0:
            raise ValueError(f"sharpness: expected a number above 0, got {self.sharpness:g}")
        if not 0.0 <= self.correlation <= 1.0:
            raise ValueError(f"correlation: expected 0 to 1, got {self.correlation:g}")
        if self.sources is not None and self.sources < 1:
            raise ValueError(f"sources: expected 1 or more, got {self.sources}")


class Decision(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What is read from the networks' outputs.

    Attributes
    ----------
    codebook : int
        Entries; 0 for a VAE.
    novelty, posterior : optional
        None where the bundle cannot judge that.
    alarm : tuple of str
        Components of the drift alarm's learnt start; empty for none.
    """

    codebook: int = 0
    novelty: NoveltyDecision | None = None
    posterior: PosteriorDecision | None = None
    alarm: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class BundleParts:
    """All of it.

    Attributes
    ----------
    preparation : BundlePreparation
    domain : Domain
    codebook : int
        0 for a VAE.
    novelty : NoveltyReference or None
    posterior : PosteriorReference or None
    alarm_names : tuple of str
        Some of `ALARM_COMPONENTS`.
    alarm_values : (n, components) float64
        Of images as they should be, in no order: what the drift alarm begins with.
    """

    preparation: BundlePreparation
    domain: Domain
    codebook: int = 0
    novelty: NoveltyReference | None = None
    posterior: PosteriorReference | None = None
    alarm_names: tuple[str, ...] = ()
    alarm_values: npt.NDArray[np.float64] | None = None


def describe(parts: BundleParts) -> dict[str, dict[str, Any]]:
    """Return `preparation`, `domain` and `decision` for a bundle's `Description`, by these names."""
    novelty, posterior = parts.novelty, parts.posterior
    decision = Decision(
        codebook=parts.codebook,
        novelty=None
        if novelty is None
        else NoveltyDecision(
            level=novelty.level, neighbours=novelty.neighbours, by_source=novelty.held_out.by_source
        ),
        posterior=None
        if posterior is None
        else PosteriorDecision(
            quantity=posterior.quantity,
            candidates=posterior.candidates,
            values=posterior.values,
            sharpness=posterior.sharpness,
            correlation=posterior.correlation,
            level=posterior.level,
            sources=posterior.sources,
        ),
        alarm=parts.alarm_names,
    )
    return {
        "preparation": msgspec.to_builtins(parts.preparation),
        "domain": msgspec.to_builtins(parts.domain),
        "decision": msgspec.to_builtins(decision),
    }


def pack(parts: BundleParts) -> dict[str, bytes]:
    """Return the further files of a bundle, by name: its ``reference.npz``."""
    arrays: Arrays = {}
    if parts.novelty is not None:
        # Under which conditions its log-likelihoods are, the posterior says.
        arrays |= _novelty_arrays(parts.novelty, with_conditions=parts.posterior is not None)
    if parts.posterior is not None:
        arrays["candidate_input"] = parts.posterior.inputs
    if parts.alarm_values is not None:
        arrays["alarm"] = np.asarray(parts.alarm_values, dtype=np.float64)
    content = io.BytesIO()
    np.savez_compressed(content, allow_pickle=False, **arrays)
    return {REFERENCE: content.getvalue()}


def read_parts(bundle: Bundle) -> BundleParts:
    """Read what `describe` and `pack` wrote.

    Raises
    ------
    BundleError
        If the bundle is of another kind, or something is missing, unknown, or does not fit together.
    """
    described = bundle.description
    if described.kind not in KINDS:
        raise BundleError(
            f"{bundle.folder}: is a bundle of kind {described.kind!r}, expected {' or '.join(KINDS)}"
        )
    try:
        preparation = _preparation(described.preparation)
        domain = msgspec.convert(described.domain, Domain)
        decision = msgspec.convert(described.decision, Decision)
        if (decision.codebook > 0) != (described.kind == VQVAE):
            raise ValueError(f"decision.codebook is {decision.codebook} in a bundle of kind {described.kind}")
        if unknown := [name for name in decision.alarm if name not in ALARM_COMPONENTS]:
            raise ValueError(f"decision.alarm: this version does not know {', '.join(unknown)}")
    except (msgspec.ValidationError, ValueError) as error:
        raise BundleError(f"{bundle.folder / DESCRIPTION}: {error}") from error
    where = bundle.path(REFERENCE)
    try:
        with np.load(io.BytesIO(bundle.file(REFERENCE)), allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
        return BundleParts(
            preparation,
            domain,
            decision.codebook,
            None if decision.novelty is None else _novelty(arrays, decision, decision.novelty),
            None if decision.posterior is None else _posterior(arrays, decision.posterior),
            decision.alarm,
            _shaped(arrays, "alarm", (-1, len(decision.alarm))) if decision.alarm else None,
        )
    except (OSError, ValueError, KeyError, EOFError, BadZipFile, zlib.error) as error:
        raise BundleError(f"{where}: {error}; make the bundle again") from error


def _check_level(level: float) -> None:
    if not 0.0 < level < 1.0:
        raise ValueError(f"level: expected a number between 0 and 1, got {level:g}")


def _preparation(stated: Mapping[str, Any]) -> BundlePreparation:
    inner = stated.get("parameters")
    # Of a later version: without it images would be prepared otherwise.
    known = {each.name for each in fields(PreparationParameters)}
    if isinstance(inner, Mapping) and (surplus := inner.keys() - known):
        raise ValueError(f"preparation: this version does not know {', '.join(sorted(surplus))}")
    return msgspec.convert(stated, BundlePreparation)


def _novelty_arrays(reference: NoveltyReference, *, with_conditions: bool) -> Arrays:
    held = reference.held_out
    arrays: Arrays = {
        "latent_mean": reference.space.mean,
        "latent_whitening": reference.space.whitening,
        "latent_reference": reference.reference,
        "image_mean": reference.image_mean,
        "image_whitening": reference.image_whitening,
        "held_out_source": held.sources,
        **_ragged("held_out_latents", held.latents),
    }
    if reference.code_space is not None and held.codes is not None:
        arrays["code_mean"] = reference.code_space.mean
        arrays["code_directions"] = reference.code_space.directions
        arrays |= _ragged("held_out_codes", held.codes)
        if held.log_likelihood is not None and (with_conditions or held.log_likelihood[0].shape[1] == 1):
            arrays |= _ragged("held_out_log_likelihood", held.log_likelihood)
            if held.has_candidate is not None:
                arrays["held_out_has_candidate"] = held.has_candidate
    return arrays


def _novelty(arrays: Mapping[str, AnyArray], decision: Decision, stated: NoveltyDecision) -> NoveltyReference:
    whitening = _shaped(arrays, "latent_whitening", (-1, -1))
    size, kept = whitening.shape
    latents = _unpacked(arrays, "held_out_latents", (kept,), np.float32)
    code_space = codes = likelihood = None
    if decision.codebook:
        mean = _shaped(arrays, "code_mean", (decision.codebook,))
        directions = arrays["code_directions"]
        if directions.size:  # of few training images there are none
            directions = _shaped(arrays, "code_directions", (decision.codebook, -1))
        code_space = CodeSpace(mean, directions.reshape(decision.codebook, -1))
        codes = _unpacked(arrays, "held_out_codes", arrays["held_out_codes"].shape[1:], np.uint16)
        if any(c.ndim != 3 or int(c.max()) >= decision.codebook for c in codes):
            raise ValueError(f"held_out_codes: expected maps of codes below {decision.codebook}")
        if "held_out_log_likelihood" in arrays:
            columns = arrays["held_out_log_likelihood"].shape[1:]
            likelihood = _unpacked(arrays, "held_out_log_likelihood", columns, np.float32)
        if any(len(c) != len(z) for c, z in zip(codes, latents, strict=False)):
            raise ValueError("held_out_codes_count: differs from held_out_latents_count")
    if any(len(part) != len(latents) for part in (codes, likelihood) if part is not None):
        raise ValueError("held-out images: there are more of some arrays than of others")
    sources = _shaped(arrays, "held_out_source", (len(latents),), np.int64)
    if int(sources.min()) < 0 or int(sources.max()) >= len(latents):
        raise ValueError(f"held_out_source: expected numbers from 0 to {len(latents) - 1}")
    return NoveltyReference(
        LatentSpace(_shaped(arrays, "latent_mean", (size,)), whitening),
        _shaped(arrays, "latent_reference", (-1, kept), np.float32),
        _shaped(arrays, "image_mean", (kept,)),
        _shaped(arrays, "image_whitening", (kept, kept)),
        code_space,
        HeldOut(latents, codes, likelihood, sources, stated.by_source, _has_candidate(arrays, len(latents))),
        stated.level,
        stated.neighbours,
    )


def _has_candidate(arrays: Mapping[str, AnyArray], images: int) -> npt.NDArray[np.bool_] | None:
    name = "held_out_has_candidate"
    if name not in arrays:
        return None
    found: npt.NDArray[np.bool_] = _shaped(arrays, name, (images,), np.bool_)
    if not found.any():
        raise ValueError(f"{name}: expected one image at least whose condition is a candidate")
    return found


def _posterior(arrays: Mapping[str, AnyArray], decision: PosteriorDecision) -> PosteriorReference:
    count = len(decision.candidates)
    if count < 2 or len(decision.values) not in (0, count):
        raise ValueError(f"decision.posterior: {count} candidates and {len(decision.values)} values")
    known = arrays.get("held_out_log_likelihood")
    if known is not None and known.shape[1:] != (count,):
        raise ValueError(f"held_out_log_likelihood: of the shape {known.shape} for {count} candidates")
    inputs = arrays["candidate_input"]
    if inputs.dtype not in (np.float32, np.int64) or inputs.ndim not in (1, 2) or len(inputs) != count:
        raise ValueError(
            f"candidate_input: {inputs.dtype} of the shape {inputs.shape} for {count} candidates"
        )
    return PosteriorReference(
        decision.quantity,
        decision.candidates,
        inputs,
        decision.values,
        decision.sharpness,
        decision.correlation,
        decision.level,
        decision.sources,
    )


def _ragged(name: str, parts: Sequence[AnyArray]) -> Arrays:
    """Return arrays of unequal length as one, and how long each is."""
    return {
        name: np.concatenate(parts),
        f"{name}_count": np.array([len(part) for part in parts], dtype=np.int64),
    }


def _unpacked(
    arrays: Mapping[str, AnyArray], name: str, rest: Sequence[int], dtype: npt.DTypeLike = np.float64
) -> tuple[AnyArray, ...]:
    table = _shaped(arrays, name, (-1, *rest), dtype)
    counts = arrays[f"{name}_count"]
    if counts.ndim != 1 or counts.dtype.kind not in "iu" or len(counts) == 0 or int(counts.min()) < 1:
        raise ValueError(f"{name}_count: expected whole numbers from 1")
    if int(counts.sum()) != len(table):
        raise ValueError(f"{name}: has {len(table)} rows, {name}_count says {int(counts.sum())}")
    return tuple(np.split(table, np.cumsum(counts)[:-1]))


def _shaped(
    arrays: Mapping[str, AnyArray], name: str, shape: Sequence[int], dtype: npt.DTypeLike = np.float64
) -> AnyArray:
    """Return an array of finite numbers, converted; −1 stands for any length from 1."""
    array = arrays[name]
    fits = array.ndim == len(shape) and all(
        has == wanted or (wanted == -1 and has > 0) for has, wanted in zip(array.shape, shape, strict=True)
    )
    if not fits or array.dtype.kind not in _TRUE_NUMBERS or not np.isfinite(array).all():
        wanted = ", ".join("any" if n == -1 else str(n) for n in shape)
        raise ValueError(f"{name}: expected finite numbers of the shape ({wanted}), got {array.shape}")
    return array.astype(dtype)

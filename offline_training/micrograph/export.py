"""Networks of micrographs as parts of a bundle, each with a self-test that can be passed elsewhere, too.

Codes are whole numbers: where a vector lies midway between two codes, another backend's rounding gives
another code. The patches of the self-test are chosen so that none of theirs does.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import astuple, dataclass, fields
from io import BytesIO
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from grainwatch.config import EnginesTable
from offline_training.errors import TrainingError
from offline_training.export import archive, onnx_of
from offline_training.micrograph.pixelcnn import LikelihoodReader, PixelCnn, PixelSizes
from offline_training.micrograph.vae import MeanReader, Vae
from offline_training.micrograph.vqvae import PIXELS_PER_CODE, CodeReader, CodeShower, VqVae, to_pixels
from pipelines.engines.bundle import MODEL, SELF_TEST, Bundle, Network, network_files
from pipelines.engines.choice import open_engine
from pipelines.micrograph.model_bundle import DECODER

ByteImage = npt.NDArray[np.uint8]
IntArray = npt.NDArray[np.int64]

SELF_TEST_ROWS: Final = 4
_LEAST_MARGIN: Final = 1e-5
"""Float32 is off by about 1e-6 of a vector's length."""
_CANDIDATES: Final = 256

_CODES: Final = {"self_test": 1e-3}
_DECODER: Final = {"self_test": 0.05, "fp16": 2.0, "bf16": 8.0, "int8": 24.0}
"""Of 255 greys."""
_LIKELIHOOD: Final = {"self_test": 0.1, "fp16": 2.0, "bf16": 8.0, "int8": 16.0}
"""Nats, of some thousand."""
_MEANS: Final = {"self_test": 2e-3, "fp16": 0.05, "bf16": 0.2, "int8": 0.5}


@dataclass(frozen=True)
class Exported:
    """A network as a bundle holds it."""

    described: Network
    model: bytes
    self_test: bytes

    def files(self, name: str = "") -> dict[str, bytes]:
        """Return its files, of a further network of this name or of the first one."""
        named = network_files(name) if name else {MODEL: MODEL, SELF_TEST: SELF_TEST}
        return {named[MODEL]: self.model, named[SELF_TEST]: self.self_test}


def export_encoder(model: VqVae, patches: ByteImage) -> tuple[Exported, float]:
    """Export the encoder with its codebook; also return the margin of the self-test (see `clear_patches`).

    Parameters
    ----------
    model : VqVae
    patches : (n, side, side) uint8
        To choose the self-test from.

    Raises
    ------
    TrainingError
        If the encoder gives vectors that hardly differ in distance from two codes, wherever one looks.
    """
    clear, margin = clear_patches(model, patches)
    if margin < _LEAST_MARGIN:
        raise TrainingError(
            f"the encoder's vectors lie midway between codes (by {margin:.1e} of their length) on all of"
            f" {min(len(patches), _CANDIDATES)} patches: nothing was exported, because no backend could be"
            " tested; train for more --steps"
        )
    side = patches.shape[-1]
    codes_px = side // PIXELS_PER_CODE
    image = clear[:, None].astype(np.float32)
    exported = _export(
        CodeReader(model),
        {"image": image},
        {"image": ("float32", 1, side, side)},
        {
            "codes": ("int32", codes_px, codes_px),
            "latent": ("float32", model.sizes.width),
        },
        _CODES,
        (1, 16, 64),
    )
    return exported, margin


def export_decoder(model: VqVae, codes: IntArray) -> Exported:
    """Export what makes images of codes (n, rows, columns)."""
    rows, columns = codes.shape[1:]
    return _export(
        CodeShower(model),
        {"codes": codes[:SELF_TEST_ROWS].astype(np.int32)},
        {"codes": ("int32", rows, columns)},
        {"image": ("float32", 1, rows * PIXELS_PER_CODE, columns * PIXELS_PER_CODE)},
        _DECODER,
        (1, 16, 64),
    )


def export_prior(
    network: PixelCnn, codes: IntArray, conditions: npt.NDArray[np.float32] | IntArray | None
) -> Exported:
    """Export the likelihood of codes (n, rows, columns) under a condition each."""
    sizes = network.sizes
    inputs: dict[str, npt.NDArray[Any]] = {"codes": codes[:SELF_TEST_ROWS].astype(np.int32)}
    ports: dict[str, tuple[str | int, ...]] = {"codes": ("int32", *codes.shape[1:])}
    if conditions is not None:
        inputs["condition"] = conditions[:SELF_TEST_ROWS]
        ports["condition"] = ("float32", sizes.scalars) if sizes.scalars else ("int64",)
    return _export(
        LikelihoodReader(network),
        inputs,
        ports,
        {"log_likelihood": ("float32",)},
        _LIKELIHOOD,
        (1, 64, 512),
    )


def export_means(model: Vae, patches: ByteImage) -> Exported:
    """Export the encoder of a VAE."""
    side = model.sizes.patch_px
    return _export(
        MeanReader(model),
        {"image": patches[:SELF_TEST_ROWS, None].astype(np.float32)},
        {"image": ("float32", 1, side, side)},
        {"mu": ("float32", model.sizes.latent)},
        _MEANS,
        (1, 16, 64),
    )


def clear_patches(model: VqVae, patches: ByteImage, count: int = SELF_TEST_ROWS) -> tuple[ByteImage, float]:
    """Return patches whose codes are clear, and the least margin among them.

    The margin of a vector is its distance from the plane midway between its nearest two codes, as a share of
    its length.
    """
    some = patches[np.linspace(0, len(patches) - 1, min(len(patches), _CANDIDATES)).astype(np.int64)]
    vectors = model.codebook.vectors.detach().double()
    margins = np.empty(len(some))
    model.eval()
    with torch.no_grad():
        for i in range(0, len(some), 16):
            z = model.encoder(to_pixels(torch.from_numpy(some[i : i + 16]))).double().movedim(1, -1)
            flat = z.reshape(-1, z.shape[-1])
            near, two = torch.cdist(flat, vectors).topk(2, largest=False)
            apart = (vectors[two[:, 0]] - vectors[two[:, 1]]).norm(dim=1).clamp(min=1e-300)
            off = (near[:, 1] ** 2 - near[:, 0] ** 2) / (2.0 * apart) / flat.norm(dim=1).clamp(min=1e-300)
            margins[i : i + 16] = off.reshape(len(z), -1).amin(1).numpy()
    best = np.argsort(-margins)[:count]
    return np.ascontiguousarray(some[best]), float(margins[best].min())


def _export(
    network: nn.Module,
    given: Mapping[str, npt.NDArray[Any]],
    inputs: Mapping[str, tuple[str | int, ...]],
    outputs: Mapping[str, tuple[str | int, ...]],
    tolerances: Mapping[str, float],
    batch: tuple[int, int, int],
) -> Exported:
    network.eval()
    rows = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in given.items()}
    with torch.no_grad():
        answers = network(*rows.values())
    if isinstance(answers, torch.Tensor):
        answers = (answers,)
    expected = {name: answer.numpy() for name, answer in zip(outputs, answers, strict=True)}
    # Two rows: one would be taken for a fixed number.
    examples = {name: torch.cat([row, row])[:2] for name, row in rows.items()}
    described = Network(
        inputs=_ports(inputs), outputs=_ports(outputs), tolerances=dict(tolerances), batch=batch
    )
    return Exported(described, onnx_of(network, examples, tuple(outputs)), archive({**given, **expected}))


def _ports(ports: Mapping[str, tuple[str | int, ...]]) -> dict[str, Any]:
    return {name: {"type": kind, "shape": ["batch", *shape]} for name, (kind, *shape) in ports.items()}


def pack_prior(network: PixelCnn) -> bytes:
    """Return a PixelCNN as an .npz file: what images are drawn from, which the exported network cannot do."""
    arrays = {f"weights.{name}": value.numpy() for name, value in network.state_dict().items()}
    return archive({"sizes": np.array(astuple(network.sizes)), **arrays})


def unpack_prior(content: bytes, where: str) -> PixelCnn:
    """Return the PixelCNN that `pack_prior` packed.

    Raises
    ------
    ValueError
        If it is none.
    """
    try:
        with np.load(BytesIO(content), allow_pickle=False) as stored:
            numbers = stored["sizes"].tolist()
            network = PixelCnn(PixelSizes(**dict(zip(_SIZES, numbers, strict=True))))
            network.load_state_dict(
                {name: torch.from_numpy(stored[f"weights.{name}"]) for name in network.state_dict()}
            )
    except Exception as error:  # zip, numpy and torch fail in many ways
        raise ValueError(f"{where}: holds no PixelCNN ({error}); make the bundle again") from error
    return network.eval()


_SIZES: Final = tuple(field.name for field in fields(PixelSizes))


class Coder:
    """Codes of patches and back, by the very networks of a bundle; on the CPU, in float32."""

    def __init__(self, bundle: Bundle) -> None:
        """Open them.

        Raises
        ------
        EngineError, BundleError
            If they cannot be run, or do not pass their self-test.
        """
        here = EnginesTable(backend="onnxruntime", precision="fp32")
        self._encoder = open_engine(bundle, here)
        self._decoder = open_engine(bundle.network(DECODER), here)
        self.sha256 = hashlib.sha256(bundle.file(MODEL)).hexdigest()
        """Of the encoder: it binds a PixelCNN to it."""

    def codes(self, patches: ByteImage) -> IntArray:
        """Return codes (n, rows/8, columns/8) of patches (n, rows, columns)."""
        return self.read(patches)[0]

    def read(self, patches: ByteImage) -> tuple[IntArray, npt.NDArray[np.float32]]:
        """Return codes and latent means (n, width) of patches."""
        parts = [
            self._encoder.run({"image": patches[i : i + 16, None].astype(np.float32)})
            for i in range(0, len(patches), 16)
        ]
        codes = np.concatenate([part["codes"] for part in parts]).astype(np.int64)
        return codes, np.concatenate([part["latent"] for part in parts])

    def shown(self, codes: IntArray) -> ByteImage:
        """Return codes (n, rows, columns) as 8-bit images (n, 8 rows, 8 columns)."""
        parts = [
            self._decoder.run({"codes": codes[i : i + 16].astype(np.int32)})["image"][:, 0]
            for i in range(0, len(codes), 16)
        ]
        return np.clip(np.rint(np.concatenate(parts)), 0.0, 255.0).astype(np.uint8)


class Means:
    """Fingerprints of patches by the exported encoder of a VAE."""

    def __init__(self, bundle: Bundle) -> None:
        """Open it; see `Coder`."""
        self._engine = open_engine(bundle, EnginesTable(backend="onnxruntime", precision="fp32"))

    def of(self, patches: ByteImage) -> npt.NDArray[np.float32]:
        """Return means (n, latent) of patches (n, side, side)."""
        parts = [
            self._engine.run({"image": patches[i : i + 16, None].astype(np.float32)})["mu"]
            for i in range(0, len(patches), 16)
        ]
        return np.concatenate(parts)


class Prior:
    """Log-likelihoods of codes under conditions, by the exported PixelCNN."""

    def __init__(self, network: Bundle) -> None:
        """Open it; see `Coder`."""
        self._engine = open_engine(network, EnginesTable(backend="onnxruntime", precision="fp32"))

    def nats(self, codes: IntArray, conditions: npt.NDArray[Any] | None) -> npt.NDArray[np.float64]:
        """Return the nats (n, c) of codes (n, rows, columns) under each of c conditions, (n, 1) without."""
        if conditions is None:
            return self.log_likelihood(codes, None)[:, None]
        columns = []
        for condition in conditions:
            given = np.broadcast_to(condition, (len(codes), *condition.shape))
            columns.append(self.log_likelihood(codes, np.ascontiguousarray(given)))
        return np.stack(columns, axis=1)

    def log_likelihood(self, codes: IntArray, conditions: npt.NDArray[Any] | None) -> npt.NDArray[np.float64]:
        """Return the nats (n,) of codes under a condition each."""
        parts = []
        for i in range(0, len(codes), 16):
            given: dict[str, npt.NDArray[Any]] = {"codes": codes[i : i + 16].astype(np.int32)}
            if conditions is not None:
                given["condition"] = conditions[i : i + 16]
            parts.append(self._engine.run(given)["log_likelihood"])
        return np.concatenate(parts).astype(np.float64)

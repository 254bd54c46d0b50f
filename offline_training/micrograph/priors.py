"""From images and a bundle of a VQ-VAE to one with a PixelCNN: training, judgement, posterior, export."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
import numpy.typing as npt
import torch

from offline_training.micrograph.bundles import (
    CHECKPOINT,
    Made,
    Naming,
    Request,
    Watching,
    add_network,
    conditions_of,
    effort,
    in_memory,
    judged_patches,
    record_of,
    write_evaluation,
)
from offline_training.micrograph.data import Data, load_data
from offline_training.micrograph.evaluation import (
    TABLE_HEAD,
    Comparison,
    bins_of,
    compare_distributions,
    measure_patches,
    table_rows,
)
from offline_training.micrograph.export import Coder, Prior, export_prior, pack_prior, unpack_prior
from offline_training.micrograph.figures import pixelcnn_figures
from offline_training.micrograph.inverse import ConditionLaw
from offline_training.micrograph.labels import Values
from offline_training.micrograph.pixelcnn import PixelCnn
from offline_training.micrograph.plots import plot_distributions, plot_reconstructions
from offline_training.micrograph.references import CANDIDATES, Candidates, fit_parts
from offline_training.micrograph.sampling import CodeSampler
from offline_training.micrograph.training import Encoding, train_pixelcnn
from pipelines.engines.bundle import MODEL, Bundle, BundleError
from pipelines.micrograph.model_bundle import PRIOR, VQVAE

ByteImage = npt.NDArray[np.uint8]
IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]

WEIGHTS: Final = "prior.weights.npz"
_BASELINE_PATCHES: Final = 3000
_DRAWN_A_BIN: Final = 96
_AT_ONCE: Final = 32
_LAW_PATCHES: Final = 400


@dataclass(frozen=True)
class PriorOptions:
    """What a prior is told beside its recipe: candidates of the posterior, patches drawn for a bin."""

    candidates: int = CANDIDATES
    drawn: int = _DRAWN_A_BIN


def make_prior(
    request: Request,
    base: Bundle,
    out: Path,
    options: PriorOptions | None = None,
    watching: Watching | None = None,
) -> Made:
    """Train a PixelCNN on the codes that a bundle gives, and write a bundle that has both.

    Raises
    ------
    ValueError
        If the images, the bundle or a setting cannot be used.
    TrainingError
        As `loop.fit`; a checkpoint of another bundle is refused.
    """
    watching, options = watching or Watching(), options or PriorOptions()
    if base.description.kind != VQVAE:
        raise ValueError(f"{base.folder}: is a bundle of kind {base.description.kind}, expected {VQVAE}")
    if out.resolve() == base.folder.resolve():
        raise ValueError(f"--out {out}: is the bundle that is added to; choose another folder")
    data = load_data(request.data, base)
    watching.tell(data.parts.text())
    coder = Coder(base)
    n_codes = int(base.description.decision["codebook"])
    crops = data.crops(request.settings.seed)
    trained_on = data.conditions(data.parts.trained_on)
    out.mkdir(parents=True, exist_ok=True)
    network, trained = train_pixelcnn(
        Encoding(coder.codes, n_codes, coder.sha256),
        crops,
        trained_on,
        request.settings,
        out / CHECKPOINT,
        watching.progress,
    )
    patches, of = judged_patches(data)
    codes = coder.codes(patches)
    given = data.conditions(of)
    exported = export_prior(network, codes, given)
    prior = Prior(in_memory("", exported, {}))
    known, _ = data.patches(data.parts.trained_on)
    some = np.linspace(0, len(known) - 1, min(len(known), _BASELINE_PATCHES)).astype(np.int64)
    figures = pixelcnn_figures(
        network, coder.codes(known[some]), codes, None if given is None else torch.from_numpy(given)
    )
    candidates = None
    remarks: list[str] = []
    if data.images.conditions is not None:
        try:
            candidates = Candidates.of(data.images.conditions, data.parts.trained_on, options.candidates)
        except ValueError as error:
            remarks.append(f"no posterior: {error}")
    likelihood = None if candidates is None else prior.nats
    parts, found, more = fit_parts(data, lambda p: coder.read(p)[::-1], n_codes, likelihood, candidates)
    remarks += more
    compared, law = _judge_drawn(data, network, coder, patches, of, codes, options.drawn, out, request.naming)
    metrics: dict[str, Any] = {
        "held_out": asdict(figures),
        "conditions": conditions_of(data, len(patches)),
        "baseline": "order_0_bits: codes counted alone; context_bits: after their four earlier neighbours",
        "generated": [row.as_dict() for row in compared],
        "inverse": law,
        **{name: found[name] for name in ("posterior",) if name in found},
        **effort(trained, request.settings),
    }
    named: dict[str, Any] = {"names": [], "classes": []}
    if data.images.conditions is not None:
        values = data.conditions(data.parts.trained_on)
        named = {"names": list(data.images.conditions.names), "classes": list(data.images.conditions.classes)}
        if values is not None and values.ndim == 2:
            named["least"], named["greatest"] = values.min(axis=0).tolist(), values.max(axis=0).tolist()
    bundle = add_network(
        base,
        out,
        request.naming,
        {PRIOR: exported},
        training={
            "prior": {
                **record_of(request.settings, trained),
                "condition": named,
                "data": data.record(),
                "encoder_sha256": coder.sha256,
            }
        },
        metrics={"prior": metrics, **{name: found[name] for name in ("novelty",) if name in found}},
        parts=parts,
        files={WEIGHTS: pack_prior(network)},
    )
    write_evaluation(metrics, remarks, watching, out)
    return Made(bundle, metrics, ["generated.png", "distributions.png"])


def _judge_drawn(
    data: Data,
    network: PixelCnn,
    coder: Coder,
    patches: ByteImage,
    of: IntArray,
    codes: IntArray,
    count: int,
    out: Path,
    naming: Naming,
) -> tuple[list[Comparison], dict[str, Any]]:
    # Drawn under the very conditions of held-out patches, so that a bin is the same mixture on both sides.
    if data.preparation.parameters.reference is not None:
        # Matched images all have the fraction of the reference: nothing could be compared.
        return [], {}
    rng = np.random.default_rng(0)
    sampler = CodeSampler(network)
    conditions = data.images.conditions
    compared: list[Comparison] = []
    shown_bins, rows = [], []
    values, measures = [], []
    by_codes = measure_patches(coder.shown(codes), data.preparation.phase)
    own = measure_patches(patches, data.preparation.phase)
    for name, members in bins_of(conditions, of):
        chosen = rng.choice(members, count)
        given = data.conditions(of[chosen])
        drawn = coder.shown(draw_codes(sampler, count, codes.shape[1:], given, rng))
        found = measure_patches(drawn, data.preparation.phase)
        compared += compare_distributions(name, own[members], by_codes[members], found, of[members])
        shown_bins.append((name, own[members], by_codes[members], found))
        some = members[np.linspace(0, len(members) - 1, min(len(members), 8)).astype(np.int64)]
        words = name.replace(" ", "\n", 1)
        rows += [(f"{words}\nheld out", patches[some]), ("generated", drawn[:8])]
        if given is not None:
            values.append(given)
            measures.append(found)
    title = f"{naming.name}: generated beside held-out patches"
    plot_distributions(shown_bins, title, out / "distributions.png")
    plot_reconstructions(rows, title, out / "generated.png")
    law: dict[str, Any] = {}
    if conditions is not None and not conditions.classes and len(conditions.names) == 1:
        given_all = data.conditions(of)
        assert given_all is not None
        law = _judge_law(np.concatenate(values)[:, 0], np.concatenate(measures), given_all[:, 0], own)
    return compared, law


def _judge_law(
    values: npt.NDArray[Any], drawn: FloatArray, true: npt.NDArray[Any], measured: FloatArray
) -> dict[str, Any]:
    # Of held-out patches, one by one: how often the interval of 90 % holds the condition.
    law = ConditionLaw.fit(values.astype(np.float64), drawn)
    good = np.flatnonzero(np.isfinite(measured).all(axis=1))
    some = good[np.linspace(0, len(good) - 1, min(len(good), _LAW_PATCHES)).astype(np.int64)]
    answers = [law.ask(float(measured[i, 0]), float(measured[i, 1])) for i in some]
    low, high = (np.array([getattr(a, end) for a in answers]) for end in ("low", "high"))
    best = np.array([a.best for a in answers])
    return {
        "patches": len(some),
        "interval": 0.9,
        "holds_the_true_one": float(((low <= true[some]) & (true[some] <= high)).mean()),
        "median_width": float(np.median(high - low)),
        "range": list(law.range),
        "rms_error": float(np.sqrt(np.mean(np.square(best - true[some])))),
        "guess_rms_error": float(np.std(true[some])),
    }


def draw_codes(
    sampler: CodeSampler,
    count: int,
    shape: tuple[int, ...],
    conditions: Values | None,
    rng: np.random.Generator,
    temperature: float = 1.0,
) -> IntArray:
    """Draw maps of codes (n, rows, columns), one for each condition."""
    parts = []
    for i in range(0, count, _AT_ONCE):
        n = min(_AT_ONCE, count - i)
        given = None if conditions is None else torch.from_numpy(np.ascontiguousarray(conditions[i : i + n]))
        parts.append(sampler.sample(n, (shape[0], shape[1]), given, rng, temperature)[0])
    return np.concatenate(parts)


def table_of(generated: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Return head and rows for people of what `Comparison.as_dict` gave."""
    return list(TABLE_HEAD), table_rows(msgspec.convert(generated, list[Comparison]))


@dataclass(frozen=True, eq=False)
class Generator:
    """Draws images with a bundle that has a prior.

    Attributes
    ----------
    sampler : CodeSampler
    coder : Coder
    shape : (int, int)
        Rows and columns of a map that it has learned.
    names, classes : tuple of str
        Of the condition.
    least, greatest : tuple of float
        Of the numbers that it was trained on.
    pixel_size_um : float or None
        None where it was not known, or not one.
    """

    sampler: CodeSampler
    coder: Coder
    shape: tuple[int, int]
    names: tuple[str, ...]
    classes: tuple[str, ...]
    least: tuple[float, ...]
    greatest: tuple[float, ...]
    pixel_size_um: float | None

    @classmethod
    def open(cls, bundle: Bundle) -> Generator:
        """Open the networks of a bundle.

        Raises
        ------
        BundleError
            If it has no prior, or that of other codes.
        """
        told = bundle.description.training.get("prior")
        if told is None or PRIOR not in bundle.description.networks or WEIGHTS not in bundle.files:
            raise BundleError(
                f"{bundle.folder}: has no PixelCNN to draw with; make one: grainwatch train pixelcnn"
                f" --vqvae {bundle.folder}"
            )
        coder = Coder(bundle)
        if told["encoder_sha256"] != coder.sha256:
            raise BundleError(
                f"{bundle.folder / MODEL}: is not the encoder whose codes the PixelCNN has learned; make the"
                " bundle again"
            )
        condition = told["condition"]
        rows, columns = bundle.network(PRIOR).description.inputs["codes"]["shape"][1:]
        size = bundle.description.domain.get("pixel_size_um")
        one = size is not None and size[1] <= 1.01 * size[0]
        return cls(
            CodeSampler(unpack_prior(bundle.file(WEIGHTS), str(bundle.path(WEIGHTS)))),
            coder,
            (rows, columns),
            tuple(condition["names"]),
            tuple(condition["classes"]),
            tuple(condition.get("least", ())),
            tuple(condition.get("greatest", ())),
            float(size[0]) if one and size is not None else None,
        )

    def condition_of(self, given: dict[str, str]) -> npt.NDArray[np.float32] | np.int64 | None:
        """Return a condition as the network takes it, of what a command line says, NAME to value.

        Raises
        ------
        ValueError
            If something is missing, unknown, or outside of what was trained on.
        """
        wanted = ", ".join(self.names) or "none"
        if unknown := sorted(set(given) - set(self.names)):
            raise ValueError(f"--condition {unknown[0]}: the bundle has no such condition; it has: {wanted}")
        if missing := [name for name in self.names if name not in given]:
            raise ValueError(f"--condition {missing[0]}=...: is missing; the bundle was trained on {wanted}")
        if not self.names:
            return None
        if self.classes:
            value = given[self.names[0]]
            if value not in self.classes:
                known = ", ".join(self.classes)
                raise ValueError(f"--condition {self.names[0]}={value}: expected one of {known}")
            return np.int64(self.classes.index(value))
        numbers = []
        for name, low, high in zip(self.names, self.least, self.greatest, strict=True):
            try:
                number = float(given[name])
            except ValueError:
                raise ValueError(f"--condition {name}={given[name]}: expected a number") from None
            if not low - 1e-6 * abs(low) <= number <= high + 1e-6 * abs(high):
                raise ValueError(
                    f"--condition {name}={number:g}: outside of {low:g} to {high:g}, which it was trained on"
                )
            numbers.append(number)
        return np.array(numbers, dtype=np.float32)

    def draw(
        self,
        count: int,
        condition: npt.NDArray[Any] | np.int64 | None,
        rng: np.random.Generator,
        temperature: float = 1.0,
    ) -> ByteImage:
        """Draw images (n, side, side) under one condition, or under one each where it has n rows."""
        given = None
        if condition is not None:
            array = np.asarray(condition)
            alike = array.ndim == (0 if self.classes else 1)
            given = np.broadcast_to(array, (count, *array.shape)) if alike else array
        return self.coder.shown(draw_codes(self.sampler, count, self.shape, given, rng, temperature))

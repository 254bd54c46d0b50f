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
    Request,
    Watching,
    add_network,
    conditions_of,
    effort,
    in_memory,
    judged_patches,
    record_of,
    self_test_patches,
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
from offline_training.micrograph.export import SELF_TEST_ROWS, Coder, Prior, export_prior, pack_prior
from offline_training.micrograph.figures import pixelcnn_figures
from offline_training.micrograph.generator import WEIGHTS, draw_codes
from offline_training.micrograph.inverse import ConditionLaw, judge_law
from offline_training.micrograph.labels import Conditions
from offline_training.micrograph.plots import plot_distributions, plot_reconstructions
from offline_training.micrograph.references import CANDIDATES, Candidates, Likelihood, fit_parts
from offline_training.micrograph.sampling import CodeSampler
from offline_training.micrograph.training import Encoding, train_pixelcnn
from pipelines.engines.bundle import Bundle
from pipelines.micrograph.model_bundle import PRIOR, VQVAE

ByteImage = npt.NDArray[np.uint8]
IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]

_BASELINE_PATCHES: Final = 3000
_DRAWN_A_BIN: Final = 96


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
    for line in data.text():
        watching.tell(line)
    coder = Coder(base)
    n_codes = int(base.description.decision["codebook"])
    crops = data.crops(request.settings.seed)
    trained_on = data.conditions(data.parts.trained_on)
    if data.images.conditions is not None:
        _check_classes(data.images.conditions, data.parts.trained_on)
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
    tested = coder.codes(self_test_patches(data)[: min(SELF_TEST_ROWS, len(patches))])
    exported = export_prior(network, tested, None if given is None else given[: len(tested)])
    prior = Prior(in_memory("", exported, {}))
    known, _ = data.patches(data.parts.trained_on)
    some = np.linspace(0, len(known) - 1, min(len(known), _BASELINE_PATCHES)).astype(np.int64)
    figures = pixelcnn_figures(
        network, coder.codes(known[some]), codes, None if given is None else torch.from_numpy(given)
    )
    candidates = None
    likelihood: Likelihood | None = prior.nats
    remarks: list[str] = []
    if data.images.conditions is not None:
        try:
            candidates = Candidates.of(
                data.images.conditions,
                data.parts.trained_on,
                options.candidates,
                held_out=np.concatenate([data.parts.calibration, data.parts.judged]),
                groups=data.images.groups,
            )
        except ValueError as error:
            # Codes cannot be weighed without a condition to weigh them under.
            likelihood = None
            remarks.append(f"no posterior: {error}")
    parts, found, more = fit_parts(data, lambda p: coder.read(p)[::-1], n_codes, likelihood, candidates)
    remarks += more
    drawn = _Drawn(data, CodeSampler(network), coder, options.drawn)
    compared, law, more = drawn.judge(patches, of, codes, request.naming.name, out)
    remarks += more
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
    pictures = [p for p in ("generated.png", "distributions.png") if (out / p).exists()]
    return Made(bundle, metrics, pictures)


def _check_classes(conditions: Conditions, trained_on: IntArray) -> None:
    if not conditions.classes:
        return
    met = set(conditions.of(trained_on).tolist())
    if absent := [name for number, name in enumerate(conditions.classes) if number not in met]:
        raise ValueError(
            f"class {absent[0]}: all of its images are held out, none is left to train on; choose --held-out"
        )


@dataclass(frozen=True, eq=False)
class _Drawn:
    """Generated patches beside held-out ones.

    They are drawn under the very conditions of held-out patches, so that a bin is the same mixture on both
    sides.
    """

    data: Data
    sampler: CodeSampler
    coder: Coder
    count: int

    def judge(
        self, patches: ByteImage, of: IntArray, codes: IntArray, name: str, out: Path
    ) -> tuple[list[Comparison], dict[str, Any], list[str]]:
        """Compare, draw pictures, ask back; return comparisons, figures of the law, and remarks."""
        data, rng = self.data, np.random.default_rng(0)
        if data.preparation.parameters.reference is not None:
            return [], {}, ["histograms are matched: generated fractions say nothing, and are not compared"]
        phase, conditions = data.preparation.phase, data.images.conditions
        compared: list[Comparison] = []
        remarks: list[str] = []
        shown, rows, values, measures = [], [], [], []
        by_codes, own = measure_patches(self.coder.shown(codes), phase), measure_patches(patches, phase)
        for text, members in bins_of(conditions, of):
            given = data.conditions(of[rng.choice(members, self.count)])
            drawn = self.coder.shown(draw_codes(self.sampler, self.count, codes.shape[1:], given, rng))
            found = measure_patches(drawn, phase)
            some = members[np.linspace(0, len(members) - 1, min(len(members), 8)).astype(np.int64)]
            words = text.replace(" ", "\n", 1)
            rows += [(f"{words}\nheld out", patches[some]), ("generated", drawn[:8])]
            try:
                compared += compare_distributions(text, own[members], by_codes[members], found, of[members])
            except ValueError as error:
                remarks.append(str(error))
                continue
            shown.append((text, own[members], by_codes[members], found))
            if given is not None:
                values.append(given)
                measures.append(found)
        title = f"{name}: generated beside held-out patches"
        plot_reconstructions(rows, title, out / "generated.png")
        if shown:
            plot_distributions(shown, title, out / "distributions.png")
        law: dict[str, Any] = {}
        if values and conditions is not None and not conditions.classes and len(conditions.names) == 1:
            try:
                drawn_from = ConditionLaw.fit(np.concatenate(values)[:, 0], np.concatenate(measures))
                calibrated, their = data.patches(data.parts.calibration)
                off = drawn_from.off(conditions.of(their)[:, 0], measure_patches(calibrated, phase), their)
                law = judge_law(drawn_from, off, conditions.of(of)[:, 0], own, of)
            except ValueError as error:
                remarks.append(f"the inverse question cannot be asked: {error}")
        return compared, law, remarks


def table_of(generated: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Return head and rows for people of what `Comparison.as_dict` gave."""
    return list(TABLE_HEAD), table_rows(msgspec.convert(generated, list[Comparison]))

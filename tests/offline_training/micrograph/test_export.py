"""Networks of micrographs run elsewhere and give the same, by the engines that the daemon has."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is absent: see docs/how-to/train-a-network.md")
pytest.importorskip("onnxscript", reason="onnxscript is absent: see docs/how-to/train-a-network.md")

from offline_training.errors import TrainingError  # noqa: E402
from offline_training.micrograph import figures  # noqa: E402
from offline_training.micrograph.export import (  # noqa: E402
    Coder,
    Exported,
    clear_patches,
    export_decoder,
    export_encoder,
    export_means,
    export_prior,
    pack_prior,
    unpack_prior,
)
from offline_training.micrograph.pixelcnn import PixelCnn, PixelSizes  # noqa: E402
from offline_training.micrograph.vae import Vae, VaeSizes  # noqa: E402
from offline_training.micrograph.vqvae import VqSizes, VqVae, to_pixels  # noqa: E402
from pipelines.engines.bundle import SCHEMA, Bundle, Description, load_bundle, write_bundle  # noqa: E402
from pipelines.engines.choice import open_engine  # noqa: E402
from pipelines.micrograph.synthetic import MicrographSimulator  # noqa: E402

SMALL = VqSizes(codes=16, width=8, channels=(4, 8), inner=4, blocks=1)


@cache
def _patches() -> np.ndarray:
    return np.stack([s.image for s in MicrographSimulator(shape=(64, 64)).samples(0, 24)])


@cache
def _model() -> VqVae:
    torch.manual_seed(0)
    model = VqVae(SMALL)
    for _ in range(3):
        model.loss(to_pixels(torch.from_numpy(_patches())))
    return model.eval()


def _bundle(folder: Path, first: Exported, **others: Exported) -> Bundle:
    description = Description(
        schema=SCHEMA,
        kind="micrograph-vqvae",
        name="m",
        version="1",
        about="",
        inputs=first.described.inputs,
        outputs=first.described.outputs,
        preparation={},
        domain={},
        decision={},
        training={},
        metrics={},
        tolerances=first.described.tolerances,
        git_revision="",
        command="",
        batch=first.described.batch,
        networks={name: exported.described for name, exported in others.items()},
    )
    files = first.files()
    for name, exported in others.items():
        files |= exported.files(name)
    write_bundle(folder, description, files)
    return load_bundle(folder)


def test_codes_and_their_images_are_those_of_the_model(tmp_path: Path) -> None:
    model = _model()
    codes = figures.codes_of(model, _patches())
    encoder, margin = export_encoder(model, _patches())
    assert margin > 1e-4
    bundle = _bundle(tmp_path, encoder, decoder=export_decoder(model, codes))
    coder = Coder(bundle)  # each network passes its self-test here
    found, latent = coder.read(_patches())
    np.testing.assert_array_equal(found, codes)
    with torch.no_grad():
        z = model.encoder(to_pixels(torch.from_numpy(_patches())))
    np.testing.assert_allclose(latent, z.mean((2, 3)).numpy(), atol=1e-4)
    off = coder.shown(codes).astype(int) - figures.shown(model, codes)
    assert np.abs(off).max() <= 1


def test_a_network_is_the_same_bytes_each_time_and_notes_nothing_of_who_exported_it() -> None:
    once, again = (export_decoder(_model(), np.zeros((2, 8, 8), dtype=np.int64)).model for _ in range(2))
    assert once == again
    assert b"stack_trace" not in once
    assert b".py" not in once


def test_the_self_test_has_patches_with_clear_codes() -> None:
    model = _model()
    clear, least = clear_patches(model, _patches(), 2)
    all_of_them, worst = clear_patches(model, _patches(), 24)
    assert (len(clear), len(all_of_them)) == (2, 24)
    assert least > worst
    # A margin is how far a vector may move before its code changes: closed form for two codes.
    with torch.no_grad():
        two = VqVae(VqSizes(codes=2, width=8, channels=(4, 8), inner=4, blocks=1)).eval()
        two.encoder, two.codebook.vectors = model.encoder, model.codebook.vectors[:2].clone()
        z = model.encoder(to_pixels(torch.from_numpy(_patches()[:1]))).movedim(1, -1).reshape(-1, 8).numpy()
    a, b = two.codebook.vectors.numpy()
    distance = np.abs((z - (a + b) / 2) @ (a - b)) / np.linalg.norm(a - b) / np.linalg.norm(z, axis=1)
    assert clear_patches(two, _patches()[:1])[1] == pytest.approx(distance.min(), rel=1e-3)


def test_an_encoder_that_no_backend_could_agree_on_is_refused() -> None:
    model = VqVae(SMALL).eval()
    with torch.no_grad():
        model.codebook.vectors.zero_()
    with pytest.raises(TrainingError, match="midway between codes"):
        export_encoder(model, _patches())


@pytest.mark.parametrize(
    ("sizes", "conditions"),
    [
        ({"scalars": 1}, np.linspace(-2, 2, 24, dtype=np.float32)[:, None]),
        ({"scalars": 0, "classes": 3}, np.arange(24) % 3),
        ({"scalars": 0}, None),
    ],
    ids=["numbers", "classes", "none"],
)
def test_the_likelihood_and_what_is_drawn_survive_the_bundle(
    tmp_path: Path, sizes: dict[str, int], conditions: np.ndarray | None
) -> None:
    torch.manual_seed(1)
    network = PixelCnn(PixelSizes(codes=16, width=8, layers=3, head=16, **sizes)).eval()
    if network.sizes.scalars:
        network.standardise(torch.tensor([[0.0], [1.0], [4.0]]))
    codes = figures.codes_of(_model(), _patches())
    bundle = _bundle(tmp_path, export_prior(network, codes, conditions))
    given = {"codes": codes.astype(np.int32)}
    if conditions is not None:
        given["condition"] = conditions
    found = open_engine(bundle).run(given)["log_likelihood"]
    asked = None if conditions is None else torch.from_numpy(conditions)
    with torch.no_grad():
        expected = network.log_likelihood(torch.from_numpy(codes), asked).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    again = unpack_prior(pack_prior(network), "here")
    assert again.sizes == network.sizes
    with torch.no_grad():
        np.testing.assert_array_equal(again.log_likelihood(torch.from_numpy(codes), asked), expected)
    with pytest.raises(ValueError, match=r"prior\.npz: holds no PixelCNN"):
        unpack_prior(b"rubbish", "prior.npz")


def test_a_vae_s_means_are_those_of_the_model(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Vae(VaeSizes(patch_px=64, latent=8, width=4, neck=2))
    model.loss(to_pixels(torch.from_numpy(_patches())))
    model.eval()
    found = open_engine(_bundle(tmp_path, export_means(model, _patches()))).run(
        {"image": _patches()[:, None].astype(np.float32)}
    )
    with torch.no_grad():
        expected = model.fingerprint(to_pixels(torch.from_numpy(_patches())))
    np.testing.assert_allclose(found["mu"], expected.numpy(), atol=1e-4)

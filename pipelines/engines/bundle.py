"""A model bundle: a folder that says what it is, and can be checked byte for byte.

``bundle.json`` describes the model; ``manifest.sha256`` (the format of sha256sum) lists every
other file with its hash. Nothing in a bundle is ever unpickled. The hash of the manifest stands
for the bundle: results carry it.

A model is one network, ``model.onnx`` with ``selftest.npz``, or several that belong together: further
ones are NAME.onnx with NAME.selftest.npz, and `Bundle.network` shows each as a bundle of its own.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec

from grainwatch.messages import ModelInfo

SCHEMA = "grainwatch.bundle/1"
DESCRIPTION = "bundle.json"
MANIFEST = "manifest.sha256"
MODEL = "model.onnx"
SELF_TEST = "selftest.npz"

_LINE = re.compile(r"([0-9a-f]{64})  ([A-Za-z0-9][A-Za-z0-9._-]*)")
_LARGEST_BYTES = 1 << 30


class BundleError(ValueError):
    """A bundle that cannot be used, and why."""


class Network(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A further network of a model; the attributes are those of `Description`."""

    inputs: dict[str, Any]
    outputs: dict[str, Any]
    tolerances: dict[str, float]
    precision: dict[str, str] = {}
    batch: tuple[int, int, int] = (1, 32, 1024)


class Description(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What ``bundle.json`` holds.

    Attributes
    ----------
    schema : str
    kind : str
        What the model does: "laue-classes".
    name, version : str
        As results carry them.
    about : str
        One sentence for people.
    inputs, outputs : dict
        Of the network: name to type and shape, "batch" being any number.
    preparation : dict
        How inputs are made; read by the pipeline of this kind.
    domain : dict
        What the model was trained over, as ranges; outside it is refused.
    decision : dict
        Parameters of what is read from the output, such as the threshold of confidence.
    training : dict
        Settings, seed and the hash of the data.
    metrics : dict
        Figures on held-out data, baselines beside them, with the conditions.
    tolerances : dict
        How far the answers to the self-test may be off: `self_test` of the network as it is, and where
        they differ from `pipelines.engines.selftest.TOLERANCES`, those of fewer bits: `fp16`, `bf16`, `int8`.
    git_revision : str
    command : str
        Makes this bundle again.
    precision : dict
        From backends (see ``[engines] backend``) to the precision that was found to be best there;
        "fp32" for all others.
    batch : (int, int, int)
        Fewest, typical and most rows at once, for engines that are compiled for a range.
    networks : dict of str to Network
        Further ones, by name; `inputs`, `outputs`, `tolerances`, `precision` and `batch` above are those
        of ``model.onnx``.
    """

    schema: str
    kind: str
    name: str
    version: str
    about: str
    inputs: dict[str, Any]
    outputs: dict[str, Any]
    preparation: dict[str, Any]
    domain: dict[str, Any]
    decision: dict[str, Any]
    training: dict[str, Any]
    metrics: dict[str, Any]
    tolerances: dict[str, float]
    git_revision: str
    command: str
    precision: dict[str, str] = {}
    batch: tuple[int, int, int] = (1, 32, 1024)
    networks: dict[str, Network] = {}


@dataclass(frozen=True, eq=False)
class Bundle:
    """A verified bundle.

    Attributes
    ----------
    folder : Path
    description : Description
    sha256 : str
        Of the manifest.
    files : dict of str to bytes
        Contents as they were verified, so that a file swapped later is not read.
    part : str
        Which of its further networks this stands for; "" for the whole.
    """

    folder: Path
    description: Description
    sha256: str
    files: dict[str, bytes] = field(repr=False)
    part: str = ""

    @property
    def model(self) -> ModelInfo:
        """What results carry."""
        return ModelInfo(self.description.name, self.description.version, self.sha256)

    def file(self, name: str) -> bytes:
        """Return the contents of a file.

        Raises
        ------
        BundleError
            If the bundle has none of this name.
        """
        try:
            return self.files[name]
        except KeyError:
            raise BundleError(f"{self.path(name)}: the bundle has no such file; make it again") from None

    def path(self, name: str) -> Path:
        """Return where a file lies; of a further network those that its own names stand for."""
        stored = network_files(self.part).get(name, name) if self.part else name
        return self.folder / stored

    def network(self, name: str) -> Bundle:
        """Return a further network as if it were a bundle of its own: files and description are its.

        Raises
        ------
        BundleError
            If the bundle has none of this name.
        """
        described = self.description.networks.get(name)
        if described is None:
            known = ", ".join(self.description.networks) or "none"
            raise BundleError(f"{self.folder}: the bundle has no network {name!r}; further networks: {known}")
        own = {plain: self.file(stored) for plain, stored in network_files(name).items()}
        return replace(
            self,
            description=msgspec.structs.replace(
                self.description,
                inputs=described.inputs,
                outputs=described.outputs,
                tolerances=described.tolerances,
                precision=described.precision,
                batch=described.batch,
                networks={},
            ),
            files={**self.files, **own},
            part=name,
        )

    def networks(self) -> Iterator[Bundle]:
        """Iterate over all networks: the bundle itself for ``model.onnx``, then the further ones."""
        yield self
        for name in self.description.networks:
            yield self.network(name)


def joined(models: Sequence[ModelInfo]) -> ModelInfo:
    """Return what results carry that several models made: names and versions joined by +, one hash of all."""
    if len(models) == 1:
        return models[0]
    sha256 = hashlib.sha256("".join(m.sha256 for m in models).encode()).hexdigest()
    return ModelInfo("+".join(m.name for m in models), "+".join(m.version for m in models), sha256)


def network_files(name: str) -> dict[str, str]:
    """Return what the files of a further network are called, by what those of the first one are called."""
    return {MODEL: f"{name}.onnx", SELF_TEST: f"{name}.selftest.npz"}


def load_bundle(folder: Path, kind: str = "", sha256: str = "") -> Bundle:
    """Read a bundle and verify every file against the manifest.

    Parameters
    ----------
    folder : Path
    kind : str
        That it must be of; "" for any.
    sha256 : str
        That its manifest must have, because it was chosen by it; "" for any.

    Raises
    ------
    BundleError
        If something is missing, foreign, altered or of another kind; the message names the file.
    """
    if not folder.is_dir():
        raise BundleError(f"{folder}: no such bundle; expected a folder with {DESCRIPTION} and {MANIFEST}")
    manifest = _read(folder, MANIFEST)
    found = hashlib.sha256(manifest).hexdigest()
    if sha256 and found != sha256:
        raise BundleError(
            f"{folder}: has changed since it was taken: its manifest's sha256 is {found[:12]}, that of the"
            f" one that was taken {sha256[:12]}; add the new one as a model of its own"
        )
    expected = _parse_manifest(folder, manifest)
    if DESCRIPTION not in expected:
        raise BundleError(f"{folder / MANIFEST}: does not list {DESCRIPTION}; make the bundle again")
    files: dict[str, bytes] = {}
    for name, sha256 in expected.items():
        content = _read(folder, name)
        if hashlib.sha256(content).hexdigest() != sha256:
            raise BundleError(
                f"{folder / name}: is not the file that the manifest names (its sha256 differs): the bundle"
                " was altered or copied badly; fetch it again"
            )
        files[name] = content
    try:
        description = msgspec.json.decode(files[DESCRIPTION], type=Description)
    except msgspec.DecodeError as error:
        raise BundleError(f"{folder / DESCRIPTION}: {error}") from error
    if description.schema != SCHEMA:
        raise BundleError(
            f"{folder / DESCRIPTION}: schema {description.schema!r}, this version reads {SCHEMA!r}"
        )
    if kind and description.kind != kind:
        raise BundleError(f"{folder}: is a bundle of kind {description.kind!r}, expected {kind!r}")
    return Bundle(folder, description, found, files)


def write_bundle(folder: Path, description: Description, files: dict[str, bytes]) -> None:
    """Write a bundle; an older one in the folder is replaced.

    The manifest is removed first and written last, so that a half-written bundle is none.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MANIFEST).unlink(missing_ok=True)
    text = msgspec.json.format(msgspec.json.encode(description), indent=2) + b"\n"
    contents = {DESCRIPTION: text, **files}
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    lines = [f"{hashlib.sha256(contents[name]).hexdigest()}  {name}\n" for name in sorted(contents)]
    (folder / MANIFEST).write_text("".join(lines), encoding="ascii")


def _read(folder: Path, name: str) -> bytes:
    path = folder / name
    try:
        if path.stat().st_size > _LARGEST_BYTES:
            raise BundleError(f"{path}: is larger than any model file of this program")
        return path.read_bytes()
    except OSError as error:
        raise BundleError(f"{path}: cannot be read: {error.strerror}") from error


def _parse_manifest(folder: Path, manifest: bytes) -> dict[str, str]:
    expected: dict[str, str] = {}
    for number, line in enumerate(manifest.decode("ascii", "replace").splitlines(), start=1):
        match = _LINE.fullmatch(line)
        # Names without a slash: a manifest reaches no file outside its folder.
        if match is None:
            raise BundleError(f"{folder / MANIFEST}: line {number} is no sha256 and file name")
        expected[match.group(2)] = match.group(1)
    return expected

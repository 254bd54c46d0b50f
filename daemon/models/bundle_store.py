"""The registry's own copies of bundles, so that nobody's tidying takes away what the daemon runs."""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

import msgspec

from daemon.models.registry_file import RegistryError, give_to_owner_of, make_folder
from pipelines.engines.bundle import DESCRIPTION, MANIFEST, Bundle, BundleError, load_bundle, write_bundle
from pipelines.engines.plan_cache import sync_folder

#: What may be the name of a folder, on every system and in every shell.
_SAFE: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,99}")
_UNFINISHED: Final = ".adding-"
#: A copy that takes longer was given up, seconds.
_GIVEN_UP_S: Final = 3600.0


class BundleStore:
    """Bundles below one folder, NAME/VERSION-HASH each. A copy is there as a whole or not at all."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def place(self, name: str, version: str, sha256: str) -> Path:
        """Return where a bundle is kept."""
        return self.folder / name / f"{version}-{sha256[:12]}"

    def copy(self, bundle: Bundle) -> Path:
        """Write the verified contents of a bundle into a folder that is yet to get its name; return it.

        Raises
        ------
        RegistryError
            If the name or version cannot be that of a folder, the disk does not take it, or what was
            written does not read back. Nothing is left behind then.
        """
        described = bundle.description
        for what, text in (("name", described.name), ("version", described.version)):
            if not _SAFE.fullmatch(text):
                raise RegistryError(
                    f"{bundle.folder}: the {what} of the model, {text[:100]!r}, holds more than letters,"
                    " digits and . _ + - (at most 100, a letter or digit first); make the bundle again with"
                    " another"
                )
        parent = self.folder / described.name
        unfinished = parent / f"{_UNFINISHED}{secrets.token_hex(8)}"
        try:
            make_folder(parent)
            _remove_given_up(parent)
            make_folder(unfinished)
            for name, content in {**bundle.files, MANIFEST: _manifest_of(bundle)}.items():
                _write(unfinished / name, content)
            sync_folder(unfinished)
            if load_bundle(unfinished).sha256 != bundle.sha256:
                raise RegistryError(f"{bundle.folder}: does not read back as it was written; check the disk")
        except BaseException as error:
            discard(unfinished)
            if isinstance(error, BundleError):
                raise RegistryError(f"{bundle.folder}: cannot be copied: {error}") from error
            if isinstance(error, OSError):
                where = error.filename or parent
                raise RegistryError(
                    f"{bundle.folder}: cannot be copied: {where}: {error.strerror or error}"
                ) from error
            raise
        return unfinished

    def settle(self, unfinished: Path, place: Path) -> None:
        """Give a copy its place. What lies there is from an addition that a crash broke off: it goes.

        Raises
        ------
        RegistryError
            If the disk refuses.
        """
        try:
            if place.exists():
                place.rename(place.with_name(f"{_UNFINISHED}{secrets.token_hex(8)}"))
            unfinished.rename(place)
            sync_folder(place.parent)
        except OSError as error:
            raise RegistryError(f"{place}: cannot be made: {error.strerror or error}") from error


@contextmanager
def renumbered(bundle: Bundle, version: str) -> Iterator[Bundle]:
    """Give a bundle with another version, which is there as long as the context.

    Raises
    ------
    RegistryError
        If it cannot be written.
    """
    with TemporaryDirectory(prefix="grainwatch-") as folder:
        # In a folder of the same name, which the errors name.
        copy = Path(folder) / bundle.folder.name
        files = {name: content for name, content in bundle.files.items() if name != DESCRIPTION}
        try:
            write_bundle(copy, msgspec.structs.replace(bundle.description, version=version), files)
            other = load_bundle(copy)
        except (OSError, BundleError) as error:
            raise RegistryError(f"{bundle.folder}: cannot be renumbered: {error}") from error
        yield other


def discard(folder: Path) -> None:
    """Remove a folder as far as that is possible."""
    shutil.rmtree(folder, ignore_errors=True)


def _manifest_of(bundle: Bundle) -> bytes:
    content = (bundle.folder / MANIFEST).read_bytes()
    if hashlib.sha256(content).hexdigest() != bundle.sha256:
        raise RegistryError(f"{bundle.folder}: was changed while it was read; add it again")
    return content


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    give_to_owner_of(path.parent, path)


def _remove_given_up(parent: Path) -> None:
    for folder in parent.glob(f"{_UNFINISHED}*"):
        with suppress(OSError):
            if time.time() - folder.stat().st_mtime > _GIVEN_UP_S:
                discard(folder)

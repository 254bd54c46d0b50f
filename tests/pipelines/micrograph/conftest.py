"""Real micrographs: third-party, outside the repository."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def micrographs(truth_dir: Path) -> Path:
    """The folder of real micrographs; the test is skipped where it is absent."""
    found = truth_dir.parent / "micrographs"
    if not found.is_dir():
        pytest.skip("third-party micrographs are absent")
    return found


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with all networks."""
    pytest.importorskip("onnx", reason="onnx writes the networks")
    from testkit.micrograph_bundle import make_bundle

    folder = tmp_path_factory.mktemp("bundles") / "two-phase-trial"
    make_bundle(folder)
    return folder

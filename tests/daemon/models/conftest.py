"""Real bundles in other versions, and a registry for each test."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from testkit.bundles import redescribe

from daemon.models.registry import Registry
from pipelines.engines.shipped import find_bundle


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "state"


@pytest.fixture
def registry(state: Path) -> Iterator[Registry]:
    found = Registry(state)
    yield found
    found.close()


@pytest.fixture
def bundle(tmp_path: Path) -> Callable[..., Path]:
    """Return a copy of a bundle that comes along, its description changed: ``bundle("0.2.0")``."""

    def make(number: str | None = None, of: str = "Cu", **changes: Any) -> Path:
        folder = tmp_path / "bundles" / f"{of}-{len(list(tmp_path.glob('bundles/*')))}"
        shutil.copytree(find_bundle(of), folder)
        if number is not None:
            changes["version"] = number
        if changes:
            redescribe(folder, lambda description: description.update(changes))
        return folder

    return make

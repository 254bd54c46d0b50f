"""What is declared in pyproject.toml holds together."""

from __future__ import annotations

import importlib
import re
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]


def read(path: str) -> dict[str, Any]:
    return tomllib.loads((ROOT / path).read_text(encoding="utf-8"))


PROJECT = read("pyproject.toml")["project"]


def requirements() -> dict[str, list[Requirement]]:
    groups = {"base": PROJECT["dependencies"], **PROJECT["optional-dependencies"]}
    return {group: [Requirement(line) for line in lines] for group, lines in groups.items()}


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    parsed = [Requirement(line) for line in lines if line.strip() and not line.startswith("#")]
    return {canonicalize_name(pin.name): str(pin.specifier).removeprefix("==") for pin in parsed}


def entry_points() -> list[tuple[str, str, str]]:
    groups = {"scripts": PROJECT["scripts"], **PROJECT["entry-points"]}
    return [(group, name, value) for group, points in groups.items() for name, value in points.items()]


@pytest.mark.parametrize(("group", "name", "value"), entry_points(), ids=lambda part: part)
def test_entry_points_resolve(group: str, name: str, value: str) -> None:
    module, _, attribute = value.partition(":")
    loaded = importlib.import_module(module)
    if attribute:
        assert callable(getattr(loaded, attribute))
    else:
        opener = {"sources": "open_source", "pipelines": "build", "sinks": "open_sink"}[group.split(".")[1]]
        assert callable(getattr(loaded, opener))
        assert loaded.Config


def test_client_wheel_needs_what_the_base_needs() -> None:
    client = read("deploy/client-wheel/pyproject.toml")["project"]
    assert client["dependencies"] == PROJECT["dependencies"]
    assert client["requires-python"] == PROJECT["requires-python"]
    everything = PROJECT["entry-points"]["grainwatch.commands"]
    for name, value in client["entry-points"]["grainwatch.commands"].items():
        assert value.startswith("grainwatch."), "the client wheel holds grainwatch/ alone"
        assert everything[name] == value


def test_every_direct_dependency_is_pinned_within_its_range() -> None:
    pinned = pins()
    for group, wanted in requirements().items():
        for requirement in wanted:
            if requirement.name == "torch":
                continue  # see test_torch_is_for_training_alone
            version = pinned.get(canonicalize_name(requirement.name))
            assert version, f"{requirement.name} of [{group}] has no line in constraints.txt"
            assert requirement.specifier.contains(version), f"{requirement} excludes the pinned {version}"


def test_no_pin_is_left_over() -> None:
    if sys.version_info[:2] != (3, 11):
        pytest.skip("the pins were made with Python 3.11; others need slightly other packages")
    todo = [requirement for group in requirements().values() for requirement in group]
    todo += [Requirement(line) for line in read("pyproject.toml")["build-system"]["requires"]]
    needed: set[str] = set()
    seen: set[str] = set()
    while todo:
        requirement = todo.pop()
        if str(requirement) in seen:
            continue
        seen.add(str(requirement))
        needed.add(canonicalize_name(requirement.name))
        try:
            its_own = distribution(requirement.name).requires or []
        except PackageNotFoundError:
            continue
        for line in its_own:
            child = Requirement(line)
            extras = requirement.extras or {""}
            if child.marker is None or any(child.marker.evaluate({"extra": extra}) for extra in extras):
                todo.append(child)
    assert sorted(set(pins()) - needed) == [], "pinned in constraints.txt and needed by nothing"


def test_torch_is_for_training_alone() -> None:
    wanted = requirements()
    names = {canonicalize_name(r.name) for group in ("base", "daemon", "dev") for r in wanted[group]}
    assert "torch" not in names | set(pins())
    # Its pin is a comment: `pip install -c` must not meet it where torch is not wanted.
    (comment,) = re.findall(
        r"^# torch==([0-9.]+),", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE
    )
    (torch,) = (r for r in wanted["training"] if r.name == "torch")
    assert torch.specifier.contains(comment)

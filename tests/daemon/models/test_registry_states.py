"""In whatever order: one version is active, one in the shadow, and a rollback leads to the one before."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from daemon.models.registry import STATES, Registry, RegistryError
from pipelines.engines.bundle import SCHEMA, Description, write_bundle

NAMES = ("a", "b")
VERSIONS = ("1", "2", "3")
ALLOWED = {
    "candidate": {"shadow", "active", "retired"},
    "shadow": {"shadow", "candidate", "active", "retired"},
    "active": {"retired"},
    "retired": {"candidate", "shadow", "active"},
}


def small_bundle(folder: Path, name: str, version: str) -> Path:
    description = Description(
        schema=SCHEMA,
        kind="laue-classes",
        name=name,
        version=version,
        about="",
        inputs={},
        outputs={},
        preparation={},
        domain={},
        decision={},
        training={},
        metrics={},
        tolerances={},
        git_revision="",
        command="",
    )
    write_bundle(folder, description, {"model.onnx": f"{name} {version}".encode()})
    return folder


class Registries(RuleBasedStateMachine):
    """The registry beside a model of it: a dictionary of states and a stack of what was active."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.bundles = {(n, v): small_bundle(self.folder / f"{n}-{v}", n, v) for n in NAMES for v in VERSIONS}
        self.registry = Registry(self.folder / "state")
        self.states: dict[tuple[str, str], str] = {}
        self.stacks: dict[str, list[str | None]] = {name: [] for name in NAMES}
        self.events = 0

    def teardown(self) -> None:
        self.registry.close()
        shutil.rmtree(self.folder)

    @rule(name=st.sampled_from(NAMES), version=st.sampled_from(VERSIONS))
    def add(self, name: str, version: str) -> None:
        model = self.registry.add(self.bundles[name, version], "who")
        if (name, version) not in self.states:
            self.states[name, version] = "candidate"
            self.events += 1
        assert model.state == self.states[name, version]

    @precondition(lambda self: self.states)
    @rule(data=st.data(), to=st.sampled_from(STATES))
    def change(self, data: st.DataObject, to: str) -> None:
        name, version = data.draw(st.sampled_from(sorted(self.states)))
        model = self.registry.find(name, version)
        now = self.states[name, version]
        assert model.state == now
        if to not in ALLOWED[now]:
            with pytest.raises(RegistryError):
                self.registry.set_state(model, to, "who", share=0.5)
            return
        changed = self.registry.set_state(model, to, "who", "why", share=0.5)
        assert (changed.state, changed.share) == (to, 0.5 if to == "shadow" else 0.0)
        if to == "shadow":
            for key, state in self.states.items():
                if key[0] == name and state == "shadow" and key != (name, version):
                    self.states[key] = "candidate"
                    self.events += 1
        if to == "active":
            self.retire_active(name)
            self.stacks[name].append(version)
        elif now == "active":
            self.stacks[name].append(None)
        self.states[name, version] = to
        self.events += 1

    @rule(name=st.sampled_from(NAMES))
    def roll_back(self, name: str) -> None:
        if not self.stacks[name]:
            with pytest.raises(RegistryError, match="nothing to roll back"):
                self.registry.rollback(name, "who")
            return
        before = self.registry.previous(name)
        back = self.registry.rollback(name, "who")
        assert (back and back.version) == (before and before.version)
        self.stacks[name].pop()
        self.retire_active(name)
        if back is not None:
            self.states[name, back.version] = "active"
            self.events += 1

    @rule()
    def begin_anew(self) -> None:
        self.registry.close()

    def retire_active(self, name: str) -> None:
        for key, state in self.states.items():
            if key[0] == name and state == "active":
                self.states[key] = "retired"
                self.events += 1

    @invariant()
    def as_the_dictionary_says(self) -> None:
        found = {(m.name, m.version): m.state for m in self.registry.models()}
        assert found == self.states
        assert len(self.registry.history()) == self.events

    @invariant()
    def one_active_a_name_and_the_one_before_it(self) -> None:
        for name in NAMES:
            assert [m.state for m in self.registry.models(name)].count("shadow") <= 1
            actives = [m.version for m in self.registry.models(name) if m.state == "active"]
            assert len(actives) <= 1
            stack = [None, None, *self.stacks[name]]
            assert actives == [v for v in stack[-1:] if v is not None]
            previous = self.registry.previous(name)
            assert (previous and previous.version) == stack[-2]


Registries.TestCase.settings = settings(max_examples=25, stateful_step_count=25, deadline=None)
TestRegistries = Registries.TestCase

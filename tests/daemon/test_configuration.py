"""Which keys may change while a daemon runs."""

from __future__ import annotations

import pytest

from daemon.configuration import changed_keys
from grainwatch.config import Config, ConfigError, parse_config

BASE = """
[daemon]
name = "test"
workers = 2
[streams.s]
source = {type = "dectris-v2", address = "tcp://127.0.0.1:31001"}
pipeline = {type = "laue", materials = ["Cu"], geometry = "a.det"}
[sinks.zmq]
results = "tcp://127.0.0.1:31100"
"""


def parsed(text: str) -> Config:
    return parse_config(text.encode(), "lab.toml")[0]


def change(old: str, new: str) -> list[str]:
    assert old in BASE
    return changed_keys(parsed(BASE), parsed(BASE.replace(old, new)), "lab.toml")


@pytest.mark.parametrize(
    ("old", "new", "keys"),
    [
        ("[daemon]", "# a comment\n[daemon]", []),
        # What is a default anyway is no change, also in the tables of plug-ins.
        ('31001"}', '31001", role = "primary"}', []),
        ("workers = 2", "workers = 2\nstop_timeout_s = 10", []),
        ('["Cu"]', '["Cu", "Ge"]', ["streams.s.pipeline.materials"]),
        ("a.det", "b.det", ["streams.s.pipeline.geometry"]),
        ("workers = 2", "workers = 0\ncompute_timeout_s = 5", ["daemon.compute_timeout_s", "daemon.workers"]),
        ("[daemon]", "[ring]\nslots = 4\n[daemon]", ["ring.slots"]),
        ("[streams.s]", "[streams.s]\nscan = {shape = [4]}", ["streams.s.scan"]),
        ("[streams.s]", '[streams.s]\nintake = {policy = "drop-newest"}', ["streams.s.intake.policy"]),
    ],
)
def test_what_may_change_is_named(old: str, new: str, keys: list[str]) -> None:
    assert change(old, new) == keys


@pytest.mark.parametrize(
    ("old", "new", "keys"),
    [
        ('name = "test"', 'name = "other"', "daemon.name"),
        ("workers = 2", 'state_dir = "s"\nruntime_dir = "r"', "daemon.runtime_dir, daemon.state_dir"),
        ("workers = 2", "ledger_days = 1", "daemon.ledger_days"),
        ("31001", "31002", "streams.s.source.address"),
        ("31100", "31102", "sinks.zmq.results"),
        ("[sinks.zmq]", '[sinks.hdf5]\nfolder = "r"\n[sinks.zmq]', "sinks.hdf5"),
        (
            'pipeline = {type = "laue", materials = ["Cu"], geometry = "a.det"}',
            'pipeline = {type = "testkit.slow_pipeline"}',
            "streams.s.pipeline.type",
        ),
        ("[streams.s]", "[streams.t]", "streams.s, streams.t"),
    ],
)
def test_what_may_not_is_refused_by_name(old: str, new: str, keys: str) -> None:
    with pytest.raises(ConfigError) as refused:
        change(old, new)
    assert str(refused.value).startswith(f"lab.toml: {keys}: cannot change while the daemon runs")


def test_a_table_that_its_plug_in_refuses_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"lab.toml: streams.s.pipeline: unknown key `maetrials`"):
        change("materials", "maetrials")

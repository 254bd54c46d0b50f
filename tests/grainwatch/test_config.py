"""A configuration that is wrong says so in the words of the person who writes it."""

from __future__ import annotations

from typing import Any

import pytest

from grainwatch.config import ConfigError, EdgeTable, ScanTable, StreamTable, convert, did_you_mean


@pytest.mark.parametrize(
    ("table", "kind", "message"),
    [
        ({"shape": "10"}, ScanTable, 'F: s.shape: expected a list [...], got a text in quotes "..."'),
        ({"shape": [1], "snake": 1}, ScanTable, "F: s.snake: expected true or false, got a whole number"),
        ({"depth": 1.5}, EdgeTable, "F: s.depth: expected a whole number, got one with a decimal point"),
        ({}, ScanTable, "F: s: the key `shape` is missing"),
        (
            {"shape": [1], "snack": True},
            ScanTable,
            "F: s: unknown key `snack`: did you mean snake? Known keys: shape, step_um, snake, origin_um",
        ),
        (
            {"source": {}, "pipeline": {}, "scan": {"shape": [1], "steps": 2}},
            StreamTable,
            "F: s.scan: unknown key `steps`: did you mean step_um?"
            " Known keys: shape, step_um, snake, origin_um",
        ),
        ({"xyz": 1}, ScanTable, "F: s: unknown key `xyz`; known keys: shape, step_um, snake, origin_um"),
        (
            {"source": {}, "pipeline": {}, "scan": 4},
            StreamTable,
            "F: s.scan: expected a table, got a whole number",
        ),
    ],
)
def test_plain_words(table: dict[str, Any], kind: type[Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        convert(table, kind, "F: s")
    assert str(error.value) == message


def test_only_what_is_alike_is_suggested() -> None:
    assert did_you_mean("cu", ["Al", "Cu"]) == ": did you mean Cu?"
    assert did_you_mean("Unobtainium", ["Al", "Cu", "Ti"]) == ""

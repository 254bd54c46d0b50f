"""The reference of the configuration, written from the structs that check it.

``python -m daemon.config_reference`` prints docs/reference/config.md; a test fails when the file
in the documentation differs, or when a key has no description.
"""

from __future__ import annotations

import inspect
import json
import re
import types
from importlib.metadata import entry_points
from typing import Any, Final, Literal, Union, get_args, get_origin, get_type_hints

import msgspec

from grainwatch.config import (
    Config,
    DaemonTable,
    EdgeTable,
    EnginesTable,
    ModelsTable,
    RingTable,
    ScanTable,
    StreamTable,
    Table,
    load_plugin,
)

_INTRODUCTION: Final = """\
# Configuration

<!-- Written by python -m daemon.config_reference: change the structs, not this page. -->

A daemon reads one TOML file. `grainwatch init` writes one to start from, `grainwatch check-config` checks
it. An unknown key, a wrong type or a value that cannot be used is an error that names the key.

| table | what |
|---|---|
| `[daemon]` | who the daemon is and where it keeps things |
| `[ring]` | shared memory between the daemon and its workers |
| `[engines]` | what runs the networks of model bundles |
| `[models]` | how models are exchanged while the daemon runs |
| `[streams.NAME]` | one detector and what is done with its frames; as many as there are detectors |
| `[sinks.NAME]` | one output; NAME is its type, unless the table has a key `type` |

A `type` is a registered name, or the dotted name of a module on `PYTHONPATH` (see
[Write a plug-in](../how-to/write-a-plug-in.md)). `GRAINWATCH_CACHE_DIR` in the environment says where
compiled kernels are kept; without it, `~/.cache/grainwatch`. It has no key here.
"""

_WORDS: Final = {str: "string", int: "whole number", float: "number", bool: "true or false"}


def reference() -> str:
    """Return the page as Markdown."""
    parts = [
        _INTRODUCTION,
        _section("`[daemon]`", DaemonTable),
        _section("`[ring]`", RingTable),
        _section("`[engines]`", EnginesTable),
        _section("`[models]`", ModelsTable),
        _section("`[streams.NAME]`", StreamTable),
        _section("`[streams.NAME.intake]`, and `edge` of a sink", EdgeTable),
        _section("`[streams.NAME.scan]`", ScanTable),
    ]
    tables = {"sources": "streams.NAME.source", "pipelines": "streams.NAME.pipeline"}
    for group, table in tables.items():
        for name, struct in plugins(group).items():
            parts.append(_section(f'`[{table}]`, type = "{name}"', struct))
            parts += [_section(f"`[{table}.{key}]`", inner) for key, inner in _tables_in(struct).items()]
    parts += [_section(f"`[sinks.{name}]`", struct) for name, struct in plugins("sinks").items()]
    return "\n".join(parts)


def plugins(group: str) -> dict[str, type[Table]]:
    """Return the tables of the registered plug-ins of a group, by name."""
    names = sorted({e.name for e in entry_points(group=f"grainwatch.{group}")})
    return {name: load_plugin(group, name, group).Config for name in names}


def structs() -> list[type[Table]]:
    """Return every struct that a table of the configuration is checked against."""
    own: list[type[Table]] = [
        Config,
        DaemonTable,
        RingTable,
        EnginesTable,
        ModelsTable,
        StreamTable,
        EdgeTable,
        ScanTable,
    ]
    of_plugins = [s for group in ("sources", "pipelines", "sinks") for s in plugins(group).values()]
    return own + of_plugins + [inner for s in of_plugins for inner in _tables_in(s).values()]


def _tables_in(struct: type[Table]) -> dict[str, type[Table]]:
    """Return the tables of its own that a plug-in's table holds, by key."""
    found = {}
    for key, hint in get_type_hints(struct).items():
        for kind in get_args(hint) or (hint,):
            if isinstance(kind, type) and issubclass(kind, Table) and kind is not EdgeTable:
                found[key] = kind
    return found


def meanings(struct: type[Table]) -> tuple[str, dict[str, str]]:
    """Return what a struct's docstring says: its summary, and each key of its Attributes section."""
    text = inspect.cleandoc(struct.__doc__ or "")
    head, _, attributes = text.partition("\n\nAttributes\n----------\n")
    found: dict[str, str] = {}
    names: list[str] = []
    for line in attributes.splitlines():
        if not line.strip():
            continue
        if line.startswith(" "):
            for name in names:
                found[name] = f"{found[name]} {line.strip()}".strip()
        else:
            names = [name.strip() for name in line.partition(" : ")[0].split(",")]
            found.update(dict.fromkeys(names, ""))
    return " ".join(head.split()), found


def _section(title: str, struct: type[Table]) -> str:
    summary, found = meanings(struct)
    hints = get_type_hints(struct)
    # What the heading says already is not said again.
    said = re.sub(r"^``\[[^`]*``(: | of type \"[^\"]*\"\.? ?|\. ?)", "", summary).replace("``", "`")
    lines = [f"## {title}", ""]
    if said:
        lines += [said[0].upper() + said[1:], ""]
    lines += ["| key | type | default | meaning |", "|---|---|---|---|"]
    for field in msgspec.structs.fields(struct):
        kind = _kind(hints[field.name])
        cells = (f"`{field.name}`", kind, _default(field), found.get(field.name, "").replace("``", "`"))
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join([*lines, ""])


def _kind(hint: Any) -> str:
    origin, given = get_origin(hint), get_args(hint)
    if hint in _WORDS:
        return _WORDS[hint]
    if origin is Literal:
        return " or ".join(f'`"{choice}"`' for choice in given)
    if origin in (Union, types.UnionType):
        return " or ".join(_kind(each) for each in given if each is not type(None))
    if origin is tuple and given[-1] is Ellipsis:
        return f"list of {_WORDS[given[0]]}s"
    if origin is tuple:
        return f"list of {len(given)} {_WORDS[given[0]]}s"
    return "table"


def _default(field: msgspec.structs.FieldInfo) -> str:
    if field.required:
        return "required"
    made = field.default_factory
    value = field.default if made is msgspec.NODEFAULT else made()
    if value is None:
        return "none"
    if isinstance(value, EdgeTable):
        pairs = ", ".join(f"{k} = {json.dumps(v)}" for k, v in msgspec.structs.asdict(value).items())
        return f"`{{ {pairs} }}`"
    if isinstance(value, Table):
        return "as below"
    return f"`{json.dumps(value)}`"


if __name__ == "__main__":
    print(reference(), end="")

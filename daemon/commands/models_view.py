"""How ``grainwatch models`` prints models: tables for people, plain where nobody looks."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from daemon.models.registry import Event, Model
from pipelines.engines.bundle import Description

#: What the tables need; a narrower terminal wraps their lines.
WIDTH = 120
_WIDTH_OF_PIPE = 10_000


def console() -> Console:
    """Return where to print, wide enough for a table; into a pipe a row is a line."""
    found = Console(soft_wrap=True)
    width = WIDTH if found.is_terminal else _WIDTH_OF_PIPE
    return found if found.width >= width else Console(soft_wrap=True, width=width)


def plain(text: object) -> str:
    """Return a text that others wrote, without what would drive a terminal."""
    return "".join(c if c.isprintable() else " " for c in str(text))


def when(seconds: float) -> str:
    """Return a time as the operator's clock shows it."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def models_table(models: Sequence[Model], streams: Mapping[str, Sequence[str]]) -> Table:
    """Return a table of models; `streams` says by name which streams use it."""
    table = Table(box=None, pad_edge=False)
    for column in ("model", "version", "state", "streams", "added", "by", "sha256", "note"):
        table.add_column(column, no_wrap=column != "note")
    for m in models:
        table.add_row(
            m.name,
            m.version,
            state_of(m),
            ", ".join(streams.get(m.name, ()) if m.state in ("active", "shadow") else ()) or "-",
            when(m.added),
            plain(m.added_by),
            m.sha256[:8],
            plain(m.note),
        )
    return table


def state_of(model: Model) -> str:
    """Return the state, with the share of a shadow."""
    return f"shadow, {model.share:.3g}" if model.state == "shadow" else model.state


def show_model(to: Console, model: Model, description: Description) -> None:
    """Print what a model is, what it was trained over, and how good it was found to be."""
    say(to, f"{model.name} {model.version}: {state_of(model)}")
    say(to, f"  {plain(description.about)}")
    say(to, f"  {model.kind}, sha256 {model.sha256}")
    say(to, f"  {model.folder}")
    note = f": {plain(model.note)}" if model.note else ""
    say(to, f"  added {when(model.added)} by {plain(model.added_by)}{note}")
    for heading, values in (("metrics", description.metrics), ("domain", description.domain)):
        say(to, f"{heading}:")
        to.print(_pairs(values))


def show_history(to: Console, events: Iterable[Event]) -> None:
    """Print who did what, when and why."""
    table = Table(box=None, pad_edge=False)
    for column in ("when", "version", "from", "to", "who", "why"):
        table.add_column(column, no_wrap=column != "why")
    for e in events:
        state = f"{e.to_state}, {e.share:.3g}" if e.share else e.to_state
        table.add_row(when(e.time), e.version, e.from_state or "-", state, plain(e.who), plain(e.why))
    say(to, "history:")
    to.print(table)


def show_summary(to: Console, summary: Mapping[str, Any]) -> None:
    """Print what a model in the shadow found beside the live one."""
    if not summary["n"]:
        say(to, "in the shadow: nothing was compared yet")
        return
    others = f"; {summary['others']} beside other models" if summary["others"] else ""
    say(
        to,
        f"in the shadow: {summary['n']} frames from {when(summary['first'])} to {when(summary['last'])}"
        f" beside {summary['live_sha256'][:8]}: {100 * summary['agree']:.1f} % agree,"
        f" {summary['errors']} failed{others}",
    )
    rows: dict[str, Any] = {f"median {name}": value for name, value in summary["figures"].items()}
    for name, of in (("live", summary["live_ms"]), ("shadow", summary["shadow_ms"])):
        if of is not None:
            rows[f"{name}, time"] = f"median {of['median']:.1f} ms, 95 % within {of['p95']:.1f} ms"
    to.print(_pairs(rows))


def say(to: Console, line: str) -> None:
    """Print a line as it is."""
    to.print(line, highlight=False, markup=False)


def _pairs(values: Mapping[str, Any]) -> Table:
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column()
    for name, value in _flat("", values):
        table.add_row(f"  {plain(name)}", plain(value))
    return table


def _flat(path: str, value: Any) -> Iterable[tuple[str, str]]:
    """Yield the leaves of a description as text; a range is one."""
    if isinstance(value, Mapping) and value and set(value) != {"low", "high"}:
        for key, inner in value.items():
            yield from _flat(f"{path}.{key}" if path else str(key), inner)
    elif isinstance(value, Mapping):
        yield path, f"{_text(value['low'])} to {_text(value['high'])}" if value else "none"
    else:
        yield path, _text(value)


def _text(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(_text(v) for v in value)
    return f"{value:.5g}" if isinstance(value, float) else str(value)

"""One way to print a benchmark row: what | asked | measured | peer | how to repeat."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / ".out" / "bench"
PEERS = ROOT / ".peers" / "results.json"
"""Written by `make bench-peers`; read by `Report.peer`."""


@dataclass(frozen=True)
class Row:
    """One figure beside what was asked and what a peer reaches.

    Attributes
    ----------
    met : bool or None
        None where nothing was asked: the row is information.
    conditions : str
        All that the figure depends on: seed, number of patterns, noise, band, tolerance.
    data : dict
        Plain values for the JSON file: every repetition, counts behind a percentage.
    """

    bench: str
    what: str
    asked: str
    measured: str
    met: bool | None
    peer: str
    conditions: str
    repeat: str
    data: dict[str, Any]


@dataclass
class Report:
    """Collects rows, prints each as it comes, writes Markdown and JSON at the end.

    Attributes
    ----------
    seed : int
        Start of all random numbers of the run; a bench uses ``report.rng("its own words")``.
    quick : bool
        Short form: fewer repetitions, same code. The conditions of a row must tell the real number.
    bench, command : str
        Which benchmark is running, and what repeats it; the runner sets both.
    """

    seed: int = 20261120
    quick: bool = False
    bench: str = ""
    command: str = "python -m bench"
    show: Callable[[str], None] = print
    rows: list[Row] = field(default_factory=list)
    errors: dict[str, str] = field(default_factory=dict)

    def rng(self, *words: str | int) -> np.random.Generator:
        """Return a generator that depends on the seed and the words alone, not on what ran before."""
        key = [int.from_bytes(str(word).encode(), "little") for word in words]
        return np.random.default_rng([self.seed, *key])

    def scale(self, full: int, quick: int) -> int:
        """Return the number of repetitions for this run."""
        return quick if self.quick else full

    def add(
        self,
        what: str,
        measured: float | str,
        unit: str = "",
        *,
        at_most: float | None = None,
        at_least: float | None = None,
        peer: str = "",
        conditions: str = "",
        data: Mapping[str, Any] | None = None,
    ) -> Row:
        """Add one row and print it.

        Parameters
        ----------
        what : str
            What was measured, as a reader would ask for it.
        measured : float or str
            A number (compared with the limits; NaN never meets one) or a text where nothing is asked.
        unit : str
            Printed behind the number and the limits.
        at_most, at_least : float, optional
            What was asked; both for a band.
        peer : str
            Figure of the peer: see `peer`.

        Raises
        ------
        ValueError
            If a limit is given for a text.
        """
        asked = " and ".join(
            f"{sign} {_number(limit)}{_space(unit)}"
            for sign, limit in ((">=", at_least), ("<=", at_most))
            if limit is not None
        )
        if isinstance(measured, str):
            if asked:
                raise ValueError(f"{what}: a limit ({asked}) needs a number, got the text {measured!r}")
            met, text = None, measured
        else:
            value = float(measured)
            over = at_most is not None and not value <= at_most
            under = at_least is not None and not value >= at_least
            met = not (over or under) if asked else None
            text = f"{_number(value)}{_space(unit)}"
        repeat = f"{self.command} --seed {self.seed}" + (" --quick" if self.quick else "")
        row = Row(self.bench, what, asked, text, met, peer, conditions, repeat, dict(data or {}))
        self.rows.append(row)
        mark = {True: "ok     ", False: "NOT MET", None: "       "}[met]
        asked_text = f"  asked {asked}" if asked else ""
        peer_text = f"  peer {peer}" if peer else ""
        self.show(
            f"{mark} {what}: {text}{asked_text}{peer_text}" + (f"  [{conditions}]" if conditions else "")
        )
        return row

    def peer(self, key: str, published: str = "") -> str:
        """Return a peer's figure: measured on this machine by `make bench-peers`, else the published one.

        Parameters
        ----------
        key : str
            Entry of ``figures`` in .peers/results.json, e.g. "lauetools.index.Cu.5.time".
        published : str
            Shown, marked as published, where the peer was not run here.
        """
        figure = _peer_figures().get(key)
        if figure is not None:
            return f"{figure['text']} (run here {figure['date']})"
        return f"{published} (published; `make bench-peers` runs it here)" if published else ""

    def markdown(self, header: Mapping[str, str]) -> str:
        """Return the rows as a Markdown table under the machine and the versions."""
        lines = [f"- {key}: {value}" for key, value in header.items()]
        columns = ("bench", "what", "asked", "measured", "met", "peer", "conditions", "how to repeat")
        lines += ["", "| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
        for row in self.rows:
            met = {True: "yes", False: "**no**", None: ""}[row.met]
            cells = (row.bench, row.what, row.asked, row.measured, met, row.peer, row.conditions)
            lines.append(
                "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + f" | `{row.repeat}` |"
            )
        lines += [f"\n{name} failed: {reason}" for name, reason in self.errors.items()]
        return "\n".join(lines) + "\n"

    def write(self, folder: Path, header: Mapping[str, str]) -> tuple[Path, Path]:
        """Write bench.md and bench.json into the folder; return their paths."""
        folder.mkdir(parents=True, exist_ok=True)
        table, values = folder / "bench.md", folder / "bench.json"
        table.write_text(self.markdown(header), encoding="utf-8")
        document = {
            "header": dict(header),
            "rows": [asdict(row) for row in self.rows],
            "errors": self.errors,
        }
        values.write_text(json.dumps(document, indent=1, default=_plain) + "\n", encoding="utf-8")
        return table, values


def repetitions_s(function: Callable[[], object], repeats: int = 20, warm_up: int = 2) -> list[float]:
    """Return the wall time of each call, s, after a few that are not counted.

    Report the median and put the list into ``data``: the best of many is not what a user sees.
    """
    for _ in range(warm_up):
        function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return times


def _peer_figures() -> dict[str, dict[str, Any]]:
    if not PEERS.is_file():
        return {}
    figures: dict[str, dict[str, Any]] = json.loads(PEERS.read_text(encoding="utf-8"))["figures"]
    return figures


def _number(value: float) -> str:
    """Three significant digits, whole numbers whole."""
    if not math.isfinite(value):
        return str(value)
    if value == int(value) and abs(value) < 1e6:
        return str(int(value))
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _space(unit: str) -> str:
    return f" {unit}" if unit else ""


def _plain(value: object) -> object:
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"a row's data must hold plain values and arrays, not {type(value).__name__}")

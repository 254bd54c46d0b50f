"""`python -m bench.peers`: measure LaueTools on this machine; the figures go to .peers/results.json."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from bench.peers import environment, lauetools
from bench.report import OUT, PEERS, Report
from bench.run import machine


def main(arguments: list[str] | None = None) -> int:
    """Build the environment, run the driver, print and write the figures."""
    options = _parser().parse_args(arguments)
    report = Report(seed=options.seed, quick=options.quick, command="python -m bench.peers", bench="peers")
    folder = options.folder.resolve()
    try:
        python = environment.ensure(folder / "venv")
    except RuntimeError as error:
        print(f"peers: {error}", file=sys.stderr)
        return 3
    header = machine() | {"seed": str(options.seed)}
    for key, value in header.items():
        print(f"{key}: {value}")
    (folder / "work").mkdir(exist_ok=True)
    job = lauetools.plan(report, folder / "work", options.patterns, options.limit)
    try:
        results = lauetools.run(python, job)
    except RuntimeError as error:
        print(f"peers: {error}", file=sys.stderr)
        return 1
    header["peer"] = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    figures = lauetools.evaluate(report, job, results)
    _write(PEERS if folder == PEERS.parent else folder / PEERS.name, header, figures)
    table, values = report.write(options.out, header)
    print(f"written: {folder / PEERS.name} {table} {values}")
    return 0


def _write(path: Path, header: dict[str, str], figures: dict[str, dict[str, Any]]) -> None:
    """Replace the file in one step: a benchmark may be reading it."""
    date = time.strftime("%Y-%m-%d", time.gmtime())
    document = {
        "header": header,
        "figures": {key: {**figure, "date": date} for key, figure in figures.items()},
    }
    fresh = path.with_suffix(".new")
    fresh.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    os.replace(fresh, path)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.peers", description=__doc__)
    parser.add_argument("--patterns", type=int, default=5, help="peak lists of each kind (5)")
    parser.add_argument("--limit", type=float, default=180.0, help="seconds for one peak list (180)")
    parser.add_argument("--quick", action="store_true", help="Cu with 1 and 5 crystals alone")
    parser.add_argument("--seed", type=int, default=Report.seed, help="start of all random numbers")
    parser.add_argument("--folder", type=Path, default=PEERS.parent, help="environment and scratch (.peers)")
    parser.add_argument("--out", type=Path, default=OUT.parent / "peers", help="folder of the table")
    return parser


if __name__ == "__main__":
    sys.exit(main())

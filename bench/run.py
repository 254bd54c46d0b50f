"""Run benchmarks by name; print and write their rows."""

from __future__ import annotations

import argparse
import importlib
import os
import platform
import subprocess
import sys
import time
import traceback
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from bench import BENCHES, Bench
from bench.report import OUT, ROOT, Report

VERSIONS_OF = ("grainwatch", "numpy", "scipy", "numba", "h5py", "pyzmq", "bitshuffle")


def main(arguments: list[str] | None = None) -> int:
    """Run the named benchmarks; return 1 if one failed or, with --strict, missed its figure."""
    options = _parser().parse_args(arguments)
    if options.list:
        for bench in BENCHES:
            print(f"{bench.name:12s} {bench.about}")
        return 0
    known = {bench.name: bench for bench in BENCHES}
    unknown = [name for name in options.names if name not in known]
    if unknown:
        print(f"no benchmark is called {', '.join(unknown)}; there are {', '.join(known)}", file=sys.stderr)
        return 2
    chosen = [known[name] for name in options.names] or list(BENCHES)
    report = Report(seed=options.seed, quick=options.quick)
    header = machine() | {"seed": str(options.seed), "form": "quick" if options.quick else "full"}
    for key, value in header.items():
        print(f"{key}: {value}")
    for bench in chosen:
        run(bench, report)
    missed = [row for row in report.rows if row.met is False]
    table, values = report.write(options.out, header)
    print(f"\n{len(report.rows)} rows, {len(missed)} not met, {len(report.errors)} benchmarks failed")
    print(f"written: {table} {values}")
    return 1 if report.errors or (options.strict and missed) else 0


def run(bench: Bench, report: Report) -> None:
    """Run one benchmark tied to its number of cores; a failure is kept in the report, the rest goes on."""
    print(f"\n== {bench.name}: {bench.about}")
    report.bench, report.command = bench.name, f"python -m bench {bench.name}"
    before = available_cores()
    tie_to(sorted(before)[: bench.cores])
    start = time.perf_counter()
    try:
        importlib.import_module(bench.module).rows(report)
    except Exception as error:  # noqa: BLE001 - one broken benchmark must not cost the others' rows
        traceback.print_exc()
        report.errors[bench.name] = f"{type(error).__name__}: {error}"
    finally:
        tie_to(sorted(before))
    print(f"   ({time.perf_counter() - start:.1f} s)")


def machine() -> dict[str, str]:
    """Return what the figures depend on: processor, cores, load, versions, date."""
    versions = []
    for name in VERSIONS_OF:
        try:
            versions.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            versions.append(f"{name} not installed")
    load = f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown"
    return {
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "machine": f"{_processor()}, {len(available_cores())} cores available, load {load} at the start",
        "system": f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
        "versions": ", ".join(versions),
        "revision": _revision(),
    }


def available_cores() -> set[int]:
    """Return the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def tie_to(cores: list[int]) -> None:
    """Tie this process, and what it starts, to the cores; where the system cannot, say so."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)
    else:
        print("   (this system cannot tie a process to its cores: times may use more than the row says)")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _revision() -> str:
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return "unknown (no git)"
    return answer.stdout.strip() or "unknown (not a git checkout)"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="name", help="which to run; all when none is named")
    parser.add_argument("--list", action="store_true", help="say which there are, run nothing")
    parser.add_argument("--quick", action="store_true", help="fewer repetitions, same code")
    parser.add_argument("--seed", type=int, default=Report.seed, help="start of all random numbers")
    parser.add_argument("--strict", action="store_true", help="a figure that is not met is a failure")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of bench.md and bench.json")
    return parser

"""Run LaueTools on peak lists and frames and time it. Runs in the peers' environment, not in ours.

    python drive_lauetools.py JOB.json RESULTS.json

JOB.json:
    {"index": [{"name", "files": [.cor], "material": [label, [a, b, c, alpha, beta, gamma], extinction],
                "grains", "nlutmax", "limit_s"}],
     "peaks": [{"name", "file", "camera", "settings": "as shipped" or "shifted arrays", "repeats"}],
     "folder": scratch, "core": number of the core to be tied to, or null}

RESULTS.json:
    {"versions", "index": [{"name", "file", "time_s", "ubs", "spots", "matching_rate", "fits", "error"}],
     "peaks": [{"name", "settings", "times_s", "xy", "error"}]}
`ubs` multiply LaueTools' B0.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import platform
import signal
import sys
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import FrameType
from typing import Any

os.environ["MPLBACKEND"] = "Agg"

with contextlib.redirect_stdout(io.StringIO()):
    # Not installed in the project's own environment, where this file is only checked.
    from LaueTools import (  # type: ignore[import-not-found]
        indexing_batch,
        peaksearch_batch,
        readmccd,
    )

SHIFTED_ARRAYS = {
    "local_maxima_search_method": 1,
    "IntensityThreshold": 300,
    "PixelNearRadius": 10,
    "boxsize": 10,
    "fit_peaks_gaussian": 1,
    "position_definition": 1,
    "write_execution_time": 0,
}
"""Local maxima of the raw frame 300 above their surroundings, each fitted with a 2-D Gaussian."""


class OutOfTimeError(BaseException):
    """Not an Exception: LaueTools catches those."""


def main(job_file: str, results_file: str) -> None:
    job = json.loads(Path(job_file).read_text())
    if job["core"] is not None:
        os.sched_setaffinity(0, [job["core"]])
    results: dict[str, Any] = {"versions": versions(), "index": [], "peaks": []}
    for task in job["index"]:
        indexer = prepare(task, Path(job["folder"]))
        for file in task["files"]:
            results["index"].append(index(indexer, file, task))
            say(results["index"][-1], "time_s")
            Path(results_file).write_text(json.dumps(results))
    for task in job["peaks"]:
        results["peaks"].append(search(task))
        say(results["peaks"][-1], "times_s")
        Path(results_file).write_text(json.dumps(results))


def versions() -> dict[str, str]:
    names = ("lauetools", "numpy", "scipy", "numba", "fabio")
    found = {"python": platform.python_version()}
    for name in names:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def say(result: dict[str, Any], key: str) -> None:
    print(
        f"  {result['name']} {Path(result.get('file', '')).name} {result[key]} {result['error']}", flush=True
    )


def prepare(task: dict[str, Any], folder: Path) -> Any:
    """Settings of the program's own batch file; the table of angles is built once, outside the clock."""
    label, cell, extinction = task["material"]
    fits = folder / "fit" / task["name"].replace(" ", "_")
    fits.mkdir(parents=True, exist_ok=True)
    configuration = folder / f"{fits.name}.yaml"
    configuration.write_text("{}\n")
    overrides = {
        "scan": {"cor_folder": str(Path(task["files"][0]).parent), "mapdims": [1, len(task["files"])]},
        "output": {"fit_folder": str(fits)},
        "material": {"key_material": label, "mymaterials": {label: [label, cell, extinction]}},
        "indexing": {
            "nbGrainstoFind": task["grains"],
            "dict_indexrefine": {"nlutmax": task["nlutmax"]},
        },
    }
    with silence():
        return indexing_batch.params_from_config(indexing_batch.load_config(configuration, overrides))


def index(parameters: Any, file: str, task: dict[str, Any]) -> dict[str, Any]:
    result: dict[str, Any] = {"name": task["name"], "file": file, "error": ""}
    result |= {"ubs": [], "spots": [], "matching_rate": [], "fits": []}
    fits = Path(parameters.fit_folder)
    for left_over in fits.glob(f"{Path(file).stem}_g*.fit"):
        left_over.unlink()
    start = time.perf_counter()
    try:
        with silence(), time_limit(task["limit_s"]):
            answer = indexing_batch.index_refine(file, parameters)
        result["time_s"] = time.perf_counter() - start
        rates = dict(answer[2])
        for grain, matrix in answer[1]:
            if matrix is not None:
                result["ubs"].append([[float(v) for v in row] for row in matrix])
                result["spots"].append(float(rates[grain][0]))
                result["matching_rate"].append(float(rates[grain][1]))
    except OutOfTimeError:
        result["time_s"] = time.perf_counter() - start
        result["error"] = f"stopped after {task['limit_s']} s"
    except Exception as error:  # noqa: BLE001 - whatever it raises is the result for this peak list
        result["time_s"] = time.perf_counter() - start
        result["error"] = f"{type(error).__name__}: {error}"
    for fit in sorted(fits.glob(f"{Path(file).stem}_g*.fit")):
        result["fits"].append(read_fit(fit))
    return result


def read_fit(path: Path) -> dict[str, Any]:
    """Mean deviation in px and deviatoric strain in the crystal frame, 1e-3, as the file prints them."""
    lines = [line.lstrip("#").strip() for line in path.read_text().splitlines()]
    deviation = next(line for line in lines if line.startswith("Mean Deviation"))
    first = 1 + next(i for i, line in enumerate(lines) if line.startswith("deviatoric strain in direct"))
    strain = [[float(v) for v in line.strip("[]").split()] for line in lines[first : first + 3]]
    return {"file": str(path), "deviation_px": float(deviation.split(":")[1]), "strain_1e3": strain}


def search(task: dict[str, Any]) -> dict[str, Any]:
    """Peak lists and times of one frame, reading the file included; positions count from 1."""
    result: dict[str, Any] = {"name": task["name"], "file": task["file"], "settings": task["settings"]}
    result |= {"times_s": [], "xy": [], "error": ""}
    try:
        arguments = peak_search_arguments(task)
        for _ in range(task["repeats"] + 1):
            start = time.perf_counter()
            with silence():
                answer = readmccd.PeakSearch(task["file"], **arguments)
            result["times_s"].append(time.perf_counter() - start)
        result["times_s"] = result["times_s"][1:]  # the first call loads modules and fills the file cache
        found = [] if answer is None or answer[0] is None else answer[0]
        result["xy"] = [[float(row[0]), float(row[1])] for row in found]
    except Exception as error:  # noqa: BLE001 - likewise for this frame
        result["error"] = f"{type(error).__name__}: {error}"
    return result


def peak_search_arguments(task: dict[str, Any]) -> dict[str, Any]:
    if task["settings"] == "shifted arrays":
        return SHIFTED_ARRAYS | {"CCDLabel": task["camera"]}
    # "as shipped": the defaults of the program's own batch file, background taken from the frame itself.
    folder = Path(task["file"]).parent
    configuration = folder / "peaks.yaml"
    configuration.write_text("{}\n")
    overrides = {
        "scan": {"image_folder": str(folder), "CCDLabel": task["camera"], "mapdims": [1, 1]},
        "output": {"dat_folder": str(folder)},
    }
    with silence():
        loaded = peaksearch_batch.load_config(configuration, overrides)
        arguments: dict[str, Any] = peaksearch_batch.params_from_config(loaded).peaksearch_kwargs()
    return arguments


@contextlib.contextmanager
def silence() -> Iterator[None]:
    with (
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        yield


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    def stop(number: int, frame: FrameType | None) -> None:
        raise OutOfTimeError

    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])

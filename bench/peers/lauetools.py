"""What LaueTools is asked to do, and what its answers are worth.

It is told the number of crystals, as its users do; this project is not. All times are of one
core, with the files of the results written, as LaueTools always does.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bench import data
from bench.bounds import mean_at_most_95
from bench.patterns import Condition, pattern, write_peaks
from bench.report import Report
from offline_training.laue.scoring import score
from pipelines.laue.crystal import load_material
from pipelines.laue.forward import Pattern
from pipelines.laue.lauetools_files import read_det

HERE = Path(__file__).resolve().parent
EXTINCTION = {
    "Cu": "fcc",
    "Ge": "dia",
    "Si": "dia",
    "ZrO2": "VO2_mono",
    "Al2O3": "Al2O3",
    "Ti": "wurtzite",
}
"""LaueTools' names of extinction rules. None is for the hexagonal close packing; wurtzite's is the same."""
LARGE_CELLS = {"ZrO2", "Al2O3"}
"""Their tables of angles are built up to Miller index 3 instead of 4, or a pattern takes minutes."""
FRAMES = (
    ("Ge_blanc_0000.mccd.gz", "MARCCD165"),
    ("nw1_0001.tif.gz", "sCMOS"),
    ("img_Ge_sCMOS_0000.tif.gz", "sCMOS"),
)


@dataclass(frozen=True)
class IndexTask:
    """Patterns of one condition, indexed as one material.

    Attributes
    ----------
    grains : int
        How many crystals LaueTools is told to look for.
    """

    name: str
    condition: Condition
    material: str
    grains: int
    patterns: tuple[Pattern, ...]


@dataclass
class Job:
    """All that is handed to the driver."""

    folder: Path
    limit_s: float
    tasks: list[IndexTask] = field(default_factory=list)
    frames: list[dict[str, Any]] = field(default_factory=list)

    def document(self) -> dict[str, Any]:
        """Write the peak lists; return the driver's job."""
        return {
            "folder": str(self.folder),
            "core": min(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
            "index": [self._task(task) for task in self.tasks] + list(self._reference()),
            "peaks": self.frames,
        }

    def _task(self, task: IndexTask) -> dict[str, Any]:
        files = []
        for number, peaks in enumerate(task.patterns):
            files.append(self.folder / "cor" / task.name.replace(" ", "_") / f"pattern_{number:04d}.cor")
            write_peaks(files[-1], peaks)
        return {
            "name": task.name,
            "files": [str(file) for file in files],
            "material": _material(task.material),
            "grains": task.grains,
            "nlutmax": 3 if task.material in LARGE_CELLS else 4,
            "limit_s": self.limit_s,
        }

    def _reference(self) -> Iterator[dict[str, Any]]:
        """The published peak list of the Ge frame: LaueTools must find what LaueTools published."""
        laue = data.laue_dir()
        if laue is not None:
            yield {
                "name": "Ge_blanc",
                "files": [str(laue / "truth" / "Ge_blanc_0000_LT_5.cor")],
                "material": _material("Ge"),
                "grains": 1,
                "nlutmax": 4,
                "limit_s": self.limit_s,
            }


def plan(report: Report, folder: Path, patterns: int, limit_s: float) -> Job:
    """Return what LaueTools is asked, smaller for ``report.quick``."""
    job = Job(folder, limit_s)
    for grains in (1, 5) if report.quick else (1, 2, 5, 10):
        job.tasks.append(_crystals(report, "Cu", grains, patterns))
    if not report.quick:
        for material in ("Ti", "Al2O3", "ZrO2"):
            job.tasks.append(_crystals(report, material, 1, min(patterns, 2)))
        for peaks in (60, 140):
            condition = Condition("Cu", 0, peaks=peaks)
            job.tasks.append(_wrong(report, f"null {peaks}", condition, patterns))
        job.tasks.append(_wrong(report, "null ZrO2", Condition("ZrO2", 1), min(patterns, 2)))
    laue = data.laue_dir()
    for name, camera in FRAMES if laue is not None else ():
        assert laue is not None
        file = str(data.uncompressed(laue / name, folder / "frames"))
        for settings in ("as shipped", "shifted arrays"):
            job.frames.append(
                {
                    "name": name.split(".")[0],
                    "file": file,
                    "camera": camera,
                    "settings": settings,
                    "repeats": report.scale(5, 1),
                }
            )
    return job


def run(python: Path, job: Job) -> dict[str, Any]:
    """Run the driver in the peers' environment; return its results.

    Raises
    ------
    RuntimeError
        If it fails as a whole.
    """
    asked, answered = job.folder / "job.json", job.folder / "answers.json"
    asked.write_text(json.dumps(job.document()), encoding="utf-8")
    one_thread = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "MKL", "NUMBA")}
    command = [str(python), str(HERE / "drive_lauetools.py"), str(asked), str(answered)]
    status = subprocess.run(command, env={**os.environ, **one_thread}, check=False).returncode
    if status:
        raise RuntimeError(f"`{' '.join(command)}` ended with status {status}")
    results: dict[str, Any] = json.loads(answered.read_text(encoding="utf-8"))
    return results


def evaluate(report: Report, job: Job, results: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Print a row for each task; return the figures by key, for `bench.report.Report.peer`."""
    figures: dict[str, dict[str, Any]] = {}
    for task in job.tasks:
        answers = [answer for answer in results["index"] if answer["name"] == task.name]
        if task.name.startswith("null"):
            figures |= _null_figures(report, task, answers)
        else:
            figures |= _crystal_figures(report, task, answers)
    for answer in results["index"]:
        if answer["name"] == "Ge_blanc":
            figures |= _reference_figures(report, answer)
    return figures | _peak_figures(report, results["peaks"])


def _crystal_figures(
    report: Report, task: IndexTask, answers: list[dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    material = load_material(task.material)
    scores = [
        score(_ubs(answer, task.material), peaks.ubs, material)
        for answer, peaks in zip(answers, task.patterns, strict=True)
    ]
    times = [answer["time_s"] for answer in answers]
    found, truths = sum(s.found for s in scores), sum(s.truths for s in scores)
    angles = [angle for s in scores for angle in s.misorientation_deg]
    stopped = [answer["error"] for answer in answers if answer["error"]]
    conditions = f"{task.condition}; told {task.grains}; {len(times)} patterns, seed {report.seed}"
    conditions += f"; {len(stopped)} ended early: {stopped[0]}" if stopped else ""
    median = statistics.median(times)
    spread = f"{median:.2f} s ({min(times):.2f}-{max(times):.2f})"
    report.add(f"LaueTools, {task.name}: time", spread, conditions=conditions, data={"times_s": times})
    report.add(
        f"LaueTools, {task.name}: crystals found",
        f"{found} of {truths}, {sum(s.false for s in scores)} false",
        conditions=conditions,
        data={"spots": [answer["spots"] for answer in answers]},
    )
    key = f"lauetools.index.{task.name.replace(' ', '.')}"
    figures = {
        f"{key}.time": {"text": f"LaueTools {spread}", "value": median, "unit": "s"},
        f"{key}.found": {"text": f"LaueTools {found} of {truths}, told the number"},
    }
    if angles:
        middle = statistics.median(angles)
        report.add(
            f"LaueTools, {task.name}: median misorientation",
            f"{middle:.4f} deg",
            conditions=conditions,
            data={"misorientation_deg": angles},
        )
        text = f"LaueTools {middle:.4f} deg"
        figures[f"{key}.misorientation"] = {"text": text, "value": middle, "unit": "deg"}
    return figures


def _null_figures(
    report: Report, task: IndexTask, answers: list[dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    false = sum(len(answer["ubs"]) for answer in answers)
    bound = mean_at_most_95(false, len(answers))
    times = [answer["time_s"] for answer in answers]
    text = f"{false} in {len(answers)} patterns (95 %: at most {bound:.2g} per pattern)"
    report.add(
        f"LaueTools, {task.name}: false crystals",
        text,
        conditions=f"{task.condition} indexed as {task.material}; told {task.grains}; seed {report.seed}",
        data={"times_s": times, "spots": [answer["spots"] for answer in answers]},
    )
    return {f"lauetools.{task.name.replace(' ', '.')}.false": {"text": f"LaueTools {text}", "value": false}}


def _reference_figures(report: Report, answer: dict[str, Any]) -> dict[str, dict[str, Any]]:
    laue = data.laue_dir()
    published = None if laue is None else read_det(laue / "truth" / "calibGe111.det").orientation_matrix
    if published is None or not answer["fits"]:
        report.add("LaueTools, Ge_blanc: to the published orientation", f"no result: {answer['error']}")
        return {}
    material = load_material("Ge")
    angle = score(_ubs(answer, "Ge"), [published @ material.B0], material).misorientation_deg
    text = f"{angle[0]:.4f} deg" if angle else "another orientation than the published one"
    fit = answer["fits"][0]
    conditions = f"{answer['spots'][0]:.0f} spots, mean deviation {fit['deviation_px']} px"
    report.add("LaueTools, Ge_blanc: to the published orientation", text, conditions=conditions)
    report.add(
        "LaueTools, Ge_blanc: deviatoric strain, crystal frame, 1e-3",
        json.dumps(fit["strain_1e3"]),
        conditions=conditions,
        data=answer,
    )
    return {"lauetools.Ge_blanc.misorientation": {"text": f"LaueTools {text}"}}


def _peak_figures(report: Report, answers: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    medians = []
    for answer in answers:
        what = f"LaueTools, peak search and fit, {answer['name']}"
        if answer["error"]:
            report.add(what, f"failed: {answer['error']}", conditions=answer["settings"])
            continue
        medians.append(statistics.median(answer["times_s"]))
        report.add(
            what,
            f"{1e3 * medians[-1]:.0f} ms",
            conditions=f"{answer['settings']}, {len(answer['xy'])} peaks, reading the file included,"
            f" median of {len(answer['times_s'])}",
            data={"times_s": answer["times_s"]},
        )
    if not medians:
        return {}
    low, high = 1e3 * min(medians), 1e3 * max(medians)
    text = f"LaueTools {low:.0f}-{high:.0f} ms"
    return {"lauetools.peaks.time": {"text": text, "value": [low, high], "unit": "ms"}}


def _crystals(report: Report, material: str, grains: int, patterns: int) -> IndexTask:
    condition = Condition(material, grains)
    made = tuple(pattern(report, condition, number) for number in range(patterns))
    return IndexTask(f"{material} {grains}", condition, material, grains, made)


def _wrong(report: Report, name: str, condition: Condition, patterns: int) -> IndexTask:
    made = tuple(pattern(report, condition, number) for number in range(patterns))
    return IndexTask(name, condition, "Cu", 1, made)


def _material(name: str) -> list[Any]:
    return [name, list(load_material(name).cell_A_deg), EXTINCTION[name]]


def _ubs(answer: dict[str, Any], material: str) -> npt.NDArray[np.float64]:
    """UB in 1/angstrom of LaueTools' answer, (n, 3, 3): its matrices multiply the same B0."""
    matrices = np.asarray(answer["ubs"], dtype=np.float64).reshape(-1, 3, 3)
    return np.asarray(matrices @ load_material(material).B0)

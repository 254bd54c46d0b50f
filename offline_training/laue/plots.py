"""Pictures of what the commands of training found out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

_BLUE, _RED, _GREEN, _GREY = "#4e79a7", "#e4572e", "#59a14f", "#999999"
_DPI = 120


def plot_curve(result: dict[str, Any], title: str, path: Path) -> None:
    """Draw accuracy against the number of orientations; see `curve.run_curve`."""
    rows = result["curve"]
    n = [row["orientations"] for row in rows]
    figure = Figure(figsize=(7.4, 5.0), layout="constrained")
    axes = figure.add_subplot()
    for name, label, colour, form in (
        ("training_accuracy", "training, 1 to 5 crystals", _GREY, "s--"),
        ("validation_accuracy", "validation, 1 to 5 crystals", _BLUE, "o-"),
        ("five_crystals_accuracy", "five crystals", _GREEN, "^-"),
        ("five_crystals_recall", "five crystals, recall at 0.5", _GREEN, "v:"),
    ):
        spread = [row[f"{name}_spread"] or 0.0 for row in rows]
        axes.errorbar(
            n, [row[name] for row in rows], yerr=spread, fmt=form, color=colour, label=label, capsize=3, ms=5
        )
    axes.axhline(0.9, color=_RED, lw=0.8, ls="-.", label="90 %")
    baseline = result["baseline"]["most_frequent_class"]
    axes.axhline(
        baseline, color="black", lw=0.8, ls=":", label=f"most frequent class: {100 * baseline:.1f} %"
    )
    axes.set(xscale="log", ylim=(0.0, 1.02), xlabel="orientations in training", ylabel="share of spots right")
    axes.set_xticks(n, [str(value) for value in n])
    axes.minorticks_off()
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.25)
    figure.legend(loc="outside lower center", fontsize=8, ncols=3)
    _save(figure, path)


def plot_search(result: dict[str, Any], title: str, path: Path) -> None:
    """Draw all trials of a search; see `search.run_search`."""
    trials: list[dict[str, Any]] = result["trials"]
    names = sorted({name for trial in trials for name in trial["values"]})
    columns = min(max(len(names), 1), 4)
    rows = -(-max(len(names), 1) // columns)
    figure = Figure(figsize=(3.0 * columns + 1.0, 3.4 + 2.6 * rows), layout="constrained")
    grid = figure.add_gridspec(rows + 1, columns, height_ratios=[1.35] + [1.0] * rows)
    course = figure.add_subplot(grid[0, :])
    best = result["best"]["trial"]
    for trial in trials:
        spots = [rung["steps"] * rung["batch"] for rung in trial["rungs"]]
        loss = [rung["log_loss"] for rung in trial["rungs"]]
        own = {best: (_RED, 2.0, 3, "best"), 0: ("black", 1.6, 2, "the recipe as it is")}
        colour, width, above, label = own.get(trial["trial"], (_BLUE, 0.7, 1, ""))
        if best == 0 and trial["trial"] == 0:
            label = "the recipe as it is, and best"
        course.plot(
            spots,
            loss,
            "o-",
            color=colour,
            lw=width,
            ms=3 + width,
            zorder=above,
            label=label or None,
            alpha=0.85,
        )
    course.set(xscale="log", yscale="log", xlabel="spots learned", ylabel="log loss, held-out spots")
    learned = sorted({rung["steps"] * rung["batch"] for trial in trials for rung in trial["rungs"]})
    course.set_xticks(learned, [f"{value:,}" for value in learned])
    course.xaxis.set_minor_locator(NullLocator())
    _plain_log(course)
    course.set_title(title, fontsize=10)
    course.grid(alpha=0.25, which="both")
    course.legend(fontsize=8)
    for number, name in enumerate(names):
        axes = figure.add_subplot(grid[1 + number // columns, number % columns])
        _scatter(axes, trials, name, best)
        if number % columns == 0:
            axes.set_ylabel("log loss")
    _save(figure, path)


def _scatter(axes: Axes, trials: list[dict[str, Any]], name: str, best: int) -> None:
    # Only losses of the same number of spots can be compared: one shade each.
    rungs = max(len(trial["rungs"]) for trial in trials)
    for rung in range(rungs):
        here = [trial for trial in trials if len(trial["rungs"]) > rung]
        axes.plot(
            [trial["values"][name] for trial in here],
            [trial["rungs"][rung]["log_loss"] for trial in here],
            "o",
            color=_BLUE,
            alpha=0.3 + 0.7 * (rung + 1) / rungs,
            ms=3 + 2 * rung,
        )
    for trial in trials:
        if trial["trial"] == best:
            axes.plot(
                trial["values"][name],
                trial["rungs"][-1]["log_loss"],
                "o",
                mfc="none",
                mec=_RED,
                ms=11,
                mew=1.5,
            )
    axes.set_yscale("log")
    _plain_log(axes)
    values = sorted({trial["values"][name] for trial in trials})
    if name in ("learning_rate", "weight_decay"):
        axes.set_xscale("log")
        axes.set_xticks([values[0], values[-1]], [f"{values[0]:g}", f"{values[-1]:g}"])
        axes.xaxis.set_minor_locator(NullLocator())
    else:
        axes.set_xticks(values, [f"{value:g}" for value in values])
    axes.set_title(name, fontsize=9)
    axes.tick_params(labelsize=7)
    axes.grid(alpha=0.25)


def _plain_log(axes: Axes) -> None:
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())


def plot_comparison(result: dict[str, Any], title: str, path: Path) -> None:
    """Draw found crystals, false ones and times with and without a network; see `comparison`."""
    rows = result["rows"]
    labels = [row["label"] for row in rows]
    place = np.arange(len(rows), dtype=float)
    figure = Figure(figsize=(min(max(10.0, 4.0 + 1.6 * len(rows)), 16.0), 4.6), layout="constrained")
    found, false, time = figure.subplots(1, 3)
    time.set_yscale("log")
    for side, (way, colour) in enumerate((("with", _BLUE), ("without", _GREY))):
        at = place + (side - 0.5) * 0.36
        of = [row[way] for row in rows]
        share = np.array([100 * f["found_share"] if f["truths"] else np.nan for f in of])
        ends = np.array([[100 * v for v in f["found_95"]] if f["truths"] else [np.nan] * 2 for f in of])
        found.bar(at, share, 0.34, color=colour, label=f"{way} the network")
        found.errorbar(at, share, yerr=np.abs(ends.T - share), fmt="none", ecolor="black", capsize=3, lw=1)
        rate = np.array([f["false_per_100"] for f in of])
        limit = np.array([f["false_per_100_at_most_95"] for f in of])
        false.bar(at, rate, 0.34, color=colour)
        false.errorbar(
            at, rate, yerr=[np.zeros(len(of)), limit - rate], fmt="none", ecolor="black", capsize=3, lw=1
        )
        ms = np.array([[1e3 * v for v in f["time_s_10_50_90"]] for f in of])
        time.bar(at, ms[:, 1], 0.34, color=colour)
        time.errorbar(
            at,
            ms[:, 1],
            yerr=[ms[:, 1] - ms[:, 0], ms[:, 2] - ms[:, 1]],
            fmt="none",
            ecolor="black",
            capsize=3,
            lw=1,
        )
    _plain_log(time)
    found.set(title="crystals found, % (95 % interval)", ylim=(0, 104))
    false.set(title="false crystals per 100 patterns\n(whisker: up to, with 95 %)")
    time.set(title="time, ms (median, 10-90 %)")
    for axes in (found, false, time):
        axes.set_xticks(place, [label.replace(" ", "\n") for label in labels], fontsize=8)
        axes.set_xlim(-0.6, len(rows) - 0.4)
        axes.title.set_fontsize(9)
        axes.grid(alpha=0.25, axis="y")
        axes.set_axisbelow(True)
    figure.legend(loc="outside lower center", fontsize=8, ncols=2)
    figure.suptitle(title, fontsize=10)
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=_DPI)

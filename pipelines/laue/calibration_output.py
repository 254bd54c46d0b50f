"""What ``calibrate`` and ``recalibrate`` write, and what they refuse before the work."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from grainwatch.config import ConfigError
from pipelines.files import reason
from pipelines.laue.geometry import Calibration
from pipelines.laue.lauetools_files import write_det

FROM_ONE = np.array([0.0, 1.0, 1.0, 0.0, 0.0])
"""From pixels counted from 0 to those of LaueTools' files, in the order of `calibration_fit.NAMES`."""

_OPTIONS = {
    "energy_keV": "--energy",
    "threshold_sigma": "--threshold",
    "max_residual_px": "--max-residual",
    "min_spots": "--min-spots",
}


class Outputs:
    """Where the outcome of a command goes.

    Parameters
    ----------
    command : str
        For messages.
    out : Path
        The calibration, a .det file.
    overwrite : bool
        Whether it may be there already.
    plot : Path or None
        A .png file.
    json_out : str
        A file, "-" for the terminal, "" for none.

    Raises
    ------
    ConfigError
        If one of them cannot be written.
    """

    def __init__(self, command: str, out: Path, overwrite: bool, plot: Path | None, json_out: str) -> None:
        self._command, self._out, self.plot, self.json_out = command, out, plot, json_out
        # A name that is no .det is mostly that of the frame, which --overwrite would replace.
        if out.suffix.lower() != ".det":
            raise ConfigError(f"{command}: --out {out}: expected a name that ends in .det")
        if out.exists() and not overwrite:
            raise ConfigError(
                f"{command}: --out {out}: is there already; name another file, or give --overwrite"
            )
        if plot is not None and plot.suffix.lower() != ".png":
            raise ConfigError(f"{command}: --plot {plot}: expected a name that ends in .png")
        report = Path(json_out) if json_out not in ("", "-") else None
        for option, path in (("--out", out), ("--plot", plot), ("--json", report)):
            if path is not None and not path.parent.is_dir():
                raise ConfigError(f"{command}: {option} {path}: there is no folder {path.parent}")
            if path is not None and path.is_dir():
                raise ConfigError(f"{command}: {option} {path}: is a folder")

    def write_calibration(
        self, calibration: Calibration, rotation: npt.ArrayLike, material: str, data_file: str
    ) -> None:
        """Write the .det file, with the crystal's orientation."""
        when = time.strftime("%a %b %d %H:%M:%S %Y")
        try:
            write_det(
                self._out, calibration, rotation, material, f"grainwatch {self._command}", when, data_file
            )
        except OSError as error:
            raise ConfigError(f"{self._command}: --out {self._out}: {error.strerror}") from error

    def write_json(self, report: dict[str, Any]) -> None:
        """Write the report where it was asked for."""
        if not self.json_out:
            return
        text = json.dumps(report, allow_nan=False)
        if self.json_out == "-":
            print(text)
            return
        try:
            Path(self.json_out).write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"{self._command}: --json {self.json_out}: {error.strerror}") from error

    def write_plot(
        self, fit: Any, peaks_px: npt.NDArray[np.float64], image: npt.NDArray[Any] | None, title: str
    ) -> None:
        """Draw the residuals of a fit where it was asked for, see `calibration_plot.plot_residuals`."""
        if self.plot is None:
            return
        from pipelines.laue.calibration_plot import plot_residuals

        try:
            plot_residuals(fit, peaks_px, image, title, self.plot)
        except (OSError, ValueError) as error:
            raise ConfigError(f"{self._command}: --plot {self.plot}: {reason(error)}") from error


def of_option(error: ValueError) -> str:
    """Return what is wrong with a setting under the name of its option; a message begins with the setting."""
    key = str(error).partition(" ")[0].rstrip(":")
    return str(error).replace(key, _OPTIONS[key], 1) if key in _OPTIONS else str(error)

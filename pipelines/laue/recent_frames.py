"""Frames that show a reference crystal, out of results files, the newest first.

Peaks are stored with each result, so that nothing but the results file is needed. Where the crystal was
indexed, its orientation and its spots are known; where it was not (the detector moved too far), it is
searched for in the peaks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from grainwatch.config import Config as DaemonConfig
from grainwatch.config import ConfigError, convert, parse_config
from grainwatch.messages import DriftReport, LaueResult
from pipelines.laue.calibration import CalibrationError, Calibrator
from pipelines.laue.crystal import Material
from pipelines.laue.indexing.indexer import Indexer
from pipelines.laue.indexing.parameters import IndexingParameters, Phase
from pipelines.laue.indexing.refine import decompose
from pipelines.laue.joint_calibration import ReferenceFrame
from pipelines.laue.pipeline import Config
from pipelines.results_files import ResultsFile, results_files

FloatArray = npt.NDArray[np.float64]

_BLOCK = 32
_TRIES = 5
"""Frames that the search for the first crystal gets: it takes a second for each."""

_DOUBTFUL = frozenset({"shares_spots", "low_match_rate"})


@dataclass(frozen=True, eq=False)
class FramePeaks:
    """A frame's number and its peaks, (n, 2) px from 0, the brightest first."""

    number: int
    xy_px: FloatArray


@dataclass(frozen=True)
class Made:
    """How the results of a file were made.

    Attributes
    ----------
    stream, series_uid : str
    calibration_hash : str
        Of the newest result; "" without one.
    pipeline : Config or None
        The pipeline's table; None where the file does not hold it.
    alarm_frame : int
        Where the drift watch raised an alarm in this series; -1 where it did not.
    """

    stream: str
    series_uid: str
    calibration_hash: str
    pipeline: Config | None
    alarm_frame: int


def newest_series(folder: Path, stream: str | None = None) -> list[Path]:
    """Return the results files of the series of a folder that began last, parts in order."""
    newest: tuple[float, Path, str] | None = None
    for path in results_files(folder):
        try:
            with ResultsFile(path) as file:
                if stream in (None, file.stream) and (newest is None or file.started >= newest[0]):
                    newest = (file.started, path, file.series_uid)
        except ValueError:
            continue  # another program's, or one that is just being created
    return [] if newest is None else parts_of(newest[1], newest[2])


def parts_of(path: Path, series_uid: str) -> list[Path]:
    """Return all parts of the series that a results file belongs to."""
    stem = path.stem.partition("-part")[0]
    return [p for p in results_files(path.parent, series_uid) if p.stem.partition("-part")[0] == stem]


def how_made(paths: Sequence[Path]) -> Made:
    """Read how the results of a series were made.

    Raises
    ------
    pipelines.results_files.ResultsFileError
        If a file is not a results file.
    """
    alarm = -1
    for path in paths:
        with ResultsFile(path) as file:
            alarm = _alarm_in(file, alarm)
            stream, uid, text = file.stream, file.series_uid, file.config_text
    newest = next(newest_first(paths), None)
    hashed = newest.provenance.calibration_hash if newest is not None else ""
    return Made(stream, uid, hashed, pipeline_of(text, stream), alarm)


def _alarm_in(file: ResultsFile, earlier: int) -> int:
    # The last report knows all; its payload is read alone, for those of the frames fill gigabytes.
    table = file.drift()
    if not len(table["seq"]):
        return earlier
    last = int(table["seq"][-1])
    for report in file.messages(seqs=(last, last)):
        if isinstance(report, DriftReport) and report.alarm_series_uid == file.series_uid:
            return report.alarm_frame
    return -1


def pipeline_of(text: str, stream: str) -> Config | None:
    """Return the Laue pipeline's table of a stream in a configuration; None where there is none to read."""
    try:
        config: DaemonConfig = parse_config(text.encode(), "results file")[0]
        table = dict(config.streams[stream].pipeline)
        if table.pop("type", None) != "laue":
            return None
        pipeline: Config = convert(table, Config, "results file")
    except (ConfigError, KeyError):
        return None  # of another version, or not from a daemon: the command's options say it then
    return pipeline


def newest_first(
    paths: Sequence[Path], first: int | None = None, last: int | None = None
) -> Iterator[LaueResult]:
    """Iterate over the results of frames `first` to `last` (both included), backwards, each frame once."""
    seen: set[int] = set()
    channel: str | None = None
    for path in reversed(paths):
        with ResultsFile(path) as file:
            index = file.index()
            frame = index["frame"]
            wanted = frame >= (0 if first is None else first)
            if last is not None:
                wanted &= frame <= last
            seqs = np.sort(index["seq"][wanted])
            for end in range(len(seqs), 0, -_BLOCK):
                low, high = int(seqs[max(0, end - _BLOCK)]), int(seqs[end - 1])
                block = list(
                    file.messages(seqs=(low, high), frames=(first, last), schemas=(LaueResult.SCHEMA,))
                )
                for result in reversed(block):
                    if not isinstance(result, LaueResult) or result.key.frame in seen:
                        continue
                    if channel is None:
                        channel = result.key.channel
                    if result.key.channel == channel:
                        seen.add(result.key.frame)
                        yield result


def peaks_of(result: LaueResult) -> FramePeaks:
    """Return the peaks that are stored with a result."""
    return FramePeaks(result.key.frame, np.asarray(result.peaks.numpy()[:, :2], dtype=np.float64))


def reference_of(result: LaueResult, material: Material, min_spots: int) -> ReferenceFrame | None:
    """Return the strongest crystal of a material in a result; None without a good one."""
    crystals = [
        crystal
        for crystal in result.crystals
        if crystal.material == material.name
        and crystal.spots_matched >= min_spots
        and _DOUBTFUL.isdisjoint(crystal.flags)
    ]
    if not crystals:
        return None
    best = max(crystals, key=lambda crystal: crystal.spots_matched)
    matrix = best.UB.numpy() @ np.linalg.inv(best.B0.numpy())
    return ReferenceFrame(
        number=result.key.frame,
        xy_px=peaks_of(result).xy_px,
        rotation=decompose(matrix)[0],
        g=best.hkl.numpy() @ material.B0.T,
        spots=best.spot_indices.numpy().astype(np.int64),
    )


def search(
    frames: Iterable[FramePeaks], calibrator: Calibrator, say: Callable[[str], None]
) -> list[ReferenceFrame]:
    """Find the crystal in peaks that nobody has indexed, or in vain.

    The first frame that shows it is calibrated alone; the others are indexed with what came out.

    Raises
    ------
    CalibrationError
        If the first frames do not show it, with what was wrong with the first of them.
    """
    material, settings = calibrator.material, calibrator.settings
    found: list[ReferenceFrame] = []
    complaints: list[str] = []
    indexer: Indexer | None = None
    for frame in frames:
        if indexer is None:
            try:
                fit = calibrator.calibrate(frame.xy_px)
            except CalibrationError as error:
                complaints.append(f"frame {frame.number}: {error}")
                if len(complaints) == _TRIES:
                    break
                continue
            phase = Phase.prepare(material, fit.calibration, calibrator.area, settings.energy_keV)
            indexer = Indexer((phase,), IndexingParameters(max_crystals=3))
            say(f"frame {frame.number}: {material.name} found among its peaks, {fit.matched} spots")
            found.append(
                ReferenceFrame(frame.number, frame.xy_px, fit.rotation, fit.hkl @ material.B0.T, fit.spots)
            )
            continue
        crystals = [c for c in indexer.index(frame.xy_px) if len(c.spots) >= settings.min_spots]
        if crystals:
            best = max(crystals, key=lambda crystal: len(crystal.spots))
            g = phase.scene.reflections.g[best.reflections]
            found.append(
                ReferenceFrame(
                    frame.number, frame.xy_px, decompose(best.matrix)[0], g, best.spots.astype(np.int64)
                )
            )
    if not found:
        raise CalibrationError(complaints[0] if complaints else f"no frame to search for {material.name} in")
    return found

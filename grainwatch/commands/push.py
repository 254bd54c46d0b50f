"""``grainwatch push``: send images to a daemon."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, Self

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from grainwatch.config import ConfigError
from grainwatch.push import ImagePusher, PushError
from grainwatch.push_files import Naming, Watcher
from grainwatch.push_folder import FolderPush
from grainwatch.push_parcel import Receipt
from grainwatch.push_wire import DEFAULT_ADDRESS, metadata_error

#: Without a terminal, a line of progress comes so often, seconds.
LINE_S = 5.0
SHOWN_PROBLEMS = 20


def push(
    paths: Annotated[list[Path], typer.Argument(help="A folder, or image files.", metavar="FOLDER|FILE")],
    to: Annotated[str, typer.Option(help="The daemon's image port (source 'push').")] = DEFAULT_ADDRESS,
    series: Annotated[
        str | None, typer.Option(help="Name of the series; by default that of the folder.")
    ] = None,
    watch: Annotated[bool, typer.Option("--watch", help="Go on with the files that come.")] = False,
    idle: Annotated[
        float | None, typer.Option(min=0.0, help="End a watch after so many seconds without a new file.")
    ] = None,
    pattern: Annotated[
        str, typer.Option(help="Files of the folder, as in '*.tif' or '**/*.tif'; by default images.")
    ] = "",
    number: Annotated[
        str,
        typer.Option(
            metavar="PATTERN|order",
            help="Regular expression that finds the number in a name (group n, or the first), or 'order'"
            " to count; by default the last digits.",
        ),
    ] = "",
    position: Annotated[
        str,
        typer.Option(metavar="PATTERN", help="Regular expression with groups x, y, z for the position."),
    ] = "",
    position_unit: Annotated[str, typer.Option(help="nm, um or mm.")] = "um",
    first: Annotated[
        int | None, typer.Option(min=0, help="Number that the series starts from; by default the lowest.")
    ] = None,
    meta: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="Goes with every image; may be repeated.")
    ] = None,
    sidecars: Annotated[
        bool, typer.Option(help="Send .txt, .hdr and .json of the same name along with an image.")
    ] = True,
    again: Annotated[
        bool, typer.Option("--again", help="Send everything as a new series, also what the daemon has.")
    ] = False,
    settle: Annotated[
        float, typer.Option(min=0.0, help="Seconds that a file must stand still to be finished.")
    ] = 1.0,
    patience: Annotated[
        float | None, typer.Option(min=0.0, help="Give up after so many seconds without a daemon.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a summary as one JSON object.")] = False,
) -> None:
    """Send images to a daemon and wait until it has them.

    What the daemon has already is not sent again: after an interruption the same command goes on.
    Exit status 0 says that every image was acknowledged.
    """
    metadata = read_metadata(meta or [])
    naming = Naming(number, position, position_unit)
    watcher = Watcher(paths, pattern, settle, sidecars)
    if watch and watcher.folder is None:
        raise ConfigError("--watch: expected one folder")
    with Shown() as shown:
        pusher = ImagePusher(
            to,
            series or watcher.series,
            again=again,
            patience_s=patience,
            say=shown.say,
            acknowledged=shown.acknowledged,
        )
        files = FolderPush(
            pusher, watcher, naming, metadata, first=first, watch=watch, idle_s=idle, say=shown.say
        )
        shown.total = lambda: files.found
        error, interrupted = _run(files, pusher, watcher, shown.say)
    problems = [*files.unreadable, *pusher.problems]
    good = not (error or problems or pusher.lost) and (watch or not interrupted)
    if interrupted:
        shown.say(
            f"stopped; series {pusher.series!r} stays open. The same command goes on with it;"
            " without --watch it sends what is left and ends the series"
        )
    for receipt in problems[:SHOWN_PROBLEMS]:
        shown.say(f"{receipt.name}: {receipt.outcome}: {receipt.reason}")
    if len(problems) > SHOWN_PROBLEMS:
        shown.say(f"and {len(problems) - SHOWN_PROBLEMS} more")
    if error:
        shown.say(error)
    if as_json:
        print(json.dumps(summary(pusher, files, shown, error, interrupted)))
    else:
        shown.say(_in_words(pusher, len(files.unreadable)))
    raise typer.Exit(0 if good else 1)


def _run(
    files: FolderPush, pusher: ImagePusher, watcher: Watcher, say: Callable[[str], None]
) -> tuple[str, bool]:
    """Push, and return what went wrong and whether Ctrl-C ended it."""
    try:
        files.run()
        if not files.found:
            raise ConfigError(f"{watcher.folder}: no images there (--pattern says which files are)")
        pusher.end()
    except PushError as error:
        return str(error), False
    except KeyboardInterrupt:
        say("waiting for what is on the way")
        return "", True
    finally:
        pusher.close()
    return "", False


class Shown:
    """What is told to a person on standard error: a bar on a terminal, else a line now and then."""

    def __init__(self) -> None:
        self.total: Callable[[], int] = lambda: 0
        self.nbytes = 0
        self.done = 0
        self._console = Console(stderr=True, soft_wrap=True)
        self._bar: Progress | None = None
        self._began = self._said = time.monotonic()

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("pushed"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}"),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._bar.start()
            self._task = self._bar.add_task("push", total=None, rate="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    @property
    def seconds(self) -> float:
        """How long it has been going on."""
        return time.monotonic() - self._began

    def say(self, what: str) -> None:
        """Print a line."""
        self._console.print(f"grainwatch: {what}", highlight=False, markup=False)

    def acknowledged(self, receipt: Receipt) -> None:
        """Count an image."""
        self.done += 1
        if receipt.outcome != "held":
            self.nbytes += receipt.nbytes
        rate = f"{self.done / self.seconds:.1f} images/s, {self.nbytes / self.seconds / 1e6:.1f} MB/s"
        if self._bar is not None:
            total = max(self.total(), self.done)
            self._bar.update(self._task, completed=self.done, total=total, rate=rate)
        elif time.monotonic() - self._said > LINE_S:
            self._said = time.monotonic()
            self.say(f"{self.done} of {max(self.total(), self.done)} images, {rate}")


def read_metadata(given: list[str]) -> dict[str, Any]:
    """Read KEY=VALUE; a value that is a number, true or false is taken as such.

    >>> read_metadata(["exposure_s=0.5", "sample=Cu 3"])
    {'exposure_s': 0.5, 'sample': 'Cu 3'}

    Raises
    ------
    ConfigError
        If there is no key, or it is too long.
    """
    metadata: dict[str, Any] = {}
    for pair in given:
        key, equals, value = pair.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"--meta: expected KEY=VALUE, got {pair!r}")
        metadata[key.strip()] = _value(value)
    error = metadata_error(metadata, {})
    if error:
        raise ConfigError(f"--meta: {error}")
    return metadata


def _value(text: str) -> Any:
    if re.fullmatch(r"true|false|-?[0-9]{1,18}", text):
        return json.loads(text) if not re.fullmatch("-?0[0-9]+", text) else text
    if re.fullmatch(r"-?[0-9]+\.[0-9]*(e-?[0-9]{1,3})?|-?[0-9]+e-?[0-9]{1,3}", text):
        return float(text)
    return text


def summary(
    pusher: ImagePusher, files: FolderPush, shown: Shown, error: str, interrupted: bool
) -> dict[str, Any]:
    """Return what ``--json`` prints."""
    counts = {str(outcome): number for outcome, number in pusher.counts.items()}
    counts["refused"] += len(files.unreadable)
    problems = [*files.unreadable, *pusher.problems]
    return {
        "series": pusher.series,
        "series_id": pusher.series_id,
        **counts,
        "lost": pusher.lost,
        "problems": [{"file": p.name, "outcome": p.outcome, "reason": p.reason} for p in problems],
        "bytes": shown.nbytes,
        "seconds": round(shown.seconds, 3),
        "ended": not (error or interrupted),
        "interrupted": interrupted,
        "error": error,
    }


def _in_words(pusher: ImagePusher, unreadable: int) -> str:
    counts = pusher.counts
    parts = [f"{counts['taken']} images taken"]
    parts += [f"{counts['held']} were there already"] if counts["held"] else []
    parts += [f"{counts['failed']} failed"] if counts["failed"] else []
    refused = counts["refused"] + unreadable
    parts += [f"{refused} refused"] if refused else []
    return f"series {pusher.series!r}: {', '.join(parts)}"

"""From files that stand still to frames: read, checked, tried again, given up.

All of it happens in one thread, which may wait for a share as long as the share likes.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from daemon.sources.base import Arrival, Bad, Event, Exhausted, SourceContext
from daemon.sources.folder.journal import FolderSeries, Journal
from daemon.sources.folder.names import printable, sidecar_of
from daemon.sources.folder.pattern import FilePattern
from daemon.sources.folder.rules import Rules
from daemon.sources.folder.series import SeriesBook
from daemon.sources.folder.watch import FolderWatch, WatchedFile, is_away
from pipelines.files import FileImage, hdf5_writer, is_hdf5, open_images, reason
from pipelines.frame import BadFrame, PlainImage
from pipelines.micrograph.frame_acquisition import file_metadata

if TYPE_CHECKING:
    from daemon.sources.folder.source import Config

log = logging.getLogger(__name__)

#: Seconds between attempts to read a file that is not complete: the first, doubled up to the last.
RETRY_S: Final = (0.1, 5.0)
#: After so many seconds of silence an operator is told that the share does not answer.
SILENCE_S: Final = 5.0


class FolderReader:
    """Makes events of the files that a watch finds.

    Parameters
    ----------
    config : daemon.sources.folder.Config
    context : SourceContext
    journal : Journal
    """

    def __init__(self, config: Config, context: SourceContext, journal: Journal) -> None:
        self._config = config
        self._journal = journal
        pattern = self._pattern = FilePattern(config.path, config.ignore, config.end_file)
        self._root = pattern.root
        self._rules = Rules(config, pattern.root)
        self._watch = FolderWatch(pattern, self._rules.key_of_name, config.poll_s, config.settle_s)
        self.book = SeriesBook(journal, context.standing, config.frames_per_series or None)
        self._dataset = f"::{config.dataset}" if config.dataset else ""
        self._saw_end = False
        self._begun = False
        self._busy: tuple[str, float] | None = None
        self._waiting = ""
        self.taken = 0

    @property
    def waiting(self) -> int:
        """How many files are there that were not read yet. For other threads."""
        return len(self._watch.pending)

    @property
    def problem(self) -> str:
        """What keeps it from reading at present, "" if nothing. For other threads."""
        busy = self._busy
        if busy is not None and time.monotonic() - busy[1] > SILENCE_S:
            return f"{busy[0]} for {time.monotonic() - busy[1]:.0f} s: does the share answer?"
        known = [self._watch.away, *self._watch.failed.values(), self._waiting, self._journal.fault]
        return "; ".join(filter(None, known))

    def events(self) -> Iterator[Event | float]:
        """Yield events, and in between how many seconds (float) there is nothing to do."""
        self._recall()
        yield from self.book.take_up()
        while True:
            self.book.note_ended()
            self._busy = (f"looking into {self._root}", time.monotonic())
            looked = self._watch.look()
            self._busy = None
            if looked:
                self._begin()
                if self._watch.renamed:
                    self._journal.note(self._watch.renamed)
                yield from self._take_ready()
                yield from self._end_what_is_over()
                if self._config.once and self._is_complete():
                    yield from self.book.leave_all()
                    yield Exhausted()
                    return
            self._waiting = self._what_waits()
            yield max(0.0, min(self._watch.due - time.monotonic(), self._config.poll_s))

    # Before the first file.

    def _recall(self) -> None:
        """Take from the journal what an earlier run did."""
        images = self.book.resume()
        for path, mark in self._journal.files():
            # A sign that an earlier run took still stands, as long as it lies there.
            self._saw_end |= self._pattern.is_end(os.path.basename(path)) and os.path.exists(path)
            earlier = images.get(path, {})
            needed = [image for image, known in earlier.items() if known is not None]
            if needed:
                self._watch.expect(path, mark, {i: k for i, k in earlier.items() if i >= min(needed)})
            else:
                self._watch.set_finished(path, mark)

    def _begin(self) -> None:
        """Pass over what lies there already, if it is not wanted: once in the life of a journal."""
        journal, watch = self._journal, self._watch
        if self._begun:
            return
        self._begun = True
        if not self._config.existing and not journal.has_begun(self._config.path):
            passed = [(f.path, f.mark()) for f in watch.pending.values()]
            passed += [(path, mark) for _, path, mark in watch.ends]
            log.info("%s: %d files lie there already: not taken", self._root, len(passed))
            journal.note(passed)
            watch.pass_over(passed)
        journal.set_begun(self._config.path)

    # Files.

    def _take_ready(self) -> Iterator[Event]:
        """Read the files that are ready, until it is time to look for others."""
        for file in sorted(self._watch.ready(), key=self._order):
            if not self._belongs(file) and self._is_under_way():
                return
            if file.path in self._watch.pending:
                yield from self._take(file)
            if self._watch.away or time.monotonic() > self._watch.due:
                return

    def _order(self, file: WatchedFile) -> tuple[bool, bool, str, str]:
        """Sort: the series under way, what is left of an earlier run, then by folder and number."""
        return not self._belongs(file), not file.earlier, file.folder, file.order

    def _belongs(self, file: WatchedFile) -> bool:
        current = self.book.current
        return current is not None and current.key in (file.key, printable(file.path))

    def _is_under_way(self) -> bool:
        """Return whether files of the current series are still written: those of another one can wait."""
        limit = time.monotonic() - self._config.patience_s
        return any(self._belongs(f) and f.changed > limit for f in self._watch.pending.values())

    def _take(self, file: WatchedFile) -> Iterator[Event]:
        """Read a file from where it was left off; have it tried again if it is not complete."""
        watch = self._watch
        self._busy = (f"reading {file.path}", time.monotonic())
        try:
            writer = hdf5_writer(file.path)
            unchanged = watch.is_unchanged(file)
            if writer:
                yield from self._read_beside(writer, file)
            elif unchanged and not self._waits_for_sidecar(file):
                yield from self._read(file, check=True)
                if file.settled and file.given == 0:
                    raise BadFrame(f"{file.path}: holds no image that was written")
                if file.settled:  # else it changed meanwhile
                    self._finish(file)
        except (BadFrame, OSError) as error:
            yield from self._not_read(file, error)
        finally:
            self._busy = None

    def _waits_for_sidecar(self, file: WatchedFile) -> bool:
        """Return whether the file that has to lie beside an image is not there yet, or still written."""
        config, now = self._config, time.monotonic()
        if not config.sidecar or now - file.changed >= config.patience_s:
            return False
        path = sidecar_of(file.path, config.sidecar)
        found = _stat_sidecar(path)
        if found is None:
            file.sidecar = None
        else:
            seen = found.st_size, found.st_mtime_ns
            if file.sidecar is None or file.sidecar[:2] != seen:
                file.sidecar = (*seen, now)
            if found.st_size and now - file.sidecar[2] >= config.settle_s:
                return False
        file.why = f"{file.path}: waits for {os.path.basename(path)}"
        file.try_at = now + min(config.poll_s, config.settle_s or config.poll_s)
        return True

    def _read_beside(self, writer: str, file: WatchedFile) -> Iterator[Event]:
        """Read what there is of an HDF5 file that its writer has open, and have it looked at again.

        Nothing is known of when such a writer goes on, so that patience counts only where the source is
        to end.
        """
        file.why = f"{file.path}: its writer has it open and lets nobody read"
        if writer == "swmr":
            file.why = ""
            try:
                yield from self._read(file, check=False)
            except BadFrame as error:
                if is_away(error):
                    raise
                file.why = str(error)
        now = time.monotonic()
        file.try_at = now + self._config.poll_s
        if self._config.once and now - file.changed >= self._config.patience_s:
            log.warning("%s: its writer left it open", file.path)
            if file.why:
                yield from self._give_up(file)
            else:
                self._finish(file)

    def _finish(self, file: WatchedFile) -> None:
        """Take note that a file was read as it is."""
        if file.mark() != file.noted:
            self._journal.note([(file.path, file.mark())])
        self._watch.finish(file)

    def _read(self, file: WatchedFile, check: bool) -> Iterator[Event]:
        """Hand over the images of a file; with `check` only such as did not change while they were read."""
        given = file.given
        keys = self._rules.header_keys
        images = open_images(file.path + self._dataset, first=given, keys=keys, growing=True, colour=True)
        said: dict[str, Any] | None = None if self._config.acquisition else {}
        for image in images:
            said = file_metadata(file.path) if said is None else said
            if check and not self._watch.is_unchanged(file):
                return
            file.why = ""
            self._busy = None  # that frames are not taken fast enough is not the share's fault
            yield from self._hand_over(file, replace(image, metadata={**image.metadata, **said}))
            self._busy = (f"reading {file.path}", time.monotonic())
        if given and file.given == given and not file.earlier and not is_hdf5(file.path):
            # It changed and holds no more images than before: they are others.
            file.given = 0
            yield from self._read(file, check)

    def _not_read(self, file: WatchedFile, error: BadFrame | OSError) -> Iterator[Event]:
        """Have a file tried again, or give it up when patience is over."""
        now = time.monotonic()
        file.tries += 1
        first, longest = RETRY_S
        file.try_at = now + min(first * 2.0 ** min(file.tries, 10), longest)
        if is_away(error):
            # It may be this file's place on the disk alone: others have their turn, `status` names it on.
            file.why = reason(error)
            self._watch.say_away(error)
            return
        if not os.path.lexists(file.path):
            self._watch.forget(file)
            return
        file.why = reason(error)
        if now - file.changed >= self._config.patience_s:
            yield from self._give_up(file)

    def _give_up(self, file: WatchedFile) -> Iterator[Event]:
        """Fail the next image of a file: in its series if that is under way, else by itself.

        A file that is no image has the name of no series either, and must not end the one under way.
        """
        image, series, frame = file.given, self.book.current, -1
        if series is not None and self._belongs(file):
            frame, _ = self._rules.number(file.path, image, series, file.alone, None)
            frame = (file.earlier.get(image) or (series, frame))[1]
        file.given += 1
        if series is None or frame < series.first:
            self._note(file, None, image, -1)
            event = Bad(printable(file.why))
        else:
            self._note(file, series, image, frame)
            series.frames.add(frame)
            event = Bad(printable(file.why), series.name, frame)
        self._watch.finish(file)
        yield event
        yield from self.book.leave_if_full()

    # Images.

    def _hand_over(self, file: WatchedFile, image: FileImage) -> Iterator[Event]:
        """Make a frame of an image, in the series that it belongs to."""
        book, rules = self.book, self._rules
        known = file.earlier.pop(image.index, (None, -1))
        file.given = image.index + 1
        if known is None:
            return  # the daemon has it
        series, frame = known
        if series is None or not book.is_known(series):
            file.alone = rules.is_alone(image)
            key = printable(file.path) if file.alone else file.key
            series = book.find(key)
            frame, why = rules.number(file.path, image.index, series, file.alone, image)
            if why:
                yield self._refuse(file, image, why)
                return
            if series is None or (self._config.repeats == "series" and frame in series.frames):
                first = rules.first(frame, file.alone, self._names_like(file))
                yield from book.start(key, file.folder, first)
                series = book.current
                assert series is not None
        yield from book.enter(series)
        if frame < series.first:
            why = f"{file.path}: its number {frame} is below the first of the series, {series.first}"
            yield self._refuse(file, image, f"{why}: set first_number")
            return
        self._note(file, series, image.index, frame)
        series.frames.add(frame)
        book.touched = time.monotonic()
        self.taken += 1
        yield Arrival(
            series.name,
            frame,
            PlainImage(image.pixels),
            acquired=rules.acquired(image),
            position_um=rules.position_um(file.name, image),
            metadata={**image.metadata, "file": printable(file.path), "label": printable(image.label)},
            mixed=self._config.mixed,
        )
        yield from book.leave_if_full()

    def _names_like(self, file: WatchedFile) -> list[str]:
        return [f.name for f in self._watch.pending.values() if f.key == file.key]

    def _refuse(self, file: WatchedFile, image: FileImage, why: str) -> Bad:
        """Fail an image that has no number which could be used."""
        self._note(file, None, image.index, -1)
        return Bad(printable(why))

    def _note(self, file: WatchedFile, series: FolderSeries | None, image: int, frame: int) -> None:
        """Write down what is about to be handed over."""
        file.noted = file.mark()
        self._journal.take(file.path, file.noted, series, image, frame)

    # Ends.

    def _end_what_is_over(self) -> Iterator[Event]:
        book, config, watch = self.book, self._config, self._watch
        busy = any(map(self._belongs, watch.pending.values()))
        yield from book.leave_behind(busy)
        for folder, path, mark in watch.ends:
            below = folder + os.sep
            if any((f.folder + os.sep).startswith(below) for f in watch.pending.values()):
                continue  # what lies beside it comes first
            if book.current is not None and (book.current.folder + os.sep).startswith(below):
                yield from book.leave()
            watch.pass_over([(path, mark)])
            self._journal.note([(path, mark)])
            self._saw_end = True
        idle = time.monotonic() - book.touched
        if not busy and 0 < config.series_idle_s <= idle:
            yield from book.leave()

    def _is_complete(self) -> bool:
        watch = self._watch
        done = watch.knows_files and not watch.pending and not watch.failed
        return done and (self._saw_end or not self._config.end_file)

    def _what_waits(self) -> str:
        """Say which files cannot be read yet."""
        why = [f.why for f in self._watch.pending.values() if f.why]
        more = f" (and {len(why) - 1} more)" if len(why) > 1 else ""
        return printable(f"not complete yet: {why[0]}{more}") if why else ""


def _stat_sidecar(path: str) -> os.stat_result | None:
    """Return what is known of a sidecar, None if it is not there; its reader takes .TXT for .txt, too."""
    stem, suffix = os.path.splitext(path)
    for name in (path, stem + suffix.upper()):
        with suppress(FileNotFoundError):
            return os.stat(name)
    return None

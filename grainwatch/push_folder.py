"""Push a folder: what is there, or what comes while one watches."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, Final

from grainwatch.push import ImagePusher
from grainwatch.push_files import Candidate, Naming, Watcher
from grainwatch.push_parcel import FileChangedError, Receipt

#: A file that cannot be read for so long is given up. Another program may just have it open (Windows).
UNREADABLE_S: Final = 30.0
_SLICE_S: Final = 0.2


class FolderPush:
    """Pushes the finished files of a `Watcher`.

    Parameters
    ----------
    pusher : ImagePusher
    watcher : Watcher
    naming : Naming
    metadata : mapping
        Goes with every image.
    first : int, optional
        The number that the series starts from; by default the lowest that there is.
    watch : bool
        Go on when all files have been sent.
    idle_s : float, optional
        End a watch after so long without a new file.
    say : callable
        Is told what a person should know.
    """

    def __init__(
        self,
        pusher: ImagePusher,
        watcher: Watcher,
        naming: Naming,
        metadata: Mapping[str, Any],
        *,
        first: int | None,
        watch: bool,
        idle_s: float | None,
        say: Callable[[str], None],
    ) -> None:
        self.unreadable: list[Receipt] = []
        self._pusher = pusher
        self._watcher = watcher
        self._naming = naming
        self._metadata = metadata
        self._first = first
        self._watch = watch
        self._idle_s = idle_s
        self._say = say
        self._begun = False
        self._failing: dict[str, float] = {}
        self._away = ""
        self._latest = time.monotonic()

    @property
    def found(self) -> int:
        """How many files there are, as far as one knows."""
        return len(self._watcher.listed)

    def run(self) -> None:
        """Push until all is sent, or the watch is over; the series is not ended yet.

        Raises
        ------
        ConfigError
            If there are no files, or their names give no numbers.
        grainwatch.push.PushError
            As `ImagePusher.begin`.
        """
        told = False
        while True:
            files = self._look()
            if files:
                self._send(files)
                self._latest = time.monotonic()
                continue
            if self._over():
                return
            if not told and not self.found and self._watch:
                told = True
                self._say(f"no images in {self._watcher.folder} yet: waiting")
            if self._begun:
                self._pusher.attend(_SLICE_S)
            else:
                time.sleep(_SLICE_S)

    def _over(self) -> bool:
        if self._away or self._watcher.growing or (self._watcher.listed and not self._begun):
            return False
        if not self._watch:
            return True
        return self._idle_s is not None and time.monotonic() - self._latest > self._idle_s

    def _look(self) -> list[Candidate]:
        try:
            files = self._watcher.look()
        except OSError as error:
            # A share that is away comes back; whoever does not want to wait presses Ctrl-C.
            if not self._away:
                what = error.strerror or error
                self._say(f"{self._watcher.folder}: cannot be read: {what}: waiting")
            self._away = str(error)
            return []
        if self._away:
            self._say(f"{self._watcher.folder}: can be read again")
            self._away = ""
        return files

    def _send(self, files: list[Candidate]) -> None:
        if not self._begun:
            self._begin(files)
        for file in files:
            self._push(file)

    def _begin(self, files: list[Candidate]) -> None:
        names = self._watcher.listed
        self._naming.settle(names)
        numbers = [n for n in map(self._naming.number, names) if n is not None]
        lowest = 0 if self._naming.by_order else min(numbers)
        self._pusher.first = lowest if self._first is None else self._first
        self._pusher.begin()
        self._begun = True
        clash = next((why for why in map(self._clash, files) if why), "")
        if clash:
            self._say(f"{clash}: a new series begins")
            self._pusher.first = lowest if self._first is None else self._first
            self._pusher.begin(fresh=True)
        elif self._pusher.resumed:
            self._say(f"series {self._pusher.series!r} is still open and goes on")

    def _clash(self, file: Candidate) -> str:
        """Say why a file cannot go into the series that is open, "" if it can."""
        number = self._naming.number(file.name)
        if self._naming.by_order or number is None or self._pusher.has(file.fingerprint):
            return ""
        if self._pusher.holder_of(number) is not None:
            return f"number {number} of the open series is another image than {file.name}"
        if (self._first or 0) <= number < self._pusher.first:
            return f"number {number} ({file.name}) is before the first of the open series"
        return ""

    def _push(self, file: Candidate) -> None:
        number = self._naming.number(file.name)
        if self._naming.by_order:
            number = self._pusher.number_of(file.fingerprint)
        elif number is None:
            self._give_up(file, "no number in its name (--number)")
            return
        try:
            if not file.unchanged():  # others went before it
                self._watcher.again(file.name)
                return
            self._pusher.push_file(
                file.path,
                number,
                name=file.name,
                position_um=self._naming.position_um(file.name),
                metadata=self._metadata,
                sidecars=self._watcher.read_sidecars(file.path),
            )
        except FileChangedError:
            self._watcher.again(file.name)
        except FileNotFoundError:
            self._give_up(file, "is gone")
        except OSError as error:
            self._watcher.again(file.name)
            self._retry(file, f"cannot be read: {error.strerror or error}")
        else:
            self._watcher.finished(file.name)

    def _retry(self, file: Candidate, why: str) -> None:
        now = time.monotonic()
        if file.name not in self._failing:
            self._say(f"{file.name}: {why}: trying again")
        if now - self._failing.setdefault(file.name, now) > UNREADABLE_S:
            self._give_up(file, why)

    def _give_up(self, file: Candidate, why: str) -> None:
        self._watcher.finished(file.name)
        self.unreadable.append(Receipt(-1, file.name, "refused", why))
        self._say(f"{file.name}: {why}: not sent")

"""What follows from image after image: whether the stream has changed, and what looked like this one.

Workers see only some of the images, the front process sees all results in order of completion. So what is
remembered over a stream lives here: the drift alarm, one a channel, and the fingerprints of the last images.
Each costs well under a millisecond an image.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Literal

import msgspec
import numpy as np
import numpy.typing as npt

from grainwatch.config import Table
from grainwatch.messages import AnyResult, ArrayData, ChangeReport, MicrographResult
from pipelines.control_chart import LEAST_MEMORY
from pipelines.frame import Watch
from pipelines.micrograph.drift_alarm import Drift, DriftAlarm, check_alarm
from pipelines.micrograph.image_statistics import STATISTICS
from pipelines.micrograph.model_bundle import ALARM_COMPONENTS
from pipelines.micrograph.neighbours import Neighbours

FloatArray = npt.NDArray[np.float64]

STREAM_CHANGED = "stream_changed"
"""Flag of the result that raised the alarm and of all after it."""

REPORT_EVERY = 10
"""Images between two reports."""

_LEARNS_FROM = 100
"""Images: a change among these may be taken for how the stream is."""
_LATELY = 30
"""Images whose novelty is counted in the text."""

_MOST_MEMORY = 0.3
"""With more, one value must be so rare for an alarm that ranks among hundreds of images cannot show it."""

_WORDS = {
    "mean": "brightness",
    "std": "contrast",
    "entropy_bits": "entropy of the greys",
    "sharpness": "sharpness",
    "dark_share": "share of black pixels",
    "bright_share": "share of white pixels",
    "fraction": "phase fraction",
    "latent_distance": "distance from the training images",
    "code_divergence_bits": "codes that the training images do not have",
}


class DriftTable(Table, frozen=True, kw_only=True):
    """Watch whether images of the stream change: brightness, contrast, sharpness, phase fraction, texture.

    Attributes
    ----------
    on : bool
        False for no alarm.
    images_between_false_alarms : float
        Mean number of images until a stream that does not change raises an alarm by chance.
    memory : float
        Weight of the newest images, 0.01 to 0.3: small finds slow and small changes, large finds jumps
        sooner.
    block : int
        Images that are averaged into one value, for streams whose images resemble those just before.
    start : str
        "stream": what comes first, about a hundred images, is how images should be; "model": those that the
        first bundle was calibrated with are, where it has them, which suits short sessions. A stream that
        shows one of many conditions of these raises the alarm at once.
    """

    on: bool = True
    images_between_false_alarms: float = 1e4
    memory: float = 0.1
    block: int = 1
    start: Literal["stream", "model"] = "stream"

    def __post_init__(self) -> None:
        if not LEAST_MEMORY <= self.memory <= _MOST_MEMORY:
            raise ValueError(f"memory: expected {LEAST_MEMORY:g} to {_MOST_MEMORY:g}, got {self.memory:g}")
        check_alarm(self.images_between_false_alarms, self.memory, self.block)

    def begin(self, names: Sequence[str]) -> DriftAlarm:
        """Return an alarm that has seen nothing yet."""
        return DriftAlarm(names, self.images_between_false_alarms, self.memory, self.block)


class LearntStart(msgspec.Struct, frozen=True):
    """What an alarm may begin with.

    Attributes
    ----------
    sha256 : str
        Of the bundle that it is for.
    names : tuple of str
    values : ArrayData, (n, names) float64
    """

    sha256: str
    names: tuple[str, ...]
    values: ArrayData


class StreamWatch:
    """Follows the results of a stream; implements `pipelines.frame.Watch`.

    It begins anew with another model, and goes on over changes of a configuration that leave its own keys.

    Attributes
    ----------
    settings : tuple
        What it was made with.
    """

    def __init__(
        self,
        table: DriftTable,
        neighbours: int,
        learnt: LearntStart | None = None,
        measured: tuple[str, bool] = ("", False),
        *,
        followed: Sequence[str] = ALARM_COMPONENTS,
    ) -> None:
        """Begin.

        Parameters
        ----------
        table : DriftTable
        neighbours : int
            That each result gets.
        learnt : LearntStart, optional
        measured : (str, bool)
            Which phase, and how: other fractions are no change of the stream.
        followed : sequence of str
            Components that results will have.
        """
        if table.on:
            # The limit takes a second to find, and is kept: results should not wait for it.
            table.begin(followed)
        self.settings = (table, neighbours, learnt, measured)
        self._channels: dict[str, _Channel] = {}
        self._neighbours = Neighbours(neighbours)
        self._model = ""

    @property
    def text(self) -> str:
        """What it knows, in words."""
        if not self.settings[0].on:
            return "no drift alarm"
        known = [channel.text for channel in self._channels.values()]
        return "; ".join(known) or "drift alarm: no image yet"

    @property
    def alarm(self) -> bool:
        """Whether the images of a channel have changed."""
        return any(channel.alarm for channel in self._channels.values())

    def same_as(self, other: Watch) -> bool:
        """Whether another one watches for the same."""
        return isinstance(other, StreamWatch) and other.settings == self.settings

    def take(self, result: AnyResult) -> tuple[AnyResult, list[ChangeReport]]:
        """Take a result; return it with its neighbours and flags, and a report when one is due."""
        if not isinstance(result, MicrographResult):
            return result, []
        if result.provenance.model.sha256 != self._model:
            self._model = result.provenance.model.sha256
            self._channels.clear()
            self._neighbours = Neighbours(self.settings[1])
        if result.fingerprints:
            first = result.fingerprints[0]
            vector = (first.vector if first.whitened is None else first.whitened).numpy()
            found = self._neighbours.of(result.key, vector)
            result = msgspec.structs.replace(result, neighbours=found)
        if not self.settings[0].on:
            return result, []
        channel = self._channels.get(result.key.channel)
        if channel is None:
            table, _, learnt, _ = self.settings
            channel = _Channel(result.key.channel, table, learnt)
            self._channels[result.key.channel] = channel
        report = channel.take(result)
        if channel.alarm:
            result = msgspec.structs.replace(result, flags=(*result.flags, STREAM_CHANGED))
        return result, [report] if report is not None else []


class _Channel:
    """The alarm of one channel."""

    def __init__(self, name: str, table: DriftTable, learnt: LearntStart | None) -> None:
        self._name = name
        self._table = table
        self._learnt = learnt
        self._watch: DriftAlarm | None = None
        self._drift: Drift | None = None
        self._state = ""
        self._alarm_at = ("", -1)
        self._known = 0
        self._novel: deque[bool] = deque(maxlen=_LATELY)
        self.text = f"drift alarm{self._of}: no image yet"

    @property
    def _of(self) -> str:
        return f" of {self._name}" if self._name else ""

    @property
    def alarm(self) -> bool:
        """Whether there is one."""
        return self._state == "changed"

    def take(self, result: MicrographResult) -> ChangeReport | None:
        if result.novelty is not None:
            self._novel.append(result.novelty.novel)
        values = _values(result)
        if self._watch is None:
            if not values:
                return None
            self._watch = self._begin(tuple(values), result)
        if not all(name in values for name in self._watch.names):
            return None  # an image without patches, or of one grey, says nothing of the others
        self._drift = drift = self._watch.update([values[name] for name in self._watch.names])
        before = self._state
        self._state = "changed" if drift.alarm else "learning" if self._watch.learning else "same"
        if self.alarm and before != "changed":
            self._alarm_at = (result.key.series_uid, result.key.frame)
        self.text = self._words(drift)
        if self._state == before and drift.images % REPORT_EVERY:
            return None
        return self._report(result, drift)

    def _begin(self, names: tuple[str, ...], result: MicrographResult) -> DriftAlarm:
        watch, learnt = self._table.begin(names), self._learnt
        model = result.fingerprints[0].model.sha256 if result.fingerprints else ""
        if learnt is not None and learnt.sha256 == model and set(names) <= set(learnt.names):
            values = learnt.values.numpy()
            watch.learn(values[:, [learnt.names.index(name) for name in names]])
            self._known = len(values)
        return watch

    def _report(self, result: MicrographResult, drift: Drift) -> ChangeReport:
        assert self._watch is not None
        return ChangeReport(
            source=result.key.source,
            series_uid=result.key.series_uid,
            frame=result.key.frame,
            channel=result.key.channel,
            state=self._state,
            images=drift.images,
            statistic=drift.statistic,
            limit=drift.limit,
            images_between_false_alarms=self._table.images_between_false_alarms,
            components=self._watch.names,
            change=drift.change,
            foremost=drift.foremost,
            correlated=drift.correlated,
            alarm_series_uid=self._alarm_at[0],
            alarm_frame=self._alarm_at[1],
            text=self.text,
            flags=(STREAM_CHANGED,) if self.alarm else (),
        )

    @property
    def _strange(self) -> str:
        # A stream of strange images is the same all the time, and "the same" alone would sound like "good".
        novel = sum(self._novel)
        if 2 * novel < len(self._novel) or not novel:
            return ""
        return f"; {novel} of the last {len(self._novel)} images are novel to the model"

    def _words(self, drift: Drift) -> str:
        seen = f"{drift.images} image{'s' if drift.images > 1 else ''}"
        if self._state == "learning":
            return f"drift alarm{self._of}: learns from the first images, {seen} so far{self._strange}"
        assert self._watch is not None
        moved = drift.change[self._watch.names.index(drift.foremost)]
        what = f"{_WORDS[drift.foremost]} {moved:+.1f} standard deviations"
        if self._state == "changed":
            uid, frame = self._alarm_at
            words = f"images{self._of} changed, seen at image {frame} of series {uid[:8]}; lately {what} off"
            return f"{words}; look at microscope and specimen; the alarm begins anew with a restart"
        words = f"images{self._of} the same over {seen}"
        if self._known + drift.images < _LEARNS_FROM:
            words += f" (what is usual is learnt until {_LEARNS_FROM})"
        words += f"; most off: {what}{self._strange}"
        if drift.correlated:
            words += (
                "; neighbouring images are alike: false alarms are more frequent, make drift.block larger"
            )
        return words


def _values(result: MicrographResult) -> Mapping[str, float]:
    """Return what the alarm follows, by name; empty where something is no number."""
    if result.statistics is None or result.morphology is None:
        return {}
    if result.provenance.model.sha256 and not result.fingerprints:
        return {}  # too small for the network
    values = {name: float(getattr(result.statistics, name)) for name in STATISTICS}
    # Without two phases there is no fraction; but a stream that goes black has changed.
    fraction = result.morphology.fraction
    values["fraction"] = fraction if np.isfinite(fraction) else 0.0
    if result.novelty is not None:
        values["latent_distance"] = result.novelty.latent_distance
        if result.novelty.code_divergence_bits is not None:
            values["code_divergence_bits"] = result.novelty.code_divergence_bits
    return values if np.isfinite(list(values.values())).all() else {}

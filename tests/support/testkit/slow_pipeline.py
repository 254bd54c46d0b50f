"""A pipeline whose frames say what happens to the process that computes them."""

from __future__ import annotations

import ctypes
import os
import signal
import struct
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from grainwatch.config import Table
from grainwatch.messages import AnyMessage, ArrayData, LaueResult, ModelInfo, Provenance
from pipelines.frame import BadFrame, Failure, Frame, StreamContext

# Values of pixel [0, 0].
WELL, KILL, SEGFAULT, EXIT, HANG, RAISE, BAD, KILL_ONCE, HALF_ANSWER = range(9)


class Config(Table, frozen=True, kw_only=True):
    sleep_s: float = 0.0
    warm_s: float = 0.0
    offset: int = 0
    hang_at: int = -1  # the map hangs at the frame of this number
    scratch: str = ""
    batch: int = 1
    broken: str = ""


class SlowPipeline:
    """Counts the pixels' sum as peaks, after a sleep, if the frame lets it."""

    def __init__(self, config: Config, context: StreamContext) -> None:
        self.config = config
        self.context = context

    def warm(self) -> None:
        if self.config.broken == "die":
            os._exit(9)
        if self.config.broken == "slow":
            time.sleep(60)
        time.sleep(self.config.warm_s)

    def process(self, frames: Sequence[Frame]) -> list[AnyMessage | Failure]:
        return [self.one(frame) for frame in frames]

    def one(self, frame: Frame) -> AnyMessage | Failure:
        try:
            pixels = frame.image.array()
        except BadFrame as error:
            return Failure(frame.key, str(error))
        self.obey(int(pixels[0, 0]), frame)
        if int(pixels[0, 0]) == BAD:
            return Failure(frame.key, "the frame says it is bad")
        time.sleep(self.config.sleep_s)
        return LaueResult(
            key=frame.key,
            provenance=Provenance(ModelInfo("slow", "1"), config_hash=self.context.config_hash),
            n_peaks=int(pixels.sum(dtype=np.int64)) + self.config.offset,
            peaks=ArrayData.of(np.zeros((0, 4)), "<f4"),
            flags=(f"pid-{os.getpid()}",),
        )

    def obey(self, code: int, frame: Frame) -> None:
        if code == KILL:
            os.kill(os.getpid(), signal.SIGKILL)
        if code == SEGFAULT:
            ctypes.string_at(8)
        if code == EXIT:
            os._exit(7)
        if code == HANG:
            # Holds the interpreter lock, as a stuck C extension does.
            ctypes.PyDLL(None).sleep(600)
        if code == HALF_ANSWER:
            # The head of an answer that never comes: whoever began to read it waits for ever.
            os.write(int(sys.argv[1]), struct.pack("!i", 1000))
            time.sleep(600)
        if code == RAISE:
            raise RuntimeError("the frame says so")
        if code == KILL_ONCE:
            mark = Path(self.config.scratch) / f"killed-{frame.key.frame}"
            if not mark.exists():
                mark.touch()
                os.kill(os.getpid(), signal.SIGKILL)


def build(config: Config, context: StreamContext) -> SlowPipeline:
    if config.broken == "config":
        from grainwatch.config import ConfigError

        raise ConfigError(f"streams.{context.stream}.pipeline.broken: it says it is")
    return SlowPipeline(config, context)


class HangingMap:
    """Hangs at a frame."""

    def __init__(self, frame: int) -> None:
        self.frame = frame

    def add(self, result: AnyMessage) -> Sequence[AnyMessage]:
        assert isinstance(result, LaueResult)
        if result.key.frame == self.frame:
            time.sleep(600)
        return ()

    def finish(self) -> Sequence[AnyMessage]:
        return ()


def aggregator(config: Config, context: StreamContext, series_uid: str) -> HangingMap | None:
    return HangingMap(config.hang_at) if config.hang_at >= 0 else None

"""Running a pipeline on a batch so that whatever happens in it stays in it."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

import msgspec

from daemon.flow.executor import Outcome
from grainwatch.messages import FrameResult
from pipelines.frame import Failure, Frame, Pipeline

log = logging.getLogger(__name__)


def compute(pipeline: Pipeline, frames: Sequence[Frame]) -> list[Outcome]:
    """Return one outcome a frame, in order, with the computing time in the results.

    Pipelines answer bad frames with a `Failure`. What they raise nevertheless is a defect: it is
    logged with its traceback and fails the frame that made it raise, not the worker.
    """
    begin = time.perf_counter()
    try:
        outcomes = pipeline.process(frames)
    except Exception as error:
        log.exception("the pipeline raised on frame %s", ", ".join(str(f.key.frame) for f in frames))
        if len(frames) == 1:
            return [Failure(frames[0].key, f"pipeline error: {type(error).__name__}: {error}", fault=True)]
        return [outcome for frame in frames for outcome in compute(pipeline, [frame])]
    if len(outcomes) != len(frames):
        reason = f"pipeline error: {len(outcomes)} outcomes for {len(frames)} frames"
        return [Failure(f.key, reason, fault=True) for f in frames]
    each_ms = (time.perf_counter() - begin) * 1e3 / max(1, len(frames))
    return [
        msgspec.structs.replace(o, compute_ms=each_ms)
        if isinstance(o, FrameResult) and not o.compute_ms
        else o
        for o in outcomes
    ]

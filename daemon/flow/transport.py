"""What the front process and a worker tell each other: msgpack, never pickles.

Frames and results may come from anywhere; the pixels of a frame travel in the ring.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import msgspec
import numpy as np

from daemon.flow.executor import Outcome
from grainwatch.messages import FrameKey, decode, encode
from pipelines.frame import Failure, Frame, ModelRef
from pipelines.images import unpack_image

#: A task must fit the socket's buffer twice over, so that the front never waits for a worker.
MAX_TASK_BYTES = 48 * 1024


class Setup(msgspec.Struct, tag="setup", frozen=True):
    """The first thing a worker gets: the configuration, how the ring is cut, which models are meant.

    A worker that is started again is told the same, so that no two versions of a model ever answer.
    One in the background computes when nobody else wants to.
    """

    config: bytes
    where: str
    slots: int
    slot_bytes: int
    models: dict[str, ModelRef] = {}
    background: bool = False


class FrameTask(msgspec.Struct, frozen=True):
    """A frame whose pixels lie in slot `slot` of the ring, `nbytes` long."""

    key: FrameKey
    image: dict[str, Any]
    slot: int
    nbytes: int
    acquired: float
    received: float
    grid_index: tuple[int, ...] | None
    position_um: tuple[float, ...] | None
    metadata: dict[str, Any]


class Task(msgspec.Struct, tag="task", frozen=True):
    """Frames of one stream to compute."""

    stream: str
    frames: list[FrameTask]


class Ready(msgspec.Struct, tag="ready", frozen=True):
    """The worker is warm; `engines` says what runs the networks, a line each."""

    engines: tuple[str, ...] = ()


class Fatal(msgspec.Struct, tag="fatal", frozen=True):
    """The worker cannot start; the reason is for an operator."""

    reason: str


class Answer(msgspec.Struct, frozen=True):
    """The outcome of a frame: the payload of a message, or why there is none, as in `Failure`."""

    payload: bytes = b""
    reason: str = ""
    fault: bool = False


class Done(msgspec.Struct, tag="done", frozen=True):
    """The answers to a task, in the order of its frames; `engines` where something else runs them now."""

    answers: list[Answer]
    engines: tuple[str, ...] | None = None


ToWorker: TypeAlias = Setup | Task
ToFront: TypeAlias = Ready | Fatal | Done


def _plain(value: object) -> object:
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    raise TypeError(f"metadata of type {type(value).__name__} cannot travel to a worker")


_encoder = msgspec.msgpack.Encoder(enc_hook=_plain)
_to_worker: msgspec.msgpack.Decoder[ToWorker] = msgspec.msgpack.Decoder(ToWorker)
_to_front: msgspec.msgpack.Decoder[ToFront] = msgspec.msgpack.Decoder(ToFront)


def pack(message: ToWorker | ToFront) -> bytes:
    """Return the bytes of a message.

    Raises
    ------
    TypeError
        If a frame's metadata are not plain values.
    """
    return _encoder.encode(message)


def read_in_worker(data: bytes) -> ToWorker:
    """Read what the front sent."""
    return _to_worker.decode(data)


def read_in_front(data: bytes) -> ToFront:
    """Read what a worker sent.

    Raises
    ------
    msgspec.ValidationError, msgspec.DecodeError
        If the worker sent garbage.
    """
    return _to_front.decode(data)


def frame_task(frame: Frame, image: dict[str, Any], slot: int, nbytes: int) -> FrameTask:
    """Describe a frame whose pixels were put into the ring."""
    return FrameTask(
        key=frame.key,
        image=image,
        slot=slot,
        nbytes=nbytes,
        acquired=frame.acquired,
        received=frame.received,
        grid_index=frame.grid_index,
        position_um=frame.position_um,
        metadata=dict(frame.metadata),
    )


def frame_of(task: FrameTask, data: memoryview) -> Frame:
    """Put a frame together again over the pixels in the ring.

    Raises
    ------
    pipelines.frame.BadFrame
        If header and pixels do not belong together.
    """
    return Frame(
        key=task.key,
        image=unpack_image(task.image, data),
        acquired=task.acquired,
        received=task.received,
        grid_index=task.grid_index,
        position_um=task.position_um,
        metadata=task.metadata,
    )


def answer_of(outcome: Outcome) -> Answer:
    """Pack an outcome."""
    if isinstance(outcome, Failure):
        return Answer(reason=outcome.reason or "failed without a reason", fault=outcome.fault)
    return Answer(payload=encode(outcome))


def outcome_of(answer: Answer, key: FrameKey) -> Outcome:
    """Read an outcome; what cannot be read is a failure of that frame."""
    if answer.reason:
        return Failure(key, answer.reason, answer.fault)
    try:
        return decode(answer.payload)
    except (msgspec.ValidationError, msgspec.DecodeError) as error:
        return Failure(key, f"the worker's result cannot be read: {error}", fault=True)

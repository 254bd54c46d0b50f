"""What a shadow does when comparing goes wrong."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future

import numpy as np
import pytest
from testkit.process import eventually

from daemon.flow.executor import Outcome
from daemon.flow.local import LocalExecutor
from daemon.flow.shadow import Pair, Shadow
from grainwatch.config import parse_config
from grainwatch.messages import FrameKey
from pipelines.frame import Failure, Frame, PlainImage

CONFIG = b"""
[daemon]
workers = 0
[streams.s.source]
type = "replay"
[streams.s.pipeline]
type = "laue"
"""


class Refusing(LocalExecutor):
    """Has the same answer to every frame."""

    def submit(self, stream: str, batch: Sequence[Frame]) -> Future[list[Outcome]]:
        future: Future[list[Outcome]] = Future()
        future.set_result([Failure(frame.key, "no") for frame in batch])
        return future


def test_comparisons_that_are_lost_are_said_once_and_until_it_works_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    compared: list[int] = []

    def take(pair: Pair) -> None:
        if pair.key.frame < 5:
            raise OSError("no space left on device")
        compared.append(pair.key.frame)

    config, config_hash = parse_config(CONFIG, "x")
    shadow = Shadow(Refusing(config, config_hash, "x"), 1.0, ["s"], take)

    def both(number: int) -> None:
        frame = Frame(FrameKey("s", "u" * 32, number), PlainImage(np.zeros((2, 2), np.uint16)))
        shadow.offer("s", [frame])
        shadow.note(frame.key, Failure(frame.key, "no"))

    for number in range(5):
        both(number)
    eventually(lambda: shadow.problem)
    assert shadow.problem == "comparisons are lost: OSError: no space left on device"
    both(5)
    eventually(lambda: compared == [5])
    eventually(lambda: not shadow.problem)
    shadow.close()
    assert caplog.text.count("comparisons are lost") == 1

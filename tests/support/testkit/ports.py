"""Ports of this machine that a test may take a moment later."""

from __future__ import annotations

import random
import socket
from contextlib import ExitStack

# Below what systems hand out by themselves (32768 on), so that no connection takes one in between.
_RANGE = range(20_000, 32_000)


def free_ports(count: int = 1) -> tuple[int, ...]:
    """Return ports of the loopback interface that nobody has, one after the other."""
    draw = random.SystemRandom()
    for _ in range(1000):
        first = draw.choice(_RANGE[: -count + 1 or None])
        with ExitStack() as held:
            try:
                for port in range(first, first + count):
                    held.enter_context(socket.socket()).bind(("127.0.0.1", port))
            except OSError:
                continue
        return tuple(range(first, first + count))
    raise OSError("no free port")


def free_address() -> str:
    """Return the address of one such port."""
    return f"tcp://127.0.0.1:{free_ports()[0]}"

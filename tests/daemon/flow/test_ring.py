from __future__ import annotations

import os

import pytest

from daemon.flow.ring import FrameTooLarge, Ring, RingView


def test_what_is_put_is_seen_by_the_other_side_without_a_name() -> None:
    ring = Ring(4, 5000)
    other = RingView(ring.fd, ring.slots, ring.slot_bytes)
    data = os.urandom(5000)
    slots = [ring.put(memoryview(data)) for _ in range(4)]
    assert sorted(s for s in slots if s is not None) == [0, 1, 2, 3]
    assert ring.put(memoryview(b"x")) is None
    assert all(bytes(other.view(s, 5000)) == data for s in slots if s is not None)
    name = os.readlink(f"/proc/self/fd/{ring.fd}")
    assert name.endswith(" (deleted)")
    assert not os.path.exists(name)
    ring.close()


def test_a_worker_cannot_write() -> None:
    ring = Ring(2, 4096)
    view = RingView(ring.fd, ring.slots, ring.slot_bytes).view(0, 10)
    with pytest.raises(TypeError):
        view[0] = 1
    ring.close()


def test_a_slot_is_free_with_its_last_reference() -> None:
    ring = Ring(2, 4096)
    slot = ring.put(memoryview(b"abc"))
    assert slot is not None
    ring.retain(slot)
    ring.release(slot)
    assert ring.free() == 1
    ring.release(slot)
    assert ring.free() == 2
    with pytest.raises(ValueError, match="is free"):
        ring.release(slot)
    with pytest.raises(ValueError, match="is free"):
        ring.retain(slot)
    ring.close()


def test_the_slot_freed_last_is_used_first() -> None:
    ring = Ring(8, 4096)
    first = ring.put(memoryview(b"a"))
    assert first is not None
    for _ in range(20):
        ring.release(first)
        assert ring.put(memoryview(b"b")) == first
    ring.close()


def test_a_frame_larger_than_a_slot_says_what_to_raise() -> None:
    ring = Ring(2, 4096)
    with pytest.raises(FrameTooLarge, match=r"5000 bytes .* 4096: raise ring.slot_bytes"):
        ring.put(memoryview(bytes(5000)))
    assert ring.free() == 2
    ring.close()


def test_only_touched_pages_cost_memory() -> None:
    ring = Ring(64, 32 * 1024 * 1024)
    slot = ring.put(memoryview(bytes(100_000)))
    assert slot is not None
    assert os.fstat(ring.fd).st_size == ring.total_bytes
    assert os.fstat(ring.fd).st_blocks * 512 < 1_000_000
    ring.close()

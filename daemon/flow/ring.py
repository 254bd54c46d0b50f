"""Shared memory between the front process and its workers: slots that hold a frame each.

The memory has no name. It is an anonymous file that workers inherit as a descriptor, so that the
kernel frees it with the last process that has it open, however those processes die; there is
nothing to clean up after kill -9 and nothing that a stale segment could collide with.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import threading

from grainwatch.config import ConfigError


class FrameTooLarge(ValueError):
    """A frame does not fit a slot; the message says what to raise."""


class Ring:
    """The front's side: `slots` slots of `slot_bytes`, with reference counts. Safe between threads.

    Only pages that frames touched cost memory; the slot freed last is used first, so that a
    calm stream touches few.
    """

    def __init__(self, slots: int, slot_bytes: int) -> None:
        page = mmap.PAGESIZE
        self.slots = slots
        self.slot_bytes = -(-slot_bytes // page) * page
        try:
            self.fd = _anonymous_file()
            os.ftruncate(self.fd, self.slots * self.slot_bytes)
            self._memory = mmap.mmap(self.fd, self.slots * self.slot_bytes)
        except OSError as error:
            raise ConfigError(
                f"ring.slots x ring.slot_bytes: {slots} x {slot_bytes} bytes of shared memory cannot be had:"
                f" {error.strerror}"
            ) from error
        self._free = list(range(slots - 1, -1, -1))
        self._references = [0] * slots
        self._lock = threading.Lock()
        self._closed = False

    @property
    def total_bytes(self) -> int:
        """Size of the whole ring."""
        return self.slots * self.slot_bytes

    def free(self) -> int:
        """Return how many slots are free."""
        return len(self._free)

    def put(self, data: memoryview) -> int | None:
        """Copy a frame into a free slot, with one reference; None when no slot is free, or it is closed.

        Raises
        ------
        FrameTooLarge
            If it is larger than a slot.
        """
        if data.nbytes > self.slot_bytes:
            raise FrameTooLarge(
                f"frame of {data.nbytes} bytes is larger than a slot of {self.slot_bytes}:"
                " raise ring.slot_bytes"
            )
        with self._lock:
            if self._closed or not self._free:
                return None
            slot = self._free.pop()
            self._references[slot] = 1
            at = slot * self.slot_bytes
            # With the lock, so that it is not closed meanwhile.
            self._memory[at : at + data.nbytes] = data.cast("B")
        return slot

    def retain(self, slot: int) -> None:
        """Add a reference."""
        with self._lock:
            if self._references[slot] < 1:
                raise ValueError(f"slot {slot} is free")
            self._references[slot] += 1

    def release(self, slot: int) -> None:
        """Take a reference away; the last one frees the slot."""
        with self._lock:
            if self._references[slot] < 1:
                raise ValueError(f"slot {slot} is free")
            self._references[slot] -= 1
            if not self._references[slot]:
                self._free.append(slot)

    def view(self, slot: int, nbytes: int) -> memoryview:
        """Return the first `nbytes` of a slot, read-only, without a copy."""
        return _window(self._memory, slot * self.slot_bytes, nbytes)

    def close(self) -> None:
        """Give the memory back. Views that are still held keep the mapping alive until they go."""
        with self._lock:
            self._closed = True
            os.close(self.fd)
            try:
                self._memory.close()
            except BufferError:
                # A view of a slot is still referenced; the mapping goes when that view does.
                return


class RingView:
    """A worker's side: the same memory, read-only."""

    def __init__(self, fd: int, slots: int, slot_bytes: int) -> None:
        self._slot_bytes = slot_bytes
        self._memory = mmap.mmap(fd, slots * slot_bytes, prot=mmap.PROT_READ)

    def view(self, slot: int, nbytes: int) -> memoryview:
        """Return the first `nbytes` of a slot, without a copy."""
        return _window(self._memory, slot * self._slot_bytes, nbytes)


def _window(memory: mmap.mmap, at: int, nbytes: int) -> memoryview:
    return memoryview(memory)[at : at + nbytes].toreadonly()


def _anonymous_file() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("grainwatch-ring", os.MFD_CLOEXEC)
    # No memfd (macOS): a file that has lost its name before anything is in it.
    with tempfile.TemporaryFile(prefix="grainwatch-ring-") as file:
        return os.dup(file.fileno())

"""Frames that killed a worker, kept as they came for somebody to look at."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import msgspec

from daemon.flow.transport import FrameTask

log = logging.getLogger(__name__)


class Quarantine:
    """A folder of the last `keep` such frames.

    Each is a pair: NAME.json with the key, the header of the image and the reason, NAME.bin with
    the bytes of the image as the instrument sent them.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder
        self._keep = keep

    def put(self, stream: str, task: FrameTask, data: memoryview, reason: str) -> None:
        """Keep a frame; a folder that cannot be written costs the copy, not the daemon."""
        if not self._keep:
            return
        key = task.key
        channel = re.sub(r"[^A-Za-z0-9_-]", "_", key.channel)
        name = f"{stream}-{key.series_uid[:8]}-{key.frame:06d}{'-' + channel if channel else ''}"
        description = {"stream": stream, "reason": reason, "frame": task}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / f"{name}.bin").write_bytes(data)
            (self.folder / f"{name}.json").write_bytes(msgspec.json.encode(description, enc_hook=str))
            self._forget()
        except OSError as error:
            log.error("%s: the frame that killed a worker cannot be kept: %s", self.folder, error.strerror)

    def _forget(self) -> None:
        kept = sorted(self.folder.glob("*.json"), key=lambda p: p.stat().st_mtime)
        for old in kept[: -self._keep]:
            old.unlink(missing_ok=True)
            old.with_suffix(".bin").unlink(missing_ok=True)

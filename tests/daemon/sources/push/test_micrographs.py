"""Micrographs that are pushed: what their microscope says of them comes along."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from testkit.push import Receiver, wait_for

from daemon.sources.folder.microscope import VENDORS, Microscope
from grainwatch.push import ImagePusher
from pipelines.micrograph.frame_acquisition import acquisition_of


def test_micrographs_come_with_what_their_microscope_says(tmp_path: Path) -> None:
    picture = np.arange(64 * 80, dtype=np.uint8).reshape(64, 80)
    with Receiver(tmp_path, mixed=True) as receiver, ImagePusher(receiver.address, "sem") as pusher:
        for number, vendor in enumerate(VENDORS):
            (_, content), *texts = Microscope(vendor, pixel_size_um=0.5).files("a.tif", picture)
            path = tmp_path / f"a_{number}.tif"
            path.write_bytes(content)
            pusher.push_file(path, number, sidecars={name: text.decode() for name, text in texts})
        Image.fromarray(np.dstack([picture, picture // 2, picture // 3])).save(tmp_path / "colour.tif")
        pusher.push_file(tmp_path / "colour.tif", len(VENDORS), metadata={"pixel_size_um": 2.0})
        wait_for(lambda: len(receiver.frames) == 6)
    acquisitions = [acquisition_of(taken.frame) for taken in receiver.frames]
    assert [a.pixel_size_um for a in acquisitions] == pytest.approx([0.5] * 5 + [2.0])
    assert [a.flags for a in acquisitions] == [()] * 6
    assert acquisitions[3].source == "a.txt"
    assert receiver.frames[5].frame.image.shape == (64, 80, 3)

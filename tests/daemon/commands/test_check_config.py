from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from daemon.commands.check_config import describe
from grainwatch.config import ConfigError, read_config
from pipelines.laue.geometry import Calibration
from pipelines.laue.lauetools_files import write_det


@pytest.fixture
def good(tmp_path: Path) -> Path:
    write_det(
        tmp_path / "geometry.det", Calibration(70.0, 1024.0, 1024.0, 0.4, 0.3, 0.08, (2048, 2048), "sCMOS")
    )
    config = tmp_path / "config.toml"
    config.write_text(
        f"""
[daemon]
state_dir = "{tmp_path}/state"
runtime_dir = "{tmp_path}/run"
[streams.laue]
source = {{type = "dectris-v2", address = "tcp://127.0.0.1:31001"}}
intake = {{policy = "decimate", keep_every = 5}}
scan = {{shape = [10, 20], snake = true}}
[streams.laue.pipeline]
type = "laue"
materials = ["Cu"]
geometry = "{tmp_path}/geometry.det"
[sinks.zmq]
results = "tcp://127.0.0.1:31100"
[sinks.hdf5]
folder = "{tmp_path}/results"
"""
    )
    return config


def check(config: Path) -> list[str]:
    return describe(*read_config(config), str(config))


def test_it_says_what_a_daemon_would_do_and_does_nothing(good: Path) -> None:
    said = "\n".join(check(good))
    for words in (
        f"state in {good.parent}/state, 2 workers",
        "stream laue: dectris-v2 -> laue\n  materials: Cu\n"
        f"  geometry: sCMOS of 2048 x 2048 pixels, 70.000 mm from the sample ({good.parent}/geometry.det)\n"
        "  energy band: 5 to 22 keV\n  sample frame: tilt40\n"
        "  threshold: peaks 5.3 sigma above the background\n  scan: 10 x 20 points, snake\n"
        "  source: address = tcp://127.0.0.1:31001",
        "64 deep, 256 MiB, 1 of 5 kept, then wait",
        "sink zmq: results = tcp://127.0.0.1:31100",
        f"sink hdf5: folder = {good.parent}/results",
    ):
        assert words in said
    assert sorted(p.name for p in good.parent.iterdir()) == ["config.toml", "geometry.det"]


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (
            "geometry.det",
            "none.det",
            r"config\.toml: streams\.laue\.pipeline\.geometry: .*none\.det: cannot be read: no such file$",
        ),
        ('"Cu"', '"Unobtainium"', r"config\.toml: streams\.laue\.pipeline\.materials: .*Unobtainium"),
        (
            "tcp://127.0.0.1:31001",
            "127.0.0.1:31001",
            r"streams\.laue\.source.*address: expected tcp://host:port",
        ),
        ("tcp://127.0.0.1:31100", "tcp://127.0.0.1", r"sinks\.zmq\.results: expected an address"),
        ("tcp://127.0.0.1:31100", "tcp://127.0.0.1:70000", r"sinks\.zmq\.results: expected a port"),
        ("[10, 20]", "[10, 0]", r"streams\.laue\.scan\.shape: expected 1 to 3 positive"),
        (
            "decimate",
            "sometimes",
            r"streams\.laue\.intake\.policy: .*sometimes.* one of 'block', 'drop-oldest'",
        ),
        ("keep_every = 5", "keep = 5", r"streams\.laue\.intake: .*`keep`"),
        ("[sinks.hdf5]", "[sinks.hdf6]", r"sinks\.hdf6\.type: 'hdf6' is not a known type; known: hdf5, zmq"),
    ],
)
def test_what_is_wrong_is_named(good: Path, old: str, new: str, words: str) -> None:
    text = good.read_text()
    assert old in text
    good.write_text(text.replace(old, new))
    with pytest.raises(ConfigError, match=words):
        check(good)


def test_a_folder_that_cannot_be_made_is_named(good: Path) -> None:
    good.write_text(good.read_text().replace(f"{good.parent}/results", f"{good}/results"))
    with pytest.raises(ConfigError, match=r"sinks\.hdf5\.folder: .*config\.toml is not a folder"):
        check(good)


@pytest.mark.skipif(os.getuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_is_named(good: Path) -> None:
    locked = good.parent / "locked"
    locked.mkdir(mode=0o500)
    good.write_text(good.read_text().replace(f"{good.parent}/state", f"{locked}/state"))
    with pytest.raises(ConfigError, match=r"daemon\.state_dir: the folder .*locked cannot be written"):
        check(good)


@pytest.mark.system
def test_the_command_ends_with_good_or_with_one_line(good: Path) -> None:
    command = [sys.executable, "-m", "grainwatch", "check-config", str(good)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.endswith("config.toml: good\n")
    good.write_text("x = 1\n")
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        ("[sinks.hdf5]", "[sinks.hdf5]\nflush_s = 7.0", r"sinks\.hdf5\.flush_s: expected more than 0"),
        ("[sinks.zmq]", "[sinks.zmq]\nring_mib = 0", r"sinks\.zmq\.ring_mib: expected 1 or more"),
        ("[sinks.hdf5]", "[sinks.hdf5]\nedge.depth = 0", r"sinks\.hdf5\.edge: depth: expected 1 or more"),
        (
            "[sinks.hdf5]",
            "[sinks.hdf5]\nfodler = 'x'",
            r"`fodler`: did you mean folder\? Known keys: folder, flush_s",
        ),
        ("[daemon]", "[daemon]\nname = 'a/b'", r"daemon\.name: expected 1 to 64 characters"),
        ("keep_every = 5", "mib = 0", r"intake: mib: expected 1 or more"),
    ],
)
def test_what_run_would_refuse_is_refused(good: Path, before: str, after: str, words: str) -> None:
    good.write_text(good.read_text().replace(before, after))
    with pytest.raises(ConfigError, match=words):
        describe(*read_config(good), str(good))

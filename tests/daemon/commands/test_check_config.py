from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from daemon.commands.check_config import check_config, describe
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


@pytest.mark.parametrize("key", ["[sinks.hdf5]\nfolder", "state_dir"])
def test_a_folder_that_refuses_even_an_administrator_is_named(good: Path, key: str) -> None:
    # Its permissions say that it can be written, and the daemon could not start.
    text = re.sub(rf'{re.escape(key)} = ".*"', f'{key} = "/proc/results"', good.read_text())
    good.write_text(text)
    with pytest.raises(ConfigError, match=r"(folder|state_dir): the folder /proc cannot be written"):
        check(good)


def test_too_little_room_for_results_is_said_before_the_start(good: Path) -> None:
    good.write_text(good.read_text() + "reserve_mib = 1_000_000_000\n")
    with pytest.raises(
        ConfigError, match=r"sinks\.hdf5\.folder: .*results cannot be written to \(only .* free"
    ):
        check(good)
    assert not (good.parent / "results").exists()


def test_what_lies_in_a_folder_is_left_alone(good: Path) -> None:
    (good.parent / "results").mkdir()
    (good.parent / "results" / "old.h5").touch()
    check(good)
    assert [path.name for path in (good.parent / "results").iterdir()] == ["old.h5"]


def test_results_that_catch_up_would_not_find_are_a_warning(
    good: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(good.parent)  # as the command does: relative folders count from the file

    def warnings() -> list[str]:
        return [line for line in check(good) if "warning" in line]

    text = good.read_text()
    for other, many in (("elsewhere", 1), ("results", 0), ("results/../results", 0)):
        line = f'[sinks.zmq]\nresults_dir = "{good.parent}/{other}"'
        good.write_text(text.replace("[sinks.zmq]", line))
        assert len(warnings()) == many
    good.write_text(text)
    assert warnings() == []
    good.write_text(text.replace("[sinks.zmq]", '[sinks.zmq]\nresults_dir = "/elsewhere"'))
    assert warnings() == [
        f"warning: sinks.zmq.results_dir is /elsewhere and sinks.hdf5.folder is {good.parent}/results:"
        " who asks for older results gets none; make them the same folder"
    ]
    good.write_text(text.replace("[sinks.zmq]", '[sinks.zmq]\nresults_dir = "/elsewhere"\ncatch_up = ""'))
    assert warnings() == []  # nobody can ask


@pytest.fixture
def folder_of_images(tmp_path: Path) -> Path:
    config = tmp_path / "config.toml"
    config.write_text(
        f"""
[daemon]
state_dir = "{tmp_path}/state"
runtime_dir = "{tmp_path}/run"
[streams.sem]
source = {{type = "folder", path = "images"}}
pipeline = {{type = "micrograph"}}
"""
    )
    return config


def said_of(config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(config.parent)  # the command changes to it
    check_config(config)
    return capsys.readouterr().out


def test_a_source_that_is_not_there_yet_is_a_remark(
    folder_of_images: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    images = folder_of_images.parent / "images"
    printed = said_of(folder_of_images, capsys, monkeypatch)
    assert f"  remark: {images} does not exist yet: it is waited for\n" in printed
    assert printed.endswith("config.toml: good\n")
    images.mkdir()
    assert "remark" not in said_of(folder_of_images, capsys, monkeypatch)
    text = folder_of_images.read_text()
    folder_of_images.write_text(text.replace('"images"', '"images/**/*.tif"'))
    assert "remark" not in said_of(folder_of_images, capsys, monkeypatch)


@pytest.mark.parametrize(
    "source", ['type = "folder", path = "config.toml"', 'type = "replay", files = ["a.tif", "./config.toml"]']
)
def test_the_configuration_is_no_source(
    folder_of_images: Path, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = folder_of_images.read_text()
    folder_of_images.write_text(text.replace('type = "folder", path = "images"', source))
    monkeypatch.chdir(folder_of_images.parent)
    with pytest.raises(
        ConfigError, match=r"streams\.sem\.source\.\w+: .*config\.toml is this configuration file"
    ):
        check_config(Path("config.toml"))


@pytest.mark.system
def test_the_command_ends_with_good_or_with_one_line(good: Path) -> None:
    command = [sys.executable, "-m", "grainwatch", "check-config", str(good)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.endswith("config.toml: good\n")
    good.write_text(good.read_text().replace("[sinks.zmq]", '[sinks.zmq]\nresults_dir = "/elsewhere"'))
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.endswith("config.toml: good, with 1 warning above\n")
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

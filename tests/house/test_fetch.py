"""`make data`: all files, the right ones, together or not at all. With real pip and wheels made here."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

FETCH = Path(__file__).resolve().parents[1] / "data" / "fetch.py"
FRAME = bytes(range(256)) * 40
ANSWER = b"70.775, 941.74, 1082.56\n"


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def wheels(tmp_path: Path) -> Path:
    """A folder with a wheel that holds a frame and an answer."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    with zipfile.ZipFile(folder / "spotlib-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("spotlib/frame.tif", FRAME)
        wheel.writestr("spotlib/calib.det", ANSWER)
        wheel.writestr(
            "spotlib-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: spotlib\nVersion: 1.0\n"
        )
        wheel.writestr(
            "spotlib-1.0.dist-info/WHEEL",
            "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        wheel.writestr("spotlib-1.0.dist-info/RECORD", "")
    return folder


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    return write_manifest(tmp_path / "manifest.json", FRAME)


def write_manifest(path: Path, frame: bytes) -> Path:
    origin = {"wheel": "spotlib==1.0"}
    frame_entry = {"path": "frame.tif.gz", "member": "spotlib/frame.tif", "size": len(frame)}
    answer = {"path": "truth/calib.det", "member": "spotlib/calib.det", "size": len(ANSWER)}
    files = [
        {**origin, **frame_entry, "sha256": sha256(frame)},
        {**origin, **answer, "sha256": sha256(ANSWER)},
    ]
    path.write_text(json.dumps({"files": files}), encoding="utf-8")
    return path


def fetch(
    manifest: Path, target: Path, *arguments: str, index: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run the script as make does; pip sees only the folder ``index``, or nothing."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    environment |= {"PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull}
    if index is not None:
        environment["PIP_FIND_LINKS"] = str(index)
    command = [sys.executable, str(FETCH), "--manifest", str(manifest), "--target", str(target), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)


def files_under(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_files_come_from_the_wheel_and_a_second_run_changes_nothing(
    manifest: Path, wheels: Path, tmp_path: Path
) -> None:
    target = tmp_path / "data"
    first = fetch(manifest, target, index=wheels)
    assert first.returncode == 0, first.stderr
    found = files_under(target)
    assert found.keys() == {"laue/frame.tif.gz", "laue/truth/calib.det"}
    assert gzip.decompress(found["laue/frame.tif.gz"]) == FRAME
    assert found["laue/truth/calib.det"] == ANSWER

    again = fetch(manifest, target)  # no index: it must not need one
    assert again.returncode == 0
    assert "already there" in again.stdout
    assert files_under(target) == found


def test_offline_says_so_and_leaves_nothing(manifest: Path, tmp_path: Path) -> None:
    answer = fetch(manifest, tmp_path / "data")
    assert answer.returncode == 3
    assert "cannot be fetched" in answer.stderr
    assert "spotlib==1.0" in answer.stderr
    assert files_under(tmp_path / "data") == {}


def test_a_folder_of_wheels_serves_a_machine_offline(manifest: Path, wheels: Path, tmp_path: Path) -> None:
    answer = fetch(manifest, tmp_path / "data", "--wheels", str(wheels))
    assert answer.returncode == 0, answer.stderr
    assert len(files_under(tmp_path / "data")) == 2


def test_wrong_content_is_refused_and_what_was_there_stays(wheels: Path, tmp_path: Path) -> None:
    target = tmp_path / "data"
    (target / "laue").mkdir(parents=True)
    (target / "laue" / "kept.txt").write_text("mine", encoding="utf-8")
    wrong = write_manifest(tmp_path / "wrong.json", FRAME + b"x")
    answer = fetch(wrong, target, "--wheels", str(wheels))
    assert answer.returncode == 1
    assert "spotlib/frame.tif in spotlib==1.0 is not the expected file" in answer.stderr
    assert files_under(target) == {"laue/kept.txt": b"mine"}


def test_a_broken_wheel_is_named(manifest: Path, wheels: Path, tmp_path: Path) -> None:
    wheel = wheels / "spotlib-1.0-py3-none-any.whl"
    wheel.write_bytes(wheel.read_bytes()[:3000])
    answer = fetch(manifest, tmp_path / "data", "--wheels", str(wheels))
    assert answer.returncode == 1
    assert wheel.name in answer.stderr


@pytest.mark.parametrize(
    "damage", [b"", b"\x1f\x8b", gzip.compress(b"other", mtime=0), gzip.compress(FRAME, mtime=0)[:-9]]
)
def test_a_damaged_file_is_replaced(manifest: Path, wheels: Path, tmp_path: Path, damage: bytes) -> None:
    target = tmp_path / "data"
    assert fetch(manifest, target, "--wheels", str(wheels)).returncode == 0
    (target / "laue" / "frame.tif.gz").write_bytes(damage)
    assert fetch(manifest, target, "--wheels", str(wheels)).returncode == 0
    assert gzip.decompress((target / "laue" / "frame.tif.gz").read_bytes()) == FRAME


def test_the_real_manifest_fits_the_truth_at_hand(truth_dir: Path) -> None:
    """Every file that the tests read is one that `make data` fetches, with the same content."""
    manifest = json.loads((FETCH.parent / "manifest.json").read_text(encoding="utf-8"))
    for file in manifest["files"]:
        content = (truth_dir / file["path"]).read_bytes()
        content = gzip.decompress(content) if file["path"].endswith(".gz") else content
        assert sha256(content) == file["sha256"], file["path"]
        assert len(content) == file["size"]

"""What the checkout as a whole must keep to."""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("grainwatch", "pipelines", "daemon", "offline_training")


def tracked() -> list[Path]:
    """Return the files that git has, or will have after the next commit of what lies here."""
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        answer = subprocess.run(command, capture_output=True, check=False)
    except FileNotFoundError:
        pytest.skip("git is not installed")
    if answer.returncode:
        pytest.skip("not a git checkout")
    paths = [ROOT / name for name in answer.stdout.decode().split("\0") if name]
    return [path for path in paths if path.is_file()]


def third_party_hashes() -> set[str]:
    files = json.loads((ROOT / "tests" / "data" / "manifest.json").read_text(encoding="utf-8"))["files"]
    return {file["sha256"] for file in files if "own" not in file}


def is_third_party(content: bytes, hashes: set[str]) -> bool:
    if content[:2] == b"\x1f\x8b":
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError):
            return False
    return hashlib.sha256(content).hexdigest() in hashes


def test_no_third_party_file_is_committed() -> None:
    hashes = third_party_hashes()
    assert len(hashes) == 19
    assert [path for path in tracked() if is_third_party(path.read_bytes(), hashes)] == []


def test_the_check_for_third_party_files_sees_one(truth_dir: Path) -> None:
    hashes = third_party_hashes()
    assert is_third_party((truth_dir / "nw1_0000.tif.gz").read_bytes(), hashes)
    assert is_third_party((truth_dir / "truth" / "calibGe111.det").read_bytes(), hashes)


def test_modules_stay_short() -> None:
    long = {
        str(path.relative_to(ROOT)): lines
        for package in PACKAGES
        for path in sorted((ROOT / package).rglob("*.py"))
        if (lines := len(path.read_text(encoding="utf-8").splitlines())) > 500
    }
    assert not long, "one idea per module, 500 lines at most"


def test_changelog_has_a_place_for_what_is_new() -> None:
    assert re.search(
        r"^## \[?Unreleased\]?", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE
    )


def documents() -> list[Path]:
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def test_the_readme_names_the_two_commands() -> None:
    commands = fenced_commands((ROOT / "README.md").read_text(encoding="utf-8"))
    assert {"make demo", "make test"} <= set(commands)


@pytest.mark.parametrize("document", documents(), ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_in_documents_exist(document: Path) -> None:
    targets = set(
        re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    )
    registered = sub_commands()
    for command in fenced_commands(document.read_text(encoding="utf-8")):
        words = command.split()
        if words[0] == "make" and len(words) > 1 and "=" not in words[1]:
            assert words[1] in targets, f"{document.name}: `{command}`: the Makefile has no such target"
        if words[0] == "grainwatch" and len(words) > 1 and not words[1].startswith("-"):
            assert words[1] in registered, f"{document.name}: `{command}`: there is no such sub-command"


def fenced_commands(text: str) -> list[str]:
    """Return the lines of fenced shell blocks, without prompts, comments and what commands answer."""
    lines = []
    for language, block in re.findall(r"^```([^\n]*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        if language.strip() in {"", "sh", "bash", "shell", "console"}:
            typed = re.findall(r"^\s*\$ (.*)$", block, re.MULTILINE) or block.splitlines()
            lines += [line.split("#")[0].strip() for line in typed]
    return [line for line in lines if line]


def sub_commands() -> set[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return set(project["entry-points"]["grainwatch.commands"])

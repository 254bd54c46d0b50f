"""What the documents say is true: links lead somewhere, commands run, examples are good."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tomllib
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent

import pytest
from testkit.ports import free_ports

from daemon.config_reference import meanings, reference, structs
from grainwatch.messages import MESSAGES, Crystal
from offline_training.micrograph.recipes import RECIPES
from pipelines.laue.geometry import Calibration
from pipelines.laue.lauetools_files import write_det
from pipelines.micrograph.synthetic import MicrographSimulator, ProcessLaw

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
FIRST_STEPS = DOCS / "tutorial" / "first-steps.md"
PLUG_IN = DOCS / "how-to" / "write-a-plug-in.md"
WATCH_A_FOLDER = DOCS / "how-to" / "watch-a-folder.md"
PUSH_IMAGES = DOCS / "how-to" / "push-images.md"
EXCHANGE_MODELS = DOCS / "how-to" / "exchange-models.md"
READ_RESULTS = DOCS / "how-to" / "read-results-files.md"
STREAM_MICROGRAPHS = DOCS / "how-to" / "stream-micrographs.md"
FINGERPRINT_MICROGRAPHS = DOCS / "how-to" / "fingerprint-micrographs.md"
TRAIN_MICROGRAPHS = DOCS / "how-to" / "train-micrographs.md"
MICROGRAPHS = DOCS / "explanation" / "micrographs.md"
EXAMPLES = sorted((ROOT / "deploy" / "examples").glob("*.toml"))
PORTS = ("31001", "31100", "31101")


@dataclass(frozen=True)
class Block:
    """A fenced block; `mark` is what a comment "docs-test: ..." right above it says."""

    language: str
    text: str
    mark: str

    @property
    def commands(self) -> list[str]:
        """The lines that are typed."""
        return [line[2:] for line in self.text.splitlines() if line.startswith("$ ")]


def blocks(document: Path) -> list[Block]:
    fence = re.compile(
        r"(?:^<!-- docs-test: (?P<mark>[^>]*?) -->\n)?^ *```(?P<language>\w*)\n(?P<text>.*?)^ *```$",
        re.MULTILINE | re.DOTALL,
    )
    found = fence.finditer(document.read_text(encoding="utf-8"))
    return [Block(m["language"], dedent(m["text"]), m["mark"] or "") for m in found]


def documents() -> list[Path]:
    own = [ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "bench/README.md")]
    return own + sorted(DOCS.rglob("*.md"))


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


# Links.


@pytest.mark.parametrize("document", documents(), ids=name)
def test_links_between_documents_lead_somewhere(document: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", document.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    dead = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("https://", "http://")):
            continue
        file, _, heading = target.partition("#")
        path = (document.parent / file).resolve() if file else document
        if not path.exists() or (heading and heading not in anchors(path)):
            dead.append(target)
    assert dead == []


def anchors(document: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", document.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).strip().replace(" ", "-") for h in headings}


def test_every_document_can_be_reached_from_the_readme() -> None:
    seen: set[Path] = set()
    waiting = [ROOT / "README.md"]
    while waiting:
        document = waiting.pop()
        if document in seen or document.suffix != ".md":
            continue
        seen.add(document)
        targets = re.findall(r"\]\(([^)#\s]+)", document.read_text(encoding="utf-8"))
        waiting += [p for t in targets if (p := (document.parent / t).resolve()).is_file()]
    assert [name(d) for d in documents() if d not in seen and d.parent != ROOT] == []


def test_pictures_are_small() -> None:
    for picture in (DOCS / "images").iterdir():
        assert picture.stat().st_size < 300_000, picture


# Blocks.


@pytest.mark.parametrize("document", documents(), ids=name)
def test_blocks_can_be_read(document: Path) -> None:
    for block in blocks(document):
        if block.language == "toml":
            tomllib.loads(block.text)
        elif block.language == "json":
            json.loads(block.text)
        elif block.language == "python":
            compile(block.text, name(document), "exec")


def test_the_tour_of_the_readme_is_made_of_the_first_steps() -> None:
    """So that running the first steps runs the tour."""
    tour = [c for b in blocks(ROOT / "README.md") if b.mark == "run" for c in b.commands]
    steps = iter(c for b in blocks(FIRST_STEPS) if b.mark == "run" for c in b.commands)
    assert len(tour) >= 10
    assert [command for command in tour if command not in steps] == []


# Commands, run as they are written. Ports are the only thing that is changed: others may use them.


def script_of(document: Path, ports: dict[str, str], mark: str = "run") -> str:
    """Return a shell script of all that a document marks, in order, each command shown as it runs."""
    lines = ["set -e"]
    for block in blocks(document):
        if block.mark == mark and block.language == "console":
            for command in block.commands:
                lines += [f"echo '$ {command.replace(chr(39), chr(34))}'", command]
                if " init " in command:
                    lines.append(
                        "sed -i " + " ".join(f"-e 's/:{a}/:{b}/'" for a, b in ports.items()) + " *.toml"
                    )
        elif block.mark == mark and block.language == "python":
            lines.append(f"python - <<'END_OF_BLOCK'\n{block.text}END_OF_BLOCK")
        elif block.mark.startswith("file "):
            lines.append(
                f"cat > {block.mark.removeprefix('file ')} <<'END_OF_BLOCK'\n{block.text}END_OF_BLOCK"
            )
    text = "\n".join(lines) + "\n"
    for port, other in ports.items():
        text = text.replace(f"127.0.0.1:{port}", f"127.0.0.1:{other}")
    return text


def run(script: str, folder: Path, timeout_s: float = 240.0) -> str:
    """Run a script in a folder that looks like a checkout; whatever it starts ends with it."""
    for shown in ("docs", "tests", "deploy"):
        if not (folder / shown).exists():
            (folder / shown).symlink_to(ROOT / shown)
    activate = folder / ".venv" / "bin" / "activate"
    activate.parent.mkdir(parents=True, exist_ok=True)
    activate.touch()
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    log = folder / "output.txt"
    with log.open("wb") as output:
        shell = subprocess.Popen(
            ["bash", "-c", script],
            cwd=folder,
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env={**environment, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
            start_new_session=True,
        )
        try:
            status = shell.wait(timeout_s)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(shell.pid, signal.SIGKILL)
            shell.wait()
    text = log.read_text(encoding="utf-8", errors="replace")
    assert status == 0, text
    return text


@pytest.fixture(scope="module")
def tour(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The first steps, run; the folder that they leave, and all that was printed."""
    folder = tmp_path_factory.mktemp("first-steps")
    # In a row: a subscriber looks for missed messages one port above the results.
    ports = dict(zip(PORTS, map(str, free_ports(3)), strict=True))
    return folder / "tour", run(script_of(FIRST_STEPS, ports), folder)


@pytest.mark.system
def test_the_first_steps_lead_to_crystals(tour: tuple[Path, str]) -> None:
    folder, printed = tour
    (line,) = (folder / "frame.json").read_text().splitlines()
    assert [c["material"] for c in json.loads(line)["crystals"]] == ["Cu", "Cu", "Cu"]
    assert "grainwatch.toml: good" in printed
    assert re.search(r"^laue +\S+ +[\d.]+ +48 ", printed, re.MULTILINE)
    assert "48 measured, 48 with crystals, 6 grains" in printed
    assert "lost: 0" in printed
    assert len((folder / "found.jsonl").read_text().splitlines()) == 3
    assert (folder / "found-0003.png").stat().st_size > 10_000
    assert "laue: received 48, done 48, failed 0, dropped 0, lost 0, missing 0, in flight 0" in printed
    assert (folder / "map.png").stat().st_size > 10_000


def test_keys_of_json_lines_are_described(tour: tuple[Path, str]) -> None:
    (line,) = (tour[0] / "frame.json").read_text().splitlines()
    told = set(re.findall(r"`(\w+)`", (DOCS / "reference" / "commands.md").read_text(encoding="utf-8")))
    found = json.loads(line)
    assert {*found, *found["crystals"][0]} - told == set()


@pytest.mark.system
def test_reading_results_as_written(tour: tuple[Path, str]) -> None:
    printed = run(script_of(READ_RESULTS, {}), tour[0])
    assert "Cu" in printed


@pytest.mark.system
def test_streaming_micrographs_and_reading_them_as_written(tmp_path: Path) -> None:
    results, catch_up = map(str, free_ports(2))
    script = script_of(STREAM_MICROGRAPHS, {"31100": results, "31101": catch_up})
    printed = run(script, tmp_path)
    assert "micrographs.toml: good" in printed
    assert "judges novelty and ln_cooling_rate" in printed
    assert re.search(r"^sem +\S+ +[\d.]+ +8 +8 ", printed, re.MULTILINE)
    assert re.search(r"^sem: images the same over 8 images; most off: ", printed, re.MULTILINE)
    python = printed[printed.index("\nimage ") :]
    for said in ("  fraction 0.", "  ln(cooling rate) ", "  typicality "):
        assert python.count(said) == 8
    assert "sem: received 8, done 8, failed 0, dropped 0, lost 0, missing 0, in flight 0" in printed
    printed = run(script_of(READ_RESULTS, {}, "run micrographs"), tmp_path / "sem-tour")
    assert "images: 8 novel: " in printed
    assert len(re.findall(r"^\d vqvae \(128,\)$", printed, re.MULTILINE)) == 8


@pytest.mark.system
def test_fingerprinting_micrographs_as_written(tmp_path: Path) -> None:
    printed = run(script_of(FINGERPRINT_MICROGRAPHS, {}), tmp_path)
    # What is measured without a network is as it is shown, to the digit.
    shown = re.findall(
        r"^(sem/scan_\d+\.tif: bright .* um, )", FINGERPRINT_MICROGRAPHS.read_text(encoding="utf-8"), re.M
    )
    assert len(shown) == 5
    assert [line for line in shown if line not in printed] == []
    assert len((tmp_path / "found.jsonl").read_text().splitlines()) == 5
    assert (tmp_path / "found-0005.png").stat().st_size > 10_000


@pytest.mark.system
def test_plug_ins_as_written(tmp_path: Path) -> None:
    printed = run(script_of(PLUG_IN, {}), tmp_path)
    assert "lab.toml: good" in printed
    assert "flat: received 20, done 20, failed 0" in printed
    assert len((tmp_path / "counts.csv").read_text().splitlines()) == 20


@pytest.mark.system
def test_watching_a_folder_as_written(tmp_path: Path) -> None:
    printed = run(script_of(WATCH_A_FOLDER, {}), tmp_path)
    assert "folder.toml: good" in printed
    assert "laue: received 6, done 6, failed 0, dropped 0, lost 0, missing 0" in printed
    assert "6 measured, 6 with crystals" in printed
    assert (tmp_path / "tour" / "map.png").stat().st_size > 10_000


@pytest.mark.system
def test_pushing_images_as_written(tmp_path: Path) -> None:
    printed = run(script_of(PUSH_IMAGES, {"31110": str(free_ports()[0])}), tmp_path)
    assert "push.toml: good" in printed
    assert "series 'scan7': 3 images taken" in printed
    assert "3 were there already" in printed
    assert "laue: received 3, done 3, failed 0, dropped 0, lost 0, missing 0" in printed


@pytest.mark.system
def test_exchanging_models_as_written(tmp_path: Path) -> None:
    printed = run(script_of(EXCHANGE_MODELS, {}), tmp_path)
    assert re.search(r"laue-Cu-residual \S+ .* is in the registry: candidate", printed)
    assert "is active; no daemon runs" in printed
    assert "intact, passes its self-test" in printed
    assert "laue: received 1, done 1, failed 0" in printed


# References.


def test_the_reference_of_the_configuration_is_current() -> None:
    written = (DOCS / "reference" / "config.md").read_text(encoding="utf-8")
    assert written == reference(), "python -m daemon.config_reference > docs/reference/config.md"


@pytest.mark.parametrize("struct", structs()[1:], ids=lambda s: f"{s.__module__}.{s.__name__}")
def test_every_key_of_the_configuration_has_a_meaning(struct: type) -> None:
    assert set(meanings(struct)[1]) == set(struct.__struct_fields__)
    assert all(meanings(struct)[1].values())


def test_every_message_is_described() -> None:
    text = (DOCS / "reference" / "messages.md").read_text(encoding="utf-8")
    told = set(re.findall(r"`(\w+)`", text))
    for kind in MESSAGES:
        assert kind.SCHEMA in text
        assert set(kind.__struct_fields__) - told == set()
    assert set(Crystal.__struct_fields__) - told == set()


def test_every_command_has_its_section() -> None:
    commands = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    told = anchors(DOCS / "reference" / "commands.md")
    assert {f"grainwatch-{c}" for c in commands["grainwatch.commands"]} - told == set()


def test_the_law_of_synthetic_micrographs_is_the_one_that_is_told() -> None:
    text, law = MICROGRAPHS.read_text(encoding="utf-8"), ProcessLaw()
    assert f"d = {law.size_um} um · exp(-{law.exponent} ln r) · s" in text
    assert f"f = {law.fraction} - {law.slope} ln r + e" in text
    assert f"a relative standard deviation of {law.size_scatter:.0%}".replace("%", " %") in text
    assert f"a standard deviation of {law.fraction_scatter}" in text
    low, high = MicrographSimulator().ln_cooling_rates
    assert f"drawn evenly from {low:g} to {high:g}" in text


def test_recipes_of_micrographs_have_the_numbers_that_are_told() -> None:
    text = TRAIN_MICROGRAPHS.read_text(encoding="utf-8")
    table = dict(re.findall(r"^\| `(\w+)` \| ([\d.]+) \|", text, re.MULTILINE))
    assert {name: float(value) for name, value in table.items()} == dict(RECIPES["vqvae"]["ema"].values)
    others = {name for kind in ("vae", "pixelcnn") for name in next(iter(RECIPES[kind].values())).values}
    assert others - set(re.findall(r"`(\w+)`", text)) == set()


# Examples.


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= 3


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_example_configurations_are_good(example: Path, tmp_path: Path) -> None:
    from daemon.commands.check_config import describe
    from grainwatch.config import parse_config

    text = example.read_text(encoding="utf-8")
    detector = Calibration(70.0, 511.0, 540.0, 0.4, -0.3, 0.15, (1024, 1024), "lab")
    write_det(tmp_path / "detector.det", detector, material="Cu")
    (tmp_path / "frames").mkdir()
    assert "/data/results" in text
    assert "/etc/grainwatch/detector.det" in text or "micrograph" in example.name
    for path in ("/etc/grainwatch/detector.det", "/data/frames", "/data/sem", "/data/results"):
        text = text.replace(path, str(tmp_path / Path(path).name))
    text = re.sub(r'"/(var|run)/', rf'"{tmp_path}/\1/', text)
    lines = describe(*parse_config(text.encode(), example.name), example.name)
    assert any(line.startswith("stream ") for line in lines)

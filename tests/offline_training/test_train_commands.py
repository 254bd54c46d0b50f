"""The commands of training: what cannot be is told in one line, what can be ends in files."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from testkit.laue import CALIBRATION
from typer.testing import CliRunner

from grainwatch.config import ConfigError
from offline_training.commands import app
from offline_training.commands.common import INSTALL, duration, table, whole_numbers
from pipelines.laue.lauetools_files import write_det

ROOT = Path(__file__).resolve().parents[2]
NO_TORCH = "torch is absent: see docs/how-to/train-a-network.md"
PNG = b"\x89PNG"


@pytest.fixture
def det(tmp_path: Path) -> str:
    write_det(tmp_path / "cal.det", CALIBRATION)
    return str(tmp_path / "cal.det")


@pytest.fixture
def torch() -> None:
    for name in ("torch", "onnxscript"):
        pytest.importorskip(name, reason=NO_TORCH)


def refusal(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments))
    assert isinstance(result.exception, ConfigError), result.output
    return str(result.exception)


def refused(*arguments: str) -> str:
    """Run a command that must be refused in one line; return the line."""
    line = refusal(*arguments)
    assert "\n" not in line
    return line


CIF = """data_x
_cell_length_a {a}
_cell_length_b 4
_cell_length_c 4
_cell_angle_alpha 90
_cell_angle_beta 90
_cell_angle_gamma 90
_symmetry_space_group_name_H-M '{group}'
loop_
_atom_site_label
_atom_site_type_symbol
_atom_site_fract_x
_atom_site_fract_y
_atom_site_fract_z
{sites}
"""


@pytest.mark.usefixtures("torch")
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("nothing of the kind", "not a readable CIF|expected one data block"),
        (CIF.format(a=4, group="P 9 9 9", sites="Cu1 Cu 0 0 0"), "space group .*unknown"),
        (CIF.format(a=9, group="F m -3 m", sites="Cu1 Cu 0 0 0"), "contradicts space group"),
        (CIF.format(a=4, group="P 1", sites="Q1 Qq 0 0 0"), "Q1.*no chemical element"),
    ],
    ids=["no CIF", "unknown group", "wrong group", "no element"],
)
def test_a_cif_that_cannot_be_used_is_told_by_name(tmp_path: Path, det: str, text: str, said: str) -> None:
    cif = tmp_path / "crystal.cif"
    cif.write_text(text)
    line = refused("laue", "-m", str(cif), "-g", det, "--out", str(tmp_path / "out"))
    assert str(cif) in line
    assert re.search(said, line)
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("torch")
@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("-m", "Cuu"), "material 'Cuu' is neither built in nor the path of a CIF"),
        (("-m", "absent.cif"), "absent.cif: no such CIF"),
        (("--energy", "0.5", "1.0"), "Cu reflects nothing in 0.5-1"),
        (("--energy", "22", "5"), "energy band .*expected 0 < lowest < highest"),
        (("--coverage", "1.5"), "coverage 1.5: expected between 0 and 1"),
        (("--steps", "0"), "steps 0: expected 1 or more"),
        (("--recipe", "magic"), "recipe 'magic' is not known; known: residual"),
        (("--spots-each", "5000"), "spots_each 5000: expected 1 to 1024"),
        (("--set", "learning_rat=1"), "'learning_rat=1': expected NAME=VALUE with NAME one of learning_rate"),
        (("--set", "width=1.5"), "'width=1.5': expected a whole number"),
        (("--set", "dropout=2"), "dropout 2: expected 0 to 0.9"),
        (("--recipe", "lauenn-2022", "--set", "blocks=3"), "blocks: this recipe has no such number"),
    ],
)
def test_settings_that_cannot_be_are_told(
    tmp_path: Path, det: str, options: tuple[str, ...], said: str
) -> None:
    given = ["laue", "-g", det, "--out", str(tmp_path / "out"), *options]
    if "-m" not in options:
        given += ["-m", "Cu"]
    assert re.search(said, refused(*given))
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("torch")
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "the file is empty"),
        ("rubbish and more", "expected dd, xcen"),
        ("-70, 977, 931, 0.4, 0.3, 0.0734, 2018, 2016", "dd.*must be positive"),
        ("70, 977, 931, 0.4, 0.3, 0.0, 2018, 2016", "pixel size.*must be positive"),
        (
            "9000, 977, 931, 170, 0.3, 0.0734, 2018, 2016",
            "Cu puts 0 spots on the detector .*check energy band and calibration",
        ),
    ],
    ids=["empty", "words", "behind", "no pixels", "turned away"],
)
def test_a_geometry_that_is_nonsense_is_told(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "bad.det"
    path.write_text(text)
    assert re.search(said, refused("laue", "-m", "Cu", "-g", str(path), "--out", str(tmp_path / "out")))
    path.write_bytes(b"\xff\xfe\x00\x01" * 20)
    assert str(path) in refused("laue", "-m", "Cu", "-g", str(path), "--out", str(tmp_path / "out"))
    absent = refused("laue", "-m", "Cu", "-g", str(tmp_path / "absent.det"), "--out", str(tmp_path / "out"))
    assert "absent.det" in absent


def test_without_torch_it_says_what_to_install(
    tmp_path: Path, det: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for command in ("laue", "laue-curve", "laue-search"):
        first, *commands = refusal(command, "-m", "Cu", "-g", det, "--out", str(tmp_path / "out")).split("\n")
        assert first.endswith("onnxruntime not installed; in the source tree:")
        assert [line.strip() for line in commands] == list(INSTALL)


def test_torch_comes_first_and_by_one_pin_wherever_it_is_named() -> None:
    # The extra alone would take the torch that pulls gigabytes of CUDA.
    pin = re.search(r"^# (torch==\S+),", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pin is not None
    assert INSTALL[0].split()[-1] == pin[1]
    told = [
        page for page in (ROOT / "docs").rglob("*.md") if "training]'" in page.read_text(encoding="utf-8")
    ]
    assert len(told) >= 4
    for page in told:
        assert "\n".join(INSTALL) in page.read_text(encoding="utf-8"), page


@pytest.mark.usefixtures("torch")
def test_the_curve_as_a_command(tmp_path: Path, det: str) -> None:
    out = tmp_path / "curve"
    command = ["laue-curve", "-m", "Cu", "-g", det, "--out", str(out), "--steps", "25", "--cores", "1"]
    command += ["--recipe", "residual", "--max-index", "3"]
    runner = CliRunner()
    first = runner.invoke(app, [*command, "--orientations", "2,40"], catch_exceptions=False)
    assert first.exit_code == 0
    before = json.loads((out / "curve.json").read_text())
    more = runner.invoke(app, [*command, "--orientations", "2", "--seeds", "2"], catch_exceptions=False)
    assert more.exit_code == 0
    after = json.loads((out / "curve.json").read_text())
    assert {k: after["parts"][k] for k in before["parts"]} == before["parts"]
    assert set(after["parts"]) == {"2/0", "40/0", "2/1"}
    few, many = after["curve"]
    assert few["seeds"] == 2
    assert few["validation_accuracy_spread"] > 0
    # Two orientations are learned by heart; forty help with orientations that were never seen.
    assert few["training_accuracy"] > few["validation_accuracy"] + 0.1
    assert many["validation_accuracy"] > few["validation_accuracy"]
    assert 0 < many["five_crystals_recall"] <= many["five_crystals_accuracy"] < 1
    assert many["validation_accuracy"] > 2 * after["baseline"]["most_frequent_class"]
    assert (out / "curve.png").read_bytes().startswith(PNG)
    assert not list(out.glob("*.pt"))
    assert "baselines: most frequent class" in more.output
    assert "steps differ" in refused(*command, "--steps", "26", "--orientations", "2")


@pytest.mark.usefixtures("torch")
def test_a_search_stops_in_its_time_and_goes_on(tmp_path: Path, det: str) -> None:
    from offline_training.laue.preparation import prepare
    from offline_training.laue.search import SearchSettings, run_search

    prepared = prepare("Cu", det, (5.0, 22.0), max_index=2)
    settings = SearchSettings(vary={"learning_rate": (), "width": (32.0, 64.0)}, trials=3, steps=9)
    calls, found = 0, run_search(prepared, settings, tmp_path / "often", budget_s=0.0)
    assert found["best"] is None
    while not found["finished"] and calls < 200:
        calls += 1
        found = run_search(prepared, settings, tmp_path / "often", budget_s=0.01)
    assert found["finished"]
    assert calls > 5
    assert [path.name for path in (tmp_path / "often").iterdir()] == ["search.json"]
    at_once = run_search(prepared, settings, tmp_path / "once")
    assert at_once["best"] == found["best"]
    losses = [
        [rung["log_loss"] for trial in of["trials"] for rung in trial["rungs"]] for of in (at_once, found)
    ]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    # Four trials, then two, then two; the recipe as it is takes part to the end.
    assert [len(trial["rungs"]) for trial in at_once["trials"]].count(3) == 2
    assert len(at_once["trials"][0]["rungs"]) == 3


@pytest.mark.usefixtures("torch")
def test_the_best_of_a_search_is_told_as_training_takes_it(tmp_path: Path, det: str) -> None:
    command = ["laue-search", "-m", "Cu", "-g", det, "--coverage", "0.4", "--cores", "1", "--steps", "3"]
    command += ["--vary", "batch=32", "--grid", "--out", str(tmp_path)]
    result = CliRunner().invoke(app, command, catch_exceptions=False)
    assert result.exit_code == 0
    (line,) = [line for line in result.output.splitlines() if "grainwatch train laue " in line]
    best = json.loads((tmp_path / "search.json").read_text())["best"]
    assert f"--material Cu --geometry {det} --out FOLDER --recipe residual --steps {best['steps']}" in line
    assert ("--set batch=32" in line) == (best["trial"] == 1)
    assert (tmp_path / "search.png").read_bytes().startswith(PNG)


@pytest.mark.usefixtures("torch")
@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--vary", "colour"), "colour: residual has learning_rate"),
        (("--vary", "width=a"), "expected NAME or NAME=0.1,0.2"),
        (("--grid",), "a grid needs values"),
        (("--vary", "dropout=0.1,3"), "dropout 3: expected 0 to 0.9"),
    ],
)
def test_a_search_for_what_there_is_not_is_refused(
    tmp_path: Path, det: str, options: tuple[str, ...], said: str
) -> None:
    line = refused("laue-search", "-m", "Cu", "-g", det, "--out", str(tmp_path), "--trials", "60", *options)
    assert said in line


def test_with_and_without_a_network_side_by_side(tmp_path: Path, det: str) -> None:
    pytest.importorskip("onnxruntime", reason="ONNX Runtime is absent: pip install 'grainwatch[daemon]'")
    command = ["laue-compare", "--bundle", str(ROOT / "bundles" / "Cu"), "-g", det, "--patterns", "4"]
    result = CliRunner().invoke(
        app, [*command, "--grains", "0,2", "--out", str(tmp_path / "a")], catch_exceptions=False
    )
    assert result.exit_code == 0
    none, two = json.loads((tmp_path / "a" / "compare.json").read_text())["rows"]
    for way in ("with", "without"):
        assert (none[way]["truths"], none[way]["false"], none[way]["found_share"]) == (0, 0, None)
        assert (two[way]["found"], two[way]["truths"], two[way]["false"]) == (8, 8, 0)
        # Of 8 of 8 the lower end is (α/2)^(1/8).
        assert two[way]["found_95"] == pytest.approx([0.025 ** (1 / 8), 1.0])
        assert two[way]["misorientation_deg"] < 0.05
        assert len(two[way]["times_s"]) == 4
    # The same patterns, pattern by pattern, whatever else is compared.
    alone = CliRunner().invoke(app, [*command, "--grains", "2", "--out", str(tmp_path / "b")])
    assert alone.exit_code == 0
    again = json.loads((tmp_path / "b" / "compare.json").read_text())["rows"][0]
    assert again["with"]["misorientation_deg"] == two["with"]["misorientation_deg"]
    assert (tmp_path / "a" / "compare.png").read_bytes().startswith(PNG)
    assert "found (95 % interval)" in result.output


def test_a_comparison_that_cannot_be_is_refused(tmp_path: Path, det: str) -> None:
    pytest.importorskip("onnxruntime", reason="ONNX Runtime is absent: pip install 'grainwatch[daemon]'")
    copper = ("laue-compare", "--bundle", str(ROOT / "bundles" / "Cu"), "--out", str(tmp_path / "out"))
    write_det(tmp_path / "far.det", CALIBRATION.with_parameters(dd_mm=300.0))
    assert "dd_mm 300 is outside" in refused(*copper, "-g", str(tmp_path / "far.det"))
    assert "material Ge" in refused(*copper, "-g", det, "-m", "Ge")
    assert "2 --material for 1 --bundle" in refused(*copper, "-g", det, "-m", "Cu", "-m", "Ge")
    assert "--grains '1;2': expected whole numbers with commas" in refused(
        *copper, "-g", det, "--grains", "1;2"
    )
    assert "grains (99,): expected numbers from 0" in refused(*copper, "-g", det, "--grains", "99")
    absent = ("laue-compare", "--bundle", str(tmp_path / "none"), "--out", str(tmp_path / "out"), "-g", det)
    assert "no such bundle" in refused(*absent)
    assert not (tmp_path / "out").exists()


def test_words_for_people() -> None:
    assert [duration(s) for s in (0.4, 42, 200, 7500)] == ["0 s", "42 s", "3 min 20 s", "2 h 5 min"]
    assert whole_numbers("10,20", "--x") == (10, 20)
    assert table(["a", "b"], [["one", "2"], ["x", "333"]]) == "a      b\none    2\nx    333"

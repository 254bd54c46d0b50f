"""Shared fixtures: where the truth lies, and honest skips."""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Generator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

ROOT = Path(__file__).resolve().parent.parent
NO_TRUTH = "third-party Laue frames are absent: run `make data` or set GRAINWATCH_DATA"


# How long an example takes says how busy the machine is; all else is as hypothesis has it here.
settings.register_profile("busy", settings(), deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")


def data_dir() -> Path | None:
    """Return the folder of third-party truth: $GRAINWATCH_DATA, ../shared/data or .data (`make data`).

    A folder that is named but holds nothing is an error, not a reason to look elsewhere.
    """
    configured = os.environ.get("GRAINWATCH_DATA")
    if configured:
        if not (Path(configured) / "laue").is_dir():
            raise pytest.UsageError(f"GRAINWATCH_DATA={configured} has no folder laue")
        return Path(configured)
    for candidate in (ROOT.parent / "shared" / "data", ROOT / ".data"):
        if (candidate / "laue").is_dir():
            return candidate
    return None


@pytest.fixture(scope="session")
def truth_dir() -> Path:
    """The ``laue`` folder of the truth; the test is skipped where it is absent."""
    found = data_dir()
    if found is None:
        pytest.skip(NO_TRUTH)
    return found / "laue"


def pytest_configure() -> None:
    """Refuse a wrong GRAINWATCH_DATA before any test has run."""
    data_dir()
    # A suite that was started in the background ignores Ctrl-C, and so would the processes of its tests.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> Generator[None, None, None]:
    """End with what was not tested: a skip that nobody sees is a test that nobody has."""
    yield
    counts = Counter(_reason(report) for report in terminalreporter.stats.get("skipped", []))
    found = data_dir()
    terminalreporter.section("what was skipped")
    terminalreporter.write_line(f"third-party truth: {found / 'laue' if found else 'absent'}")
    terminalreporter.write_line(f"tests skipped: {counts.total()}")
    for reason, count in counts.most_common():
        terminalreporter.write_line(f"  {count:4d}  {reason}")


def _reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    text = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return text.removeprefix("Skipped: ")

"""The ledger: frames a second with its file on this disk, and its share of a core at 2 kHz."""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

from bench.report import Report
from daemon.flow.ledger import Ledger
from daemon.flow.ledger_store import audit
from grainwatch.messages import FrameKey

#: The rate that the ledger was asked to hold, frames/s.
ASKED_HZ = 2000
#: Frames in flight meanwhile, and how many of a hundred end as failed or dropped.
IN_FLIGHT = 64
BAD_PERCENT = 10


def rows(report: Report) -> None:
    """Add the rows."""
    frames = report.scale(full=40_000, quick=8_000)
    rates = [_run(frames, None)[0] for _ in range(report.scale(full=5, quick=3))]
    costs, shares = [], []
    seconds = report.scale(full=10, quick=3)
    for _ in range(2):
        rate, worst_s, share = _run(seconds * ASKED_HZ, ASKED_HZ)
        shares.append(share)
        costs.append(worst_s)
        if rate < 0.98 * ASKED_HZ:
            raise RuntimeError(f"the ledger does not hold {ASKED_HZ} frames/s: {rate:.0f}")
    said = f"{IN_FLIGHT} in flight, {BAD_PERCENT} % exceptions, a transaction each 0.1 s, file balanced"
    report.add(
        "ledger, frames received and ended",
        statistics.median(rates),
        "frames/s",
        at_least=ASKED_HZ,
        conditions=f"median of {len(rates)} x {frames} frames, {said}",
        data={"rates_hz": rates},
    )
    report.add(
        f"ledger at {ASKED_HZ} frames/s, share of a core",
        100 * statistics.median(shares),
        "%",
        conditions=f"{seconds} s, {said}",
        data={"shares": shares},
    )
    report.add(
        f"ledger at {ASKED_HZ} frames/s, longest wait of the flow in it",
        1e3 * max(costs),
        "ms",
        conditions=f"largest of {2 * seconds * ASKED_HZ} frames",
        data={"worst_s": costs},
    )


def _run(frames: int, rate_hz: float | None) -> tuple[float, float, float]:
    """Put frames through a ledger; return frames/s, the longest time of one, the share of a core."""
    Path(".out").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=".out", prefix="ledger-") as folder:
        path = Path(folder) / "ledger.sqlite"
        ledger = Ledger(path)
        ledger.start()
        series = ledger.open_series("bench", "1/a", 0, frames, ("",), time.time())
        begin, cpu, worst_s = time.perf_counter(), time.process_time(), 0.0
        for n in range(frames + IN_FLIGHT):
            if rate_hz is not None:
                time.sleep(max(0.0, begin + n / rate_hz - time.perf_counter()))
            before = time.perf_counter()
            if n < frames:
                ledger.received(series, "", n)
            if n >= IN_FLIGHT:
                _end(ledger, FrameKey("bench", series.uid, n - IN_FLIGHT))
            worst_s = max(worst_s, time.perf_counter() - before)
        ledger.end_series(series)
        elapsed, share = time.perf_counter() - begin, time.process_time() - cpu
        ledger.close()
        elapsed_in_all = time.perf_counter() - begin
        wrong = audit(path)
    if wrong:
        raise RuntimeError("; ".join(wrong))
    return (frames + IN_FLIGHT) / elapsed_in_all, worst_s, share / elapsed


def _end(ledger: Ledger, key: FrameKey) -> None:
    if key.frame % 100 >= BAD_PERCENT:
        ledger.end(key, "done")
        ledger.next_seq()
    elif key.frame % 2:
        ledger.end(key, "failed", "image is all zero")
    else:
        ledger.end(key, "dropped", "intake full")

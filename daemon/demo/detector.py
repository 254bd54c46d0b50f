"""The detector of the demo's scan, a process of its own.

It opens its socket, begins to make its frames, says ``ready`` on standard output when there is
one, and sends when it reads ``go``, making the others meanwhile. When its standard input ends
before that, it ends too.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence

from daemon.demo.sample import Sample
from daemon.sources.dectris.v2_simulator import Options
from daemon.sources.simulator import Ahead, Simulator


def main(arguments: Sequence[str] | None = None) -> int:
    """Return 0 when all frames were taken."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("address")
    parser.add_argument("--points", type=int, nargs=2, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--rate", type=float, required=True)
    told = parser.parse_args(arguments)
    stop: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        # Before it sends, there is nothing to bring to an end.
        signal.signal(number, signal.SIG_DFL)
    # A detector has a computer of its own: here the daemon goes first.
    os.nice(5)
    sample = Sample.make(tuple(told.points), told.seed)
    options = Options(address=told.address, rate_hz=told.rate)
    with Ahead(sample.frames(told.seed), sample.grid.size, options) as exposures:
        simulator = Simulator(exposures, options, positions_um=sample.positions_um, stop=lambda: bool(stop))
        exposures[0]
        print("ready", flush=True)
        if sys.stdin.readline().strip() != "go":
            simulator.close(0)
            return 1
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda signum, _frame: stop.append(signum))
        report = simulator.run()
    print(report, flush=True)
    return 0 if report.complete else 1


if __name__ == "__main__":
    sys.exit(main())

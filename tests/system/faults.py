"""``make faults``: random kills of workers and of the front process for as long as you like.

Usage: python tests/system/faults.py [--seconds 120] [--seed N]
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "support"))

from testkit.faults import Faults
from testkit.process import DaemonProcess


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--seed", type=int, default=random.randrange(2**32))
    options = parser.parse_args()
    print(f"seed {options.seed}, {options.seconds:g} s", flush=True)
    with (
        tempfile.TemporaryDirectory(prefix="grainwatch-faults-") as folder,
        DaemonProcess(Path(folder), pipeline="sleep_s = 0.005") as daemon,
    ):
        faults = Faults(daemon, random.Random(options.seed))
        faults.run(options.seconds)
        problems = faults.problems()
    print(
        f"{faults.kills} kills, {faults.front_kills} of them of the front; {faults.series} series,"
        f" {faults.fed} frames fed"
    )
    print("\n".join(problems) or "every account balances")
    return 1 if problems else 0


if __name__ == "__main__":
    raise SystemExit(main())

"""``make soak``: a daemon under a simulated detector for minutes; its memory and accounts are watched.

Usage: python -m tests.system.soak [--minutes 10] [--rate 20] [--size 2048] [--workers 2] [--seed N]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "support"))

from testkit.ports import free_ports
from testkit.soak import Soak


def main() -> int:
    parser = argparse.ArgumentParser(description="A daemon under a simulated detector for minutes.")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--rate", type=float, default=10.0)
    parser.add_argument("--size", type=int, default=2048)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="grainwatch-soak-") as folder:
        soak = Soak(
            Path(folder),
            rate_hz=options.rate,
            shape=(options.size, options.size),
            seed=options.seed,
            port=free_ports()[0],
            workers=options.workers,
        )
        print(f"{options.minutes:g} minutes at {options.rate:g} frames/s, seed {options.seed}", flush=True)
        soak.run(options.minutes * 60.0, every_s=5.0)
        problems = soak.problems(growth_mib=64.0)
    if not soak.wrong:
        print(soak.report())
    print("\n".join(problems) or "every account balances, memory is level")
    return 1 if problems else 0


if __name__ == "__main__":
    raise SystemExit(main())

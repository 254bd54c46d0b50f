"""`python -m bench [names]`: tie numpy and numba to one thread, then run the benchmarks."""

from __future__ import annotations

import os
import sys

THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")


def start() -> int:
    """Set the variables before numpy and numba are loaded: later they would not be read."""
    os.environ.update(dict.fromkeys(THREAD_VARIABLES, "1"))
    from bench.run import main

    return main()


if __name__ == "__main__":
    sys.exit(start())

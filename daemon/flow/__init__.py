"""The way of a frame inside the daemon: edges, ring, executor, workers, ledger."""

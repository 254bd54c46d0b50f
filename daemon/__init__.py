"""All that runs for long: sources, sinks, flow, workers, ledger, control and service."""

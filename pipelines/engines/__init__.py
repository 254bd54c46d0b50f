"""Run model bundles: load, verify, test, infer."""

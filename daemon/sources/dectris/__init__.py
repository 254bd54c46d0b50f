"""DECTRIS detectors: Stream V1 and V2, and what simulates them."""

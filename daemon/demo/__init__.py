"""``grainwatch demo``: simulated detectors, a real daemon, and what comes out of it on the screen."""

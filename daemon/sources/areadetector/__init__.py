"""EPICS areaDetector: what its ZeroMQ plug-in publishes, and what plays the plug-in."""

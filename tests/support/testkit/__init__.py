"""Plug-ins for tests, loaded by real processes through PYTHONPATH=tests/support."""

"""Scan grids, maps that grow while the scan runs, grains linked across neighbours."""

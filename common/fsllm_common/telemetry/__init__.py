"""Metric names, logging and the web port. Import the modules: this package pulls nothing in by itself."""

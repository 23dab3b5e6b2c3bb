"""The parts of `benchmark.py`, a module for each, and their common code."""

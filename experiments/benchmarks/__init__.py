"""The parts of `benchmark.py`, one module each, and the code that they share."""

"""Benchmarks of speed and quality: `python -m benchmarks.NAME` prints a table, and fails if a target is missed."""

"""Artifacts: sealed in a worker, checked and loaded in the program. Knows no frames."""

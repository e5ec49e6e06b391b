"""Graphs to artifacts: what is shipped, the workers that compile it, and what comes back. Knows no frames."""

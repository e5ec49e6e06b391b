"""Private names of torch, by subsystem. No other package of frame-swap names one; `tests/contract` checks that."""

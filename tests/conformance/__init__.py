"""PyTorch's own Inductor tests, with frame_swap in Inductor's place: `python -m tests.conformance --help`."""

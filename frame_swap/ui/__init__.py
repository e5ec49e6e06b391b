"""The command line and the demo. Only `frame_swap.__main__` imports this package."""

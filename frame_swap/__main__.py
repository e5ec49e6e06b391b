"""`python -m frame_swap`: see `frame_swap.ui.command_line`."""

from .ui.command_line import main

if __name__ == "__main__":
    main()

"""`python -m frame_swap demo`: see the swap happen."""

from __future__ import annotations

import argparse
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command that `arguments` (default: the command line's) name; without one, print the help."""
    parser = argparse.ArgumentParser(prog="python -m frame_swap", description="torch.compile without the wait.")
    commands = parser.add_subparsers(dest="command")
    demo = commands.add_parser(
        "demo",
        help="train a small character transformer and watch which code serves its steps",
        description="Trains a character transformer on the source text of Python's standard library, with "
        "torch.compile(model, backend='frame_swap'), and shows which code serves the steps. Ends by itself "
        "soon after the swap, on two CPU cores within about a minute; Ctrl-C ends it sooner.",
    )
    demo.add_argument(
        "--seconds",
        type=float,
        default=300.0,
        help="end after so many seconds, swap or no swap (default: %(default)s)",
    )
    demo.add_argument("--device", help="where to train, such as cpu or cuda (default: cuda where there is one)")
    chosen = parser.parse_args(arguments)
    if chosen.command is None:
        parser.print_help()
        return
    print("importing PyTorch ...", flush=True)
    from .demo import run

    run(seconds=chosen.seconds, device=chosen.device)


if __name__ == "__main__":
    main()

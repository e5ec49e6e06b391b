"""`python -m frame_swap demo`: see the swap happen. `python -m frame_swap repro`: see what `verify` has found."""

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
    repro = commands.add_parser(
        "repro",
        help="repeat a difference that verify=n has found",
        description="Compiles the graph in FOLDER, which frame-swap has written, calls compiled code and the "
        "graph, op by op, with the arguments kept there, and compares. Ends with status 1 where they differ. "
        "Code in the folder is run.",
    )
    repro.add_argument("folder", metavar="FOLDER")
    chosen = parser.parse_args(arguments)
    if chosen.command is None:
        parser.print_help()
        return
    print("importing PyTorch ...", flush=True)
    if chosen.command == "repro":
        _repeat(chosen.folder)
        return
    from .ui.demo import run

    run(seconds=chosen.seconds, device=chosen.device)


def _repeat(folder: str) -> None:
    from pathlib import Path

    from .checking import repro
    from .errors import UnusableFolder

    try:
        difference = repro.difference(Path(folder))
    except UnusableFolder as error:
        raise SystemExit(f"frame-swap: {error}") from None
    if difference:
        print(f"compiled code differs: {difference}")
        raise SystemExit(1)
    print("compiled code and eager agree")


if __name__ == "__main__":
    main()

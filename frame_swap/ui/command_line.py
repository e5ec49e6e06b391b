"""The commands of `python -m frame_swap`; `_parser` lists them.

PyTorch is imported after the arguments are parsed, so that the help and errors in arguments appear at once.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command given in `arguments`, by default those of the process. Without a command, print the help.

    Raises:
        SystemExit: with status 1 and a message, or with argparse's status 2.
    """
    parser = _parser()
    chosen = parser.parse_args(arguments)
    if chosen.command is None:
        parser.print_help()
        return
    if chosen.command == "run":
        from .run import run as run_program

        run_program(chosen.program, chosen.arguments, is_module=chosen.module, timeline=chosen.timeline)
        return
    if chosen.command == "timeline":
        from .timeline_picture import show

        show(chosen.trace, chosen.png)
        return
    print("importing PyTorch ...", flush=True)
    if chosen.command == "repro":
        _repeat(Path(chosen.folder))
    elif chosen.command == "cache":
        from . import cache

        cache.run(chosen.what or "show", getattr(chosen, "file", None), getattr(chosen, "limit", 0.0))
    elif chosen.command == "doctor":
        from . import doctor

        doctor.run(chosen.device, names=chosen.names)
    else:
        from .demo import run

        run(seconds=chosen.seconds, device=chosen.device)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m frame_swap", description="torch.compile without the wait.")
    commands = parser.add_subparsers(dest="command")
    program = commands.add_parser(
        "run",
        help="run a program whose torch.compile means frame-swap, without a change to it",
        description="Runs a program as Python does. torch.compile with its default backend means frame-swap in it, "
        "whoever calls it. A worker starts before the program's own imports, and the report comes at its end, on "
        "stderr. With torchrun: torchrun ... -m frame_swap run train.py",
        usage="python -m frame_swap run [--timeline FILE] (SCRIPT | -m MODULE) [ARGUMENT ...]",
    )
    program.add_argument("--timeline", type=Path, metavar="FILE", help="write the timeline at the end")
    program.add_argument("-m", dest="module", action="store_true", help="run a module, as python -m does")
    program.add_argument("program", metavar="SCRIPT", help="or MODULE")
    program.add_argument("arguments", nargs=argparse.REMAINDER, metavar="ARGUMENT")
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
    demo.add_argument("--device", help="where to train, such as cpu or cuda (default: cuda if there is one)")
    timeline = commands.add_parser(
        "timeline",
        help="say what a timeline says, or draw it",
        description="Reads TRACE, which frame_swap.timeline(...) has written. Prints a row for each graph, or "
        "draws a picture. https://ui.perfetto.dev shows such a file, too.",
    )
    timeline.add_argument("trace", type=Path, metavar="TRACE")
    timeline.add_argument("--png", type=Path, metavar="FILE", help="draw it into FILE (needs matplotlib)")
    doctor = commands.add_parser(
        "doctor",
        help="check this machine: torch, compilers, folders, cores, memory, and a real swap",
        description="Looks at what a swap needs, compiles a small training step for real, and says what is wrong "
        "and what to do. Takes up to a minute on two CPU cores. Ends with status 0 if the swap worked, otherwise "
        "with 1.",
    )
    doctor.add_argument(
        "--device", help="where to try the swap, such as cpu or cuda (default: cuda if there is one)"
    )
    doctor.add_argument("--names", action="store_true", help="list each private name of torch that is looked up")
    repro = commands.add_parser(
        "repro",
        help="repeat a difference that verify=n has found",
        description="Reads FOLDER, which frame-swap has written: a graph and the arguments of a call. Compiles the "
        "graph, calls compiled code and the uncompiled graph, and compares. Ends with status 1 if they differ. "
        "Code in the folder is run.",
    )
    repro.add_argument("folder", metavar="FOLDER")
    cache = commands.add_parser(
        "cache",
        help="show, prune, export or import the compiled code that is kept for the next run",
        description="The store of compiled code: below Inductor's cache folder, or where FRAME_SWAP_STORE says.",
    )
    what = cache.add_subparsers(dest="what")
    what.add_parser("show", help="what is kept, and which programs used it (the default)")
    prune = what.add_parser("prune", help="remove what was not used for longest")
    prune.add_argument(
        "--limit",
        type=float,
        default=0.0,
        help="gigabytes that may stay (default: %(default)s, which removes everything)",
    )
    export = what.add_parser("export", help="write everything into one file, to be shipped")
    export.add_argument("file", type=Path, metavar="FILE")
    bring = what.add_parser(
        "import",
        help="take over everything from such a file",
        description="Programs will run the code in FILE: whoever has made it can do what you can do.",
    )
    bring.add_argument("file", type=Path, metavar="FILE")
    return parser


def _repeat(folder: Path) -> None:
    from ..checking import repro
    from ..errors import UnusableFolder

    try:
        difference = repro.difference(folder)
    except UnusableFolder as error:
        raise SystemExit(f"frame-swap: {error}") from None
    if difference:
        print(f"compiled code differs: {difference}")
        raise SystemExit(1)
    print("compiled code and eager agree")

"""`python -m frame_swap run`: run a program as Python would, with frame-swap enabled; the report comes at its end.

Guarantees:
- The program is the `__main__` module, with the arguments, the search path and the exit status that it has without.
- The report comes last, on stderr, after the program's own exit handlers; in a forked child it does not come.
"""

from __future__ import annotations

import atexit
import importlib.util
import io
import os
import sys
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType

_mains: list[ModuleType] = []  # a module that goes takes its globals along


def run(target: str, arguments: list[str], *, is_module: bool, timeline: Path | None = None) -> None:
    """Run a script, or the module of this name.

    Args:
        arguments: the program's own.
        timeline: where the timeline is written at the end; None for none.

    Raises:
        SystemExit: there is no such program; or what it raises itself.
    """
    from ..enabling import enable

    code, spec, path = _module(target) if is_module else _script(target)
    sys.argv = [path, *arguments]
    if not is_module and not sys.flags.safe_path:
        sys.path[0] = os.path.dirname(os.path.abspath(path))
    main = ModuleType("__main__")
    main.__file__ = path
    main.__spec__ = spec
    main.__package__ = spec.parent if spec is not None else None
    main.__loader__ = spec.loader if spec is not None else SourceFileLoader("__main__", path)
    vars(main)["__builtins__"] = __builtins__
    _mains.append(sys.modules["__main__"])
    sys.modules["__main__"] = main
    enable()
    atexit.register(_report, os.getpid(), timeline)
    exec(code, vars(main))


def _script(path: str) -> tuple[CodeType, ModuleSpec | None, str]:
    try:
        with io.open_code(os.path.abspath(path)) as file:
            source = file.read()
    except OSError as error:
        advice = "give a script, or -m and the name of a module"
        raise SystemExit(f"frame-swap: {path} cannot be run: {error.strerror}; {advice}") from None
    return compile(source, path, "exec", dont_inherit=True), None, path


def _module(name: str) -> tuple[CodeType, ModuleSpec, str]:
    try:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.submodule_search_locations is not None:  # a package
            spec = importlib.util.find_spec(f"{name}.__main__")
    except ImportError as error:
        raise SystemExit(f"frame-swap: module {name} cannot be run: {error}") from None
    get_code = getattr(spec and spec.loader, "get_code", None)
    code = get_code(spec.name) if spec is not None and get_code is not None else None
    if spec is None or code is None:
        raise SystemExit(f"frame-swap: there is no module {name} that can be run, on the path {sys.path}")
    return code, spec, spec.origin or name


def _report(process: int, timeline: Path | None) -> None:
    if os.getpid() != process or os.environ.get("RANK", "0") != "0":  # torchrun's other processes say the same
        return
    if "frame_swap.backend" not in sys.modules:
        print(
            "frame-swap: nothing was compiled: torch.compile was not called with its default backend",
            file=sys.stderr,
        )
        return
    from ..control import report

    print(report(), file=sys.stderr)
    if timeline is not None:
        from .timeline import timeline as write

        write(timeline)

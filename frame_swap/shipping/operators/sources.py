"""The files that an operator's definition can depend on: what its modules import, followed from file to file.

A worker imports the modules that define an operator, so their files decide what it is there. Functions that travel
by value may still call what other modules have.

Guarantees:
- The digest changes with each file of the program's that an import statement leads to, wherever the statement
  stands, and with the installation of each other package that one leads to.
- It is the same in each process that has the same files, whatever that has imported so far. Nothing is imported.

Not seen: what is imported by a name made at run time, and files that modules read.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
import os
import sys
from collections.abc import Iterable, Iterator
from importlib.machinery import PathFinder
from pathlib import Path

_KNOWN = frozenset({"torch", "triton", "numpy", "sympy", "frame_swap", *sys.stdlib_module_names})
"""Packages that a key has otherwise."""

_INSTALLED = ("site-packages", "dist-packages")


def digest(modules: Iterable[str]) -> str:
    """A SHA-256 of the files behind `modules` and behind all that they import, in hexadecimal digits.

    Args:
        modules: names; "__main__" stands for what the program's main file imports, and not for that file.
    """
    found: dict[str, str] = {}
    waiting = sorted(set(modules))
    while waiting:
        name = waiting.pop()
        if name in found or name.partition(".")[0] in _KNOWN:
            continue
        file = _main_file() if name == "__main__" else _file_of(name)
        if file is None:
            found[name] = "no file"
            continue
        if not set(_INSTALLED).isdisjoint(Path(file).parts):
            top = name.partition(".")[0]
            found[top] = _stamp(_file_of(top) or file)
            continue
        about = os.stat(file)
        text, imports = _read(file, name, about.st_size, about.st_mtime_ns)
        found[name] = "the program" if name == "__main__" else text
        waiting += [one for one in imports if one not in found]
    return hashlib.sha256(repr(sorted(found.items())).encode()).hexdigest()


def _main_file() -> str | None:
    file = getattr(sys.modules.get("__main__"), "__file__", None)
    return file if file and os.path.exists(file) else None


def _stamp(file: str) -> str:
    """A package that was installed: its first file's size and time change with its version."""
    about = os.stat(file)
    return f"{about.st_size} {about.st_mtime_ns}"


def _file_of(name: str) -> str | None:
    """The file of a module; None for a namespace, and for what is no module."""
    loaded = getattr(sys.modules.get(name), "__file__", None)
    if loaded and os.path.exists(loaded):
        return str(loaded)
    path: list[str] | None = None
    spec = None
    parts = name.split(".")
    for end in range(1, len(parts) + 1):  # without importing the packages that it is in
        spec = PathFinder.find_spec(".".join(parts[:end]), path)
        if spec is None:
            return None
        path = list(spec.submodule_search_locations or ())
    return spec.origin if spec is not None and spec.origin and os.path.exists(spec.origin) else None


@functools.lru_cache(maxsize=4096)
def _read(file: str, name: str, size: int, changed: int) -> tuple[str, tuple[str, ...]]:
    """The digest of a file, and the modules that it may import."""
    content = Path(file).read_bytes()
    try:
        tree = ast.parse(content) if file.endswith(".py") else ast.Module([], [])
    except (SyntaxError, ValueError):  # it may be of another Python
        tree = ast.Module([], [])
    package = name if os.path.basename(file) == "__init__.py" else name.rpartition(".")[0]
    return hashlib.sha256(content).hexdigest(), tuple(sorted(set(_imports(tree, package))))


def _imports(tree: ast.Module, package: str) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield from _with_packages(alias.name)
        elif isinstance(node, ast.ImportFrom):
            try:
                base = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            except ImportError:  # it leads out of the package
                continue
            yield from _with_packages(base)
            for alias in node.names:  # a name may be a module
                yield f"{base}.{alias.name}"


def _with_packages(name: str) -> Iterator[str]:
    """A module and the packages that it is in, which run before it."""
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        yield ".".join(parts[:end])

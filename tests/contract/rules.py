"""The rules of the house. Each takes the root of a source tree and returns its violations, as data.

for violation in RULES["layers"](Path(".")): print(violation)
"""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import setuptools

from . import source_tree
from .source_tree import PACKAGE, Module, dotted, is_private


class Violation(NamedTuple):
    """A line that breaks a rule."""

    module: str
    line: int
    what: str

    def __str__(self) -> str:
        return f"{self.module}:{self.line}: {self.what}"


Rule = Callable[[Path], list[Violation]]

LAYERS = (
    ("__main__",),
    ("ui",),
    ("__init__",),
    ("control", "decorator", "enabling"),
    ("backend",),
    ("kept_frames",),
    ("delivery",),
    ("serving",),
    ("late_guards", "checking"),
    ("farm",),
    ("artifacts",),
    ("shipping",),
    ("frames",),
    ("codegen",),
    ("capture",),
    ("region",),
    ("settings",),
    ("runtime",),
    ("internals",),
    ("errors",),
    ("guards",),
)
"""The rooms, from top to bottom. A room imports itself and those further down, and none beside it."""

_DEPTH = {room: depth for depth, rooms in enumerate(LAYERS) for room in rooms}

_PUBLIC = "the package's public names, which its `__getattr__` finds when they are asked for"

TYPES_ONLY: dict[tuple[str, str], str] = {
    (PACKAGE, f"{PACKAGE}.ui.{module}"): _PUBLIC for module in ("explain", "progress", "timeline")
}
"""Imports below `if TYPE_CHECKING` that may point upward: (module, imported module) and the reason."""

WITHOUT_FRAMES = ("farm", "artifacts", "shipping")
FRAMES = ("frames", "codegen", "serving")
FRAMES_BUT = ("codegen.source",)
"""It writes source text of functions, and knows nothing of code objects."""

WITHOUT_PROCESSES = ("frames", "codegen")
PROCESSES = ("multiprocessing", "subprocess", "concurrent", "loky", "psutil", "signal")
OS_PROCESSES = ("fork", "forkpty", "exec", "spawn", "posix_spawn", "system", "popen", "wait", "kill")
"""Prefixes of names in `os` that start, end or await processes."""


class Allowed(NamedTuple):
    """A private name that `module` and modules below it may use outside of `internals`, and the reason."""

    module: str
    name: str
    reason: str

    def __call__(self, module: Module, name: str) -> bool:
        return f"{module.name}.".startswith(f"{self.module}.") and f".{name}".endswith(f".{self.name}")


_POOL = "is no name of torch's; the pool has to outdo loky, and says how in its docstring"

PRIVATE_NAMES = (
    Allowed("frame_swap.guards", "torch.utils._sympy.functions", "`guards` imports nothing of frame_swap"),
    Allowed("frame_swap.runtime.forks", "_at_fork_reinit", "is CPython's own way to renew a lock in a child"),
    Allowed("frame_swap.farm.local", "os._exit", "is public, in spite of its underscore"),
    Allowed("frame_swap.farm.local", "_register_atexit", _POOL),
    Allowed("frame_swap.farm.local", "loky.process_executor._python_exit", _POOL),
    Allowed("frame_swap.farm.local", "loky.process_executor._threads_wakeups", _POOL),
    Allowed("frame_swap.farm.local", "_executor._processes", _POOL),
    Allowed("frame_swap.farm.local", "multiprocessing.process._children", _POOL),
    Allowed(
        "frame_swap.shipping.parcel", "pickle._Pickler", "is CPython's own, and the only one to ask about strings"
    ),
    Allowed("frame_swap.capture.thread", "sys._current_frames", "is public, in spite of its underscore"),
    Allowed("frame_swap.farm", "_inheriting", "tells that a child of multiprocessing still imports the program"),
)

NOT_OURS = ("_base", "_name", "_processes", "_schema", "_version")
"""Attributes of torch's and loky's objects. A class that has the same name of its own reaches it through `self`."""

NAMEDTUPLE = ("_replace", "_asdict", "_make", "_fields", "_field_defaults")
"""Public in spite of the underscore, which keeps them apart from fields."""

BY_NAME = ("getattr", "setattr", "hasattr", "delattr", "attrgetter", "methodcaller", "patched", "object")
"""Functions that take the name of an attribute as text."""

TORCH = ("torch", "functorch", "torchgen")
LONGEST = 400
LONG_MODULES: dict[str, str] = {}
"""Longer modules, and the reason of each."""

WORKER = f"{PACKAGE}.farm.local.worker"


def layers(root: Path) -> list[Violation]:
    """Imports point downward, function-level imports included."""
    found = []
    for module, line, reached, types_only in _internal_imports(root):
        here, there = _DEPTH.get(module.room), _DEPTH.get(reached.room)
        if there is None:
            found.append(Violation(module.name, line, f"imports {reached.name}, a room without a layer"))
        elif here is not None and here >= there and module.room != reached.room:
            if types_only and (module.name, reached.name) in TYPES_ONLY:
                continue
            found.append(Violation(module.name, line, f"imports {reached.name}, which is not below"))
    for module in source_tree.modules(root).values():
        if module.room not in _DEPTH:
            found.append(Violation(module.name, 1, "is in a room without a layer"))
    return found


def no_frames(root: Path) -> list[Violation]:
    """`farm`, `artifacts` and `shipping` know no frames."""
    return [
        Violation(module.name, line, f"imports {reached.name}")
        for module, line, reached, _ in _internal_imports(root)
        if module.room in WITHOUT_FRAMES and reached.room in FRAMES and not reached.name.endswith(FRAMES_BUT)
    ]


def no_processes(root: Path) -> list[Violation]:
    """`frames` and `codegen` know no processes."""
    found = []
    known = source_tree.modules(root)
    for module in known.values():
        if module.room not in WITHOUT_PROCESSES:
            continue
        for name, line, *_ in module.imports:
            reached = source_tree.target(name, known)
            if name.split(".")[0] in PROCESSES or (reached and known[reached].room == "farm") or _of_os(name):
                found.append(Violation(module.name, line, f"imports {name}"))
        bound = source_tree.bound_names(module)
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Attribute) and _of_os(name := _expanded(node, bound)):
                found.append(Violation(module.name, node.lineno, f"uses {name}"))
    return found


def ui_is_a_leaf(root: Path) -> list[Violation]:
    """Nothing but `__main__` imports `ui`."""
    return [
        Violation(module.name, line, f"imports {reached.name}")
        for module, line, reached, types_only in _internal_imports(root)
        if reached.room == "ui"
        and module.room not in ("ui", "__main__")
        and not (types_only and (module.name, reached.name) in TYPES_ONLY)
    ]


def guards_stand_alone(root: Path) -> list[Violation]:
    """`guards` imports nothing of frame_swap."""
    return [
        Violation(module.name, line, f"imports {reached.name}")
        for module, line, reached, _ in _internal_imports(root)
        if module.room == "guards" and reached.room != "guards"
    ]


def private_names(root: Path) -> list[Violation]:
    """Private names, of torch and of others, are used only in the module that defines them, or in `internals`."""
    return [
        Violation(module.name, line, f"reaches {name}")
        for module, line, name in reached_privately(root)
        if not any(allows(module, name) for allows in PRIVATE_NAMES)
    ]


def reached_privately(root: Path) -> list[tuple[Module, int, str]]:
    """(module, line, name) of private names that modules outside of `internals` reach and do not define."""
    found = []
    for module in source_tree.modules(root).values():
        if module.room != "internals":
            own = source_tree.own_attributes(module.tree) - set(NOT_OURS)
            bound = source_tree.bound_names(module)
            reached = {*_imported_private(module), *_used_private(module.tree, own, bound)}
            found += [(module, line, name) for line, name in sorted(reached)]
    return found


def no_mock(root: Path) -> list[Violation]:
    """Production code patches with `frame_swap.runtime.patching`, not with `unittest.mock`."""
    return [
        Violation(module.name, one.line, f"imports {one.name}")
        for module in source_tree.modules(root).values()
        for one in module.imports
        if one.name.split(".")[0] in ("unittest", "mock")
    ]


def packages_are_installed(root: Path) -> list[Violation]:
    """The packages that pyproject.toml's configuration finds are those on disk."""
    configured = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    options = dict(configured["tool"]["setuptools"]["packages"]["find"])
    (where,) = options.pop("where", ["."])
    namespaces = options.pop("namespaces", True)
    find = setuptools.find_namespace_packages if namespaces else setuptools.find_packages
    installed = {p for p in find(str(root / where), **options) if "__pycache__" not in p}
    on_disk = {m.name for m in source_tree.modules(root).values() if m.is_package}
    return [
        *(Violation(name, 1, "is not installed") for name in sorted(on_disk - installed)),
        *(Violation(name, 1, "is installed, and is no package") for name in sorted(installed - on_disk)),
    ]


def workers_start_without_torch(root: Path) -> list[Violation]:
    """A worker lowers its priority before it imports torch: its module does not import torch by itself."""
    known = source_tree.modules(root)
    found, seen, to_do = [], set(), [WORKER]
    while to_do:
        name = to_do.pop()
        if name in seen or name not in known:
            continue
        seen.add(name)
        to_do.append(name.rpartition(".")[0])  # its package comes first
        for one in known[name].imports:
            if not one.at_import:
                continue
            if one.name.split(".")[0] in TORCH:
                found.append(Violation(name, one.line, f"imports {one.name}"))
            if reached := source_tree.target(one.name, known):
                to_do.append(reached)
    return found


def modules_are_short(root: Path) -> list[Violation]:
    """No module has more than 400 lines without a reason."""
    return [
        Violation(module.name, 1, f"has {module.lines} lines")
        for module in source_tree.modules(root).values()
        if module.lines > LONGEST and module.name not in LONG_MODULES
    ]


RULES: dict[str, Rule] = {
    rule.__name__: rule
    for rule in (
        layers,
        no_frames,
        no_processes,
        ui_is_a_leaf,
        guards_stand_alone,
        private_names,
        no_mock,
        packages_are_installed,
        workers_start_without_torch,
        modules_are_short,
    )
}


def _internal_imports(root: Path) -> Iterator[tuple[Module, int, Module, bool]]:
    """(module, line, imported module, whether for types only) of imports within the package."""
    known = source_tree.modules(root)
    for module in known.values():
        for one in module.imports:
            reached = source_tree.target(one.name, known)
            if reached in known:
                yield module, one.line, known[reached], one.types_only


def _imported_private(module: Module) -> Iterator[tuple[int, str]]:
    for one in module.imports:
        first, *others = one.name.split(".")
        if (
            (first in TORCH and any(map(is_private, others)))
            or first == "functorch"
            or (others and is_private(others[-1]))
        ):
            yield one.line, one.name


def _used_private(tree: ast.AST, own: set[str], bound: dict[str, str]) -> Iterator[tuple[int, str]]:
    """(line, name) of private names that are reached as attributes, by functions like `getattr`, or in text."""
    documentation = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    inner = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(attr=name) if is_private(name):
                full = _expanded(node, bound)
                of_torch = full.split(".")[0] in TORCH
                by_itself = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
                if of_torch or not (by_itself or name in own or name in NAMEDTUPLE):
                    yield node.lineno, full
            case ast.Call(func=func, args=[*args]) if (dotted(func) or [""])[-1] in BY_NAME:
                for arg in args:
                    if isinstance(arg, ast.Constant) and isinstance(arg.value, str):
                        names = arg.value.split(".")
                        if any(is_private(n) and n not in own for n in names):
                            yield arg.lineno, arg.value
            case ast.Constant(value=str(text)) if id(node) not in documentation | inner:
                yield from ((node.lineno, name) for name in _private_in_text(text, own))
            case ast.JoinedStr(values=values):
                pieces = (v.value if isinstance(v, ast.Constant) else "x" for v in values)
                text = "".join(p for p in pieces if isinstance(p, str))
                yield from ((node.lineno, name) for name in _private_in_text(text, own))


def _private_in_text(text: str, own: set[str]) -> Iterator[str]:
    """Private names that `text` reaches if it parses as source: generated code, or a module's name."""
    try:
        tree = ast.parse(text.strip())
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            full = dotted(node)
            if node.attr not in own or (full and full[0] in TORCH):
                yield ".".join(full or ["...", node.attr])


def _expanded(node: ast.Attribute, bound: dict[str, str]) -> str:
    """The attribute's dotted name, starting at an absolute one; `....name` for attributes of other expressions."""
    names = dotted(node)
    if names is None:
        return f"....{node.attr}"
    return ".".join([bound.get(names[0], names[0]), *names[1:]])


def _of_os(name: str) -> bool:
    return name.startswith(tuple(f"os.{beginning}" for beginning in OS_PROCESSES))

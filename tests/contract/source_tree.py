"""Parsed modules of a source tree: their imports, the attributes that they define, and dotted names."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

PACKAGE = "frame_swap"


class Import(NamedTuple):
    """One name that a module imports.

    Attributes:
        name: absolute and dotted; the imported attribute included: `torch.nn` in `from torch import nn`.
        line: the line of the statement.
        types_only: whether the statement is below `if TYPE_CHECKING`.
        at_import: whether it runs when the module is imported, rather than when a function is called.
    """

    name: str
    line: int
    types_only: bool
    at_import: bool


@dataclass
class Module:
    """A parsed module; `name` is absolute: `frame_swap.guards.predicate` for guards/predicate.py."""

    name: str
    is_package: bool
    tree: ast.Module
    lines: int
    imports: list[Import] = field(default_factory=list)

    @property
    def room(self) -> str:
        """The room that this module is in."""
        return room(self.name)


def room(module: str) -> str:
    """The room of a module: the first name below the package; `__init__` for the package itself."""
    return (module.split(".") + ["__init__"])[1]


def modules(root: Path) -> dict[str, Module]:
    """All modules of frame_swap/ and guards/ below `root`, by name; the link frame_swap/guards is not followed."""
    found = {}
    for folder, prefix in ((root / PACKAGE, PACKAGE), (root / "guards", f"{PACKAGE}.guards")):
        for path in sorted(folder.rglob("*.py")):
            within = path.relative_to(folder)
            if folder.name == PACKAGE and within.parts[0] == "guards":
                continue
            is_package = path.stem == "__init__"
            parts = within.parent.parts if is_package else within.with_suffix("").parts
            text = path.read_text(encoding="utf-8")
            module = Module(".".join((prefix, *parts)), is_package, ast.parse(text), len(text.splitlines()))
            module.imports = list(_imports(module, module.tree, types_only=False, at_import=True))
            found[module.name] = module
    return found


def target(name: str, known: dict[str, Module]) -> str | None:
    """The module of the tree that an import of `name` loads; None if `name` is not in this package."""
    if name.split(".")[0] != PACKAGE:
        return None
    while name not in known and "." in name:
        name = name.rpartition(".")[0]
    return name


def is_private(name: str) -> bool:
    """Whether a name begins with exactly one underscore, and is not `_` itself."""
    return name.startswith("_") and not name.startswith("__") and name.strip("_") != ""


def own_attributes(tree: ast.Module) -> set[str]:
    """Private attributes that a module's classes define: methods, names in their bodies, attributes of `self`."""
    names = set()
    for node in ast.walk(tree):
        match node:
            case ast.ClassDef(body=body):
                for member in body:
                    match member:
                        case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                            names.add(name)
                        case ast.Assign(
                            targets=[ast.Name(id="__slots__")], value=ast.Tuple() | ast.List() as slots
                        ):
                            names |= {str(slot.value) for slot in slots.elts if isinstance(slot, ast.Constant)}
                        case ast.Assign(targets=[*targets]):
                            names |= {target.id for target in targets if isinstance(target, ast.Name)}
                        case ast.AnnAssign(target=ast.Name(id=name)):
                            names.add(name)
            case ast.Attribute(value=ast.Name(id="self" | "cls"), attr=name, ctx=ast.Store()):
                names.add(name)
    return set(filter(is_private, names))


def dotted(node: ast.AST) -> list[str] | None:
    """`["a", "b", "c"]` for the expression `a.b.c`; None for another expression."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.insert(0, node.attr)
        node = node.value
    return [node.id, *parts] if isinstance(node, ast.Name) else None


def bound_names(module: Module) -> dict[str, str]:
    """Local names of imports and their absolute names: `{"nn": "torch.nn"}` for `from torch import nn`."""
    bound = {}
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                name = alias.name if alias.asname else alias.name.split(".")[0]
                bound[alias.asname or name] = name
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                bound[alias.asname or alias.name] = f"{_origin(module, node)}.{alias.name}"
    return bound


def _imports(module: Module, node: ast.AST, *, types_only: bool, at_import: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        inside_function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        match child:
            case ast.Import(names=names):
                for alias in names:
                    yield Import(alias.name, child.lineno, types_only, at_import)
            case ast.ImportFrom(names=names):
                for alias in names:
                    yield Import(f"{_origin(module, child)}.{alias.name}", child.lineno, types_only, at_import)
            case ast.Call(func=func, args=[ast.Constant(value=str(name)), *_]) if _imports_by_name(func):
                yield Import(name, child.lineno, types_only, at_import)
        if isinstance(child, ast.If) and (dotted(child.test) or [""])[-1] == "TYPE_CHECKING":
            for part in child.body:
                yield from _imports(module, ast.Module([part], []), types_only=True, at_import=False)
            for part in child.orelse:
                yield from _imports(module, ast.Module([part], []), types_only=types_only, at_import=at_import)
        else:
            yield from _imports(module, child, types_only=types_only, at_import=at_import and not inside_function)


def _imports_by_name(function: ast.expr) -> bool:
    return (dotted(function) or [""])[-1] in ("import_module", "__import__")


def _origin(module: Module, node: ast.ImportFrom) -> str:
    """The absolute name of the module in `from ... import`."""
    if not node.level:
        return node.module or ""
    package = module.name.split(".")
    package = package[: len(package) - node.level + module.is_package]
    return ".".join([*package, *([node.module] if node.module else [])])

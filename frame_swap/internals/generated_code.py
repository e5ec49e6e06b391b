"""Generated Python without what it names and seldom needs: imports of Inductor's compiler, and detours.

To run compiled code takes a few light modules of Inductor's. But each generated module begins with imports from
`select_algorithm` and `codegen`, and with these comes all that compiles: 190 modules and 0.6 s of Python, or more
beside Triton, for which the program's steps would have to wait.

On a GPU a call sets the current device by a class of Python's and a function that asks what a device is. Both call
functions in C, which are called here: that is some 1.5 µs of the 14 that a tiny graph's call takes.

Guarantees:
- What is left out is never looked up, or is looked up in `torch`, where the worker has found the same object.
- Lines keep their numbers, for tracebacks.
- The device is set, and set back, by the same functions in C in the same order.
"""

from __future__ import annotations

import ast
import importlib
import re
from types import CodeType

import torch

__all__ = ["compiled_lightly"]

_COMPILER = ("torch._inductor.select_algorithm", "torch._inductor.codegen.")
"""Prefixes of modules that bring Inductor's compiler along."""

_OPERATORS = "extern_kernels"
"""What generated code calls operators by: a namespace of functions, most of which are torch's own."""


def compiled_lightly(source: str, path: str) -> tuple[CodeType, bool]:
    """The code of a generated module, and whether it still imports Inductor's compiler.

    For workers, where the compiler is imported.
    """
    tree = ast.parse(source, path)
    used = [node.id for node in ast.walk(tree) if isinstance(node, ast.Name)]
    operators = [
        node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and _is_namespace(node.value)
    ]
    are_torchs = used.count(_OPERATORS) == len(operators) and _are_torchs(operators)
    heavy = False
    for number, statement in enumerate(tree.body):
        if not isinstance(statement, ast.ImportFrom) or not (statement.module or "").startswith(_COMPILER):
            continue
        kept = [alias for alias in statement.names if (alias.asname or alias.name) in used]
        instead: ast.stmt = statement
        if not kept:
            instead = ast.Pass()
        elif are_torchs and [(alias.name, alias.asname) for alias in kept] == [(_OPERATORS, None)]:
            instead = ast.Import([ast.alias("torch", _OPERATORS)])
        else:
            heavy = True
        tree.body[number] = ast.copy_location(instead, statement)
    tree = _DirectGuards().visit(tree)
    return compile(ast.fix_missing_locations(tree), path, "exec", dont_inherit=True), heavy


def _is_namespace(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id == _OPERATORS


def _are_torchs(names: list[str]) -> bool:
    """Whether all of these operators are functions of torch's, by the same names."""
    operators = importlib.import_module(_COMPILER[0]).extern_kernels
    return all(getattr(operators, name, None) is getattr(torch, name, ()) for name in names)


class _DirectGuards(ast.NodeTransformer):
    """Has guards of the current device call what they come to: see `torch.cuda._DeviceGuard` and `set_device`."""

    _GUARD = re.compile(r"torch\.cuda\._DeviceGuard\((\d+)\)")

    def __init__(self) -> None:
        self._guards = 0

    def visit_With(self, node: ast.With) -> ast.With | list[ast.stmt]:
        self.generic_visit(node)
        guard = self._GUARD.fullmatch(", ".join(map(ast.unparse, node.items)))
        if guard is None:
            return node
        device, before = guard[1], f"device_before_{self._guards}"  # guards may be nested
        self._guards += 1
        body = node.body
        if ast.unparse(body[0]) == f"torch.cuda.set_device({device})":
            body[0] = _statement(f"torch._C._cuda_setDevice({device})", body[0])
        enter = _statement(f"{before} = torch._C._cuda_exchangeDevice({device})", node)
        leave = _statement(f"torch._C._cuda_maybeExchangeDevice({before})", node)
        return [enter, ast.copy_location(ast.Try(body, [], [], [leave]), node)]


def _statement(source: str, at: ast.stmt) -> ast.stmt:
    """A statement, in the lines of another one."""
    [statement] = ast.parse(source).body
    for node in ast.walk(statement):
        ast.copy_location(node, at)
    return statement

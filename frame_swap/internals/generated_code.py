"""Generated Python without the imports of Inductor's compiler, which it names and seldom needs.

To run compiled code takes a few light modules of Inductor's. But each generated module begins with imports from
`select_algorithm` and `codegen`, and with these comes all that compiles: 190 modules and 0.6 s of Python, or more
beside Triton, for which the program's steps would have to wait.

Guarantees:
- What is left out is never looked up, or is looked up in `torch`, where the worker has found the same object.
- Lines keep their numbers, for tracebacks.
"""

from __future__ import annotations

import ast
import importlib
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
    return compile(ast.fix_missing_locations(tree), path, "exec", dont_inherit=True), heavy


def _is_namespace(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id == _OPERATORS


def _are_torchs(names: list[str]) -> bool:
    """Whether all of these operators are functions of torch's, by the same names."""
    operators = importlib.import_module(_COMPILER[0]).extern_kernels
    return all(getattr(operators, name, None) is getattr(torch, name, ()) for name in names)

"""The messages of the package that a user may see, read from its sources."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from typing import NamedTuple

from .blocks import ROOT

RAISED = (
    "Unshippable",
    "UnusableArtifact",
    "UnsafeFolder",
    "UnusableFolder",
    "Lost",
    "MissingOperator",
    "SystemExit",
)
"""Exceptions whose messages reach the report, a warning or the terminal."""

CALLED = ("warn", "_give_up", "reject", "_reject_offer", "fail", "_failed", "remarks.append")
"""Functions that take such a message."""

GAP = "…"
"""Stands for what is filled in."""


class Message(NamedTuple):
    """A message, with gaps, and where it is made."""

    text: str
    place: str


def messages() -> list[Message]:
    """All of them."""
    found = []
    for path in sorted((ROOT / "frame_swap").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and _ends_with(node.func, (*RAISED, *CALLED)):
                place = f"{path.relative_to(ROOT)}:{node.lineno}"
                found += [Message(text, place) for text in map(_text, node.args) if len(text.replace(GAP, "")) > 8]
    return found


def texts() -> Iterator[str]:
    """Every text in the package, with gaps: a message may be put together from several."""
    for path in sorted((ROOT / "frame_swap").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.JoinedStr, ast.Constant)) and (text := _text(node)):
                yield text


def _ends_with(function: ast.expr, names: tuple[str, ...]) -> bool:
    return any(f".{ast.unparse(function)}".endswith(f".{name}") for name in names)


def _text(node: ast.expr) -> str:
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=values):
            parts = "".join(_text(part) or GAP for part in values)
            return re.sub(f"{GAP}+", GAP, parts)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return _text(left) + _text(right)
        case ast.IfExp(body=body):
            return _text(body)
    return ""

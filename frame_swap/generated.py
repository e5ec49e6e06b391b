"""Small functions written for one graph, as source text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from . import internals


def function(source: str, **scope: Any) -> Callable[..., Any]:
    """The one function that `source` defines, with `scope` as its globals.

    Its code object is its own; Dynamo is told not to trace it, nor anything below it.
    """
    before = set(scope)
    exec(compile(source, "<frame-swap>", "exec"), scope)
    (name,) = set(scope) - before - {"__builtins__"}
    made = scope.pop(name)  # or it would keep itself alive
    internals.skip_frames(made.__code__)
    return cast("Callable[..., Any]", made)

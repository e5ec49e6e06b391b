"""Functions generated for one graph, as source text."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch

from ..internals import dynamo, eager


def compile_function(source: str, **scope: Any) -> Callable[..., Any]:
    """The one function that `source` defines, with `scope` as its globals.

    It has a code object of its own. Dynamo traces neither its frames nor anything that they call.
    """
    before = set(scope)
    exec(compile(source, "<frame-swap>", "exec"), scope)
    (name,) = set(scope) - before - {"__builtins__"}
    made = scope.pop(name)  # or it would keep itself alive
    dynamo.skip_frames(made.__code__)
    return cast("Callable[..., Any]", made)


class Source:
    """A function in the making: its lines, and the names that they use.

    Args:
        signature: the name and the parameters.
        scope: names that its lines use.
    """

    def __init__(self, signature: str, **scope: Any) -> None:
        self._lines = [f"def {signature}:"]
        self._depth = 1
        self._scope = {"Tensor": torch.Tensor, **scope}

    def __call__(self, line: str, **scope: Any) -> None:
        """Add a line, and names that it uses."""
        self._lines.append("    " * self._depth + line)
        self._scope.update(scope)

    def names(self, **scope: Any) -> None:
        """Add names that the generated lines use."""
        self._scope.update(scope)

    @contextlib.contextmanager
    def block(self, opening: str, **scope: Any) -> Iterator[None]:
        """Indent the lines written in this block under `opening`."""
        self(opening, **scope)
        self._depth += 1
        yield
        self._depth -= 1

    def without_autocast(self) -> contextlib.AbstractContextManager[None]:
        """Lines written in this block run without autocast: the casts are in the graph."""
        return self.block("with no_autocast():", no_autocast=eager.no_autocast)

    @contextlib.contextmanager
    def switched(self, name: str, get: Callable[[], bool], set: Callable[[bool], None], to: bool) -> Iterator[None]:
        """Lines written in this block run with a switch of the thread set to `to`."""
        self(f"{name} = get_{name}()", **{f"get_{name}": get, f"set_{name}": set})
        with self.block("try:"):
            self(f"if {name} is not {to}: set_{name}({to})")
            yield
        with self.block("finally:"):
            self(f"if {name} is not {to}: set_{name}({name})")

    def function(self) -> Callable[..., Any]:
        """The finished function."""
        return compile_function("\n".join(self._lines) + "\n", **self._scope)

"""Generated wrappers in place of AOTAutograd's, while it loads an artifact."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

from ...codegen.source import compile_function
from ...internals import aot
from ...runtime.patching import patched
from ..compiled import Boxed, Compiled
from . import call
from .graph import Graph


class Replacement:
    """Generates the wrapper of one graph while AOTAutograd puts its own around compiled code.

    Args:
        entry: AOTAutograd's cache entry, from the artifact.
        grad: grad mode at each call, as the frame's guards make sure; None where nothing does.
    """

    def __init__(self, entry: Any, grad: bool | None) -> None:
        self._entry = entry
        self._grad = grad
        self._made: tuple[Boxed, Compiled] | None = None

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Within the block, AOTAutograd uses the generated wrapper for its own, on this thread."""

        def replace(wrapper: Any, compiled: Boxed, aot_config: Any, *, runtime_metadata: Any) -> Boxed:
            graph = Graph(self._entry, wrapper, compiled, aot_config, runtime_metadata)
            made = call.compiled(graph, self._grad)
            boxed = made.boxed or compile_function("def boxed(args):\n    return call(*args)\n", call=made.call)
            self._made = boxed, made
            return boxed

        def leave_out(wrapper: Any, compiled: Boxed, aot_config: Any, *, runtime_metadata: Any) -> Boxed:
            if not runtime_metadata.is_rng_op_functionalized:  # up to 2.12 it decides that at each call
                return compiled
            return wrap_rng(wrapper, compiled, aot_config, runtime_metadata=runtime_metadata)

        wrap_rng = aot.FunctionalizedRngRuntimeWrapper.post_compile
        with (
            _on_this_thread(aot.RuntimeWrapper, replace),
            _on_this_thread(aot.FunctionalizedRngRuntimeWrapper, leave_out),
        ):
            yield

    def result(self, outermost: Boxed) -> Compiled:
        """The compiled code, given what AOTAutograd returned: the same, or wrapped where inputs may coincide."""
        assert self._made is not None
        boxed, made = self._made
        if outermost is boxed:
            return made
        active = [type(w).__name__ for w in self._entry.dispatch_wrappers if getattr(w, "needs_post_compile", True)]
        names = {"AOTDedupeWrapper": "inputs passed twice", "AOTSyntheticBaseWrapper": "overlapping inputs"}
        around = (names.get(name, name) for name in active)
        repeatable = made.repeatable and "AOTSyntheticBaseWrapper" not in active  # it lays inputs out anew
        return Compiled(call.unboxed(outermost), None, (*around, *made.wrappers), repeatable)


@contextlib.contextmanager
def _on_this_thread(wrapper: Any, post_compile: Callable[..., Boxed]) -> Iterator[None]:
    """Within the block, `post_compile` replaces that method of one of AOTAutograd's wrappers, on this thread."""
    thread, usual = threading.get_ident(), wrapper.post_compile

    def choose(*args: Any, **keywords: Any) -> Boxed:
        chosen: Callable[..., Boxed] = post_compile if threading.get_ident() == thread else usual
        return chosen(*args, **keywords)

    with patched(wrapper, "post_compile", choose):
        yield

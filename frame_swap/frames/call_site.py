"""Where a frame calls its graph: found by a Dynamo bytecode hook, redirected when compiled code is in.

Dynamo's generated code calls the graph through a global, `__compiled_fn_*`, behind a wrapper that keeps Dynamo
out. The hook puts the callee there as a constant; later the cache entry gets a code object with another one.

Guarantees:
- A site is bound at most once, under Dynamo's compile lock, before its code object first runs.
- `redirect` and `bind` may run on different threads; a redirect of a site that is not bound, or whose code is
  gone, raises `FrameGone` and changes nothing.
- A redirect that was interrupted may be done again with the same code object, and ends as if it had not been.
- Frames already running the old code object finish in it.
- `restore` leaves nothing behind that calls what `redirect` has put in place.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from types import CodeType, MethodType
from typing import Any, Protocol

from ..codegen import rewriting
from ..codegen.rewriting import Condition
from ..errors import FrameGone, Indirect
from ..internals import dynamo
from . import cache_entry, dispatch


class Callee(Protocol):
    """What a frame calls while compiled code is not in, or does not fit."""

    def __call__(self, *args: Any) -> Any: ...

    def boxed(self, args: list[Any]) -> Any:
        """The same, with the arguments in one list."""

    def answer(self, error: Exception, /, *args: Any) -> Any:
        """What the frame's call returns where compiled code, called with `args`, has raised `error`."""


class CallSite:
    """The place in one frame where one graph is called.

    Args:
        name: the global that Dynamo's code calls, `__compiled_fn_*`.
        scope: the frame's globals.
        callee: what to call there for now, a `Callee`, which Dynamo is told not to trace. Held weakly: the code
            object keeps it alive.
        whole: whether the frame does nothing else that Dynamo would capture.
    """

    def __init__(self, name: str, scope: dict[str, Any], callee: Callee, whole: bool = False) -> None:
        self._name = name
        self._scope = scope
        self._callee = weakref.ref(callee)
        self._whole = whole
        self._in_place: list[Callable[..., Any]] = []  # what rewritten code calls
        self._in_place_boxed: list[Callable[..., Any]] = []  # with one list
        self._original: weakref.ref[CodeType] | None = None
        self._generated: weakref.ref[CodeType] | None = None
        _expected[name] = self
        for method in (type(callee).__call__, type(callee).boxed, type(callee).answer, _raise):
            dynamo.skip_frames(method.__code__)
        _install_hook()

    def rewritten(
        self,
        callee: Any,
        condition: Condition | None = None,
        boxed: Callable[[list[Any]], Any] | None = None,
        *,
        answered: bool = False,
    ) -> CodeType:
        """The frame's code, calling `callee` instead, or only where `condition` holds.

        Takes milliseconds; any thread may do it.

        Args:
            boxed: `callee` for a call with all arguments in one list, where that is cheaper.
            answered: whether what was called until now answers where `callee` raises.

        Raises:
            FrameGone, Indirect.
        """
        _, generated = self._codes()
        usual = self._callee()
        if usual is None:
            raise FrameGone
        there_already = any(_is_method(constant, usual.answer) for constant in generated.co_consts)
        answer = usual.answer if answered and not there_already else None
        self._in_place.append(callee)
        if boxed is not None:
            self._in_place_boxed.append(boxed)
        if condition is None:
            return rewriting.call_instead(generated, usual, callee, boxed, answer)
        return rewriting.call_if(generated, condition, usual, callee, answer)

    def redirect(self, code: CodeType) -> None:
        """Put `code`, from `rewritten`, in place of what is there. The caller holds Dynamo's compile lock.

        Raises:
            FrameGone, UnknownLayout: nothing has changed.
        """
        original = self._original() if self._original is not None else None
        generated = self._generated() if self._generated is not None else None
        entry = cache_entry.find(original, generated, code) if original is not None else None
        if original is None or entry is None:
            raise FrameGone
        if entry.code is not code:
            cache_entry.replace_code(entry, code)
        if self._whole:
            dispatch.entry_rewritten(original, entry, code)
        self._generated = weakref.ref(code)

    def restore(self) -> None:
        """Have the frame call what it called at first, for good.

        Raises:
            FrameGone, UnknownLayout: nothing has changed.
        """
        _, generated = self._codes()
        usual = self._callee()
        if usual is None:
            raise FrameGone

        def usual_for(constant: object) -> object:
            if _is_method(constant, usual.answer):
                return _raise
            if any(constant is boxed for boxed in self._in_place_boxed):
                return usual.boxed
            return usual if any(constant is callee for callee in self._in_place) else constant

        self.redirect(generated.replace(co_consts=tuple(map(usual_for, generated.co_consts))))
        self._in_place, self._in_place_boxed = [], []

    def rebind(self, callee: Any) -> None:
        """Point the global at `callee`: frees what it held, and serves code that calls it by name."""
        if self._name in self._scope:
            self._scope[self._name] = callee

    def _codes(self) -> tuple[CodeType, CodeType]:
        if self._original is None or self._generated is None:
            raise Indirect("its frame calls it through a wrapper")
        original, generated = self._original(), self._generated()
        if original is None or generated is None:
            raise FrameGone
        return original, generated

    def _bind(self, original: CodeType, generated: CodeType) -> None:
        self._original, self._generated = weakref.ref(original), weakref.ref(generated)

    def _is_direct(self) -> bool:
        """Whether the global holds our callee, behind nothing but Dynamo's own `disable`."""
        held = self._scope.get(self._name)
        callee = self._callee()
        return callee is not None and dynamo.without_disable(held) is callee


def _is_method(constant: object, method: Callable[..., Any]) -> bool:
    return isinstance(constant, MethodType) and constant == method  # others, such as tensors, compare in own ways


def _raise(error: Exception, /, *args: Any) -> Any:
    """In place of an answer, where what answered is what raises."""
    try:
        raise error
    finally:
        del error  # whose traceback leads to this frame


# Sites whose code Dynamo is still generating, by the name that it will call.
_expected: weakref.WeakValueDictionary[str, CallSite] = weakref.WeakValueDictionary()


@functools.cache
def _install_hook() -> None:
    dynamo.register_bytecode_hook(_on_generated_code)


def _on_generated_code(code: CodeType, new_code: CodeType) -> CodeType | None:
    named = {name: site for name in new_code.co_names if (site := _expected.pop(name, None)) is not None}
    sites = {name: site for name, site in named.items() if site._is_direct()}
    if not sites:
        return None
    trampolining = rewriting.call_constants(new_code, {name: site._callee() for name, site in sites.items()})
    for site in sites.values():
        site._bind(code, trampolining)
    return trampolining

"""The place in a frame where it calls its graph: found by a Dynamo bytecode hook, redirected to compiled code.

Dynamo's generated code calls the graph through a global, `__compiled_fn_*`, behind a wrapper that keeps Dynamo out.
The hook keeps that code with a placeholder in place of the callee. Every code object that the frame runs is made
from it afresh: with the trampoline at first, with compiled code later.

Guarantees:
- A site is bound at most once, under Dynamo's compile lock, before its code object first runs.
- `rewrite` may run on any thread. `redirect` of a site that is not bound, or whose code is gone, raises `FrameGone`
  and changes nothing.
- A redirect that was interrupted may be done again with the same rewrite, and ends as if it had not been.
- A rewrite made before another graph of the same frame was redirected is made again: neither undoes the other.
- Frames that already run the old code object finish in it.
- A frame redirected to nothing calls what it called at first; nothing of what it called in between remains in it.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Sequence
from types import CodeType
from typing import Any, NamedTuple, Protocol

from ..codegen.calls import Target, call_constants, direct_calls
from ..errors import FrameGone, Indirect
from ..internals import dynamo
from ..runtime import machine
from . import cache_entry, dispatch


class Callee(Protocol):
    """What a frame calls while compiled code is not in, or does not fit."""

    def __call__(self, *args: Any) -> Any: ...

    def recover(self, error: Exception, /, *args: Any) -> Any:
        """What the frame's call returns after compiled code, called with `args`, has raised `error`."""

    def frame_gone(self) -> None:
        """Nobody runs the frame's code any more. Called anywhere, also within a garbage collection."""


class Calls(NamedTuple):
    """What a site calls.

    Attributes:
        targets: in order; the first whose condition holds is called. The callee is called where none does.
        recovers: whether the callee is asked where a target raises.
        keeps_callee: whether the frame keeps the callee alive even where nothing calls it.
    """

    targets: Sequence[Target] = ()
    recovers: bool = False
    keeps_callee: bool = False


class Rewrite(NamedTuple):
    """A code object for a frame in which one site makes other calls."""

    calls: Calls
    code: CodeType
    version: int


class _Frame:
    """The code of one frame, shared by its sites.

    Attributes:
        original: the user's code object, held weakly.
        current, next: the one in the cache entry, and the one that a redirect puts there; held weakly.
        version: counts what was put there.
    """

    def __init__(self, original: CodeType, base: CodeType, sites: Sequence[CallSite]) -> None:
        self.original = weakref.ref(original)
        self._base = base
        self._sites = [weakref.ref(site) for site in sites]
        self.version = 0
        self.current = self.next = weakref.ref(base)

    @property
    def is_gone(self) -> bool:
        """Whether nobody runs the frame's code any more."""
        return self.current() is None and self.next() is None

    def reference(self, code: CodeType) -> weakref.ref[CodeType]:
        """A weak reference for `current` and `next`, which tells the callees when the frame is gone."""
        return weakref.ref(code, self._code_gone)

    def _code_gone(self, _: object) -> None:
        if self.is_gone:
            for site in filter(None, (ref() for ref in self._sites)):
                site.frame_gone()

    def code(self, site: CallSite | None = None, calls: Calls | None = None) -> CodeType:
        """The frame's code, with `calls` for `site`, and for its other sites what they call now."""
        code = self._base
        for other in filter(None, (ref() for ref in self._sites)):
            code = other.applied(code, calls if other is site and calls is not None else other.calls)
        return code


class CallSite:
    """The place in one frame where one graph is called.

    Args:
        name: the global that Dynamo's code calls, `__compiled_fn_*`.
        scope: the frame's globals.
        callee: what to call there for now; Dynamo is told not to trace it. Held weakly: the code object keeps it
            alive.
        whole: whether the frame does nothing else that Dynamo would capture.
    """

    def __init__(self, name: str, scope: dict[str, Any], callee: Callee, whole: bool = False) -> None:
        self._name = name
        self._scope = scope
        self._callee = weakref.ref(callee)
        self._whole = whole
        self._frame: _Frame | None = None
        self.calls = Calls()
        _expected[name] = self
        for method in (type(callee).__call__, type(callee).recover):
            dynamo.skip_frames(method.__code__)
        _register_hook()

    @property
    def placeholder(self) -> str:
        """The constant that stands for the callee in the frame's code; no identifier looks so."""
        return f"frame-swap: {self._name}"

    def rewrite(self, calls: Calls) -> Rewrite:
        """The frame's code with `calls` made at this site. Takes milliseconds; any thread may do it.

        Raises:
            FrameGone: nobody runs the frame's code any more.
            Indirect: the frame does not call its graph in Dynamo's way.
        """
        frame = self._bound()
        version = frame.version
        return Rewrite(calls, frame.code(self, calls), version)

    def redirect(self, rewrite: Rewrite) -> None:
        """Put a rewrite in place. The caller holds Dynamo's compile lock.

        Raises:
            FrameGone, UnknownLayout: nothing has changed.
        """
        frame = self._frame
        original = frame.original() if frame is not None else None
        if frame is None or original is None:
            raise FrameGone
        code = rewrite.code if rewrite.version == frame.version else frame.code(self, rewrite.calls)
        entry = cache_entry.find(original, frame.current(), frame.next(), code)
        if entry is None:
            raise FrameGone
        if entry.code is not code:
            frame.next = frame.reference(code)
            cache_entry.replace_code(entry, code)
        if self._whole:
            dispatch.entry_rewritten(original, entry, code)
        frame.current = frame.reference(code)
        self.calls = rewrite.calls
        frame.version += 1

    @property
    def is_gone(self) -> bool:
        """Whether nobody runs the frame's code any more."""
        return self._frame is not None and self._frame.is_gone

    def frame_gone(self) -> None:
        """Tell the callee."""
        if (callee := self._callee()) is not None:
            callee.frame_gone()

    def rebind(self, callee: Any) -> None:
        """Point the global at `callee`: frees what it held, and serves code that calls it by name."""
        if self._name in self._scope:
            self._scope[self._name] = callee

    def applied(self, code: CodeType, calls: Calls) -> CodeType:
        """`code` with `calls` in place of the placeholder."""
        callee = self._callee()
        if callee is None and (calls.recovers or all(target.condition for target in calls.targets)):
            raise FrameGone
        recover = callee.recover if callee is not None and calls.recovers else None
        keep = callee if calls.keeps_callee else None
        return direct_calls(code, self.placeholder, callee, calls.targets, recover, keep)

    def _bound(self) -> _Frame:
        if self._frame is None:
            raise Indirect("its frame calls it through a wrapper")
        if self._frame.original() is None or self._frame.current() is None:
            raise FrameGone
        return self._frame

    def bind(self, frame: _Frame) -> None:
        """`frame` calls the graph here."""
        self._frame = frame

    def holds_callee(self) -> bool:
        """Whether the global holds our callee, behind nothing but Dynamo's own `disable`."""
        held = self._scope.get(self._name)
        callee = self._callee()
        return callee is not None and dynamo.without_disable(held) is callee


# Sites whose code Dynamo is still generating, by the name that it will call.
_expected: weakref.WeakValueDictionary[str, CallSite] = weakref.WeakValueDictionary()


@functools.cache
def _register_hook() -> None:
    dynamo.register_bytecode_hook(_on_generated_code)


def bound(code: CodeType, generated: CodeType) -> CodeType:
    """Dynamo's code for a frame of `code`, with what its sites call in place of the globals.

    Raises:
        Indirect: it calls none of them.
    """
    if (first := _on_generated_code(code, generated)) is None:
        raise Indirect("its frame calls it through a wrapper")
    return first


def _on_generated_code(code: CodeType, new_code: CodeType) -> CodeType | None:
    named = {name: site for name in new_code.co_names if (site := _expected.pop(name, None)) is not None}
    sites = {name: site for name, site in named.items() if site.holds_callee()}
    if not sites:
        return None
    callees = {name: site.placeholder for name, site in sites.items()}
    base = machine.run_without_full_collections(functools.partial(call_constants, new_code, callees))
    frame = _Frame(code, base, list(sites.values()))
    for site in sites.values():
        site.bind(frame)
    first = frame.code()
    frame.current = frame.next = frame.reference(first)
    return first

"""Call rewritten code from Python: without `torch.compile`'s wrapper, and without Dynamo's frame evaluation.

A function that was opted in is called through a *dispatcher*: a function with the same parameters, so that Python
binds the arguments. It evaluates the guards of the cache entries whose code has been rewritten, and runs the code
of the first whose guards hold, as the function's own: a *shortcut*. A call without a shortcut goes to the function
that `torch.compile` returned.

Guarantees:
- Code runs from here only while its cache entry lives and the entry's guards hold. Under `static_module`, the
  guards on the module need to have held once.
- No entry is kept alive, and a shortcut is dropped with its entry: Dynamo's Python object for an entry dies when
  the entry is removed or invalidated.
- If an entry's code is rewritten again, its shortcut runs the new code from the same moment on.
- A call takes no lock and reads whole tuples. Code that replaces these holds `_changing`.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import os
import threading
import weakref
from collections.abc import Callable
from inspect import Parameter, Signature
from types import CodeType, FunctionType, MethodType
from typing import Any, NamedTuple, cast

import torch

from ..internals import eval_frame


class Shortcut(NamedTuple):
    """The code of a cache entry, and its guards.

    Attributes:
        check: whether the guards hold, given a call's locals by name.
        run: takes the arguments of the function.
    """

    check: Callable[[dict[str, Any]], bool]
    run: Callable[..., Any]


@dataclasses.dataclass(frozen=True, eq=False)
class _Entry:
    """The shortcuts of one cache entry; `reduced` evaluates no guards on the module."""

    alive: weakref.ref[Any]
    full: Shortcut
    reduced: Shortcut | None


_changing = threading.RLock()  # reentrant, since an entry may die at any allocation


def _after_fork_in_child() -> None:
    global _changing
    _changing = threading.RLock()  # the thread that held it is not here, and each change is a single step


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)


class _Rewritten(NamedTuple):
    """What a table takes from a cache entry, read while Dynamo's compile lock was held.

    Attributes:
        original: the code that Dynamo has captured.
        backend, guards: the entry's.
        code: what it runs now.
    """

    original: weakref.ref[CodeType]
    backend: Any
    guards: Any
    code: CodeType


_tables: weakref.WeakSet[_Table] = weakref.WeakSet()

# By entry. Another function with the same code may be opted in later: a second instance, a second closure.
_rewritten: weakref.WeakKeyDictionary[Any, _Rewritten] = weakref.WeakKeyDictionary()


class _Table:
    """The cache entries of one function whose code has been rewritten.

    Args:
        function: the function that Dynamo captures.
        backend: entries of other backends are left out.
        module: the parameter for a module that keeps the promise of `opt_in`.

    Attributes:
        entries: all of them.
        latest: the shortcut used last, alone in its tuple.
        promised: shortcuts of entries whose guards have all held for a module, by the module's `id` and training
            flag; the last used first.
    """

    def __init__(self, function: FunctionType, backend: Any, module: str | None) -> None:
        self.function = function
        self._backend = backend
        self._module = module
        self.entries: tuple[_Entry, ...] = ()
        self.latest: tuple[Shortcut, ...] = ()
        self.promised: dict[tuple[int, bool], tuple[Shortcut, ...]] = {}
        with _changing:
            _tables.add(self)
            for entry, rewritten in list(_rewritten.items()):
                if rewritten.original() is function.__code__:
                    self.take(entry, rewritten)

    def search(self, scope: dict[str, Any], module: torch.nn.Module | None = None) -> Callable[..., Any] | None:
        """The code to run for a call with the locals `scope`; None without a shortcut. Tried first from now on."""
        for entry in self.entries:
            if entry.full.check(scope):
                if module is not None and entry.reduced is not None:
                    self._promise(module, entry, entry.reduced)
                else:
                    self.latest = (entry.full,)
                    if entry not in self.entries:  # it was removed just now, perhaps before that line
                        self.latest = ()
                return entry.full.run
        return None

    def take(self, entry: Any, rewritten: _Rewritten) -> None:
        """Run the code that this entry runs: add the entry, or change its shortcuts."""
        known = next((e for e in self.entries if e.alive() is entry), None)
        _, backend, guards, code = rewritten
        if known is not None:
            cast(FunctionType, known.full.run).__code__ = code
        elif backend == self._backend and (run := _function(code, self.function)) is not None:
            reduced = eval_frame.guards_elsewhere(guards, self._module) if self._module else None
            alive = weakref.ref(entry, functools.partial(_if_alive, weakref.WeakMethod(self._remove)))
            self.entries += (_Entry(alive, Shortcut(guards.check, run), reduced and Shortcut(reduced.check, run)),)

    def _promise(self, module: torch.nn.Module, entry: _Entry, reduced: Shortcut) -> None:
        with _changing:
            if entry not in self.entries:
                return
            key = id(module), module.training
            if not any(known == id(module) for known, _ in self.promised):
                forget = weakref.WeakMethod(self._forget)
                weakref.finalize(module, _if_alive, forget, id(module)).atexit = False
            others = (shortcut for shortcut in self.promised.get(key, ()) if shortcut is not reduced)
            self.promised = {**self.promised, key: (reduced, *others)}

    def _forget(self, module_id: int) -> None:
        with _changing:
            self.promised = {key: value for key, value in self.promised.items() if key[0] != module_id}

    def _remove(self, dead: weakref.ref[Any]) -> None:
        with _changing:
            self.entries = tuple(entry for entry in self.entries if entry.alive is not dead)
            runs = [entry.full.run for entry in self.entries]
            self.latest = tuple(shortcut for shortcut in self.latest if shortcut.run in runs)
            promised = ((key, tuple(s for s in value if s.run in runs)) for key, value in self.promised.items())
            self.promised = dict(promised)


def _if_alive(method: weakref.WeakMethod[Callable[..., None]], *args: Any) -> None:
    if (bound := method()) is not None:
        bound(*args)


def entry_rewritten(original: CodeType, entry: Any, code: CodeType) -> None:
    """The cache entry `entry` runs the rewritten `code` now; give it a shortcut.

    Args:
        original: the code of the functions that the entry is for.
        code: calls a graph, and otherwise nothing that Dynamo would capture.
    """
    rewritten = _Rewritten(weakref.ref(original), entry.backend, entry.guard_manager.root, code)
    with _changing:
        _rewritten[entry] = rewritten
        for table in list(_tables):
            if table.function.__code__ is original:
                table.take(entry, rewritten)


def dispatcher(compiled: Callable[..., Any]) -> Callable[..., Any]:
    """A dispatcher for `compiled`, which `torch.compile` has returned for a function or a bound method."""
    target = eval_frame.compiled_callable(compiled)
    backend = eval_frame.backend_of(compiled)
    if backend is None:
        return compiled
    if isinstance(target, FunctionType):
        return _stand_in(_dispatch(target, backend, compiled), compiled)
    if isinstance(target, MethodType) and isinstance(target.__func__, FunctionType):
        unbound = _without_first(compiled)
        return _bound(_dispatch(target.__func__, backend, unbound), target.__self__, compiled)
    return compiled


def module_dispatcher(
    compiled: Callable[..., Any],
    module: torch.nn.Module | None = None,
    *,
    static_module: bool = False,
    hooked: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """A dispatcher for `compiled`, which `torch.compile` has returned for the method behind `nn.Module.__call__`.

    Dynamo captures `forward` there: without hooks, the method does no more than call it.

    Args:
        compiled: compiled from the function, or from `module`'s bound method.
        hooked: called with a module that has hooks; `compiled`, if None.
    """
    backend = eval_frame.backend_of(compiled)
    if backend is None:
        return compiled
    ordinary = compiled if module is None else _without_first(compiled)
    forwards: dict[Any, Callable[..., Any]] = {}

    def call(self: torch.nn.Module, /, *args: Any, **kwargs: Any) -> Any:
        if not eval_frame.only_calls_forward(self):
            return (hooked or ordinary)(self, *args, **kwargs)
        forward = type(self).forward
        dispatch = forwards.get(forward)
        if dispatch is None:
            dispatch = ordinary
            if isinstance(forward, FunctionType):
                dispatch = _dispatch(forward, backend, ordinary, static_module)
            forwards[forward] = dispatch
        return dispatch(self, *args, **kwargs)

    return _stand_in(call, compiled) if module is None else _bound(call, module, compiled)


def _bound(function: Callable[..., Any], first: Any, compiled: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        return function(first, *args, **kwargs)

    return _stand_in(call, compiled)


def _without_first(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(_: Any, /, *args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return call


def _stand_in(function: Callable[..., Any], compiled: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, with the attributes of `compiled`. Dynamo takes it for that, and does not trace its frame."""
    functools.update_wrapper(function, compiled)
    eval_frame.stand_in(function, compiled)
    return function


# CUDA graphs tell the steps of a program apart by the generation; `torch.compile` increases it at each call.
# An @ stands for a prefix that keeps our names apart from the function's.
_SOURCE = """
def make({free}):
    def dispatch{signature}:
        if @table.entries and @undisturbed():
            try:
                @scope = {{{scope}}}
            except NameError:  # a variable of an enclosing function has no value yet
                return @ordinary({passed})
            for @check, @run in {first}:
                if @check(@scope):
                    @tracker.generation += 1
                    return @run({passed})
            @run = @table.search(@scope{module})
            if @run is not None:
                @tracker.generation += 1
                return @run({passed})
        return @ordinary({passed})
    return dispatch
"""


def _dispatch(
    function: FunctionType, backend: Any, ordinary: Callable[..., Any], static_module: bool = False
) -> FunctionType:
    """A function with the parameters of `function` that takes a shortcut, or calls `ordinary`.

    Args:
        function: the function that Dynamo captures when `ordinary` is called.
        backend: entries of other backends are left out.
        static_module: whether the first parameter is a module that keeps the promise of `opt_in`.
    """
    free = function.__code__.co_freevars
    signature = _signature(function.__code__, function)
    parameters = signature.parameters.values()
    passed = ", ".join(_PASSED[parameter.kind].format(parameter.name) for parameter in parameters)
    takes_module = static_module and any(parameter.kind in _POSITIONAL for parameter in parameters)
    module = next(iter(signature.parameters)) if takes_module else None
    source = _SOURCE.format(
        free=", ".join(free),
        signature=signature,
        scope=", ".join(f"{name!r}: {name}" for name in (*signature.parameters, *free)),
        first=f"@table.promised.get((id({module}), {module}.training), ())" if module else "@table.latest",
        module=f", {module}" if module else "",
        passed=passed,
    )
    scope: dict[str, Any] = {
        "frame_swap_table": _Table(function, backend, module),
        "frame_swap_tracker": eval_frame.GenerationTracker,
        "frame_swap_undisturbed": eval_frame.undisturbed,
        "frame_swap_ordinary": ordinary,
    }
    exec(compile(source.replace("@", "frame_swap_"), "<frame-swap>", "exec"), scope)
    template: FunctionType = scope.pop("make")(*free)
    dispatch = _with_cells(template.__code__, function, scope)
    dispatch.__defaults__, dispatch.__kwdefaults__ = function.__defaults__, function.__kwdefaults__
    return dispatch


_PASSED = {
    Parameter.POSITIONAL_ONLY: "{0}",
    Parameter.POSITIONAL_OR_KEYWORD: "{0}",
    Parameter.VAR_POSITIONAL: "*{0}",
    Parameter.KEYWORD_ONLY: "{0}={0}",
    Parameter.VAR_KEYWORD: "**{0}",
}
_POSITIONAL = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)


def _function(code: CodeType, like: FunctionType) -> FunctionType | None:
    """A function that runs Dynamo's `code` for `like`; None if that takes other arguments or more cells."""
    if not {*code.co_freevars} <= {*like.__code__.co_freevars}:
        return None
    if _signature(code, like) != _signature(like.__code__, like):
        return None
    return _with_cells(code, like, like.__globals__)


def _signature(code: CodeType, like: FunctionType) -> Signature:
    """The parameters of `code`, without defaults and annotations: those belong to a function."""
    return inspect.signature(_with_cells(code, like, {}))


def _with_cells(code: CodeType, like: FunctionType, scope: dict[str, Any]) -> FunctionType:
    cells = dict(zip(like.__code__.co_freevars, like.__closure__ or (), strict=True))
    return FunctionType(code, scope, like.__name__, None, tuple(cells[name] for name in code.co_freevars))

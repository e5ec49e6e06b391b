"""What Dynamo's tracer has read of the program's state, noted when it reads it.

This is the safeguard of a capture that runs beside the program.

Dynamo builds a guard from the value that its source has at the end of the trace. The trace has used an earlier
value, and a program that runs on may have changed it in between. So each value that `VariableBuilder` wraps is
noted when it is wrapped, and the predicate of each guard when the guard is added, by PyTorch's table of predicates.
For the guard of a wrapped value the predicate is taken from that value, not from what the source holds by then.
The code of a function is noted when the tracer takes it to inline the function.

Guarantees:
- If `ReadLog.differs` returns None while the guards hold, all that was noted is so in one and the same state: that
  of the calling thread at that moment.
- A guard without a predicate ends the capture, and so does a change of the process-wide state.
- Objects that guards match by identity are held weakly. One that has died differs from each that lives. The code
  of a function that has died after the trace cannot change any more: the guards on its successor decide.
- Other threads' traces are not noted.

Assumed: what Dynamo reads is a value that goes through `VariableBuilder`, the code of a function that it inlines,
or something that it adds a guard for right then. What it reads in another way once more goes unnoticed, if the
program changes it before that and changes it back after it.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import threading
import warnings
import weakref
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from types import CodeType, FunctionType
from typing import Any, NamedTuple

import torch

from ..errors import first_line
from .probe import names_looked_up

with names_looked_up():
    import torch._dynamo
    from torch._dynamo import guards
    from torch._dynamo.variables import ConstantVariable
    from torch._dynamo.variables.builder import VariableBuilder
    from torch._dynamo.variables.functions import UserFunctionVariable
    from torch._guards import GuardsSet
    from torch.utils._python_dispatch import is_traceable_wrapper_subclass

try:
    from torch._dynamo.guards import GUARD_VALUE_DISPATCH, SKIP_GUARD, UnsupportedGuardCheckSpec
except ImportError:  # before torch 2.13
    GUARD_VALUE_DISPATCH = {}

__all__ = ["GivenUp", "ReadLog", "install", "is_possible", "log", "noting"]

Differs = Callable[[Any], bool]
"""Whether a value differs from what was noted."""


class GivenUp(BaseException):
    """The capture ends here; the message says why. Not an `Exception`: Dynamo and the program let it pass.

    Attributes:
        lasting: whether the frame can only be captured in a call.
    """

    def __init__(self, why: str, *, lasting: bool = False) -> None:
        super().__init__(why)
        self.lasting = lasting


class _Read(NamedTuple):
    """A value as the tracer was given it; `frozen` is a copy of a container that may change."""

    value: Any
    frozen: Any
    differs: Differs


class ReadLog:
    """What one capture has read.

    Args:
        f_locals, f_globals: of the frame.
        checkpoint: called at each note; it may raise `GivenUp`.
    """

    def __init__(
        self, f_locals: Mapping[str, Any], f_globals: Mapping[str, Any], checkpoint: Callable[[], None]
    ) -> None:
        self.checkpoint = checkpoint
        self._scope = {"L": f_locals, "G": f_globals}
        self._reads: dict[Any, _Read] = {}
        self._constants: dict[Any, Differs] = {}
        self._guards: dict[Any, Differs] = {}
        self._containers: dict[Any, int] = {}
        self._codes: dict[FunctionType, CodeType] = {}
        self._noted: list[tuple[Any, str, Differs]] = []
        self._noted_codes: list[tuple[Callable[[], FunctionType | None], CodeType]] = []

    # On the thread that captures

    def start(self) -> None:
        """The trace begins, or begins anew: then what it has read so far decides how it goes on."""
        self.confirm()
        self._reads, self._constants, self._guards, self._containers, self._codes = {}, {}, {}, {}, {}

    def confirm(self) -> None:
        """Raise `GivenUp` if something is not as it was read. Then guards may have been built of another state."""
        self._collect()
        if (changed := self._differs(self._scope, missing_differs=False)) is not None:
            raise GivenUp(f"{changed} has changed")

    def seal(self) -> None:
        """The trace is over: let go of the values, and of the frame."""
        self._collect()
        self._scope = {}
        self._reads, self._constants, self._guards, self._codes = {}, {}, {}, {}

    def _collect(self) -> None:
        self._noted = [(source, "the kind", read.differs) for source, read in self._reads.items()]
        self._noted += [(source, "the value", differs) for source, differs in self._constants.items()]
        self._noted += [(key[0], f"{key[1]}", differs) for key, differs in self._guards.items()]
        self._noted_codes = [(weakref.ref(function), code) for function, code in self._codes.items()]

    def read(self, source: Any, value: Any) -> None:
        """The tracer is about to wrap `value`."""
        self.checkpoint()
        if id(value) in _IN_THE_CALL or isinstance(value, _TYPES_IN_THE_CALL):
            raise GivenUp(f"tracing {source.name} changes the program", lasting=True)
        if is_traceable_wrapper_subclass(value):
            raise GivenUp(f"{source.name} is a tensor subclass", lasting=True)
        if (before := self._reads.get(source)) is not None:
            other = value is not before.value and isinstance(value, _TRACKED)
            if other or before.differs(value) or _outline(before.frozen) != _outline(value):
                raise GivenUp(f"{source.name} has changed")
            return  # the tracer goes on with what it has made of the first
        differs = _tensor_differs(value) if isinstance(value, torch.Tensor) else _type_is_not(type(value))
        self._reads[source] = _Read(value, _frozen(value), differs)
        if isinstance(value, _COPIED):
            self._containers[source] = id(value)

    def wrapped(self, source: Any, value: Any, result: Any) -> None:
        """The tracer has wrapped `value` as `result`: as a constant, perhaps."""
        if isinstance(value, _CONSTANTS):
            if issubclass(type(result), ConstantVariable):  # `isinstance` would make a lazy one real
                self._constants[source] = _unequal(value)
            else:
                self._constants.pop(source, None)

    def inlined(self, function: FunctionType, code: CodeType) -> None:
        """The tracer has taken `code` from `function`, to inline it or to bind its arguments."""
        self.checkpoint()
        if self._codes.setdefault(function, code) is not code:
            raise GivenUp(f"the code of {function.__qualname__} has changed")

    def guarded(self, guard: Any) -> None:
        """The tracer has added `guard`."""
        self.checkpoint()
        kind, source = guard.create_fn_name(), guard.originating_source
        spec = GUARD_VALUE_DISPATCH.get(kind)
        if spec is SKIP_GUARD:
            return  # on the state of the thread, or on how values relate to each other: no value to go stale
        if spec is None or isinstance(spec, UnsupportedGuardCheckSpec):
            raise GivenUp(f"no predicate is known for the guard {kind} on {source.name}", lasting=True)
        try:
            self._guards[source, kind, _keywords(guard)] = self._predicate(guard, kind, spec)
        except Exception as error:
            raise GivenUp(f"{kind} of {source.name} has changed ({type(error).__name__}: {error})") from None

    def _predicate(self, guard: Any, kind: str, spec: Any) -> Differs:
        source = guard.originating_source
        read = self._reads.get(source)
        if kind == "TENSOR_MATCH":
            return read.differs if read is not None else _tensor_differs(self._value(source))
        if kind in _BY_IDENTITY:
            return _is_not(read.value if read is not None else self._value(source))
        value = read.frozen if read is not None else _frozen(self._value(source))
        metadata = spec.get_metadata_fn(guard, value)
        if isinstance(metadata, (type, CodeType)):
            reference = _reference(metadata)
            return lambda now: not spec.eval_fn(now, reference())
        return lambda now: not spec.eval_fn(now, metadata)

    def _value(self, source: Any) -> Any:
        return source.get_value(self._scope, dict(guards._get_closure_vars()), {})

    # On the caller's thread

    def differs(self, f_locals: Mapping[str, Any], f_globals: Mapping[str, Any]) -> str | None:
        """What is not as it was read; None if all is. `f_locals` and `f_globals` are those of the frame."""
        return self._differs({"L": f_locals, "G": f_globals}, missing_differs=True)

    def _differs(self, scope: dict[str, Any], *, missing_differs: bool) -> str | None:
        variables = dict(guards._get_closure_vars())  # its own: evaluating a source writes into it
        cache: dict[Any, Any] = {}
        alike: dict[int, int] = {}
        for source, what, differs in self._noted:
            try:
                now = source.get_value(scope, variables, cache)
            except NotImplementedError:  # nothing that a program could reach by a name
                continue
            except Exception as error:
                if missing_differs:
                    return f"{source.name} ({first_line(error)})"
                continue
            try:
                if differs(now):
                    return f"{what} of {source.name}"
                then = self._containers.get(source)
                if then is not None and alike.setdefault(then, id(now)) != id(now):
                    return f"the identity of {source.name}"
            except Exception as error:
                return f"{what} of {source.name} ({first_line(error)})"
        if len(set(alike.values())) < len(alike):
            return "containers that are one and the same"
        for reference, code in self._noted_codes:
            if (function := reference()) is not None and function.__code__ is not code:
                return f"the code of {function.__qualname__}"
        return None


# --- Predicates ---

_CONSTANTS = (int, float, complex, str, bytes, bool, type(None), torch.dtype, torch.device, torch.layout)
_COPIED = (list, dict, set, deque, OrderedDict, defaultdict)
_TRACKED = (torch.Tensor, torch.nn.Module, FunctionType)
"""Dynamo knows these by identity: it would take another object for another value, though their source is one."""
_BY_IDENTITY = ("ID_MATCH", "NN_MODULE", "FUNCTION_MATCH", "CLASS_MATCH", "MODULE_MATCH", "BUILTIN_MATCH")


def _frozen(value: Any) -> Any:
    """`value`, or a copy if it is a container that may change."""
    return copy.copy(value) if type(value) in _COPIED else value


def _outline(value: Any) -> Any:
    """What a trace depends on if it reads this value twice."""
    if isinstance(value, _CONSTANTS):
        return value if value == value else None  # NaN
    if isinstance(value, dict):
        return list(dict.keys(value))
    if isinstance(value, (set, frozenset)):
        return value
    return len(value) if isinstance(value, (list, tuple, deque)) else None


def _reference(value: Any) -> Callable[[], Any]:
    """A function that returns `value` for as long as it lives. What cannot be referred to weakly is held."""
    try:
        return weakref.ref(value)
    except TypeError:
        return lambda: value


def _is_not(value: Any) -> Differs:
    if value is None:
        return lambda now: now is not None
    reference = _reference(value)
    return lambda now: now is None or now is not reference()


def _type_is_not(kind: type) -> Differs:
    reference = _reference(kind)
    return lambda now: type(now) is not reference()


def _unequal(value: Any) -> Differs:
    kind = type(value)
    return lambda now: type(now) is not kind or (now != value and (now == now or value == value))


def _tensor(value: Any) -> tuple[Any, ...]:
    return (
        type(value),
        value.dtype,
        value.device,
        value.layout,
        value.requires_grad,
        value.dim(),
        value.is_inference(),
        value.is_conj(),
        value.is_neg(),
    )


def _tensor_differs(value: torch.Tensor) -> Differs:
    noted = _tensor(value)
    return lambda now: not isinstance(now, torch.Tensor) or _tensor(now) != noted


def _keywords(guard: Any) -> Any:
    """What tells guards of one kind on one source apart."""
    keywords = getattr(guard.create_fn, "keywords", None) or {}
    return tuple(value if isinstance(value, _CONSTANTS) else id(value) for value in keywords.values())


# --- Hooks in Dynamo ---

_TYPES_IN_THE_CALL: tuple[type, ...] = (torch.optim.Optimizer,)
"""Dynamo traces these by calling them: an optimizer makes its state then."""

_IN_THE_CALL = frozenset(
    id(function)
    for function in (torch.use_deterministic_algorithms, torch.set_default_dtype, warnings.catch_warnings)
)
"""Tracing these changes the state of the process."""

_own = threading.local()


def log() -> ReadLog | None:
    """The log of the capture that runs on the calling thread beside the program, if one does."""
    return getattr(_own, "log", None)


def is_possible() -> bool:
    """Whether this torch has the table of predicates."""
    return bool(GUARD_VALUE_DISPATCH)


@contextlib.contextmanager
def noting(read_log: ReadLog) -> Iterator[None]:
    """Within the block, what the calling thread traces is noted in `read_log`."""
    _own.log = read_log
    try:
        yield
    finally:
        _own.log = None
        read_log.seal()


@functools.cache
def install() -> None:
    """Note what is read on threads that are within `noting`. Other threads pay for a look."""
    add, wrap = GuardsSet.add, VariableBuilder.__call__
    get_code, bind = UserFunctionVariable.get_code, UserFunctionVariable.bind_args

    @functools.wraps(add)
    def noted_add(self: Any, guard: Any, *, skip: int = 0, **how: Any) -> None:
        current = log()
        is_new = current is not None and guard not in self.inner
        add(self, guard, skip=skip + 1, **how)
        if current is not None and is_new:
            current.guarded(guard)

    @functools.wraps(wrap)
    def noted_wrap(self: Any, value: Any) -> Any:
        current = log()
        if current is None:
            return wrap(self, value)
        current.read(self.source, value)
        result = wrap(self, value)
        current.wrapped(self.source, value, result)
        return result

    @functools.wraps(get_code)
    def noted_get_code(self: Any) -> CodeType:
        code = get_code(self)
        if (current := log()) is not None and type(self.fn) is FunctionType:
            current.inlined(self.fn, code)
        return code

    @functools.wraps(bind)
    def noted_bind(self: Any, *args: Any, **keywords: Any) -> Any:
        bound = bind(self, *args, **keywords)
        if (current := log()) is not None:  # it has read the code past `get_code`
            current.inlined(self.fn, self.fn.__code__)
        return bound

    setattr(GuardsSet, "add", noted_add)  # noqa: B010
    setattr(VariableBuilder, "__call__", noted_wrap)  # noqa: B010
    setattr(UserFunctionVariable, "get_code", noted_get_code)  # noqa: B010
    setattr(UserFunctionVariable, "bind_args", noted_bind)  # noqa: B010

"""What an object is, in terms that mean the same in the program's next process: to see whether it is still that.

A description equals another one where the objects are the same for whoever traces code that uses them: the same
constant, the same function by its code, the same class by the code of its methods. What cannot be described so is
`Unkeepable`. Descriptions are tuples of plain values, to be compared by `==`.
"""

from __future__ import annotations

import builtins
import contextlib
import enum
import functools
import gc
import hashlib
import itertools
import sys
import threading
from collections.abc import Iterator
from types import (
    BuiltinFunctionType,
    CellType,
    CodeType,
    FunctionType,
    MethodDescriptorType,
    MethodType,
    ModuleType,
    WrapperDescriptorType,
)
from typing import Any

import torch

from ..errors import Unkeepable
from ..internals import dispatcher

Description = tuple[Any, ...]

_PLAIN = (int, float, complex, bool, str, bytes, type(None), type(...))
_TORCH = (torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size)
_BUILT_IN = (BuiltinFunctionType, WrapperDescriptorType, MethodDescriptorType)


def constant(value: Any) -> Description:
    """Describe a value that a trace takes for a constant.

    Raises:
        Unkeepable: it is none.
    """
    cls = type(value)
    if cls in _PLAIN or cls in _TORCH:
        return cls.__name__, repr(value)
    if cls in (tuple, list):
        return cls.__name__, tuple(map(constant, value))
    if cls in (set, frozenset):
        return cls.__name__, tuple(sorted(map(constant, value)))
    if cls is dict:
        return "dict", tuple((constant(key), constant(item)) for key, item in value.items())
    if cls in (slice, range):
        return cls.__name__, tuple(constant(part) for part in (value.start, value.stop, value.step))
    if isinstance(value, CodeType):
        return "code", digest(value)
    return identity(value)


def identity(value: Any) -> Description:
    """Describe an object that a trace knows by its identity.

    Raises:
        Unkeepable: nothing says that an object of the next process is the same.
    """
    if type(value) in _PLAIN or type(value) in _TORCH:
        return constant(value)
    if isinstance(value, ModuleType):
        return "module", value.__name__
    if isinstance(value, type):
        return "class", value.__module__, value.__qualname__, _methods(value)
    if isinstance(value, FunctionType):
        return "function", value.__module__, value.__qualname__, digest(value.__code__), _marks(value)
    if isinstance(value, MethodType):
        return "method", identity(value.__func__), identity(type(value.__self__))
    if isinstance(value, enum.Enum):
        return "member", identity(type(value)), value.name
    if isinstance(value, _BUILT_IN):
        owner = getattr(value, "__self__", None)
        return "built in", getattr(value, "__module__", None), value.__qualname__, getattr(owner, "__name__", None)
    if isinstance(value, (dispatcher.OpOverload, dispatcher.OpOverloadPacket)):
        return "operator", str(value)
    raise Unkeepable(f"nothing says what another process has in place of a {type(value).__qualname__}")


@functools.lru_cache(maxsize=10_000)
def digest(code: CodeType) -> str:
    """A digest of what `code` does: not of where it stands."""
    parts = (
        code.co_code,
        code.co_names,
        code.co_varnames,
        code.co_freevars,
        code.co_cellvars,
        code.co_flags,
        (code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount),
        code.co_exceptiontable,
        tuple(map(constant, code.co_consts)),
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()


class _Known(threading.local):
    methods: dict[type, str] | None = None


_known = _Known()


@contextlib.contextmanager
def each_class_once() -> Iterator[None]:
    """Within the block no class changes: on this thread, each is described once."""
    _known.methods = {}
    try:
        yield
    finally:
        _known.methods = None


def _methods(cls: type) -> str:
    """A digest of the code of all methods of a class, inherited ones too, and of its constants."""
    known = _known.methods if _known.methods is not None else {}
    if cls not in known:
        known[cls] = _digest_of_methods(cls)
    return known[cls]


def _digest_of_methods(cls: type) -> str:
    found = []
    for base in cls.__mro__:
        if base.__module__ in (builtins.__name__, "typing", "abc"):
            continue
        for name, value in sorted(vars(base).items()):
            found.append(
                (base.__qualname__, name, [digest(code) for code in codes_of(value)] or _if_constant(value))
            )
    return hashlib.sha256(repr(found).encode()).hexdigest()


def _if_constant(value: Any) -> Any:
    if type(value) not in (*_PLAIN, *_TORCH, tuple):
        return type(value).__qualname__
    try:
        return constant(value)
    except Unkeepable:
        return type(value).__qualname__


def _marks(function: FunctionType) -> tuple[str, ...]:
    """The names of what has been set on a function, such as by `torch._dynamo.disable`."""
    return tuple(sorted(name for name in vars(function) if name != "__wrapped__"))


# --- Where code is found again ---

Place = tuple[str, str, tuple[str, ...]]
"""Of code: the name of its module, its qualified name there, and the digests of all code that this name leads to: a
function's, and those of the functions that it wraps."""


def place_of(code: CodeType) -> Place:
    """Where another process finds `code`.

    Raises:
        Unkeepable: it does not.
    """
    names = ((module.__name__, code.co_qualname) for module in _modules_of(code.co_filename))
    for module, name in itertools.chain(names, _names_of_functions(code)):
        if digest(code) in (digests := _digests_at(module, name)):
            return module, name, digests
    raise Unkeepable(f"{code.co_qualname}, {code.co_filename}:{code.co_firstlineno} cannot be found by its name")


def is_there(place: Place) -> bool:
    """Whether the code is where it was, and the same, and nothing has been wrapped around it."""
    module, name, digests = place
    return _digests_at(module, name) == digests


def _digests_at(module: str, qualified_name: str) -> tuple[str, ...]:
    if (owner := sys.modules.get(module)) is None:
        return ()
    outer, *inner = qualified_name.split(".<locals>.")
    found: Any = owner
    for name in outer.split("."):
        found = next((vars(base)[name] for base in _searched(found) if name in vars(base)), None)
    codes = list(codes_of(found))
    for name in inner:
        nested = (constant for code in codes for constant in code.co_consts if isinstance(constant, CodeType))
        codes = [code for code in nested if code.co_name == name.rpartition(".")[2]]
    return tuple(map(digest, codes))


def codes_of(value: Any, depth: int = 4) -> Iterator[CodeType]:
    """The code of a function, also where it is wrapped."""
    if depth == 0 or value is None:
        return
    if isinstance(value, FunctionType):
        yield value.__code__
        wrapped = [getattr(value, "__wrapped__", None), *map(_content, value.__closure__ or ())]
    elif isinstance(value, property):
        wrapped = [value.fget, value.fset, value.fdel]
    elif isinstance(value, (staticmethod, classmethod, MethodType)):
        wrapped = [value.__func__]
    else:
        wrapped = [getattr(value, "__wrapped__", None)] if not isinstance(value, type) else []
    for inner in wrapped:
        yield from codes_of(inner, depth - 1) if callable(inner) or isinstance(inner, property) else ()


def _content(cell: CellType) -> Any:
    try:
        content = cell.cell_contents
    except ValueError:  # it is empty
        return None
    return content if isinstance(content, (FunctionType, MethodType)) else None


def _searched(owner: Any) -> tuple[Any, ...]:
    if isinstance(owner, type):
        return owner.__mro__
    return (owner,) if isinstance(owner, ModuleType) else ()


def _names_of_functions(code: CodeType) -> Iterator[tuple[str, str]]:
    """What functions with this code are called: those of a dataclass bear names that their code does not know."""
    for function in gc.get_referrers(code):
        if isinstance(function, FunctionType):
            yield function.__module__, function.__qualname__


def _modules_of(file: str) -> Iterator[ModuleType]:
    if file.startswith("<frozen ") and (frozen := sys.modules.get(file[len("<frozen ") : -1])) is not None:
        yield frozen
    for module in list(sys.modules.values()):
        if isinstance(module, ModuleType) and getattr(module, "__file__", None) == file:
            yield module

"""Whether two processes have the same operator: digests of what the dispatcher has of it and of what it runs."""

from __future__ import annotations

import dis
import hashlib
import sys
import types
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from ...internals import dispatcher


class Identity(NamedTuple):
    """Digests, the same in each process: what the dispatcher has of an operator, and what its functions do."""

    registrations: str
    functions: str


class OperatorReference:
    """A stand-in for an operator; equal to each other one, since a definition is compared by its own text."""


def identity(operator: dispatcher.OpOverload) -> Identity:
    """The identity of an operator of this process."""
    registrations = dispatcher.registrations(operator) + str(sorted(map(str, operator.tags)))
    texts = [f"{role} {_text(function, set())}" for role, function in functions(operator)]
    return Identity(*(hashlib.sha256(t.encode()).hexdigest() for t in (registrations, "\n".join(texts))))


def functions(operator: dispatcher.OpOverload) -> list[tuple[str, Any]]:
    """The Python functions that define an operator, as far as `torch.library` keeps them; not its kernels."""
    definition = dispatcher.custom_op_def(operator)
    if definition is None:
        found = {"fake": dispatcher.fake_impl(operator)}
    else:
        parts = dispatcher.parts(definition)
        found = {
            "fake": parts.fake,
            "backward": parts.backward,
            "setup_context": parts.setup_context,
            "vmap": parts.vmap,
            **{cls.__qualname__: function for cls, function in parts.dispatch.items()},
        }
    return [(role, function) for role, function in found.items() if function is not None]


def names(code: types.CodeType) -> Iterator[str]:
    """Names of globals and attributes in a code object and in those inside it."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from names(constant)


PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
"""Types whose `repr` says all, and the same in each process."""


def _text(value: Any, seen: set[int], read: frozenset[str] = frozenset()) -> str:
    """What a function does, as text: its code, and what that reads of its module and of the scopes around it.

    Of a module, the plain values and functions that the code reads of it; of an object, its class. Of PyTorch and
    Python's library, names: they are the same in each process. The rest comes with imports.

    Args:
        value: a function, or what one reads.
        seen: ids of functions that are in the text, and of the containers around `value`.
        read: the names in the code that reads `value`.
    """
    if isinstance(value, PLAIN):
        return repr(value)
    if isinstance(
        value, (dispatcher.CustomOpDef, dispatcher.OpOverload, dispatcher.OpOverloadPacket, OperatorReference)
    ):
        return "operator"
    value = getattr(value, "__func__", value)
    if id(value) in seen:
        return getattr(value, "__qualname__", "itself")
    seen.add(id(value))
    if isinstance(value, types.FunctionType):
        return _function_text(value, seen)
    if isinstance(value, (list, tuple)):
        text = str([_text(item, seen) for item in value])
    elif isinstance(value, (set, frozenset)):
        text = str(sorted(_text(item, seen) for item in value))
    elif isinstance(value, dict):
        text = str(sorted((_text(k, seen), _text(v, seen)) for k, v in value.items()))
    elif isinstance(value, types.ModuleType):
        parts = [(n, vars(value)[n]) for n in sorted(read & set(vars(value)))]
        texts = [(n, _text(p, seen, read)) for n, p in parts if isinstance(p, (*PLAIN, types.FunctionType))]
        text = f"{value.__name__} {texts}"
    else:
        text = _class_text(value if isinstance(value, type) else type(value), seen)
    seen.discard(id(value))
    return text


def _class_text(cls: type, seen: set[int]) -> str:
    """The name of a class, and its methods, those it inherits included."""
    methods: dict[str, str] = {}
    for owner in cls.__mro__:
        if _is_torch_or_stdlib(owner):
            continue
        for name, method in vars(owner).items():
            function = getattr(method, "fget", getattr(method, "__func__", method))
            if isinstance(function, types.FunctionType):
                methods.setdefault(name, _text(function, seen))
    return f"{cls.__qualname__} {sorted(methods.items())}" if methods else cls.__qualname__


def _is_torch_or_stdlib(value: Any) -> bool:
    """Whether a function or class is PyTorch's or of Python's library."""
    package = (getattr(value, "__module__", None) or "").partition(".")[0]
    return package == "torch" or package in sys.stdlib_module_names


def _function_text(function: types.FunctionType, seen: set[int]) -> str:
    if _is_torch_or_stdlib(function):
        return function.__qualname__
    code, values = function.__code__, function.__globals__
    read = frozenset(names(code))
    reads = {n: _text(values[n], seen, read) for n in sorted(_globals_read(code)) if n in values}
    cells = [_text(cell.cell_contents, seen, read) for cell in function.__closure__ or ()]
    return f"{_code(code)} {_text(function.__defaults__, seen)} {cells} {reads}"


def _globals_read(code: types.CodeType) -> set[str]:
    read = {i.argval for i in dis.get_instructions(code) if i.opname == "LOAD_GLOBAL"}
    return read.union(*(_globals_read(c) for c in code.co_consts if isinstance(c, types.CodeType)))


def _code(code: types.CodeType) -> str:
    def text(constant: Any) -> str:
        if isinstance(constant, types.CodeType):
            return _code(constant)
        return str(sorted(map(repr, constant))) if isinstance(constant, frozenset) else repr(constant)

    return f"{code.co_code.hex()} {code.co_names} {code.co_varnames} {[text(c) for c in code.co_consts]}"

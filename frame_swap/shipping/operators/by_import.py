"""Where an operator can be imported from."""

from __future__ import annotations

import functools
import hashlib
import os
import sys
from collections.abc import Iterator
from typing import Any

import torch

from ...internals import dispatcher
from .identity import functions


def modules(operator: dispatcher.OpOverload) -> Iterator[str]:
    """The modules that may define an operator, the likeliest first."""
    named = [module_of(function) for _, function in functions(operator)]
    definition = dispatcher.custom_op_def(operator)
    if definition is not None:
        named.append(module_of(dispatcher.parts(definition).kernel))
    by_file = {getattr(module, "__file__", None): name for name, module in list(sys.modules.items())}
    named += [by_file[file] for file in dispatcher.registered_at(operator) if file in by_file]
    named += [name for name in (dispatcher.stub_module(operator), operator.namespace) if name]
    yield from (name for name in dict.fromkeys(named) if is_importable(name) and not is_torch(name))


def libraries(operator: dispatcher.OpOverload) -> Iterator[str]:
    """The C++ libraries that may define an operator: all that the program has loaded."""
    if not dispatcher.defined_in_python(operator):
        yield from sorted(torch.ops.loaded_libraries)


def digest(library: str) -> str:
    """The SHA-256 of a C++ library's file."""
    found = os.stat(library)
    return _digest(library, found.st_size, found.st_mtime_ns)


@functools.cache
def _digest(library: str, size: int, changed: int) -> str:
    with open(library, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_local(operator: dispatcher.OpOverload) -> bool:
    """Whether `__main__` defines the operator, or the inside of a function does."""
    definition = dispatcher.custom_op_def(operator)
    defining = [function for _, function in functions(operator)]
    if definition is not None:
        defining.append(dispatcher.parts(definition).kernel)
    own = [f for f in defining if not is_torch(module_of(f))]
    return any(module_of(f) == "__main__" or "<locals>" in getattr(f, "__qualname__", "") for f in own)


def module_of(function: Any) -> str:
    """The name of the module that defines a function; "" where it has none."""
    return getattr(function, "__module__", None) or ""


def is_torch(module: str) -> bool:
    """Whether a module is PyTorch's."""
    return module.partition(".")[0] == "torch"


def is_importable(module: str) -> bool:
    """Whether another process can import a module under its name here."""
    return module != "__main__" and getattr(sys.modules.get(module), "__spec__", None) is not None

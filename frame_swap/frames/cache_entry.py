"""Dynamo's cache entries, and putting another code object into one.

Python may read an entry's code but not set it. The C++ struct behind it begins with two PyObject pointers,
`{guard_manager, code, ...}` (torch/csrc/dynamo/cache_entry.h, the same in 2.11 to 2.15), and pybind11 keeps
the pointer to that struct right behind the Python object's header. Both fields are compared with what the
entry itself says before anything is written.

An entry belongs to Dynamo and goes when its guards do: it is looked up again each time, by its current code
object, and never kept. Other threads that run the old code object keep it alive through their frames.
"""

from __future__ import annotations

import ctypes
import sysconfig
from types import CodeType
from typing import Any

from .. import internals

_POINTER = ctypes.sizeof(ctypes.c_void_p)


class UnknownLayout(Exception):
    """This torch or this Python lays cache entries out in a way that has not been checked."""


def find(original: CodeType, generated: CodeType) -> Any | None:
    """The entry of the user's code `original` whose generated code is `generated`; None if it is gone."""
    for entry in internals.cache_entries(original):
        if entry.code is generated:
            return entry
    return None


def replace_code(entry: Any, new: CodeType) -> None:
    """Make `entry` run `new` from the next call on.

    Raises:
        UnknownLayout: and nothing was written.
    """
    old = entry.code
    field = _code_field(entry)
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(new))
    field.value = id(new)
    ctypes.pythonapi.Py_DecRef(ctypes.py_object(old))
    internals.adopt_code(old, new)


def _code_field(entry: Any) -> ctypes.c_void_p:
    if sysconfig.get_config_var("Py_GIL_DISABLED"):
        raise UnknownLayout("free-threaded Python")
    struct = ctypes.c_void_p.from_address(id(entry) + object.__basicsize__).value
    if not struct:
        raise UnknownLayout("the entry points nowhere")
    guard_manager = ctypes.c_void_p.from_address(struct)
    code = ctypes.c_void_p.from_address(struct + _POINTER)
    if guard_manager.value != id(entry.guard_manager) or code.value != id(entry.code):
        raise UnknownLayout("the entry's first fields are not its guard manager and its code")
    return code

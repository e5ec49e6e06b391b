"""Dynamo's cache entries, and putting another code object into one.

Python may read an entry's code but not set it. The C++ struct behind it begins with two PyObject pointers,
`{guard_manager, code, ...}` (torch/csrc/dynamo/cache_entry.h, the same in 2.11 to 2.15), and pybind11 keeps
the pointer to that struct right behind the Python object's header. Both fields are compared with what the
entry itself says before anything is written.

An entry belongs to Dynamo and goes when its guards do: it is looked up again each time, by its current code
object, and never kept. Other threads that run the old code object keep it alive through their frames.

Guarantees:
- An entry runs the old code or the new, whatever interrupts this thread: the write is one step, and what comes
  before it may be done twice.

Assumed: the caller holds Dynamo's compile lock, as `torch._dynamo.reset` does; it frees entries.
"""

from __future__ import annotations

import ctypes
import sysconfig
from types import CodeType
from typing import Any

from .. import internals
from . import FrameGone

_POINTER = ctypes.sizeof(ctypes.c_void_p)


class UnknownLayout(Exception):
    """This torch or this Python lays cache entries out in a way that has not been checked."""


def find(original: CodeType, *generated: CodeType | None) -> Any | None:
    """The entry of the user's code `original` whose code is one of `generated`; None if it is gone."""
    for entry in internals.cache_entries(original):
        if entry.code is not None and any(entry.code is code for code in generated):
            return entry
    return None


def replace_code(entry: Any, new: CodeType) -> None:
    """Make `entry` run `new` from the next call on.

    Raises:
        UnknownLayout: and nothing was written.
        FrameGone: another thread has just deleted what the entry's guards are about.
    """
    field, guards = _code_field(entry), entry.guard_manager
    if entry.code is not None:
        internals.adopt_code(entry.code, new)
        _set(field, new)
        if entry.guard_manager is guards:
            return
        _set(field, None)
    raise FrameGone


def _set(field: ctypes.c_void_p, value: CodeType | None) -> None:
    # Reference counts and the pointer change in one call, which neither a signal nor another thread divides.
    ctypes.pythonapi.PyMember_SetOne(ctypes.byref(field), ctypes.byref(_OBJECT), ctypes.py_object(value))


class _MemberDef(ctypes.Structure):
    """How C extensions describe a field of a struct: `PyMemberDef`."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("type", ctypes.c_int),
        ("offset", ctypes.c_ssize_t),
        ("flags", ctypes.c_int),
        ("doc", ctypes.c_char_p),
    )


_OBJECT = _MemberDef(name=b"code", type=16)  # Py_T_OBJECT_EX: an owned reference


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

"""Dynamo's cache entries, and putting another code object into one.

Python may read an entry's code but not set it. The C++ struct behind it begins with two PyObject pointers,
`{guard_manager, code, ...}` (torch/csrc/dynamo/cache_entry.h, the same in 2.11 to 2.15), and pybind11 keeps
the pointer to that struct right behind the Python object's header. Both fields are compared with what the
entry itself says before anything is written.

An entry belongs to Dynamo and goes when its guards do: it is looked up again each time, by its current code
object, and never kept. Other threads that run the old code object keep it alive through their frames.

Guarantees:
- An entry runs the old code or the new, whatever interrupts this thread or runs in others: checking what is there
  and writing is one step, and what comes before it may be done twice.

Assumed: the caller holds Dynamo's compile lock, as `torch._dynamo.reset` does, which frees entries.
"""

from __future__ import annotations

import ctypes
import sysconfig
from types import CodeType
from typing import Any

from ..errors import FrameGone, UnknownLayout
from ..internals import dynamo

_POINTER = ctypes.sizeof(ctypes.c_void_p)


def find(original: CodeType, *generated: CodeType | None) -> Any | None:
    """The entry of the user's code `original` whose code is one of `generated`; None if it is gone."""
    wanted = [id(code) for code in generated if code is not None]
    for entry in dynamo.cache_entries(original):
        if id(entry.code) in wanted:
            return entry
    return None


def replace_code(entry: Any, new: CodeType) -> None:
    """Make `entry` run `new` from the next call on.

    Raises:
        UnknownLayout: and nothing was written.
        FrameGone: another thread has just deleted what the entry's guards are about, and nothing was written.
    """
    field, old = _code_field(entry), entry.code
    if old is None:
        raise FrameGone
    dynamo.adopt_code(old, new)
    expected, target, value = id(old), ctypes.byref(field), ctypes.py_object(new)
    # Threads take turns, and signals are looked at, when a call has returned: not between these two lines.
    if field.value == expected:
        _set_object(target, _OWNED, value)
    else:
        raise FrameGone


class _MemberDef(ctypes.Structure):
    """How C extensions describe a field of a struct: `PyMemberDef`."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("type", ctypes.c_int),
        ("offset", ctypes.c_ssize_t),
        ("flags", ctypes.c_int),
        ("doc", ctypes.c_char_p),
    )


_OWNED = ctypes.byref(_MemberDef(name=b"code", type=16))  # Py_T_OBJECT_EX: an owned reference

_set_object = ctypes.pythonapi.PyMember_SetOne  # writes the pointer and counts both references


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

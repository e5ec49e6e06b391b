"""Find Dynamo's cache entries, and put another code object into one.

Python can read an entry's code but not set it. The C++ struct behind the entry begins with two PyObject pointers,
`{guard_manager, code, ...}` (torch/csrc/dynamo/cache_entry.h, the same in 2.11 to 2.15). pybind11 keeps the pointer
to that struct right behind the header of the Python object. Before anything is written, both fields are compared
with the entry's attributes.

Dynamo owns its entries and deletes them. So an entry is never kept here, but found again each time, by its current
code object. Other threads that run the old code object keep it alive through their frames.

Guarantees:
- An entry runs the old code or the new one, even if an interrupt or another thread comes in between: comparing and
  writing is one step, and the steps before it may be done twice.

Assumed: the caller holds Dynamo's compile lock, as `torch._dynamo.reset` does when it deletes entries.
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
    """The entry for the user's code `original` that runs one of `generated`; None if it is gone."""
    wanted = [id(code) for code in generated if code is not None]
    for entry in dynamo.cache_entries(original):
        if id(entry.code) in wanted:
            return entry
    return None


def replace_code(entry: Any, new: CodeType) -> None:
    """Make `entry` run `new` from the next call on.

    Raises:
        UnknownLayout: the struct is not as described above. Nothing was written.
        FrameGone: another thread has just deleted an object that the entry's guards are on. Nothing was written.
    """
    field, old = _code_field(entry), entry.code
    if old is None:
        raise FrameGone
    dynamo.adopt_code(old, new)
    expected, target, value = id(old), ctypes.byref(field), ctypes.py_object(new)
    # CPython switches threads and looks at signals after a call has returned: not between these two lines.
    if field.value == expected:
        _set_object(target, _OWNED, value)
    else:
        raise FrameGone


class _MemberDef(ctypes.Structure):
    """`PyMemberDef`: the description of a struct's field in C extensions."""

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

"""A worker keeps the bytecode of what it imports, also where the program keeps none.

What a compile imports is 2500 modules: to compile them all takes some 15 s, to read their bytecode 5. A container's
image often has none, and has `PYTHONDONTWRITEBYTECODE` set, or its packages belong to another user.
"""

from __future__ import annotations

import importlib.util
import os
import sys

from ...artifacts import folders
from ...errors import UnsafeFolder


def keep() -> None:
    """Where torch's bytecode is missing and would not be written, read and write it in a folder of this user's.

    For this process, and those that it starts from now on.
    """
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.cached is None or os.path.exists(spec.cached):
        return
    there = os.path.dirname(spec.cached)
    if not sys.dont_write_bytecode and os.access(os.path.dirname(there), os.W_OK):
        return
    folder = os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "frame_swap", "bytecode"
    )
    try:
        folders.make_own(folder)
    except (UnsafeFolder, OSError):  # then it is compiled each time
        return
    sys.pycache_prefix = os.environ["PYTHONPYCACHEPREFIX"] = folder
    sys.dont_write_bytecode = False
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

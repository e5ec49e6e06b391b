"""The key of an artifact: a digest of all that the result of its compile depends on, and of nothing else.

The content of a parcel says what is compiled, and has the same bytes in each process that runs the same program.
Added are the sizes that a late guard has settled, and what compiles it: torch, Triton, Python, the compiler, the
machine's instructions, the GPU, and frame-swap itself.

Guarantees:
- The same program in two processes on one machine has the same keys, wherever its caches and temporary files are.
- A change of anything named above changes the key.

Assumed: an operator that a module defines does not depend on what that module reads when it is imported, such as
variables and files of its own.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ...internals import inductor
from ...shipping.parcel import Parcel
from ..seal import made_for

_LIBRARIES = ("triton", "sympy", "numpy")
"""Packages besides torch whose code decides what is compiled."""


def key_of(parcel: Parcel, sizes: Mapping[str, int] | None = None) -> str:
    """The key under which the artifact of `parcel` is kept, as hexadecimal digits.

    Args:
        sizes: of symbols in the graph's shapes, where they differ from those it was traced with.
    """
    depends_on = {**installation(), "C++ compilers": _compilers()}
    depends_on |= {"content": parcel.digest, "sizes": dict(sizes or {})}
    if "cuda" in parcel.state.autocast:  # it has an entry for the type of each device that an input is on
        depends_on["GPU"] = _gpu()
    return hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()


@functools.cache
def installation() -> dict[str, Any]:
    """What is the same for all graphs of this process."""
    return {
        **made_for(),
        "torch": [str(torch.__version__), torch.version.git_version, torch.version.cuda, torch.version.hip],
        "Python": sys.version,
        "system": [sys.platform, os.confstr("CS_GNU_LIBC_VERSION") if sys.platform == "linux" else ""],
        "libraries": {name: _version(name) for name in _LIBRARIES},
        "frame_swap": _own_code(),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _own_code() -> str:
    """A digest of frame-swap's own files: in a working copy they change under one version."""
    digest = hashlib.sha256()
    package = Path(__file__).resolve().parents[2]
    for file in sorted(package.rglob("*.py")):
        digest.update(f"{file.relative_to(package)} {file.stat().st_size}\n".encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _compilers() -> list[tuple[str, int, int]]:
    """The C++ compilers that Inductor would try: of each the file, its size, and when it was changed."""
    found = []
    for name in inductor.cpp_compilers():
        path = os.path.realpath(shutil.which(name) or name)
        with contextlib.suppress(OSError):
            about = os.stat(path)
            found.append((path, about.st_size, about.st_mtime_ns))
    return found


def _gpu() -> list[Any]:
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return [properties.name, properties.major, properties.minor, properties.multi_processor_count]

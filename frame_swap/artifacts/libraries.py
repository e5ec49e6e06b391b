"""Compiled C++ kernels travel inside the artifact.

Inductor's generated Python names its C++ kernels by their source, and loading it compiles each one again, or
finds it in a cache directory by a key that takes compiler runs to compute. The worker therefore records which
shared library each source became, and the calling process is given those libraries instead of a compiler.
"""

from __future__ import annotations

import contextlib
import hashlib
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from . import folders

Libraries = dict[str, bytes]
"""Shared libraries by the digest of what they were compiled from."""


class NotInArtifact(RuntimeError):
    """The artifact's code asks for a kernel that did not come with it."""


@contextlib.contextmanager
def recorded() -> Iterator[Libraries]:
    """In a worker: gather each C++ library that Inductor compiles within the block; complete at its end."""
    from torch._inductor.codecache import CppCodeCache

    compile_library = CppCodeCache.load_async.__func__  # type: ignore[attr-defined]
    pending: dict[str, Callable[[], Any]] = {}
    libraries: Libraries = {}

    def load_async(cls: Any, /, main_code: str, device_type: str = "cpu", **kwargs: Any) -> Any:
        library = compile_library(cls, main_code, device_type, **kwargs)
        pending[_digest(cls, main_code, device_type, kwargs.get("optimized_code"))] = library
        return library

    with mock.patch.object(CppCodeCache, "load_async", classmethod(load_async)):
        yield libraries
    for digest, library in pending.items():
        loaded = library()
        libraries[digest] = Path(getattr(loaded, "__file__", None) or loaded._name).read_bytes()


@contextlib.contextmanager
def supplied(libraries: Libraries) -> Iterator[None]:
    """In the calling process: load from `libraries` what generated code asks for. Nothing is compiled.

    Process-wide, so only under Dynamo's compile lock.

    Raises:
        NotInArtifact, folders.Unsafe, OSError: from within the block.
    """
    from torch._inductor.codecache import CppCodeCache

    def load_async(cls: Any, /, main_code: str, device_type: str = "cpu", **kwargs: Any) -> Callable[[], Any]:
        digest = _digest(cls, main_code, device_type, kwargs.get("optimized_code"))
        if digest not in libraries:
            raise NotInArtifact(f"a {device_type} kernel of {len(main_code)} characters")
        # Once it is mapped, the library needs no file.
        with tempfile.TemporaryDirectory(prefix="frame-swap-") as folder:  # 0700
            folders.check(folder)
            file = Path(folder, f"{digest}.so")
            file.write_bytes(libraries[digest])
            library = cls._load_library(str(file), digest)
        return lambda: library

    with mock.patch.object(CppCodeCache, "load_async", classmethod(load_async)):
        yield


def _digest(cls: type, main_code: str, device_type: str, optimized_code: str | None) -> str:
    parts = "\0".join((cls.__name__, device_type, main_code, optimized_code or ""))
    return hashlib.sha256(parts.encode()).hexdigest()

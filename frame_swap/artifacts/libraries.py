"""Compiled C++ kernels travel inside the artifact.

Inductor's generated Python names its C++ kernels by their source. To load it is to compile each one again, or to
find it in a cache folder by a key that takes compiler runs to compute. The worker therefore records the shared
library that each source became, and the program is given those libraries in place of a compiler.
"""

from __future__ import annotations

import contextlib
import hashlib
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..internals import loading
from ..runtime.patching import patched
from . import folders

Libraries = dict[str, bytes]
"""Shared libraries, by the digest of their source."""


class NotInArtifact(RuntimeError):
    """An artifact's code loads a kernel that the artifact does not hold."""


@contextlib.contextmanager
def recorded() -> Iterator[Libraries]:
    """In a worker: gather the C++ libraries that Inductor compiles within the block. Complete at its end."""
    cache = loading.cpp_code_cache()
    compile_library = cache.load_async.__func__
    pending: dict[str, Callable[[], Any]] = {}
    libraries: Libraries = {}

    def load_async(cls: Any, /, main_code: str, device_type: str = "cpu", **kwargs: Any) -> Any:
        library = compile_library(cls, main_code, device_type, **kwargs)
        pending[_digest(cls, main_code, device_type, kwargs.get("optimized_code"))] = library
        return library

    with patched(cache, "load_async", classmethod(load_async)):
        yield libraries
    for digest, library in pending.items():
        libraries[digest] = Path(loading.cpp_library_file(library())).read_bytes()


@contextlib.contextmanager
def supplied(libraries: Libraries) -> Iterator[None]:
    """In the program: generated code that is loaded within the block gets its kernels from `libraries`.

    Nothing is compiled.

    Process-wide, so only under Dynamo's compile lock.

    Raises:
        NotInArtifact, UnsafeFolder, OSError: from code within the block.
    """

    def load_async(cls: Any, /, main_code: str, device_type: str = "cpu", **kwargs: Any) -> Callable[[], Any]:
        digest = _digest(cls, main_code, device_type, kwargs.get("optimized_code"))
        if digest not in libraries:
            raise NotInArtifact(f"a {device_type} kernel of {len(main_code)} characters")
        # Once it is mapped, a library needs no file.
        with tempfile.TemporaryDirectory(prefix="frame-swap-") as folder:  # 0700
            folders.check(folder)
            file = Path(folder, f"{digest}.so")
            file.write_bytes(libraries[digest])
            library = loading.load_cpp_library(cls, str(file), digest)
        return lambda: library

    with patched(loading.cpp_code_cache(), "load_async", classmethod(load_async)):
        yield


def _digest(cls: type, main_code: str, device_type: str, optimized_code: str | None) -> str:
    parts = "\0".join((cls.__name__, device_type, main_code, optimized_code or ""))
    return hashlib.sha256(parts.encode()).hexdigest()

"""A Triton kernel as bytes: its function, what that reads, its source, and what `triton.autotune` has put around.

Guarantees:
- In a worker, the kernel has the source, the globals that it reads, the parameters and the configs that it has in
  the program. It is compiled there, and never run.
- Other kernels that it calls travel along, by value, too.

Triton reads a kernel's source from the file of its function, which a worker need not have (a notebook's cell): the
lines travel, too.
"""

from __future__ import annotations

import importlib
import inspect
import io
import linecache
import pickle
from typing import Any

import cloudpickle

_NOT_NEEDED = ("cache", "do_bench", "best_config", "nargs", "bench_time")
"""What a `triton.autotune` has found on this machine, and how it times."""


def pack(kernel: Any) -> bytes:
    """`kernel`, pickled.

    Raises:
        Exception: something that it reads cannot be pickled.
    """
    with io.BytesIO() as stream:
        _Pickler(stream).dump(kernel)
        return stream.getvalue()


def unpack(packed: bytes) -> Any:
    """The kernel that `pack` has pickled."""
    return pickle.loads(packed)


def function_of(kernel: Any) -> Any:
    """The Python function of a kernel, with whatever `triton.autotune` and the like have put around it."""
    function = kernel
    while hasattr(function, "fn"):
        function = function.fn
    return function


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]  # untyped
    def reducer_override(self, obj: Any) -> Any:
        kind = type(obj)
        if kind.__module__ == "triton.runtime.jit" and kind.__name__ == "JITFunction":
            held = vars(obj)
            names = set(inspect.signature(kind).parameters) - {"fn"}
            options = {name: held.get(name, held.get(f"_{name}")) for name in sorted(names)}
            code = obj.fn.__code__
            place = code.co_filename, code.co_firstlineno, linecache.getlines(code.co_filename)
            return _kernel, (obj.fn, options, place)
        if kind.__module__ == "triton.runtime.autotuner" and kind.__name__ == "Autotuner":
            state = {name: value for name, value in vars(obj).items() if name not in _NOT_NEEDED}
            return _autotuner, (), {**state, "cache": {}}
        return super().reducer_override(obj)


def _kernel(function: Any, options: dict[str, Any], place: tuple[str, int, list[str]]) -> Any:
    """The kernel of a function, whose code object cloudpickle has stripped of its place."""
    file, first_line, lines = place
    function.__code__ = function.__code__.replace(co_filename=file, co_firstlineno=first_line)
    linecache.cache[file] = (sum(map(len, lines)), None, lines, file)
    return importlib.import_module("triton.runtime.jit").JITFunction(function, **options)


def _autotuner() -> Any:
    cls = importlib.import_module("triton.runtime.autotuner").Autotuner
    return cls.__new__(cls)

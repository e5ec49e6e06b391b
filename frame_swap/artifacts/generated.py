"""Generated Python travels inside the artifact as code objects, and with it what hashing its tools has come to.

Inductor writes Python. To load an artifact is to compile that, for a tenth of a second in one piece, and to hash
all of torch's and Triton's sources, for most of a second. The worker has done both: it records the outcome where
it loads an artifact for a try, and the program is given it.
"""

from __future__ import annotations

import contextlib
import marshal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any, NamedTuple

from ..internals import generated_code, launches, loading
from ..runtime.patching import patched


class Generated(NamedTuple):
    """What loading an artifact has made once.

    Attributes:
        modules: marshalled code objects, by the keys of Inductor's cache of Python modules.
        compiling: the keys of those modules that import Inductor's compiler.
        torch: the hash of torch's sources.
        triton: the hashes of Triton's, by the names of the functions that return them; those that were needed.
    """

    modules: dict[str, bytes]
    compiling: list[str]
    torch: bytes
    triton: dict[str, Any]


@contextlib.contextmanager
def recorded() -> Iterator[Generated]:
    """In a worker: record what is loaded within the block. Complete at its end."""
    generated = Generated({}, [], loading.torch_hash(), {})

    def load_module(key: str, path: str, set_sys_modules: bool = True) -> ModuleType:
        code, is_heavy = generated_code.compiled_lightly(Path(path).read_text(), path)
        generated.modules[key] = marshal.dumps(code)
        if is_heavy:
            generated.compiling.append(key)
        return _module(key, path, code, set_sys_modules)

    with patched(*loading.maker_of_modules(), load_module):
        yield generated
    for owner, name in loading.triton_hashes():
        function = getattr(owner, name)
        if function.cache_info().currsize:
            generated.triton[name] = function()


@contextlib.contextmanager
def supplied(generated: Generated) -> Iterator[None]:
    """In the program: what is loaded within the block takes from `generated` what is there.

    No processes are started that would compile kernels: all are compiled. Code launches them directly.
    Process-wide, so only under Dynamo's compile lock.
    """
    load = getattr(*loading.maker_of_modules())

    def load_module(key: str, path: str, set_sys_modules: bool = True) -> Any:
        if (marshalled := generated.modules.get(key)) is None:
            return load(key, path, set_sys_modules)
        module = _module(key, path, marshal.loads(marshalled), set_sys_modules)
        launches.launch_directly(module)
        return module

    loading.set_torch_hash(generated.torch)
    with contextlib.ExitStack() as stack:
        stack.enter_context(patched(*loading.maker_of_modules(), load_module))
        stack.enter_context(patched(loading.kernel_compilers(), "use_process_pool", classmethod(lambda cls: False)))
        stack.enter_context(launches.noted())
        if generated.triton:
            for owner, name in loading.triton_hashes():
                if name in generated.triton:
                    stack.enter_context(patched(owner, name, lambda value=generated.triton[name]: value))
        yield


def _module(key: str, path: str, code: CodeType, set_sys_modules: bool) -> ModuleType:
    """What Inductor makes of generated Python."""
    module: Any = ModuleType(f"{loading.GENERATED}.{key}")
    module.__file__, module.key = path, key
    exec(code, module.__dict__)
    if set_sys_modules:
        sys.modules[module.__name__] = module
    return module  # type: ignore[no-any-return]

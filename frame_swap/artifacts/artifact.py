"""Artifacts: packed in a worker, and made callable in the calling process, as `compile_fx` would have done here.

An artifact is a line of JSON, which says what the rest is and for what, and a pickle. Nothing of the pickle is read
unless it is whole and made for a process like this one.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import pickle
import sys
from typing import Any

import torch

from ..errors import UnusableArtifact
from ..internals import dynamo, fake_tensors, inductor
from ..shipping import echo
from ..shipping.process_state import ProcessState
from . import folders, libraries
from .wrappers import Compiled, Replacement


def prepare() -> None:
    """Import what loading needs, ahead of it; at once where that was done before.

    Under the compile lock, so that it begins when Dynamo is done with the frame: most of a second of imports
    in another thread would otherwise be paid by the first call.
    """
    if _NEEDED in sys.modules:  # this thread imports it, if nobody else has: it is complete
        return
    with dynamo.compile_lock:
        importlib.import_module(_NEEDED)


_NEEDED = "torch._inductor.select_algorithm"


class Deferred:
    """The backward's FX graph, which only compiled autograd asks for: unpickled when it does.

    To unpickle an FX graph is to trace it, with `nn.Module.__call__` patched for all threads meanwhile: a program's
    own call of a module at that moment would be traced too.
    """

    def __init__(self, graph: Any) -> None:
        self._pickled = pickle.dumps(graph)

    def deserialize(self) -> Any:
        """The FX graph, as the object that this stands for gives it."""
        return pickle.loads(self._pickled).deserialize()


_FORMAT = 1


def _made_for() -> dict[str, Any]:
    """What code that this process compiles can be used with."""
    capabilities = torch.cpu.get_capabilities()
    return {
        "frame-swap artifact": _FORMAT,
        "torch": str(torch.__version__),
        "python": sys.implementation.cache_tag,
        "architecture": capabilities.get("architecture"),
        # Inductor's C++ is compiled for the machine's own instruction set, whatever it vectorises for.
        "instructions": sorted(name for name, there in capabilities.items() if there is True),
    }


def seal(content: bytes) -> bytes:
    """The artifact that `content` becomes: what it was made for, its length and its digest come first."""
    header = {**_made_for(), "length": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    return json.dumps(header).encode() + b"\n" + content


def unseal(artifact: bytes) -> memoryview:
    """The content of what `seal` made, of which nothing has been interpreted yet.

    Raises:
        UnusableArtifact: it is damaged, or made for something else.
    """
    end = artifact.find(b"\n", 0, 1 << 16)
    try:
        header = json.loads(artifact[:end]) if end >= 0 else None
    except ValueError:
        header = None
    if not isinstance(header, dict) or "frame-swap artifact" not in header:
        raise UnusableArtifact(f"its artifact does not begin as one does; {_ONCE_MORE}")
    if header["frame-swap artifact"] != _FORMAT:
        raise UnusableArtifact(f"its artifact is of another frame-swap; {_ALIKE}")
    content = memoryview(artifact)[end + 1 :]
    if len(content) != header.get("length"):
        raise UnusableArtifact(
            f"its artifact is not whole: {len(content)} of {header.get('length')} bytes; {_ONCE_MORE}"
        )
    if hashlib.sha256(content).hexdigest() != header.get("sha256"):
        raise UnusableArtifact(f"its artifact was changed after it was made; {_ONCE_MORE}")
    here = _made_for()
    for name in ("torch", "python", "architecture"):
        if header.get(name) != here[name]:
            raise UnusableArtifact(
                f"its artifact was made for {name} {header.get(name)}, here is {here[name]}; {_ALIKE}"
            )
    lacking = sorted({*header.get("instructions", ())} - {*here["instructions"]})
    if lacking:
        raise UnusableArtifact(
            f"its artifact was made for a CPU with {', '.join(lacking)}, which this lacks; {_ALIKE}"
        )
    return content


_ONCE_MORE = "the next run compiles it again"
_ALIKE = "let compiles run on this machine with this installation, as with frame_swap.configure(executor=None)"


def pack(entry: Any, kernels: libraries.Libraries) -> bytes:
    """The artifact of an AOTAutograd cache entry, in which a compile's result is bundled, and of its kernels."""
    if entry.serialized_bw_module is not None:
        entry.serialized_bw_module = Deferred(entry.serialized_bw_module)
    return seal(pickle.dumps((entry, kernels)))


def try_out(artifact: bytes, state: ProcessState, options: dict[str, Any]) -> None:
    """Load an artifact in the worker that made it, so that one which crashes a process crashes that.

    What Inductor remembers of it is forgotten again.
    """
    from torch._inductor.codecache import PyCodeCache

    known = len(PyCodeCache.modules)
    load(artifact, state, options, guarded=True)
    del PyCodeCache.modules[known:]


def load(artifact: bytes, state: ProcessState, options: dict[str, Any], *, guarded: bool) -> Compiled:
    """Load a worker's artifact: compiled forward and backward, with what a call of them needs around them.

    Holds Dynamo's compile lock meanwhile, since configs are process-wide.

    Args:
        state: of the thread and the process at capture.
        options: changes of Inductor's config, as `inductor.options_of` returns them.
        guarded: whether each call finds grad mode as it was at capture, as a frame's guards make sure.

    Raises:
        UnusableArtifact: it is damaged, or made for something else; nothing of it has been unpickled.

    PyTorch's own `deserialize_bundled_cache_entry` does the same and copies the entry to be able to serialise
    it again, which we never do.
    """
    content = unseal(artifact)
    config = inductor.inductor_config.patch({**state.configs["inductor"], **options})
    with dynamo.compile_lock, state.applied_to_thread(), config, folders.safe_caches():
        from torch._inductor.cudagraph_utils import BoxedDeviceIndex
        from torch._inductor.utils import BoxedBool

        entry, kernels = pickle.loads(content)
        entry.guards_expr = None  # late guards are ours: see guards/
        _forget_totals(entry)
        fake_mode = fake_tensors.FakeTensorMode(shape_env=fake_tensors.ShapeEnv())
        tracing = fake_tensors.tracing(fake_tensors.TracingContext(fake_mode))
        direct = Replacement(entry, state.grad if guarded else None)
        with (
            tracing,
            libraries.supplied(kernels),
            echo.muted(),
            inductor.backward_before_forward(),
            direct.installed(),
        ):
            outermost = entry.wrap_post_compile(
                [],
                entry.sanitized_aot_config,
                {
                    "cudagraphs": BoxedBool(inductor.inductor_config.triton.cudagraphs),
                    "boxed_forward_device_index": BoxedDeviceIndex(None),
                },
            )
        return direct.result(outermost)


def _forget_totals(entry: Any) -> None:
    """Loading counts as if it had compiled, with a part of the metrics; the echo brings all of them."""
    from torch._inductor.metrics import CachedMetricsDeltas, get_metric_fields

    for direction in (entry.compiled_fw, entry.compiled_bw):
        if hasattr(direction, "result") and hasattr(direction.result, "metrics_deltas"):
            direction.result.metrics_deltas = CachedMetricsDeltas(**dict.fromkeys(get_metric_fields(), 0))
            direction.result.counter_deltas.clear()

"""Artifacts: packed in a worker, and made callable in the calling process, as `compile_fx` would have done here."""

from __future__ import annotations

import importlib
import pickle
import sys
from typing import Any

from .. import forks, internals
from . import echo, libraries
from .direct import Compiled, Replacement
from .process_state import ProcessState


def prepare() -> None:
    """Import what loading needs, ahead of it; at once where that was done before.

    Under the compile lock, so that it begins when Dynamo is done with the frame: most of a second of imports
    in another thread would otherwise be paid by the first call.
    """
    if _NEEDED in sys.modules:  # this thread imports it, if nobody else has: it is complete
        return
    with internals.compile_lock, forks.held_off():
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


def pack(entry: Any, kernels: libraries.Libraries) -> bytes:
    """The artifact of an AOTAutograd cache entry, in which a compile's result is bundled, and of its kernels."""
    if entry.serialized_bw_module is not None:
        entry.serialized_bw_module = Deferred(entry.serialized_bw_module)
    return pickle.dumps((entry, kernels))


def load(artifact: bytes, state: ProcessState, options: dict[str, Any], *, guarded: bool) -> Compiled:
    """Load a worker's artifact: compiled forward and backward, with what a call of them needs around them.

    Holds Dynamo's compile lock meanwhile, since configs are process-wide.

    Args:
        state: of the thread and the process at capture.
        options: changes of Inductor's config, as `settings.inductor_options` has them.
        guarded: whether each call finds grad mode as it was at capture, as a frame's guards make sure.

    PyTorch's own `deserialize_bundled_cache_entry` does the same and copies the entry to be able to serialise
    it again, which we never do.
    """
    config = internals.inductor_config.patch({**state.configs["inductor"], **options})
    with internals.compile_lock, state.applied_to_thread(), config:
        from torch._inductor.cudagraph_utils import BoxedDeviceIndex
        from torch._inductor.utils import BoxedBool

        entry, kernels = pickle.loads(artifact)
        entry.guards_expr = None  # late guards are ours: see guards/
        _forget_totals(entry)
        fake_mode = internals.FakeTensorMode(shape_env=internals.ShapeEnv())
        tracing = internals.tracing(internals.TracingContext(fake_mode))
        direct = Replacement(entry, state.grad if guarded else None)
        with tracing, libraries.supplied(kernels), echo.muted(), direct.installed():
            outermost = entry.wrap_post_compile(
                [],
                entry.sanitized_aot_config,
                {
                    "cudagraphs": BoxedBool(internals.inductor_config.triton.cudagraphs),
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

"""Pack artifacts in a worker; make them callable in the program, as `compile_fx` would have done there."""

from __future__ import annotations

import pickle
from typing import Any, NamedTuple

import torch

from ..internals import cuda_graphs, dynamo, fake_tensors, freezing, inductor, loading, packages
from ..shipping import echo
from ..shipping.process_state import ProcessState
from . import folders, generated, libraries
from .compiled import Compiled
from .seal import seal, unseal
from .wrappers.call import unboxed
from .wrappers.replacement import Replacement


def prepare(*, compiler: bool = False) -> None:
    """Import the modules that loading needs, ahead of it. Returns at once if that was done before.

    It holds the compile lock, so that no import runs beside a trace.

    Args:
        compiler: whether code is to be loaded that needs Inductor's compiler, whose import takes most of a second.
    """
    if loading.is_imported(compiler=compiler):
        return
    with dynamo.compile_lock:
        loading.import_loading(compiler=compiler)


class Deferred:
    """The backward's FX graph, unpickled on demand: only compiled autograd asks for it.

    To unpickle an FX graph is to trace it. `nn.Module.__call__` is patched for all threads meanwhile: a module that
    the program calls at that moment would be traced too.
    """

    def __init__(self, graph: Any) -> None:
        self._pickled = pickle.dumps(graph)

    def deserialize(self) -> Any:
        """The FX graph. AOTAutograd calls this method on the object that this one replaces."""
        return pickle.loads(self._pickled).deserialize()


class Packed(NamedTuple):
    """What one compile has made, for `try_out`.

    Attributes:
        content: pickled.
        gpus: the indices of those that it is for.
        constants: by name, those that are too large for the artifact.
    """

    content: bytes
    gpus: tuple[int, ...]
    constants: dict[str, Any]


class Bare(NamedTuple):
    """The content of an artifact that is a package and nothing else: it is loaded without any module of Inductor's.

    Attributes:
        package, taken, repeatable: as those of `Compiled`.
    """

    package: bytes
    taken: tuple[int, ...] | None
    repeatable: bool

    def loaded(self, *, guarded: bool) -> Compiled:
        """What `load` returns of it."""
        boxed = packages.taking(packages.load(self.package).boxed_run, self.taken)
        call = unboxed(boxed)
        if not guarded:
            call = torch.no_grad()(call)
        return Compiled(call, boxed if guarded else None, (), self.repeatable, "aoti", self.package, self.taken)


def pack(entry: Any, kernels: libraries.Libraries) -> Packed:
    """Pack what one compile has made.

    Args:
        entry: AOTAutograd's cache entry, in which the result of the compile is bundled.
        kernels: the compiled C++ libraries that it loads.
    """
    if entry.serialized_bw_module is not None:
        entry.serialized_bw_module = Deferred(entry.serialized_bw_module)
    constants = freezing.taken_constants(entry)
    gpus = {index for one in (entry.compiled_fw, entry.compiled_bw) for index in loading.gpus_of(one)}
    return Packed(pickle.dumps((entry, kernels)), tuple(sorted(gpus)), constants)


def try_out(packed: Packed, state: ProcessState, options: dict[str, Any]) -> bytes:
    """Load what `pack` has returned in the worker that made it; returns the sealed artifact.

    So an artifact that crashes a process crashes the worker. Inductor forgets the modules that were loaded.
    """
    with loading.loaded_modules_forgotten(), generated.recorded() as made:
        config = state.inductor_config(options)
        compiled = _load(packed.content, state, config, packed.constants, guarded=True)
    if compiled.package is not None and not compiled.wrappers:
        return seal(pickle.dumps(Bare(compiled.package, compiled.taken, compiled.repeatable)), packed.gpus)
    return seal(pickle.dumps((packed.content, made)), packed.gpus)


def load(
    artifact: bytes,
    state: ProcessState,
    options: dict[str, Any],
    constants: dict[str, Any] | None = None,
    *,
    guarded: bool,
    recording: cuda_graphs.Recording | None = None,
) -> Compiled:
    """Load a worker's artifact: compiled forward and backward, in the wrappers that its graph needs.

    Holds Dynamo's compile lock meanwhile, since configs are process-wide.

    Args:
        state: the thread and the process at capture.
        options: changes of Inductor's config, as `inductor.options_of` returns them.
        constants: those that came beside the artifact.
        guarded: whether grad mode is the same at each call as at capture. A frame's guards make sure of that.
        recording: says when its CUDA graphs are recorded; None where in its first calls.

    Raises:
        UnusableArtifact: the artifact is damaged, or made for another installation or machine. Nothing of it has
            been unpickled.

    PyTorch's own `deserialize_bundled_cache_entry` does the same; but it copies the entry, to be able to serialise
    it again, which we never do.
    """
    opened = pickle.loads(unseal(artifact))
    if isinstance(opened, Bare):
        return opened.loaded(guarded=guarded)
    content, made = opened
    prepare(compiler=bool(made.compiling))
    config = state.inductor_config(options)
    if not inductor.asks_for_cudagraphs(config):
        recording = None
    with dynamo.compile_lock, generated.supplied(made), cuda_graphs.put_off(recording):
        return _load(content, state, config, constants or {}, guarded=guarded)


def _load(
    content: bytes, state: ProcessState, config: dict[str, Any], constants: dict[str, Any], *, guarded: bool
) -> Compiled:
    patched = inductor.inductor_config.patch(config)
    with dynamo.compile_lock, state.applied_to_thread(), patched, folders.safe_caches():
        entry, kernels = pickle.loads(content)
        freezing.give_constants(entry, constants)
        entry.guards_expr = None  # late guards are evaluated by us: see guards/
        for direction in (entry.compiled_fw, entry.compiled_bw):
            loading.forget_metrics(direction)
        fake_mode = fake_tensors.FakeTensorMode(shape_env=fake_tensors.ShapeEnv())
        replacement = Replacement(entry, state.grad if guarded else None)
        with (
            fake_tensors.tracing(fake_tensors.TracingContext(fake_mode)),
            loading.without_compiler(),
            libraries.supplied(kernels),
            echo.muted(),
            inductor.backward_before_forward(),
            replacement.applied(),
        ):
            outermost = entry.wrap_post_compile([], entry.sanitized_aot_config, loading.loading_options())
        made = replacement.result(outermost)
        graph: Any = getattr(entry.compiled_fw, "result", None)
        if not packages.is_package(graph):
            return made
        bare = made.boxed is not None
        return made._replace(kind="aoti", package=graph.package if bare else None, taken=graph.positions)

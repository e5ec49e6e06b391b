"""One compile, in any worker: a request in, an outcome out.

Nothing here imports torch at the top: a worker first lowers its priority, and only then pays for the import.

Guarantees:
- `compile_graph` raises nothing: a failure comes back as an `Outcome` with `error` set.
- Each compile begins with the settings of its own request, and leaves its environment and configs as they were.
- An artifact that is sent has been loaded once, in the worker.
- On another machine than the program's, a compile keeps that machine's folders, compilers' path and devices.

Assumed: one compile at a time in a process. Dynamo's compile lock sees to it.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import pickle
import time
import traceback
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from ..errors import first_line
from ..runtime.patching import patched, patched_environment, restored_environment
from . import place
from .protocol import Outcome, Request

if TYPE_CHECKING:
    from ..internals.phases import Phases
    from ..shipping.parcel import Content, Envelope
    from ..shipping.values import Values

# These variables are read when torch is imported, and settings give way to them.
_CACHE_SWITCHES = (
    "TORCHINDUCTOR_FORCE_DISABLE_CACHES",
    "TORCH_COMPILE_FORCE_DISABLE_CACHES",
    "TORCHINDUCTOR_AUTOGRAD_CACHE",
)


class Refused(Exception):
    """This machine cannot compile for the one that asks; the text says why, and what to do."""


def compile_graph(request: Request) -> Outcome:
    """Run all of Inductor's `compile_fx` on the graph of a request."""
    started = time.time()
    artifact, guards, constants, unpackaged, error, details = None, b"", None, "", "", ""
    heard: list[bytes] = []
    remarks: list[str] = []
    phases: Phases | None = None  # it needs torch
    allow_caches()
    place.note("compiling")
    try:
        from ..internals import phases as torch_phases

        phases = torch_phases.Phases()
        artifact, guards, constants, unpackaged = _compile_as_wished(request, heard, remarks, phases)
    except Refused as refusal:
        error = str(refusal)
    except BaseException as failure:
        error = f"{first_line(failure)}; {_advice(failure)}"
        details = traceback.format_exc()
        place.log(details)
    echo, times = b"".join(heard), (request.submitted, started, time.time())
    return Outcome(
        artifact,
        guards,
        error,
        details,
        *times,
        os.getpid(),
        echo,
        tuple(remarks),
        phases=phases.longest() if phases is not None else (),
        log=place.log_file(),
        constants=constants,
        unpackaged=unpackaged,
    )


def allow_caches() -> None:
    """Let no variable switch off Inductor's caches, whose machinery makes a compile's result serialisable."""
    for variable in _CACHE_SWITCHES:
        os.environ.pop(variable, None)


def _compile_as_wished(
    request: Request, heard: list[bytes], remarks: list[str], phases: Phases
) -> tuple[bytes, bytes, Values | None, str]:
    """As `_compile`; and why the artifact is no package, where that was wished.

    Args:
        heard: gets what the compile leaves behind, also where it fails.
    """
    from ..shipping import parcel

    envelope = parcel.open_envelope(request.envelope)
    if why := envelope.why_not_here():
        raise Refused(why)
    envelope.extend_search_path()  # options may be objects of the program's modules
    content = parcel.open_content(request.content)
    packaged = content.artifact == "aoti"
    why = request.unpackaged if packaged else ""
    if packaged and not why:
        try:
            return *_compile(request, envelope, content, heard.append, remarks, phases, packaged=True), ""
        except Exception as error:
            why = _why_unpackaged(error)
            place.log(traceback.format_exc())
            heard.clear()
            remarks.clear()
    return *_compile(request, envelope, content, heard.append, remarks, phases), why


def _compile(
    request: Request,
    envelope: Envelope,
    content: Content,
    keep_echo: Callable[[bytes], None],
    remarks: list[str],
    phases: Phases,
    *,
    packaged: bool = False,
) -> tuple[bytes, bytes, Values | None]:
    """The artifact, the pickled late guards, and the constants that come beside the artifact.

    Args:
        envelope, content: the request's.
        keep_echo: called with what the compile leaves behind, also where it fails.
        remarks: gets what the user should be warned of.
        phases: gets those of the compile.
        packaged: whether the artifact is to be a package of AOTInductor's.
    """
    from ..artifacts import folders, libraries, load
    from ..internals import dynamo, fake_tensors, gpu, inductor, packages, tuning
    from ..shipping import echo, graph, held, values

    state, options = content.state, content.options
    devices = state.autocast  # which has each type that the graph runs on
    inner = packages.inner_compile(content.frozen is not None, options, devices) if packaged else None
    changes = {**options, **packages.OPTIONS} if packaged else options
    if content.definitions is not None and not envelope.asked_here:
        content.definitions.define()
    scratch = {"TMPDIR": place.scratch()} if place.scratch() else {}
    # The lock is free in a worker; in an executor of threads it keeps Dynamo out while configs are patched.
    with (
        dynamo.compile_lock,
        contextlib.nullcontext() if envelope.asked_here else _without_collections(),
        restored_environment(),
        envelope.applied(),
        state.applied_to_process(),
        folders.safe_caches() as warned,
        patched_environment(scratch),
        gpu.small_contexts(),
    ):
        remarks += warned
        _forget_other_cache_folder(inductor.forget_written_files)
        with phases.phase("unpack the graph"):
            gm, inputs, fake_mode = graph.unpack(content.graph, request.sizes)
        if content.kernels is not None:
            content.kernels.register(gm)
        if content.frozen:
            held.put_back(gm, values.load(request.values))
            del inputs[: content.frozen]
        shapes = fake_mode.shape_env
        known = len(shapes.guards)
        context = fake_tensors.CompileContext(fake_tensors.CompileId.from_string(envelope.compile_id))
        with (
            echo.recorded(None if envelope.asked_here else envelope.audience, keep_echo),
            libraries.recorded() as kernels,
            _constants_pickled_for_real(),
            fake_tensors.compile_context(context),
            fake_tensors.tracing(fake_tensors.TracingContext(fake_mode)),
            fake_tensors.with_constant_floats(content.constant_floats),
            inductor.backward_before_forward(),
            inductor.serialisable(),
            phases.recorded(),
            tuning.for_the_program(autotunes=inductor.autotunes(options)),
            _frozen_code_serialisable() if content.frozen is not None else contextlib.nullcontext(),
        ):
            compiled: Any = inductor.stock_inductor(gm, inputs, changes, inner)
            with phases.phase("serialise"):
                entry = compiled.serialize()
        late = [guard.expr for guard in shapes.guards[known:]]
        packed = load.pack(entry, kernels)
        del compiled, entry, kernels
        place.note("loading what it had compiled")
        with phases.phase("load once, to try it out"):
            artifact = load.try_out(packed, state, options)
        constants = values.save(packed.constants, values.beside(request.values)) if packed.constants else None
        return artifact, pickle.dumps(late), constants


def _why_unpackaged(error: BaseException) -> str:
    """Why there is no package, in one line."""
    from ..internals.packages import Unpackaged

    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, Unpackaged):
        cause = cause.__cause__ or cause.__context__
    return str(cause) if cause is not None else first_line(error)


def _advice(failure: BaseException) -> str:
    """What the user can do about it."""
    texts: list[str] = []
    numbers: set[int | None] = set()
    cause: BaseException | None = failure
    while cause is not None and len(texts) < 20:
        texts.append(f"{type(cause).__name__}: {cause}")
        numbers.add(getattr(cause, "errno", None))
        cause = cause.__cause__ or cause.__context__
    said = "\n".join(texts)

    def is_about(*codes: int) -> bool:
        return not numbers.isdisjoint(codes) or any(os.strerror(code) in said for code in codes)

    if "InvalidCxxCompiler" in said or "No working C++ compiler" in said:
        return "install a C++ compiler (g++ or clang), or name one in the variable CXX"
    of_triton = "CalledProcessError" in said and "cuda_utils.c" in said  # which it builds before its first kernel
    if of_triton or "Failed to find C compiler" in said:
        return "Triton needs a C compiler that works: install gcc or clang, or name one in the variable CC"
    if is_about(errno.ENOSPC, errno.EDQUOT):
        return "free some space, or set TORCHINDUCTOR_CACHE_DIR to a folder on a disk that has some"
    if is_about(errno.EROFS, errno.EACCES, errno.EPERM):
        return "set TORCHINDUCTOR_CACHE_DIR to a folder that can be written to"
    if isinstance(failure, MemoryError) or is_about(errno.ENOMEM):
        return "frame_swap.configure(workers=1) needs less memory"
    return "FRAME_SWAP_DISABLE=1 shows whether plain Inductor does the same"


@contextlib.contextmanager
def _without_collections() -> Iterator[None]:
    """Within the block, Python looks for no garbage: an eighth of a compile's time, else."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


@contextlib.contextmanager
def _constants_pickled_for_real() -> Iterator[None]:
    """Within the block, a graph's constants are pickled as the real tensors that they are.

    Inductor pickles them while its FakeTensorMode is on, which does not let it copy those that are on a GPU, nor
    look at the data of parameters.
    """
    import torch

    from ..internals import fake_tensors

    def for_real(reduce: Callable[..., Any]) -> Callable[..., Any]:
        def reduce_for_real(*args: Any) -> Any:
            with fake_tensors.unset_fake_temporarily():
                return reduce(*args)

        return reduce_for_real

    with contextlib.ExitStack() as stack:
        for owner, name in (
            (torch.UntypedStorage, "__reduce__"),
            (torch.TypedStorage, "__reduce__"),
            (torch.nn.Parameter, "__reduce_ex__"),
        ):
            stack.enter_context(patched(owner, name, for_real(getattr(owner, name))))
        yield


@contextlib.contextmanager
def _frozen_code_serialisable() -> Iterator[None]:
    """Within the block, code that holds the values of parameters can be serialised, too."""
    from ..internals import freezing

    with contextlib.ExitStack() as stack:
        for owner, name, value in freezing.replacements():
            stack.enter_context(patched(owner, name, value))
        yield


_cache_folder: str | None = None


def _forget_other_cache_folder(forget: Callable[[], None]) -> None:
    """Inductor remembers which files it has written; a compile with another cache folder needs them anew."""
    global _cache_folder
    folder = os.environ.get("TORCHINDUCTOR_CACHE_DIR", "")
    if _cache_folder is not None and folder != _cache_folder:
        forget()
    _cache_folder = folder

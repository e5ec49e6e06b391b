"""The life of a frame, from Dynamo's graph to rewritten code. Everything else in this package serves this file.

1 capture   Dynamo traces the user's frame and hands over its graph
2 ship      a cleaned copy goes to a compile worker, first thing
3 pair      AOTAutograd's eager forward and backward, traced meanwhile, serve the calls
4 hook      the frame's new code calls a trampoline of ours
5 compile   the worker runs all of Inductor and sends back one artifact
6 load      the loader thread makes the artifact callable, without AOTAutograd's wrappers
7 install   the next call rewrites the frame's cache entry; the trampoline drops out of the path, and is asked
            again only where compiled code raises
"""

from __future__ import annotations

import contextlib
import functools
import logging
import pickle
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import sympy
import torch

from . import guards, settings
from .artifacts import load
from .artifacts.compiled import Compiled
from .checking import repro
from .checking.comparison import copy_of_graph
from .checking.profit import Measurement
from .checking.trial import Trial
from .checking.verify import Verification
from .codegen import rewriting
from .errors import FrameGone, FrameSwapWarning, Indirect, UnknownLayout, Unshippable, UnusableArtifact, first_line
from .farm.protocol import Outcome
from .farm.service import Job, service
from .frames.call_site import CallSite
from .internals import dynamo, fake_tensors, inductor, probe
from .region import Region, State
from .serving.pair import trace_pair
from .serving.trampoline import Offer, Specialiser, Trampoline
from .shipping import echo, parcel
from .shipping.graph import is_repeatable

log = logging.getLogger(__name__)


def frame_swap_backend(
    gm: torch.fx.GraphModule,
    example_inputs: list[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Compile a graph that Dynamo captured: the `torch.compile` backend "frame_swap".

    Args:
        gm: Dynamo's graph; may be changed, as by every backend.
        example_inputs: its inputs, real or fake.
        mode, options: as `torch.compile`'s for Inductor.

    Returns:
        A callable that takes the graph's inputs and returns the tuple of its outputs.

    Raises:
        ValueError: an unknown mode or option.
    """
    changes = inductor.options_of(mode, options)
    if settings.disabled() or _unsupported():
        return inductor.stock_inductor(gm, example_inputs, changes)

    # 1. Capture
    frame = dynamo.captured_frame()
    region = Region(frame.code if frame else None, str(gm.meta.get("dynamo_compile_id") or ""))
    with region.captured():
        return _answer(region, frame, gm, example_inputs, changes)


def _answer(
    region: Region,
    frame: dynamo.CapturedFrame | None,
    gm: torch.fx.GraphModule,
    example_inputs: list[Any],
    changes: dict[str, Any],
) -> Callable[..., Any]:
    """Have the graph compiled in the background; what answers its calls meanwhile."""
    compile_id, when = region.compile_id or None, settings.current().when

    # 2. Ship
    if when == "never":
        region.settle(State.EAGER, 'when="never"')
    else:
        try:
            with region.timed("ship_s"):
                packed = parcel.pack(gm, example_inputs, changes, compile_id)
        except Unshippable as error:
            return _compile_in_foreground(region, str(error), gm, example_inputs, changes)
        shapes, limit = fake_tensors.FrameShapes(example_inputs), dynamo.recompile_limit()
        graph = copy_of_graph(gm) if settings.current().verify else None
        shipment = _Shipment(region, packed, changes, shapes, limit, settings.current(), graph, is_repeatable(gm))
        inductor.prepare_cudagraphs(changes)
        job = _submit(shipment, deliver=when != "wait")

    # 3. Pair
    try:
        with echo.muted() if when != "never" else contextlib.nullcontext():
            pair = trace_pair(gm, example_inputs)
    except dynamo.TorchDynamoException:  # Dynamo's own control flow: it starts the frame over
        region.abandon("Dynamo started the frame over")
        raise
    except Exception as error:
        region.cancel_job()
        reason = f"no eager pair: {type(error).__name__}: {error}"
        return _compile_in_foreground(region, reason, gm, example_inputs, changes)

    # 4. Hook
    trampoline = Trampoline(region, pair, when)
    if frame is not None and "backend_id" in gm.meta:
        whole = dynamo.captured_whole(gm)
        trampoline.site = CallSite(gm.meta["backend_id"], frame.globals, trampoline, whole)
    if when == "wait":
        load.prepare()  # while the worker compiles
        _on_outcome(shipment, job.wait(), frame_open=True)
    return trampoline


class _Shipment(NamedTuple):
    """What it takes to compile a region's graph, and to compile it again for other sizes."""

    region: Region
    parcel: parcel.Parcel
    options: dict[str, Any]
    shapes: fake_tensors.FrameShapes
    limit: int  # of compiles for other sizes: as many as Dynamo's recompiles of a frame
    settings: settings.Settings
    graph: torch.fx.GraphModule | None  # Dynamo's, where compiled code is to be verified
    repeatable: bool  # its graph has no effects that happen in order, such as printing
    sizes: dict[str, int] | None = None  # of symbols, by name, where it is not compiled for those at capture


def _submit(shipment: _Shipment, sizes: dict[str, int] | None = None, *, deliver: bool = True) -> Job:
    shipment = shipment._replace(sizes=sizes)
    arrived = functools.partial(_on_outcome, shipment) if deliver else None
    job = service.submit(shipment.parcel, arrived, sizes)
    shipment.region.cancel = job.cancel
    return job


def _on_outcome(shipment: _Shipment, outcome: Outcome, *, frame_open: bool = False) -> None:
    """What a worker sent back has arrived: on the loader thread, or on the user's where Dynamo waits for it."""
    # 5. Compile
    region = shipment.region
    region.record_compile(outcome.submitted, outcome.started, outcome.finished, outcome.pid)
    echo.replay(outcome.echo, region.compile_id or None)
    for remark in outcome.remarks:
        _warn_once(remark)
    if outcome.artifact is None:
        log.info("frame-swap: compile of %s failed\n%s", region, outcome.details)
        _give_up(region, f"its compile failed: {outcome.error}")
        return
    region.artifact_bytes = len(outcome.artifact)

    # 6. Load
    offer: Offer | None = None
    with dynamo.compile_lock:  # Dynamo is done with the frame then: it calls the trampoline
        trampoline = region.trampoline
        if trampoline is None:
            region.abandon()
            return
        try:
            with region.timed("load_s"):
                state, guarded = shipment.parcel.state, trampoline.site is not None
                compiled = load.load(outcome.artifact, state, shipment.options, guarded=guarded)
                region.wrappers = compiled.wrappers
                if not shipment.repeatable:  # it has effects, which may have happened before a call raises
                    compiled = compiled._replace(repeatable=False)
                relations = pickle.loads(outcome.late_guards)
                if frame_open:
                    shipment.shapes.guard_on(relations)
                condition = _late_condition(shipment, relations, trampoline)
                prepare = functools.cache(functools.partial(_prepare_install, trampoline.site, compiled, condition))
                # An open frame has no code yet that could be prepared.
                install = (lambda: prepare()()) if frame_open else prepare()
                offer = Offer(compiled, condition, install, tuple(_trials(shipment)))
        except guards.Inexpressible as error:
            _give_up(region, f"a late guard: {error}", State.REJECTED)
        except UnusableArtifact as error:
            _give_up(region, str(error), State.REJECTED)
        except FrameGone:
            region.abandon()
        except Exception as error:
            if service.stopped:  # imports fail then, and nobody wants to know
                return
            log.info("frame-swap: loading %s failed", region, exc_info=True)
            _give_up(region, f"loading its compiled code failed: {type(error).__name__}: {error}")
    if offer is not None:  # without the lock, which the next call needs
        trampoline.offer(offer)


def _late_condition(
    shipment: _Shipment, relations: list[sympy.Basic], trampoline: Trampoline
) -> rewriting.Condition | None:
    """What must hold of a call's sizes beyond the frame's guards; calls for which it does not, ask for more."""
    region, shapes = shipment.region, shipment.shapes
    relations = guards.undecided(relations, shapes.implies)
    if not relations:
        return None
    source = guards.source(relations, {symbol: symbol.name for symbol in shapes.symbols})
    region.late_guards += (" and ".join(map(str, relations)),)
    if trampoline.specialiser is None:
        compile_for = functools.partial(_submit, shipment)
        trampoline.specialiser = Specialiser(region, shapes.sizes, compile_for, shipment.limit)
    used = set().union(*(relation.free_symbols for relation in relations))
    return rewriting.Condition(source, {s.name: at for s, at in shapes.symbols.items() if s in used})


def _trials(shipment: _Shipment) -> Iterator[Trial]:
    """What compiled code has to pass before it serves alone."""
    if shipment.graph is not None:
        options = {**shipment.parcel.state.configs["inductor"], **shipment.options}
        yield Verification(
            shipment.settings.verify,
            shipment.graph,
            functools.partial(_keep_repro, shipment),
            same_numbers=bool(options.get("fallback_random", False)),
            repeatable=shipment.repeatable,
        )
    if shipment.settings.profit:
        yield Measurement(undisturbed=lambda: service.threads_for_program() is None)


def _keep_repro(shipment: _Shipment, arguments: Sequence[Any], difference: str) -> str:
    try:
        folder = repro.write(
            shipment.settings.repro_dir, shipment.parcel, shipment.sizes or {}, arguments, difference
        )
    except Exception as error:
        return f"what it takes to repeat that could not be kept: {first_line(error)}"
    return f"to see it again: {repro.command(folder)}"


def _prepare_install(
    site: CallSite | None, compiled: Compiled, condition: rewriting.Condition | None
) -> Callable[[], str]:
    """Do off the user's thread what can be done there; the rest is for `install`, on the user's."""
    if site is None:
        return lambda: "called outside of a Dynamo frame: a check remains on each call"
    try:
        code = site.rewritten(compiled.call, condition, compiled.boxed, answered=compiled.repeatable)
    except Indirect as error:
        remark = f"{error}: a check remains on each call"
        return lambda: remark

    # 7. Install
    def install() -> str:
        try:
            site.redirect(code)
        except UnknownLayout as error:
            return f"cache entries look unfamiliar ({error}): a check remains on each call"
        if condition is None and not compiled.repeatable:
            site.rebind(compiled.call)  # nothing needs the pair any more
        return ""

    return install


def _give_up(region: Region, reason: str, state: State = State.FAILED) -> None:
    """Compiled code will not come; calls of other sizes than these may ask for more."""
    region.fail(reason, state)
    if (trampoline := region.trampoline) is not None and trampoline.specialiser is not None:
        trampoline.specialiser.resume()


def _compile_in_foreground(
    region: Region, reason: str, gm: torch.fx.GraphModule, example_inputs: list[Any], changes: dict[str, Any]
) -> Callable[..., Any]:
    """Where frame-swap cannot help, do what `torch.compile` would have done, and say why."""
    region.settle(State.FOREGROUND, reason)
    with region.timed("compile_s"):
        return inductor.stock_inductor(gm, example_inputs, changes)


@functools.cache
def _warn_once(remark: str) -> None:
    with contextlib.suppress(Warning):  # a filter may turn it into an error, which must not reach anything
        warnings.warn(f"frame-swap: {remark}", FrameSwapWarning, stacklevel=2)


@functools.cache
def _unsupported() -> bool:
    """Whether this torch lacks what frame-swap needs; warns once, also of versions it was not tried on."""
    if probe.missing() is not None:
        warnings.warn(
            f"frame-swap stands aside: torch {torch.__version__} lacks what it needs ({probe.missing()}). "
            f"Compiling with plain stock Inductor; use torch {probe.CHECKED} for background compiles.",
            FrameSwapWarning,
            stacklevel=2,
        )
        return True
    if not probe.version_checked():
        warnings.warn(
            f"frame-swap was not tried on torch {torch.__version__}, but finds all that it needs and goes on; "
            f"it is tested on torch {probe.CHECKED}. FRAME_SWAP_DISABLE=1 turns it off.",
            FrameSwapWarning,
            stacklevel=2,
        )
    return False

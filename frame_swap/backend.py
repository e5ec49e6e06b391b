"""The life of a frame, from Dynamo's graph to rewritten code. Everything else in this package serves this file.

1 capture   Dynamo traces the user's frame and hands over its graph
2 ship      a cleaned copy goes to a compile worker, first thing
3 pair      AOTAutograd's eager forward and backward, traced meanwhile, serve the calls
4 hook      the frame's new code calls a trampoline of ours
5 compile   the worker runs all of Inductor and sends back one artifact
6 load      the loader thread makes the artifact callable
7 install   the next call rewrites the frame's cache entry; the trampoline drops out of the path
"""

from __future__ import annotations

import contextlib
import functools
import logging
import pickle
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch

import guards

from . import internals, settings
from .compiling import artifact, echo, ship
from .compiling.service import service
from .compiling.worker import Outcome
from .frames import FrameGone
from .frames.cache_entry import UnknownLayout
from .frames.call_site import CallSite, Indirect
from .frames.codegen import direct_call
from .pair import trace_pair
from .region import FrameSwapWarning, Install, Region, State, Trampoline

log = logging.getLogger(__name__)

Boxed = Callable[[list[Any]], Any]


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
    changes = settings.inductor_options(mode, options)
    if settings.disabled() or _unsupported():
        return internals.stock_inductor(gm, example_inputs, changes)

    # 1. Capture
    frame = internals.captured_frame()
    compile_id = str(gm.meta.get("dynamo_compile_id") or "")
    region = Region(frame.code if frame else None, compile_id)
    when = settings.current().when

    # 2. Ship
    try:
        with region.timed("ship_s"):
            parcel = ship.pack(gm, example_inputs, changes, compile_id or None)
    except ship.Unshippable as error:
        return _compile_in_foreground(region, str(error), gm, example_inputs, changes)
    if when == "never":
        region.settle(State.EAGER, 'when="never"')
    else:
        load = functools.partial(artifact.load, state=parcel.state, options=changes)
        arrived = functools.partial(_on_outcome, region, load, internals.FrameShapes(example_inputs))
        internals.prepare_cudagraphs(changes)
        region.cancel = service.submit(parcel.data, arrived).cancel

    # 3. Pair
    try:
        with echo.muted() if when != "never" else contextlib.nullcontext():
            pair = trace_pair(gm, example_inputs)
    except internals.TorchDynamoException:  # Dynamo's own control flow: it starts the frame over
        region.abandon("Dynamo started the frame over")
        raise
    except Exception as error:
        region.cancel()
        reason = f"no eager pair: {type(error).__name__}: {error}"
        return _compile_in_foreground(region, reason, gm, example_inputs, changes)

    # 4. Hook
    trampoline = Trampoline(region, pair, when)
    if frame is not None and "backend_id" in gm.meta:
        trampoline.site = CallSite(gm.meta["backend_id"], frame.globals, trampoline)
    return trampoline


def _on_outcome(
    region: Region, load: Callable[[bytes], Boxed], shapes: internals.FrameShapes, outcome: Outcome
) -> None:
    """What a worker sent back has arrived, on the loader thread."""
    # 5. Compile
    region.record_compile(outcome.submitted, outcome.started, outcome.finished, outcome.pid)
    echo.replay(outcome.echo, region.compile_id or None)
    if outcome.artifact is None:
        log.info("frame-swap: compile of %s failed\n%s", region, outcome.details)
        region.fail(f"its compile failed: {outcome.error}")
        return
    region.artifact_bytes = len(outcome.artifact)

    # 6. Load
    with internals.compile_lock:  # Dynamo is done with the frame then, and the trampoline is in its code
        trampoline = region.trampoline
        if trampoline is None:
            region.abandon()
            return
        try:
            with region.timed("load_s"):
                compiled = load(outcome.artifact)
                late = guards.undecided(pickle.loads(outcome.late_guards), shapes.implies)
                predicate = guards.source(late, {symbol: f"args[{at}]" for symbol, at in shapes.symbols.items()})
                region.late_guards = tuple(map(str, late))
                callee = direct_call(compiled, predicate, trampoline.pair)
                install = _prepare_install(trampoline.site, callee)
        except guards.Inexpressible as error:
            region.fail(f"a late guard: {error}", State.REJECTED)
        except FrameGone:
            region.abandon()
        except Exception as error:
            if service.stopped:  # imports fail then, and nobody wants to know
                return
            log.info("frame-swap: loading %s failed", region, exc_info=True)
            region.fail(f"loading its compiled code failed: {type(error).__name__}: {error}")
        else:
            trampoline.offer(install)


def _prepare_install(site: CallSite | None, callee: Callable[..., Any]) -> Install:
    """Do off the user's thread what can be done there; the rest is for `install`, on the user's."""
    if site is None:
        return lambda: (callee, "called outside of a Dynamo frame: a check remains on each call")
    try:
        code = site.rewritten(callee)
    except Indirect as error:
        remark = f"{error}: a check remains on each call"
        return lambda: (callee, remark)

    # 7. Install
    def install() -> tuple[Callable[..., Any], str]:
        try:
            site.redirect(code, callee)
        except UnknownLayout as error:
            return callee, f"cache entries look unfamiliar ({error}): a check remains on each call"
        return callee, ""

    return install


def _compile_in_foreground(
    region: Region, reason: str, gm: torch.fx.GraphModule, example_inputs: list[Any], changes: dict[str, Any]
) -> Callable[..., Any]:
    """Where frame-swap cannot help, do what `torch.compile` would have done, and say why."""
    region.settle(State.FOREGROUND, reason)
    with region.timed("compile_s"):
        return internals.stock_inductor(gm, example_inputs, changes)


@functools.cache
def _unsupported() -> bool:
    """Whether this torch lacks what frame-swap needs; warns once, also of versions it was not tried on."""
    if internals.MISSING is not None:
        warnings.warn(
            f"frame-swap stands aside: torch {torch.__version__} lacks what it needs ({internals.MISSING}). "
            f"Compiling with plain stock Inductor; use torch {internals.CHECKED} for background compiles.",
            FrameSwapWarning,
            stacklevel=2,
        )
        return True
    if not internals.version_checked():
        warnings.warn(
            f"frame-swap was not tried on torch {torch.__version__}, but finds all that it needs and goes on; "
            f"it is tested on torch {internals.CHECKED}. FRAME_SWAP_DISABLE=1 turns it off.",
            FrameSwapWarning,
            stacklevel=2,
        )
    return False

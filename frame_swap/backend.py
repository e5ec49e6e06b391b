"""The life of a frame, from Dynamo's graph to rewritten code. Everything else in this package serves this file.

1 capture   Dynamo traces the user's frame and hands over its graph
2 ship      a cleaned copy goes to a compile worker, first thing; unless an earlier run has compiled the same
3 serve     eager code serves the calls meanwhile: Dynamo's graph as it is, or a pair that AOTAutograd traces
4 hook      the frame's new code calls a trampoline of ours
5 to 7      compile, load, install: `delivery.py`, later and on other threads
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch

from . import kept_frames, settings
from .artifacts import load
from .capture import callback
from .checking.comparison import copy_of_graph
from .delivery import Delivery, Order
from .errors import FrameSwapWarning, Unshippable
from .farm.service import service
from .frames.call_site import CallSite
from .internals import beside, dynamo, fake_tensors, inductor, probe
from .region import Event, Record
from .serving.eager import eager_code, why_pair
from .serving.trampoline import Trampoline
from .shipping import echo, held, parcel
from .shipping.graph import is_repeatable


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
        mode, options: as `torch.compile`'s for Inductor; `options` may also have the setting `first`.

    Returns:
        A callable that takes the graph's inputs and returns the tuple of its outputs.

    Raises:
        ValueError: an unknown mode or option.
    """
    wished, options = settings.with_options(options)
    changes = inductor.options_of(mode, options)
    if settings.disabled() or _unsupported():
        return inductor.stock_inductor(gm, example_inputs, changes)

    # 1. Capture
    frame = dynamo.captured_frame()
    record = Record(frame.code if frame else None, str(gm.meta.get("dynamo_compile_id") or ""))
    record.size = len(gm.graph.nodes)
    with record.captured(dynamo.began_to_trace()):
        return _start(record, frame, gm, example_inputs, changes, wished)


def _start(
    record: Record,
    frame: dynamo.CapturedFrame | None,
    gm: torch.fx.GraphModule,
    example_inputs: list[Any],
    changes: dict[str, Any],
    wished: settings.Settings,
) -> Callable[..., Any]:
    """Start the background compile; return the callable that serves calls meanwhile."""
    if beside.is_beside() and wished.when == "wait":  # since the capture began
        raise beside.GivenUp("calls are to wait for compiled code")
    beside.checkpoint()

    # 2. Ship
    tiers = wished.tiers == "auto" and wished.when != "wait" and inductor.autotunes(changes)
    first_changes = inductor.without_autotuning(changes) if tiers else changes
    delivery = found = job = None
    why = why_pair(gm, example_inputs)
    needs_pair = why is not None and why.needed
    if wished.when == "never":
        record.attempts[0].move(Event.DECLINED, 'when="never"')
    else:
        try:
            with record.journal.span("ship"):
                packed = parcel.pack(gm, example_inputs, first_changes, record.compile_id or None, wished.artifact)
            beside.checkpoint()
        except Unshippable as error:
            return _compile_in_foreground(record, str(error), gm, example_inputs, changes)
        order = Order(
            record,
            packed,
            record.size,
            first_changes,
            shapes=fake_tensors.FrameShapes(example_inputs),
            limit=dynamo.recompile_limit(),
            settings=wished,
            graph=held.lift(copy_of_graph(gm))[0] if wished.verify else None,
            repeatable=is_repeatable(gm),
            autotuned=changes if tiers else None,
            code=frame.code if frame is not None else None,
            inputs=dynamo.names_of_inputs(gm) if wished.artifact == "aoti" else (),
        )
        inductor.prepare_cudagraphs(changes)
        kept_frames.graph_captured(gm, order, why.reason if why is not None else "")
        delivery = Delivery(order, record.attempts[0])
        found = delivery.find() if wished.when != "manual" else None
        if found is None and not needs_pair:
            job = delivery.request(deliver=wished.when != "wait")

    # 3. Serve
    try:
        muted = echo.muted() if delivery is not None else contextlib.nullcontext()
        with record.journal.span("prepare eager code"), muted, dynamo.as_no_bucket():
            eager = eager_code(gm, example_inputs, wished.first, why, compiled=found is not None)
    except dynamo.TorchDynamoException:  # Dynamo's own control flow: it starts the frame over
        record.abandon("Dynamo started the frame over")
        raise
    except Exception as error:
        record.attempts[0].cancel_job()
        reason = f"no eager code: {type(error).__name__}: {error}"
        return _compile_in_foreground(record, reason, gm, example_inputs, changes)
    if delivery is not None and found is None and job is None:  # AOTAutograd's trace could have started it over
        job = delivery.request(deliver=wished.when != "wait")

    # 4. Hook
    record.eager, record.eager_reason = eager.kind, eager.reason
    trampoline = Trampoline(record, eager.call, wished.when)
    trampoline.is_ahead = beside.is_beside()
    if frame is not None and "backend_id" in gm.meta:
        whole = dynamo.captured_whole(gm)
        trampoline.site = CallSite(gm.meta["backend_id"], frame.globals, trampoline, whole)
    if delivery is not None and found is not None:
        with dynamo.as_no_bucket():
            delivery.arrived(found, frame_open=True)
    elif wished.when == "wait" and delivery is not None and job is not None:
        if wished.artifact != "aoti":
            load.prepare()  # while the worker compiles
        outcome = job.wait()
        with dynamo.as_no_bucket():
            delivery.arrived(outcome, frame_open=True)
    return trampoline


def _compile_in_foreground(
    record: Record, reason: str, gm: torch.fx.GraphModule, example_inputs: list[Any], changes: dict[str, Any]
) -> Callable[..., Any]:
    """Where frame-swap cannot help, do what `torch.compile` would have done, and say why."""
    if beside.is_beside():
        raise beside.GivenUp(reason, lasting=True)
    service.make_way()
    attempt = record.attempts[0]
    with attempt.journal.span("compile"):
        compiled = inductor.stock_inductor(gm, example_inputs, changes)
    attempt.compile_s = attempt.journal.seconds("compile")
    attempt.move(Event.FOREGROUND, reason)  # not where it raises: Dynamo then breaks the graph, as for stock
    return compiled


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
    if settings.current().capture == "background" and not beside.is_possible():
        warnings.warn(
            f'capture="background" needs torch 2.13 or newer, and this is {torch.__version__}: '
            "frames are captured in their calls",
            FrameSwapWarning,
            stacklevel=2,
        )
    if settings.current().keep_frames and not kept_frames.is_possible():
        warnings.warn(
            f"keep_frames needs torch 2.13 or newer, and this is {torch.__version__}: "
            "frames are traced in each run",
            FrameSwapWarning,
            stacklevel=2,
        )
    return False


callback.install(frame_swap_backend, kept_frames.place_of)

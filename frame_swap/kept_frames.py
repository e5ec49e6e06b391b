"""Frames that an earlier run has traced: Dynamo's code and guards, kept beside the artifacts (experimental).

With `keep_frames`, a run keeps what Dynamo has made of a frame: its code, what its guards are made from, what they
have seen, and the graph. In the next run Dynamo asks about the frame, and gets this in place of a trace, if all of
it still holds. The answer becomes a cache entry like any other.

Guarantees:
- Each guard is made again, from this process's own values. No guard is left out: a frame with a guard of an unknown
  kind is not kept.
- A frame is used only where every guard sees what it saw in the run that has traced: the same constants, the same
  functions and classes by their code, tensors with the same properties, in the same state of thread and process;
  where the code of each function that was traced is what it was; and where the store has the artifact.
- Whatever goes wrong, the frame is traced as if nothing had been kept.

Assumed: what a trace reads without a guard, such as globals of PyTorch's own modules, does not change as long as
the versions in the key do not, nor the code of the functions that were traced.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import logging
import pickle
import sys
import threading
from collections.abc import Callable, Iterator
from types import CodeType, ModuleType
from typing import Any, NamedTuple

import torch

from . import settings
from .artifacts.seal import seal_for, unseal_for
from .artifacts.store import chosen
from .artifacts.store.entry import Store
from .artifacts.store.key import installation
from .capture import facts, identity
from .delivery import Delivery, Order
from .errors import Unkeepable, first_line
from .farm import reuse
from .farm.protocol import Outcome
from .frames import call_site
from .internals import beside, dynamo, fake_tensors, guard_state
from .internals import callback as dynamos
from .region import Record
from .serving.eager import serve_graph
from .serving.trampoline import Trampoline
from .shipping import graph, parcel
from .shipping.echo import Audience
from .shipping.process_state import ProcessState

log = logging.getLogger(__name__)

MOST = 8
"""How many frames are kept for one function: Dynamo compiles one as often."""


def is_possible() -> bool:
    """Whether this torch has what keeping frames needs."""
    return beside.is_possible() and guard_state.is_possible()


class Graph(NamedTuple):
    """The graph of a frame.

    Attributes:
        content: of its parcel.
        size: in nodes.
        repeatable: as in `Order`.
        whole: whether the frame does nothing else that Dynamo would capture.
    """

    content: bytes
    size: int
    repeatable: bool
    whole: bool


class Kept(NamedTuple):
    """One frame, as it was traced.

    Attributes:
        code: Dynamo's, packed.
        callee: the global in which it calls the graph.
        state, facts: what its guards are made from, and what they have seen.
        traced: where the code of the functions is that were traced.
        installed: globals that Dynamo has made for the code, each with the object's identity.
        graph: what is called.
    """

    code: Any
    callee: str
    state: guard_state.GuardState
    facts: list[identity.Description]
    traced: tuple[identity.Place, ...]
    installed: dict[str, identity.Description]
    graph: Graph


class _Capture(threading.local):
    """The graphs of the frame that this thread captures, by name; with a reason where one cannot be kept."""

    graphs: dict[str, Graph | str] | None = None


_capture = _Capture()


def graph_captured(gm: torch.fx.GraphModule, order: Order, why_not: str) -> None:
    """Dynamo has captured a graph.

    Args:
        why_not: why the frame must not be kept; "" where nothing is known against it.
    """
    name = gm.meta.get("backend_id")
    if _capture.graphs is None or name is None:
        return
    packed = order.parcel
    kept = Graph(packed.content, order.size, order.repeatable, dynamo.captured_whole(gm))
    _capture.graphs[name] = why_not or packed.uncacheable or _why_not(order) or kept


def _why_not(order: Order) -> str:
    """Why a graph must not be kept: it depends on what no guard of its frame sees."""
    content = parcel.open_content(order.parcel.content)
    if content.definitions is not None or content.kernels is not None:
        return "its graph calls custom operators, or Triton kernels of the program's"
    if content.custom_uuids:
        return "passes of the program's take part in its compile"
    if order.parcel.held:
        return "its graph holds tensors"
    return "" if order.autotuned is None else "autotuned code is to follow"


class Place:
    """Where frames like `frame` are kept: in `store`, under `key`."""

    def __init__(self, store: Store, key: str, frame: Any) -> None:
        self._store = store
        self._key = key
        self._frame = frame

    def restored(self, frame_state: dict[Any, Any]) -> Any | None:
        """The answer about the frame, where an earlier run has left one that fits; else None. Raises nothing."""
        try:
            for kept in _read(self._store, self._key):
                with dynamo.compile_lock:
                    if (answer := _restored(kept, self._frame, frame_state)) is not None:
                        return answer
        except Exception:
            log.warning("frame-swap: a kept frame cannot be used, and is traced", exc_info=True)
        return None

    @contextlib.contextmanager
    def keeping(self) -> Iterator[None]:
        """Within the block Dynamo traces the frame, which is kept for the next run if it can be."""
        before, _capture.graphs = _capture.graphs, {}
        try:
            with guard_state.told(self._keep):
                yield
        finally:
            _capture.graphs = before

    def _keep(self, code: CodeType, generated: CodeType, output_graph: Any) -> None:
        try:
            if code is self._frame.f_code:
                _add(self._store, self._key, _kept(code, generated, output_graph))
        except Unkeepable as reason:
            log.info("frame-swap: %s is traced in each run: %s", code.co_qualname, reason)
        except Exception:
            log.warning("frame-swap: %s cannot be kept", code.co_qualname, exc_info=True)


def place_of(callback: Any, frame: Any) -> Place | None:
    """Where frames like this one are kept; None where none is. Raises nothing."""
    try:
        return _place(callback, frame)
    except Exception as error:  # an option that nothing describes, say
        log.info("frame-swap: %s is traced in each run: %s", frame.f_code.co_qualname, first_line(error))
        return None


# --- Keep ---


def _kept(code: CodeType, generated: CodeType, output_graph: Any) -> Kept:
    """What is kept of a frame whose guards Dynamo has just made.

    Raises:
        Unkeepable: with the reason.
    """
    if why_not := guard_state.why_not(output_graph):
        raise Unkeepable(why_not)
    if _of_this_process():
        raise Unkeepable("it uses an accelerator")
    installed = guard_state.installed_globals(output_graph)
    graphs = _capture.graphs or {}
    callees = [name for name in installed if name in graphs]
    if len(callees) != 1:
        raise Unkeepable(f"it calls {len(callees)} graphs of frame-swap's")
    (callee,) = callees
    called = graphs[callee]
    if isinstance(called, str):
        raise Unkeepable(called)
    if code.co_freevars != generated.co_freevars:
        raise Unkeepable("its code has other cells")
    others = {name: _found_by_name(value) for name, value in installed.items() if name != callee}
    state = guard_state.state_of(output_graph)
    seen = facts.of(guard_state.guarded(state, output_graph.local_scope, output_graph.global_scope))
    inlined = (other for other in guard_state.traced_code(output_graph) if other is not code)
    traced = tuple(map(identity.place_of, inlined))
    return Kept(guard_state.packed_code(generated), callee, state, seen, traced, others, called)


def _found_by_name(value: Any) -> identity.Description:
    """The identity of a module or class that `_object` finds.

    Raises:
        Unkeepable: it would not.
    """
    if isinstance(value, (ModuleType, type)):
        description = identity.identity(value)
        if _object(description) is value:
            return description
    raise Unkeepable(f"its code reads a {type(value).__qualname__} that has no name")


def _object(description: identity.Description) -> Any:
    kind, module, *path = description
    found: Any = sys.modules[module]
    if kind == "class":
        for name in path[0].split("."):
            found = getattr(found, name, None)
    return found


# --- Restore ---

_numbers = itertools.count()


def _restored(kept: Kept, frame: Any, frame_state: dict[Any, Any]) -> Any | None:
    """The answer for a frame; None where what was kept does not fit it. The caller holds Dynamo's compile lock."""
    name, scope = frame.f_code.co_qualname, frame.f_globals
    if (gone := next((place for place in kept.traced if not identity.is_there(place)), None)) is not None:
        log.info("frame-swap: %s is traced: %s of %s has changed", name, gone[1], gone[0])
        return None
    packed = parcel.repacked(kept.graph.content)
    found = reuse.find(reuse.place_of(packed, None, settings.current()))
    if found is None:
        return None
    with contextlib.ExitStack() as made:  # globals, which go unless all comes to a good end
        try:
            guard_state.find_modules(kept.state, scope)
            for alias, description in kept.installed.items():
                value = _object(description)
                if identity.identity(value) != description or scope.get(alias, value) is not value:
                    raise Unkeepable(f"{description[1]} is another one")
                if alias not in scope:
                    made.callback(guard_state.install_global(scope, alias, value))
            seen = facts.of(guard_state.guarded(kept.state, frame.f_locals, scope))
        except Exception as error:  # of whatever kind, where a module or a guard's value is missing
            log.info("frame-swap: %s is traced: %s", name, first_line(error))
            return None
        if seen != kept.facts:
            differs = next(now for now, then in zip(seen, kept.facts, strict=True) if now != then)
            log.info("frame-swap: %s is traced: %s on %s sees something else", name, *differs[:2])
            return None
        compile_id = dynamo.next_compile_id(frame_state)
        guards = guard_state.guards_of(kept.state, frame.f_code, frame.f_locals, scope, compile_id)
        if guards is None:
            log.info("frame-swap: %s is traced: its guards do not hold", name)
            return None
        code = _code(kept, packed, found, frame, compile_id, made)
        return guard_state.answer(frame.f_code, code, guards, compile_id, made.pop_all().close)
    return None


def _code(
    kept: Kept, packed: parcel.Parcel, found: Outcome, frame: Any, compile_id: Any, made: contextlib.ExitStack
) -> CodeType:
    """The frame's code, which calls a trampoline with the artifact; `made` gets what removes its global."""
    wished = settings.current()
    record = Record(dynamos.users_code(frame), str(compile_id))
    record.size, record.eager = kept.graph.size, "graph"
    order = Order(
        record,
        packed,
        kept.graph.size,
        packed.options,
        shapes=fake_tensors.FrameShapes([]),
        limit=dynamo.recompile_limit(),
        settings=wished,
        graph=None,
        repeatable=kept.graph.repeatable,
    )
    with record.captured():
        trampoline = Trampoline(record, _unpacked_when_called(kept.graph.content), wished.when)
        name = f"{kept.callee}_{next(_numbers)}"
        trampoline.site = call_site.CallSite(name, frame.f_globals, trampoline, kept.graph.whole)
        made.callback(guard_state.install_global(frame.f_globals, name, trampoline))
        code = call_site.bound(frame.f_code, guard_state.unpacked_code(kept.code, {kept.callee: name}))
        Delivery(order, record.attempts[0]).arrived(found, frame_open=True)
    return code


def _unpacked_when_called(content: bytes) -> Callable[..., Any]:
    """Dynamo's graph op by op. Few programs call it, and to unpack it takes a while."""

    @functools.cache
    def forward() -> Callable[..., Any]:
        gm, _, _ = graph.unpack(parcel.open_content(content).graph, {})
        return serve_graph(gm)

    return lambda *args: forward()(*args)


# --- The store ---


def _place(callback: Any, frame: Any) -> Place | None:
    wished = settings.current()
    if wished.when not in ("ready", "wait") or wished.verify or dynamos.reason_for_the_call(callback) is not None:
        return None
    if _of_this_process() or Audience.capture().reads_code:  # generated code comes from a compile
        return None
    if dynamos.skip(frame) is not None or (store := chosen.store(wished)) is None:
        return None
    backend = dynamos.arguments_of_backend(callback)
    state = ProcessState.capture({"cpu"})
    parts = (
        sorted(installation().items()),
        identity.digest(frame.f_code),
        (frame.f_globals.get("__name__"), frame.f_code.co_qualname),
        identity.constant(backend),
        parcel.stable_pickle(state),
        torch.accelerator.is_available(),
    )
    return Place(store, hashlib.sha256(repr(parts).encode()).hexdigest(), frame)


def _of_this_process() -> bool:
    """Whether a trace may hold what other processes do not share: a rank, or the number of a device."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return distributed or dynamos.has_accelerator()


def _read(store: Store, key: str) -> list[Kept]:
    note = store.note(key)
    if not note:
        return []
    try:
        frames: list[Kept] = pickle.loads(unseal_for(key, note))
    except Exception as error:
        log.info("frame-swap: what was kept of a frame is not for this process: %s", first_line(error))
        return []
    return frames


def _add(store: Store, key: str, kept: Kept) -> None:
    others = [other for other in _read(store, key) if other.facts != kept.facts]
    store.keep_note(key, seal_for(key, guard_state.dumps([kept, *others][:MOST])))

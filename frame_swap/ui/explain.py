"""`frame_swap.explain(f)(*args)`: what would happen to each graph of `f`, without compiling it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from types import CodeType
from typing import Any, NamedTuple

import sympy
import torch

from .. import guards, settings
from ..errors import Unshippable, first_line
from ..farm import reuse
from ..internals import callback, dynamo, eager, fake_tensors, inductor
from ..late_guards.condition import condition_of
from ..region.under_way import name_of, short
from ..serving.eager import serve_graph, why_pair
from ..serving.pair import trace_pair
from ..shipping import graph, parcel


@dataclasses.dataclass(frozen=True)
class Explained:
    """What would happen to one graph.

    Attributes:
        frame, compile_id: as in `Region`; the id is that of this explanation.
        size: of the graph, in nodes.
        shipped_bytes: of what a worker would be sent; None where the graph would be compiled in the foreground.
        foreground: why it would be; "" where it would not.
        eager: what would serve before the swap: "graph" or "pair"; "" in the foreground.
        eager_reason: why it is not the one that the setting `first` asks for; "" where it is.
        store: "found" where the store has compiled code for it, "to be kept" where that will be kept for the next
            run; else why not, or "" where there is no store.
        late_guards: conditions on sizes that would be checked before each call. Inductor itself may add more.
        wrappers: AOTAutograd's wrappers that would remain around compiled code.
    """

    frame: str
    compile_id: str
    size: int
    shipped_bytes: int | None
    foreground: str
    eager: str
    eager_reason: str
    store: str
    late_guards: tuple[str, ...]
    wrappers: tuple[str, ...]

    def __str__(self) -> str:
        lines = [f"{short(self.frame)}, {self.size} nodes"]
        if self.foreground:
            lines.append(f"compiled in the foreground, in its first call: {self.foreground}")
            return "\n  ".join(lines)
        if self.store == "found":
            lines.append("on compiled code from its first call on: the store has it")
        else:
            kept = f"; its code is {self.store}" if self.store else ""
            lines.append(f"compiled by a worker, which gets {(self.shipped_bytes or 0) / 1e3:.0f} kB{kept}")
            why = f": {self.eager_reason}" if self.eager_reason else ""
            lines.append(f"until then on the {self.eager}{why}")
        if self.late_guards:
            lines.append(f"late guards, checked before each call: {'; '.join(self.late_guards)}")
        if self.wrappers:
            lines.append(f"AOTAutograd's wrappers remain for {', '.join(self.wrappers)}")
        return "\n  ".join(lines)


class Explanation(list[Explained]):
    """What would happen to each graph, in the order in which the call reached them; `str()` is for people."""

    def __str__(self) -> str:
        count = f"{len(self)} graph{'s' * (len(self) != 1)}"
        return "\n\n".join([f"{count}; nothing was compiled", *map(str, self)])


def explain(
    model: Callable[..., Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
    **keywords: Any,
) -> Callable[..., Explanation]:
    """Say what `torch.compile(model, backend="frame_swap")` would do, without compiling.

    Args:
        model: a function or module; what `torch.compile` has made of one is taken apart again.
        mode, options, keywords: as for `torch.compile`: `dynamic` and `fullgraph`.

    Returns:
        A function of the arguments of `model`. It makes one call, on eager code, with all of the call's effects,
        and returns an `Explanation`. What is installed stays, and no entry of this call remains in Dynamo's caches.
    """
    model = dynamo.uncompiled(model)

    def explained(*args: Any, **kwargs: Any) -> Explanation:
        seen: list[_Seen] = []
        codes: list[CodeType] = []

        def backend(gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
            if (code := dynamo.traced_code()) is not None:
                codes.append(code)
            seen.append(_see(gm, example_inputs, mode, options))
            return serve_graph(gm)

        try:
            torch.compile(model, backend=backend, **keywords)(*args, **kwargs)
        finally:
            for code in codes:
                dynamo.forget_entries(code, lambda other: callback.is_for(other, backend))
        return Explanation(one.traced() for one in seen)

    return explained


class _Seen(NamedTuple):
    """A graph that Dynamo has captured, with all that can be said before AOTAutograd has traced it."""

    explained: Explained
    packed: parcel.Parcel | None
    shapes: fake_tensors.FrameShapes

    def traced(self) -> Explained:
        """The same, with what AOTAutograd's trace of a copy adds: late guards and wrappers."""
        if self.packed is None:
            return self.explained
        try:
            relations, wrappers = _trace(self.packed)
            late: tuple[str, ...] = ()
            if self.explained.eager != "pair":  # whose trace is part of Dynamo's: the frame's own guards have them
                _, late = condition_of(relations, self.shapes)
        except guards.Inexpressible as error:
            late, wrappers = (f"one that cannot be checked: eager code would go on serving: {error}",), ()
        except Exception as error:
            late, wrappers = (f"not known, since AOTAutograd cannot trace the graph here: {first_line(error)}",), ()
        return dataclasses.replace(self.explained, late_guards=late, wrappers=wrappers)


def _see(
    gm: torch.fx.GraphModule, example_inputs: list[Any], mode: str | None, options: Mapping[str, Any] | None
) -> _Seen:
    wished, others = settings.with_options(options)
    frame = dynamo.captured_frame()
    one = Explained(
        name_of(frame.code) if frame else "no frame",
        str(gm.meta.get("dynamo_compile_id") or ""),
        size=len(gm.graph.nodes),
        shipped_bytes=None,
        foreground="",
        eager="",
        eager_reason="",
        store="",
        late_guards=(),
        wrappers=(),
    )
    shapes = fake_tensors.FrameShapes(example_inputs)
    try:
        packed = parcel.pack(gm, example_inputs, inductor.options_of(mode, others), one.compile_id or None)
    except Unshippable as error:
        return _Seen(dataclasses.replace(one, foreground=str(error)), None, shapes)
    why = why_pair(gm, example_inputs)
    one = dataclasses.replace(
        one,
        shipped_bytes=len(packed.content) + sum(tensor.nbytes for tensor in packed.held if packed.frozen),
        eager="graph" if wished.first == "graph" and why is None else "pair",
        eager_reason=why.reason if why is not None and wished.first == "graph" else "",
        store=_kept(packed, wished),
    )
    return _Seen(one, packed, shapes)


def _kept(packed: parcel.Parcel, wished: settings.Settings) -> str:
    if packed.uncacheable:
        return f"not kept: {packed.uncacheable}"
    place = reuse.place_of(packed, None, wished)
    if place is None:
        return ""
    return "found" if place.store.has(place.key) else "to be kept for the next run"


def _trace(packed: parcel.Parcel) -> tuple[list[sympy.Basic], tuple[str, ...]]:
    """The guards on sizes that AOTAutograd adds to a copy of the graph, and the wrappers that it needs."""
    content = parcel.open_content(packed.content)
    with dynamo.compile_lock, content.state.applied_to_process():
        gm, inputs, fake_mode = graph.unpack(content.graph, {})
        context = fake_tensors.TracingContext(fake_mode)
        known = len(fake_mode.shape_env.guards)
        with fake_tensors.tracing(context), fake_tensors.with_constant_floats(content.constant_floats):
            trace_pair(gm, inputs)
    subclasses = any(map(eager.is_traceable_wrapper_subclass, inputs))
    random = context.fw_metadata is not None and context.fw_metadata.is_rng_op_functionalized
    wrappers = {"subclasses": subclasses, "functionalised RNG": random}
    return [guard.expr for guard in fake_mode.shape_env.guards[known:]], tuple(
        n for n, on in wrappers.items() if on
    )

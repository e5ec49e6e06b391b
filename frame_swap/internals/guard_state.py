"""What Dynamo's guards of a frame are made from: kept, and made into guards again in another process.

Dynamo makes guards from descriptions: where a value is found (a source), and what is checked of it. Here the
descriptions are kept, and guards are made from the values that the other process has at these places. So each guard
is there again, also those on the identity of an object. Whether the values are those of the process that has traced
is for the caller to find out.

The names below are those of torch 2.13 and newer; older ones have some of them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import pickle
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from types import CodeType
from typing import Any, NamedTuple

import torch

from .probe import names_looked_up

with names_looked_up():
    from torch._dynamo import bytecode_transformation
    from torch._dynamo import guards as dynamos
    from torch._dynamo.types import GuardedCode, wrap_guarded_code
    from torch._dynamo.utils import CleanupHook, CleanupManager, orig_code_map
    from torch._dynamo.variables import functions, nn_module
    from torch._guards import CompileContext, Guard, GuardsSet, Source, compile_context
    from torch.fx.experimental.symbolic_shapes import _ShapeGuardsHelper
    from torch.utils._ordered_set import OrderedSet
    from torch.utils.weak import TensorWeakRef

try:
    from torch._dynamo import convert_frame
    from torch._dynamo.convert_frame import DynamoOutput
    from torch._dynamo.output_graph import OutputGraphCommon, OutputGraphGuardsState, get_builtins_dict
    from torch._dynamo.package import SerializedCode

    _HAS_NAMES = True
except ImportError:  # before torch 2.13
    _HAS_NAMES = False

Listener = Callable[[CodeType, CodeType, Any], None]
"""Takes the frame's code, the code that Dynamo has generated for it, and Dynamo's `OutputGraph`."""


class GuardState(NamedTuple):
    """The descriptions of a frame's guards.

    Attributes:
        guards: Dynamo's own, without what they hold of this process.
        sizes: and strides, of tensors, by source.
        ordered: sources of dictionaries whose order of keys is guarded.
        forward_ad_level, default_device, global_state: at capture.
        builtins: the global in which Dynamo's code finds Python's builtins; None where it does not look for them.
        imports: modules, by the globals in which Dynamo's code finds them.
    """

    guards: tuple[Guard, ...]
    sizes: dict[Source, Any]
    ordered: set[Source]
    forward_ad_level: int
    default_device: torch.device | None
    global_state: Any
    builtins: str | None
    imports: dict[str, str]


class Guarded(NamedTuple):
    """One guard, and the value that it is on.

    Attributes:
        kind: the name of Dynamo's method that makes it, such as "TENSOR_MATCH".
        name: where the value is found, as an expression.
        value: None for guards that are on no value.
        asked: what the guard asks of the value besides: names and values of the method's other parameters.
    """

    kind: str
    name: str
    value: Any
    asked: dict[str, Any]


def is_possible() -> bool:
    """Whether this torch has the names that are needed."""
    return _HAS_NAMES


# --- Where they were traced ---


class _Listening(threading.local):
    """Who listens on this thread; whether its trace has called a function whose result it takes for constant."""

    listener: Listener | None = None
    has_assumed = False


_listening = _Listening()


@contextlib.contextmanager
def told(listener: Listener) -> Iterator[None]:
    """Within the block, on this thread, `listener` is called with each frame whose guards Dynamo has made."""
    _install()
    before = _listening.listener, _listening.has_assumed
    _listening.listener, _listening.has_assumed = listener, False
    try:
        yield
    finally:
        _listening.listener, _listening.has_assumed = before


@functools.cache
def _install() -> None:
    stock = DynamoOutput.build_guards

    @functools.wraps(stock)
    def build_guards(self: Any, code: CodeType, *args: Any, **keywords: Any) -> Any:
        manager = stock(self, code, *args, **keywords)
        if _listening.listener is not None:
            _listening.listener(code, self.bytecode, self.tracer_output.output_graph)
        return manager

    setattr(DynamoOutput, "build_guards", build_guards)  # noqa: B010
    call_constant: Callable[..., Any] = functions.invoke_and_store_as_constant

    @functools.wraps(call_constant)
    def invoke_and_store_as_constant(*args: Any, **keywords: Any) -> Any:
        _listening.has_assumed = True
        return call_constant(*args, **keywords)

    for module in (functions, nn_module):
        setattr(module, "invoke_and_store_as_constant", invoke_and_store_as_constant)  # noqa: B010


def state_of(output_graph: Any) -> GuardState:
    """The state of a frame whose guards Dynamo has just made."""
    return GuardState(
        tuple(_bare(guard) for guard in sorted(output_graph.guards, key=Guard.sort_key)),
        dict(output_graph.input_source_to_sizes_strides),
        set(output_graph.guard_on_key_order),
        output_graph.dual_level,
        output_graph.current_device,
        output_graph.global_state_guard,
        output_graph.name_of_builtins_dict_key_in_fglobals,
        dict(output_graph.import_sources),
    )


def why_not(output_graph: Any) -> str:
    """Why guards of this frame cannot be made elsewhere; "" where they can."""
    if output_graph.torch_function_mode_stack or output_graph.functorch_layers:
        return "a torch function mode or a transform was active"
    if output_graph.aotautograd_guards:
        return "AOTAutograd has added guards"
    if output_graph.shape_env.var_to_range:
        return "it has sizes that change"
    if _listening.has_assumed or output_graph.nn_modules:
        return "it holds what a function has returned that is assumed to be constant, or other objects"
    return ""


def traced_code(output_graph: Any) -> tuple[CodeType, ...]:
    """The code of all functions that were traced, the frame's first."""
    return tuple(dict.fromkeys(output_graph.traced_code))


def installed_globals(output_graph: Any) -> dict[str, Any]:
    """The globals that Dynamo has made for the frame's code, by name, but for those of its imports."""
    others = {output_graph.name_of_builtins_dict_key_in_fglobals, *output_graph.import_sources}
    return {hook.name: hook.scope[hook.name] for hook in output_graph.cleanups if hook.name not in others}


def _bare(guard: Guard) -> Guard:
    made_by: Any = guard.create_fn
    if isinstance(made_by, functools.partial):
        keywords = {name: _strong(value) for name, value in made_by.keywords.items()}
        made_by = functools.partial(made_by.func, *map(_strong, made_by.args), **keywords)
    return dataclasses.replace(
        guard,
        create_fn=made_by,
        guard_types=None,
        code_list=None,
        obj_weakref=None,
        guarded_class_weakref=None,
        stack=None,
        user_stack=None,
        _hash=None,
    )


def _strong(value: Any) -> Any:
    return value() if isinstance(value, (weakref.ref, TensorWeakRef)) else value


# --- Bytes ---


class _Pickler(pickle.Pickler):
    """Pickles equal sources once. Each guard has its own, and what leads to it: 1400 guards would take 10 MB."""

    def __init__(self, stream: io.BytesIO) -> None:
        super().__init__(stream)
        self._sources: dict[Source, Source] = {}

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, Source) and (known := self._sources.setdefault(obj, obj)) is not obj:
            return _same, (known,)
        return NotImplemented


def _same(source: Source) -> Source:
    return source


def dumps(value: Any) -> bytes:
    """Pickle something that holds a `GuardState`."""
    with io.BytesIO() as stream:
        _Pickler(stream).dump(value)
        return stream.getvalue()


def packed_code(code: CodeType) -> Any:
    """`code` as something that can be pickled."""
    return SerializedCode.from_code_object(code)


def unpacked_code(packed: Any, renamed: Mapping[str, str]) -> CodeType:
    """A code object of its own, with other names in place of some."""
    code: CodeType = SerializedCode.to_code_object(packed)
    return code.replace(co_names=tuple(renamed.get(name, name) for name in code.co_names))


# --- Where they are made again ---


def find_modules(state: GuardState, scope: dict[str, Any]) -> None:
    """Give Dynamo's code the globals in which it looks for modules and builtins.

    Raises:
        KeyError: the program has not imported one of them.
    """
    for alias, module in state.imports.items():
        scope.setdefault(alias, sys.modules[module])
    if state.builtins is not None:
        _names_are_used_up(state.builtins)
        scope.setdefault(state.builtins, get_builtins_dict(scope))


def _names_are_used_up(name: str) -> None:
    """Have Dynamo not make a global of this name, which ends in a number, for a frame that it traces later."""
    number = int(name.rpartition("_")[2])
    while next(bytecode_transformation._unique_id_counter) < number:
        pass


def guarded(state: GuardState, f_locals: Mapping[str, Any], f_globals: dict[str, Any]) -> Iterator[Guarded]:
    """Each guard, with what is now in its place.

    Raises:
        Exception: of whatever kind, where nothing is.
    """
    scope = {"L": dict(f_locals), "G": f_globals}
    closure = dynamos._get_closure_vars()
    cache: dict[Source, Any] = {}

    def value_at(source: Source) -> Any:
        return source.get_value(scope, closure, cache)

    for guard in state.guards:
        made_by: Any = guard.create_fn
        asked = dict(made_by.keywords) if isinstance(made_by, functools.partial) else {}
        if isinstance(other := asked.get("source_b"), Source):
            asked["source_b"] = value_at(other)
        asked.pop("value", None)  # of a tensor, which is the value itself
        asked.pop("recompile_hint", None)
        value = value_at(guard.originating_source) if guard.name else None
        yield Guarded(guard.create_fn_name(), guard.name, value, asked)


def guards_of(
    state: GuardState, code: CodeType, f_locals: Mapping[str, Any], f_globals: dict[str, Any], compile_id: Any
) -> Any | None:
    """Guards for a frame of `code`, made from its values; None where they do not hold of these.

    The caller holds Dynamo's compile lock.
    """
    output_graph = OutputGraphGuardsState(
        local_scope=dict(f_locals),
        global_scope=f_globals,
        torch_function_mode_stack=[],
        guard_on_key_order=state.ordered,
        input_source_to_sizes_strides=state.sizes,
        dual_level=state.forward_ad_level,
        functorch_layers=[],
        current_device=state.default_device,
        global_state_guard=state.global_state,
        _guards=GuardsSet(OrderedSet(map(_bare, state.guards))),
        _aotautograd_guards=[],
        name_of_builtins_dict_key_in_fglobals=state.builtins,
        skip_guards_check=True,  # it would raise
    )
    nothing = _ShapeGuardsHelper([])
    shapes = dynamos.ShapeCodeParts(nothing, nothing, None, True, [])
    with compile_context(CompileContext(compile_id)):
        check: Any = dynamos.CheckFunctionManager(
            code, OutputGraphCommon(output_graph), shape_code_parts=shapes
        ).guard_manager
    return check if check.check(dict(f_locals)) else None


def install_global(scope: dict[str, Any], name: str, value: Any) -> Callable[[], None]:
    """Make a global; returns what removes it."""
    return CleanupHook.create(scope, name, value)


def answer(original: CodeType, code: CodeType, guards: Any, compile_id: Any, clean_up: Callable[[], None]) -> Any:
    """What Dynamo's callback answers for a frame of `original` that `code` runs wherever `guards` hold.

    Args:
        clean_up: called when `code` is gone.
    """
    CleanupManager.instance[code] = [clean_up]
    convert_frame.input_codes.add(original)
    convert_frame.output_codes.add(code)
    orig_code_map[code] = original
    guarded_code = GuardedCode(code, guards, compile_id, f"Torch-Compiled Region: {compile_id}")
    return wrap_guarded_code(guarded_code)

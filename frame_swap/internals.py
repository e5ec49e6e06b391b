"""Every private name of PyTorch that frame-swap uses, in one place.

Checked on torch 2.11, 2.13 and 2.15. The names that serve the calling process are looked up when this
module is imported; if one is gone, `MISSING` says which, and `backend.py` then answers with plain stock
Inductor and one warning. Names of Inductor itself are looked up where they are used, in a worker or on the
loader thread, because importing Inductor takes most of a second that the first call should not pay for;
one that is gone there fails the region, and its eager pair goes on serving.

Nothing else in frame-swap imports a private name of torch.
"""

from __future__ import annotations

import contextlib
import importlib
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import CodeType, FunctionType
from typing import Any, NamedTuple, cast
from unittest import mock

import sympy
import torch
from torch._ops import OpOverload, OpOverloadPacket

CHECKED = "2.11 to 2.15"

MISSING: str | None = None
"""What this torch lacks of what frame-swap needs, or None."""

try:
    import torch._dynamo
    import torch._functorch.config as functorch_config
    import torch._inductor.config as inductor_config
    import torch._logging._internal as torch_logging
    import torch.nn.modules.module as nn_module
    from torch import _conj as conj
    from torch import _neg_view as neg_view
    from torch._C import _DisableAutocast as no_autocast
    from torch._C import _get_deterministic_algorithms as deterministic_algorithms
    from torch._C import _get_obj_in_tls as thread_local
    from torch._C import _is_key_in_tls as is_thread_local
    from torch._C import _is_tracing, _len_torch_dispatch_stack
    from torch._C import _is_view_replay_enabled as is_view_replay_enabled
    from torch._C import _set_grad_enabled as set_grad_enabled
    from torch._C import _set_view_replay_enabled as set_view_replay_enabled
    from torch._C._autograd import _get_current_graph_task_keep_graph as keeps_graph
    from torch._C._dynamo.eval_frame import _debug_get_cache_entry_list as cache_entries
    from torch._C._dynamo.eval_frame import set_code_exec_strategy
    from torch._C._functorch import is_functorch_wrapped_tensor, maybe_current_level, peek_interpreter_stack
    from torch._dynamo import eval_frame, external_utils, trace_rules
    from torch._dynamo.backends.common import aot_autograd
    from torch._dynamo.backends.debugging import boxed_nop
    from torch._dynamo.convert_frame import compile_lock, output_codes, register_bytecode_hook
    from torch._dynamo.exc import TorchDynamoException
    from torch._dynamo.mutation_guard import GenerationTracker
    from torch._dynamo.source import TensorPropertySource
    from torch._dynamo.symbolic_convert import InstructionTranslator
    from torch._dynamo.types import FrameAction, FrameExecStrategy  # type: ignore[attr-defined]
    from torch._dynamo.utils import (
        CleanupManager,
        compilation_time_metrics,
        counters,
        get_metrics_context,
        orig_code_map,
        same,
    )
    from torch._functorch._aot_autograd import runtime_wrappers
    from torch._functorch._aot_autograd.functional_utils import gen_alias_from_base
    from torch._functorch._aot_autograd.runtime_wrappers import (
        FunctionalizedRngRuntimeWrapper,
        RuntimeWrapper,
        coerce_to_expected_memory_format,
    )
    from torch._functorch._aot_autograd.schemas import OutputType, TensorAlias
    from torch._functorch._aot_autograd.utils import saved_tensors_hooks_are_inlineable, top_saved_tensors_hooks
    from torch._guards import (
        CompileContext,
        CompileId,
        TracingContext,
        compile_context,
        detect_fake_mode,
        tracing,
    )
    from torch._higher_order_ops import effects
    from torch._higher_order_ops.triton_kernel_wrap import (
        kernel_side_table,
        triton_kernel_wrapper_functional,
        triton_kernel_wrapper_mutation,
    )
    from torch._library.custom_ops import OPDEFS, CustomOpDef
    from torch._library.simple_registry import singleton as operator_registry
    from torch._logging import structured
    from torch._logging._internal import LazyTraceHandler, LogState, trace_log
    from torch._logging._internal import getArtifactLogger as artifact_logger
    from torch._prims_common import clone_preserve_strides
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, is_fake, unset_fake_temporarily
    from torch.autograd import profiler
    from torch.fx._graph_pickler import GraphPickler
    from torch.fx._graph_pickler import Options as GraphPicklerOptions
    from torch.fx._symbolic_trace import is_fx_symbolic_tracing
    from torch.fx.experimental.sym_node import SymNode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv
    from torch.utils._python_dispatch import _disable_current_modes as disable_current_modes
    from torch.utils._python_dispatch import is_traceable_wrapper_subclass
    from torch.utils._sympy.value_ranges import ValueRanges, bound_sympy

    mark_dynamic = (
        getattr(runtime_wrappers, "mark_dynamo_propagated_dynamic_indices", None)
        or runtime_wrappers.maybe_mark_dynamic_helper  # type: ignore[attr-defined]  # up to 2.12
    )

    # Looked up at each use, because torch assigns them anew or we do; here to see that they exist.
    _ASSIGNED = (
        torch_logging.log_state,
        torch_logging.GET_DTRACE_STRUCTURED,
        structured.intern_string,
        eval_frame._stance.stance,
        profiler._is_profiler_enabled,
    )
    _GLOBAL_HOOKS = (
        nn_module._global_backward_pre_hooks,
        nn_module._global_backward_hooks,
        nn_module._global_forward_hooks,
        nn_module._global_forward_pre_hooks,
    )
except (
    ImportError,
    AttributeError,
) as error:  # pragma: no cover - exercised by a test in a process of its own
    MISSING = str(error)

__all__ = [
    "CHECKED",
    "MISSING",
    "CapturedFrame",
    "CompileContext",
    "CompileId",
    "CustomOpDef",
    "FakeTensor",
    "FakeTensorMode",
    "FrameShapes",
    "FunctionalizedRngRuntimeWrapper",
    "GenerationTracker",
    "GraphPickler",
    "GraphPicklerOptions",
    "LazyTraceHandler",
    "LogState",
    "OutputType",
    "RuntimeWrapper",
    "ShapeEnv",
    "SymNode",
    "TensorAlias",
    "TorchDynamoException",
    "TracingContext",
    "adopt_code",
    "aot_autograd",
    "artifact_logger",
    "asks_for_cudagraphs",
    "autocast_dtypes",
    "backend_flags_unlocked",
    "backend_of",
    "backward_before_forward",
    "boxed_nop",
    "cache_entries",
    "captured_frame",
    "captured_whole",
    "changed_configs",
    "clone_preserve_strides",
    "coerce_to_expected_memory_format",
    "compilation_time_metrics",
    "compile_context",
    "compile_lock",
    "compiled_callable",
    "conj",
    "counters",
    "custom_op_def",
    "defined_in_python",
    "detect_fake_mode",
    "deterministic_algorithms",
    "disable_current_modes",
    "dispatch_keys",
    "effect",
    "fake_impl",
    "functorch_config",
    "gen_alias_from_base",
    "guards_elsewhere",
    "has_effects",
    "has_external_objects",
    "inductor_config",
    "is_fake",
    "is_functorch_wrapped_tensor",
    "is_thread_local",
    "is_traceable_wrapper_subclass",
    "is_triton_kernel",
    "is_view_replay_enabled",
    "keeps_graph",
    "kernel_side_table",
    "mark_dynamic",
    "neg_view",
    "no_autocast",
    "only_calls_forward",
    "patch_configs",
    "peek_interpreter_stack",
    "prepare_cudagraphs",
    "python_rules",
    "recompile_limit",
    "register_bytecode_hook",
    "register_effect",
    "registered_at",
    "registrations",
    "runs_hooks",
    "same",
    "saving_is_traced",
    "set_grad_enabled",
    "set_view_replay_enabled",
    "skip_frames",
    "stand_in",
    "stock_inductor",
    "structured",
    "stub_module",
    "thread_local",
    "torch_logging",
    "trace_log",
    "traceable",
    "tracing",
    "triton_kernel_wrapper_mutation",
    "undisturbed",
    "unset_fake_temporarily",
    "version_checked",
    "without_disable",
]


def version_checked() -> bool:
    """Whether this torch is of a version that frame-swap is tested on."""
    major, minor = (int(part) for part in torch.__version__.split(".")[:2])
    return (2, 11) <= (major, minor) <= (2, 15)


class CapturedFrame(NamedTuple):
    """The user's frame that Dynamo is compiling, as a backend can see it."""

    code: CodeType  # of the function that the user would name: not Dynamo's or nn.Module's shell around it
    globals: dict[str, Any]


_SHELLS = ("torch/_dynamo/external_utils.py", "torch/nn/modules/module.py")


def captured_frame() -> CapturedFrame | None:
    """The frame that Dynamo is tracing on this thread; None outside of Dynamo."""
    try:
        root = InstructionTranslator.current_tx().output.root_tx
    except AttributeError:
        return None
    if root is None:
        return None
    code = root.f_code
    if code.co_filename.endswith(_SHELLS):  # the user's is what it inlined, and that is done last
        inlined = reversed(root.output.traced_code)
        code = next((c for c in inlined if not c.co_filename.endswith(_SHELLS)), code)
    return CapturedFrame(code, root.f_globals)


def recompile_limit() -> int:
    """How many times Dynamo would compile one frame."""
    return int(torch._dynamo.config.recompile_limit)


def skip_frames(code: CodeType) -> None:
    """Tell Dynamo to trace neither frames of `code` nor anything that they call."""
    set_code_exec_strategy(code, FrameExecStrategy(FrameAction.SKIP, FrameAction.SKIP))


def adopt_code(old: CodeType, new: CodeType) -> None:
    """Give `new` what Dynamo keeps for its generated code object `old`.

    Dynamo deletes the globals that generated code uses (`__compiled_fn_*`, resume functions) when that code
    object dies; they now have to live as long as `new`. May be done again where it was interrupted.
    """
    orig_code_map[new] = orig_code_map[old]
    output_codes.add(new)
    if hooks := CleanupManager.instance.get(old):
        CleanupManager.instance[new] = hooks
        CleanupManager.instance[old] = []
    # A resume function compiles while its caller's frame is on the stack, and Dynamo's metrics keep a traceback
    # of that, with the caller's generated code, for an error message within the same compile.
    metrics = get_metrics_context()
    if not metrics.in_progress():
        metrics._edits.clear()


def without_disable(function: Any) -> Any:
    """What `torch._dynamo.disable` was put around, or `function` itself."""
    return getattr(function, "_torchdynamo_orig_callable", function)


# Calls past torch.compile's wrapper


def captured_whole(gm: torch.fx.GraphModule) -> bool:
    """Whether Dynamo captured all that the frame does, up to its end, in this graph."""
    reason = getattr(gm, "compile_subgraph_reason", None)
    return reason is not None and not reason.graph_break


def compiled_callable(compiled: Callable[..., Any]) -> Any:
    """What `torch.compile` calls for Dynamo to capture: a function, a bound method, or Dynamo's shell around it."""
    return getattr(compiled, "_torchdynamo_orig_callable", None)


def backend_of(compiled: Callable[..., Any]) -> Any:
    """What the cache entries of `torch.compile`'s result name as their backend.

    None where that cannot be told, or where its calls do more than find and run an entry's code.
    """
    if MISSING is not None or not isinstance(compiled, FunctionType) or torch._dynamo.config.compiled_autograd:
        return None
    cells = dict(zip(compiled.__code__.co_freevars, compiled.__closure__ or (), strict=True))
    backend: Any = cells["callback"].cell_contents if "callback" in cells else None
    while hasattr(backend, "_torchdynamo_orig_backend"):
        backend = backend._torchdynamo_orig_backend
    return backend


def stand_in(function: Callable[..., Any], compiled: Callable[..., Any]) -> None:
    """Have Dynamo take `function`, with the attributes of `compiled`, for that, and not trace its frames."""
    attributes = cast("Any", function)
    attributes.__wrapped__ = cast("Any", compiled).__wrapped__
    attributes._torchdynamo_wrapper_id = id(function)
    skip_frames(attributes.__code__)


def traceable(call: Callable[..., Any], forward: Callable[..., Any]) -> Callable[..., Any]:
    """`call`, which does no more than call `forward`, as Dynamo captures it: frames of torch.nn's own modules it
    passes over, unless another frame inlines them."""
    return external_utils.wrap_inline(call) if trace_rules.check(forward) else call


def undisturbed() -> bool:
    """Whether nothing on this thread watches a compiled call, traces it or wants another: no profiler, tracer,
    dispatch mode, functorch transform or stance. Torch function modes are a matter of the guards.
    """
    stance = eval_frame._stance
    return (
        stance.stance == "default"
        and stance.backend is None
        and not stance.skip_guard_eval_unsafe
        and not profiler._is_profiler_enabled
        and not _len_torch_dispatch_stack()
        and maybe_current_level() is None
        and not _is_tracing()
        and not is_fx_symbolic_tracing()
    )


def only_calls_forward(module: torch.nn.Module) -> bool:
    """Whether `module._call_impl` comes down to its class's `forward`: there are no hooks."""
    return not (
        module._backward_hooks
        or module._backward_pre_hooks
        or module._forward_hooks
        or module._forward_pre_hooks
        or any(_GLOBAL_HOOKS)
        or "forward" in module.__dict__
    )


_RELATIONAL = {"OBJECT_ALIASING", "STORAGE_OVERLAPPING", "SYMBOLIC_SHAPE_GUARD"}
"""Guards that relate values of several places, and hold only where all of these are visited."""


def guards_elsewhere(root: Any, name: str) -> Any | None:
    """The guards under `root` that are neither about the local variable `name` nor about code.

    Guards about code are those on the identity of functions, classes and modules that globals lead to. None where
    guards relate the variable to others.
    """
    about = f"L[{name!r}]"
    pending = [node for node in root.get_child_managers() if node.get_source() == about]
    while pending:
        node = pending.pop()
        if any(type(guard).__name__ in _RELATIONAL for guard in node.get_leaf_guards()):
            return None
        pending += _below(node)
    left_out = {about}
    pending = [node for node in root.get_child_managers() if node.get_source() == "G"]
    while pending:
        node = pending.pop()
        if _is_about_code(node):
            left_out.add(node.get_source())
        else:
            pending += _below(node)
    return root.clone_manager(lambda node: node.get_source() not in left_out)


def _below(node: Any) -> list[Any]:
    if not hasattr(node, "get_key_value_managers"):
        return list(node.get_child_managers())
    return [m for pair in node.get_key_value_managers().values() for m in pair if m is not None]


def _is_about_code(node: Any) -> bool:
    kinds = {type(guard).__name__ for guard in node.get_leaf_guards()}
    return kinds <= {"ID_MATCH", "TYPE_MATCH"} and all(map(_is_about_code, _below(node)))


class FrameShapes:
    """The symbolic shapes of the frame being compiled: which argument holds which symbol, and what is known.

    Args:
        example_inputs: the graph's inputs; Dynamo passes every symbol that the graph needs as an argument.
    """

    def __init__(self, example_inputs: list[Any]) -> None:
        self.symbols: dict[sympy.Symbol, int] = {}
        self._shape_env: Any = None
        for at, value in enumerate(example_inputs):
            if isinstance(value, torch.SymInt):
                self._shape_env = value.node.shape_env
                if isinstance(value.node.expr, sympy.Symbol):
                    self.symbols.setdefault(value.node.expr, at)

    def guard_on(self, relations: Iterable[sympy.Basic]) -> None:
        """Have Dynamo check `relations`, which hold now, with the frame's own guards; while it still traces it."""
        for relation in relations:
            self._shape_env.evaluate_expr(relation)

    def sizes(self, args: Sequence[Any]) -> dict[str, int]:
        """What the symbols stand for in a call with the graph's inputs `args`, by their names."""
        return {symbol.name: int(args[at]) for symbol, at in self.symbols.items()}

    def implies(self, relation: sympy.Basic) -> bool | None:
        """True where the frame's own guards make `relation` hold, False where they rule it out."""
        if self._shape_env is None:
            return None
        try:
            known = self._shape_env._maybe_evaluate_static(relation)
            if known is None:
                values = bound_sympy(relation, self._ranges(relation.free_symbols))
                known = values.lower if values.is_singleton() else None
        except KeyError:  # a function whose range is not known
            return None
        return None if known is None else bool(known)

    def _ranges(self, symbols: Iterable[sympy.Symbol]) -> dict[sympy.Symbol, Any]:
        """What values `symbols` take. No tensor has a dimension of `sys.maxsize`, which Dynamo leaves open and
        which slices without an end compare sizes with.
        """
        env = self._shape_env
        ranges = {symbol: env.var_to_range[symbol] for symbol in symbols}
        return {
            symbol: known & ValueRanges(known.lower, sys.maxsize - 1)
            if any(isinstance(source, TensorPropertySource) for source in env.var_to_sources.get(symbol, ()))
            else known
            for symbol, known in ranges.items()
        }


def saving_is_traced() -> bool:
    """Whether hooks on saved tensors are set that become a part of the graphs traced meanwhile."""
    return bool(saved_tensors_hooks_are_inlineable(top_saved_tensors_hooks()))


def runs_hooks() -> bool:
    """Whether this thread's calls of graphs run code of hooks on saved tensors, or of a dispatch mode."""
    return bool(top_saved_tensors_hooks()) or watched_by_mode()


def has_external_objects() -> bool:
    """Whether a graph of this process uses streams or events, which AOTAutograd hands on to backwards (2.15)."""
    return bool(getattr(runtime_wrappers, "index_to_external_object_weakref", None))


# What `torch.library` and the dispatcher know of an operator


def custom_op_def(operator: OpOverload) -> Any | None:
    """What `torch.library.custom_op` returned for this operator, if it was defined so and is still that."""
    definition = OPDEFS.get(operator._name)
    return definition if definition is not None and definition._opoverload is operator else None


def defined_in_python(operator: OpOverload) -> bool:
    """Whether the operator's schema was defined from Python."""
    return bool(operator._defined_in_python)


def fake_impl(operator: OpOverload) -> Callable[..., Any] | None:
    """What `torch.library.register_fake` was given for this operator."""
    kernel = operator_registry.find(operator._name).fake_impl.kernel
    function: Callable[..., Any] | None = kernel and kernel.func
    if function is not None and function.__qualname__.startswith("_check_pystubs_once."):
        # A wrapper of torch.library's that checks, at the first call, where an operator of C++ was defined.
        cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
        function = cells["func"].cell_contents
    return function


def effect(operator: OpOverload) -> Any:
    """The effect type that was registered for the operator, None where it has none."""
    return operator_registry.find(operator._name).effect.effect


def has_effects(target: object) -> bool:
    """Whether a graph node's target is an operator with effects that happen in order, such as printing."""
    if isinstance(target, OpOverloadPacket):
        return any(has_effects(getattr(target, name)) for name in target.overloads())  # type: ignore[no-untyped-call]
    return effects.has_effects(target)


def register_effect(name: str, effect: Any, library: torch.library.Library) -> None:
    """Register the effect type of the operator `name`, for as long as `library` lives."""
    library._register_effectful_op(name, effect)


def python_rules(operator: OpOverload) -> list[str]:
    """Dispatch keys, modes and tensor classes for which the operator has rules that Python code attached to it."""
    rules = [*operator.py_kernels, *operator.python_key_table, *operator.functorch_table]
    if custom_op_def(operator) is None:
        rules += operator_registry.find(operator._name).torch_dispatch_rules._data
    return [getattr(rule, "__name__", str(rule)) for rule in rules]


def registrations(operator: OpOverload) -> str:
    """The operator's schema and kernels in the dispatcher, as text: for each key the file and line."""
    text: str = torch._C._dispatch_dump(operator._name)
    return text


_KERNEL = re.compile(r"(\w+)(?:\[alias\])?: registered at (.*?) ::")


def dispatch_keys(operator: OpOverload) -> list[tuple[str, bool]]:
    """The dispatch keys that the operator has kernels for, and whether who defined it registered each."""
    lines = registrations(operator).splitlines()
    defined = next(line.partition("registered at ")[2] for line in lines if line.startswith("debug: "))
    found = (_KERNEL.match(line) for line in lines)
    return [(kernel[1], kernel[2] == defined) for kernel in found if kernel]


def registered_at(operator: OpOverload) -> list[str]:
    """The files in which something of the operator was registered, each once."""
    files: list[str] = re.findall(r": registered at (.*?):\d+(?: ::|$)", registrations(operator), re.MULTILINE)
    kernel = operator_registry.find(operator._name).fake_impl.kernel
    if kernel is not None:
        files.append(kernel.source.rpartition(":")[0])
    return list(dict.fromkeys(files))


def stub_module(operator: OpOverload) -> str | None:
    """The Python module that an operator of C++ names as its companion."""
    stub: tuple[str, str] | None = torch._C._dispatch_pystub(operator._schema.name, operator._schema.overload_name)
    return stub[0] if stub else None


def autocast_dtypes(definition: Any) -> dict[str, torch.dtype]:
    """What a custom operator's inputs are cast to under autocast, by type of device."""
    if hasattr(definition, "_autocast_dtype"):
        dtypes = dict(definition._autocast_dtype)
    else:  # up to 2.12
        dtypes = {"cpu": definition._autocast_cpu_dtype, "cuda": definition._autocast_cuda_dtype}
    return {device: dtype for device, dtype in dtypes.items() if dtype is not None}


def in_double(gm: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """`gm`, changed to compute in double precision where it names a type; as PyTorch's accuracy checks do it."""
    from torch._dynamo.debug_utils import cast_to_fp64

    return cast_to_fp64(gm, [])[0]


def accuracy_tolerance() -> float:
    """How far apart PyTorch's accuracy checks let compiled and eager values be, absolutely and relatively."""
    return float(torch._dynamo.config.repro_tolerance)


def watched_by_mode() -> bool:
    """Whether a dispatch mode sees the operators that this thread runs."""
    return bool(_len_torch_dispatch_stack())


def is_triton_kernel(target: object) -> bool:
    """Whether a graph node's target launches a Triton kernel of the user's."""
    return target in (triton_kernel_wrapper_functional, triton_kernel_wrapper_mutation)


def backend_flags_unlocked() -> contextlib.AbstractContextManager[None]:
    """Within the block `torch.backends` flags may be set, also after PyTorch's test utilities have locked them."""
    unlocked: contextlib.AbstractContextManager[None] = torch.backends.__allow_nonbracketed_mutation()
    return unlocked


def _configs() -> dict[str, Any]:
    return {"inductor": inductor_config, "functorch": functorch_config, "dynamo": torch._dynamo.config}


def changed_configs() -> dict[str, dict[str, Any]]:
    """The settings of Inductor, AOTAutograd and Dynamo that differ from their defaults."""
    return {name: config._get_dict(skip_default=True) for name, config in _configs().items()}


@contextlib.contextmanager
def patch_configs(changes: dict[str, dict[str, Any]]) -> Iterator[None]:
    """Apply what `changed_configs` returned in another process. Configs are process-wide, not per thread."""
    with contextlib.ExitStack() as stack:
        for name, config in _configs().items():
            stack.enter_context(config.patch(changes.get(name, {})))
        yield


def asks_for_cudagraphs(options: dict[str, Any]) -> bool:
    """Whether a compile with these changes of Inductor's config is to use CUDA graphs."""
    return bool(options.get("triton.cudagraphs", inductor_config.triton.cudagraphs))


def prepare_cudagraphs(options: dict[str, Any]) -> None:
    """Where a compile is to use CUDA graphs: importing their module makes them usable on this thread only."""
    if asks_for_cudagraphs(options) and torch.cuda.is_available():
        importlib.import_module("torch._inductor.cudagraph_trees")


@contextlib.contextmanager
def backward_before_forward() -> Iterator[None]:
    """Within the block a backward without CUDA graphs, of a forward with them, may be made ready before that ran.

    Each call of such a backward tells the manager of the thread's CUDA graphs that no forward waits for its
    backward any more. PyTorch looks for the manager once, when it compiles the backward, which is after the
    forward ran; here each call looks for it.
    """
    from torch._inductor import output_code

    def tell_manager(graph: Any, forward_device: Any) -> None:
        if not graph.fx_kwargs["is_backward"] or not inductor_config.triton.cudagraph_trees:
            return
        from torch._inductor.cudagraph_trees import get_manager

        device, call = forward_device.value, graph.current_callable

        def run(inputs: list[Any]) -> Any:
            if (manager := get_manager(device, create_if_none_exists=False)) is not None:
                manager.set_to_running_backward()
            return call(inputs)

        graph.current_callable = run

    with mock.patch.object(output_code, "maybe_handle_backward_generation", tell_manager):
        yield


def stock_inductor(
    gm: torch.fx.GraphModule, example_inputs: list[Any], options: dict[str, Any]
) -> Callable[..., Any]:
    """Compile here and now, as `torch.compile` does without us."""
    from torch._inductor.compile_fx import compile_fx

    return cast("Callable[..., Any]", compile_fx(gm, example_inputs, config_patches=options or None))

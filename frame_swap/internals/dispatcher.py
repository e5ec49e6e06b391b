"""Operators as `torch.library` and the dispatcher know them, and the table of user Triton kernels."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from .probe import names_looked_up

with names_looked_up():
    from torch._higher_order_ops import effects
    from torch._higher_order_ops.triton_kernel_wrap import (
        kernel_side_table,
        triton_kernel_wrapper_functional,
        triton_kernel_wrapper_mutation,
    )
    from torch._library.custom_ops import OPDEFS, CustomOpDef
    from torch._library.simple_registry import singleton as operator_registry
    from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket

__all__ = [
    "CustomOpDef",
    "CustomOpParts",
    "Namespace",
    "Namespaces",
    "OpOverload",
    "OpOverloadPacket",
    "autocast_dtypes",
    "changed_arguments",
    "custom_op_def",
    "defined_in_python",
    "dispatch_keys",
    "effect",
    "fake_impl",
    "higher_order_name",
    "is_repeatable",
    "is_triton_kernel",
    "kernel_side_table",
    "name_of",
    "operator_of",
    "packet_name",
    "parts",
    "python_rules",
    "register_effect",
    "registered_at",
    "registrations",
    "remove",
    "schema_of",
    "stub_module",
    "triton_kernel_wrapper_mutation",
]


def custom_op_def(operator: OpOverload) -> Any | None:
    """The object that `torch.library.custom_op` returned for this operator; None if it was defined otherwise."""
    definition = OPDEFS.get(operator._name)
    return definition if definition is not None and definition._opoverload is operator else None


def defined_in_python(operator: OpOverload) -> bool:
    """Whether the operator's schema was defined from Python."""
    return bool(operator._defined_in_python)


def fake_impl(operator: OpOverload) -> Callable[..., Any] | None:
    """The function that was passed to `torch.library.register_fake` for this operator; None if there is none."""
    kernel = operator_registry.find(operator._name).fake_impl.kernel
    function: Callable[..., Any] | None = kernel and kernel.func
    if function is not None and function.__qualname__.startswith("_check_pystubs_once."):
        # A wrapper of torch.library that checks, at the first call, the module of an operator defined in C++.
        cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
        function = cells["func"].cell_contents
    return function


def effect(operator: OpOverload) -> Any:
    """The effect type that is registered for the operator; None if there is none."""
    return operator_registry.find(operator._name).effect.effect


def is_repeatable(target: object) -> bool:
    """False if a graph node's target is an operator with effects that happen in order, such as printing."""
    if isinstance(target, OpOverloadPacket):
        return all(is_repeatable(getattr(target, name)) for name in target.overloads())  # type: ignore[no-untyped-call]
    return not effects.has_effects(target)


def register_effect(name: str, effect: Any, library: torch.library.Library) -> None:
    """Register an effect type for the operator `name`, for the lifetime of `library`."""
    library._register_effectful_op(name, effect)


def python_rules(operator: OpOverload) -> list[str]:
    """The dispatch keys, modes and tensor classes for which Python code has given the operator rules, as text."""
    rules = [*operator.py_kernels, *operator.python_key_table, *operator.functorch_table]
    if custom_op_def(operator) is None:
        rules += operator_registry.find(operator._name).torch_dispatch_rules._data
    return [getattr(rule, "__name__", str(rule)) for rule in rules]


def registrations(operator: OpOverload) -> str:
    """The operator's schema and kernels in the dispatcher, as text; for each key with file and line."""
    text: str = torch._C._dispatch_dump(operator._name)
    return text


_KERNEL = re.compile(r"(\w+)(?:\[alias\])?: registered at (.*?) ::")


def dispatch_keys(operator: OpOverload) -> list[tuple[str, bool]]:
    """The dispatch keys that have a kernel, each with whether it was registered where the operator was defined."""
    lines = registrations(operator).splitlines()
    defined = next(line.partition("registered at ")[2] for line in lines if line.startswith("debug: "))
    found = (_KERNEL.match(line) for line in lines)
    return [(kernel[1], kernel[2] == defined) for kernel in found if kernel]


def registered_at(operator: OpOverload) -> list[str]:
    """The files that registered the operator, its kernels or its fake implementation, each once."""
    files: list[str] = re.findall(r": registered at (.*?):\d+(?: ::|$)", registrations(operator), re.MULTILINE)
    kernel = operator_registry.find(operator._name).fake_impl.kernel
    if kernel is not None:
        files.append(kernel.source.rpartition(":")[0])
    return list(dict.fromkeys(files))


def stub_module(operator: OpOverload) -> str | None:
    """The Python module that an operator defined in C++ declares for its Python side; None if there is none."""
    stub: tuple[str, str] | None = torch._C._dispatch_pystub(operator._schema.name, operator._schema.overload_name)
    return stub[0] if stub else None


def autocast_dtypes(definition: Any) -> dict[str, torch.dtype]:
    """The dtypes that inputs of a custom operator are cast to under autocast, by device type."""
    if hasattr(definition, "_autocast_dtype"):
        dtypes = dict(definition._autocast_dtype)
    else:  # up to 2.12
        dtypes = {"cpu": definition._autocast_cpu_dtype, "cuda": definition._autocast_cuda_dtype}
    return {device: dtype for device, dtype in dtypes.items() if dtype is not None}


def higher_order_name(target: object) -> str | None:
    """The name of a higher-order operator; None if `target`, of a graph's node, is none."""
    return str(target._name) if isinstance(target, HigherOrderOperator) else None


def is_triton_kernel(target: object) -> bool:
    """Whether `target`, of a graph's node, launches a user Triton kernel."""
    return target in (triton_kernel_wrapper_functional, triton_kernel_wrapper_mutation)


Namespaces: Any = type(torch.ops)
"""The class of `torch.ops`."""

Namespace: Any = type(torch.ops.aten)
"""The class of `torch.ops.aten` and of all other namespaces."""


class CustomOpParts(NamedTuple):
    """The arguments of `torch.library.custom_op` and of the methods of its result."""

    schema: str
    tags: tuple[torch.Tag, ...]
    devices: tuple[str | None, ...]
    kernel: Callable[..., Any]
    fake: Callable[..., Any] | None
    backward: Callable[..., Any] | None
    setup_context: Callable[..., Any] | None
    vmap: Callable[..., Any] | None
    dispatch: dict[type, Callable[..., Any]]


def parts(definition: Any) -> CustomOpParts:
    """The parts of `definition`, which `custom_op_def` returned."""
    return CustomOpParts(
        definition._schema,
        tuple(definition._tags),
        tuple(definition._backend_fns),
        definition._init_fn,
        definition._abstract_fn,
        definition._backward_fn,
        definition._setup_context_fn,
        definition._vmap_fn,
        dict(definition._torch_dispatch_fns),
    )


def operator_of(definition: Any) -> OpOverload:
    """The operator that a `CustomOpDef` defines."""
    operator: OpOverload = definition._opoverload
    return operator


def name_of(operator: OpOverload) -> str:
    """The operator's name: "namespace::operator", then ".overload" if it has one."""
    return str(operator._name)


def packet_name(packet: OpOverloadPacket) -> tuple[str, str]:
    """The namespace of an operator, and its name there."""
    namespace, _, name = packet._qualified_op_name.partition("::")
    return namespace, name


def schema_of(operator: OpOverload) -> str:
    """The operator's schema as `Library.define` takes it."""
    return str(operator._schema).partition("::")[2]


def changed_arguments(schema: str) -> list[str]:
    """The arguments that an operator of this schema changes in place."""
    arguments = torch._C.parse_schema(schema).arguments
    return [a.name for a in arguments if a.alias_info is not None and a.alias_info.is_write]


def remove(library: Any) -> None:
    """Undo all registrations of a `torch.library.Library`."""
    library._destroy()

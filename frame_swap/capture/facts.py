"""What a frame's guards have seen: one description for each guard, to compare with what another process has.

A guard that Dynamo makes from this process's values holds of them, whatever they are. Code that was traced
elsewhere fits only if they are what they were there. So each guard's description says all that the guard checks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from ..errors import Unkeepable
from ..internals import eager
from ..internals.guard_state import Guarded
from .identity import Description, constant, each_class_once, identity


def of(guards: Iterable[Guarded]) -> list[Description]:
    """Describe what each guard is on.

    Raises:
        Unkeepable: a guard, or a value, is of a kind that is not known here.
        Exception: of whatever kind, where a value is missing.
    """
    with each_class_once():
        return [(guard.kind, guard.name, *_fact(guard)) for guard in guards]


def _fact(guard: Guarded) -> Description:
    describe = _FACTS.get(guard.kind)
    if describe is None:
        raise Unkeepable(f"guards of kind {guard.kind} are not kept")
    return describe(guard)


def _nothing(guard: Guarded) -> Description:
    """Of the thread's and the process's state: the guard has it from the process that has traced."""
    return ()


def _of_identity(guard: Guarded) -> Description:
    return identity(guard.value)


def _of_constant(guard: Guarded) -> Description:
    return constant(guard.value)


def _of_type(guard: Guarded) -> Description:
    return identity(type(guard.value))


def _of_length(guard: Guarded) -> Description:
    return identity(type(guard.value)), len(guard.value)


def _of_keys(guard: Guarded) -> Description:
    return identity(type(guard.value)), tuple(map(constant, dict.keys(guard.value)))


def _of_key(guard: Guarded) -> Description:
    return constant(guard.asked["key"]), guard.asked["key"] in guard.value


def _of_attribute(guard: Guarded) -> Description:
    return guard.asked["attr"], hasattr(guard.value, guard.asked["attr"])


def _of_own_attribute(guard: Guarded) -> Description:
    return guard.asked["attr"], guard.asked["attr"] in guard.value.__dict__


def _of_sameness(guard: Guarded) -> Description:
    return (guard.value is guard.asked["source_b"],)


def _of_tensor(guard: Guarded) -> Description:
    tensor = guard.value
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer):
        raise Unkeepable(f"{guard.name} is a {type(tensor).__qualname__}")
    if tensor.layout is not torch.strided or any(name.endswith("_indices") for name in vars(tensor)):
        raise Unkeepable(f"{guard.name} is not strided, or sizes of it are marked as dynamic or static")
    parts = (
        tensor.dtype,
        tensor.device,
        tensor.requires_grad,
        tensor.shape,
        tensor.stride(),
        eager.dispatch_keys(tensor),
    )
    return (type(tensor).__name__, *map(str, parts))


_FACTS: dict[str, Callable[[Guarded], Description]] = {
    "AUTOGRAD_SAVED_TENSORS_HOOKS": _nothing,
    "BOOL_MATCH": _of_constant,
    "BUILTIN_MATCH": _of_identity,
    "CLASS_MATCH": _of_identity,
    "CLOSURE_MATCH": _of_identity,
    "CONSTANT_MATCH": _of_constant,
    "DEFAULT_DEVICE": _nothing,
    "DETERMINISTIC_ALGORITHMS": _nothing,
    "DICT_CONTAINS": _of_key,
    "DICT_KEYS_MATCH": _of_keys,
    "DICT_NOT_CONTAINS": _of_key,
    "DUPLICATE_INPUT": _of_sameness,
    "EMPTY_NN_MODULE_HOOKS_DICT": _of_length,
    "EQUALS_MATCH": _of_constant,
    "FUNCTION_MATCH": _of_identity,
    "GLOBAL_STATE": _nothing,
    "GRAD_MODE": _nothing,
    "HASATTR": _of_attribute,
    "ID_MATCH": _of_identity,
    "MODULE_MATCH": _of_identity,
    "NONE_MATCH": _of_constant,
    "NOT_PRESENT_IN_GENERIC_DICT": _of_own_attribute,
    "SEQUENCE_LENGTH": _of_length,
    "SET_CONTAINS": _of_key,
    "SET_NOT_CONTAINS": _of_key,
    "SHAPE_ENV": _nothing,
    "TENSOR_MATCH": _of_tensor,
    "TORCH_FUNCTION_STATE": _nothing,
    "TYPE_MATCH": _of_type,
}
"""By the name of Dynamo's method that makes a guard. One that is missing here keeps its frame from being kept."""

"""Tensors, the thread-local and global state that eager code reads, and PyTorch's comparison of values."""

from __future__ import annotations

import contextlib
from typing import Any

import torch

from .probe import names_looked_up

with names_looked_up():
    import torch._dynamo
    from torch import _conj as conj
    from torch import _neg_view as neg_view
    from torch._C import _current_graph_task_id as number_of_backward
    from torch._C import _DisableAutocast as no_autocast
    from torch._C import _dispatch_keys as dispatch_keys
    from torch._C import _get_deterministic_algorithms as deterministic_algorithms
    from torch._C import _get_obj_in_tls as thread_local
    from torch._C import _is_key_in_tls as is_thread_local
    from torch._C import _is_view_replay_enabled as is_view_replay_enabled
    from torch._C import _set_grad_enabled as set_grad_enabled
    from torch._C import _set_view_replay_enabled as set_view_replay_enabled
    from torch._C._functorch import is_functorch_wrapped_tensor
    from torch._dynamo.utils import same
    from torch._prims_common import clone_preserve_strides
    from torch.utils._python_dispatch import _disable_current_modes as disable_current_modes
    from torch.utils._python_dispatch import is_traceable_wrapper_subclass

    is_view = torch.Tensor._is_view
    unsafe_view = torch.ops.aten._unsafe_view.default

__all__ = [
    "accumulates",
    "accuracy_tolerance",
    "backend_flags_unlocked",
    "base_of",
    "clone_preserve_strides",
    "conj",
    "deterministic_algorithms",
    "disable_current_modes",
    "dispatch_keys",
    "in_double",
    "is_functorch_wrapped_tensor",
    "is_thread_local",
    "is_traceable_wrapper_subclass",
    "is_view",
    "is_view_replay_enabled",
    "library_file",
    "neg_view",
    "no_autocast",
    "number_of_backward",
    "same",
    "sequence_number",
    "set_grad_enabled",
    "set_view_replay_enabled",
    "storage_id",
    "thread_local",
    "times_changed",
    "unsafe_view",
]


def in_double(gm: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """`gm`, changed to compute in double precision even if it names other types; for accuracy checks."""
    from torch._dynamo.debug_utils import cast_to_fp64

    return cast_to_fp64(gm, [])[0]


def accuracy_tolerance() -> float:
    """The absolute and relative difference between values that PyTorch's accuracy checks allow."""
    return float(torch._dynamo.config.repro_tolerance)


def backend_flags_unlocked() -> contextlib.AbstractContextManager[None]:
    """Within the block, flags of `torch.backends` may be set, even if PyTorch's test utilities have locked them."""
    unlocked: contextlib.AbstractContextManager[None] = torch.backends.__allow_nonbracketed_mutation()
    return unlocked


def base_of(tensor: torch.Tensor) -> torch.Tensor | None:
    """The base of `tensor` if autograd knows it as a view; else None."""
    return tensor._base


def accumulates(node: Any) -> bool:
    """Whether autograd's `node` adds to the `.grad` of a leaf."""
    return bool(node.name() == "torch::autograd::AccumulateGrad")


def sequence_number(node: Any) -> int:
    """A number that grows from each node of autograd's to the next one that its thread makes."""
    return int(node._sequence_nr())


def times_changed(tensor: torch.Tensor) -> int:
    """How often `tensor` was changed in place; 0 for one from inference mode, where nobody counts."""
    return 0 if tensor.is_inference() else tensor._version


def storage_id(storage: torch.UntypedStorage) -> int:
    """A number that identifies the storage among those that are alive."""
    return int(storage._cdata)


def library_file() -> str:
    """The path of PyTorch's extension module, which is linked with its libraries."""
    return torch._C.__file__

"""Deep copies of a graph's arguments: other memory, the same strides, offsets, aliases and autograd properties."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from ..internals import eager

SETS = 4
"""This many copies have to fit into the free memory; one of them may be in double precision."""


class Uncopyable(Exception):
    """These arguments cannot be copied faithfully; the message says why."""


class Arguments:
    """A copy of one call's arguments.

    Copies of tensors that share memory share memory, the copy of a view is a view of the copy of its base, and
    `requires_grad` is the same. A tensor that has a `grad_fn` gets a new leaf as its history.

    Args:
        originals: the arguments of the call; not changed.
        double: whether copies of floating-point and complex tensors are in double precision.

    Attributes:
        values: the copies, in order.
        leaves: the tensors whose `.grad` a backward fills; their order depends only on the originals.

    Raises:
        Uncopyable: with the reason.
    """

    def __init__(self, originals: Sequence[Any], *, double: bool = False) -> None:
        self.leaves: list[Tensor] = []
        self._storages: dict[int, torch.UntypedStorage] = {}
        self._tensors: dict[int, Tensor] = {}
        self._double = double
        tensors = [value for value in originals if isinstance(value, Tensor)]
        for tensor in tensors:
            _check(tensor)
        _check_sizes(tensors)
        self.values = [self._copy(value) for value in originals]

    def _copy(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            if id(value) not in self._tensors:
                with torch.inference_mode(value.is_inference()), torch.enable_grad():
                    self._tensors[id(value)] = self._copy_tensor(value)
            return self._tensors[id(value)]
        if value is None or isinstance(value, (bool, int, float, complex, str, torch.SymInt)):
            return value
        if isinstance(value, torch.Generator):
            return value.clone_state()
        raise Uncopyable(f"an argument is a {type(value).__name__}")

    def _copy_tensor(self, tensor: Tensor) -> Tensor:
        base = eager.base_of(tensor)
        if base is not None and base.dtype == tensor.dtype and not self._double:
            with torch.set_grad_enabled(tensor.grad_fn is not None):
                view = self._copy(base).as_strided(tensor.size(), tensor.stride(), tensor.storage_offset())
            view = _with_bits_of(tensor, view)
            if tensor.is_leaf and tensor.requires_grad:
                self.leaves.append(view.requires_grad_())
            return view
        memory = self._memory(tensor)
        if isinstance(tensor, nn.Parameter):
            memory = nn.Parameter(memory, tensor.requires_grad)
            if tensor.requires_grad:
                self.leaves.append(memory)
        elif tensor.requires_grad:
            self.leaves.append(memory.requires_grad_())
            if not tensor.is_leaf:
                return with_history(memory)
        return memory

    def _memory(self, tensor: Tensor) -> Tensor:
        """A tensor with the same layout in a copy of the memory; without autograd."""
        with torch.no_grad():
            dtype = wider(tensor.dtype) if self._double else tensor.dtype
            if dtype != tensor.dtype:  # only values are compared with this copy: aliases and gaps do not matter
                return torch.empty_strided(tensor.size(), tensor.stride(), dtype=dtype, device=tensor.device).copy_(
                    tensor
                )
            storage = tensor.untyped_storage()
            if (memory := eager.storage_id(storage)) not in self._storages:
                self._storages[memory] = storage.clone()  # type: ignore[no-untyped-call]
            blank = torch.empty(0, dtype=dtype, device=tensor.device)
            blank.set_(self._storages[memory], tensor.storage_offset(), tensor.size(), tensor.stride())
            return _with_bits_of(tensor, blank)


def wider(dtype: torch.dtype) -> torch.dtype:
    """The double-precision type for values of `dtype`; `dtype` itself for integers."""
    if dtype.is_complex:
        return torch.complex128
    return torch.float64 if dtype.is_floating_point else dtype


class _History(torch.autograd.Function):
    """A tensor in a leaf's memory with a `grad_fn`, but no view: unlike a leaf, it may be changed in place."""

    @staticmethod
    def forward(ctx: Any, leaf: Tensor) -> Tensor:
        blank = torch.empty(0, dtype=leaf.dtype, device=leaf.device)
        blank.set_(leaf.untyped_storage(), leaf.storage_offset(), leaf.size(), leaf.stride())
        return _with_bits_of(leaf, blank)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def with_history(leaf: Tensor) -> Tensor:
    """A tensor in the memory of `leaf` that has a `grad_fn`; its gradient arrives at `leaf`."""
    tensor: Tensor = _History.apply(leaf)  # type: ignore[no-untyped-call]
    return tensor


def _with_bits_of(original: Tensor, tensor: Tensor) -> Tensor:
    """`tensor` with the conjugate and negative bits of `original`."""
    if original.is_conj() != tensor.is_conj():
        tensor = eager.conj(tensor)
    if original.is_neg() != tensor.is_neg():
        tensor = eager.neg_view(tensor)
    return tensor


def _check(tensor: Tensor) -> None:
    if type(tensor) not in (Tensor, nn.Parameter):
        raise Uncopyable(f"an argument is a {type(tensor).__name__}")
    if tensor.layout is not torch.strided:
        raise Uncopyable(f"an argument has layout {tensor.layout}")
    if eager.is_functorch_wrapped_tensor(tensor):
        raise Uncopyable("an argument is a tensor inside a functorch transform")
    if tensor.is_quantized or tensor.is_mkldnn:
        raise Uncopyable("an argument is quantized or has a layout of MKL-DNN")
    if tensor.device.type == "meta":
        raise Uncopyable("an argument has no data")


def _check_sizes(tensors: Sequence[Tensor]) -> None:
    storages = {eager.storage_id(t.untyped_storage()): t.untyped_storage() for t in tensors}.values()
    for device in {storage.device for storage in storages}:
        needed = SETS * sum(storage.nbytes() for storage in storages if storage.device == device)
        left = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
        if needed > left:
            raise Uncopyable(f"copies of the arguments take {needed >> 20} MiB, and {device} has {left >> 20} left")

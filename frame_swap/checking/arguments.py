"""Deep copies of a graph's arguments: the same strides, offsets, aliases and place in autograd, other memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from ..internals import eager

SETS = 4
"""How many copies have to fit into what memory is left; one may be in double precision."""


class Uncopyable(Exception):
    """What these arguments are cannot be told apart from what they belong to; the message says why."""


class Arguments:
    """A copy of one call's arguments.

    Tensors that share memory share it in the copy, a view is a view of its base's copy, and what required a
    gradient does. A tensor with a history gets a new leaf in place of it.

    Args:
        originals: what the graph was called with; not touched.
        double: whether floating-point and complex tensors become double precision.

    Attributes:
        values: the copies, in order.
        leaves: the tensors whose `.grad` a backward fills, in an order that depends on the originals only.

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
        """A new tensor laid out alike, over a copy of the memory; no part of autograd."""
        with torch.no_grad():
            dtype = wider(tensor.dtype) if self._double else tensor.dtype
            if dtype != tensor.dtype:  # a reference for values alone: aliases and gaps do not matter
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
    """The double-precision type that holds what `dtype` holds."""
    if dtype.is_complex:
        return torch.complex128
    return torch.float64 if dtype.is_floating_point else dtype


class _History(torch.autograd.Function):
    """A tensor with a `grad_fn` that is no view: it may be changed in place, as a leaf may not."""

    @staticmethod
    def forward(ctx: Any, leaf: Tensor) -> Tensor:
        blank = torch.empty(0, dtype=leaf.dtype, device=leaf.device)
        blank.set_(leaf.untyped_storage(), leaf.storage_offset(), leaf.size(), leaf.stride())
        return _with_bits_of(leaf, blank)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def with_history(leaf: Tensor) -> Tensor:
    tensor: Tensor = _History.apply(leaf)  # type: ignore[no-untyped-call]
    return tensor


def _with_bits_of(original: Tensor, tensor: Tensor) -> Tensor:
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
        raise Uncopyable("an argument is a tensor of functorch's")
    if tensor.is_quantized or tensor.is_mkldnn:
        raise Uncopyable("an argument is quantized or of MKL-DNN's own layout")
    if tensor.device.type == "meta":
        raise Uncopyable("an argument has no data")


def _check_sizes(tensors: Sequence[Tensor]) -> None:
    storages = {eager.storage_id(t.untyped_storage()): t.untyped_storage() for t in tensors}.values()
    for device in {storage.device for storage in storages}:
        needed = SETS * sum(storage.nbytes() for storage in storages if storage.device == device)
        left = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
        if needed > left:
            raise Uncopyable(f"copies of the arguments take {needed >> 20} MiB, and {device} has {left >> 20} left")

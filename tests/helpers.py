"""Compare a subject's eager twin with its compiled twin before, during and after the swap.

def doubles(compiled: Wrap) -> Subject:
    return Subject(compiled(lambda x: x * 2), [lambda: (torch.rand(3),)])

through_swap(doubles, device=device)
"""

from __future__ import annotations

import functools
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from types import CodeType, FrameType
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_flatten_with_path, tree_leaves

import frame_swap
from frame_swap import State, kept_frames
from frame_swap.internals import logs
from frame_swap.region import Record, Report, records
from frame_swap.shipping import parcel

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
"""The device of tests that do not choose one."""

Wrap = Callable[..., Any]
"""Takes a function or module, and keywords of `torch.compile`; returns it compiled, or as it is."""


class Subject(NamedTuple):
    """A callable and its inputs.

    Attributes:
        call: the compiled function or module, or a function that calls it.
        inputs: each makes the arguments of one call, anew for each call; random numbers are seeded before.
        module: the module whose gradients and buffers are compared, if any.
        tolerance: keywords of `torch.testing.assert_close`, if its defaults for the dtype do not fit.
    """

    call: Callable[..., Any]
    inputs: Sequence[Callable[[], tuple[Any, ...]]]
    module: nn.Module | None = None
    tolerance: dict[str, float] = {}  # noqa: RUF012 - a default that nobody changes


def until(condition: Callable[[], bool], timeout: float = 100.0) -> None:
    """Return once `condition` holds; fail where it has not after `timeout` seconds."""
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, "it has not come about"
        time.sleep(0.001)


Make = Callable[[Wrap], Subject]
"""Builds a subject; applies the given wrapper to the function or module under test."""


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port: int = listening.getsockname()[1]
        return port


LOADS_A_PACKAGE = """
import torch

with torch.no_grad():
    exported = torch.export.export(torch.nn.ReLU(), (torch.rand(3),))
    torch._inductor.aoti_load_package(torch._inductor.aoti_compile_and_package(exported))
"""


@functools.cache
def why_no_packages() -> str:
    """Why AOTInductor's packages cannot be tested here; "" where they can.

    On some machines PyTorch's runner crashes the process that loads one, also without frame-swap. All of those
    that were seen have a GPU; on others this does not look, since it takes half a minute.
    """
    if not torch.cuda.is_available():
        return ""
    ended = subprocess.run([sys.executable, "-c", LOADS_A_PACKAGE], capture_output=True).returncode
    return f"PyTorch's own aoti_load_package ends the process with signal {-ended} here" if ended < 0 else ""


@functools.cache
def why_no_kept_frames() -> str:
    """Why no frame is kept here; "" where frames are."""
    if not kept_frames.is_possible():
        return f"frames are kept from torch 2.13 on, and this is {torch.__version__}"
    if torch.cuda.is_available():
        return "Dynamo initialises CUDA where there is a GPU, and then no frame is kept"
    return ""


def as_is(target: Any, **_: Any) -> Any:
    """Return `target`: the wrapper of the eager twin."""
    return target


def with_frame_swap(target: Any, **keywords: Any) -> Any:
    """Compile `target` with frame-swap: the wrapper of the compiled twin."""
    return torch.compile(target, backend="frame_swap", **keywords)


class Twins:
    """One subject built twice from the same random numbers: an eager and a compiled twin."""

    def __init__(self, make: Make, device: str, wrap: Wrap = with_frame_swap) -> None:
        self.device = device
        self.eager, self.compiled = (self._seeded(make, wrapper) for wrapper in (as_is, wrap))
        self._calls = 0

    def check(self, stage: str) -> None:
        """Call both twins with each input; assert equal outputs, gradients and mutated tensors."""
        for at in range(len(self.eager.inputs)):
            self._calls += 1
            expected, actual = (self._observe(twin, at) for twin in (self.eager, self.compiled))
            assert_same(actual, expected, f"{stage} the swap, input {at}", self.eager.tolerance)

    def _observe(self, subject: Subject, at: int) -> dict[str, Any]:
        args = self._seeded(subject.inputs[at])
        torch.manual_seed(self._calls)
        return observe(subject.call, args, subject.module)

    def _seeded(self, make: Callable[..., Any], *args: Any) -> Any:
        torch.manual_seed(getattr(self, "_calls", 0))
        with torch.device(self.device):
            return make(*args)


def observe(call: Callable[..., Any], args: tuple[Any, ...], module: nn.Module | None = None) -> dict[str, Any]:
    """Call, run the backward of every output that has one, and return outputs, gradients, aliases and buffers."""
    outputs = call(*args)
    differentiable = [t for t in tensors_in(outputs) if t.grad_fn is not None]
    torch.autograd.backward(differentiable, [_uneven(t) for t in differentiable])
    return {
        "outputs": outputs,
        "inputs": args,
        "input gradients": [t.grad for t in tensors_in(args) if t.is_leaf],
        "aliases": _aliases(outputs, args),
        "parameters": dict(module.named_parameters()) if module else {},
        "gradients": {name: p.grad for name, p in module.named_parameters()} if module else {},
        "buffers": dict(module.named_buffers()) if module else {},
    }


def assert_same(actual: Any, expected: Any, where: str, tolerance: dict[str, float] | None = None) -> None:
    """Assert the same structure, and in it equal values, dtypes, strides and `requires_grad`."""
    expected_leaves, expected_structure = tree_flatten_with_path(expected)
    actual_leaves, structure = tree_flatten_with_path(actual)
    assert structure == expected_structure, f"{where}: {structure} is not {expected_structure}"
    for (path, want), (_, have) in zip(expected_leaves, actual_leaves, strict=True):
        name = f"{where}: {''.join(map(str, path))}"
        if isinstance(want, Tensor):
            assert isinstance(have, Tensor), f"{name} is a {type(have).__name__}, not a tensor"
            strided = want.layout is torch.strided
            torch.testing.assert_close(
                have, want, check_stride=strided, msg=lambda why: f"{name}: {why}", **(tolerance or {})
            )
            assert have.requires_grad == want.requires_grad, f"{name}: requires_grad={have.requires_grad}"
        else:
            assert (type(have), have) == (type(want), want), f"{name} is {have!r}, not {want!r}"


def tensors_in(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def codes_called(call: Callable[[], Any]) -> list[CodeType]:
    """Code objects of all Python functions that this thread runs during `call`, autograd's calls included."""
    codes = []  # rewritten code may have constants that cannot be hashed

    def profile(frame: FrameType, event: str, arg: Any) -> None:
        codes.append(frame.f_code)

    sys.setprofile(profile)
    try:
        call()
    finally:
        sys.setprofile(None)
    return codes


def called(call: Callable[[], Any]) -> set[str]:
    """Qualified names of all Python functions that run during `call`."""
    return {code.co_qualname for code in codes_called(call)}


def is_direct(call: Callable[[], Any]) -> bool:
    """Whether an opted-in function runs without `torch.compile`'s wrapper."""
    return not any(name.endswith(".compile_wrapper") for name in called(call))


def live(report: Report) -> list[Record]:
    """The live records of the regions in `report`: unlike its rows, they go on changing."""
    assert len(report.regions) == len(records())
    return records()


def wait_for_all() -> None:
    """Wait until compiled code is loaded for each graph; eager code still serves, since `when` is "manual"."""
    regions = live(frame_swap.wait())
    assert {r.state for r in regions} == {State.READY}, frame_swap.report()


def swap_all() -> list[Record]:
    """Install all compiled code; assert that nothing is left out, and return the regions."""
    regions = live(frame_swap.swap())
    for region in regions:
        assert (region.state, region.reason) == (State.INSTALLED, ""), frame_swap.report()
    return regions


def through_swap(*makes: Make, device: str, wrap: Wrap = with_frame_swap) -> list[Record]:
    """Compare eager and compiled twins while eager code serves, when compiled code is ready, and after the swap.

    Returns the regions, at least one; compiled code is installed for each.
    """
    frame_swap.configure(when="manual")
    twins = [Twins(make, device, wrap) for make in makes]
    for each in twins:
        each.check("before")
    wait_for_all()
    for each in twins:
        each.check("during")
    regions = swap_all()
    eager_calls = [r.eager_calls for r in regions]
    assert all(eager_calls), "some graph was not called on eager code"
    for each in twins:
        each.check("after")
        each.check("long after")
    assert records() == regions, "the swap made Dynamo compile again"
    assert [r.eager_calls for r in regions] == eager_calls, "eager code was called after the swap"
    return regions


def _uneven(output: Tensor) -> Tensor:
    """A gradient that differs from element to element, so that a permutation of elements is noticed."""
    if is_traceable_wrapper_subclass(output):
        return torch.ones_like(output)  # of the same class
    weights = torch.linspace(0.5, 1.5, output.numel(), device=output.device)
    return weights.to(output.dtype).reshape(output.shape)


def _aliases(outputs: Any, args: Any) -> list[tuple[int, int, int]]:
    """For each tensor: its index, the index of the first tensor with the same memory, and its storage offset."""
    plain = (t for t in tensors_in((outputs, args)) if not is_traceable_wrapper_subclass(t))
    tensors = [t for t in plain if t.layout is torch.strided]
    objects = [id(t) for t in tensors]
    memories = [t.untyped_storage().data_ptr() for t in tensors]
    return [
        (objects.index(id(t)), memories.index(memory), t.storage_offset())
        for t, memory in zip(tensors, memories, strict=True)
    ]


def packed(function: Callable[..., Any], *inputs: Any, **options: Any) -> parcel.Parcel:
    """The parcel of the graph of `function`, in a program that reads no structured traces; pytest does."""
    parcels: list[parcel.Parcel] = []

    def backend(gm: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        parcels.append(parcel.pack(gm, inputs, options))
        return gm.forward

    torch._dynamo.reset()
    with mock.patch.object(logs.trace_log, "handlers", []):
        torch.compile(function, backend=backend)(*inputs)
    return parcels[0]

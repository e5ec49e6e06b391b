"""Frames that are kept: the next trace of one is spared, if nothing that it depends on has changed."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from helpers import is_direct, live, why_no_kept_frames
from torch import Tensor, nn
from torch._dynamo.utils import counters

import frame_swap
from frame_swap import State
from frame_swap.internals import logs

pytestmark = [
    pytest.mark.fast,
    pytest.mark.skipif(bool(why_no_kept_frames()), reason=why_no_kept_frames()),
]


@pytest.fixture(autouse=True)
def store(tmp_path: Path) -> Path:
    frame_swap.configure(keep_frames=True, store=str(tmp_path / "store"))
    return tmp_path / "store"


THIS = sys.modules[__name__]
FACTOR = 2.0
OPTIONS = {"shift": 1.0}


def scaled(x: Tensor) -> Tensor:
    return x * FACTOR + OPTIONS["shift"]


class Layer(nn.Module):
    power = 2

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.drop = nn.Dropout(0.0)
        self.scale = 3

    def helper(self, x: Tensor) -> Tensor:
        return x.sin() ** self.power

    def forward(self, x: Tensor) -> Tensor:
        return self.helper(scaled(self.drop(self.linear(x)))) * self.scale


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(Layer(), Layer())

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.gelu(self.layers(x))


X = torch.linspace(-1, 1, 12).reshape(3, 4)


def made() -> Model:
    torch.manual_seed(0)
    return Model()


def traces() -> int:
    """How many graphs Dynamo has traced in this process."""
    return int(counters["stats"]["unique_graphs"])


def called(target: Any, *args: Any, **keywords: Any) -> tuple[Any, int]:
    """What a call of `target`, compiled afresh, returns, and how many graphs Dynamo has traced for it."""
    torch._dynamo.reset()
    before = traces()
    with nobody_reads_code():
        value = torch.compile(target, backend="frame_swap", **keywords)(*args)
    return value, traces() - before


def nobody_reads_code() -> contextlib.AbstractContextManager[Any]:
    """Take away pytest's handlers, which listen to all that PyTorch traces."""
    return mock.patch.object(logs.trace_log, "handlers", [])


def keep(target: Any, *args: Any) -> None:
    """Compile `target`, and wait for the artifact."""
    _, traced = called(target, *args)
    assert traced == 1
    frame_swap.wait()


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store that has the frame of a model, and its artifact. Take a copy."""
    folder = tmp_path_factory.mktemp("filled")
    frame_swap.configure(keep_frames=True, store=str(folder))
    keep(made(), X)
    return folder


@pytest.fixture
def kept(filled: Path, store: Path) -> None:
    """The test's store is such a copy."""
    shutil.copytree(filled, store, dirs_exist_ok=True)
    frame_swap.configure(keep_frames=True, store=str(store))


# What is spared


def test_a_kept_frame_is_not_traced_and_runs_compiled_code_at_once() -> None:
    keep(made(), X)
    model = made()
    value, traced = called(model, X)
    assert traced == 0
    region = live(frame_swap.report())[-1]
    assert (region.state, region.store, region.eager_calls) == (State.INSTALLED, "found", 0)
    torch.testing.assert_close(value, model(X))
    value.sum().backward()
    torch.testing.assert_close(model.layers[0].linear.weight.grad, gradient(made()))


def gradient(model: Model) -> Tensor | None:
    model(X).sum().backward()
    return model.layers[0].linear.weight.grad


def test_its_entry_is_one_like_any_other() -> None:
    keep(made(), X)
    torch._dynamo.reset()
    model = frame_swap.opt_in(made())
    before = traces()
    with nobody_reads_code():
        torch.testing.assert_close(model(X), made()(X))
    assert is_direct(lambda: model(X))
    model.layers[0].scale = 4  # its guards see that
    torch.testing.assert_close(model(X)[0, 0], called_by_itself(model)[0, 0])
    assert traces() == before + 1
    frame_swap.wait()
    model(X)
    torch._dynamo.reset()
    assert not is_direct(lambda: model(X))  # it was traced, or restored, once more


def called_by_itself(model: nn.Module) -> Tensor:
    twin = made()
    twin.layers[0].scale = 4
    return twin(X)


def test_code_that_raises_is_recovered_by_the_kept_graph() -> None:
    keep(made(), X)
    model = made()
    called(model, X)
    (trampoline,) = (r.server for r in frame_swap.region.records() if r.server is not None and not r.eager_calls)
    torch.testing.assert_close(trampoline.eager(*arguments(model))[0], model(X))


def arguments(model: Model) -> list[Tensor]:
    """The inputs of the graph, in the order in which Dynamo has found them."""
    first, second = model.layers
    return [first.linear.weight, first.linear.bias, X, second.linear.weight, second.linear.bias]


def test_another_shape_is_traced_and_kept_beside() -> None:
    keep(made(), X)
    model = made()
    with torch._dynamo.config.patch(automatic_dynamic_shapes=False):
        keep(model, X)  # other settings are another place
        _, traced = called(model, X[:2])
        assert traced == 1
        frame_swap.wait()
        assert called(made(), X)[1] == called(made(), X[:2])[1] == 0


# What is not: each change is seen


def constant() -> contextlib.AbstractContextManager[Any]:
    return mock.patch.object(THIS, "FACTOR", 5.0)


def entry_of_a_dictionary() -> contextlib.AbstractContextManager[Any]:
    return mock.patch.dict(OPTIONS, shift=2.0)


def function_of_the_module() -> contextlib.AbstractContextManager[Any]:
    return mock.patch.object(THIS, "scaled", lambda x: x * 7)


@contextlib.contextmanager
def code_of_a_function() -> Iterator[None]:
    code, scaled.__code__ = scaled.__code__, (lambda x: x * 7).__code__
    try:
        yield
    finally:
        scaled.__code__ = code


def method() -> contextlib.AbstractContextManager[Any]:
    return mock.patch.object(Layer, "helper", lambda self, x: x.cos())


def wrapper_around_a_method_of_torch() -> contextlib.AbstractContextManager[Any]:
    forward = nn.Linear.forward

    @functools.wraps(forward)
    def wrapper(self: nn.Linear, x: Tensor) -> Tensor:
        return forward(self, x) * 2

    return mock.patch.object(nn.Linear, "forward", wrapper)


def wrapper_around_another() -> contextlib.AbstractContextManager[Any]:
    forward = nn.Dropout.forward

    @functools.wraps(forward)
    def wrapper(self: nn.Dropout, x: Tensor) -> Tensor:
        return forward(self, x) + 1

    return mock.patch.object(nn.Dropout, "forward", wrapper)


def constant_of_a_class() -> contextlib.AbstractContextManager[Any]:
    return mock.patch.object(Layer, "power", 3)


def function_of_torch() -> contextlib.AbstractContextManager[Any]:
    return mock.patch.object(torch.nn.functional, "gelu", torch.nn.functional.relu)


def function_of_torch_by_another() -> contextlib.AbstractContextManager[Any]:
    return mock.patch.object(torch.nn.functional, "gelu", lambda x: x * 2)


def method_of_torch() -> contextlib.AbstractContextManager[Any]:
    return mock.patch.object(nn.Linear, "forward", lambda self, x: x + self.bias)


def no_grad() -> contextlib.AbstractContextManager[Any]:
    return torch.no_grad()


def autocast() -> contextlib.AbstractContextManager[Any]:
    return torch.autocast("cpu", torch.bfloat16)


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def default_device() -> contextlib.AbstractContextManager[Any]:
    return torch.device("cpu")


WORLD = [
    constant,
    entry_of_a_dictionary,
    function_of_the_module,
    code_of_a_function,
    method,
    constant_of_a_class,
    function_of_torch,
    function_of_torch_by_another,
    method_of_torch,
    wrapper_around_a_method_of_torch,
    wrapper_around_another,
    no_grad,
    autocast,
    deterministic,
    default_device,
]


@pytest.mark.parametrize("change", WORLD, ids=lambda change: change.__name__)
def test_a_change_of_the_world_is_seen(
    kept: None, change: Callable[[], contextlib.AbstractContextManager[Any]]
) -> None:
    with change():
        model = made()
        value, traced = called(model, X)
        assert traced == 1
        torch.testing.assert_close(value, model(X))
    assert called(made(), X)[1] == 0


def in_evaluation(model: Model) -> None:
    model.eval()


def an_attribute(model: Model) -> None:
    model.layers[0].scale = 4


def a_method_of_its_own(model: Model) -> None:
    model.layers[1].forward = types.MethodType(lambda self, x: x * 2, model.layers[1])


def another_layer(model: Model) -> None:
    model.layers[0].linear = nn.Identity()


def one_layer_more(model: Model) -> None:
    model.layers.append(nn.Linear(4, 4))


def a_hook(model: Model) -> None:
    model.layers[0].linear.register_forward_hook(lambda module, args, out: out * 2)


def a_parameter_without_gradient(model: Model) -> None:
    model.layers[0].linear.weight.requires_grad_(False)


def other_strides(model: Model) -> None:
    weight = model.layers[0].linear.weight
    weight.data = weight.data.t().contiguous().t()


def a_plain_tensor(model: Model) -> None:
    weight = model.layers[0].linear.weight.detach()
    del model.layers[0].linear.weight
    model.layers[0].linear.weight = weight


MODELS = [
    in_evaluation,
    an_attribute,
    a_method_of_its_own,
    another_layer,
    one_layer_more,
    a_hook,
    a_parameter_without_gradient,
    other_strides,
    a_plain_tensor,
]


@pytest.mark.parametrize("change", MODELS, ids=lambda change: change.__name__)
def test_a_change_of_the_model_is_seen(kept: None, change: Callable[[Model], None]) -> None:
    model = made()
    change(model)
    value, traced = called(model, X)
    assert traced == 1
    torch.testing.assert_close(value, model(X))
    assert called(made(), X)[1] == 0


def test_other_inputs_are_traced() -> None:
    keep(made(), X)
    assert called(made().double(), X.double())[1] == 1
    assert called(made(), X.clone().requires_grad_())[1] == 1
    assert called(made(), X.t().contiguous().t())[1] == 1
    assert called(made(), X)[1] == 0


def test_a_function_with_other_values_in_its_cells_is_traced() -> None:
    def scaling(by: float, function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda x: function(x) * by

    keep(scaling(2.0, torch.sin), X)
    for target, expected in (
        (scaling(2.0, torch.sin), 0),
        (scaling(3.0, torch.sin), 1),
        (scaling(2.0, torch.cos), 1),
    ):
        value, traced = called(target, X)
        assert traced == expected
        torch.testing.assert_close(value, target(X))


# What is not kept, and what is damaged


@torch.library.custom_op("kept_frames::doubled", mutates_args=())
def doubled(x: Tensor) -> Tensor:
    return x * 2


@doubled.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


READ = {"answer": 2.0}


@torch._dynamo.assume_constant_result
def assumed() -> float:
    return READ["answer"]


def breaks(x: Tensor) -> Tensor:
    y = x.sin()
    torch._dynamo.graph_break()
    return y.cos()


@pytest.mark.parametrize(
    ("target", "keywords"),
    [
        (lambda x: x * x.shape[0], {"dynamic": True}),
        (breaks, {}),
        (lambda x: x * assumed(), {}),
        (lambda x: doubled(x).sin(), {}),
        (scaled, {"fullgraph": True}),
    ],
    ids=["sizes that change", "a graph break", "an assumed constant", "a custom operator", "fullgraph"],
)
def test_what_is_not_kept_is_traced_each_time(target: Any, keywords: dict[str, Any]) -> None:
    for _ in range(2):
        value, traced = called(target, X, **keywords)
        assert traced >= 1
        torch.testing.assert_close(value, target(X))
        frame_swap.wait()


def test_nothing_is_kept_unasked(store: Path) -> None:
    frame_swap.configure(keep_frames=False)
    keep(made(), X)
    assert called(made(), X)[1] == 1
    frame_swap.configure(keep_frames=True)
    assert called(made(), X)[1] == 1  # and is kept now
    assert called(made(), X)[1] == 0


def test_without_the_artifact_it_is_traced(store: Path) -> None:
    keep(made(), X)
    for artifact in store.glob("*.artifact"):
        artifact.unlink()
    assert called(made(), X)[1] == 1


def test_what_is_damaged_is_traced(store: Path) -> None:
    keep(made(), X)
    notes = sorted(store.rglob("*.note"), key=lambda note: note.stat().st_size)
    for note in notes:
        whole = note.read_bytes()
        for damaged in (whole[: len(whole) // 2], whole[:-1] + bytes([whole[-1] ^ 1]), b"", b"frame"):
            note.write_bytes(damaged)
            value, traced = called(made(), X)
            assert traced == 1
            torch.testing.assert_close(value, made()(X))
            shutil.copyfile(note, store / "unused")  # the trace has written it anew
    assert called(made(), X)[1] == 0


# Another process


PROGRAM = """
import sys
import torch
from torch import nn
from torch._dynamo.utils import counters
import frame_swap
from layers import Layer

torch.manual_seed(0)
model = nn.Sequential(Layer(), Layer())
compiled = torch.compile(model, backend="frame_swap")
x = torch.linspace(-1, 1, 12).reshape(3, 4)
value = compiled(x)
print(counters["stats"]["unique_graphs"], torch.allclose(value, model(x)))
frame_swap.wait()
"""

LAYERS = """
from torch import nn

def function(x):
    return x.sin()

class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return function(self.linear(x))
"""


@pytest.mark.thorough
def test_another_process_traces_what_has_changed_on_disk(tmp_path: Path, store: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    printed = []
    for layers in (LAYERS, LAYERS, LAYERS.replace("sin", "cos")):
        (tmp_path / "layers.py").write_text(layers)
        variables = {"FRAME_SWAP_STORE": str(store), "FRAME_SWAP_KEEP_FRAMES": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        path = os.pathsep.join([str(Path(__file__).parents[2]), str(tmp_path)])
        done = subprocess.run(
            [sys.executable, str(tmp_path / "program.py")],
            env=os.environ | variables | {"PYTHONPATH": path},
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == 0, done.stderr
        printed.append(done.stdout.strip())
    assert printed == ["1 True", "0 True", "1 True"]

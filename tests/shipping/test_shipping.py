"""Which graphs are shipped to a worker; the others are compiled by stock Inductor in the foreground."""

from __future__ import annotations

import functools
import importlib
import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from helpers import Make, Subject, Twins, Wrap, live, through_swap, with_frame_swap
from torch import Tensor, nn
from torch._library.custom_ops import CustomOpDef
from torch.autograd.graph import saved_tensors_hooks
from torch.library import Library, custom_op
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.checkpoint import checkpoint

import frame_swap
from frame_swap import Region, State
from frame_swap.errors import Unshippable
from frame_swap.internals import dispatcher, inductor
from frame_swap.region import record
from frame_swap.shipping import operators, triton_kernels
from frame_swap.shipping.operators import by_import
from frame_swap.shipping.process_state import ProcessState

pytestmark = pytest.mark.fast

SHIPPED: list[Make] = []


def shipped(make: Make) -> Make:
    SHIPPED.append(make)
    return make


@pytest.mark.parametrize("make", SHIPPED, ids=lambda make: make.__name__)
def test_is_shipped(make: Make, device: str) -> None:
    through_swap(make, device=device)


def rand() -> tuple[Tensor]:
    return (torch.rand(6, 4),)


def rand_with_grad() -> tuple[Tensor]:
    return (torch.rand(6, 4, requires_grad=True),)


@shipped
def slices_with_symbolic_ends(compiled: Wrap) -> Subject:
    """At the top, and in a graph inside the graph."""

    def inner(x: Tensor, y: Tensor) -> Tensor:
        return x.sin()[:, : y.shape[0]] @ y[-x.shape[0] :: 2].cos()[: y.shape[0]].T

    def function(x: Tensor, y: Tensor) -> Tensor:
        half = x.shape[0] // 2
        return torch.cat([x[half:], x[:half]]) * 2 + checkpoint(inner, x, y, use_reentrant=False).sum()

    inputs = [lambda n=n: (torch.rand(n, 7, requires_grad=True), torch.rand(5, 5)) for n in (6, 4)]
    return Subject(compiled(function, dynamic=True), inputs)


# Custom operators: kernels that no compiler looks into, here ordinary PyTorch


@custom_op("shipping::scale", mutates_args=())
def scale(x: Tensor, by: float) -> Tensor:
    return x * by


@scale.register_fake
def _(x: Tensor, by: float) -> Tensor:
    return torch.empty_like(x)


@custom_op("shipping::square", mutates_args=())
def square(x: Tensor) -> Tensor:
    return x * x


@square.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def _save_input(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(inputs[0])


def _square_backward(ctx: Any, grad: Tensor) -> Tensor:
    return torch.ops.shipping.scale(ctx.saved_tensors[0], 2.0) * grad


square.register_autograd(_square_backward, setup_context=_save_input)


@shipped
def custom_operator_whose_gradient_calls_another(compiled: Wrap) -> Subject:
    return Subject(compiled(lambda x: square(x.sin()) + 1), [rand_with_grad])


@custom_op("shipping::power", mutates_args=())
def power(x: Tensor, exponent: int) -> Tensor:
    return x**exponent


@power.register_fake
def _(x: Tensor, exponent: int) -> Tensor:
    return torch.empty_like(x)


def _power_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return grad * ctx.exponent * power(ctx.saved_tensors[0], ctx.exponent - 1), None


def _power_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, ctx.exponent = inputs
    ctx.save_for_backward(x)


power.register_autograd(_power_backward, setup_context=_power_context)


@shipped
def custom_operator_in_its_own_gradient(compiled: Wrap) -> Subject:
    return Subject(compiled(lambda x: power(x.sin(), 3) + 1), [rand_with_grad])


@custom_op("shipping::add_into", mutates_args={"out"})
def add_into(out: Tensor, x: Tensor) -> None:
    out += x


@shipped
def custom_operator_that_writes_to_an_argument(compiled: Wrap) -> Subject:
    def function(x: Tensor) -> Tensor:
        y = x.sin()
        add_into(y, x)
        add_into(x, y)
        return y * 2

    return Subject(compiled(function), [rand])


@custom_op("shipping::halves", mutates_args=())
def halves(x: Tensor) -> list[Tensor]:
    return [part.clone() for part in x.chunk(2)]


@halves.register_fake
def _(x: Tensor) -> list[Tensor]:
    return [torch.empty_like(part) for part in x.chunk(2)]


halves.register_autograd(lambda ctx, grads: torch.cat(grads))


@shipped
def custom_operator_that_returns_a_list(compiled: Wrap) -> Subject:
    def function(x: Tensor) -> Tensor:
        upper, lower = halves(x.cos())
        return upper + lower

    return Subject(compiled(function), [rand_with_grad])


@custom_op("shipping::extremes", mutates_args=())
def extremes(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.amin(0), x.amax(0)


@extremes.register_fake
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[1]), x.new_empty(x.shape[1])


@shipped
def custom_operator_that_returns_a_tuple(compiled: Wrap) -> Subject:
    return Subject(compiled(lambda x: extremes(x * 2)), [rand])


@custom_op("shipping::positive", mutates_args=())
def positive(x: Tensor) -> Tensor:
    return x[x > 0].clone()


@positive.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty(torch.library.get_ctx().new_dynamic_size())


@shipped
def custom_operator_whose_size_depends_on_data(compiled: Wrap) -> Subject:
    function = compiled(lambda x: positive(x.sin()) * 2)
    call = torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True)(function)
    return Subject(call, [lambda: (torch.randn(20),)])


@functools.cache  # to define it again would leave an earlier one without its dispatcher entry
def local_operator() -> CustomOpDef:
    factor = 3.0

    @custom_op("shipping::local", mutates_args=())
    def local(x: Tensor) -> Tensor:
        return x * factor

    local.register_fake(torch.empty_like)
    local.register_autograd(lambda ctx, grad: grad * factor)
    return local


@shipped
def custom_operator_that_a_function_defines(compiled: Wrap) -> Subject:
    local = local_operator()
    return Subject(compiled(lambda x: local(x.sin()) + 1), [rand_with_grad])


@custom_op("shipping::cast", mutates_args=())
def cast(x: Tensor) -> Tensor:
    return x * 2


cast.register_fake(torch.empty_like)
cast.register_autocast("cpu", torch.bfloat16)


@shipped
def custom_operator_under_autocast(compiled: Wrap) -> Subject:
    def function(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return cast(x.sin())

    return Subject(compiled(function), [rand], tolerance={"rtol": 2e-2, "atol": 2e-2})


@cast.register_vmap
def _(info: Any, in_dims: tuple[int | None, ...], x: Tensor) -> tuple[Tensor, int | None]:
    return cast(x), in_dims[0]


@shipped
def custom_operator_under_vmap(compiled: Wrap) -> Subject:
    return Subject(compiled(lambda x: torch.vmap(cast)(x).sum()), [rand])


@custom_op("shipping::note", mutates_args=())
def note(x: Tensor) -> None:
    pass


note.register_fake(lambda x: None)
note.register_effect(torch._library.effects.EffectType.ORDERED)


@shipped
def custom_operator_with_an_effect(compiled: Wrap) -> Subject:
    def function(x: Tensor) -> Tensor:
        note(x)
        y = x.sin()
        note(y)
        return y

    return Subject(compiled(function), [rand])


@custom_op("shipping::ramp", mutates_args=(), device_types=("cpu", "cuda"))
def ramp(n: int, device: torch.device) -> Tensor:
    return torch.arange(n, device=device)


ramp.register_fake(lambda n, device: torch.empty(n, dtype=torch.int64, device=device))


@shipped
def custom_operator_that_makes_a_tensor(compiled: Wrap) -> Subject:
    return Subject(compiled(lambda x: x * ramp(4, x.device)), [rand])


@torch.library.triton_op("shipping::decomposed", mutates_args=())
def decomposed(x: Tensor) -> Tensor:
    return x.sin() * 2


@shipped
def triton_op_that_a_compiler_looks_into(compiled: Wrap) -> Subject:
    return Subject(compiled(lambda x: decomposed(x) + 1), [rand])


_library = Library("shipping_library", "DEF")
_library.define("plus(Tensor x, Tensor y) -> Tensor")
_library.impl("plus", lambda x, y: x + y, "CompositeExplicitAutograd")
torch.library.register_fake("shipping_library::plus", lambda x, y: torch.empty_like(x), lib=_library)
torch.library.define("shipping_library::minus", "(Tensor x, Tensor y) -> Tensor")
torch.library.impl("shipping_library::minus", ["cpu", "cuda"], lambda x, y: x - y)
torch.library.register_fake("shipping_library::minus", lambda x, y: torch.empty_like(x))


@shipped
def operators_of_torch_library(compiled: Wrap) -> Subject:
    library = torch.ops.shipping_library
    return Subject(compiled(lambda x: library.minus(library.plus(x, x.sin()), x.cos())), [rand])


# Higher-order operators


@shipped
def checkpointed(compiled: Wrap) -> Subject:
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    return Subject(compiled(lambda x: checkpoint(model, x, use_reentrant=False)), [rand_with_grad], model)


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x * x * grad


@shipped
def autograd_function(compiled: Wrap) -> Subject:
    return Subject(compiled(lambda x: Cube.apply(x).sin()), [rand_with_grad])


@shipped
def cond(compiled: Wrap) -> Subject:
    def function(x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, lambda x: x.sin(), lambda x: x.cos(), (x,))

    return Subject(compiled(function), [rand_with_grad, lambda: (-torch.rand(6, 4).requires_grad_(),)])


@shipped
def nested_compile_regions(compiled: Wrap) -> Subject:
    @torch.compiler.nested_compile_region
    def layer(x: Tensor) -> Tensor:
        return x.sin() + 1

    return Subject(compiled(lambda x: layer(layer(x))), [rand_with_grad])


@pytest.mark.parametrize("make", [cond, nested_compile_regions], ids=lambda make: make.__name__)
def test_loading_traces_nothing(make: Make, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tracing and unpickling a graph patch `nn.Module.__call__` for all threads."""
    frame_swap.configure(when="manual")
    traced: list[Any] = []
    monkeypatch.setattr(torch.fx.graph_module, "_deserialize_graph_module", lambda *args: traced.append(args))
    subject = make(with_frame_swap)
    subject.call(*(x.to(device) for x in subject.inputs[0]()))
    (region,) = live(frame_swap.wait())
    assert not traced
    assert region.state is State.READY


@shipped
def while_loop(compiled: Wrap) -> Subject:
    from torch._higher_order_ops import while_loop

    def function(x: Tensor) -> Any:
        return while_loop(lambda n, x: n < 3, lambda n, x: (n + 1, x.sin()), (torch.zeros((), dtype=torch.int), x))

    return Subject(compiled(function), [rand])


@shipped
def scan(compiled: Wrap) -> Subject:
    from torch._higher_order_ops import scan

    def function(x: Tensor) -> Any:
        return scan(lambda total, row: (total + row, total * row), torch.zeros_like(x[0]), x)

    return Subject(compiled(function), [rand])


@shipped
def flex_attention(compiled: Wrap) -> Subject:
    from torch.nn.attention.flex_attention import flex_attention

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flex_attention(q, k, v, score_mod=lambda score, b, h, i, j: score + 0.1 * (i - j))

    return Subject(torch.no_grad()(compiled(function)), [lambda: tuple(torch.rand(3, 1, 2, 128, 16))])


# Inputs


@shipped
def complex_inputs(compiled: Wrap) -> Subject:
    return Subject(compiled(lambda x: (x * x.conj()).real.sum(0)), [lambda: (torch.rand(6, 4) + 1j,)])


@shipped
def views_as_inputs(compiled: Wrap) -> Subject:
    def inputs() -> tuple[Tensor, ...]:
        base = torch.rand(8, 8, requires_grad=True).clone()
        return base[1:5].t(), base[:, ::2], base.unbind()[0]

    return Subject(compiled(lambda x, y, z: (x.sin() @ y[:4], z + 1)), [inputs])


@shipped
def subclass_of_tensors(compiled: Wrap) -> Subject:
    return Subject(compiled(lambda x: x.sin() * 2), [lambda: (TwoTensor(torch.rand(3, 4), torch.rand(3, 4)),)])


@shipped
def subclass_of_tensors_with_a_gradient(compiled: Wrap) -> Subject:
    def inputs() -> tuple[Tensor, ...]:
        return (TwoTensor(torch.rand(3, 4), torch.rand(3, 4)).requires_grad_(), *rand_with_grad())

    return Subject(compiled(lambda x, y: x.sin() @ y.t()), [inputs])


class Weight(nn.Parameter):
    """A module that is a single parameter."""


@shipped
def subclass_of_parameter_and_buffer(compiled: Wrap) -> Subject:
    model = nn.Linear(4, 4)
    model.weight = Weight(model.weight.detach())
    model.shift = nn.Buffer(torch.ones(4))
    return Subject(compiled(lambda x: model(x) + model.shift), [rand_with_grad], model)


@shipped
def constants_made_in_the_graph(compiled: Wrap) -> Subject:
    return Subject(compiled(lambda x: x * torch.tensor([1.0, 2.0, 3.0, 4.0], device=x.device)), [rand_with_grad])


@shipped
def numpy_functions(compiled: Wrap) -> Subject:
    function = compiled(lambda x: numpy.sin(x) + numpy.arange(4, dtype="float32"))
    return Subject(lambda: torch.as_tensor(function(numpy.ones((6, 4), "float32"))), [lambda: ()])


# Random numbers


@shipped
def random_numbers_of_eager(compiled: Wrap) -> Subject:
    def function(x: Tensor) -> Tensor:
        return nn.functional.dropout(x) + torch.rand_like(x) * torch.randn(4, device=x.device)

    return Subject(compiled(function, options={"fallback_random": True}), [rand_with_grad])


# Programs and modules


PROGRAM = """
import torch
import frame_swap

FACTOR = 3.0

def gradient_factor():
    return FACTOR

@torch.library.custom_op("here::triple", mutates_args=())
def triple(x: torch.Tensor) -> torch.Tensor:
    return x * FACTOR

@triple.register_fake
def _(x):
    return torch.empty_like(x)

triple.register_autograd(lambda ctx, grad: grad * gradient_factor())

torch.library.define("here::twice", "(Tensor x) -> Tensor")
torch.library.impl("here::twice", "default", lambda x: x * 2)
torch.library.register_fake("here::twice", lambda x: torch.empty_like(x))

print("main runs")
frame_swap.configure(when="wait")
x = torch.rand(5, requires_grad=True)
y = torch.compile(lambda x: triple(torch.ops.here.twice(x.detach()) + x.sin()), backend="frame_swap")(x)
torch.testing.assert_close(y, (x.detach() * 2 + x.sin()) * 3)
y.sum().backward()
torch.testing.assert_close(x.grad, x.detach().cos() * 3)
(region,) = frame_swap.report().regions
assert (region.state, region.eager_calls) == ("installed", 0), region.reason
"""


def test_a_worker_tunes_kernels_unless_told_not_to() -> None:
    def tunes() -> bool:
        return ProcessState.capture({"cuda"}).configs["inductor"]["triton.autotune_at_compile_time"]

    assert tunes()
    with inductor.inductor_config.patch({"triton.autotune_at_compile_time": False}):  # as by the user
        assert not tunes()
    assert tunes()  # back at its default, it still counts as changed


PRECISIONS = """
import pickle
import torch
import frame_swap
from frame_swap.shipping.process_state import ProcessState

def read():
    b = torch.backends
    return [owner.fp32_precision for owner in (b.cuda.matmul, b.cudnn.conv, b.cudnn.rnn, b.mkldnn.matmul)]

old = ProcessState.capture(set())
torch.backends.cuda.matmul.fp32_precision = "tf32"
torch.backends.cudnn.conv.fp32_precision = "ieee"
torch.backends.mkldnn.matmul.fp32_precision = "bf16"
new, wished = ProcessState.capture(set()), read()
y = torch.compile(lambda x: x @ x, backend="frame_swap")(torch.eye(3))
frame_swap.wait()
(region,) = frame_swap.report().regions
print(region.state, region.reason)
print(torch.equal(y, torch.eye(3)), wished)
with old.applied_to_process():
    print(read(), torch.get_float32_matmul_precision())
with new.applied_to_process():
    print(read() == wished)
"""


def test_precisions_set_by_either_name(run_program: Any) -> None:
    """PyTorch does not answer the older question where the newer settings say what it has no word for."""
    assert run_program(PRECISIONS).stdout.splitlines() == [
        "installed ",
        "True ['tf32', 'ieee', 'tf32', 'bf16']",
        "['none', 'tf32', 'tf32', 'none'] highest",
        "True",
    ]


def test_operators_of_main(run_program: Any) -> None:
    assert run_program(PROGRAM).stdout == "main runs\n"


def test_operators_of_a_script(tmp_path: Path) -> None:
    script = tmp_path / "program.py"
    script.write_text(PROGRAM)
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=240, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "main runs\n"), done.stderr


MODULE = """
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.library import Library

LIBRARY = Library("{name}", "DEF")
LIBRARY.define("double(Tensor x) -> Tensor")
LIBRARY.impl("double", lambda x: x * 2, "CompositeExplicitAutograd")
torch.library.register_fake("{name}::double", lambda x: torch.empty_like(x), lib=LIBRARY)
torch.library.register_autograd("{name}::double", lambda ctx, grad: grad * 2, lib=LIBRARY)
LIBRARY.define("composite(Tensor x) -> Tensor")
LIBRARY.impl("composite", lambda x: x.sin() + 1)
"""


def test_a_module_that_registers_with_the_dispatcher_is_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    (tmp_path / "shipping_module.py").write_text(MODULE.format(name="shipping_module"))
    monkeypatch.syspath_prepend(tmp_path)  # the workers run already, and have to learn of it
    importlib.import_module("shipping_module")
    module = torch.ops.shipping_module
    through_swap(
        lambda compiled: Subject(compiled(lambda x: module.composite(module.double(x))), [rand_with_grad]),
        device=device,
    )


def test_a_module_that_has_changed_since_it_was_imported_is_not_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "shipping_changed.py"
    file.write_text(MODULE.format(name="shipping_changed"))
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module("shipping_changed")
    file.write_text("\n" + MODULE.format(name="shipping_changed"))
    frame_swap.configure(when="manual")
    torch.compile(lambda x: torch.ops.shipping_changed.double(x), backend="frame_swap")(torch.rand(3))
    (one,) = live(frame_swap.wait())
    assert one.state is State.FAILED
    assert "shipping_changed does not define it as it is in the program" in one.reason


def test_a_module_that_locks_pytorchs_flags_does_no_harm(tmp_path: Path, run_program: Any) -> None:
    module = MODULE.format(name="shipping_locks") + "torch.backends.disable_global_flags()\n"
    (tmp_path / "shipping_locks.py").write_text(module)
    program = """
        import torch, frame_swap, shipping_locks
        frame_swap.configure(when="wait", workers=1)
        for function in (lambda x: torch.ops.shipping_locks.double(x), lambda x: x.sin() + 1):
            torch.compile(function, backend="frame_swap")(torch.rand(3))
        print(*(one.state for one in frame_swap.report().regions))
    """
    path = os.pathsep.join((str(tmp_path), *filter(None, (os.environ.get("PYTHONPATH"),))))
    assert run_program(program, PYTHONPATH=path).stdout == "installed installed\n"


def test_a_redefinition_reaches_the_worker(device: str) -> None:
    def subject(factor: float) -> Make:
        @custom_op("shipping::redefined", mutates_args=())
        def redefined(x: Tensor) -> Tensor:
            return x * factor

        redefined.register_fake(torch.empty_like)
        redefined.register_autograd(lambda ctx, grad: grad * factor)
        return lambda compiled: Subject(compiled(lambda x: redefined(x).sin()), [rand_with_grad])

    through_swap(subject(2.0), device=device)
    torch._dynamo.reset()
    record.forget_all()
    through_swap(subject(5.0), device=device)


def test_every_kind_of_definition_can_be_sent_by_value(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_program: Any
) -> None:
    monkeypatch.setattr(by_import, "modules", lambda operator: ())
    kinds = (square, power, add_into, halves, extremes, positive, cast, note, ramp, decomposed)
    library = torch.ops.shipping_library
    sent = operators.definitions(
        [*(kind._opoverload for kind in kinds), library.plus.default, library.minus.default]
    )
    (tmp_path / "sent").write_bytes(pickle.dumps(sent))
    program = f"""
        import pickle, sys, torch
        with open({str(tmp_path / "sent")!r}, "rb") as file:
            definitions = pickle.load(file)
        definitions.define()
        definitions.define()
        assert "test_shipping" not in sys.modules
        print([part.shape[0] for part in torch.ops.shipping.halves(torch.empty(6, device="meta"))])
    """
    assert run_program(program).stdout == "[3, 3]\n"


SETTING = 2.0


@custom_op("shipping::as_set", mutates_args=())
def as_set(x: Tensor) -> Tensor:
    return x * SETTING


as_set.register_fake(torch.empty_like)
as_set.register_autograd(lambda ctx, grad: grad * SETTING)


def test_what_a_definition_reads_is_what_it_is_at_capture(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "SETTING", 7.0)
    through_swap(lambda compiled: Subject(compiled(lambda x: as_set(x).sin()), [rand_with_grad]), device=device)


def test_a_module_whose_settings_a_worker_does_not_share_is_not_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "shipping_setting.py").write_text("FACTOR = 2.0")
    monkeypatch.syspath_prepend(tmp_path)
    setting = importlib.import_module("shipping_setting")

    @custom_op("shipping::as_configured", mutates_args=())
    def as_configured(x: Tensor) -> Tensor:
        return x * setting.FACTOR

    as_configured.register_fake(torch.empty_like)
    as_configured.register_autograd(lambda ctx, grad: grad * setting.FACTOR)
    setting.FACTOR = 9.0  # type: ignore[attr-defined]
    frame_swap.configure(when="manual")
    torch.compile(lambda x: as_configured(x), backend="frame_swap")(torch.rand(3, requires_grad=True))
    (one,) = live(frame_swap.wait())
    assert one.state is State.FAILED
    assert "its functions read what is different in a worker" in one.reason


# What stays


def foreground(make: Make, device: str) -> Region:
    """Compare the twins; return the one region, compiled once in the foreground."""
    twins = Twins(make, device)
    for stage in ("at", "after"):
        twins.check(stage)
    (one,) = live(frame_swap.report())
    assert one.state is State.FOREGROUND
    assert one.compile_s is not None
    assert one.eager_calls == 0
    return one


def test_an_operator_whose_gradient_is_the_dispatchers_stays(device: str) -> None:
    library = Library("shipping_dispatcher", "DEF")
    library.define("double(Tensor x) -> Tensor")
    library.impl("double", lambda x: x * 2, "CompositeExplicitAutograd")
    torch.library.register_fake("shipping_dispatcher::double", lambda x: torch.empty_like(x), lib=library)
    torch.library.register_autograd("shipping_dispatcher::double", lambda ctx, grad: grad * 2, lib=library)

    def make(compiled: Wrap) -> Subject:
        return Subject(compiled(lambda x: torch.ops.shipping_dispatcher.double(x.sin())), [rand_with_grad])

    stayed = foreground(make, device)
    assert "shipping_dispatcher::double: its registration for Autograd cannot be read back" in stayed.reason


def test_an_operator_that_holds_a_tensor_stays(device: str) -> None:
    held = torch.ones(4)

    @custom_op("shipping::holds", mutates_args=())
    def holds(x: Tensor) -> Tensor:
        return x * 2

    holds.register_fake(lambda x: x.new_empty(x.shape[0], held.shape[0]))
    stayed = foreground(lambda compiled: Subject(compiled(lambda x: holds(x.sin())), [rand]), device)
    assert "shipping::holds: its definition holds a tensor" in stayed.reason


def test_an_operator_that_holds_a_lock_stays(device: str) -> None:
    lock = threading.Lock()

    @custom_op("shipping::locks", mutates_args=())
    def locks(x: Tensor) -> Tensor:
        return x * 2

    @locks.register_fake
    def _(x: Tensor) -> Tensor:
        with lock:
            return torch.empty_like(x)

    stayed = foreground(lambda compiled: Subject(compiled(lambda x: locks(x.sin())), [rand]), device)
    assert "shipping::locks: its definition cannot be pickled" in stayed.reason


def test_a_subclass_that_cannot_be_imported_stays(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TwoTensor, "__module__", "__main__")
    inputs = [lambda: (TwoTensor(torch.rand(3), torch.rand(3)),)]
    stayed = foreground(lambda compiled: Subject(compiled(lambda x: x.sin() * 2), inputs), device)
    assert stayed.reason == "an input is a tensor subclass that a worker cannot import: __main__.TwoTensor"


def test_nested_tensors_stay(device: str) -> None:
    def call(compiled: Wrap) -> Subject:
        function = compiled(lambda x: x.sin() * 2)
        nested = torch.nested.nested_tensor([torch.rand(2, 3), torch.rand(4, 3)], layout=torch.jagged)
        return Subject(lambda: function(nested).values(), [lambda: ()])

    assert foreground(call, device).reason == "an input has layout torch.jagged"


def test_a_sparse_input_is_left_to_eager_or_stays(device: str) -> None:
    """Depending on the version, Dynamo leaves the frame to eager or captures a graph that cannot be shipped."""

    def make(compiled: Wrap) -> Subject:
        return Subject(compiled(lambda x, y: (x @ y).sin()), [lambda: (torch.eye(6).to_sparse(), *rand())])

    Twins(make, device).check("without")
    assert {r.state for r in frame_swap.report().regions} <= {State.FOREGROUND}, frame_swap.report()


def test_hooks_on_saved_tensors_that_are_graphs_stay() -> None:
    """They become a part of the graph, with stock, too, and then do not do quite the same as in eager."""
    pack = torch.fx.symbolic_trace(lambda x: (x * 16).to(torch.int8))
    unpack = torch.fx.symbolic_trace(lambda x: x.to(torch.float32) / 16)
    x, gradients = torch.rand(6, 4), []
    for backend in ("inductor", "frame_swap"):
        torch._dynamo.reset()
        leaf = x.clone().requires_grad_()
        with saved_tensors_hooks(pack, unpack):
            torch.compile(lambda x: x.sin() * x.exp(), backend=backend)(leaf).sum().backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients, rtol=0, atol=0)
    (region,) = live(frame_swap.report())
    assert region.state is State.FOREGROUND
    assert "hooks on saved tensors that are graphs" in region.reason


def test_collectives_stay() -> None:
    """The process group exists only in this process."""
    import torch.distributed as dist
    from torch.distributed._functional_collectives import all_reduce
    from torch.testing._internal.distributed.fake_pg import FakeStore

    # A real one would leave a socket that listens behind, and another test sees what does.
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    try:
        stayed = foreground(
            lambda compiled: Subject(compiled(lambda x: all_reduce(x.sin(), "sum", dist.group.WORLD) * 2), [rand]),
            "cpu",
        )
    finally:
        dist.destroy_process_group()
    assert stayed.reason == "the graph calls _c10d_functional.all_reduce, and a worker is in no process group"


def test_options_that_do_not_pickle_stay(device: str) -> None:
    def make(compiled: Wrap) -> Subject:
        return Subject(
            compiled(lambda x: x.sin(), options={"post_grad_custom_pre_pass": lambda graph: None}), [rand]
        )

    assert "config post_grad_custom_pre_pass cannot be pickled" in foreground(make, device).reason


@torch.compiler.allow_in_graph
def opaque_to_dynamo(x: Tensor) -> Tensor:
    return x.sin() + 1


def test_a_function_of_the_programs_in_the_graph_stays(device: str) -> None:
    make: Make = lambda compiled: Subject(compiled(lambda x: opaque_to_dynamo(x) * 2), [rand_with_grad])  # noqa: E731
    assert "opaque_to_dynamo" in foreground(make, device).reason


# The program's own Triton kernels, with stand-ins; the real thing is in test_gpu.py


class Kernel:
    """Like the result of `triton.jit`: it holds the function as `fn` and cannot be pickled."""

    def __init__(self, fn: Any) -> None:
        self.fn = fn
        self.lock = threading.RLock()


@Kernel
def kernel() -> None:
    """This name refers to the decorator's result."""


def launching(what: object, **constants: Any) -> torch.fx.GraphModule:
    table = dispatcher.kernel_side_table
    graph = torch.fx.Graph()
    indices = {"kernel_idx": table.add_kernel(what), "constant_args_idx": table.add_constant_args(constants)}
    graph.call_function(dispatcher.triton_kernel_wrapper_mutation, kwargs={**indices, "grid": [(1, 1, 1)]})
    graph.output(())
    return torch.fx.GraphModule({}, graph)


def test_a_triton_kernel_is_imported_and_gets_an_index_of_the_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    gm = launching(kernel, BLOCK=64)
    sent = pickle.dumps(triton_kernels.detach(gm))
    table = type(dispatcher.kernel_side_table)()  # a worker's, in which other kernels came first
    monkeypatch.setattr(dispatcher, "kernel_side_table", table)
    table.reset_table()
    table.add_kernel(object())
    table.add_constant_args({})
    pickle.loads(sent).register(gm)
    (node, index, constants), *_ = triton_kernels._launches(gm)
    assert node.kwargs["grid"] == [(1, 1, 1)]
    assert (index, table.get_kernel(index)) == (1, kernel)
    assert (constants, table.get_constant_args(constants)) == (1, {"BLOCK": 64})


def test_a_graph_with_triton_kernels_has_the_same_numbers_whatever_the_process_has_launched() -> None:
    sent = []
    for _ in range(2):
        gm = launching(kernel, BLOCK=64)
        sent.append((triton_kernels.detach(gm), [dict(node.kwargs) for node in gm.graph.nodes]))
        launching(object(), BLOCK=32)
    assert sent[0] == sent[1]


def test_a_triton_kernel_that_is_not_under_its_name_stays() -> None:
    with pytest.raises(Unshippable, match="is not what its module test_shipping has under that name"):
        triton_kernels.detach(launching(Kernel(kernel.fn)))


def test_a_triton_kernel_of_main_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel.fn, "__module__", "__main__")
    with pytest.raises(Unshippable, match="in __main__, which a worker cannot import: move it to a module"):
        triton_kernels.detach(launching(kernel))


def test_a_constant_of_a_triton_kernel_that_does_not_pickle_stays() -> None:
    with pytest.raises(Unshippable, match="an argument of Triton kernel kernel"):
        triton_kernels.detach(launching(kernel, LOCK=threading.Lock()))

"""`opt_in` calls rewritten code without `torch.compile`'s wrapper, if that does not change the result."""

from __future__ import annotations

import contextlib
import copy
import gc
import threading
import weakref
from collections.abc import Callable
from types import CellType, FunctionType
from typing import Any

import pytest
import torch
from helpers import assert_same, called, is_direct, live, observe
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.functional import adaptive_avg_pool2d
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

import frame_swap
from frame_swap import State
from frame_swap.frames import dispatch
from frame_swap.internals import dynamo, eval_frame

pytestmark = pytest.mark.fast


@pytest.fixture(autouse=True)
def by_hand() -> None:
    frame_swap.configure(when="manual")


def swap() -> None:
    frame_swap.wait()
    assert {region.state for region in frame_swap.swap().regions} == {State.INSTALLED}, frame_swap.report()


def f(x: Tensor) -> Tensor:
    return x.sin() + 1


def swapped(function: Any, *args: Any, **options: Any) -> Any:
    """Opt `function` in, call it with each of `args`, and swap."""
    opted = frame_swap.opt_in(**options)(function)
    for arg in args or (torch.ones(3),):
        opted(arg)
    swap()
    return opted


def table_of(function: Any) -> Any:
    """The dispatcher's table for `function`."""
    gc.collect()
    (table,) = (table for table in dispatch._tables if table.function is function)
    return table


# Arguments


def every_kind(x: Tensor, /, y: Tensor, *rest: Tensor, z: float = 2.0, **others: Tensor) -> Tensor:
    return x * z - y + sum(rest) + sum(others.values())


def defaults(x: Tensor, y: Tensor | None = None, *, z: int = 3) -> Tensor:
    return x * z if y is None else x * y * z


def test_arguments_are_bound_as_the_function_binds_them() -> None:
    a, b = torch.rand(3), torch.rand(3)
    k = 5

    def enclosed(x: Tensor, n: int = 2) -> tuple[Tensor, Callable[[], int]]:
        return x * k * n, lambda: n

    for function, calls in {
        every_kind: [((a, b), {}), ((a, b, a, b), {"z": 3.0, "w": a}), ((a,), {"y": b})],
        defaults: [((a,), {}), ((a, b), {"z": 4}), ((), {"y": b, "x": a})],
        enclosed: [((a,), {}), ((a, 4), {})],
    }.items():
        opted = frame_swap.opt_in(function)
        for args, kwargs in calls:
            opted(*args, **kwargs)
        swap()
        for args, kwargs in calls:
            expected, actual = function(*args, **kwargs), opted(*args, **kwargs)
            if function is enclosed:
                assert actual[1]() == expected[1]()
                expected, actual = expected[0], actual[0]
            assert_same(actual, expected, f"{function.__name__}{args}{kwargs}")
            assert is_direct(lambda: opted(*args, **kwargs))
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'y'"):
        frame_swap.opt_in(every_kind)(a)


def test_gradients_and_mutations_are_the_function_s() -> None:
    def step(x: Tensor, seen: list[int]) -> Tensor:
        seen.append(len(seen))
        x = x * 2
        return x.mul_(2).sin()

    opted = frame_swap.opt_in(step)
    x = torch.rand(3, requires_grad=True)
    opted(x, [])
    swap()
    expected, actual = (observe(call, (x.detach().clone().requires_grad_(), [])) for call in (step, opted))
    assert_same(actual, expected, "")
    assert is_direct(lambda: opted(x, []))


def test_a_variable_of_an_enclosing_function_may_change_or_be_missing() -> None:
    cell = CellType(2.0)
    times = FunctionType((lambda k: lambda x: x * k if x.dim() else x + 1)(0).__code__, globals(), closure=(cell,))
    opted = swapped(times)
    assert is_direct(lambda: opted(torch.ones(3)))
    cell.cell_contents = 3.0
    assert opted(torch.ones(3)).tolist() == [3.0] * 3
    del cell.cell_contents
    assert opted(torch.tensor(1.0)).item() == 2.0
    with pytest.raises(NameError):
        opted(torch.ones(3))


# Which calls go directly


def test_a_call_before_the_swap_goes_through_torch_compile() -> None:
    opted = frame_swap.opt_in(f)
    opted(torch.ones(3))
    assert not is_direct(lambda: opted(torch.ones(3)))


def test_each_entry_is_found_and_the_last_one_is_asked_first() -> None:
    opted = frame_swap.opt_in(f)
    inputs = [torch.ones(3), torch.ones(3, dtype=torch.double), torch.ones(3, 1, 1)]
    for x in inputs:
        opted(x)
    swap()
    asked = []
    table = table_of(f)
    for x in inputs * 2:
        assert is_direct(lambda: opted(x))
        asked.append(table.latest)
        assert_same(opted(x), f(x), str(x))
        assert table.latest is asked[-1]
    assert len(set(asked)) == 3
    assert asked[:3] == asked[3:]


def test_a_call_that_misses_the_guards_is_compiled_anew() -> None:
    opted = swapped(f)
    twos = torch.full((2, 2), 2.0, dtype=torch.double)
    assert not is_direct(lambda: opted(twos))
    swap()
    assert is_direct(lambda: opted(twos))
    assert_same(opted(twos), f(twos), "after")
    assert len(frame_swap.report().regions) == 2


def sine(x: Tensor) -> Tensor:
    return x.sin()


@pytest.mark.parametrize("ending", ["in the middle", "at the end"])
def test_a_frame_with_a_graph_break_goes_through_torch_compile(ending: str) -> None:
    @torch.compiler.disable
    def outside(x: Tensor) -> Tensor:
        return x + 1

    if ending == "in the middle":
        opted = swapped(lambda x: outside(x * 2).sin())
    else:
        opted = swapped(lambda x: outside(x * 2))
    assert not is_direct(lambda: opted(torch.ones(3)))


def test_another_backend_s_entries_are_not_taken() -> None:
    other = torch.compile(f, backend="frame_swap", options={"epilogue_fusion": False})
    opted = frame_swap.opt_in(f)
    other(torch.ones(3))
    swap()
    assert not is_direct(lambda: opted(torch.ones(3)))
    swap()
    assert is_direct(lambda: opted(torch.ones(3)))
    assert len(frame_swap.report().regions) == 2


def test_who_is_opted_in_after_the_swap_goes_directly_too() -> None:
    def shifted(by: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda x: x.sin() + by

    swapped(shifted(torch.ones(3)))
    opted = frame_swap.opt_in(shifted(torch.zeros(3)))
    assert is_direct(lambda: opted(torch.ones(3)))
    assert_same(opted(torch.ones(3)), torch.ones(3).sin(), "")
    assert len(frame_swap.report().regions) == 1
    other = frame_swap.opt_in(options={"epilogue_fusion": False})(shifted(torch.zeros(3)))
    assert not is_direct(lambda: other(torch.ones(3)))


class Nothing(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "around",
    [
        torch.profiler.profile,
        lambda: FlopCounterMode(display=False),
        Nothing,
        lambda: torch.compiler.set_stance("force_eager"),
        torch.enable_grad,
    ],
    ids=["profiler", "dispatch mode", "function mode", "stance", "grad mode"],
)
def test_a_call_that_something_watches_goes_through_torch_compile(around: Callable[[], Any]) -> None:
    x = torch.ones(3)
    with torch.no_grad():
        opted = swapped(f, x)
        with around():
            assert not is_direct(lambda: opted(x))
            assert_same(opted(x), f(x), "")
        assert is_direct(lambda: opted(x))


def test_a_profile_names_the_region() -> None:
    opted = swapped(f)
    with torch.profiler.profile() as profile:
        opted(torch.ones(3))
    assert any("Torch-Compiled Region" in event.name for event in profile.events())


@pytest.mark.parametrize("takes", ["an argument", "nothing"])
def test_tracers_and_transforms_see_what_they_see_with_torch_compile(takes: str) -> None:
    """Even if no guard can tell, since the function takes no traced tensor."""
    held = torch.ones(3)

    def function(x: Tensor | None) -> Tensor:
        return (held if x is None else x).sin() + 1

    opted, plain = (
        wrap(function) for wrap in (frame_swap.opt_in, lambda g: torch.compile(g, backend="frame_swap"))
    )
    opted(held if takes == "an argument" else None)
    swap()

    def call(compiled: Any) -> Callable[[Tensor], Tensor]:
        return lambda x: compiled(x if takes == "an argument" else None) + x

    def outcome(way: Callable[..., Any], compiled: Any) -> Any:
        try:
            return way(call(compiled))
        except Exception as error:
            return type(error), str(error)

    x = torch.ones(3)
    for way in (
        lambda g: make_fx(g)(x).code,
        lambda g: torch.fx.symbolic_trace(g).code,
        lambda g: torch.jit.trace(g, x).code,
        lambda g: torch.vmap(g)(x[None]),
        lambda g: torch.func.grad(lambda x: g(x).sum())(x),
    ):
        assert_same(outcome(way, opted), outcome(way, plain), "")

    class Exported(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return call(opted)(x)

    for strict in (False, True):
        program = torch.export.export(Exported(), (x,), strict=strict)
        assert "aten.sin" in str(program.graph)


@pytest.mark.parametrize("what", ["function", "module", "instance of a class"])
def test_dynamo_inlines_it(what: str) -> None:
    x = torch.rand(2, 4)
    if what == "instance of a class":
        opted = opted_class()().eval()
        opted(x)
        swap()
    else:
        opted = swapped(f if what == "function" else Block().eval(), x)
    expected = opted(x) * 2
    assert is_direct(lambda: opted(x))
    outer = torch.compile(lambda x: opted(x) * 2, backend="frame_swap", fullgraph=True)
    assert_same(outer(x), expected, "")
    assert len(frame_swap.report().regions) == 2


def test_a_bound_method_goes_directly() -> None:
    class Scaled:
        scale = 2.0

        def apply(self, x: Tensor) -> Tensor:
            return x * self.scale

    scaled = Scaled()
    opted = swapped(scaled.apply)
    assert is_direct(lambda: opted(torch.ones(3)))
    scaled.scale = 3.0
    assert opted(torch.ones(3)).tolist() == [3.0] * 3


def test_each_call_is_a_step_to_cuda_graphs() -> None:
    opted = swapped(f)
    before = eval_frame.GenerationTracker.generation
    for calls in (1, 2):
        assert is_direct(lambda: opted(torch.ones(3)))
        assert eval_frame.GenerationTracker.generation == before + calls


def test_where_dynamo_looks_at_every_frame_it_captures_none_of_ours() -> None:
    opted = swapped(f)

    def outer(x: Tensor) -> Any:
        with contextlib.suppress(ValueError):  # Dynamo gives this frame up, and looks at those that it calls
            torch._dynamo.graph_break()
            return opted(x)

    compiled = torch.compile(outer, backend="frame_swap")
    for x in (torch.ones(3), torch.ones(3, requires_grad=True)):  # a hit, a miss
        assert_same(compiled(x), f(x), "")
    assert {region.frame.split(",")[0] for region in frame_swap.report().regions} == {"f"}


def test_it_is_what_torch_compile_s_function_is() -> None:
    opted, plain = frame_swap.opt_in(f), torch.compile(f)
    assert opted._torchdynamo_orig_callable is opted._torchdynamo_inline is opted.__wrapped__ is f
    assert vars(plain).keys() <= vars(opted).keys()
    assert (opted.__name__, opted.__doc__, opted.__module__) == (f.__name__, f.__doc__, f.__module__)
    assert torch._dynamo.eval_frame.innermost_fn(opted) is f


# How long


def test_a_reset_ends_it_and_frees_the_code() -> None:
    opted = swapped(f)
    assert is_direct(lambda: opted(torch.ones(3)))
    table = table_of(f)
    code = weakref.ref(table.latest[0].run.__code__)
    torch._dynamo.reset()
    assert (table.entries, table.latest) == ((), ())
    gc.collect()
    assert code() is None
    assert not is_direct(lambda: opted(torch.ones(3)))
    assert len(frame_swap.report().regions) == 2


def test_an_invalidated_entry_ends_it() -> None:
    held: list[Any] = [lambda x: x.sin()]
    opted = swapped(lambda x: held[0](x))
    assert is_direct(lambda: opted(torch.ones(3)))
    held[0] = torch.cos
    assert_same(opted(torch.ones(3)), torch.ones(3).cos(), "")


def test_a_dead_object_that_the_guards_name_takes_the_entry_along() -> None:
    class Scale:
        pass

    def scaled(x: Tensor, kind: type) -> Tensor:
        return x * (2 if kind is Scale else 3)

    opted = frame_swap.opt_in(scaled)
    opted(torch.ones(3), Scale)
    swap()
    assert is_direct(lambda: opted(torch.ones(3), Scale))
    table = table_of(scaled)
    (entry,) = dynamo.cache_entries(scaled.__code__)
    manager = entry.guard_manager
    del entry
    manager.extra_state.invalidate(manager.cache_entry, type(manager)())
    assert (table.entries, table.latest) == ((), ())


def test_what_late_guards_turn_away_gets_its_own_code() -> None:
    def pool(x: Tensor) -> Tensor:
        return adaptive_avg_pool2d(x.sin(), 2)

    images = [torch.randn(1, n, n) for n in (8, 9, 12)]
    opted = swapped(pool, images[0], dynamic=True)
    for x in images[1:]:
        opted(x)
        swap()
    (region,) = live(frame_swap.report())
    assert (region.artifacts, len(table_of(pool).entries)) == (3, 1)
    calls = region.eager_calls
    for x in images:
        assert_same(opted(x), pool(x), str(x.shape))
        assert is_direct(lambda: opted(x))
        assert not any("Trampoline" in name for name in called(lambda: opted(x)))
    assert region.eager_calls == calls


def test_threads_that_call_while_entries_go() -> None:
    opted = swapped(f, torch.ones(3), torch.ones(3, 1), dynamic=False)
    failures: list[BaseException] = []
    stop = threading.Event()

    def call() -> None:
        try:
            while not stop.is_set():
                for x in (torch.ones(3), torch.ones(3, 1)):
                    assert_same(opted(x), f(x), "")
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    table = table_of(f)
    for entry in table.entries:
        table._remove(entry.alive)
    stop.set()
    for thread in threads:
        thread.join()
    assert not failures
    assert (table.entries, table.latest) == ((), ())


# Modules


class Block(nn.Module):
    def __init__(self, width: int = 4, slope: float = 1.0) -> None:
        super().__init__()
        self.linear = nn.Linear(4, width)
        self.dropout = nn.Dropout(0.5)
        self.slope = slope

    def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        return self.dropout(self.linear(x)).tanh() * (scale * self.slope)


ways = pytest.mark.parametrize("static", [False, True], ids=["guarded", "static_module"])


def opted_class(**options: Any) -> type[Block]:
    return frame_swap.opt_in(**options)(type("Opted", (Block,), {}))


@ways
def test_instances_of_a_class_go_directly(static: bool) -> None:
    Opted = opted_class(static_module=static)
    x = torch.rand(2, 4, requires_grad=True)
    models = [Opted().eval(), Opted().eval(), Opted(width=3).eval()]
    for model in models:
        model(x)
    swap()
    for model in models * 2:
        model(x)  # under the promise, the first call of each evaluates all guards
        assert is_direct(lambda: model(x))
        expected, actual = (
            observe(call, (x.detach().clone().requires_grad_(),), copy.deepcopy(model))
            for call in (lambda x: model._call_impl(x), model)
        )
        assert_same(actual["outputs"], expected["outputs"], "")
        assert_same(actual["input gradients"], expected["input gradients"], "")


@ways
def test_a_module_goes_directly_until_it_has_hooks(static: bool) -> None:
    x = torch.rand(2, 4)
    model = swapped(Block().eval(), x, static_module=static)
    assert is_direct(lambda: model(x))
    seen = []
    handle = model.register_forward_hook(lambda module, args, output: seen.append(output))
    assert not is_direct(lambda: model(x))
    assert seen
    handle.remove()
    assert is_direct(lambda: model(x))
    model.forward = lambda x: x  # type: ignore[method-assign]
    assert model(x) is x


@ways
def test_torch_s_own_modules_are_compiled_too(static: bool) -> None:
    """Dynamo skips their frames unless it is told to trace them."""
    x = torch.rand(2, 4)
    model = swapped(nn.Sequential(nn.Linear(4, 4), nn.Tanh()), x, static_module=static)
    torch.testing.assert_close(model(x), model.forward(x))
    seen = []
    handle = model.register_forward_hook(lambda module, args, output: seen.append(output))
    torch.testing.assert_close(model(x), model.forward(x))
    assert len(seen) == 1
    handle.remove()
    model(x)
    assert [region.state for region in frame_swap.report().regions] == [frame_swap.State.INSTALLED]


@ways
def test_training_and_evaluation_are_told_apart(static: bool) -> None:
    x = torch.rand(64, 4)
    model = swapped(Block(), x, static_module=static)
    assert is_direct(lambda: model(x))
    assert (model(x) == 0).any()
    model.eval()
    assert_same(model(x), model._call_impl(x), "")
    swap()
    assert_same(model(x), model._call_impl(x), "")
    assert is_direct(lambda: model(x))
    model.train()
    assert is_direct(lambda: model(x))
    assert (model(x) == 0).any()


@ways
def test_parameters_may_take_other_values(static: bool) -> None:
    x = torch.rand(2, 4)
    model = swapped(Block().eval(), x, static_module=static)

    def check(what: str) -> None:
        assert is_direct(lambda: model(x)), what
        assert_same(model(x), model._call_impl(x), what)

    check("as compiled")
    model.load_state_dict(Block().state_dict())
    check("loaded")
    model.linear.weight = nn.Parameter(torch.rand(4, 4))
    check("replaced")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(x).sum().backward()
    optimizer.step()
    check("a step later")


@ways
def test_guards_on_the_module_are_evaluated_unless_promised(static: bool) -> None:
    x = torch.rand(2, 4)
    model = swapped(Block().eval(), x, static_module=static)
    before = model(x)
    model.slope = 2.0
    assert_same(model(x), before if static else 2 * before, "")
    torch._dynamo.reset()
    assert_same(model(x), 2 * before, "")


@ways
def test_inputs_and_global_state_are_guarded(static: bool) -> None:
    x = torch.rand(2, 4)
    model = swapped(Block().eval(), x, static_module=static)
    model(x)
    assert is_direct(lambda: model(x))
    for other in (torch.rand(3, 4), torch.rand(2, 2, 4), torch.rand(2, 4, requires_grad=True)):
        assert_same(model(other), model._call_impl(other), "")
    assert_same(model(x, scale=3.0), model._call_impl(x, scale=3.0), "")
    with torch.no_grad():
        assert not model(x).requires_grad


FACTOR = 2.0


def times_factor(x: Tensor) -> Tensor:
    return x * FACTOR


class ReadsGlobals(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return times_factor(x) + FACTOR


@ways
def test_globals_are_guarded_but_for_promised_code(static: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.ones(3)
    model = swapped(ReadsGlobals(), x, static_module=static)
    assert_same(model(x), 2 * x + 2, "as compiled")
    with monkeypatch.context() as change:
        change.setitem(globals(), "times_factor", lambda x: x * 5)
        assert_same(model(x), (2 if static else 5) * x + 2, "another function")
    monkeypatch.setitem(globals(), "FACTOR", 3.0)
    assert_same(model(x), 3 * x + 3, "another value")


def test_a_promise_goes_with_its_module() -> None:
    @frame_swap.opt_in(static_module=True)
    class Opted(Block):
        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]  # which no other class has
            return self.linear(x)

    x = torch.rand(2, 4)
    model = Opted().eval()
    model(x)
    swap()
    model(x)
    table = table_of(Opted.forward)
    assert list(table.promised) == [(id(model), False)]
    del model
    gc.collect()
    assert not table.promised


def test_only_a_module_can_be_promised_to_be_static() -> None:
    with pytest.raises(TypeError, match="static_module is a promise about a module"):
        frame_swap.opt_in(static_module=True)(f)

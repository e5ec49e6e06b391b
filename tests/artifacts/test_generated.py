"""Generated Python that does without Inductor's compiler."""

from __future__ import annotations

from collections.abc import Callable
from subprocess import CompletedProcess
from types import FunctionType
from typing import Any

import pytest
import torch

from frame_swap.internals import generated_code

HEADER = """\
import torch
from torch._inductor.codegen.memory_planning import _align as align
from torch._inductor.select_algorithm import extern_kernels
from torch._inductor.utils import maybe_profile
LINE = 5
"""


def run(code: Any) -> dict[str, Any]:
    variables: dict[str, Any] = {}
    exec(code, variables)
    return variables


@pytest.mark.quick
def test_what_nobody_looks_up_is_not_imported() -> None:
    code, heavy = generated_code.compiled_lightly(HEADER, "made.py")
    assert not heavy
    variables = run(code)
    assert "extern_kernels" not in variables
    assert "align" not in variables
    assert "maybe_profile" in variables
    assert variables["LINE"] == 5


@pytest.mark.quick
def test_operators_are_torchs_own() -> None:
    source = f"{HEADER}def call(a): return extern_kernels.mm(a, a), extern_kernels.addmm\n1 / 0\n"
    code, heavy = generated_code.compiled_lightly(source, "made.py")
    assert not heavy
    assert "select_algorithm" not in str(code.co_names)
    with pytest.raises(ZeroDivisionError) as raised:
        run(code)
    assert raised.traceback[-1].lineno + 1 == 7
    variables = run(generated_code.compiled_lightly(source.replace("1 / 0", ""), "made.py")[0])
    assert variables["call"](torch.eye(2)) == (pytest.approx(torch.eye(2)), torch.addmm)


@pytest.mark.quick
@pytest.mark.parametrize(
    "use",
    ["extern_kernels.bias_addmm", "extern_kernels.no_such", "extern_kernels", "align(3)", "[extern_kernels.mm]"],
)
def test_other_uses_keep_the_import(use: str) -> None:
    code, heavy = generated_code.compiled_lightly(f"{HEADER}def used(): return {use}\n", "made.py")
    assert heavy is (use != "[extern_kernels.mm]")
    assert ("torch._inductor.select_algorithm" in code.co_names) is ("extern" in use and heavy)
    assert ("torch._inductor.codegen.memory_planning" in code.co_names) is ("align" in use)


GUARDED = """\
import torch
def call(args):
    with torch.cuda._DeviceGuard(1):
        torch.cuda.set_device(1)
        done("on 1")
        with torch.cuda._DeviceGuard(0):
            torch.cuda.set_device(0)
            done("on 0")
            assert args
        done("on 1 again")
"""


@pytest.mark.quick
@pytest.mark.parametrize("succeeds", [True, False])
def test_devices_are_set_as_by_guards(succeeds: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[object] = []

    def exchange(device: int) -> int:
        log.append(("exchange", device))
        return device + 5

    functions = {
        "exchangeDevice": exchange,
        "maybeExchangeDevice": lambda device: log.append(("back", device)),
        "setDevice": lambda device: log.append(("set", device)),
    }
    for name, function in functions.items():
        monkeypatch.setattr(torch._C, f"_cuda_{name}", function, raising=False)
    monkeypatch.setattr(torch.cuda, "_exchange_device", functions["exchangeDevice"])
    monkeypatch.setattr(torch.cuda, "_maybe_exchange_device", functions["maybeExchangeDevice"])
    logs = []
    for code in (compile(GUARDED, "made.py", "exec"), generated_code.compiled_lightly(GUARDED, "made.py")[0]):
        variables = {**run(code), "done": log.append}
        call = FunctionType(variables["call"].__code__, variables)
        if succeeds:
            call([1])
        else:
            with pytest.raises(AssertionError) as raised:
                call([])
            assert raised.traceback[-1].lineno + 1 == 9
        logs.append(log.copy())
        log.clear()
    expected = [("exchange", 1), ("set", 1), "on 1", ("exchange", 0), ("set", 0), "on 0", ("back", 5)]
    expected += [*(["on 1 again"] if succeeds else []), ("back", 6)]
    assert logs == [expected, expected]
    assert "_DeviceGuard" not in call.__code__.co_names


PROGRAM = """
import sys
import torch
import frame_swap

torch.manual_seed(0)
layers = [torch.nn.Linear(8, 8), torch.nn.GELU(), torch.nn.Conv1d(4, 3, 3), torch.nn.Linear(6, 2)]
model = torch.nn.Sequential(*layers)
compiled = torch.compile(model, backend="frame_swap")
x = torch.randn(2, 4, 8)

def step(call):
    model.zero_grad()
    call(x).square().sum().backward()
    return [parameter.grad.clone() for parameter in model.parameters()]

expected = step(model)
torch.testing.assert_close(step(compiled), expected)
(region,) = frame_swap.wait().regions
torch.testing.assert_close(step(compiled), expected)
compiler = ("compile_fx", "graph", "ir", "select_algorithm")
print(region.state, [name for name in compiler if f"torch._inductor.{name}" in sys.modules])
"""


def test_a_program_does_not_import_the_compiler(run_program: Callable[..., CompletedProcess[str]]) -> None:
    assert run_program(PROGRAM).stdout == "installed []\n"


LISTENS = """
from torch._inductor.graph import GraphLowering
codes = []
GraphLowering.save_output_code = codes.append
"""


def test_who_collects_code_gets_it(run_program: Callable[..., CompletedProcess[str]]) -> None:
    said = run_program(f"{LISTENS}{PROGRAM}\nprint(len(codes), all('def call' in code for code in codes))").stdout
    assert said.splitlines()[-1] == "2 True"

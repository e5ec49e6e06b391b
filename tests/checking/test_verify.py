"""`verify=n` finds errors in compiled code, changes nothing for the caller, and leaves no trace."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import stat
import subprocess
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import faulty
import pytest
import torch
from helpers import Subject, Twins, assert_same, codes_called, live, observe, wait_for_all
from torch import Tensor, nn

import frame_swap
from frame_swap import FrameSwapWarning, Region, State, errors
from frame_swap.checking import repro
from frame_swap.checking.arguments import Arguments
from frame_swap.shipping.parcel import Parcel
from frame_swap.shipping.process_state import ProcessState

Function = Callable[..., Any]


@pytest.fixture(autouse=True)
def repro_dir(tmp_path: Path) -> Iterator[Path]:
    frame_swap.configure(when="manual", verify=2, repro_dir=str(tmp_path / "repro"))
    yield tmp_path / "repro"
    faulty.lying = False


@contextlib.contextmanager
def miscompiled(operator: str, other: str) -> Iterator[None]:
    with torch._inductor.config.patch(post_grad_custom_post_pass=faulty.Miscompile(operator, other)):
        yield


def region() -> Region:
    (one,) = live(frame_swap.report())
    return one


def exponential(x: Tensor) -> Tensor:
    return x.exp() * 2


def sine(x: Tensor) -> Tensor:
    return x.sin() * 2


def counts(x: Tensor, calls: Tensor) -> Tensor:
    calls.add_(1)
    return x * 2


PLANTED = {
    "outputs": (exponential, ("aten.exp.default", "aten.expm1.default"), "output 0: up to 2 off eager code's"),
    "gradients": (sine, ("aten.cos.default", "aten.sin.default"), "gradient 0: up to"),
    "mutations": (counts, ("aten.add.Tensor", "aten.sub.Tensor"), "argument 0: up to 2 off eager code's"),
}


@pytest.mark.parametrize(("function", "swapped", "difference"), PLANTED.values(), ids=PLANTED)
def test_a_miscompile_is_rejected_and_can_be_repeated(
    function: Function, swapped: tuple[str, str], difference: str, repro_dir: Path
) -> None:
    def make() -> tuple[Tensor, ...]:
        torch.manual_seed(1)
        x = torch.rand(3, 4, requires_grad=function is sine)
        return (x, torch.zeros(3)) if function is counts else (x,)

    expected = observe(function, make())
    compiled = torch.compile(function, backend="frame_swap")
    with warnings.catch_warnings(record=True) as caught, miscompiled(*swapped):
        warnings.simplefilter("always")
        for _ in range(5):
            assert_same(observe(compiled, make()), expected, "what the caller gets")
            frame_swap.wait()
            frame_swap.swap()
    (warning,) = (w for w in caught if issubclass(w.category, FrameSwapWarning))
    assert (region().state, region().verified, region().eager_calls) == (State.REJECTED, 0, 5)
    assert difference in region().reason
    assert region().reason in str(warning.message)

    (folder,) = repro_dir.iterdir()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert (folder / "difference.txt").read_text().startswith(difference)
    if function is not sine:
        return  # once is enough: it takes a process that imports PyTorch and compiles
    command = region().reason.rpartition("to see it again: ")[2]
    assert str(folder) in command
    path = {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), str(Path(__file__).parents[1])])}
    again = subprocess.run(
        shlex.split(command), env={**os.environ, **path}, capture_output=True, text=True, timeout=240
    )
    assert again.returncode == 1, again.stderr[-3000:]
    assert difference in again.stdout


def test_without_verify_they_go_unnoticed(repro_dir: Path) -> None:
    frame_swap.configure(verify=0)
    compiled = torch.compile(exponential, backend="frame_swap")
    x = torch.rand(3)
    with miscompiled("aten.exp.default", "aten.expm1.default"):
        compiled(x)
        wait_for_all()
        frame_swap.swap()
    assert region().state is State.INSTALLED
    torch.testing.assert_close(compiled(x), 2 * x.expm1())
    assert not repro_dir.exists()


class Everything(nn.Module):
    """Has parameters; writes to buffers and to an input that needs a gradient; returns a view of its output."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        y.mul_(2)
        out = self.norm(self.linear(x)) * y
        return out, out[0]


@pytest.mark.usefixtures("no_warnings")
def test_the_caller_sees_nothing_of_it(device: str) -> None:
    """Inputs are changed once, gradients accumulated once, and random numbers drawn as without it."""

    def everything(wrap: Function) -> Any:
        module = Everything()

        def call(x: Tensor, y: Tensor) -> Any:
            outs = compiled(x, y)
            return (*outs, torch.rand(3))

        compiled = wrap(module)
        leaves = (lambda: (torch.rand(8, 4, requires_grad=True), torch.rand(8, 4, requires_grad=True) * 1),)
        return Subject(call, leaves, module, {"rtol": 1e-4, "atol": 1e-4})

    twins = Twins(everything, device)
    twins.check("before")
    wait_for_all()
    frame_swap.swap()
    assert region().state is State.TRIAL
    for verified in (1, 2):
        twins.check("on trial at")
        assert region().verified == verified
    assert (region().state, region().reason, region().eager_calls) == (State.INSTALLED, "", 3)
    twins.check("after")
    assert region().eager_calls == 3
    assert frame_swap.report().as_dict()["regions"][0]["verified"] == 2


def test_no_trace_of_it_remains() -> None:
    compiled = torch.compile(sine, backend="frame_swap")
    x = torch.rand(3)
    compiled(x)
    wait_for_all()
    frame_swap.swap()
    files = {code.co_filename for code in codes_called(lambda: compiled(x))}
    assert any("/frame_swap/checking/" in file for file in files), "or it cannot be seen at all"
    compiled(x)
    assert region().state is State.INSTALLED
    files = {code.co_filename for code in codes_called(lambda: compiled(x))}
    assert not [file for file in files if "/frame_swap/" in file]


@pytest.mark.parametrize("fallback", [False, True])
def test_random_numbers_are_compared_only_where_they_are_the_same(fallback: bool) -> None:
    options = {"fallback_random": True} if fallback else None
    compiled = torch.compile(lambda x: torch.dropout(x, 0.5, True) * 2, backend="frame_swap", options=options)
    x = torch.ones(64)
    compiled(x)
    wait_for_all()
    frame_swap.swap()
    for _ in range(2):
        state = torch.get_rng_state()
        actual = compiled(x)
        torch.set_rng_state(state)
        torch.testing.assert_close(actual, torch.dropout(x, 0.5, True) * 2)
    assert (region().state, region().verified) == (State.INSTALLED, 2)
    assert region().reason == (
        "" if fallback else "verified but for its values: it draws random numbers, and compiled code draws others"
    )


@pytest.mark.usefixtures("no_warnings")
def test_what_has_effects_is_not_done_twice(capfd: pytest.CaptureFixture[str]) -> None:
    def says(x: Tensor) -> Tensor:
        torch.ops.aten._print("for the test")
        return x.sin() * 2

    compiled, x = torch.compile(says, backend="frame_swap"), torch.rand(3)
    compiled(x)
    wait_for_all()
    frame_swap.swap()
    capfd.readouterr()
    compiled(x)
    assert capfd.readouterr().out.count("for the test") == 1
    assert region().state is State.INSTALLED
    assert region().reason.startswith("not verified: it has effects")


def test_a_wrong_shape_shows_in_spite_of_random_numbers() -> None:
    compiled = torch.compile(lambda x: torch.dropout(x, 0.5, True) < x.exp(), backend="frame_swap")
    x = torch.ones(64)
    with miscompiled("aten.lt.Tensor", "aten.sub.Tensor"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled(x)
        wait_for_all()
        frame_swap.swap()
        compiled(x)
    assert region().state is State.REJECTED
    assert "dtype" in region().reason


@pytest.mark.parametrize("swapped", [None, ("aten.exp.default", "aten.expm1.default")], ids=["right", "wrong"])
def test_uninitialised_memory_excuses_values_only_where_they_differ(swapped: tuple[str, str] | None) -> None:
    compiled = torch.compile(lambda x: torch.empty_like(x).fill_(1) + x.exp(), backend="frame_swap")
    x = torch.rand(3, 4)
    with miscompiled(*swapped) if swapped else contextlib.nullcontext():
        compiled(x)
        wait_for_all()
        frame_swap.swap()
    for _ in range(3):
        compiled(x)
    assert (region().state, region().verified) == (State.INSTALLED, 2)
    assert region().reason == ("verified but for its values: it hands out uninitialised memory" if swapped else "")


def test_compiled_code_that_raises_is_rejected() -> None:
    def relays(x: Tensor) -> Tensor:
        return faulty.relaid(x.sin()).cos().sum(-1)

    compiled, x = torch.compile(relays, backend="frame_swap"), torch.rand(3, 4)
    compiled(x)
    wait_for_all()
    frame_swap.swap()
    faulty.lying = True
    with pytest.warns(FrameSwapWarning, match="compiled code raises AssertionError"):
        torch.testing.assert_close(compiled(x), relays(x))
    assert region().state is State.REJECTED


def test_a_call_whose_arguments_cannot_be_copied_is_not_held_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("frame_swap.checking.arguments.SETS", 1 << 50)
    compiled, x = torch.compile(sine, backend="frame_swap"), torch.rand(3)
    compiled(x)
    wait_for_all()
    frame_swap.swap()
    torch.testing.assert_close(compiled(x), sine(x))
    assert (region().state, region().verified) == (State.INSTALLED, 0)
    assert re.match("not verified: copies of the arguments take .* MiB, and cpu has", region().reason)


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    frame_swap.configure(repro_dir=str(tmp_path / "file"))
    compiled, x = torch.compile(exponential, backend="frame_swap"), torch.rand(3)
    with miscompiled("aten.exp.default", "aten.expm1.default"), pytest.warns(FrameSwapWarning):
        compiled(x)
        wait_for_all()
        frame_swap.swap()
        torch.testing.assert_close(compiled(x), exponential(x))
    assert "could not be kept: FileExistsError" in region().reason
    assert region().state is State.REJECTED


def test_while_one_thread_compares_others_go_on() -> None:
    def relays(x: Tensor) -> Tensor:
        return faulty.relaid(x.sin()).cos()

    compiled, x = torch.compile(relays, backend="frame_swap"), torch.rand(3, 4)
    compiled(x)
    wait_for_all()
    frame_swap.swap()
    comparing, over = threading.Event(), threading.Event()

    def hold() -> None:
        if threading.current_thread() is not threading.main_thread():
            comparing.set()
            assert over.wait(60)

    faulty.before_relaid = hold
    try:
        thread = threading.Thread(target=compiled, args=(x,))
        thread.start()
        assert comparing.wait(60)
        torch.testing.assert_close(compiled(x), relays(x))
        assert (region().state, region().verified) == (State.TRIAL, 0)
        over.set()
        thread.join()
    finally:
        over.set()
        faulty.before_relaid = lambda: None
    assert region().verified == 1


def test_late_guards_each_artifact_is_verified() -> None:
    frame_swap.configure(verify=1)

    def pool(images: Tensor) -> Tensor:
        return torch.nn.functional.adaptive_max_pool2d(images, 4)

    compiled = torch.compile(pool, backend="frame_swap", dynamic=True)
    for size in (8, 9):
        images = torch.rand(1, 2, size, size)
        for _ in range(2):
            torch.testing.assert_close(compiled(images), pool(images))
            frame_swap.wait()
            frame_swap.swap()
            torch.testing.assert_close(compiled(images), pool(images))
    calls = region().eager_calls
    for size in (8, 9):
        images = torch.rand(1, 2, size, size)
        torch.testing.assert_close(compiled(images), pool(images))
    assert (region().state, region().artifacts, region().eager_calls) == (State.INSTALLED, 2, calls)


def test_a_folder_of_others_is_refused(tmp_path: Path) -> None:
    parcel = Parcel(b"no content", b"no envelope", ProcessState.capture(set()), {}, "")
    folder = repro.write(str(tmp_path), parcel, {}, [torch.rand(3)], "for the test")
    folder.chmod(0o770)
    empty = tmp_path / "empty"
    empty.mkdir(mode=0o700)
    with pytest.raises(errors.UnusableFolder, match="others can write to it"):
        repro.difference(folder)
    with pytest.raises(errors.UnusableFolder, match="no folder that frame-swap wrote"):
        repro.difference(empty)


def test_copies_leave_aliases_what_they_are() -> None:
    base = torch.rand(6, requires_grad=True) * 1
    originals = (base, base[:4], base[2:], torch.rand(4, 3).t())
    values = Arguments(originals).values
    assert values[1]._base is values[0]
    assert values[1].untyped_storage().data_ptr() == values[2].untyped_storage().data_ptr()
    assert values[3].stride() == originals[3].stride()
    values[0].mul_(2)
    assert torch.equal(values[1], originals[1] * 2)

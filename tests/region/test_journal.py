"""What each step of a compile tells: log, stderr with `verbose`, torch's trace and profiles. No call tells it."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import codes_called, live
from torch._inductor.utils import fresh_cache

import frame_swap
from frame_swap import FrameSwapWarning, State
from frame_swap.farm.workers import workers
from frame_swap.region import records

ROOT = os.path.dirname(frame_swap.__file__)


def f(x: torch.Tensor) -> torch.Tensor:
    return (x.sin() @ x).relu()


def messages(caplog: pytest.LogCaptureFixture, level: int = logging.INFO) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name.startswith("frame_swap") and r.levelno >= level]


@pytest.mark.fast
def test_the_log_has_one_line_at_ship_and_one_at_the_swap(caplog: pytest.LogCaptureFixture) -> None:
    compiled, x = torch.compile(f, backend="frame_swap"), torch.randn(4, 4)
    compiled(x)
    frame_swap.wait()
    compiled(x)
    shipped, installed = (message.split() for message in messages(caplog))
    assert "shipped" in shipped
    assert "nodes" in shipped
    assert "installed" in installed
    assert {"f", "0/0", "default"} <= set(shipped) & set(installed)


def test_a_failure_names_the_workers_log_and_quotes_it(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    no_compiler = torch._inductor.config.patch({"cpp.cxx": (None, str(tmp_path / "no-compiler"))})
    with no_compiler, fresh_cache(dir=str(tmp_path)), pytest.warns(FrameSwapWarning):
        torch.compile(f, backend="frame_swap")(torch.randn(4, 4))
        (region,) = live(frame_swap.wait())
        assert region.state is State.FAILED
    (failed,) = [message for message in messages(caplog) if "compile of" in message]
    (path,) = re.findall(r"whose log is (\S+)", failed)
    assert "InvalidCxxCompiler" in failed
    assert "InvalidCxxCompiler" in Path(path).read_text()


@pytest.mark.fast
def test_a_lost_worker_is_quoted(caplog: pytest.LogCaptureFixture) -> None:
    dies = torch._inductor.config.patch(post_grad_custom_post_pass=PrintsAndDies())
    with dies, pytest.warns(FrameSwapWarning, match="the worker was lost"):
        torch.compile(f, backend="frame_swap")(torch.randn(4, 4))
        frame_swap.wait()
    (failed,) = [message for message in messages(caplog) if "compile of" in message]
    assert "the last lines of " in failed
    assert "these were its last words" in failed


class PrintsAndDies(torch._inductor.custom_graph_pass.CustomGraphPass):
    def __call__(self, graph: torch.fx.Graph) -> None:
        os.write(2, b"these were its last words\n")
        os.abort()

    def uuid(self) -> str:
        return "dies"


def test_workers_keep_their_logs_where_they_are_told_to(tmp_path: Path) -> None:
    frame_swap.configure(log_dir=str(tmp_path / "logs"))
    torch.compile(f, backend="frame_swap")(torch.randn(4, 4))
    (region,) = live(frame_swap.wait())
    workers.make_way()
    (log,) = (tmp_path / "logs").iterdir()
    assert log.name == f"worker-{region.worker_pid}.log"
    stages = re.findall(r"^\d\d:\d\d:\d\d (.*)$", log.read_text(), re.MULTILINE)
    assert stages[:3] == ["importing torch", "compiling", "loading what it had compiled"]


@pytest.mark.parametrize(("variable", "value"), [("FRAME_SWAP_VERBOSE", "1"), ("TORCH_LOGS", "+frame_swap")])
def test_each_step_is_a_line_on_stderr(variable: str, value: str, run_program: Callable[..., Any]) -> None:
    program = """
    import torch, frame_swap
    torch.compile(lambda x: x.sin() + 1, backend="frame_swap")(torch.ones(3))
    frame_swap.wait()
    """
    lines = [line for line in run_program(program, **{variable: value}).stderr.splitlines() if "frame-swap" in line]
    steps = ["shipped", "compiling", "compiled", "loaded", "installed"]
    told = [line for line in lines if "default" in line]
    assert [next(step for step in steps if f" {step} " in line) for line in told] == steps
    assert all("0/0" in line and "<lambda>" in line for line in told)


def test_a_rejected_graph_is_told_with_its_reason(caplog: pytest.LogCaptureFixture) -> None:
    compiled = torch.compile(f, backend="frame_swap")
    compiled(torch.randn(4, 4))
    frame_swap.wait()
    with pytest.warns(FrameSwapWarning):
        records()[-1].reject("for the test")
    assert messages(caplog)[-1].endswith(
        "rejected".ljust(19) + " " * 12 + "f test_journal.py:33: for the test"
    ) or ("rejected" in messages(caplog)[-1] and messages(caplog)[-1].endswith(": for the test"))


def test_a_handler_that_raises_changes_nothing(no_warnings: None) -> None:
    class Raises(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            raise OSError("the disk is full")

    handler, logger = Raises(), logging.getLogger("frame_swap")
    logger.addHandler(handler)
    try:
        compiled, x = torch.compile(f, backend="frame_swap"), torch.randn(4, 4)
        compiled(x)
        (region,) = live(frame_swap.wait())
    finally:
        logger.removeHandler(handler)
    assert region.state is State.INSTALLED
    torch.testing.assert_close(compiled(x), f(x))


@pytest.mark.fast
def test_no_code_of_ours_runs_in_a_call_after_the_swap(tmp_path: Path) -> None:
    """Whoever listens: a call of installed code tells nothing."""
    frame_swap.configure(verbose=1, log_dir=str(tmp_path))
    compiled, x = torch.compile(f, backend="frame_swap"), torch.randn(4, 4)

    def call() -> None:
        compiled(x)

    def ours() -> list[str]:
        here = os.path.join(ROOT, "")
        return [code.co_qualname for code in codes_called(call) if code.co_filename.startswith(here)]

    call()
    assert ours() != []  # the trampoline, before
    with frame_swap.watch():
        frame_swap.wait()
        call()
        assert ours() == []


def test_profiles_name_the_install() -> None:
    compiled, x = torch.compile(f, backend="frame_swap"), torch.randn(4, 4)
    frame_swap.configure(when="manual")
    compiled(x)
    frame_swap.wait()
    with torch.profiler.profile() as profile:
        frame_swap.swap()
    assert "frame_swap: install" in {event.key for event in profile.key_averages()}


def test_tlparse_shows_our_steps_beside_torchs(run_program: Callable[..., Any], tmp_path: Path) -> None:
    trace, parsed = tmp_path / "trace", tmp_path / "parsed"
    program = """
    import torch, frame_swap
    torch.compile(lambda x: x.sin() + 1, backend="frame_swap")(torch.ones(3))
    frame_swap.wait()
    """
    run_program(program, TORCH_TRACE=str(trace))
    (log,) = trace.iterdir()
    artifacts = [
        json.loads(line.partition("] ")[2]) for line in log.read_text().splitlines() if "frame_swap_" in line
    ]
    names = [record["artifact"]["name"] for record in artifacts]
    assert names == [f"frame_swap_{step}" for step in ("shipped", "compiling", "compiled", "loaded", "installed")]
    assert all((record["frame_id"], record["frame_compile_id"]) == (0, 0) for record in artifacts)
    if shutil.which("tlparse") is None:
        pytest.skip("tlparse is not installed; the trace was looked at without it")
    subprocess.run(["tlparse", str(log), "-o", str(parsed), "--no-browser", "--overwrite"], check=True, text=True)
    page = (parsed / "index.html").read_text()
    assert "frame_swap_installed" in page
    assert "inductor_output_code" in page  # torch's own, of the worker

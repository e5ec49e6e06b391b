"""Whole programs: which work runs in which process."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.fast

WATCH = """
    import sys, torch
    compiled_here = []
    def audit(event, args):
        if event == "subprocess.Popen":
            compiled_here.append(str(args[1])[:80])
    sys.addaudithook(audit)
    import torch._inductor.compile_fx as inductor
    inner = inductor.compile_fx_inner
    def watched(*args, **kwargs):
        compiled_here.append("compile_fx_inner")
        return inner(*args, **kwargs)
    inductor.compile_fx_inner = watched
    inductor.compile_fx.__kwdefaults__, inductor.compile_fx.__defaults__ = None, (
        watched, *inductor.compile_fx.__defaults__[1:])
    import frame_swap
    from torch._inductor.utils import fresh_cache
"""


def test_no_inductor_compile_runs_in_the_calling_process(run_program: Any) -> None:
    program = (
        WATCH
        + """
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.GELU(), torch.nn.LayerNorm(8))
    with fresh_cache():
        compiled = torch.compile(model, backend="frame_swap")
        x = torch.randn(4, 8)
        compiled(x).sum().backward()
        frame_swap.wait()
        compiled(x).sum().backward()
        print(frame_swap.report().regions[0].state, compiled_here)
    """
    )
    assert run_program(program).stdout.split("\n")[0] == "installed []"


def test_a_foreground_region_is_seen_to_compile_here(run_program: Any) -> None:
    """The same watch does see a compile in the calling process."""
    program = (
        WATCH
        + """
    unpicklable = {"post_grad_custom_pre_pass": lambda graph: None}
    with fresh_cache():
        torch.compile(lambda x: x.sin() + 1, backend="frame_swap", options=unpicklable)(torch.randn(8))
        region, = frame_swap.wait().regions
        print(region.state, "|", region.reason, "|", compiled_here)
    """
    )
    state, reason, seen = run_program(program).stdout.split("|")
    assert state.strip() == "foreground"
    assert "cannot be pickled" in reason
    assert "compile_fx_inner" in seen


def test_a_worker_does_not_run_the_users_main(tmp_path: Path, run_program: Any) -> None:
    script = tmp_path / "train.py"
    script.write_text(
        textwrap.dedent(
            f"""
            open({str(tmp_path / "runs")!r}, "a").write("x")
            import torch, frame_swap
            compiled = torch.compile(lambda x: x.sin() + 1, backend="frame_swap")
            compiled(torch.randn(4))
            print(frame_swap.wait().regions[0].state)
            """
        )
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=240)
    assert done.stdout.strip() == "installed", done.stderr
    assert (tmp_path / "runs").read_text() == "x"


STARTED = """
    import sys
    import frame_swap
    from frame_swap.farm.workers import workers
    print(len(workers.pids()), "torch" in sys.modules)
"""


def test_the_import_starts_one_worker_and_imports_no_torch(run_program: Any) -> None:
    assert run_program(STARTED, FRAME_SWAP_WORKERS="2").stdout.split() == ["1", "False"]


@pytest.mark.parametrize(
    "variable",
    [("DISABLE", "1"), ("WHEN", "never"), ("CAPTURE", "background"), ("WORKERS", "none"), ("WORKER", "1")],
)
def test_the_import_starts_none_where_none_is_wanted(variable: tuple[str, str], run_program: Any) -> None:
    """`WORKER` is what a worker has; settings that cannot be used are reported where they are used."""
    assert run_program(STARTED, **{f"FRAME_SWAP_{variable[0]}": variable[1]}).stdout.split() == ["0", "False"]


def test_the_lookup_of_the_backend_starts_one(run_program: Any) -> None:
    """Unless the store has all that the program needs; see tests/store."""
    done = run_program(
        """
        import sys, torch
        torch.compile(lambda x: x, backend="frame_swap")
        from frame_swap.farm.workers import workers
        print(len(workers.pids()))
        """
    )
    assert done.stdout.split() == ["1"]


def test_the_command_line_starts_none(run_program: Any) -> None:
    done = run_program(
        """
        import runpy, subprocess, sys
        code = "import psutil; print(len(psutil.Process().children()))"
        sys.argv = ["-m"]  # as while Python looks for the module to run
        import frame_swap
        exec(code)
        """
    )
    assert done.stdout.split() == ["0"]


def test_a_worker_that_has_nothing_to_do_outlives_a_change_of_settings(run_program: Any) -> None:
    done = run_program(
        """
        import frame_swap
        from frame_swap.farm.workers import workers
        (first,) = workers.pids()
        frame_swap.configure(workers=1, idle_timeout=200)
        workers.start()
        print(workers.pids() == [first])
        frame_swap.configure(memory_limit=50)
        workers.start()
        print(workers.pids() == [first])
        """
    )
    assert done.stdout.split() == ["True", "False"]

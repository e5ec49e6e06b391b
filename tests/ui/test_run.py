"""`python -m frame_swap run`: the program runs as it does without, on frame-swap, and the report comes last."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SEEN = """
import pickle, sys
class Here: pass
pickle.dumps(Here())
main = sys.modules["__main__"]
print(__name__, sys.argv[1:], main.__dict__ is globals(), __spec__ and __spec__.name, __package__)
"""
WAITS = """
import torch
torch.compile(lambda x: x.sin() + 1)(torch.ones(3))
if __name__ == "__main__":
    import frame_swap
    frame_swap.wait(timeout=200)
"""


def run(*words: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "frame_swap", "run", *words], cwd=folder, capture_output=True, text=True
    )


@pytest.mark.fast
def test_a_script_sees_what_it_sees_without(tmp_path: Path) -> None:
    (tmp_path / "neighbour.py").write_text("")
    (tmp_path / "program.py").write_text(SEEN + "import neighbour\n")
    outside = tmp_path / "elsewhere"
    outside.mkdir()
    plain = subprocess.run(
        [sys.executable, "../program.py", "--lr", "3"], cwd=outside, capture_output=True, text=True
    )
    ours = run("../program.py", "--lr", "3", folder=outside)
    assert ours.stdout == plain.stdout
    assert ours.returncode == plain.returncode == 0


def test_a_module_sees_what_it_sees_without(tmp_path: Path) -> None:
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "__main__.py").write_text(SEEN + "from . import __init__\n")
    words = ["-m", "package", "-m", "x"]
    plain = subprocess.run([sys.executable, *words], cwd=tmp_path, capture_output=True, text=True)
    ours = run(*words, folder=tmp_path)
    assert ours.stdout == plain.stdout != ""


@pytest.mark.fast
def test_the_report_comes_last_and_the_status_is_the_programs(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(
        WAITS + "    import atexit; atexit.register(print, 'bye', flush=True)\n    exit(7)\n"
    )
    ended = run("program.py", folder=tmp_path)
    assert ended.returncode == 7
    assert ended.stdout == "bye\n"
    assert "installed" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_an_error_keeps_its_traceback(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text("def f():\n    raise KeyError('mine')\nf()\n")
    ended = run("program.py", folder=tmp_path)
    assert ended.returncode == 1
    assert 'program.py", line 2, in f' in ended.stderr
    assert ended.stderr.rstrip().endswith("torch.compile was not called with its default backend")


def test_a_program_that_ends_during_its_compile_ends_quietly(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(WAITS.partition("if __name__")[0])
    ended = run("program.py", folder=tmp_path)
    assert ended.returncode == 0
    assert "pending" in ended.stderr
    assert "Error" not in ended.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("none.py",), "none.py cannot be run: No such file"),
        (("-m", "none_such"), "there is no module none_such"),
        (("-m", "none.such"), "module none.such cannot be run"),
    ],
)
def test_a_program_that_is_not_there_is_named(words: tuple[str, ...], said: str, tmp_path: Path) -> None:
    ended = run(*words, folder=tmp_path)
    assert ended.returncode == 1
    assert said in ended.stderr
    assert "Traceback" not in ended.stderr


def test_processes_of_the_program_find_its_functions(tmp_path: Path) -> None:
    program = """
import multiprocessing
def double(x): return 2 * x
if __name__ == "__main__":
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        print(pool.map(double, [1, 2]))
"""
    (tmp_path / "program.py").write_text(program)
    ended = run("program.py", folder=tmp_path)
    assert ended.stdout == "[2, 4]\n", ended.stderr

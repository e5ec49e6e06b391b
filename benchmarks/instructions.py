"""Count the instructions of a call with Valgrind's Callgrind. The load of the machine does not change this figure.

Virtual machines seldom give access to hardware counters; Callgrind needs none. The measured program is a child
process. It is ten times slower than usual, and a hundred times while instructions are counted. Valgrind does not
know AVX-512, so the child's kernels are compiled for AVX2.
"""

from __future__ import annotations

import gc
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from itertools import repeat
from pathlib import Path

import torch
import torch._inductor.config

_FILES = "FRAME_SWAP_CALLGRIND_FILES"
_CAPABILITIES = "FRAME_SWAP_CALLGRIND_CAPABILITIES"


def unavailable() -> str:
    """Why instructions cannot be counted here; "" if they can."""
    missing = [tool for tool in ("valgrind", "callgrind_control") if shutil.which(tool) is None]
    if missing:
        return f"no {missing[0]} here"
    if not torch._C._valgrind_supported_platform():
        return "this torch is built without Valgrind's headers"
    if platform.machine() == "x86_64" and not hasattr(torch._inductor.config.cpp, "march"):
        return "this torch compiles for AVX-512, which Valgrind does not know"
    return ""


def run_counting(module: str, arguments: Sequence[str]) -> str:
    """Run `python -m module` under Callgrind; return its output.

    The module calls `prepare` first, `begin` when everything is compiled, and then `count`.

    Raises:
        subprocess.CalledProcessError: the program failed.
    """
    with tempfile.TemporaryDirectory() as files:
        callgrind = ("valgrind", "--tool=callgrind", "--instr-atstart=no", "--collect-atstart=no")
        done = subprocess.run(
            [*callgrind, f"--callgrind-out-file={files}/out", sys.executable, "-m", module, *arguments],
            env={**os.environ, _FILES: files, _CAPABILITIES: json.dumps(dict(torch.cpu.get_capabilities()))},
            capture_output=True,
            text=True,
        )
    if done.returncode:
        print(done.stderr[-2000:], file=sys.stderr)
        done.check_returncode()
    return done.stdout


def prepare() -> None:
    """Make Inductor compile kernels for instructions that Valgrind knows."""
    if platform.machine() == "x86_64":
        torch._inductor.config.cpp.march = "x86-64-v3"
        torch._inductor.config.cpp.simdlen = 256
    # An artifact is refused if this CPU lacks instructions of the worker's; workers run outside of Valgrind.
    capabilities = json.loads(os.environ[_CAPABILITIES])
    torch.cpu.get_capabilities = lambda: capabilities


def begin() -> None:
    """Instrument all code that runs from now on; it becomes slow."""
    subprocess.run(["callgrind_control", "--instr=on", str(os.getpid())], check=True, stdout=subprocess.DEVNULL)


def count(run: Callable[[], object], number: int = 20) -> float:
    """The mean number of instructions of `number` calls, without garbage collection."""
    for _ in repeat(None, 5):
        run()
    gc.collect()
    gc.disable()
    try:
        torch._C._valgrind_toggle()
        for _ in repeat(None, number):
            run()
        torch._C._valgrind_toggle_and_dump_stats()
    finally:
        gc.enable()
    newest = max(Path(os.environ[_FILES]).glob("out.*"), key=lambda file: int(file.suffix[1:]))
    [total] = [line for line in newest.read_text().splitlines() if line.startswith("totals:")]
    return int(total.split()[1]) / number

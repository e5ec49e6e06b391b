"""Instructions that a call takes, counted by Valgrind's Callgrind: a figure that a busy machine does not change.

Virtual machines seldom pass hardware counters on; Callgrind needs none. The program under it is a child process,
ten times slower than usual, a hundred times while it counts. Valgrind knows no AVX-512: the child's kernels are
compiled for AVX2.
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
    """Why nothing can be counted here; "" where it can."""
    missing = [tool for tool in ("valgrind", "callgrind_control") if shutil.which(tool) is None]
    if missing:
        return f"no {missing[0]} here"
    if not torch._C._valgrind_supported_platform():
        return "this torch is built without Valgrind's headers"
    if platform.machine() == "x86_64" and not hasattr(torch._inductor.config.cpp, "march"):
        return "this torch compiles for AVX-512, which Valgrind does not know"
    return ""


def run_counting(module: str, arguments: Sequence[str]) -> str:
    """Run `python -m module` under Callgrind; returns what it printed.

    There it calls `prepare` first, `begin` when everything is compiled, and then `count`.

    Raises:
        subprocess.CalledProcessError: it failed.
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
    """Have kernels compiled for what Valgrind knows."""
    if platform.machine() == "x86_64":
        torch._inductor.config.cpp.march = "x86-64-v3"
        torch._inductor.config.cpp.simdlen = 256
    # Artifacts are refused where instructions are missing that the workers have, which run outside of Valgrind.
    capabilities = json.loads(os.environ[_CAPABILITIES])
    torch.cpu.get_capabilities = lambda: capabilities


def begin() -> None:
    """Instrument what runs from here on, which makes it slow."""
    subprocess.run(["callgrind_control", "--instr=on", str(os.getpid())], check=True, stdout=subprocess.DEVNULL)


def count(run: Callable[[], object], number: int = 20) -> float:
    """Instructions that one of `number` calls takes, garbage collection left out."""
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

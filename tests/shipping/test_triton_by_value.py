"""A Triton kernel that cannot be imported travels by value: source, globals, parameters and configs stay."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="needs Triton; a build of torch for the CPU has none")
pytestmark = pytest.mark.fast

KERNELS = """
import sys, triton, triton.language as tl
from frame_swap.shipping import triton_by_value

SCALE: tl.constexpr = tl.constexpr(3)

@triton.jit
def scaled(a):
    return a * SCALE

@triton.autotune(configs=[triton.Config({"BLOCK": 64}, num_warps=2), triton.Config({"BLOCK": 256})], key=["n"])
@triton.jit(do_not_specialize=["n"])
def add(x, y, out, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, scaled(tl.load(x + at, at < n)) + tl.load(y + at, at < n), at < n)

def described(kernel):
    function = kernel.fn
    configs = [(str(config), config.num_warps) for config in kernel.configs]
    return function.src, function.cache_key, configs, kernel.keys, function.do_not_specialize, function.arg_names

if __name__ == "__main__":
    with open(sys.argv[1], "wb") as file:
        file.write(triton_by_value.pack(add))
    print(described(add))
"""

READER = """
import sys
from frame_swap.shipping import triton_by_value
kernel = triton_by_value.unpack(open(sys.argv[1], "rb").read())
function = kernel.fn
configs = [(str(config), config.num_warps) for config in kernel.configs]
print((function.src, function.cache_key, configs, kernel.keys, function.do_not_specialize, function.arg_names))
"""


def run(*arguments: object) -> str:
    done = subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_it_is_the_same_elsewhere_without_its_file(tmp_path: Path) -> None:
    script, packed = tmp_path / "script.py", tmp_path / "packed"
    script.write_text(KERNELS)
    here = run(script, packed)
    script.unlink()
    assert "tl.store" in here
    assert run("-c", READER, packed) == here


def test_its_bytes_are_the_same_in_each_process(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(KERNELS)
    for name in ("first", "second"):
        run(script, tmp_path / name)
    assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()

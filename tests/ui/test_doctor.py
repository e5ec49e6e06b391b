"""The doctor as a user runs it, and each check on a machine where something is wrong."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from rich.console import Console
from torch._inductor import config

import frame_swap
from frame_swap import backend, settings
from frame_swap.artifacts import folders
from frame_swap.internals import gpu, probe
from frame_swap.runtime import machine
from frame_swap.ui import doctor
from frame_swap.ui.doctor import first_swap
from frame_swap.ui.doctor.findings import Finding, Verdict, show

pytestmark = pytest.mark.fast

OK, NOTE, WRONG = Verdict.OK, Verdict.NOTE, Verdict.WRONG


def run_doctor(**environment: str) -> subprocess.CompletedProcess[str]:
    """Run `python -m frame_swap doctor` on the CPU, its output in a pipe."""
    inherited = {name: text for name, text in os.environ.items() if name not in ("FORCE_COLOR", "TTY_COMPATIBLE")}
    return subprocess.run(
        [sys.executable, "-m", "frame_swap", "doctor", "--device", "cpu"],
        capture_output=True,
        text=True,
        timeout=280,
        env={**inherited, **environment},
    )


def line(text: str, subject: str) -> str:
    """The finding on `subject` in the doctor's output, in one line: the verdict first."""
    found = re.search(rf"^  (ok|note|wrong) +{re.escape(subject)} (.*\n(?: {{26}}.*\n)*)", text, re.MULTILINE)
    assert found, text
    return f"{found[1]}: {' '.join(found[2].split())}"


def findings(items: Iterable[Finding | str]) -> list[Finding]:
    return [item for item in items if isinstance(item, Finding)]


def only(items: Iterable[Finding | str]) -> Finding:
    """The one finding of a check."""
    (finding,) = findings(items)
    return finding


def on(subject: str, items: Iterable[Finding | str]) -> Finding:
    """The one finding of a check on `subject`."""
    (finding,) = (finding for finding in findings(items) if finding.subject == subject)
    return finding


# --- The command ---


def test_a_real_swap_ends_with_status_0() -> None:
    done = run_doctor(FRAME_SWAP_WORKERS="1")
    text = done.stdout
    assert done.returncode == 0, text + done.stderr
    assert re.fullmatch(
        r"ok: after \d+\.\d s \(waiting .* s, compiling .* s, loading .* s\); "
        r"values and gradients equal eager's",
        line(text, "swap"),
    )
    assert "workers=1, from FRAME_SWAP_WORKERS=1" in text
    assert re.search(r"\d\.\d\d GB a worker", line(text, "memory"))
    for subject in ("torch", "private names", "C++ compiler", "Inductor's cache", "temporary files", "first call"):
        assert line(text, subject).startswith("ok: ")
    assert text.endswith("frame-swap works here\n")
    assert "\x1b" not in text  # a pipe
    for row in text.splitlines():
        assert len(row) <= 80 or " " not in row.strip()
    compiling = text.index("a worker starts and compiles")
    assert text.index("first call ...") < text.index("it ran eager code") < compiling < text.index("values and")


def test_without_a_compiler_it_ends_with_status_1_and_an_advice(tmp_path: Path) -> None:
    done = run_doctor(CXX=str(tmp_path / "nowhere"), TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"))
    assert done.returncode == 1, done.stdout + done.stderr
    assert "advice: install a C++ compiler (g++ or clang)" in line(done.stdout, "C++ compiler")
    assert line(done.stdout, "swap").startswith("wrong: failed: ")
    assert "nowhere" in line(done.stdout, "swap")
    assert done.stdout.endswith("frame-swap does not work here; 2 of the lines above say that something is wrong\n")


def test_a_check_that_raises_is_a_finding_and_the_others_go_on() -> None:
    def folders_of_nobody() -> Any:
        raise KeyError("nobody")
        yield

    out = io.StringIO()
    found = list(doctor.examine(Console(file=out), [folders_of_nobody, doctor.versions]))
    assert found[0][:3] == ("folders of nobody", WRONG, "this check failed: KeyError: 'nobody'")
    assert [finding.subject for finding in found[1:]] == ["python", "torch"]
    assert "advice: mend" in out.getvalue()


def test_words_stay_whole_and_only_verdicts_have_a_colour() -> None:
    out = io.StringIO()
    path = "/a/folder/with-a-name/" + "x" * 60
    finding = Finding("store", WRONG, f"{path}, of somebody", "do it")
    show(Console(file=out, force_terminal=True, color_system="standard", width=60), finding)
    assert re.findall(r"\x1b\[(\d+)m(\w*)", out.getvalue()) == [("31", "wrong"), ("0", "")]
    plain = re.sub(r"\x1b\[\d+m", "", out.getvalue())
    assert [row.split() for row in plain.splitlines()] == [
        ["wrong", "store", f"{path},"],
        ["of", "somebody"],
        ["advice:", "do", "it"],
    ]


# --- torch ---


def test_this_torch_has_what_is_needed() -> None:
    assert [finding.verdict for finding in doctor.versions()] == [OK, OK]
    assert only(doctor.private_names()).verdict is OK
    said = list(doctor.private_names(listed=True))
    names = [item for item in said if isinstance(item, str)][1:]
    assert only(said).found == f"torch has all {len(names)} that frame-swap uses"
    assert {"torch._inductor.output_code", "torch._C._dispatch_dump", "torch.utils._sympy.functions"} <= {*names}


def test_another_torch_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.3.1")
    finding = on("torch", doctor.versions())
    assert finding.verdict is WRONG
    assert finding.found.startswith("2.3.1; ")
    assert finding.advice == f"install torch {probe.CHECKED}"


def test_a_missing_name_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch._C, "_dispatch_dump")
    finding = only(doctor.private_names())
    assert finding.verdict is WRONG
    assert finding.found == "module 'torch._C' has no attribute '_dispatch_dump': some graphs are not swapped"
    assert finding.advice == f"install torch {probe.CHECKED}"
    monkeypatch.setattr(probe, "_missing", ["module 'torch._C' has no attribute '_dispatch_dump' (of an import)"])
    assert only(doctor.private_names()).found.endswith("'_dispatch_dump': nothing is swapped")


def test_where_a_name_is_missing_at_import_nothing_is_swapped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "_missing", ["cannot import name 'orig_code_map'"])
    monkeypatch.setattr(backend.inductor, "stock_inductor", lambda gm, inputs, changes: gm)
    finding = only(doctor.private_names())
    assert (finding.verdict, finding.found) == (WRONG, "cannot import name 'orig_code_map': nothing is swapped")
    backend._unsupported.cache_clear()
    try:
        with pytest.warns(frame_swap.FrameSwapWarning, match="stands aside"):
            finding = only(first_swap.swap("cpu"))
    finally:
        backend._unsupported.cache_clear()
    assert finding.verdict is WRONG
    assert finding.found == "stock Inductor compiles in place of frame-swap: cannot import name 'orig_code_map'"


# --- Settings ---


@pytest.fixture
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith("FRAME_SWAP"):
            monkeypatch.delenv(name)


@pytest.mark.usefixtures("no_variables")
def test_variables_are_all_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert only(doctor.variables())[:2] == ("settings", OK)
    monkeypatch.setenv("FRAME_SWAP_PROFIT", "1")
    monkeypatch.setenv("FRAME_SWAP_WHEN", "")  # as if it were not set
    assert only(doctor.variables())[1:3] == (OK, "profit=True, from FRAME_SWAP_PROFIT=1")


@pytest.mark.usefixtures("no_variables")
@pytest.mark.parametrize(
    ("variable", "said"),
    [
        ("FRAME_SWAP_WORKER_S", "did you mean 'FRAME_SWAP_WORKERS'?"),
        ("FRAMESWAP_WHEN", "did you mean 'FRAME_SWAP_WHEN'?"),
        ("FRAME_SWAP_WHEN", "choose one of 'ready', 'wait'"),
    ],
)
def test_a_wrong_variable(monkeypatch: pytest.MonkeyPatch, variable: str, said: str) -> None:
    monkeypatch.setenv(variable, "4")
    finding = only(doctor.variables())
    assert finding.verdict is WRONG
    assert variable in finding.found
    assert said in finding.found
    assert finding.advice


@pytest.mark.usefixtures("no_variables")
@pytest.mark.parametrize("variable", ["FRAME_SWAP", "FRAME_SWAP_DISABLE", "FRAME_SWAP_STRICT", "FRAME_SWAP_WORKER"])
def test_variables_that_are_no_settings_are_known(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv(variable, "1")
    assert only(doctor.variables()).verdict is NOTE


def test_with_a_value_that_cannot_be_used_nothing_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FRAME_SWAP_WORKERS", "0")
    finding = only(first_swap.swap("cpu"))
    assert finding.verdict is WRONG
    assert finding.found.startswith("not tried: FRAME_SWAP_WORKERS='0' cannot be used")
    assert only(doctor.cores()).verdict in (OK, NOTE)  # with the defaults


def test_with_frame_swap_disabled_nothing_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FRAME_SWAP_DISABLE", "1")
    assert only(first_swap.swap("cpu"))[1:] == (
        WRONG,
        "not tried: FRAME_SWAP_DISABLE is set",
        "unset FRAME_SWAP_DISABLE",
    )


# --- Compilers and GPUs ---


def test_the_compiler_builds() -> None:
    finding = only(doctor.compiler())
    assert finding.verdict is OK, finding
    assert re.search(r"\d+\.\d+", finding.found)


def test_no_compiler() -> None:
    with config.patch({"cpp.cxx": (None, "/nowhere/g++")}):
        finding = only(doctor.compiler())
    assert finding.verdict is WRONG
    assert "/nowhere/g++" in finding.found
    assert "CXX" in finding.advice


@pytest.mark.parametrize(
    ("header", "package"), [("Python.h", "python3-dev"), ("omp.h", "libomp-dev"), ("vector", "g++")]
)
def test_a_header_that_is_not_there(monkeypatch: pytest.MonkeyPatch, header: str, package: str) -> None:
    monkeypatch.setattr(doctor, "PROGRAM", f"#include <nowhere/{header}>")
    finding = only(doctor.compiler())
    assert finding.verdict is WRONG
    assert f"nowhere/{header}" in finding.found
    assert package in finding.advice


def test_a_gpu_needs_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    assert on("Triton", doctor.graphics()).verdict is OK
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(gpu, "triton_works", lambda: False)
    finding = only(doctor.graphics())
    assert finding[:2] == ("Triton", WRONG)
    assert "triton" in finding.advice


# --- Folders ---


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Inductor's cache folder, which is this user's alone. The store is on."""
    tmp_path.chmod(0o700)
    folder = tmp_path / "cache"
    folder.mkdir(0o700)
    monkeypatch.setenv(folders.INDUCTOR, str(folder))
    monkeypatch.delenv(folders.TRITON, raising=False)  # Inductor sets it where it has compiled for a GPU
    monkeypatch.setenv("FRAME_SWAP_STORE", "on")
    return folder


def test_safe_folders(cache: Path) -> None:
    found = findings(doctor.cache_folders())
    assert [finding.verdict for finding in found] == [OK, OK, OK], found
    assert found[0].found.startswith(f"{cache}, of {cache.owner()}, mode 0700, ")
    assert found[1].found.startswith(f"{cache}/frame_swap, to be made for you alone, ")
    assert not (cache / "frame_swap").exists()


def test_a_folder_that_others_may_write_to(cache: Path) -> None:
    cache.chmod(0o777)
    found = findings(doctor.cache_folders())
    assert [finding.verdict for finding in found] == [WRONG, WRONG, OK]  # the store is to be below it
    for finding, variable in zip(found, (folders.INDUCTOR, "FRAME_SWAP_STORE"), strict=False):
        assert f"{cache} is writable for others" in finding.found
        assert f"set {variable} to a folder of your own" in finding.advice


def test_a_folder_that_cannot_be_made(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (cache / "file").touch(0o600)
    monkeypatch.setenv("FRAME_SWAP_STORE", str(cache / "file" / "store"))
    assert on("store", doctor.cache_folders()).verdict is WRONG
    monkeypatch.setenv("FRAME_SWAP_STORE", str(cache / ("x" * 300)))
    settings._current = None
    assert "File name too long" in on("store", doctor.cache_folders()).found


def test_a_folder_that_can_only_be_read(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usual = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: usual(path, mode) and path != str(cache))
    found = findings(doctor.cache_folders())
    assert [finding.verdict for finding in found] == [WRONG, WRONG, OK]
    assert "you cannot write there" in found[0].found


def test_a_folder_that_libraries_do_not_load_from(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usual = os.statvfs
    monkeypatch.setattr(os, "ST_NOEXEC", 8, raising=False)

    def noexec(path: Any) -> os.statvfs_result:
        fields = list(usual(path))
        fields[8] |= 8
        return os.statvfs_result(fields)

    monkeypatch.setattr(os, "statvfs", noexec)
    found = findings(doctor.cache_folders())
    assert [finding.verdict for finding in found] == [WRONG, OK, WRONG]  # the store is only read
    assert "noexec" in found[0].found


def test_a_full_disk(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "LITTLE_SPACE", 1e18)
    for finding in doctor.cache_folders():
        assert finding.verdict is WRONG
        assert "free some space" in finding.advice


def test_no_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FRAME_SWAP_STORE", "off")
    assert on("store", doctor.cache_folders()).verdict is NOTE
    monkeypatch.setenv("FRAME_SWAP_STORE", "on")
    settings._current = None
    with config.patch(force_disable_caches=True):
        assert on("store", doctor.cache_folders()).verdict is NOTE


# --- The machine ---


def test_cores(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor, "CGROUP", tmp_path)  # no limits
    monkeypatch.setattr(machine, "usable_cpus", lambda: 16)
    assert only(doctor.cores()).verdict is OK
    monkeypatch.setenv("FRAME_SWAP_WORKERS", "15")
    settings._current = None
    assert only(doctor.cores()).verdict is NOTE


@pytest.mark.parametrize("said", ["max 100000", "1600000 100000", "800000 100000", "nonsense"])
def test_a_container_with_time_enough(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, said: str) -> None:
    monkeypatch.setattr(doctor, "CGROUP", tmp_path)
    monkeypatch.setattr(machine, "usable_cpus", lambda: 16)
    (tmp_path / "cpu.max").write_text(f"{said}\n")
    assert only(doctor.cores()).verdict is OK


def test_a_container_that_has_less_time_than_cores(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor, "CGROUP", tmp_path)
    monkeypatch.setattr(machine, "usable_cpus", lambda: 16)
    (tmp_path / "cpu.max").write_text("250000 100000\n")
    finding = only(doctor.cores())
    assert finding.verdict is WRONG
    assert "the time of 2.5 only" in finding.found
    assert finding.advice == "set FRAME_SWAP_WORKERS=1 and OMP_NUM_THREADS=2"


def test_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor, "CGROUP", tmp_path)
    assert only(doctor.memory()).verdict is NOTE  # there was no swap
    monkeypatch.setattr(first_swap, "memory_of_worker", lambda: 4e6)
    assert only(doctor.memory()).verdict is OK
    (tmp_path / "memory.max").write_text("3000000\n")
    assert only(doctor.memory()).verdict is WRONG
    (tmp_path / "memory.max").write_text("max\n")
    assert only(doctor.memory()).verdict is OK
    monkeypatch.setattr(first_swap, "memory_of_worker", lambda: psutil.virtual_memory().total * 0.9)
    monkeypatch.setenv("FRAME_SWAP_WORKERS", "2")
    settings._current = None
    assert only(doctor.memory()).advice == "set FRAME_SWAP_WORKERS=1"


# --- The swap ---


class Broken(Executor):
    """An executor whose workers can compile nothing."""

    def submit(self, *_: Any, **__: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_exception(RuntimeError("the cable is out"))
        return future


def test_a_compile_that_fails_is_said_with_the_reason() -> None:
    frame_swap.configure(executor=Broken())
    with pytest.warns(frame_swap.FrameSwapWarning, match="the cable is out"):
        finding = on("swap", first_swap.swap("cpu"))
    assert finding.verdict is WRONG
    assert finding.found.startswith("failed: ")
    assert "the cable is out" in finding.found
    assert finding.advice


def test_where_dynamo_is_off_no_graph_comes() -> None:
    with torch._dynamo.config.patch(disable=True):
        finding = only(first_swap.swap("cpu"))
    assert finding.verdict is WRONG
    assert finding.found == "torch.compile gave frame-swap no graph"


def test_a_call_that_raises_is_a_finding() -> None:
    finding = only(first_swap.swap("no such device"))
    assert finding[:2] == ("swap", WRONG)
    assert "no such device" in finding.found


def test_values_and_gradients_are_compared() -> None:
    inputs = torch.randn(8, 4), torch.randn(4, 2, requires_grad=True)
    step = first_swap.training_step(1.5)
    first_swap.compare(step, first_swap.training_step(1.5), inputs)
    with pytest.raises(AssertionError):
        first_swap.compare(step, first_swap.training_step(1.6), inputs)

    def without_gradient(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return step(x, weight) * 0.5 + step(x, weight).detach() * 0.5

    with pytest.raises(AssertionError):
        first_swap.compare(step, without_gradient, inputs)

"""`python -m frame_swap doctor`: does frame-swap work here, and if not, what is to be done?

Each check looks at one thing that a swap needs. Findings are printed as they come, since users take silence for a
hang. A check that raises is a finding, too: the doctor is for machines on which things do not work.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import platform
import shlex
import subprocess
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

import psutil
import torch
from rich.console import Console

from ... import enabling, settings
from ...artifacts import folders
from ...artifacts.store import chosen
from ...errors import FrameSwapWarning, UnsafeFolder, first_line, nearest
from ...farm.local import tokens
from ...guards import predicate
from ...internals import gpu, inductor, probe
from ...region.attempt import STRICT
from ...runtime import machine
from . import first_swap
from .findings import Check, Finding, Verdict, show

NO_SETTINGS = {
    enabling.VARIABLE: "with 1, torch.compile means frame-swap where it names no backend",
    "FRAME_SWAP_DISABLE": "with 1, stock Inductor compiles everything",
    STRICT: "for tests: an illegal change of a region's state raises",
    "FRAME_SWAP_WORKER": "marks a worker: `import frame_swap` starts none in this process",
    tokens.FOLDER: "is for workers",
    tokens.COUNT: "is for workers",
}
"""Variables of frame-swap's that no setting is read from, and what they do."""

LOADED_FROM = (folders.INDUCTOR, folders.TRITON, "TMPDIR")
"""Variables of the folders that libraries are loaded from."""

LITTLE_SPACE = 500e6
"""Bytes. A program of many graphs leaves some hundred megabytes in Inductor's cache."""

CGROUP = Path("/sys/fs/cgroup")
"""Where a container's limits are, in version 2 of Linux's control groups."""

PROGRAM = """
#include <Python.h>
#include <omp.h>
extern "C" long answer() { return PY_VERSION_HEX + omp_get_max_threads(); }
"""
"""C++ that includes what Inductor's kernels do."""


def run(device: str | None = None, *, names: bool = False) -> None:
    """Run all checks and print what they find.

    Args:
        device: where the swap is tried, by default a GPU if there is one.
        names: whether each private name of torch is listed.

    Raises:
        SystemExit: with status 1, where no swap worked.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    checks: list[Check] = [
        versions,
        functools.partial(private_names, listed=names),
        variables,
        compiler,
        graphics,
        cache_folders,
        cores,
        functools.partial(first_swap.swap, device),
        memory,
    ]
    console = Console(highlight=False, markup=False, emoji=False)
    found: list[Finding] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FrameSwapWarning)  # the findings say the same, with advice
        found.extend(examine(console, checks))
    works = any(one.subject == first_swap.SUBJECT and one.verdict is Verdict.OK for one in found)
    wrong = sum(one.verdict is Verdict.WRONG for one in found)
    rest = f"; {wrong} of the lines above {'say' if wrong > 1 else 'says'} that something is wrong" * bool(wrong)
    console.print(f"\nframe-swap {'works' if works else 'does not work'} here{rest}", soft_wrap=True)
    if not works:
        raise SystemExit(1)


def examine(console: Console, checks: Iterable[Check]) -> Iterator[Finding]:
    """The findings of `checks`, each printed before it is yielded."""
    for check in checks:
        try:
            for item in check():
                show(console, item)
                if isinstance(item, Finding):
                    yield item
        except Exception as error:
            name = getattr(check, "func", check).__name__.replace("_", " ")
            advice = "mend what the lines above say is wrong; if nothing is, report this as a fault of frame-swap"
            broken = Finding(name, Verdict.WRONG, f"this check failed: {first_line(error)}", advice)
            show(console, broken)
            yield broken


# --- torch ---


def versions() -> Iterator[Finding]:
    """The versions of Python and torch."""
    yield Finding("python", Verdict.OK, f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    if probe.version_checked():
        yield Finding("torch", Verdict.OK, torch.__version__)
    else:
        found = f"{torch.__version__}; frame-swap is tested on torch {probe.CHECKED}"
        yield Finding("torch", Verdict.WRONG, found, f"install torch {probe.CHECKED}")


def private_names(*, listed: bool = False) -> Iterator[Finding | str]:
    """Whether torch has each private name that frame-swap uses."""
    yield "looking up torch's private names, which imports Inductor ..."
    guards = Path(predicate.__file__)
    names = sorted({*probe.private_names(), *probe.private_names_of(guards)})
    at_import = probe.missing()
    missing = list(dict.fromkeys([*probe.missing_anywhere(), *probe.missing_from(guards)]))
    if at_import is not None and not at_import.startswith(tuple(missing)):  # Python adds the module's path
        missing.insert(0, at_import)
    if listed:
        yield from names
    for name in missing:
        effect = "nothing is swapped" if at_import else "some graphs are not swapped"
        yield Finding("private names", Verdict.WRONG, f"{name}: {effect}", f"install torch {probe.CHECKED}")
    if not missing:
        yield Finding("private names", Verdict.OK, f"torch has all {len(names)} that frame-swap uses")


# --- Settings ---


def variables() -> Iterator[Finding]:
    """The variables of frame-swap's that are set."""
    known = settings.variables()
    given = {name: text for name, text in os.environ.items() if _looks_like_ours(name) and text}
    for name, text in sorted(given.items()):
        found = f"{name}={text}"
        if name in known:
            try:
                value = getattr(settings.Settings.from_environment({name: text}), known[name])
            except ValueError as error:
                yield Finding("settings", Verdict.WRONG, str(error), f"change the variable {name}, or unset it")
            else:
                yield Finding("settings", Verdict.OK, f"{known[name]}={value!r}, from {found}")
        elif name in NO_SETTINGS:
            yield Finding("settings", Verdict.NOTE, f"{found}: {NO_SETTINGS[name]}")
        else:
            found += f" is no variable of frame-swap's{nearest(name, [*known, *NO_SETTINGS])}"
            yield Finding("settings", Verdict.WRONG, found, "docs/settings.md has all of them")
    if not given:
        yield Finding("settings", Verdict.OK, "all at their defaults: no variable FRAME_SWAP_... is set")


def _looks_like_ours(variable: str) -> bool:
    """Whether a variable is frame-swap's or was meant to be, such as FRAMESWAP_WORKERS and frame_swap_workers."""
    return variable.replace("_", "").upper().startswith("FRAMESWAP")


def _in_force() -> settings.Settings:
    """The settings in force; the defaults where a variable cannot be used, which `variables` says."""
    try:
        return settings.current()
    except ValueError:
        return settings.Settings()


# --- Compilers and GPUs ---


def compiler() -> Iterator[Finding | str]:
    """The C++ compiler, and whether it builds what Inductor's kernels include."""
    yield "building a small C++ library ..."
    try:
        name = inductor.cpp_compiler()
        said = subprocess.run([*shlex.split(name), "--version"], capture_output=True, text=True).stdout
        with tempfile.TemporaryDirectory() as folder:
            inductor.build_cpp(PROGRAM, folder)
    except Exception as error:  # such as those that Inductor makes of compilers' messages
        complaints = [line.strip() for line in str(error).splitlines() if "error:" in line or "cannot find" in line]
        found = complaints[0] if complaints else first_line(error)
        yield Finding("C++ compiler", Verdict.WRONG, found, _advice_on_compiler(found))
    else:
        yield Finding("C++ compiler", Verdict.OK, f"{name}: {said.partition(chr(10))[0]}")


def _advice_on_compiler(message: str) -> str:
    if "Python.h" in message:
        return "install Python's headers: the package python3-dev or python3-devel"
    if "omp.h" in message or "-lgomp" in message or "-lomp" in message:
        return "install OpenMP's headers and library: the package libomp-dev or libgomp"
    return "install a C++ compiler (g++ or clang), or name one in the variable CXX"


def graphics() -> Iterator[Finding]:
    """Triton and the GPUs."""
    there = torch.cuda.is_available()
    try:
        version = importlib.import_module("triton").__version__
    except ImportError:
        version = ""
    if there and not gpu.triton_works():
        found = f"{version} knows no device of this machine" if version else "is not installed"
        yield Finding("Triton", Verdict.WRONG, found, "install the triton that belongs to this torch")
    else:
        found = version or "is not installed"
        yield Finding("Triton", Verdict.OK, found if there else f"{found}; it is needed for a GPU only")
    build = torch.version.cuda or torch.version.hip
    if not there:
        reason = (
            f"this torch is built for CUDA {build}, and there is no GPU" if build else "torch is built for CPUs"
        )
        yield Finding("CUDA", Verdict.NOTE, reason)
    for index in range(torch.cuda.device_count() if there else 0):
        name, kind = torch.cuda.get_device_name(index), gpu.architecture(index)
        yield Finding("CUDA", Verdict.OK, f"{build}, driver {gpu.driver()}: {name} ({kind})")


# --- Folders ---


def cache_folders() -> Iterator[Finding]:
    """The folders that code is kept in and loaded from."""
    yield _folder("Inductor's cache", os.environ.get(folders.INDUCTOR) or folders.default_cache(), folders.INDUCTOR)
    if triton := os.environ.get(folders.TRITON):
        yield _folder("Triton's cache", triton, folders.TRITON)
    store = chosen.folder_of(_in_force())
    if store is None:
        yield Finding("store", Verdict.NOTE, "off: nothing is kept for the next run")
    elif inductor.caches_are_off():
        yield Finding("store", Verdict.NOTE, "off, with Inductor's caches: nothing is kept for the next run")
    else:
        yield _folder("store", store, "FRAME_SWAP_STORE")
    with tempfile.TemporaryDirectory() as inside:  # others may write to /tmp itself, which is sticky
        yield _folder("temporary files", tempfile.gettempdir(), "TMPDIR", checked=inside)


def _folder(subject: str, folder: str, variable: str, checked: str = "") -> Finding:
    """What is to be said of a folder that `variable` names, or could; `checked` is where others must not write."""
    another = f"set {variable} to a folder of your own"
    try:
        there = _nearest_that_exists(folder)
        described, free = f"{folder}, ", psutil.disk_usage(there).free
        if there == folder:
            described += f"{_owner(there)}, mode {os.stat(there).st_mode & 0o7777:04o}, "
        else:
            described += "to be made for you alone, "
        described += f"{free / 1e9:.1f} GB free"
        if not os.access(there, os.W_OK | os.X_OK):
            return Finding(subject, Verdict.WRONG, f"{described}; you cannot write there", another)
        with contextlib.nullcontext() if there == folder else contextlib.suppress(FileNotFoundError):
            folders.check(checked or folder)  # of a folder that is not there yet, the way to it
    except UnsafeFolder as error:
        found = f"{described}; others may put code there: {error}"
        return Finding(subject, Verdict.WRONG, found, f"chmod -R go-w makes your own safe; or {another}")
    except OSError as error:
        return Finding(subject, Verdict.WRONG, f"{folder}: {first_line(error)}", another)
    if variable in LOADED_FROM and os.statvfs(there).f_flag & getattr(os, "ST_NOEXEC", 0):
        return Finding(subject, Verdict.WRONG, f"{described}; mounted noexec: no library loads from there", another)
    if free < LITTLE_SPACE:
        return Finding(subject, Verdict.WRONG, described, f"free some space, or {another} on a disk that has some")
    return Finding(subject, Verdict.OK, f"{described}; nobody else can change what is yours there")


def _nearest_that_exists(folder: str) -> str:
    while not os.path.lexists(folder):
        folder = os.path.dirname(os.path.abspath(folder))
    return folder


def _owner(folder: str) -> str:
    try:
        return f"of {Path(folder).owner()}"
    except KeyError:
        return f"of user {os.stat(folder).st_uid}"


# --- The machine ---


def cores() -> Iterator[Finding]:
    """How the program and its workers share the cores."""
    usable, workers = machine.usable_cpus(), _in_force().workers
    found = (
        f"{usable} of {os.cpu_count()} are usable; {workers} at most for workers, which yield to the program "
        f"(niceness +{machine.NICENESS}); {machine.compilers()} compilers at a time in all workers together; the "
        f"program computes with {torch.get_num_threads()} threads"
    )
    quota = _cores_of_container()
    if quota < usable and workers > max(1, quota / 2):
        advice = f"set FRAME_SWAP_WORKERS={max(1, int(quota / 2))} and OMP_NUM_THREADS={max(1, int(quota))}"
        yield Finding("cores", Verdict.WRONG, f"{found}; but the container has the time of {quota:g} only", advice)
    elif machine.crowded_by(workers):
        yield Finding("cores", Verdict.NOTE, f"{found}. No core is free for them: steps before the swap are slower")
    else:
        yield Finding("cores", Verdict.OK, found)


def memory() -> Iterator[Finding]:
    """What workers take of the memory, by the one that has compiled the doctor's graph."""
    size, workers = first_swap.memory_of_worker(), _in_force().workers
    if size is None:
        yield Finding("memory", Verdict.NOTE, "a worker's is not known: none has compiled anything")
        return
    whole, free = psutil.virtual_memory().total, psutil.virtual_memory().available
    limit = _memory_of_container()
    found = f"{size / 1e9:.2f} GB a worker after its compile, {workers * size / 1e9:.1f} GB for {workers} at most; "
    found += f"{free / 1e9:.1f} of {min(whole, limit) / 1e9:.1f} GB are free"
    if workers * size > min(free, limit):
        advice = "set FRAME_SWAP_WORKERS=1" if workers > 1 else "end other programs, or run on a larger machine"
        yield Finding("memory", Verdict.WRONG, found, advice)
    else:
        yield Finding("memory", Verdict.OK, found)


def _cores_of_container() -> float:
    """How many cores' time a container may use; infinite without a limit."""
    quota, _, period = _limit("cpu.max").partition(" ")
    return int(quota) / int(period) if quota.isdigit() else float("inf")


def _memory_of_container() -> float:
    limit = _limit("memory.max")
    return int(limit) if limit.isdigit() else float("inf")


def _limit(name: str) -> str:
    try:
        return (CGROUP / name).read_text().strip()
    except OSError:
        return ""

"""The swap that `python -m frame_swap doctor` tries: a small training step, compiled for real."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import psutil
import torch
from torch import Tensor
from torch.nn import functional as F

from ... import settings
from ...control import report
from ...errors import first_line
from ...internals import probe
from ...region import Region, State, wait_for_compiles
from .findings import Finding, Verdict

SUBJECT = "swap"
"""The subject of the finding that says whether the swap worked."""

LIMIT = 300.0
"""Seconds that the compile may take, the worker's start included."""

SECONDS_BETWEEN_LINES = 10.0
"""Time between two lines that say that it still compiles."""

_ON_THE_WAY = (State.PENDING, State.READY, State.TRIAL)
_ADVICE = "mend what is wrong above; the logger frame_swap has the worker's traceback at level INFO"
_COMPARED = "FRAME_SWAP_DISABLE=1 shows whether plain Inductor computes the same; report it if not"


def swap(device: str) -> Iterator[Finding | str]:
    """Compile a training step on `device`, call it until compiled code is installed, and compare it with eager."""
    if settings.disabled():
        yield Finding(SUBJECT, Verdict.WRONG, "not tried: FRAME_SWAP_DISABLE is set", "unset FRAME_SWAP_DISABLE")
        return
    try:
        now = settings.current()
        # What would keep the code from being installed, or the compile from being a real one, does not apply here.
        settings.configure(
            store="off",
            when="ready",
            capture="call",
            delay=0.0,
            verify=0,
            profit=False,
            job_timeout=min(now.job_timeout, LIMIT),
        )
    except ValueError as error:
        yield Finding(SUBJECT, Verdict.WRONG, f"not tried: {error}", "change the variable, or unset it")
        return
    try:
        yield from _try(device)
    except AssertionError as error:
        yield Finding(SUBJECT, Verdict.WRONG, f"compiled code computes something else: {error}", _COMPARED)
    except Exception as error:
        yield Finding(SUBJECT, Verdict.WRONG, first_line(error), _ADVICE)


def _try(device: str) -> Iterator[Finding | str]:
    yield f"compiling a small training step on {device}: the first call ..."
    before = len(report().regions)
    # A number of this run's own: Inductor's cache has no code for it, so that its compilers have to run.
    step = training_step(1.0 + time.time() % 1.0)
    compiled = torch.compile(step, backend="frame_swap")
    inputs = torch.randn(64, 32, device=device), torch.randn(32, 16, device=device, requires_grad=True)
    began, clock = time.time(), time.perf_counter()
    torch.autograd.backward(compiled(*inputs))
    first = time.perf_counter() - clock
    region = _region(before)
    if region is None or region.state is State.FOREGROUND:
        yield Finding(SUBJECT, Verdict.WRONG, *_not_taken(region))
        return
    yield Finding("first call", Verdict.OK, f"{first:.1f} s, and it ran eager code")
    yield "a worker starts and compiles, while eager code serves calls ..."
    line_at = clock + SECONDS_BETWEEN_LINES
    while region.state in _ON_THE_WAY and time.perf_counter() - clock < LIMIT + 30:
        time.sleep(0.01)
        torch.autograd.backward(compiled(*inputs))
        region = _region(before) or region
        if time.perf_counter() > line_at:
            yield f"still compiling, after {time.perf_counter() - clock:.0f} s ..."
            line_at += SECONDS_BETWEEN_LINES
    wait_for_compiles(timeout=1.0)  # until its end is told: a warning comes before the finding
    if region.state is not State.INSTALLED:
        reason = region.reason or f"no compiled code after {LIMIT:g} s"
        yield Finding(SUBJECT, Verdict.WRONG, f"{region.state}: {reason}", _ADVICE)
        return
    compare(step, compiled, inputs)
    after = (region.installed_at or time.time()) - began
    yield Finding(SUBJECT, Verdict.OK, f"after {after:.1f} s{_parts(region)}; values and gradients equal eager's")


def training_step(factor: float) -> Callable[[Tensor, Tensor], Tensor]:
    """A function that has a matrix product and pointwise operators, for which Inductor writes kernels."""

    def step(x: Tensor, weight: Tensor) -> Tensor:
        return (F.gelu(x @ weight) * factor).sigmoid().sum(dim=-1).mean()

    return step


def compare(step: Callable[..., Tensor], compiled: Callable[..., Tensor], inputs: tuple[Tensor, Tensor]) -> None:
    """Check that the value and the gradient of `compiled` equal those of `step`.

    Raises:
        AssertionError: they do not.
    """
    x, weight = inputs
    sides = []
    for call in (step, compiled):
        value = call(x, weight)
        sides.append((value, *torch.autograd.grad(value, weight)))
    torch.testing.assert_close(*sides, rtol=1e-4, atol=1e-4)


def memory_of_worker() -> float | None:
    """Bytes that the worker of the latest swap holds; None where there was none, or where it has ended."""
    for region in reversed(report().regions):
        if region.worker_pid is not None:
            try:
                return float(psutil.Process(region.worker_pid).memory_info().rss)
            except psutil.Error:
                return None
    return None


def _region(before: int) -> Region | None:
    """The region of the doctor's graph; None where frame-swap got no graph."""
    return next(iter(report().regions[before:]), None)


def _not_taken(region: Region | None) -> tuple[str, str]:
    """Why frame-swap did not take the graph, and what to do."""
    if region is not None:
        return f"compiled in the foreground: {region.reason}", _ADVICE
    if (name := probe.missing()) is not None:
        return f"stock Inductor compiles in place of frame-swap: {name}", f"install torch {probe.CHECKED}"
    advice = "unset TORCH_COMPILE_DISABLE and TORCHDYNAMO_DISABLE, if one is set"
    return "torch.compile gave frame-swap no graph", advice


def _parts(region: Region) -> str:
    parts = {"waiting": region.queue_s, "compiling": region.compile_s, "loading": region.load_s}
    known = [f"{name} {seconds:.1f} s" for name, seconds in parts.items() if seconds is not None]
    return f" ({', '.join(known)})" * bool(known)

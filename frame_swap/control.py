"""What a program asks of frame-swap while it runs: the report, to wait for compiles, and to install their code."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from types import CodeType
from typing import Any

import torch

from .artifacts import exports
from .farm.service import service
from .internals import dynamo
from .region import Report, State, capturing, records, wait_for_compiles
from .region.under_way import name_of
from .serving.trampoline import Trampoline


def report() -> Report:
    """What has been captured so far, and what has become of it."""
    return Report((record.row() for record in records()), capturing())


def swap() -> Report:
    """Install all compiled code that is ready, on the calling thread; returns the report. For when="manual"."""
    for trampoline in _trampolines():
        trampoline.install(wait=True)
    return report()


def wait(timeout: float | None = None) -> Report:
    """Block until no compile is pending, at most `timeout` seconds; then install, except for when="manual".

    `ui.progress.wait`, which programs call, shows how far that is.
    """
    with service.hurried():
        wait_for_compiles(timeout)
    for trampoline in _trampolines():
        trampoline.install_unless_manual()
    return report()


def export(f: Callable[..., Any], path: str | os.PathLike[str]) -> tuple[str, ...]:
    """Write the AOTInductor package that serves the calls of `f`, for a program in C++ or another in Python.

    `artifact="aoti"` has to be set before `f` is captured, and the package be in place. It runs on the kind of CPU
    that it was compiled for, and returns the outputs of the graph.

    Args:
        f: compiled by frame-swap: what `torch.compile` or `opt_in` returned, or the function or module itself.
        path: of the file, by custom with the ending .pt2.

    Returns:
        Where `f` has the tensors that the package takes, in order, as Dynamo names them: "L['x']" is the argument
        `x`, and "L['self']._parameters['weight']" a parameter of the module.

    Raises:
        RuntimeError: no package serves `f`, or more than one; the text says why, and what to do.
        OSError: the file cannot be written.
    """
    code = _code_of(f)
    known = exports.known(code)
    found = [one for one in known if one.serves()]
    if len(found) != 1:
        raise RuntimeError(_why_not_one(code, len(found), len(known)))
    with open(path, "wb") as file:
        file.write(found[0].package)
    return found[0].inputs


def _code_of(f: Any) -> CodeType:
    """The code that Dynamo captures of `f`."""
    f = dynamo.uncompiled(f)
    if isinstance(f, torch.nn.Module):
        f = type(f).forward
    code = getattr(inspect.unwrap(f), "__code__", None)
    if not isinstance(code, CodeType):
        raise TypeError(f"{f!r} is neither a function nor a module")
    return code


def _why_not_one(code: CodeType, packages: int, known: int) -> str:
    """Args: how many packages serve `code`, and how many were made for it."""
    name = name_of(code)
    if packages:
        return (
            f"{packages} packages serve {name}: it was captured more than once, or in parts. Compile it with "
            "fullgraph=True, and for one kind of inputs, or with dynamic=True"
        )
    rows = [row for row in report().regions if row.frame == name]
    if not rows:
        return f"{name} has no compiled code: call it first, compiled by frame-swap"
    row = rows[-1]
    if row.state != State.INSTALLED:
        return f"{name} has no compiled code yet, but is {row.state}: frame_swap.wait(), and another call"
    if row.artifact != "aoti":
        why = row.artifact_reason or 'frame_swap.configure(artifact="aoti") asks for one, before the first call'
        return f"{name} has no package: {why}"
    if known:
        return f"the package of {name} has left Dynamo's cache: call it once more"
    wrappers = ", ".join(row.wrappers) or "inputs that change, and outputs that are views of inputs"
    return f"the package of {name} is no program by itself: AOTAutograd's wrappers remain for {wrappers}"


def _trampolines() -> list[Trampoline]:
    return [record.server for record in records() if record.server is not None]

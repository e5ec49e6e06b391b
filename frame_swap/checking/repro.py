"""Write what reproduces a difference between compiled code and eager to a folder; reproduce it from there.

    python -m frame_swap repro FOLDER

A folder holds the parcel that was compiled (`content.pickle`: graph and settings; `envelope.pickle`), the arguments
of a call and the sizes that the graph was compiled for (`call.pt`), and what differed (`difference.txt`). Only its
owner can open it (0700), since it contains the program's data. Its files are unpickled: a folder that others can
write to is refused.
"""

from __future__ import annotations

import os
import shlex
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..artifacts import folders, load
from ..errors import UnsafeFolder, UnusableFolder
from ..farm.compile import compile_graph
from ..farm.protocol import Request
from ..internals import inductor
from ..shipping import graph, values
from ..shipping.parcel import Parcel, open_content
from .arguments import with_history
from .comparison import Comparison

_CONTENT, _ENVELOPE, _CALL, _DIFFERENCE = "content.pickle", "envelope.pickle", "call.pt", "difference.txt"


def write(
    directory: str | None, parcel: Parcel, sizes: Mapping[str, int], arguments: Sequence[Any], difference: str
) -> Path:
    """Write a new folder in `directory`, by default the temporary one; return its path.

    Raises:
        OSError: it cannot be written.
    """
    if directory is not None:
        os.makedirs(directory, mode=0o700, exist_ok=True)
    made = tempfile.mkdtemp(prefix="frame-swap-repro-", dir=directory)  # with mode 0700
    folder = Path(made).absolute()  # so that the command that names it works in any folder
    (folder / _CONTENT).write_bytes(parcel.content)
    (folder / _ENVELOPE).write_bytes(parcel.envelope)
    values = [
        (x.detach(), x.requires_grad, x.is_leaf) if isinstance(x, Tensor) else (x, False, True) for x in arguments
    ]
    torch.save({"values": values, "sizes": dict(sizes)}, folder / _CALL)
    (folder / _DIFFERENCE).write_text(f"{difference}\n\n{command(folder)}\n")
    return folder


def command(folder: Path) -> str:
    """The shell command that reproduces the difference."""
    return shlex.join([sys.executable, "-m", "frame_swap", "repro", str(folder)])


def difference(folder: Path) -> str:
    """Compile the graph in `folder`, call the result and Dynamo's graph, op by op; return what differs, or "".

    Changes settings of the process.

    Raises:
        UnusableFolder: with the reason.
    """
    try:
        folders.check(str(folder))
        content, envelope = (folder / _CONTENT).read_bytes(), (folder / _ENVELOPE).read_bytes()
        call = torch.load(folder / _CALL, weights_only=False)
    except UnsafeFolder as error:
        raise UnusableFolder(f"what is in {folder} would be run, and others can write to it: {error}") from None
    except OSError as error:
        raise UnusableFolder(f"{folder} is no folder that frame-swap wrote: {error}") from None
    opened = open_content(content)
    frozen = values.save([value for value, *_ in call["values"][: opened.frozen]], None) if opened.frozen else None
    outcome = compile_graph(Request(content, envelope, call["sizes"], time.time(), frozen))
    if outcome.artifact is None:
        raise UnusableFolder(f"its graph does not compile: {outcome.error}\n{outcome.details}")
    constants = values.load(outcome.constants) if outcome.constants is not None else None
    compiled = load.load(outcome.artifact, opened.state, opened.options, constants, guarded=False)
    gm, _, _ = graph.unpack(opened.graph, call["sizes"])
    settings = opened.state.inductor_config(opened.options)
    with opened.state.applied_to_thread():
        arguments = tuple(_restored(*value) for value in call["values"])
        same_numbers = settings.get("fallback_random", inductor.inductor_config.fallback_random)
        return Comparison(gm, arguments, gm, same_numbers=same_numbers).difference(compiled.call)


def _restored(value: Any, requires_grad: bool, is_leaf: bool) -> Any:
    if not isinstance(value, Tensor) or not requires_grad:
        return value
    leaf = value.requires_grad_()
    return leaf if is_leaf else with_history(leaf)

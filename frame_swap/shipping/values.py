"""Tensors with their values, between the program and a worker: parameters there, folded constants back.

They go through a file where both see the program's folder, and as bytes where that is not known.

Guarantees:
- A file is in a folder that only its owner can open.
- What was loaded from a file keeps its values when the file is gone: nothing is written to it in between.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from torch.utils import serialization

from ..internals import fake_tensors

_config: Any = serialization.config

Values = str | bytes
"""The path of a file, or what would be in it."""


def save(values: Any, path: Path | None) -> Values:
    """Save tensors, in lists and dictionaries: to a file, or without a path as bytes."""
    with io.BytesIO() as stream, _config.patch({"save.compute_crc32": False}):  # that takes most of the time
        torch.save(values, stream if path is None else path)
        return stream.getvalue() if path is None else str(path)


def beside(saved: Values | None) -> Path | None:
    """Where an answer to `saved` goes: a file beside it; None where it came as bytes."""
    return Path(saved).with_suffix(".answer") if isinstance(saved, str) else None


def load(saved: Values | None) -> Any:
    """What was saved. Pages of a file are read when they are needed."""
    assert saved is not None
    with fake_tensors.none_made():  # while a frame is captured, torch.load makes tensors without values
        if isinstance(saved, str):
            return torch.load(saved, mmap=True, weights_only=False)
        return torch.load(io.BytesIO(saved), weights_only=False)

"""A header for artifacts: what the code was made for, its length and its digest.

A sealed artifact is a line of JSON, the header, and then the content, a pickle. The content is not read unless it
is whole and was made for a process like this one.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterable
from typing import Any

import torch

from ..errors import UnusableArtifact
from ..internals import gpu
from ..internals.cpu import Cpu, this_cpu

_FORMAT = 2


def made_for() -> dict[str, Any]:
    """The installation and the machine that code compiled in this process can be used with."""
    return {
        "frame-swap artifact": _FORMAT,
        "torch": str(torch.__version__),
        "python": sys.implementation.cache_tag,
        **this_cpu()._asdict(),
    }


def seal(content: bytes, gpus: Iterable[int] = ()) -> bytes:
    """`content` behind a header.

    Args:
        gpus: the indices of those that its code is for. The header names their architectures, and the driver.
    """
    header = {**made_for(), "length": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    if architectures := {str(index): gpu.architecture(index) for index in gpus}:
        header |= {"GPUs": architectures, "driver": gpu.driver()}
    return json.dumps(header).encode() + b"\n" + content


def unseal(artifact: bytes) -> memoryview:
    """The content that `seal` was given. Nothing of it has been interpreted.

    Raises:
        UnusableArtifact: the artifact is damaged, or made for another installation or machine.
    """
    end = artifact.find(b"\n", 0, 1 << 16)
    try:
        header = json.loads(artifact[:end]) if end >= 0 else None
    except ValueError:
        header = None
    if not isinstance(header, dict) or "frame-swap artifact" not in header:
        raise UnusableArtifact(f"its artifact has no valid header; {_NEXT_RUN}")
    if header["frame-swap artifact"] != _FORMAT:
        raise UnusableArtifact(f"its artifact is of another frame-swap; {_COMPILE_HERE}")
    content = memoryview(artifact)[end + 1 :]
    if len(content) != header.get("length"):
        raise UnusableArtifact(
            f"its artifact is not whole: {len(content)} of {header.get('length')} bytes; {_NEXT_RUN}"
        )
    if hashlib.sha256(content).hexdigest() != header.get("sha256"):
        raise UnusableArtifact(f"its artifact was changed after it was made; {_NEXT_RUN}")
    here = made_for()
    for name in ("torch", "python"):
        if header.get(name) != here[name]:
            raise UnusableArtifact(
                f"its artifact was made for {name} {header.get(name)}, here is {here[name]}; {_COMPILE_HERE}"
            )
    made_on = Cpu(header.get("architecture"), tuple(header.get("instructions", ())))
    if more := made_on.beyond(this_cpu()):
        raise UnusableArtifact(f"its artifact was made on a CPU that {more}, unlike this one; {_COMPILE_HERE}")
    for index, made in header.get("GPUs", {}).items():
        if made != (one := gpu.architecture(int(index))):
            raise UnusableArtifact(
                f"its artifact was made for GPU {index} with architecture {made}, here is {one}; {_COMPILE_HERE}"
            )
    if "driver" in header and header["driver"] != (driver := gpu.driver()):
        raise UnusableArtifact(
            f"its artifact was made for GPU driver {header['driver']}, here is {driver}; {_COMPILE_HERE}"
        )
    return content


def seal_for(key: str, content: bytes) -> bytes:
    """`content` behind a header, for a place that is known by `key`."""
    return seal(key.encode() + content)


def unseal_for(key: str, sealed: bytes) -> memoryview:
    """The content that `seal_for` was given. Nothing of it has been interpreted.

    Raises:
        UnusableArtifact: as `unseal`; or it was sealed for another key.
    """
    content, prefix = unseal(sealed), key.encode()
    if content[: len(prefix)] != prefix:
        raise UnusableArtifact(f"its artifact was made for another place; {_NEXT_RUN}")
    return content[len(prefix) :]


_NEXT_RUN = "the next run compiles it again"
_COMPILE_HERE = "compile on this machine with this installation, as frame_swap.configure(executor=None) does"

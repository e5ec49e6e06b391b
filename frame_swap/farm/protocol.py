"""What travels between the program and a worker: a request there, an outcome back. Plain, picklable values."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple


class Request(NamedTuple):
    """One compile.

    Attributes:
        content: what is compiled, as `shipping.parcel.pack` returns it.
        envelope: who asks, from the same call.
        sizes: values of symbols in the graph's shapes, by name; symbols not in it have the traced value.
        submitted: when the program asked, in seconds since the epoch.
        values: of the tensors that freezing makes constants, as `shipping.values.save` returns them.
        unpackaged: why it is to become no package of AOTInductor's, though the content says so; else "".
    """

    content: bytes
    envelope: bytes
    sizes: dict[str, int]
    submitted: float
    values: str | bytes | None = None
    unpackaged: str = ""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a worker sends back.

    Attributes:
        artifact: the compiled graph, forward and backward in one; None where the compile failed.
        late_guards: pickled list of sympy relations that the compile added to the shapes' guards.
        error: one line for the report; "" where all went well.
        details: the traceback in the worker, for the log.
        submitted, started, finished: seconds since the epoch: asked for, begun, ended.
        pid: the worker's process id.
        echo: what the compile left behind besides code, for `echo.replay`; also where it failed.
        remarks: what the user should be warned of besides.
        store: "found" where nothing was compiled, since the store had the artifact; "kept" where it has it now;
            else why it has not, or "" where there is no store.
        phases: of the compile, each with its name and when it began and ended, in seconds since the epoch.
        log: the file in which the worker says what it does; "" where it has none.
        constants: of the artifact, by name, where they hold values of the program's, as `shipping.values.save`
            returns them.
        unpackaged: why it is no package of AOTInductor's, where that was wished; else "".
    """

    artifact: bytes | None
    late_guards: bytes
    error: str
    details: str
    submitted: float
    started: float
    finished: float
    pid: int
    echo: bytes = b""
    remarks: tuple[str, ...] = ()
    store: str = ""
    phases: tuple[tuple[str, float, float], ...] = ()
    log: str = ""
    constants: str | bytes | None = None
    unpackaged: str = ""

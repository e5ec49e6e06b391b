"""What is sent to a worker: the content, which says what to compile, and the envelope, which says who asks.

Guarantees:
- The bytes of the content are the same for the same program in each process, whatever else that process has
  compiled, and whatever its hash seed, its temporary folder and its working folder: an artifact can be found by
  their digest. They change with the graph and its constants, with settings, options and custom operators.
- `pack` leaves the graph as it is.

Assumed: the program has the same files under the same paths each time. Where someone reads generated code, or CUDA
graphs are on, the graph holds the program's lines, and the content with it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import os
import pickle
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor
from torch.fx import GraphModule

from ..errors import Unshippable, first_line
from ..internals import fake_tensors, inductor
from ..internals.cpu import Cpu, this_cpu
from ..runtime.identity import this_machine, this_process
from ..runtime.patching import patched_environment
from ..settings import Artifact
from . import cacheable, graph, held, operators, triton_kernels
from .checks import check_graph, check_settings
from .echo import Audience
from .operators import Definitions
from .process_state import ProcessState, environment
from .triton_kernels import Kernels


class Parcel(NamedTuple):
    """A graph packed for a worker; with the process state and the options in it, which loading needs, too.

    Attributes:
        digest: of the content: SHA-256, in hexadecimal digits.
        uncacheable: why an artifact of it must not be kept for another process; "" where it may be.
        held: the tensors that the graph holds. Compiled code takes them as its first inputs.
        frozen: whether a worker needs their values, to make them constants of its code.
    """

    content: bytes
    envelope: bytes
    state: ProcessState
    options: dict[str, Any]
    digest: str
    uncacheable: str = ""
    held: tuple[Tensor, ...] = ()
    frozen: bool = False

    def loading(self) -> bytes:
        """What loading the artifact takes besides, pickled: the process state, and changes of Inductor's config."""
        return pickle.dumps((self.state, self.options))

    def with_options(self, options: dict[str, Any]) -> Parcel:
        """The same graph, to be compiled with other changes of Inductor's config, which leave its packing alone."""
        options = dict(sorted(options.items()))
        content = stable_pickle(open_content(self.content)._replace(options=options))
        return self._replace(content=content, options=options, digest=hashlib.sha256(content).hexdigest())


class Content(NamedTuple):
    """What is compiled. State and definitions must be in force before the graph is unpickled.

    Attributes:
        constant_floats: symbols of the graph's shapes whose floats Dynamo has made constant.
        custom_uuids: of settings that are code of the program's. For the digest only; a worker does not read them.
        frozen: how many of the inputs, from the first on, become constants with their values; None: Inductor does
            not freeze.
        artifact: what it is to become, as the setting says.
    """

    graph: bytes
    state: ProcessState
    options: dict[str, Any]
    definitions: Definitions | None
    kernels: Kernels | None
    constant_floats: tuple[str, ...]
    custom_uuids: tuple[str, ...]
    frozen: int | None
    artifact: Artifact


@dataclasses.dataclass(frozen=True)
class Envelope:
    """Who asks: it changes where a compile runs and what is heard of it, and nothing in the artifact.

    Attributes:
        process, machine: identities, of `runtime.identity`.
        audience: what the process listens to.
        environment: variables that name places and devices of the machine.
        search_path: the process's `sys.path`.
        compile_id: Dynamo's, as text.
        cpu: the machine's, which the code is to run on.
    """

    process: str
    machine: str
    audience: Audience
    environment: dict[str, str]
    search_path: tuple[str, ...]
    compile_id: str | None
    cpu: Cpu

    @classmethod
    def capture(cls, audience: Audience, compile_id: str | None) -> Envelope:
        """The envelope of the calling process."""
        path = tuple(map(os.path.abspath, sys.path))  # "" is the current folder
        variables = environment(of_machine=True)
        return cls(this_process(), this_machine(), audience, variables, path, compile_id, this_cpu())

    @property
    def asked_here(self) -> bool:
        """Whether the calling process is the one that asks, as in an executor of threads."""
        return self.process == this_process()

    def why_not_here(self) -> str:
        """Why what the calling process compiles could not run on the machine that asks; "" where it could."""
        more = this_cpu().beyond(self.cpu)
        if not more:
            return ""
        return (
            f"it was sent to a CPU that {more}, unlike the program's: Inductor compiles for the machine that it "
            "runs on; give the executor workers with the program's kind of CPU"
        )

    def extend_search_path(self) -> None:
        """Make the program's modules importable in a worker.

        On another machine too, since clusters share folders. The worker's own entries come first, and a folder
        that is not there is passed over.
        """
        here = set(map(os.path.abspath, sys.path))
        sys.path.extend(entry for entry in self.search_path if entry not in here)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Within the block, a worker on the program's machine has the program's variables.

        Another machine has its own compilers, devices and folders: a cache folder of the program's need not exist
        there, and one of that name might be another user's.
        """
        with patched_environment(self.environment if self.machine == this_machine() else {}):
            yield


def pack(
    gm: GraphModule,
    example_inputs: list[Any],
    options: dict[str, Any],
    compile_id: str | None = None,
    artifact: Artifact = "inductor",
) -> Parcel:
    """Serialise what a worker needs to compile `gm`.

    Args:
        options: changes of Inductor's config.
        compile_id: Dynamo's, as text.
        artifact: what it is to become.

    Raises:
        Unshippable: with the reason.
    """
    try:
        gm, tensors = held.lift(gm)
        example_inputs = [*tensors, *example_inputs]
        custom = check_graph(gm)
        inputs = [graph.fake_input(x) for x in example_inputs]
        state = ProcessState.capture(graph.devices(gm, inputs))
        settings = state.configs | {"options": dict(sorted(options.items()))}
        check_settings(settings)
        definitions = operators.definitions(custom) if custom else None
        audience = Audience.capture()
        with_lines = audience.reads_code or inductor.asks_for_cudagraphs(options)
        bare = graph.bare_copy(gm, inputs, with_lines=with_lines)
        kernels = triton_kernels.detach(bare)
        packed = graph.pack(bare, inputs)
        floats, uuids = fake_tensors.constant_floats(), cacheable.custom_uuids(settings)
        frozen = len(tensors) if _freezes(state, settings["options"]) else None
        content = stable_pickle(
            Content(packed, state, settings["options"], definitions, kernels, floats, uuids, frozen, artifact)
        )
        return Parcel(
            content,
            pickle.dumps(Envelope.capture(audience, compile_id)),
            state,
            settings["options"],
            hashlib.sha256(content).hexdigest(),
            cacheable.why_not(example_inputs, settings, audience, definitions, frozen=frozen is not None),
            tensors,
            frozen is not None,
        )
    except Unshippable:
        raise
    except Exception as error:
        raise Unshippable(f"the graph cannot be pickled: {first_line(error)}") from error


def _freezes(state: ProcessState, options: dict[str, Any]) -> bool:
    """Whether Inductor makes the values of parameters constants; it does so only where nothing needs gradients."""
    return bool(state.inductor_config(options).get("freezing")) and not state.grad


def repacked(content: bytes) -> Parcel:
    """The parcel of a content that an earlier run has packed; this process asks for it, and hears nothing of it."""
    nobody = Audience({}, frozenset(), False, False)
    opened, envelope = open_content(content), pickle.dumps(Envelope.capture(nobody, None))
    return Parcel(content, envelope, opened.state, opened.options, hashlib.sha256(content).hexdigest())


def open_content(content: bytes) -> Content:
    """The content of a parcel."""
    opened: Content = pickle.loads(content)
    return opened


def open_envelope(envelope: bytes) -> Envelope:
    """The envelope of a parcel."""
    opened: Envelope = pickle.loads(envelope)
    return opened


def stable_pickle(value: Any) -> bytes:
    """Bytes that depend on what `value` equals: not on which of its strings are one object, nor on hashes."""
    with io.BytesIO() as stream:
        _Pickler(stream).dump(value)
        return stream.getvalue()


_Python: Any = pickle._Pickler


class _Pickler(_Python):  # type: ignore[misc]  # the one in C does not ask about strings and sets
    def save(self, obj: Any, save_persistent_id: bool = True) -> None:
        super().save(sys.intern(obj) if type(obj) is str else obj, save_persistent_id)

    def reducer_override(self, obj: Any) -> Any:
        if type(obj) in (set, frozenset):
            return type(obj), (sorted(obj, key=stable_pickle),)
        return NotImplemented

"""Steps 5 to 7 of a frame's life: one delivery brings the outcome of one compile into the frame.

5 compile   a worker runs all of Inductor and sends back one artifact
6 load      the loader thread makes the artifact callable and prepares the frame's code
7 install   the trampoline puts that code into the frame's cache entry, at the next call

Guarantees:
- `arrived` raises nothing. Each way in which compiled code can fail to come ends the attempt, with a reason.
- A delivery that is no longer wanted loads nothing.

Assumed: `arrived` runs on the loader thread, or on the user's where Dynamo waits for it (`when="wait"`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import pickle
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from types import CodeType
from typing import Any

import torch

from . import guards, settings
from .artifacts import exports, load
from .artifacts.compiled import Compiled
from .checking import repro
from .checking.profit import Measurement
from .checking.trial import Trial
from .checking.verify import Verification
from .errors import FrameGone, FrameSwapWarning, UnusableArtifact, first_line
from .farm import reuse
from .farm.protocol import Outcome
from .farm.queue import Demand
from .farm.service import Job, service
from .internals import dynamo, eager, fake_tensors, inductor
from .internals.cuda_graphs import Recording
from .late_guards.condition import condition_of
from .late_guards.specialiser import Specialiser
from .region import Attempt, Event, Purpose, Record, State, is_quiet
from .serving.plan import Offer, Served
from .serving.trampoline import Trampoline
from .shipping import echo, values
from .shipping.parcel import Parcel

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Order:
    """What to compile for a region, and what becomes of the result.

    Attributes:
        record: the region.
        parcel: the packed graph.
        size: how many nodes the graph has.
        options: changes of Inductor's config.
        shapes: the symbols in the graph's shapes, and what the frame's guards say of them.
        limit: the most compiles for other sizes: as many as Dynamo's recompiles of a frame.
        settings: those in force at capture.
        graph: Dynamo's with the held tensors as inputs, where compiled code is to be verified; else None.
        repeatable: whether a call that raised may be made again, as far as the graph is concerned.
        autotuned: changes of Inductor's config for better code, once there is some; None where there is no other.
        must_gain: whether code that replaces other code has to be faster.
        code: of the user's function; None where the graph was called outside of a frame.
        inputs: where the frame has the graph's inputs, as Dynamo names them.
    """

    record: Record
    parcel: Parcel
    size: int
    options: dict[str, Any]
    shapes: fake_tensors.FrameShapes
    limit: int
    settings: settings.Settings
    graph: torch.fx.GraphModule | None
    repeatable: bool
    autotuned: dict[str, Any] | None = None
    must_gain: bool = False
    code: CodeType | None = None
    inputs: tuple[str, ...] = ()

    def for_autotuned(self) -> Order | None:
        """The order for better code; None where there is no other."""
        if self.autotuned is None:
            return None
        parcel = self.parcel.with_options(self.autotuned)
        return dataclasses.replace(self, parcel=parcel, options=self.autotuned, autotuned=None, must_gain=True)


class Delivery:
    """One compile for a region, from the request to the offer of its code.

    Args:
        order: what to compile.
        attempt: the compile's record.
        sizes: of symbols, by name, where they are to differ from those at capture.
        replaces: the compile whose code this one's is to replace, for the same calls.
    """

    def __init__(
        self,
        order: Order,
        attempt: Attempt,
        sizes: dict[str, int] | None = None,
        replaces: Attempt | None = None,
    ) -> None:
        self._order = order
        self._attempt = attempt
        self._sizes = sizes
        self._replaces = replaces
        reuse.uses.begins()
        self._at = reuse.place_of(order.parcel, sizes, order.settings)
        self._changes = self._changes_of_held()
        self._from_store = self._made_again = False
        attempt.autotuned = inductor.autotunes(order.options)

    def find(self) -> Outcome | None:
        """The outcome of this compile in an earlier run or another process; None where it has yet to be made."""
        return reuse.find(self._at)

    def request(self, *, deliver: bool = True) -> Job:
        """Submit the compile. Its outcome goes to `arrived`; without `deliver` the caller waits for the job."""
        order, attempt, calls = self._order, self._attempt, self._order.record.eager_calls

        def calls_since() -> int:
            return order.record.eager_calls - calls

        demand = Demand(calls_since, order.size, not deliver, attempt.begins, attempt.tried_again)
        attempt.tell("shipped", order.record.ship_s, f"{order.size} nodes")
        if self._at is not None:
            reuse.uses.asked(self._at, order.parcel, self._sizes or {}, lambda: attempt.state is State.PENDING)
        job = service.submit(order.parcel, self.arrived if deliver else None, self._sizes, demand, self._at)
        self._attempt.began(job.cancel)
        return job

    def arrived(self, outcome: Outcome, *, frame_open: bool = False) -> None:
        """A worker has sent `outcome`; `frame_open`: Dynamo still traces the frame, and waits for this."""
        # 5. Compile
        attempt, record = self._attempt, self._order.record
        attempt.compiled(outcome.submitted, outcome.started, outcome.finished, outcome.pid, outcome.phases)
        echo.replay(outcome.echo, record.compile_id or None)
        for remark in outcome.remarks:
            _warn_once(remark)
        whose = f"in worker {outcome.pid}, whose log is {outcome.log}" if outcome.log else ""
        if outcome.artifact is None:
            log.info("frame-swap: compile of %s failed %s\n%s", record, whose, outcome.details)
            self._give_up(Event.FAILED, f"its compile failed: {outcome.error}")
            return
        attempt.artifact_bytes = len(outcome.artifact)
        what = "found" if outcome.store == "found" else "compiled"
        attempt.tell(what, attempt.compile_s, f"{attempt.artifact_bytes / 1e3:.0f} kB", whose)
        reason = self._order.parcel.uncacheable
        attempt.store = outcome.store or (f"not kept: {reason}" if reason else "")
        self._from_store = outcome.store == "found"
        if self._at is not None:
            reuse.uses.came(self._at, record.frame, lambda: record.eager_calls)

        # 6. Load
        trampoline: Trampoline | None
        with dynamo.compile_lock:  # Dynamo is done with the frame then: the frame calls the trampoline
            trampoline = record.server
            offer = self._offer(trampoline, outcome, frame_open) if trampoline is not None else None

        # 7. Install
        if trampoline is None:
            record.abandon()
        elif offer is not None:  # without the lock, which the next call needs
            trampoline.offer(offer)
            if offer.replaces is not None:  # calls go straight to what it is to replace, and none comes by
                trampoline.install_unless_manual()

    def _ask_for_better(self) -> None:
        """Now that there is code, compile the autotuned code that may replace it."""
        try:
            if (better := self._order.for_autotuned()) is not None:
                request(better, Purpose.BETTER, self._sizes, replaces=self._attempt)
        except Exception:
            log.warning("frame-swap: no autotuned code for %s", self._order.record, exc_info=True)

    def _offer(self, trampoline: Trampoline, outcome: Outcome, frame_open: bool) -> Offer | None:
        """Load the artifact and prepare the frame's code; None where that ends the attempt."""
        record = self._order.record
        try:
            with self._attempt.journal.span("load"):
                return self._loaded(trampoline, outcome, frame_open)
        except guards.Inexpressible as error:
            self._give_up(Event.REJECTED, f"a late guard: {error}")
        except UnusableArtifact as error:
            if not self._make_again(error, frame_open):
                self._give_up(Event.REJECTED, str(error))
        except FrameGone:
            record.abandon()
        except Exception as error:
            if service.stopped:  # imports fail while the interpreter exits, and nobody wants to know
                return None
            if self._make_again(error, frame_open):
                return None
            log.info("frame-swap: loading %s failed", record, exc_info=True)
            self._give_up(Event.FAILED, f"loading its compiled code failed: {type(error).__name__}: {error}")
        return None

    def _keep_for_export(self, compiled: Compiled) -> None:
        """Let `frame_swap.export` find a package that is about to serve, if all its inputs are the frame's."""
        order, attempt = self._order, self._attempt
        if compiled.package is None or order.code is None or order.parcel.held:
            return
        taken = range(len(order.inputs)) if compiled.taken is None else compiled.taken
        runner = weakref.ref(getattr(compiled.boxed, "__self__", compiled.boxed))  # dies with the frame's code

        def serves() -> bool:
            return runner() is not None and attempt.state is State.INSTALLED

        inputs = tuple(order.inputs[at] for at in taken)
        exports.keep(order.code, exports.Installed(compiled.package, inputs, serves))

    def _loaded(self, trampoline: Trampoline, outcome: Outcome, frame_open: bool) -> Offer:
        order, attempt = self._order, self._attempt
        assert outcome.artifact is not None
        guarded = trampoline.site is not None
        compiled = reuse.uses.take(self._at) if guarded else None
        if compiled is None:
            constants = values.load(outcome.constants) if outcome.constants is not None else None
            if order.parcel.frozen and self._changes != self._changes_of_held():
                raise UnusableArtifact("a parameter has changed since its value became a constant of the code")
            # Where each first call waits, no other graph is awaited when code runs.
            recording = Recording(is_quiet) if order.settings.when != "wait" else None
            compiled = load.load(
                outcome.artifact,
                order.parcel.state,
                order.options,
                constants,
                guarded=guarded,
                recording=recording,
            )
            if recording is not None and recording.planned:
                attempt.recording = recording
        attempt.wrappers = compiled.wrappers
        attempt.artifact, attempt.artifact_reason = compiled.kind, outcome.unpackaged
        self._keep_for_export(compiled)
        trials = tuple(self._trials(compiled.call))
        compiled = compiled.holding(order.parcel.held)
        if not order.repeatable:
            compiled = compiled._replace(repeatable=False)
        relations = pickle.loads(outcome.late_guards)
        # Late guards of code from the store stay late, as they were for the run that compiled it. As guards of
        # the frame they would have Dynamo capture it anew for sizes whose code the store has for this region.
        if frame_open and (order.settings.when == "wait" or not self._from_store):
            order.shapes.guard_on(relations)
        condition, attempt.late_guards = condition_of(relations, order.shapes)
        if condition is not None and trampoline.specialiser is None:
            trampoline.specialiser = Specialiser(order.shapes.sizes, self._specialise, order.limit)
        awaited = frame_open and not trampoline.is_ahead
        served = Served.of(attempt, compiled, condition)
        offer = Offer(served, trials, self._replaces, awaited=awaited)
        self._ask_for_better()  # before the first is in place: the frame then keeps what leads to it
        if not frame_open:  # an open frame has no code yet
            trampoline.prepare(offer)
        return offer

    def _changes_of_held(self) -> list[int]:
        return [eager.times_changed(tensor) for tensor in self._order.parcel.held]

    def _make_again(self, error: Exception, frame_open: bool) -> bool:
        """Whether what cannot be loaded came from the store: then it is removed there, and compiled once more."""
        if not self._from_store or self._made_again or self._at is None:
            return False
        self._made_again = True
        log.warning("frame-swap: %s cannot be loaded, and is compiled again: %s", self._at.key, first_line(error))
        self._at.store.remove(self._at.key)
        if self._at.store.has(self._at.key):  # it can only be read
            self._at = None
        self._attempt.begin_again(first_line(error))
        waits = frame_open and self._order.settings.when == "wait"
        job = self.request(deliver=not waits)
        if waits:
            self.arrived(job.wait(), frame_open=True)
        return True

    def _trials(self, compiled: Callable[..., Any]) -> Iterator[Trial]:
        """What the code has to pass before it is installed; `compiled` takes the held tensors, too."""
        order = self._order
        if order.graph is not None:
            options = order.parcel.state.inductor_config(order.options)
            yield Verification(
                order.settings.verify,
                order.graph,
                self._keep_repro,
                held=order.parcel.held,
                compiled=compiled,
                same_numbers=bool(options.get("fallback_random", False)),
                repeatable=order.repeatable,
            )
        must_gain = order.must_gain and self._replaces is not None
        if order.settings.profit or must_gain:
            yield Measurement(undisturbed=lambda: not service.compiling, must_gain=must_gain)

    def _keep_repro(self, arguments: Sequence[Any], difference: str) -> str:
        order = self._order
        if self._at is not None:  # the next run might not verify
            self._at.store.remove(self._at.key)
        try:
            folder = repro.write(order.settings.repro_dir, order.parcel, self._sizes or {}, arguments, difference)
        except Exception as error:
            return f"what it takes to repeat that could not be kept: {first_line(error)}"
        return f"to see it again: {repro.command(folder)}"

    def _specialise(self, sizes: dict[str, int]) -> None:
        """Compile for other sizes, which no code fits."""
        request(self._order, Purpose.SIZES, sizes)

    def _give_up(self, event: Event, reason: str) -> None:
        """The code will not come; calls of other sizes than its may ask for more."""
        trampoline: Trampoline | None = self._order.record.server
        self._attempt.fail(event, reason)
        if trampoline is not None and trampoline.specialiser is not None and self._replaces is None:
            trampoline.specialiser.resume()


def request(
    order: Order, purpose: Purpose, sizes: dict[str, int] | None = None, replaces: Attempt | None = None
) -> Attempt:
    """Compile once more for a region that has been captured; returns the compile's record.

    Args:
        purpose: BETTER with `replaces`, SIZES with `sizes`.
        sizes, replaces: as for `Delivery`.
    """
    attempt = Attempt(order.record, purpose)
    try:
        order.record.begin(attempt)
        Delivery(order, attempt, sizes, replaces).request()
    except BaseException:
        attempt.move(Event.ABANDONED, "it was interrupted while it asked for a compile")
        raise
    return attempt


@functools.cache
def _warn_once(remark: str) -> None:
    with contextlib.suppress(Warning):  # a filter may turn it into an error, which must not reach a call
        warnings.warn(f"frame-swap: {remark}", FrameSwapWarning, stacklevel=2)

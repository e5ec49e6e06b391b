"""What a frame calls until compiled code is in, and afterwards where no code fits the call or where code raises.

Guarantees:
- A call through a trampoline is served: by eager code until compiled code is installed, by compiled code that fits
  it then, and by eager code again where none fits. It raises only what the graph itself raises. It never waits,
  but for a first call whose code came in its capture: up to `PATIENCE` seconds for Dynamo's compile lock.
- A call whose compiled code raises is made again on eager code, however compiled code was called, unless it may
  have changed something by then. From then on the frame is on eager code for good, with one warning; calls under
  way in compiled code on other threads end there, or are made again too. If eager code raises as well, that error
  is the caller's. An error that is no `Exception`, `torch.OutOfMemoryError`, and one that comes up
  while a dispatch mode or hooks on saved tensors are active pass as they are.
- Code on trial serves, if at all, one call at a time; other calls are served as if there was none. A trial ends
  with the call that decides it, on that call's thread: with the code installed, in the next trial, or rejected.
- Each offer is installed once, in the order of arrival, by the thread that comes first; others go on meanwhile.
- Code is installed under Dynamo's compile lock: nothing else changes the frame's cache meanwhile, and no fork comes
  in between. A call that finds the lock taken, by a capture, a reset or a load in another thread, leaves the
  install to a later call. So does the way back to eager code; until then, each call that raises is made again.
- An interrupt (`KeyboardInterrupt`) is raised when the install that it came into is done. No lock stays taken.
- Rewritten code names a trampoline only where a call may have to be made again, or while more code is awaited. When
  the code object that names it goes, the trampoline goes, and with it eager code, compiled code and jobs.
- A forked child goes on with what is installed or loaded.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from typing import Any, NamedTuple

import torch

from .. import settings
from ..artifacts.compiled import is_repeatable
from ..checking.trial import Findings, Sides, Trial
from ..codegen.calls import Target
from ..errors import FrameGone, Indirect, UnknownLayout, first_line
from ..frames.call_site import Calls, CallSite, Rewrite
from ..internals import aot, dynamo
from ..late_guards.specialiser import Specialiser
from ..region import Attempt, Event, Purpose, Record, State
from ..runtime import locks
from .plan import Offer, Offers, Plan, Served, planned

log = logging.getLogger(__name__)

PATIENCE = 1.0
"""Several times what a load takes that another thread has begun."""

_A_CHECK_REMAINS = "a check remains on each call"


class _Prepared(NamedTuple):
    """What installing an offer puts in place, made ahead of it.

    Attributes:
        offer: the one that this was made for.
        before, after: what serves calls before and after.
        rewrite: for the frame; None where it cannot be rewritten.
        remark: why not.
    """

    offer: Offer
    before: Plan
    after: Plan
    rewrite: Rewrite | None
    remark: str


class Trampoline:
    """Serves the calls of a region for as long as the frame does not call compiled code by itself.

    Args:
        record: the region.
        eager: its eager code; takes the graph's inputs, and returns the tuple of its outputs.
        when: the setting of `frame_swap.configure` that holds for this graph.

    Attributes:
        site: where the frame calls this; None where none does.
        specialiser: told of each call that no compiled code fits; None while there is no late guard.
        is_ahead: whether the frame was captured in the background, and no call has come from it. Its code may not
            be in Dynamo's cache yet: installs wait for that call.
    """

    def __init__(self, record: Record, eager: Callable[..., Any], when: settings.When) -> None:
        self._record = record
        self.eager = eager
        self.site: CallSite | None = None
        self.specialiser: Specialiser | None = None
        self.is_ahead = False
        self._plan: Plan = ()
        self._offers = Offers()
        self._prepared: _Prepared | None = None
        self._trying = threading.Lock()
        self._when = when
        record.served_by(self)

    # Calls

    def __call__(self, *args: Any) -> Any:
        self.is_ahead = False
        if (offer := self._offers.first) is not None:
            if self._when != "manual":
                if offer.awaited:  # by this call, and no other
                    self._offers.exchange_first(offer, offer._replace(awaited=False))
                self.install(wait=PATIENCE if offer.awaited else False)
            if (on_trial := self._on_trial(args)) is not None:
                return self._call_on_trial(on_trial, args)
            if self._served_for(args) is offer.served:
                with offer.attempt.journal.span("first compiled call"):
                    return self._call_compiled(offer.served, args)
        if (served := self._served_for(args)) is not None:
            return self._call_compiled(served, args)
        if (specialiser := self.specialiser) is not None:
            specialiser.ask(args)
        return self._call_eager(args)

    def recover(self, error: Exception, /, *args: Any) -> Any:
        """What a call with `args` returns in which compiled code, or eager code, raised `error`.

        Random numbers that compiled code has drawn by then stay drawn.

        Raises:
            error: where the call may not be made again.
        """
        try:
            return self._recover(next((s for s in self._plan if s.serves(args)), None), error, args)
        finally:
            del error  # its traceback leads to this frame, and to those that wait for it

    def _call_compiled(self, served: Served, args: Sequence[Any]) -> Any:
        try:
            return served.compiled.call(*args)
        except Exception as error:
            failure = error
        try:
            return self._recover(served, failure, args)
        finally:
            del failure  # as in `recover`

    def _recover(self, served: Served | None, error: Exception, args: Sequence[Any]) -> Any:
        try:
            if (
                served is None
                or not served.compiled.repeatable
                or not is_repeatable(error)
                or isinstance(error, torch.OutOfMemoryError)  # eager code needs more; the caller may try with less
                or aot.runs_hooks()  # theirs, perhaps: activation checkpointing ends a recomputation so
            ):
                raise error
            log.info("frame-swap: compiled code of %s raised", self._record, exc_info=error)
            reason = f"its compiled code raised {first_line(error)}"
            error.__traceback__ = None  # it holds what the call had in memory
        finally:
            del error  # as in `recover`
        outputs = self._call_eager(args)
        if (offer := self._offers.first) and offer.served is served and offer.replaces is not None:
            self._reject_offer(offer, reason)
        else:
            self.reject(reason)
        return outputs

    def _call_eager(self, args: Sequence[Any]) -> Any:
        self._record.eager_calls += 1
        return self.eager(*args)

    def compiled_for(self, args: Sequence[Any]) -> Callable[..., Any] | None:
        """Compiled code that is in place and fits a call with the graph's inputs `args`."""
        served = self._served_for(args)
        return served and served.compiled.call

    def _served_for(self, args: Sequence[Any]) -> Served | None:
        in_place = (served for served in self._plan if served.attempt.state is State.INSTALLED)
        return next((served for served in in_place if served.serves(args)), None)

    # Trials

    def _on_trial(self, args: Sequence[Any]) -> Offer | None:
        """The offer on trial, if a call with `args` could be part of the trial."""
        offer = self._offers.first
        if offer is None or offer.attempt.state is not State.TRIAL or not offer.served.serves(args):
            return None
        served = self._served_for(args)
        return offer if served is None or served.attempt is offer.replaces else None

    def _call_on_trial(self, offer: Offer, args: Sequence[Any]) -> Any:
        """Serve a call while compiled code is on trial: one at a time is part of it."""
        current = self._served_for(args)

        def call_current(*args: Any) -> Any:
            return self._call_eager(args) if current is None else self._call_compiled(current, args)

        with ExitStack() as stack:
            if self._trying.acquire(blocking=False):
                stack.callback(self._trying.release)
                if offer in self._offers and offer.attempt.state is State.TRIAL:
                    trial = offer.trials[0]
                    sides = Sides(
                        call_current,
                        lambda *args: self._call_compiled(offer.served, args),
                        self.eager,
                    )
                    try:
                        return trial.call(sides, args)
                    finally:
                        _note(offer.attempt, trial.findings)
                        if trial.verdict is not None:
                            self._end_trial(offer, trial)
        return call_current(*args)

    def _end_trial(self, offer: Offer, trial: Trial) -> None:
        if offer.attempt.state is not State.TRIAL:  # the code on trial has raised
            return
        if not trial.verdict:
            remark = "; ".join(filter(None, [offer.remark, trial.remark]))
            self._offers.exchange_first(offer, offer._replace(trials=offer.trials[1:], remark=remark))
            offer.attempt.move(Event.PASSED)
            self.install()
        elif offer.replaces is None:
            self.reject(trial.verdict)
        else:
            self._reject_offer(offer, trial.verdict, warn=not trial.expected)

    # Offers

    @property
    def offered(self) -> bool:
        """Whether compiled code waits to be installed."""
        offer = self._offers.first
        return offer is not None and offer.attempt.state is State.READY

    def prepare(self, offer: Offer) -> None:
        """Make the code that installing `offer` puts in place: on the loader thread, so that no call does it."""
        self._prepared = self._prepare(offer)

    def offer(self, offer: Offer) -> None:
        """Compiled code is loaded."""
        self._offers.append(offer)
        # This wakes waiters, who may ask for more: keep it last.
        if not offer.attempt.move(Event.LOADED):  # nobody wants it any more
            self._drop(offer)

    def install(self, wait: bool | float = False) -> None:
        """Install what was offered, if anything was. Where that fails, what serves calls stays.

        Args:
            wait: whether, or for how many seconds, to wait until no other thread compiles or installs. Otherwise a
                later call does it.
        """
        try:
            while self.offered and locks.call_holding(dynamo.compile_lock, self._install_to_the_end, wait=wait):
                pass
        except FrameGone:
            if not self.is_ahead or self.site is None or self.site.is_gone:
                self._withdraw()
                self._record.abandon()
        except Exception as error:
            if (offer := self._offers.first) is not None:
                self._reject_offer(offer, f"installing failed: {type(error).__name__}: {error}", Event.FAILED)

    def frame_gone(self) -> None:
        """Drop prepared code, which leads back here past the garbage collector's sight."""
        self._prepared = None

    def install_unless_manual(self) -> None:
        """Do what the next call would do."""
        if self._when != "manual":
            self.install(wait=True)

    def _install_to_the_end(self) -> None:
        try:
            self._install()
        except Exception:
            raise
        except BaseException:  # an interrupt: the frame may be rewritten already, and then no call comes by again
            self._install()
            raise

    def _install(self) -> None:
        """Install the first offer, or begin its trial. Interrupted and done again, it comes to the same end."""
        if (offer := self._offers.first) is None:
            return
        if offer.attempt.state not in (State.READY, State.TRIAL, State.INSTALLED):
            self._drop(offer)
        elif offer.trials:
            if offer.replaces is not None:
                self._lead_here(offer)
            offer.attempt.move(Event.TRIED)
        else:
            with offer.attempt.journal.span("install"):
                remark = self._put_in_place(offer)
            if offer.attempt.state is not State.INSTALLED:
                offer.attempt.installed_at = time.time()
            offer.attempt.move(Event.INSTALLED, "; ".join(filter(None, [remark, offer.remark])))
            self._drop(offer)  # not before: a call whose interrupt came earlier does it again

    def _drop(self, offer: Offer) -> None:
        with suppress(ValueError):
            self._offers.remove(offer)
        prepared = self._prepared
        if prepared is not None and prepared.offer.attempt is offer.attempt:
            self._prepared = None

    def _withdraw(self) -> None:
        """Forget all offers. Prepared code leads back to this trampoline, past the garbage collector's sight."""
        self._offers.clear()
        self._prepared = None

    def _prepare(self, offer: Offer) -> _Prepared:
        before = self._plan
        after = before
        if all(served.attempt is not offer.attempt for served in before):
            after = planned(before, offer)
        try:
            return _Prepared(offer, before, after, self._rewrite(after, self._more_than(offer)), "")
        except Indirect as error:
            return _Prepared(offer, before, after, None, f"{error}: {_A_CHECK_REMAINS}")

    def _rewrite(self, plan: Plan, more: bool = True) -> Rewrite:
        if self.site is None:
            raise Indirect("called outside of a Dynamo frame")
        targets = [Target(s.compiled.call, s.compiled.boxed, s.condition) for s in plan]
        recovers = any(served.compiled.repeatable for served in plan)
        return self.site.rewrite(Calls(targets, recovers, more))

    def _more_than(self, offer: Offer) -> bool:
        """Whether more code than that of `offer` is awaited, or waits to be installed."""
        others = (attempt for attempt in self._record.attempts if attempt is not offer.attempt)
        return any(attempt.state in (State.PENDING, State.READY, State.TRIAL) for attempt in others)

    def _put_in_place(self, offer: Offer) -> str:
        """Serve calls by the code of `offer`; returns a remark for the report, or ""."""
        prepared = self._prepared
        if prepared is None or prepared.offer.attempt is not offer.attempt or prepared.before is not self._plan:
            prepared = self._prepare(offer)
        remark = prepared.remark
        if prepared.rewrite is not None and self.site is not None:
            try:
                self.site.redirect(prepared.rewrite)
            except UnknownLayout as error:
                remark = f"cache entries look unfamiliar ({error}): {_A_CHECK_REMAINS}"
        gone, self._plan = self._plan, prepared.after
        for served in gone:
            if all(served.attempt is not kept.attempt for kept in self._plan):
                served.attempt.move(Event.REPLACED)
        self._let_go(offer, remark)
        return remark

    def _let_go(self, offer: Offer, remark: str) -> None:
        """Drop what no call needs any more, and let calls that nothing fits ask for more."""
        last = self._plan[-1]
        if last.condition is not None:
            if self.specialiser is not None and offer.attempt.purpose is not Purpose.BETTER:
                self.specialiser.resume()
            return
        self.specialiser = None
        if not self._more_than(offer) and not any(served.compiled.repeatable for served in self._plan):
            self.eager = last.compiled.call  # so that whatever holds this trampoline need not hold eager code
            if self.site is not None and not remark:
                self.site.rebind(last.compiled.call)

    # The way back

    def reject(self, reason: str) -> None:
        """Go back to eager code for good. Calls under way in compiled code may still be made again here."""
        self._withdraw()
        self.specialiser = None
        locks.call_holding(dynamo.compile_lock, self._restore)
        self._record.reject(reason)

    def _reject_offer(self, offer: Offer, reason: str, event: Event = Event.REJECTED, warn: bool = True) -> None:
        """Do without the code of `offer`; where other code serves its calls, that goes on."""
        self._drop(offer)
        offer.attempt.fail(event, reason, warn=warn)
        if self._plan:
            locks.call_holding(dynamo.compile_lock, lambda: self._show(self._plan))

    def _restore(self) -> None:
        if self._plan:
            self._show(())

    def _lead_here(self, offer: Offer) -> None:
        """Have calls that `offer` would serve better come here, for its trial."""
        self._show(tuple(served for served in self._plan if served.attempt is not offer.replaces))

    def _show(self, plan: Plan) -> None:
        with suppress(FrameGone, Indirect, UnknownLayout):  # nobody calls it, or nothing was rewritten
            if self.site is not None:
                self.site.redirect(self._rewrite(plan))


def _note(attempt: Attempt, findings: Findings) -> None:
    """Put what a trial has found into the report."""
    if findings.verified is not None:
        attempt.verified = findings.verified
    if findings.profit is not None:
        attempt.profit = findings.profit

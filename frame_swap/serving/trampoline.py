"""What serves a region's calls: the pair until compiled code is installed, and again where that fails.

Guarantees:
- A call through a trampoline is served: by the pair until compiled code is installed, by compiled code that
  fits it then, and by the pair again where none fits. It never waits, and raises only what the graph itself
  raises.
- A call whose compiled code raises is answered by the pair, whichever way compiled code was called, unless it has
  changed something by then. Then the frame is the pair's for good, with one warning; calls that were under way in
  compiled code on other threads end there, or are answered too. Where the pair raises as well, its error is the
  caller's, and nothing else happens. What is no `Exception`, `torch.OutOfMemoryError`, and what comes up while a
  dispatch mode or hooks on saved tensors are active, passes as it is.
- Compiled code on trial serves, if at all, one call at a time; other calls are the pair's meanwhile. A trial ends
  with the call that decides it, on that call's thread: with compiled code installed, the next trial, or REJECTED.
- Compiled code is installed once, by the first thread to arrive; others go on with the pair meanwhile. More of
  it, for calls that the first does not fit, is asked for one at a time.
- It is installed under Dynamo's compile lock: nothing else changes the frame's cache meanwhile, and no fork comes
  in between. A call that finds the lock taken, by a capture, a reset or a load in another thread, leaves installing
  to a later call; so it does with the way back to the pair, and calls whose compiled code raises are answered one
  by one until then.
- An interrupt (`KeyboardInterrupt`) is raised when the install that it came into is done. No lock stays taken.
- Rewritten code names a trampoline only where an error is to be answered. When the code object that names it
  goes, the trampoline goes, and with it pair, compiled code and the job.
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
from ..artifacts.compiled import Compiled, is_repeatable
from ..checking.trial import Sides, Trial
from ..codegen.rewriting import Condition, predicate
from ..errors import FrameGone, Indirect, UnknownLayout, first_line
from ..frames.call_site import CallSite
from ..internals import aot, dynamo
from ..region import SETTLED, Region, State

log = logging.getLogger(__name__)


class Offer(NamedTuple):
    """Compiled code, loaded.

    Attributes:
        compiled: the code.
        condition: what must hold of a call's inputs for calling it; None where it fits all.
        install: puts it in place, on a user's thread; returns a remark for the report, or "".
        trials: what it has to pass before that, in order.
    """

    compiled: Compiled
    condition: Condition | None
    install: Callable[[], str]
    trials: tuple[Trial, ...] = ()


class _Served(NamedTuple):
    """Compiled code in place or on trial, and the calls that it fits."""

    compiled: Compiled
    fits: Callable[..., bool] | None  # None: all

    def serves(self, args: Sequence[Any]) -> bool:
        return self.fits is None or self.fits(*args)


class Trampoline:
    """What a frame calls until compiled code is in; and after that, where no artifact fits the call, where
    compiled code raises, or where the frame cannot be rewritten.

    Args:
        region: whose calls these are.
        pair: the eager forward and backward.
        when: the setting of `frame_swap.configure` that holds for this graph.

    Attributes:
        site: where the frame calls this, None where no frame does.
        specialiser: told of each call that no artifact fits; None while there is no late guard.
    """

    def __init__(self, region: Region, pair: Callable[..., Any], when: settings.When) -> None:
        self._region = region
        self.pair: Callable[..., Any] = pair
        self.site: CallSite | None = None
        self.specialiser: Specialiser | None = None
        self._served: tuple[_Served, ...] = ()
        self._rejected = False
        self._ready: Offer | None = None
        self._on_trial: tuple[Offer, _Served] | None = None
        self._trying = threading.Lock()
        self._when = when
        self._attention = False
        region.belongs_to(self)

    def __call__(self, *args: Any) -> Any:
        if self._attention:
            self.install()
        served = None if self._rejected else self._served_for(args)
        if served is not None:
            return self._call_answered(served, args)
        if self._on_trial is not None:
            return self._call_on_trial(args)
        if (specialiser := self.specialiser) is not None:
            specialiser.ask(args)
        return self._call_pair(args)

    def boxed(self, args: list[Any]) -> Any:
        """The same, with the arguments in one list."""
        return self(*args)

    def answer(self, error: Exception, /, *args: Any) -> Any:
        """What a call with `args` returns in which `error` was raised: by compiled code, or by the pair.

        Random numbers that compiled code has drawn by then stay drawn.

        Raises:
            error: where the pair is not to be asked.
        """
        try:
            return self._answer(self._served_for(args), error, args)
        finally:
            del error  # whose traceback leads to this frame, and to those that wait for it

    def _call_answered(self, served: Compiled, args: Sequence[Any]) -> Any:
        try:
            return served.call(*args)
        except Exception as error:
            failure = error
        try:
            return self._answer(served, failure, args)
        finally:
            del failure  # as in `answer`

    def _answer(self, served: Compiled | None, error: Exception, args: Sequence[Any]) -> Any:
        try:
            if (
                served is None
                or not served.repeatable
                or not is_repeatable(error)
                or isinstance(error, torch.OutOfMemoryError)  # the pair needs more; who catches it tries with less
                or aot.runs_hooks()  # theirs, perhaps: activation checkpointing ends a recomputation so
            ):
                raise error
            log.info("frame-swap: compiled code of %s raised", self._region, exc_info=error)
            reason = f"its compiled code raised {first_line(error)}"
            error.__traceback__ = None  # it holds what the call had in memory
        finally:
            del error  # as in `answer`
        outputs = self._call_pair(args)
        self.reject(reason)
        return outputs

    def _call_pair(self, args: Sequence[Any]) -> Any:
        self._region.pair_calls += 1
        return self.pair(*args)

    def compiled_for(self, args: Sequence[Any]) -> Callable[..., Any] | None:
        """Compiled code that is in place and fits a call with the graph's inputs `args`."""
        served = None if self._rejected else self._served_for(args)
        return served and served.call

    def _served_for(self, args: Sequence[Any]) -> Compiled | None:
        return next((s.compiled for s in self._served if s.serves(args)), None)

    def _call_on_trial(self, args: Sequence[Any]) -> Any:
        """Serve a call while compiled code is on trial: one call at a time is part of it, others are the pair's."""
        with ExitStack() as stack:
            if self._trying.acquire(blocking=False):
                stack.callback(self._trying.release)
                if self._on_trial is not None and self._on_trial[1].serves(args):
                    offer, served = self._on_trial
                    trial = offer.trials[0]
                    sides = Sides(
                        lambda *args: self._call_pair(args),
                        lambda *args: self._call_answered(served.compiled, args),
                        self.pair,
                        served.compiled.call,
                    )
                    try:
                        return trial.call(sides, args)
                    finally:
                        self._region.note(trial.findings.known())
                        if trial.verdict is not None:
                            self._end_trial(offer, trial)
        return self._call_pair(args)

    def _end_trial(self, offer: Offer, trial: Trial) -> None:
        self._on_trial = None
        if self._rejected:  # it has raised
            return
        if trial.verdict:
            self.reject(trial.verdict)
        else:
            self._ready = offer._replace(trials=offer.trials[1:], install=_remarked(offer.install, trial.remark))
            self.install()

    def reject(self, reason: str) -> None:
        """Go back to the pair for good. Calls under way in compiled code may still be answered here."""
        self._rejected, self._ready, self._attention, self.specialiser = True, None, False, None
        self._on_trial = None
        _under_compile_lock(self._restore)
        self._region.reject(reason)

    def _restore(self) -> None:
        if self.site is not None and self._served:
            with suppress(FrameGone, Indirect, UnknownLayout):  # nobody calls it, or nothing was rewritten
                self.site.restore()

    @property
    def offered(self) -> bool:
        """Whether compiled code waits to be installed."""
        return self._ready is not None

    def offer(self, offer: Offer) -> None:
        """Compiled code is loaded."""
        if self._rejected:
            self.specialiser = None
            self._region.end_specialising()
            return
        self._ready = offer
        self._attention = self._when != "manual"
        # Who waits goes on with whichever is news, and may then ask for more: nothing may come after that.
        self._region.end_specialising()
        self._region.settle(State.READY, unless=SETTLED)

    def install(self, wait: bool = False) -> None:
        """Install what was offered, if anything was. Where that fails, the pair stays.

        Args:
            wait: until no other thread compiles or installs; else that leaves installing to a later call.
        """
        taken = False
        try:
            self._attention = False
            taken = _under_compile_lock(self._install_to_the_end, wait)
        except FrameGone:
            self._ready = None
            self._region.abandon()
        except Exception as error:
            self._ready = None
            self._region.fail(f"installing failed: {type(error).__name__}: {error}")
        finally:
            # Set where it is offered, too: never lost.
            if self._ready is not None and (self._when != "manual" or not taken):
                self._attention = True

    def _install_to_the_end(self) -> None:
        try:
            self._install()
        except Exception:
            raise
        except BaseException:  # an interrupt: the frame may be rewritten already, and then no call comes by again
            self._install()
            raise

    def _install(self) -> None:
        offer = self._ready
        if offer is None or self._rejected:
            return
        if offer.trials:
            self._on_trial = offer, _Served(offer.compiled, offer.condition and predicate(offer.condition))
            self._region.settle(State.TRIAL, unless=(State.INSTALLED,))
        else:
            with self._region.timed("install_s"):
                remark = offer.install()
            self._serve(offer.compiled, offer.condition)
            self._region.installed_at = time.time()
            self._region.artifacts = len(self._served)
            self._region.settle(State.INSTALLED, remark, unless=(State.REJECTED,))
        self._ready = None  # not before: what an interrupt cuts short is done again, to the same end

    def install_unless_manual(self) -> None:
        """What the next call would do."""
        if self._when != "manual":
            self.install(wait=True)

    def _serve(self, compiled: Compiled, condition: Condition | None) -> None:
        """Compiled code is in place; calls that still arrive here get to it in this way."""
        if all(served.compiled is not compiled for served in self._served):
            self._served += (_Served(compiled, condition and predicate(condition)),)
        if condition is None:
            self.specialiser = None
            if not any(served.compiled.repeatable for served in self._served):
                self.pair = compiled.call  # whatever still holds this trampoline need not hold the pair
        elif self.specialiser is not None:
            self.specialiser.resume()


def _under_compile_lock(call: Callable[[], object], wait: bool = False) -> bool:
    """Make `call` while holding Dynamo's compile lock. False where another thread has it, and nothing was called.

    Args:
        wait: for the lock.
    """
    taken: list[bool] = []
    try:
        # C code calls it and keeps the answer: no signal can come in between.
        taken.extend(map(dynamo.compile_lock.acquire, (wait,)))
        if taken[0]:
            call()
        return taken[0]
    finally:
        if taken and taken[0]:
            dynamo.compile_lock.release()


def _remarked(install: Callable[[], str], remark: str) -> Callable[[], str]:
    return lambda: "; ".join(filter(None, [install(), remark]))


class Specialiser:
    """Asks for compiled code that fits a call which all there is turns away: one compile at a time, and no more
    in all than the frame could have had recompiles.

    Args:
        region: whose calls these are.
        sizes: what the symbols of the graph's shapes stand for in a call, by their names.
        compile: begins a compile for such sizes.
        limit: the most compiles.
    """

    def __init__(
        self,
        region: Region,
        sizes: Callable[[Sequence[Any]], dict[str, int]],
        compile: Callable[[dict[str, int]], object],
        limit: int,
    ) -> None:
        self._region = region
        self._sizes = sizes
        self._compile = compile
        self._left = limit
        self._asked: list[dict[str, int]] = []
        self._busy = threading.Lock()  # held from when a compile is asked for until its result is in place
        self._busy.acquire()

    def ask(self, args: Sequence[Any]) -> None:
        """A call with the graph's inputs `args` was turned away."""
        taken: list[bool] = []
        try:
            taken.extend(map(self._busy.acquire, (False,)))  # as in `_under_compile_lock`
            if not taken[0]:
                return
            sizes = self._sizes(args)
            if sizes in self._asked or not self._left:
                return
            self._asked.append(sizes)
            self._left -= 1
            self._region.begin_specialising()
            self._compile(sizes)
            taken.clear()  # given back by `resume`
        finally:
            if taken and taken[0]:
                self._region.end_specialising()
                self._busy.release()  # last: another call may ask from then on

    def resume(self) -> None:
        """The artifact that was asked for is in place, or will not come."""
        if self._busy.locked():  # else an interrupt came between asking and noting it
            self._busy.release()

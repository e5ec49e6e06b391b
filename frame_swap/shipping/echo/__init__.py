"""What a compile leaves behind besides code reaches the user as if it had been compiled here.

Totals (`torch._inductor.metrics`, Dynamo's `counters` and `compile_times`), warnings, log records and structured
trace records arise in the worker: `recorded` gathers them there, and `replay` hands them to the listeners in the
calling process. That process loads the artifact, and may trace a pair, which repeats much of it: it is `muted`.

Guarantees:
- Neither half raises or changes the result of a compile; what cannot be recorded or replayed is left out.
- Each thing is heard once, and not before the compile is over. The filters, levels and handlers of that moment
  decide who hears it; those at capture decide what is recorded.
- Where nobody listens, only the totals travel, and what reaches every user: warnings, and records of level WARNING
  or above. Text is made and sent only for listeners who asked for it.
- Meanwhile the worker writes to no log or trace of the program's: its handlers are not called.
- A compile in the calling process itself, in an executor of threads, is heard there anyway: nothing is recorded.

Assumed: one compile at a time in a worker. What its other threads say meanwhile belongs to that compile.
"""

from __future__ import annotations

from .audience import Audience
from .mute import muted
from .record import PREPARING, recorded
from .replay import replay

__all__ = ["PREPARING", "Audience", "muted", "recorded", "replay"]

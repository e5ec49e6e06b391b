"""Regions: captured graphs, the compiles made for each, and the table of what may happen to them."""

from .attempt import Attempt
from .record import Record, is_quiet, records, wait_for_compiles
from .report import Compile, Region, Report
from .states import Event, IllegalTransition, Purpose, State
from .under_way import capturing

__all__ = [
    "Attempt",
    "Compile",
    "Event",
    "IllegalTransition",
    "Purpose",
    "Record",
    "Region",
    "Report",
    "State",
    "capturing",
    "is_quiet",
    "records",
    "wait_for_compiles",
]

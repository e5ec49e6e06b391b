"""The names that this module had before it was divided, for callers that still use them."""

from __future__ import annotations

from ..errors import Indirect
from .calls import Recover as Answer
from .calls import call_constants, call_if, call_instead
from .conditions import Condition, predicate

__all__ = ["Answer", "Condition", "Indirect", "call_constants", "call_if", "call_instead", "predicate"]

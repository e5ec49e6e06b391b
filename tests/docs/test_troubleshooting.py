"""Each message of the package is in the troubleshooting page, and what is quoted there is in the package."""

from __future__ import annotations

import re

import pytest

from .blocks import ROOT
from .messages import GAP, Message, messages, texts

pytestmark = pytest.mark.quick

PAGE = (ROOT / "docs" / "troubleshooting.md").read_text()
QUOTED = re.findall(r"^\| `([^`\n]+)` \|", PAGE, re.MULTILINE)
PARTS = ("frame-swap: …", "frame-swap: … … (frame_swap.report() has all of it)", "… (tried twice)")
"""Texts around a message, or behind it."""


def pieces(text: str) -> list[str]:
    return [piece.strip(" :;,.") for piece in text.split(GAP) if len(piece.strip(" :;,.")) > 2]


def says(quoted: str, text: str) -> bool:
    """Whether all of a quotation stands in `text`, in order."""
    pattern = ".*".join(map(re.escape, pieces(quoted)))
    return bool(pieces(quoted)) and re.search(pattern, text, re.DOTALL) is not None


@pytest.mark.parametrize("message", [m for m in messages() if m.text not in PARTS], ids=lambda m: m.place)
def test_each_message_is_in_the_page(message: Message) -> None:
    assert any(says(quoted, message.text) for quoted in QUOTED), message.text


@pytest.mark.parametrize("quoted", QUOTED)
def test_what_is_quoted_is_in_the_package(quoted: str) -> None:
    known = list(texts())
    assert any(says(quoted, text) for text in known)


def test_a_message_that_is_not_there_is_seen() -> None:
    assert not any(says(quoted, "something that nobody has written down") for quoted in QUOTED)
    assert not any(says("a quotation … of nothing", text) for text in texts())

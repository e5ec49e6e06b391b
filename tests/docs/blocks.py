"""The code blocks of a page, and what comments before them say of how they are run.

    <!-- run: no, REASON -->      the block is not run; the reason is for readers of the source
    <!-- file: NAME -->           a Python block is the file of that name; commands of the page may run it
    <!-- run -->                  the shell commands are run, in the folder of the page's files
    <!-- run; prints: TEXT -->    and what they print has TEXT in it

Python blocks without a comment are one program, in the order of the page.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]

_BLOCK = re.compile(
    r"(?:^<!-- (?P<comment>(?:run|file)\b[^>]*) -->\n+)?^```(?P<language>\w*)\n(?P<text>.*?)^```", re.M | re.S
)


class Block(NamedTuple):
    """A code block: its language, its text, and the comment before it."""

    language: str
    text: str
    comment: str

    @property
    def is_run(self) -> bool:
        """Whether anything is done with it."""
        return not self.comment.startswith("run: no")

    @property
    def file(self) -> str:
        """The name of the file that it is; "" where it is none."""
        return self.comment.removeprefix("file:").strip() if self.comment.startswith("file:") else ""

    @property
    def prints(self) -> str:
        """What its commands print, among other things."""
        return self.comment.partition("prints:")[2].strip()


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page, in order."""
    found = _BLOCK.finditer(page.read_text())
    return [Block(match["language"], match["text"], match["comment"] or "") for match in found]


def pages() -> list[Path]:
    """The README and all pages below docs/."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def program(page: Path) -> str:
    """The program that a page's Python blocks are; "" where it has none."""
    plain = [b.text for b in blocks(page) if b.language == "python" and b.is_run and not b.file]
    return "\n".join(plain)


def files(page: Path) -> dict[str, str]:
    """The files that a page has, by name."""
    return {block.file: block.text for block in blocks(page) if block.file}


def commands(page: Path) -> list[Block]:
    """The blocks of shell commands that are run."""
    return [b for b in blocks(page) if b.language == "sh" and b.comment.startswith("run") and b.is_run]

"""The demo as a new user runs it."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest


def run_demo(*options: str) -> str:
    """Run `python -m frame_swap demo`; return its output."""
    done = subprocess.run(
        [sys.executable, "-m", "frame_swap", "demo", "--device", "cpu", *options],
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def figure(text: str, name: str) -> str:
    """The value in a row of the closing table."""
    found = re.search(rf"^ *{name}  +(.*?) *$", text, re.MULTILINE)
    assert found, text
    return found[1]


def test_a_short_run_says_what_it_saw() -> None:
    text = run_demo("--seconds", "5")
    assert "trace the model" in text  # said before the first step, which takes seconds
    assert "What you saw" in text
    assert float(figure(text, "first step after").removesuffix(" s")) > 0
    assert re.match(r"no swap yet: |\d+\.\d s", figure(text, "swap after"))
    assert int(figure(text, "steps done by eager code")) > 0
    assert "CharTransformer.forward" in text  # the report


@pytest.mark.long
def test_a_whole_run_sees_the_swap() -> None:
    text = run_demo()
    assert "That is normal" in text
    assert "served by compiled code" in text
    first, swap = (float(figure(text, f"{what} after").removesuffix(" s")) for what in ("first step", "swap"))
    assert first < swap
    for name in ("steps done by eager code", "steps done by compiled code"):
        assert int(figure(text, name)) > 0
    assert float(figure(text, "ms a step after the swap")) > 0

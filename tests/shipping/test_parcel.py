"""The content of a parcel has the same bytes for the same program, in each process; the envelope says who asks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from frame_swap.runtime import identity
from frame_swap.shipping import echo, parcel

Digests = dict[str, list[str]]

PROGRAM = Path(__file__).with_name("contents.py")


@pytest.fixture(scope="module")
def digests(tmp_path_factory: pytest.TempPathFactory) -> tuple[Digests, Digests]:
    """Of two processes: as different as two that run the same program can be."""

    def run(seed: int, *arguments: str) -> Digests:
        folder = tmp_path_factory.mktemp(f"process{seed}")
        places = {"TMPDIR": str(folder), "TORCHINDUCTOR_CACHE_DIR": str(folder / "cache")}
        done = subprocess.run(
            [sys.executable, str(PROGRAM), *arguments],
            env=os.environ | places | {"PYTHONHASHSEED": str(seed), "TORCHINDUCTOR_COMPILE_THREADS": str(seed)},
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == 0, done.stderr
        found: Digests = json.loads(done.stdout)
        return found

    return run(1), run(77, "other")


@pytest.mark.parametrize(
    ("name", "graphs"),
    [
        ("as it is", 1),
        ("an operator", 1),
        ("dynamic", 2),
        ("in time dynamic", 2),
        ("unbacked", 1),
        ("higher order", 1),
        ("autograd function", 1),
        ("a view", 1),
        ("numpy", 1),
        ("training", 1),
        ("training, dynamic", 1),
        ("autocast", 1),
    ],
)
def test_the_content_is_the_same_in_another_process(
    digests: tuple[Digests, Digests], name: str, graphs: int
) -> None:
    here, there = digests
    assert len(here[name]) == graphs
    assert here[name] == there[name]


def test_all_contents_are_the_same_in_another_process(digests: tuple[Digests, Digests]) -> None:
    here, there = digests
    assert {name for name in here if here[name] != there[name]} == set()


def test_what_is_changed_back_leaves_no_trace(digests: tuple[Digests, Digests]) -> None:
    here, _ = digests
    assert here["back again"] == here["as it is"]


@pytest.mark.parametrize(
    "change",
    ["a function", "a number", "a table", "a dtype", "a size", "a stride", "a gradient", "grad mode"]
    + ["an option", "another option", "a config", "a config of functorch", "matmul precision"],
)
def test_a_change_of_the_program_changes_the_content(digests: tuple[Digests, Digests], change: str) -> None:
    here, _ = digests
    same = [name for name in here if here[name] == here[change]]
    assert same == [change]


@pytest.mark.parametrize("what", ["FACTOR", "RATE", "STRICT"])
def test_a_change_of_what_an_operator_reads_changes_the_content(
    digests: tuple[Digests, Digests], what: str
) -> None:
    here, _ = digests
    assert here[f"an operator that reads another {what}"] != here["an operator"]


def test_which_equal_strings_are_one_object_does_not_matter() -> None:
    one, other = ("".join(["a", " string"]) for _ in range(2))
    assert one is not other
    assert parcel.stable_pickle([one, other]) == parcel.stable_pickle([one, one])


def test_an_envelope_knows_the_process_that_asks() -> None:
    mine = parcel.Envelope.capture(echo.Audience.capture(), None)
    assert mine.asked_here
    child, parent = os.pipe()
    if (pid := os.fork()) == 0:
        os.write(parent, b"yes" if mine.asked_here else b"no")
        os._exit(0)
    os.waitpid(pid, 0)
    assert os.read(child, 3) == b"no"


def test_places_of_a_machine_are_applied_there_and_nowhere_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/there/cache")
    envelope = parcel.Envelope.capture(echo.Audience.capture(), None)
    assert envelope.environment["TORCHINDUCTOR_CACHE_DIR"] == "/there/cache"
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/here/cache")
    with envelope.applied():
        assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "/there/cache"
    monkeypatch.setattr(parcel, "this_machine", lambda: "another")
    with envelope.applied():
        assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "/here/cache"
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "/here/cache"


def test_a_machine_has_one_identity() -> None:
    program = "from frame_swap.runtime import identity; print(identity.this_machine())"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=tempfile.gettempdir()
    )
    assert done.stdout.strip() == identity.this_machine()

"""A second process of a program runs compiled code from its first call on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import why_no_kept_frames

from frame_swap.artifacts import seal
from frame_swap.artifacts.store import disk

from .program import PROGRAMS

PROGRAM = Path(__file__).with_name("program.py")

Run = Callable[..., dict[str, Any]]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Run the program in a process of its own, with a store that all runs of a test share."""

    def run(name: str, **environment: str) -> dict[str, Any]:
        places = {"FRAME_SWAP_STORE": str(tmp_path / "store"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
        done = subprocess.run(
            [sys.executable, str(PROGRAM), name],
            env=os.environ | places | environment,
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == 0, done.stderr
        told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return told

    return run


SLOW = (
    "bert",
    "gpt2",
    "vit",
    "inference",
    "a conditional",
    "floats that change",
    "our_own",
    "opt_in",
    "graph breaks",
)
"""In the names of programs that take what others take, too, and are run with --long."""


def marks_of(name: str) -> list[pytest.MarkDecorator]:
    if any(word in name for word in SLOW):
        return [pytest.mark.long]
    return [pytest.mark.thorough] if name == "operators" else []


NAMES = [pytest.param(name, marks=marks_of(name)) for name in PROGRAMS]


@pytest.mark.parametrize("name", NAMES)
def test_the_second_process_runs_what_the_first_has_compiled(run: Run, name: str) -> None:
    cold, warm = run(name), run(name)
    assert cold["workers"] > 0
    assert {region["store"] for region in cold["last"] if region["state"] == "installed"} == {"kept"}
    used = [region for region in warm["first"] if region["state"] != "stale"]
    assert {region["state"] for region in used} == {"installed"}
    assert {region["store"] for region in used} == {"found"}
    assert warm["workers"] == 0
    if name != "floats that change":  # what Dynamo has to check of them, AOTAutograd finds out
        assert warm["traces"] == 0
    assert warm["results"][0] == warm["results"][1] == cold["results"][1]


TRACED = ("graph breaks", "dynamic shapes and late guards", "operators", "floats that change", "a conditional")
"""Programs whose frames are traced in each run."""

FRAMES = [
    pytest.param(name, marks=[pytest.mark.thorough if name == "the demo" else pytest.mark.long])
    for name in PROGRAMS
    if name not in TRACED
]


@pytest.mark.skipif(bool(why_no_kept_frames()), reason=why_no_kept_frames())
@pytest.mark.parametrize("name", FRAMES)
def test_with_its_frames_kept_the_second_process_traces_nothing(run: Run, name: str) -> None:
    cold, warm = (run(name, FRAME_SWAP_KEEP_FRAMES="1") for _ in range(2))
    assert (cold["captures"], warm["captures"], warm["traces"], warm["workers"]) == (1, 0, 0, 0)
    assert [(region["state"], region["store"]) for region in warm["first"]] == [("installed", "found")]
    assert warm["results"][0] == warm["results"][1] == cold["results"][1]


@pytest.mark.thorough
def test_without_a_store_both_processes_compile(run: Run) -> None:
    """What the assertions above would see if nothing were kept."""
    for _ in range(2):
        told = run("a conditional", FRAME_SWAP_STORE="off")
        assert told["workers"] > 0
        assert told["traces"] > 0
        assert [region["state"] for region in told["first"]] == ["pending"]
        assert {region["store"] for region in told["last"]} == {""}


@pytest.mark.thorough
def test_processes_at_once_compile_each_graph_once(tmp_path: Path) -> None:
    places = {"FRAME_SWAP_STORE": str(tmp_path / "store"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, str(PROGRAM), "graph breaks"]
    processes = [
        subprocess.Popen(command, env=os.environ | places, stdout=subprocess.PIPE, text=True) for _ in range(3)
    ]
    told = [json.loads(process.communicate(timeout=240)[0].splitlines()[-1]) for process in processes]
    stores = [region["store"] for one in told for region in one["last"]]
    assert stores.count("kept") == 3
    assert stores.count("found") == 6
    assert told[0]["results"][1] == told[1]["results"][1] == told[2]["results"][1]


@pytest.mark.thorough
def test_kept_code_that_cannot_be_loaded_is_compiled_again(run: Run, tmp_path: Path) -> None:
    """It is whole and in its place, but its content is of no use: a mistake that no seal can find."""
    run("opt_in")
    (file,) = (tmp_path / "store").glob("*.artifact")
    key = file.name.removesuffix(".artifact")
    store = disk.Disk(str(tmp_path / "store"), 1e9)
    entry = store.get(key)
    assert entry is not None
    store.put(key, entry._replace(artifact=seal.seal(b"nothing that can be unpickled")))
    told = run("opt_in")
    assert [region["store"] for region in told["last"]] == ["kept"]
    assert [region["state"] for region in told["last"]] == ["installed"]
    assert [region["store"] for region in run("opt_in")["first"]] == ["found"]


IMPATIENT = """\
import sys, torch, frame_swap
from frame_swap.farm import service
service.LEISURE = 0.01
f = torch.compile(lambda x: x.sin() * 3, backend="frame_swap")
if sys.argv[1] == "calls":
    f(torch.ones(3))
else:
    from frame_swap.artifacts.store import chosen
    while not chosen.store(frame_swap.settings.current()).artifacts():
        pass
print(len(frame_swap.report().regions))
"""


def test_what_a_run_did_not_wait_for_is_compiled_in_the_next_before_it_is_asked_for(tmp_path: Path) -> None:
    program = tmp_path / "impatient.py"
    program.write_text(IMPATIENT)
    places = {"FRAME_SWAP_STORE": str(tmp_path / "store"), "FRAME_SWAP_DELAY": "0"}

    def run(what: str) -> str:
        done = subprocess.run(
            [sys.executable, str(program), what],
            env=os.environ | places,
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert run("calls") == "1\n"
    assert list((tmp_path / "store").glob("*.artifact")) == [], "it ended long before its compile"
    assert run("waits") == "0\n", "no graph was captured, and one was compiled"
    assert len(list((tmp_path / "store").glob("*.artifact"))) == 1

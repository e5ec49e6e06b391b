"""The runner, on a source tree of four tests: it survives them, and reports their outcomes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from . import outcomes
from .outcomes import Outcome
from .verdict import Verdict, markdown, read_listed

FILE = "test_small.py"
TESTS = """\
import os, torch
from torch._inductor.compile_fx import compile_fx
from torch._inductor.utils import a_name_that_this_torch_lacks

NAMES = [kernel.fn.__name__ for kernel in [a_name_that_this_torch_lacks]]

def doubles():
    assert torch.compile(lambda x: x * 2)(torch.ones(3)).sum() == 6

def test_passes(): doubles()
def test_counts_kernels():
    doubles()
    assert False, "no kernel was generated"
def test_kills_its_process(): os._exit(1)
def test_stock_fails_too(): assert False
"""

pytest.importorskip("xdist", reason="needs pip install -e '.[conformance]'")
pytestmark = pytest.mark.long


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    (tmp_path / "test" / "inductor").mkdir(parents=True)
    (tmp_path / "test" / "inductor" / FILE).write_text(TESTS)
    stock = {
        "passes": "passed",
        "counts_kernels": "passed",
        "kills_its_process": "passed",
        "stock_fails_too": "failed",
    }
    outcomes.write(tmp_path / "stock.jsonl", (Outcome(f"{FILE}::test_{k}", v) for k, v in stock.items()))
    return tmp_path


def run(tree: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-m",
        "tests.conformance",
        str(tree),
        "--file",
        FILE,
        "--stock",
        str(tree / "stock.jsonl"),
    ]
    command += ["--results", str(tree), "--cache", str(tree / "kernels"), *arguments]
    root = Path(__file__).resolve().parents[2]
    # The runner's own pytest is none of the workers of the one that runs this.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    return subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=240, env=environment)


def test_a_run_names_what_is_lost_and_survives_it(tree: Path) -> None:
    done = run(tree, "--when", "never")
    assert done.returncode == 0, "what stock fails, too, does not count"
    (results,) = tree.glob("*-all-never-graph.jsonl")
    ran = outcomes.read(results)
    assert {o.id.partition("::test_")[2]: o.outcome for o in ran.values()} == {
        "passes": "passed",
        "counts_kernels": "failed",
        "kills_its_process": "failed",
    }
    assert ran[f"{FILE}::test_passes"].regions == {"eager": 1}
    assert ran[f"{FILE}::test_counts_kernels"].reason == "AssertionError: no kernel was generated"
    assert "crashed" in ran[f"{FILE}::test_kills_its_process"].reason
    assert "stock fails here, too: test_small.py::test_counts_kernels" in done.stdout
    again = run(tree, "--when", "never", "--resume")
    assert "passed in" not in again.stdout, "everything has its outcome"
    assert again.returncode == 0


def test_a_verdict_tells_lost_from_listed() -> None:
    ids = [f"{FILE}::{name}" for name in ("a", "b", "c", "d")]
    ran = [
        Outcome(ids[0], "passed"),
        Outcome(ids[1], "failed", "AssertionError: 1 != 2"),
        Outcome(ids[2], "failed"),
    ]
    verdict = Verdict(FILE, "never", set(ids), {o.id: o for o in ran}, {ids[0]: "counts", ids[2]: "counts kernels"})
    assert [o.id for o in verdict.lost] == [ids[1]]
    assert [o.id for o in verdict.lost_but_listed] == [ids[2]]
    assert (verdict.no_longer_lost, verdict.not_run) == ([ids[0]], [ids[3]])
    assert f"| `{ids[2]}` | never | counts kernels |" in markdown([verdict])


def test_what_is_listed_is_of_a_mode_and_may_be_of_one_kind_of_eager_code(tmp_path: Path) -> None:
    path = tmp_path / "listed.toml"
    path.write_text(
        '[[group]]\nwhen = ["never"]\nreason = "both"\ntests = ["a"]\n'
        '[[group]]\nwhen = ["ready", "never"]\nfirst = ["graph"]\nreason = "one"\ntests = ["b"]\n'
    )
    assert read_listed("never", "graph", path=path) == {"a": "both", "b": "one"}
    assert read_listed("never", "pair", path=path) == {"a": "both"}
    assert read_listed("ready", "graph", path=path) == {"b": "one"}
    assert read_listed("wait", "graph", path=path) == {}

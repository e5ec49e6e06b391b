from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from . import outcomes

HERE = Path(__file__).resolve().parent
PROJECT = HERE.parents[1]


def run_tests(tree: Path, files: list[str], when: str, results: Path, cache: Path, ids: list[str] | None, jobs: int, expression: str = "") -> None:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(PROJECT), os.environ.get("PYTHONPATH")])),
        "INDUCTOR_TEST_DISABLE_FRESH_CACHE": "1",
        "TORCHINDUCTOR_CACHE_DIR": str(cache),
        "TORCHINDUCTOR_FX_GRAPH_CACHE": "0",
        "PYTHONWARNINGS": "ignore::DeprecationWarning",
    }
    with tempfile.NamedTemporaryFile("w", suffix=".ids") as list_:
        if ids is not None:
            list_.write("\n".join(ids))
            list_.flush()
        command = [sys.executable, "-m", "pytest", "--noconftest", "-c", os.devnull, "--rootdir", ".", "-q",
            "-p", "tests.conformance.plugin", "-p", "no:cacheprovider", "--timeout", "400", "--show-capture=no", "--tb=no", "-W", "ignore",
            "-n", str(jobs), "--dist", "loadgroup", "--max-worker-restart", "1000",
            "--conformance-when", when, "--conformance-outcomes", str(results)]
        if ids is not None:
            command += ["--conformance-ids", list_.name]
        if expression:
            command += ["-k", expression]
        subprocess.run([*command, *files], cwd=tree / "test" / "inductor", env=environment)


parser = argparse.ArgumentParser()
parser.add_argument("tree", type=Path)
parser.add_argument("--when")
parser.add_argument("--file", nargs="+", default=["test_torchinductor.py"])
parser.add_argument("-k", default="")
parser.add_argument("--jobs", type=int, default=1)
parser.add_argument("--stock", type=Path)
parser.add_argument("--results", type=Path)
parser.add_argument("--cache", type=Path)
a = parser.parse_args()
ids = [o.id for o in outcomes.read(a.stock).values() if o.outcome == "passed"] if a.stock else None
done = outcomes.read(a.results)
if ids is not None:
    ids = [i for i in ids if i not in done]
run_tests(a.tree, a.file, a.when, a.results, a.cache, ids, a.jobs, a.k)

"""Invalid settings raise errors that say what to do; valid ones take effect."""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from typing import Any

import pytest
import torch
from helpers import live

import frame_swap
from frame_swap import FrameSwapWarning, State, delivery, settings
from frame_swap.runtime import machine

pytestmark = pytest.mark.quick


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"when": "reday"}, "did you mean 'ready'"),
        ({"when": "sometime"}, "choose one of 'ready', 'wait', 'manual', 'never'"),
        ({"delay": -1}, "0 or more"),
        ({"delay": float("nan")}, "0 or more"),
        ({"workers": 0}, "1 or more"),
        ({"job_timeout": 0}, "number of seconds above 0"),
        ({"memory_limit": -1}, "number of gigabytes above 0"),
        ({"idle_timeout": float("nan")}, "number of seconds above 0"),
        ({"workers": 1.5}, "whole number"),
        ({"verify": -1}, "0 for none"),
        ({"verify": 0.5}, "number of calls"),
        ({"profit": 1}, "True or False"),
    ],
)
def test_a_value_that_cannot_be_used_is_refused_and_changes_nothing(values: dict[str, Any], words: str) -> None:
    before = settings.current()
    with pytest.raises(ValueError, match=words):
        frame_swap.configure(**values)
    assert settings.current() == before


def test_a_folder_must_be_one() -> None:
    with pytest.raises(TypeError, match="give a folder"):
        frame_swap.configure(repro_dir=3)  # type: ignore[arg-type]


def test_an_executor_must_be_one() -> None:
    with pytest.raises(TypeError, match="has no submit"):
        frame_swap.configure(executor="threads")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        ({"FRAME_SWAP_WHEN": "soon"}, "FRAME_SWAP_WHEN='soon'"),
        ({"FRAME_SWAP_WORKERS": "many"}, "FRAME_SWAP_WORKERS='many'"),
        ({"FRAME_SWAP_DELAY": "-2"}, "FRAME_SWAP_DELAY='-2'"),
        ({"FRAME_SWAP_JOB_TIMEOUT": "soon"}, "FRAME_SWAP_JOB_TIMEOUT='soon'"),
        ({"FRAME_SWAP_VERIFY": "all"}, "FRAME_SWAP_VERIFY='all'"),
        ({"FRAME_SWAP_PROFIT": "yes"}, "FRAME_SWAP_PROFIT='yes'"),
    ],
)
def test_a_variable_that_cannot_be_used_is_named(environ: dict[str, str], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        settings.Settings.from_environment(environ)


def test_the_environment_sets_what_configure_sets() -> None:
    given = {"when": "manual", "workers": 3, "delay": 0.5, "job_timeout": 60.0, "verify": 2, "repro_dir": "here"}
    environ = {f"FRAME_SWAP_{name.upper()}": str(value) for name, value in given.items()}
    environ["FRAME_SWAP_PROFIT"] = "1"
    assert settings.Settings.from_environment(environ) == settings.Settings(**given, profit=True)
    limits = {"FRAME_SWAP_MEMORY_LIMIT": "4.5", "FRAME_SWAP_IDLE_TIMEOUT": "inf"}
    found = settings.Settings.from_environment(limits)
    assert (found.memory_limit, found.idle_timeout) == (4.5, math.inf)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("wokers", "'wokers' is no setting of frame-swap; did you mean 'workers'"),
        ("xyz", "no setting of frame-swap$"),
    ],
)
def test_an_unknown_setting_is_refused_and_the_nearest_is_named(name: str, words: str) -> None:
    before = settings.current()
    with pytest.raises(TypeError, match=words):
        frame_swap.configure(when="manual", **{name: 3})
    assert settings.current() == before


def test_configure_takes_and_documents_each_field() -> None:
    fields = dataclasses.fields(settings.Settings)
    parameters = inspect.signature(frame_swap.configure).parameters.values()
    assert [(p.name, p.annotation) for p in parameters] == [(field.name, field.type) for field in fields]
    assert {p.kind for p in parameters} == {inspect.Parameter.KEYWORD_ONLY}
    for field in fields:
        assert f"\n    {field.name}: " in (frame_swap.configure.__doc__ or "")


def test_the_number_of_workers_follows_the_usable_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    for cpus, workers in ((1, 1), (2, 1), (4, 2), (64, 4)):
        monkeypatch.setattr(machine, "usable_cpus", lambda cpus=cpus: cpus)
        assert machine.default_workers() == workers


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"mode": "max-autotone"}, "did you mean 'max-autotune'"),
        ({"options": {"epilog_fusion": True}}, "did you mean 'epilogue_fusion'"),
        ({"options": {"epilogue_fusion": "yes"}}, "got str, expected bool"),
    ],
)
def test_an_unknown_mode_or_option_is_an_error_that_names_the_nearest(
    arguments: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        frame_swap.opt_in(**arguments)
    with pytest.raises(Exception, match=words):  # Dynamo wraps what a backend raises
        torch.compile(lambda x: x + 1, backend="frame_swap", **arguments)(torch.randn(3))


def test_mode_and_options_reach_the_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    parcels = []
    submit = delivery.service.submit
    monkeypatch.setattr(delivery.service, "submit", lambda parcel, *a: parcels.append(parcel) or submit(parcel, *a))
    torch.compile(lambda x: x.sin() + 2, backend="frame_swap", mode="max-autotune-no-cudagraphs", options=None)(
        torch.randn(3)
    )
    torch.compile(lambda x: x.sin() + 3, backend="frame_swap", options={"size_asserts": False})(torch.randn(3))
    from frame_swap.shipping.parcel import open_content

    assert [r.state for r in frame_swap.wait().regions] == [State.INSTALLED] * 2
    sent = [open_content(parcel.content).options for parcel in parcels]
    assert {"size_asserts": False} in sent
    assert [one["max_autotune"] for one in sent if "max_autotune" in one] == [False, True]


def test_caches_may_be_switched_off(run_program: Any) -> None:
    done = run_program(
        """
        import torch, torch._functorch.config, frame_swap
        for off in ({"enable_autograd_cache": True}, {"enable_autograd_cache": False}):
            with torch._functorch.config.patch(**off):
                torch.compile(lambda x: x.sin() + len(off), backend="frame_swap")(torch.randn(4))
        print(*(region.state for region in frame_swap.wait().regions))
        """,
        TORCHINDUCTOR_FORCE_DISABLE_CACHES="1",
        TORCHINDUCTOR_FX_GRAPH_CACHE="0",
        TORCHINDUCTOR_AUTOGRAD_CACHE="0",
    )
    assert set(done.stdout.split()) == {"installed"}


def test_disabled_it_is_stock_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FRAME_SWAP_DISABLE", "1")
    x = torch.randn(3)
    torch.testing.assert_close(torch.compile(lambda x: x.sin() + 4, backend="frame_swap")(x), x.sin() + 4)
    assert frame_swap.report().regions == []


def test_a_dead_executor_fails_the_region_and_says_what_to_do() -> None:
    dead = ThreadPoolExecutor(1)
    dead.shutdown()
    frame_swap.configure(executor=dead)
    x = torch.randn(3)
    with pytest.warns(FrameSwapWarning, match=r"ThreadPoolExecutor.*configure\(executor=None\)"):
        torch.testing.assert_close(torch.compile(lambda x: x.sin() + 8, backend="frame_swap")(x), x.sin() + 8)
        (region,) = live(frame_swap.wait())
    assert region.state is State.FAILED


def test_any_executor_of_processes_will_do() -> None:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as executor:
        frame_swap.configure(executor=executor)
        x = torch.randn(3)
        compiled = torch.compile(lambda x: x.sin() + 9, backend="frame_swap")
        compiled(x)
        (region,) = live(frame_swap.wait())
        assert region.worker_pid in executor._processes
    assert region.state is State.INSTALLED
    torch.testing.assert_close(compiled(x), x.sin() + 9)


def test_the_report_is_a_table_and_json() -> None:
    compiled = torch.compile(lambda x: x.sin() + 10, backend="frame_swap")
    compiled(torch.randn(3))
    report = frame_swap.wait()
    (row,) = json.loads(json.dumps(report.as_dict()))["regions"]
    columns = "frame compile_id state reason eager eager_reason eager_calls ship_s queue_s compile_s load_s"
    columns += " install_s artifact_bytes artifact artifact_reason late_guards artifacts wrappers cuda_graphs"
    columns += " verified profit store worker_pid compile_span installed_at compiles"
    assert set(row) == set(columns.split())
    assert row["state"] == "installed"
    assert row["compile_s"] > 0
    assert row["artifact_bytes"] > 1000
    assert "test_settings.py" in row["frame"]
    text = str(report)
    assert "installed" in text
    assert "test_settings.py" in text

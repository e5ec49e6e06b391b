"""Private names of torch that are missing are found and named, whichever module uses them, and whenever."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import frame_swap
from frame_swap import FrameSwapWarning, backend, guards
from frame_swap.internals import probe


def test_this_torch_has_all_names() -> None:
    assert probe.missing() is None
    assert probe.missing_anywhere() == []
    assert probe.missing_from(Path(guards.predicate.__file__)) == []


def test_without_a_private_name_it_stands_aside_with_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    backend._unsupported.cache_clear()
    monkeypatch.setattr(probe, "_missing", ["cannot import name 'orig_code_map'"])
    x = torch.randn(3)
    try:
        with pytest.warns(FrameSwapWarning, match=r"lacks what it needs .*use torch 2\.11 to 2\.15") as caught:
            for add in (5, 6):
                compiled = torch.compile(lambda x, add=add: x.sin() + add, backend="frame_swap")
                torch.testing.assert_close(compiled(x), x.sin() + add)
    finally:
        backend._unsupported.cache_clear()
    assert len([w for w in caught if w.category is FrameSwapWarning]) == 1
    assert frame_swap.report().regions == []


@pytest.mark.parametrize(
    ("owner", "setting", "said"),
    [
        (backend.beside, {"capture": "background"}, "frames are captured in their calls"),
        (backend.kept_frames, {"keep_frames": True}, "frames are traced in each run"),
    ],
)
def test_a_setting_that_needs_a_newer_torch_is_named(
    monkeypatch: pytest.MonkeyPatch, owner: Any, setting: dict[str, Any], said: str
) -> None:
    monkeypatch.setattr(owner, "is_possible", lambda: False)
    backend._unsupported.cache_clear()
    frame_swap.configure(**setting)
    try:
        with pytest.warns(FrameSwapWarning, match=rf"needs torch 2\.13 or newer, .*: {said}"):
            assert not backend._unsupported()
    finally:
        backend._unsupported.cache_clear()


def test_a_name_that_torch_no_longer_has_is_found_at_import(run_program: Any) -> None:
    done = run_program(
        """
        import warnings, torch
        del torch._neg_view  # one of the first that are looked up: the others are not there then, either
        import frame_swap
        x = torch.randn(3)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            compiled = torch.compile(lambda x: x.sin() + 7, backend="frame_swap")
            torch.testing.assert_close(compiled(x), x.sin() + 7)
        print([str(w.message) for w in caught if w.category is frame_swap.FrameSwapWarning])
        """
    )
    assert "_neg_view" in done.stdout


ONE_OF_EACH_MODULE = {
    "aot": ("torch._dynamo.backends.debugging", "boxed_nop"),
    "dispatcher": ("torch._library.custom_ops", "OPDEFS"),
    "dynamo": ("torch._dynamo.convert_frame", "output_codes"),
    "eager": ("torch._prims_common", "clone_preserve_strides"),
    "eval_frame": ("torch._dynamo.mutation_guard", "GenerationTracker"),
    "fake_tensors": ("torch.fx._graph_pickler", "Options"),
    "inductor": ("torch._inductor", "config"),
    "logs": ("torch._logging._internal", "LazyTraceHandler"),
}
IN_WORKERS = {
    "imported": ("torch._inductor.cudagraph_trees", "get_manager"),
    "an attribute": ("torch._C", "_dispatch_dump"),
}


def test_a_missing_name_is_named_with_its_module(run_program: Any) -> None:
    """In a process each, forked from one that has imported PyTorch."""
    done = run_program(
        f"""
        import importlib, os, sys
        import torch._dynamo, torch._inductor.compile_fx, torch._inductor.cudagraph_trees

        def forget(module, name):
            delattr(importlib.import_module(module), name)
            sys.modules.pop(f"{{module}}.{{name}}", None)
            sys.meta_path.insert(0, Missing(f"{{module}}.{{name}}"))

        class Missing:
            def __init__(self, module):
                self.module = module

            def find_spec(self, name, path=None, target=None):
                if name == self.module:
                    raise ModuleNotFoundError(f"No module named {{name!r}}")

        def said(early, module, name):
            if os.fork():
                assert os.wait()[1] == 0
                return
            forget(module, name)
            import frame_swap.backend
            from frame_swap.internals import probe
            print(module, name, probe.missing() if early else [probe.missing(), *probe.missing_anywhere()], sep="|")
            sys.stdout.flush()
            os._exit(0)

        for module, name in {list(ONE_OF_EACH_MODULE.values())}:
            said(True, module, name)
        for module, name in {list(IN_WORKERS.values())}:
            said(False, module, name)
        """
    )
    lines = [line.split("|") for line in done.stdout.splitlines()]
    assert len(lines) == len(ONE_OF_EACH_MODULE) + len(IN_WORKERS), done.stderr
    for module, name, said in lines:
        assert module in said, said
        assert name in said, said
        assert said.startswith("[None, ") == ((module, name) in IN_WORKERS.values()), said

"""What may be kept for another process, and why other things may not."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import packed
from torch import Tensor
from torch.testing._internal.two_tensor import TwoTensor

pytestmark = pytest.mark.quick


class TwoTensors(TwoTensor):
    """A subclass whose code is the program's, in as far as it could be another's."""


def plain(x: Tensor) -> Tensor:
    return torch.nn.functional.gelu(x).sum(-1).sqrt()


def test_a_graph_of_torchs_own_functions_may_be_kept() -> None:
    assert packed(plain, torch.ones(3, 3), size_asserts=False).uncacheable == ""


class Pass:
    """A custom pass as Inductor takes them, with or without a word about its code."""

    def __init__(self, uuid: str | None) -> None:
        self._uuid = uuid

    def __call__(self, graph: torch.fx.Graph) -> None: ...

    def uuid(self) -> str | None:
        return self._uuid


def test_a_custom_pass_is_known_by_its_uuid() -> None:
    x = torch.ones(3)
    one, other = (packed(plain, x, post_grad_custom_post_pass=Pass(uuid)) for uuid in ("1", "2"))
    assert one.uncacheable == other.uncacheable == ""
    assert one.digest != other.digest
    assert one.digest == packed(plain, x, post_grad_custom_post_pass=Pass("1")).digest


def a_pass(graph: torch.fx.Graph) -> None: ...


@pytest.mark.parametrize("custom", [Pass(None), a_pass])
def test_a_custom_pass_without_a_uuid_is_named(custom: Any) -> None:
    option = {"post_grad_custom_post_pass": custom}
    reason = "config post_grad_custom_post_pass is code of the program's without a uuid()"
    assert packed(plain, torch.ones(3), **option).uncacheable == f"options {reason}"
    with torch._inductor.config.patch(option):
        assert packed(plain, torch.ones(3)).uncacheable == f"inductor {reason}"


def test_nothing_is_kept_while_somebody_reads_code() -> None:
    torch._logging.set_logs(output_code=True)
    try:
        assert packed(plain, torch.ones(3)).uncacheable.startswith("somebody reads graphs or generated code")
    finally:
        torch._logging.set_logs()
        logging.getLogger("torch._inductor").setLevel(logging.NOTSET)


def test_a_tensor_subclass_of_the_program_is_named() -> None:
    x = TwoTensors(torch.ones(3), torch.ones(3))
    reason = "an input is a TwoTensors, a tensor subclass of the program's, whose code no key holds"
    assert packed(lambda x: x * 2, x).uncacheable == reason
    assert packed(lambda x: x * 2, TwoTensor(torch.ones(3), torch.ones(3))).uncacheable == ""


# --- Operators of a module ---

OPERATOR = """\
import torch
import helpers_of_operator as helpers
from helpers_of_operator import Rule

rule = Rule()

@torch.library.custom_op("keeping::operator", mutates_args=())
def operator(x: torch.Tensor) -> torch.Tensor:
    return x * 2

@operator.register_fake
def _(x):
    return helpers.shape_of(x)

operator.register_autograd(lambda ctx, grad: rule.apply(grad), setup_context=lambda ctx, inputs, output: None)
"""
HELPERS = """\
import torch

def shape_of(x):
    return like(x)

def like(x):
    return torch.empty_like(x)

class Base:
    def apply(self, grad):
        return grad * 2

class Rule(Base):
    pass
"""


@pytest.fixture
def digest_of_operator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], str]]:
    """Of a graph with an operator whose module calls another one, of which the text is given."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "an_operator.py").write_text(OPERATOR)
    names = ("an_operator", "helpers_of_operator")

    def digest(helpers: str) -> str:
        (tmp_path / "helpers_of_operator.py").write_text(helpers)
        for name in names:
            sys.modules.pop(name, None)
        sys.dont_write_bytecode = True
        import importlib

        importlib.invalidate_caches()
        module = importlib.import_module("an_operator")
        return packed(lambda x: module.operator(x), torch.ones(3)).digest

    usual = sys.dont_write_bytecode
    yield digest
    sys.dont_write_bytecode = usual
    for name in names:
        sys.modules.pop(name, None)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("torch.empty_like(x)", "torch.empty_like(x).contiguous()"),
        ("return like(x)", "return like(x).detach()"),
        ("grad * 2", "grad * 3"),
        ("    pass", "    def apply(self, grad): return grad"),
    ],
)
def test_a_change_of_what_an_operators_functions_call_changes_the_content(
    digest_of_operator: Callable[[str], str], old: str, new: str
) -> None:
    assert old in HELPERS
    before = digest_of_operator(HELPERS)
    assert digest_of_operator(HELPERS.replace(old, new)) != before
    assert digest_of_operator(HELPERS) == before

"""Vector instructions are tried from the best down, and no further than necessary."""

from __future__ import annotations

import platform
from typing import ClassVar

import pytest
from torch._inductor import config, cpu_vec_isa

from frame_swap.internals import inductor

pytestmark = [
    pytest.mark.quick,
    pytest.mark.skipif(platform.machine() != "x86_64", reason="there is one choice on this CPU"),
]


class Instructions:
    """Vector instructions that work or not; `tried` names those that were asked."""

    tried: ClassVar[list[str]] = []

    def __init__(self, name: str, bits: int, works: bool) -> None:
        self.name, self.bits, self.works = name, bits, works

    def __str__(self) -> str:
        return self.name

    def __bool__(self) -> bool:
        self.tried.append(self.name)
        return self.works

    def bit_width(self) -> int:
        return self.bits


@pytest.fixture
def tried(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of those tried, on a CPU that knows three and a compiler that knows `request.param` of them."""
    works = request.param
    names = ("new wide", "wide", "narrow", "foreign")
    listed = [Instructions(name, 512 if "wide" in name else 256, name in works) for name in names]
    monkeypatch.setattr(Instructions, "tried", [])
    monkeypatch.setattr(cpu_vec_isa, "supported_vec_isa_list", listed)
    monkeypatch.setattr(cpu_vec_isa, "x86_isa_checker", lambda: ["new", "wide", "narrow"])
    monkeypatch.setattr(cpu_vec_isa, "valid_vec_isa_list", cpu_vec_isa.valid_vec_isa_list)  # to be put back
    monkeypatch.delenv("ATEN_CPU_CAPABILITY", raising=False)
    return Instructions.tried


@pytest.mark.parametrize("tried", [{"new wide", "wide", "narrow"}], indirect=True)
def test_the_best_is_enough(tried: list[str]) -> None:
    inductor.find_vector_instructions()
    assert set(tried) == {"new wide"}
    assert str(cpu_vec_isa.pick_vec_isa()) == "new wide"


@pytest.mark.parametrize("tried", [{"narrow"}], indirect=True)
def test_those_that_do_not_work_are_passed_over(tried: list[str]) -> None:
    inductor.find_vector_instructions()
    assert str(cpu_vec_isa.pick_vec_isa()) == "narrow"
    assert set(tried) == {"new wide", "wide", "narrow"}


@pytest.mark.parametrize("tried", [set()], indirect=True)
def test_there_may_be_none(tried: list[str]) -> None:
    inductor.find_vector_instructions()
    assert cpu_vec_isa.pick_vec_isa() is cpu_vec_isa.invalid_vec_isa
    assert "foreign" not in tried


@pytest.mark.parametrize("tried", [{"new wide", "wide", "narrow"}], indirect=True)
def test_a_program_may_ask_for_others(tried: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    inductor.find_vector_instructions()
    with config.patch({"cpp.simdlen": 256}):
        assert str(cpu_vec_isa.pick_vec_isa()) == "narrow"
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "default")
    assert cpu_vec_isa.pick_vec_isa() is cpu_vec_isa.invalid_vec_isa

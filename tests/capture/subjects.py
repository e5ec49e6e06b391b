"""A program whose frame reads its state in many ways, and changes of that state, each with its undoing."""

from __future__ import annotations

from collections.abc import Callable
from types import CodeType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

LEVEL = 5.0


def helper(x: Tensor) -> Tensor:
    return x + LEVEL


def other_helper(x: Tensor) -> Tensor:
    return x * LEVEL


_HELPER, _CODE, _OTHER_CODE = helper, helper.__code__, other_helper.__code__


def scaled(offset: float) -> tuple[Callable[[Tensor], Tensor], Callable[[float], None]]:
    def add(x: Tensor) -> Tensor:
        return x + offset

    def put(value: float) -> None:
        nonlocal offset
        offset = value

    return add, put


class Part(nn.Module):
    """Its forward reads attributes, containers, parameters, globals and a closure, and is right in any state."""

    def __init__(self) -> None:
        super().__init__()
        self.factor, self.count, self.flag, self.act = 2.0, 2, None, torch.relu
        self.items, self.table, self.options = [1.0, 2.0], {"a": 1.0}, {"m", "n"}
        self.norm, self.inner = nn.BatchNorm1d(3), nn.Identity()
        self.weight = nn.Parameter(torch.ones(3))
        self.buffer = torch.ones(3)
        self.add, self.put = scaled(0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.factor + self.count
        for item in self.items:
            x = x + item
        for value in self.table.values():
            x = x + value
        if "m" in self.options:
            x = x + 0.5
        if "z" in self.table:
            x = x - 3
        x = x if self.flag is None else x + 7
        x = self.act(x) + helper(x) + self.add(x)
        x = (self.norm(x) * self.weight + self.buffer).float()
        x = self.inner(x) + getattr(self, "more", 0.25) + len(self.items)
        if isinstance(self.inner, nn.ReLU):
            x = x + 1
        return x * 2 if hasattr(self, "extra") else x


class Parts(nn.Module):
    def __init__(self, n: int = 2) -> None:
        super().__init__()
        self.parts = nn.ModuleList(Part() for _ in range(n))

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts:
            x = part(x)
        return x


class Change(NamedTuple):
    """A change of a `Part`, or of what it reads elsewhere, and the way back."""

    do: Callable[[Any], object]
    undo: Callable[[Any], object]


def _attribute(name: str, value: Any, before: Any) -> Change:
    return Change(lambda part: setattr(part, name, value), lambda part: setattr(part, name, before))


def _new_attribute(name: str, value: Any) -> Change:
    return Change(lambda part: setattr(part, name, value), lambda part: part.__dict__.pop(name))


def set_global(name: str, value: Any) -> None:
    globals()[name] = value


def set_code(code: CodeType) -> None:
    _HELPER.__code__ = code


def restore() -> None:
    """Undo the changes of what parts share."""
    set_global("LEVEL", 5.0)
    set_global("helper", _HELPER)
    set_code(_CODE)


def _negated(x: Tensor) -> Tensor:
    return -x


_hooks: list[RemovableHandle] = []
"""Not in the module, which another change may replace before the hook is removed."""


def _hook(part: Any) -> None:
    _hooks.append(part.inner.register_forward_hook(lambda module, args, output: output * 3))


CHANGES = {
    "a float attribute": _attribute("factor", 3.0, 2.0),
    "an int attribute": _attribute("count", 5, 2),
    "None to a value": _attribute("flag", 1, None),
    "a function in an attribute": _attribute("act", torch.sigmoid, torch.relu),
    "an attribute that hasattr finds": _new_attribute("extra", 1),
    "an attribute that getattr finds": _new_attribute("more", 1.5),
    "a list appended to": Change(lambda part: part.items.append(4.0), lambda part: part.items.pop()),
    "an item of a list": Change(
        lambda part: part.items.__setitem__(0, 9.0), lambda part: part.items.__setitem__(0, 1.0)
    ),
    "a dict added to": Change(lambda part: part.table.update(b=9.0), lambda part: part.table.pop("b")),
    "a key that `in` finds": Change(lambda part: part.table.update(z=9.0), lambda part: part.table.pop("z")),
    "a value of a dict": Change(lambda part: part.table.update(a=9.0), lambda part: part.table.update(a=1.0)),
    "a set": Change(lambda part: part.options.discard("m"), lambda part: part.options.add("m")),
    "train to eval": Change(lambda part: part.norm.eval(), lambda part: part.norm.train()),
    "requires_grad": Change(
        lambda part: part.weight.requires_grad_(False), lambda part: part.weight.requires_grad_(True)
    ),
    "a parameter's dtype": Change(
        lambda part: setattr(part.weight, "data", part.weight.data.double()),
        lambda part: setattr(part.weight, "data", part.weight.data.float()),
    ),
    "a tensor's dtype": Change(
        lambda part: setattr(part, "buffer", torch.ones(3, dtype=torch.float64)),
        lambda part: setattr(part, "buffer", torch.ones(3)),
    ),
    "a tensor's shape": Change(
        lambda part: setattr(part, "buffer", torch.ones(4, 3)),
        lambda part: setattr(part, "buffer", torch.ones(3)),
    ),
    "a submodule": Change(
        lambda part: setattr(part, "inner", nn.ReLU()), lambda part: setattr(part, "inner", nn.Identity())
    ),
    "a module's forward": Change(
        lambda part: setattr(part.inner, "forward", _negated), lambda part: part.inner.__dict__.pop("forward")
    ),
    "a hook": Change(_hook, lambda part: _hooks.pop().remove()),
    "a closure's cell": Change(lambda part: part.put(2.0), lambda part: part.put(0.5)),
    "a global float": Change(lambda part: set_global("LEVEL", 6.0), lambda part: set_global("LEVEL", 5.0)),
    "a global function": Change(
        lambda part: set_global("helper", other_helper), lambda part: set_global("helper", _HELPER)
    ),
    "a function's code": Change(lambda part: set_code(_OTHER_CODE), lambda part: set_code(_CODE)),
}

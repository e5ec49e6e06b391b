"""`guards.predicate` against sympy: for any integers, the source gives the result of torch's own evaluation."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import pytest
import sympy
from hypothesis import assume, given, reject, settings
from hypothesis import strategies as st
from torch.utils._sympy import functions as torch_functions
from torch.utils._sympy.functions import (
    FloorDiv,
    IntTrueDiv,
    Mod,
    ModularIndexing,
    PowByNatural,
    PythonMod,
    ToFloat,
)
from torch.utils._sympy.numbers import int_oo

from frame_swap.guards import Inexpressible, source, undecided

pytestmark = pytest.mark.quick

Values = Mapping[sympy.Symbol, int]

a, b, c = SYMBOLS = sympy.symbols("a b c", integer=True)
s0, s1 = SIZES = sympy.symbols("s0 s1", integer=True, positive=True)
NAMES = {symbol: str(symbol) for symbol in (*SYMBOLS, *SIZES)}

RELATIONS = [sympy.Eq, sympy.Ne, sympy.Lt, sympy.Le, sympy.Gt, sympy.Ge]
UNARY = [sympy.Abs, lambda x, **how: sympy.Mul(-1, x, **how), lambda x, **how: sympy.Pow(x, 3, **how)]
BINARY = [
    *(sympy.Add, sympy.Mul, sympy.Max, sympy.Min, torch_functions.Max, torch_functions.Min),
    *(FloorDiv, torch_functions.CleanDiv, Mod, sympy.Mod, PythonMod, PowByNatural),
    *(getattr(torch_functions, f"BitwiseFn_bitwise_{name}") for name in ("and", "or", "xor")),
]
REWRITTEN: list[Any] = [  # by sympy, as some of the above
    *(torch_functions.CeilDiv, torch_functions.LShift, torch_functions.RShift),
]
Max: Any = torch_functions.Max

UNBUILDABLE = (  # raised by torch and sympy themselves
    ArithmeticError,  # FloorDiv(a, 0)
    AssertionError,  # Mod(-1, 2)
    AttributeError,  # LShift(1, a) in torch 2.11
    RecursionError,  # FloorDiv of some unevaluated sums
    TypeError,  # zoo < 1
    ValueError,  # LShift(a, -1)
)


def holds(relation: sympy.Basic, values: Values) -> bool:
    """Evaluate the source of `relation` for `values`."""
    text = source([relation], NAMES)
    return eval(text, {str(symbol): value for symbol, value in values.items()})  # type: ignore[no-any-return]


def expected(relation: sympy.Basic, values: Values) -> bool:
    """sympy's result for `values`; False if one of torch's functions is undefined there."""
    try:
        return bool(_evaluate(relation, values))
    except ArithmeticError:
        return False


def _evaluate(expr: sympy.Basic, values: Values) -> sympy.Basic:
    """`expr.xreplace(values)`, node by node, so that a node without a finite value is noticed."""
    if not expr.args:
        return expr.xreplace({symbol: sympy.Integer(value) for symbol, value in values.items()})
    args = [_evaluate(arg, values) for arg in expr.args]
    match expr:
        case Mod():  # some pairs out of its domain, such as (-4, 4), have a value nevertheless
            defined = args[0] >= 0 and args[1] >= 1
        case ModularIndexing():  # and so has (0, 0, 1)
            defined = args[1] != 0 and args[2] != 0
        case PowByNatural() | sympy.Pow() if not (expr.is_Pow and expr.exp.is_negative):
            defined = 0 <= args[1] <= 63
        case _:
            defined = True  # or sympy says
    if not defined:
        raise ArithmeticError(f"{expr.func}{tuple(args)}")
    value = expr.func(*args)
    if value.has(int_oo, -int_oo):  # torch saturates, the source is exact
        reject()
    if value.has(sympy.zoo, sympy.nan):
        raise ZeroDivisionError
    return value


integers = st.one_of(st.integers(-9, 9), st.integers(-(2**70), 2**70))
sizes = st.one_of(st.integers(1, 9), st.integers(1, 2**70))
valuations = st.fixed_dictionaries(dict.fromkeys(SYMBOLS, integers) | dict.fromkeys(SIZES, sizes))


@st.composite
def trees(draw: st.DrawFn, depth: int) -> Any:
    """An integer expression, simplified by sympy or left as built."""
    if depth == 0 or draw(st.integers(0, 5)) == 0:
        return draw(st.one_of(st.sampled_from([*SYMBOLS, *SIZES]), st.integers(-9, 9).map(sympy.Integer)))
    how = {"evaluate": draw(st.booleans())}
    x, y, z = (draw(trees(depth - 1)) for _ in range(3))
    kind = draw(st.integers(0, 7))
    if kind == 0:
        return draw(st.sampled_from(UNARY))(x, **how)
    if kind == 1:
        return ModularIndexing(x, y, z, **how)
    if kind == 2:
        return torch_functions.Where(draw(st.sampled_from(RELATIONS))(x, y), y, z, **how)
    if kind == 3:
        return draw(st.sampled_from(REWRITTEN))(x, y)
    return draw(st.sampled_from(BINARY))(x, y, **how)


@st.composite
def guards(draw: st.DrawFn, depth: int) -> Any:
    """A relation, or a conjunction or disjunction of relations."""
    join = draw(st.sampled_from([None, None, sympy.And, sympy.Or, sympy.Not]))
    if depth and join:
        operands = [draw(guards(depth - 1)) for _ in range(1 if join is sympy.Not else 2)]
        return join(*operands, evaluate=draw(st.booleans()))
    relation = draw(st.sampled_from(RELATIONS))
    return relation(draw(trees(2)), draw(trees(2)), evaluate=draw(st.booleans()))


@st.composite
def buildable(draw: st.DrawFn, depth: int) -> Any:
    try:
        relation = draw(guards(depth))
    except UNBUILDABLE:
        reject()
    for node in sympy.preorder_traversal(relation):  # the results of, e.g., PowByNatural(10, 63) and (a, -1)
        assume(node not in (int_oo, -int_oo, sympy.oo, -sympy.oo, sympy.zoo, sympy.nan))
        assume(not (isinstance(node, sympy.Pow) and node.exp.is_negative))
    return relation


@settings(max_examples=300, deadline=None, derandomize=True)
@given(buildable(depth=2), st.lists(valuations, min_size=3, max_size=3))
def test_source_says_what_sympy_says(relation: sympy.Basic, samples: list[Values]) -> None:
    for values in samples:
        assert holds(relation, values) == expected(relation, values)


@pytest.mark.parametrize("function", BINARY)
def test_each_function_near_zero(function: Any) -> None:
    term = function(a, b, evaluate=False)
    for x, y, z in itertools.product(range(-4, 5), range(-4, 5), (-2, 0, 1)):
        values = {a: x, b: y, c: z}
        assert holds(term <= c, values) == expected(term <= c, values), values


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.sampled_from(RELATIONS), valuations, st.lists(st.integers(-4, 4), min_size=4, max_size=4))
def test_fractions_are_cleared(relation: Any, values: Values, numbers: list[int]) -> None:
    p, q, r, d = numbers
    assume(d != 0)
    fractional = relation(p * a / d + q * s0 * FloorDiv(a, 3) / 2 + b / s1, r / c)
    assert holds(fractional, values) == expected(fractional, values)


def test_integers_are_exact_where_torch_saturates() -> None:
    relation = sympy.Eq(PowByNatural(a, b), c)
    assert holds(relation, {a: 10, b: 63, c: 10**63})
    assert not holds(relation, {a: 10, b: 63, c: 10**63 + 1})
    assert not holds(relation, {a: 10, b: 64, c: 10**64})  # undefined


S41, S69, S77, S86 = sympy.symbols("s41 s69 s77 s86", integer=True)


@pytest.mark.parametrize(
    ("relations", "text"),
    [
        # seen in PyTorch's own test suite
        ([sympy.Eq(S86, 2)], "s86 == 2"),
        ([S77 - 3 * FloorDiv(S77 + 3, 4) >= 2], "s77 - 3 * ((s77 + 3) // 4) >= 2"),
        ([sympy.Lt(S41, S41 * Max(1, S69 - 1))], "s41 < s41 * max(1, s69 - 1)"),
        # none, and those that say nothing
        ([], "True"),
        ([sympy.true, sympy.Eq(S86, 2), sympy.true], "s86 == 2"),
        ([sympy.false], "False"),
        # several are one conjunction
        ([S41 > 1, sympy.Or(S69 > 1, S77 > 1), S41 > 1], "s41 > 1 and (s69 > 1 or s77 > 1)"),
        # a sign belongs to its number
        ([sympy.Eq(PowByNatural(-2, S41), 4)], "s41 >= 0 and s41 <= 63 and (-2) ** s41 == 4"),
        ([sympy.Eq(2**S41, 4)], "s41 >= 0 and s41 <= 63 and 2 ** s41 == 4"),  # torch 2.11: LShift(1, s41)
        # what makes a term defined comes first, innermost first, once; literals need none
        ([FloorDiv(S41, 8) > 1], "s41 // 8 > 1"),
        ([FloorDiv(S41, S69) > 1, sympy.Eq(PythonMod(S41, S69), 0)],
         "s69 != 0 and s41 // s69 > 1 and s41 % s69 == 0"),
        ([FloorDiv(1, FloorDiv(S41, S69)) > 1], "s69 != 0 and s41 // s69 != 0 and 1 // (s41 // s69) > 1"),
        # what a symbol is assumed to be is no reason to leave a condition out
        ([FloorDiv(a, s1) > 1], "s1 != 0 and a // s1 > 1"),
        # neither `or` nor `not` makes an undefined relation hold
        ([sympy.Or(S41 > 1, FloorDiv(3, S41) > 1)], "s41 != 0 and (s41 > 1 or 3 // s41 > 1)"),
        ([sympy.Not(sympy.And(S69 > 1, FloorDiv(3, S41) > 1))],
         "s41 != 0 and not (s69 > 1 and 3 // s41 > 1)"),
        # torch's Mod is for dividends that are not negative: these are, or must be
        ([sympy.Eq(Mod(s0, 8), 0)], "s0 % 8 == 0"),
        ([sympy.Eq(Mod(S41, 8), 0)], "s41 >= 0 and s41 % 8 == 0"),
    ],
)  # fmt: skip
def test_text(relations: list[sympy.Basic], text: str) -> None:
    symbols = {symbol for relation in relations for symbol in relation.free_symbols}
    assert source(relations, {symbol: str(symbol) for symbol in symbols}) == text


@pytest.mark.parametrize(
    "relation",
    [
        s0 < sympy.Float(2.5),
        ToFloat(s0) >= 7,
        IntTrueDiv(s0, s1) < 3,
        torch_functions.RoundToInt(IntTrueDiv(s0, 2) + 1.0) <= s1,
        sympy.Eq(torch_functions.FloorToInt(1.8735363483429 * ToFloat(s0)), s1),
        sympy.Eq(torch_functions.CeilToInt(0.3 * ToFloat(s0)), torch_functions.FloorToInt(0.3 * ToFloat(s0)) + 1),
        Max(1, torch_functions.CeilToInt(torch_functions.FloorToInt(-1.25 * ToFloat(s0)))) < s1,
        sympy.Ne(sympy.Mod(s1, torch_functions.FloorToInt(1.8735363483429 * ToFloat(s0))), 0),
        torch_functions.TruncToInt(0.7 - IntTrueDiv(s0, 3)) * s1 > -10,
    ],
    ids=str,
)
def test_floats_are_torchs(relation: sympy.Basic) -> None:
    samples = [*range(1, 60), 1000, 2**31 - 1, 10**15 - 1]  # sympy takes longer integers with more than 53 bits
    values = [{s0: size, s1: other} for size in samples for other in (1, 2, 7, 15, 28)]
    assert [holds(relation, v) for v in values] == [expected(relation, v) for v in values]


def test_a_name_may_be_an_expression() -> None:
    assert source([3 * a > 2, b > 2], {a: "x + 1", b: "args[0]"}) == "3 * (x + 1) > 2 and args[0] > 2"


@pytest.mark.parametrize(
    ("relation", "named"),
    [
        (a < sympy.Symbol("u0", integer=True), "the symbol u0 is not an argument of the graph"),
        (a < sympy.Symbol("zf1", real=True), "the symbol zf1 is not an integer"),
        (torch_functions.FloatTrueDiv(a, b) < 2, "FloatTrueDiv"),
        (torch_functions.FloatPow(a, b) < 2, "FloatPow"),
        (ToFloat(a) + ToFloat(b) + ToFloat(c) < 2, "Add is not known as an operation on floats"),
        (1.5 * ToFloat(a) * ToFloat(b) < 2, "Mul is not known as an operation on floats"),
        (a < sympy.Float(2.0**70), "Float"),
        (torch_functions.FloorToInt(a / 2) < 2, "FloorToInt"),
        (torch_functions.CeilToInt(a / 2) < 2, "CeilToInt"),
        (torch_functions.TruncToInt(a / 2) < 2, "TruncToInt"),
        (torch_functions.RoundToInt(a / 2) < 2, "RoundToInt"),
        (torch_functions.OpaqueUnaryFn_sqrt(a) < 2, "OpaqueUnaryFn_sqrt"),
        (sympy.Eq(sympy.floor(a / 2), 2), "floor"),
        (sympy.Function("mystery")(a) < 2, "mystery"),
        (sympy.Eq(a, int_oo, evaluate=False), "int_oo"),
        (sympy.Eq(a, sympy.oo, evaluate=False), "oo"),
        (Max(a / 3, b) < 3, "1/3"),
        (sympy.Eq(FloorDiv(a, 2 / b, evaluate=False), 3), "1/b"),
        (sympy.Xor(a > 1, b > 1), "Xor"),
        (sympy.Eq(a > 1, b > 1), "StrictGreaterThan"),
        (a, "Symbol"),
        (sympy.Add(*(a**i for i in range(1000))) > 1, "too many terms"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",  # and no relations of a page each
)
def test_refusal_names_what_is_in_the_way(relation: sympy.Basic, named: str) -> None:
    names = NAMES | {sympy.Symbol("zf1", real=True): "zf1"}
    with pytest.raises(Inexpressible, match=f"{named}.*the region stays on eager code"):
        source([a > 1, relation], names)


def test_only_what_always_holds_needs_no_check() -> None:
    known = {a > 1: True, b > 1: False}
    assert undecided([c > 1, b > 1, a > 1, c > 1], known.get) == [c > 1, b > 1]

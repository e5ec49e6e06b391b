"""Late guards as Python source.

A compile may add guards on sizes after Dynamo has closed the frame's own guards: `Eq(s86, 2)`,
`s77 - 3*((s77 + 3)//4) >= 2`. They are sympy relations over integer symbols. `undecided` drops the relations that
need no check. `source` writes the others as one Python expression over the values of the symbols.

    >>> s77 = sympy.Symbol("s77", integer=True)
    >>> source([s77 - 3 * torch_functions.FloorDiv(s77 + 3, 4) >= 2], {s77: "s77"})
    's77 - 3 * ((s77 + 3) // 4) >= 2'

The meaning of the expression:
- It is true if and only if every relation holds, in integers of any size. Torch saturates a power beyond
  `sys.maxsize` at `int_oo` when it folds constants; the expression stays exact.
- A relation does not hold if any part of it is undefined: a divisor is 0; a dividend of torch's `Mod` is negative
  or its divisor is not positive; an exponent is outside 0..63 (torch defines no power below that range, and no
  finite one above it for a base of 2 or more). The conditions for this come first (`s1 != 0 and ...`), unless
  a literal meets them. So the expression never raises on ints and never computes a huge power. "Any part" is
  strict: `Or(Eq(a // b, 1), Eq(b, 0))` does not hold for `b == 0`, since it raises in torch.
- If torch computes with floats (`FloorToInt(1.5*ToFloat(s0))`, from an interpolation), the expression does so,
  too, in double precision and for sizes below 2**63. Each sum or product may have only one float operation: sympy
  does not keep the order of several, and the last bit depends on it.
- It uses the caller's names and the builtins `max`, `min`, `abs`, `float`, `int` and `round`: these must not be
  shadowed by its names.

`torch.utils._sympy.functions` is private to torch; the names used here exist in 2.11, 2.13 and 2.15.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import cast

import sympy
from sympy.logic.boolalg import BooleanAtom
from torch.utils._sympy import functions as torch_functions

_COMPARISONS: dict[type[sympy.Basic], ast.cmpop] = {
    sympy.Eq: ast.Eq(),
    sympy.Ne: ast.NotEq(),
    sympy.Lt: ast.Lt(),
    sympy.Le: ast.LtE(),
    sympy.Gt: ast.Gt(),
    sympy.Ge: ast.GtE(),
}

_BITWISE: dict[type[sympy.Basic], ast.operator] = {
    torch_functions.BitwiseFn_bitwise_and: ast.BitAnd(),
    torch_functions.BitwiseFn_bitwise_or: ast.BitOr(),
    torch_functions.BitwiseFn_bitwise_xor: ast.BitXor(),
}

_BUILTINS: dict[type[sympy.Basic], str] = {
    torch_functions.Max: "max",
    torch_functions.Min: "min",
    sympy.Max: "max",
    sympy.Min: "min",
    sympy.Abs: "abs",
}

# From floats to integers. `x // 1` is the floor, but still a float.
_ROUNDINGS: dict[type[sympy.Basic], str] = {
    torch_functions.FloorToInt: "int(x // 1)",
    torch_functions.CeilToInt: "-int(-x // 1)",
    torch_functions.RoundToInt: "round(x)",
    torch_functions.TruncToInt: "int(x)",
}

_FLOATS = (sympy.Float, torch_functions.ToFloat, torch_functions.IntTrueDiv)

_HIGHEST_EXPONENT = 63  # sizes are 64-bit

_REFUSAL = "late guard{} has no predicate: {}; the region stays on eager code"


class Inexpressible(ValueError):
    """A late guard cannot be checked with the graph's integer arguments; the message says why.

    No code that relies on the guard may be installed then: the region stays on eager code.
    """


def undecided(relations: Iterable[sympy.Basic], implied: Callable[[sympy.Basic], bool | None]) -> list[sympy.Basic]:
    """The relations that have to be checked on each call, in their order, without duplicates.

    `implied` tells what is known of a relation before any call: True (it always holds), False (it never holds) or
    None (that depends on the call). Only relations that always hold are dropped. One that never holds stays, and no
    call passes.
    """
    return [relation for relation in dict.fromkeys(relations) if not implied(relation)]


def source(relations: Iterable[sympy.Basic], names: Mapping[sympy.Symbol, str]) -> str:
    """One Python boolean expression that is true if and only if all `relations` hold; "True" if there are none.

    Args:
        relations: relations over integer symbols.
        names: for each symbol, the identifier (or other expression) for its value, an int.

    Raises:
        Inexpressible: for sums and products of several floats, infinities, symbols that are not in `names`, and
            functions that are unknown here.
    """
    conjuncts: dict[str, None] = {}  # an ordered set: a condition comes before the term that needs it
    for relation in relations:
        conjuncts.update(dict.fromkeys(_Translation(relation, names).conjuncts()))
    conjuncts.pop("True", None)
    return " and ".join(conjuncts) or "True"


class _Translation:
    """Translates one relation from sympy to `ast`; `ast.unparse` then sets the parentheses."""

    def __init__(self, relation: sympy.Basic, names: Mapping[sympy.Symbol, str]) -> None:
        self._relation = relation
        self._names = names
        self._conditions: list[ast.expr] = []  # the relation is defined under these; innermost terms first

    def conjuncts(self) -> list[str]:
        """The conditions, then the relation, each as an operand for `and`."""
        try:
            holds = self._boolean(self._relation)
            return [ast.unparse(ast.BoolOp(ast.And(), [node])) for node in (*self._conditions, holds)]
        except RecursionError:
            raise Inexpressible(_REFUSAL.format("", "it has too many terms or levels")) from None

    def _boolean(self, expr: sympy.Basic) -> ast.expr:
        match expr:
            case BooleanAtom():
                return ast.Constant(bool(expr))
            case sympy.And(args=args):
                return ast.BoolOp(ast.And(), [self._boolean(arg) for arg in args])
            case sympy.Or(args=args):
                return ast.BoolOp(ast.Or(), [self._boolean(arg) for arg in args])
            case sympy.Not(args=(arg,)):
                return ast.UnaryOp(ast.Not(), self._boolean(arg))
            case sympy.Rel(args=(left, right)) if type(expr) in _COMPARISONS:
                if any(map(_is_fraction, sympy.preorder_traversal(expr))):
                    numerator, denominator = sympy.fraction(sympy.together(left - right))
                    self._require(sympy.Ne, denominator, 0)
                    left, right = numerator * denominator, sympy.S.Zero  # the product has the sign of the fraction
                return _compare(self._number(left), type(expr), self._number(right))
        raise self._inexpressible(f"{type(expr).__name__} is not known as a relation: {expr}")

    def _number(self, expr: sympy.Basic) -> ast.expr:
        integer = expr.is_integer or not expr.has(*_FLOATS)
        if not integer and isinstance(expr, sympy.Mod):  # its `is_integer` also depends on whether the divisor is 0
            integer = all(arg.is_integer for arg in expr.args)
        return self._integer(expr) if integer else self._float(expr)

    def _float(self, expr: sympy.Basic) -> ast.expr:
        """A number in double precision. As in torch, an integer becomes one when it meets a float."""
        match expr:
            case sympy.Float() if abs(expr) < 2**64:
                return _literal(float(expr))
            case torch_functions.ToFloat(args=(number,)):
                return ast.Call(ast.Name("float"), [self._integer(number)], [])
            case torch_functions.IntTrueDiv(args=(dividend, divisor)):
                return self._divide(dividend, ast.Div(), divisor)
            case sympy.Add(args=(left, right)):
                return ast.BinOp(self._number(left), ast.Add(), self._number(right))
            case sympy.Mul(args=(left, right)):
                return ast.BinOp(self._number(left), ast.Mult(), self._number(right))
        raise self._inexpressible(f"{type(expr).__name__} is not known as an operation on floats: {expr}")

    def _integer(self, expr: sympy.Basic) -> ast.expr:
        match expr:
            case sympy.Integer():
                return _literal(int(expr))
            case sympy.Symbol():
                return self._symbol(expr)
            case sympy.Add():
                return self._sum(expr.as_ordered_terms())
            case sympy.Mul(args=args):
                return _fold(ast.Mult(), map(self._integer, args))
            case sympy.Pow(args=(base, sympy.Integer() as exponent)) if exponent >= 0:
                return ast.BinOp(self._integer(base), ast.Pow(), self._integer(exponent))
            case torch_functions.PowByNatural() | sympy.Pow() if not _is_fraction(expr):
                base, exponent = expr.args
                self._require(sympy.Ge, exponent, 0)
                power = self._require(sympy.Le, exponent, _HIGHEST_EXPONENT)
                return ast.BinOp(self._integer(base), ast.Pow(), power)
            case torch_functions.FloorDiv(args=(dividend, divisor)):  # and its subclass CleanDiv
                return self._divide(dividend, ast.FloorDiv(), divisor)
            case torch_functions.PythonMod(args=(dividend, divisor)) | sympy.Mod(args=(dividend, divisor)):
                return self._divide(dividend, ast.Mod(), divisor)
            case torch_functions.Mod(args=(dividend, divisor)):
                if not dividend.is_nonnegative:
                    self._require(sympy.Ge, dividend, 0)
                return ast.BinOp(self._integer(dividend), ast.Mod(), self._require(sympy.Gt, divisor, 0))
            case torch_functions.ModularIndexing(args=(dividend, divisor, modulus)):
                quotient = self._divide(dividend, ast.FloorDiv(), divisor)
                return ast.BinOp(quotient, ast.Mod(), self._require(sympy.Ne, modulus, 0))
            case torch_functions.Where(args=(condition, then, otherwise)):
                return ast.IfExp(self._boolean(condition), self._integer(then), self._integer(otherwise))
        if type(expr) in _ROUNDINGS:
            return self._round(expr.args[0], _ROUNDINGS[type(expr)])
        arguments = map(self._integer, expr.args)
        if type(expr) in _BITWISE:
            return _fold(_BITWISE[type(expr)], arguments)
        if type(expr) in _BUILTINS:
            return ast.Call(ast.Name(_BUILTINS[type(expr)]), list(arguments), [])
        raise self._inexpressible(f"{type(expr).__name__} is not known as integer arithmetic: {expr}")

    def _round(self, number: sympy.Basic, rounding: str) -> ast.expr:
        if number.is_integer:
            return self._integer(number)
        expression = ast.parse(rounding, mode="eval").body
        return cast("ast.expr", _Insertion(self._float(number)).visit(expression))

    def _symbol(self, symbol: sympy.Symbol) -> ast.expr:
        if symbol not in self._names:
            raise self._inexpressible(f"the symbol {symbol} is not an argument of the graph")
        if not symbol.is_integer:
            raise self._inexpressible(f"the symbol {symbol} is not an integer")
        return ast.parse(self._names[symbol], mode="eval").body

    def _sum(self, terms: list[sympy.Basic]) -> ast.expr:
        total = self._integer(terms[0])
        for term in terms[1:]:
            if term.as_coeff_Mul()[0].is_negative:
                total = ast.BinOp(total, ast.Sub(), self._integer(-term))
            else:
                total = ast.BinOp(total, ast.Add(), self._integer(term))
        return total

    def _divide(self, dividend: sympy.Basic, op: ast.operator, divisor: sympy.Basic) -> ast.expr:
        return ast.BinOp(self._integer(dividend), op, self._require(sympy.Ne, divisor, 0))

    def _require(self, relation: type[sympy.Basic], expr: sympy.Basic, bound: int) -> ast.expr:
        """`expr`, and add the condition `relation(expr, bound)` unless a literal meets it.

        Assumptions of sympy about a symbol are not trusted: they rest on guards of the frame, which users can
        filter.
        """
        value = self._integer(expr)
        if not (isinstance(expr, sympy.Integer) and relation(expr, bound)):
            self._conditions.append(_compare(value, relation, _literal(bound)))
        return value

    def _inexpressible(self, reason: str) -> Inexpressible:
        return Inexpressible(_REFUSAL.format(f" {self._relation}", reason))


class _Insertion(ast.NodeTransformer):
    """Replaces `x` with an expression."""

    def __init__(self, expression: ast.expr) -> None:
        self._expression = expression

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return self._expression if node.id == "x" else node


def _is_fraction(expr: sympy.Basic) -> bool:
    match expr:
        case sympy.Rational():
            return bool(expr.q != 1)
        case sympy.Pow(args=(_, exponent)):
            return bool(exponent.is_negative)
    return False


def _compare(left: ast.expr, relation: type[sympy.Basic], right: ast.expr) -> ast.expr:
    return ast.Compare(left, [_COMPARISONS[relation]], [right])


def _fold(op: ast.operator, operands: Iterable[ast.expr]) -> ast.expr:
    return functools.reduce(lambda left, right: ast.BinOp(left, op, right), operands)


def _literal(value: float) -> ast.expr:
    """`value` with its sign as an operator: `ast.unparse` would write a base of -2 as `-2 ** n`."""
    return ast.Constant(value) if value >= 0 else ast.UnaryOp(ast.USub(), ast.Constant(-value))

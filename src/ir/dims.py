"""Arithmetic on dimensions that are ints or `onnx_ir.SymbolicDim`.

Ints take the fast path; symbols go through onnx_ir's sympy expressions, and each distinct
operation is computed once and remembered, because sympy costs 0.1 ms an operation and a graph
repeats the same few expressions thousands of times. Symbols stand for positive integers.
A result that turns out constant is an int; anything with an unnamed symbol is unnamed.
Not here: what a node does with its dimensions (`shape_rules_*`).
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterable, Sequence
from fractions import Fraction

import onnx_ir as ir

from .graph import Dim

UNKNOWN = ir.SymbolicDim(None)
"""A dimension of which nothing is known."""

_Key = int | str | None
_MAX_EXPRESSION = 400  # characters; beyond that an expression helps nobody and slows everything


def is_unknown(dim: Dim) -> bool:
    """Whether a dimension has neither a size nor a name."""
    return type(dim) is not int and dim.value is None  # type: ignore[union-attr]


def _key(dim: Dim) -> _Key:
    return dim if isinstance(dim, int) else dim.value


def add(a: Dim, b: Dim) -> Dim:
    """a + b."""
    if type(a) is int and type(b) is int:
        return a + b
    return _binary("+", _key(a), _key(b))


def sub(a: Dim, b: Dim) -> Dim:
    """a - b."""
    if type(a) is int and type(b) is int:
        return a - b
    return _binary("-", _key(a), _key(b))


def mul(a: Dim, b: Dim) -> Dim:
    """a * b."""
    if type(a) is int and type(b) is int:
        return a * b
    if a == 0 or b == 0:
        return 0
    return _binary("*", _key(a), _key(b))


def floordiv(a: Dim, b: Dim) -> Dim:
    """a / b rounded down; unknown when b is 0."""
    if b == 0:
        return UNKNOWN
    if type(a) is int and type(b) is int:
        return a // b
    return _binary("//", _key(a), _key(b))


def ceildiv(a: Dim, b: Dim) -> Dim:
    """a / b rounded up."""
    if b == 1:
        return a
    if type(a) is int and type(b) is int:
        return -(-a // b) if b else UNKNOWN
    if type(b) is int and b > 0:
        return floordiv(add(a, b - 1), b)
    return sub(0, floordiv(sub(0, a), b))


def modulo(a: Dim, b: Dim) -> Dim:
    """a mod b, of the sign of b."""
    if b == 0:
        return UNKNOWN
    if type(a) is int and type(b) is int:
        return a % b
    return _binary("%", _key(a), _key(b))


def minimum(a: Dim, b: Dim) -> Dim:
    """The smaller one, `Min(a, b)` where that depends on a symbol."""
    if type(a) is int and type(b) is int:
        return min(a, b)
    return _binary("Min", _key(a), _key(b))


def maximum(a: Dim, b: Dim) -> Dim:
    """The larger one, `Max(a, b)` where that depends on a symbol."""
    if type(a) is int and type(b) is int:
        return max(a, b)
    return _binary("Max", _key(a), _key(b))


def product(dims: Iterable[Dim]) -> Dim:
    """The product; 1 for none."""
    total: int = 1
    symbols: list[Dim] = []
    for dim in dims:
        if type(dim) is int:
            total *= dim
        else:
            symbols.append(dim)
    if total == 0 or not symbols:
        return total
    result: Dim = symbols[0]
    for dim in symbols[1:]:
        result = mul(result, dim)
    return result if total == 1 else mul(result, total)


def scale(dim: Dim, factor: float) -> Dim:
    """floor(dim * factor): exact rational arithmetic on symbols, a double's product on ints."""
    if type(dim) is int:
        return math.floor(dim * factor)
    exact = Fraction(factor)
    if exact.denominator > 1 << 20:
        return UNKNOWN
    return floordiv(mul(dim, exact.numerator), exact.denominator)


def same(a: Dim, b: Dim) -> bool | None:
    """Whether two dimensions are equal: None when that depends on a symbol."""
    if type(a) is int and type(b) is int:
        return a == b
    left, right = _key(a), _key(b)
    if left is None or right is None:
        return None
    if left == right:
        return True
    if _is_plain(left) and _is_plain(right):
        return None
    difference = sub(a, b)
    return difference == 0 if isinstance(difference, int) else None


def broadcast(a: Dim, b: Dim) -> Dim | None:
    """The broadcast dimension; unknown when undecided; None when the two cannot broadcast."""
    if type(a) is int:
        if a == 1:
            return b
        if type(b) is int:
            return a if b in (a, 1) else None
        return a  # the symbol must be `a` or 1
    if type(b) is int:
        return a if b == 1 else b
    return a if same(a, b) else UNKNOWN


def broadcast_shapes(shapes: Sequence[tuple[Dim, ...]]) -> tuple[Dim, ...] | None:
    """numpy's multidirectional broadcast; None when the shapes do not fit."""
    first = shapes[0]
    if all(s == first for s in shapes):
        return first
    rank = max(len(s) for s in shapes)
    result: list[Dim] = []
    for axis in range(rank):
        dim: Dim = 1
        for shape in shapes:
            index = axis - rank + len(shape)
            if index < 0:
                continue
            found = broadcast(dim, shape[index])
            if found is None:
                return None
            dim = found
        result.append(dim)
    return tuple(result)


def free_symbols(dim: Dim) -> frozenset[str]:
    """Names of the symbols in a dimension."""
    return frozenset() if isinstance(dim, int) else _free(dim.value)


def is_negative(dim: Dim) -> bool | None:
    """Whether a dimension is below 0, its symbols being positive; None when undecided."""
    if isinstance(dim, int):
        return dim < 0
    name = dim.value
    if name is None:
        return None
    if _is_plain(name):
        return False
    lowest = minimum(dim, 0)
    if lowest == 0 and isinstance(lowest, int):
        return False
    return True if same(lowest, dim) else None


def text(dims: Sequence[Dim] | None) -> str:
    """`[1, N, ?]`, for messages."""
    if dims is None:
        return "[...]"
    return "[" + ", ".join("?" if is_unknown(d) else str(d) for d in dims) + "]"


# --- expressions -----------------------------------------------------------------------------


def _is_plain(key: _Key) -> bool:
    return isinstance(key, int) or (key is not None and key.isidentifier())


@functools.lru_cache(maxsize=1 << 16)
def _binary(op: str, a: _Key, b: _Key) -> Dim:
    if a is None or b is None:
        return UNKNOWN
    if op in ("+", "-", "*", "//", "%"):
        left, right = _symbol(a), _symbol(b)
        if left is None or right is None:
            return UNKNOWN
        match op:
            case "+":
                found: ir.SymbolicDim = left + right
            case "-":
                found = left - right
            case "*":
                found = left * right
            case "//":
                found = left // right
            case _:
                found = left % right
    else:
        found = ir.SymbolicDim(f"{op}({_operand(a)}, {_operand(b)})")
    return _normal(found)


def _symbol(key: int | str) -> ir.SymbolicDim | None:
    """The key as something to compute with: names that are no expression get a safe alias."""
    name = _operand(key)
    return ir.SymbolicDim(name) if len(name) <= _MAX_EXPRESSION else None


@functools.lru_cache(maxsize=1 << 14)
def _operand(key: int | str) -> str:
    if isinstance(key, int):
        return str(key)
    try:
        ir.SymbolicDim(key).free_symbols()
    except ValueError:
        return re.sub(r"\W", "_", f"s_{key}")
    return key


def _normal(dim: Dim) -> Dim:
    if isinstance(dim, int):
        return dim
    try:
        value = dim.evaluate({})
    except (ValueError, TypeError):
        return UNKNOWN
    if isinstance(value, int):
        return value
    name = value.value
    return value if name is not None and len(name) <= _MAX_EXPRESSION else UNKNOWN


@functools.lru_cache(maxsize=1 << 14)
def _free(name: str | None) -> frozenset[str]:
    if name is None:
        return frozenset()
    if name.isidentifier():
        return frozenset((name,))
    try:
        return ir.SymbolicDim(name).free_symbols()
    except ValueError:
        return frozenset((name,))

"""GELU as exporters spell it: with Erf, with Tanh, in every order of its factors.

Here: the two rules. Not here: the sigmoid approximation and fused biases, which only ONNX Runtime
has (`passes.lower.activations`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable

import onnx_ir as ir

from ...ir.edit import Builder
from ...ir.graph import CONTRIB_DOMAIN, dims_of
from ...ir.match import AnyOf, Const, Match, OpPattern, ValuePattern, any_of, op, var
from ..base import Context
from ..operators import missing_operator
from ..rules import RewriteRule

_X = var("x")
_STANDARD = 20
"""The opset in which Gelu became a standard operator."""


def _number(value: float) -> Const:
    """A constant to 1e-5, relative: closer numbers change a GELU by less than float32 rounding."""
    return Const("", value, 1e-5)


def _gated(bell: OpPattern | AnyOf) -> tuple[OpPattern, ...]:
    """0.5 * x * (1 + bell), the factors in every order; halves as * 0.5, / 2 or distributed."""
    gate = op.Add(bell, 1.0)

    def half(value: ValuePattern) -> AnyOf:
        return any_of(op.Mul(value, 0.5), op.Div(value, 2.0))

    product = op.Mul(_X, gate)
    return (
        op.Mul(product, 0.5),
        op.Div(product, 2.0),
        op.Mul(half(_X), gate),
        op.Mul(_X, half(gate)),
        op.Mul(_X, op.Add(half(bell), 0.5)),
    )


def _cannot(m: Match, context: Context, own: str) -> str | None:
    """Why neither the standard operator nor ONNX Runtime's `own` can be written."""
    dtype = m["x"].dtype
    if dtype is None or not dtype.is_floating_point():
        return f"it computes in {dtype.name if dtype else 'an unknown dtype'}"
    if context.opsets.get("", 0) >= _STANDARD:
        return missing_operator(context, "Gelu", (m["x"],))
    if not dims_of(m["x"]):
        return f"it has no dimension, and {own} takes no scalars"
    return missing_operator(context, own, (m["x"],), domain=CONTRIB_DOMAIN)


@dataclasses.dataclass(frozen=True)
class GeluErf(RewriteRule):
    """0.5 * x * (1 + Erf(x / sqrt 2)), in any order -> Gelu(x).

    Hendrycks and Gimpel 2016, arXiv:1606.08415. Below opset 20, where Gelu is not yet standard,
    ONNX Runtime's operator of the same name.
    """

    def pattern(self) -> tuple[OpPattern, ...]:
        inner = any_of(
            op.Div(_X, _number(math.sqrt(2))),
            op.Mul(_X, _number(math.sqrt(0.5))),
        )
        return _gated(op.Erf(inner))

    def check(self, m: Match, context: Context) -> str | None:
        return _cannot(m, context, "Gelu")

    def rewrite(self, m: Match, build: Builder) -> ir.Value:
        domain = "" if build.opset >= _STANDARD else CONTRIB_DOMAIN
        return build.node("Gelu", m["x"], _domain=domain).outputs[0]


_ROOT = math.sqrt(2 / math.pi)
_CUBIC = 0.044715


def _inner_forms() -> Iterable[OpPattern]:
    """sqrt(2 / pi) * (x + 0.044715 x^3), as written by torch, TensorFlow, JAX and by hand."""
    square = any_of(op.Mul(_X, _X), op.Pow(_X, 2.0))
    cube = any_of(op.Pow(_X, 3.0), op.Mul(_X, square))
    root = _number(_ROOT)

    def scaled_square(factor: float) -> AnyOf:
        k = _number(factor)
        return any_of(op.Mul(square, k), op.Mul(op.Mul(_X, k), _X))

    bent = op.Add(scaled_square(_CUBIC), 1.0)
    odd = op.Add(
        _X,
        any_of(
            op.Mul(cube, _number(_CUBIC)),
            op.Mul(_X, scaled_square(_CUBIC)),
            op.Mul(op.Mul(_X, _number(_CUBIC)), square),
        ),
    )
    yield op.Mul(odd, root)
    yield op.Mul(op.Mul(_X, root), bent)
    yield op.Mul(op.Mul(_X, bent), root)
    yield op.Mul(_X, op.Mul(bent, root))
    yield op.Mul(_X, op.Add(scaled_square(_ROOT * _CUBIC), root))


@dataclasses.dataclass(frozen=True)
class GeluTanh(RewriteRule):
    """0.5 * x * (1 + Tanh(sqrt(2 / pi) * (x + 0.044715 x^3))) -> Gelu(x, approximate="tanh").

    arXiv:1606.08415, section 2. Below opset 20 ONNX Runtime's FastGelu, which computes the same.
    """

    def pattern(self) -> tuple[OpPattern, ...]:
        return _gated(op.Tanh(any_of(*_inner_forms())))

    def check(self, m: Match, context: Context) -> str | None:
        return _cannot(m, context, "FastGelu")

    def rewrite(self, m: Match, build: Builder) -> ir.Value:
        if build.opset >= _STANDARD:
            return build.node("Gelu", m["x"], approximate="tanh").outputs[0]
        return build.node("FastGelu", m["x"], _domain=CONTRIB_DOMAIN).outputs[0]

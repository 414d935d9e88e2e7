"""Activations that exporters spell out, as the one operator that runtimes have.

Here: piecewise-linear ones (Relu, Clip, HardSigmoid, HardSwish, LeakyRelu, ThresholdedRelu),
Sigmoid, Mish, Elu, Selu, and the group that a recipe names. Not here: GELU (`gelu`), SiLU and
what only one runtime has (`passes.lower`). Log(1 + Exp(x)) stays as it is: it overflows where
Softplus does not, and ONNX Runtime 1.32's Softplus takes five times as long (x86-64, one thread).
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import onnx_ir as ir

from ...ir.edit import Builder
from ...ir.graph import attribute, constant_scalar, dims_of, static_shape
from ...ir.match import Const, Match, OpPattern, ValuePattern, any_of, const, op, var
from ..base import Context
from ..operators import missing_operator
from ..rules import RewriteRule, RuleGroup
from .gelu import GeluErf, GeluTanh


def must_be_float(value: ir.Value) -> str | None:
    """Why not: the same nodes over integers divide with truncation."""
    if value.dtype is None or not value.dtype.is_floating_point():
        return f"it computes in {value.dtype.name if value.dtype else 'an unknown dtype'}"
    return None


def check_operator(m: Match, context: Context, op_type: str, x: str = "x") -> str | None:
    """Why the match can't become the unary operator over the float value called `x`."""
    return must_be_float(m[x]) or missing_operator(context, op_type, (m[x],))


def _is_scalar(value: ir.Value) -> bool:
    return static_shape(value) == () and constant_scalar(value) is not None


@dataclasses.dataclass(frozen=True)
class ReluForm(RewriteRule):
    """Max(x, 0) -> Relu(x); Clip(x, 0) and Clip(x, 0, inf) -> Relu(x)."""

    def pattern(self) -> tuple[OpPattern, ...]:
        x = var("x")
        return (
            op.Max(x, const("low", 0.0)),
            op.Max(const("low", 0.0), x),
            op.Clip(x, const("low", 0.0)),
            op.Clip(x, const("low", 0.0), const("high")),
        )

    def check(self, m: Match, context: Context) -> str | None:
        if "high" in m.values and constant_scalar(m["high"]) != float("inf"):
            return "there is an upper bound"
        return check_operator(m, context, "Relu")

    def rewrite(self, m: Match, build: Builder) -> ir.Value:
        value: ir.Value = build.Relu(m["x"])
        return value


@dataclasses.dataclass(frozen=True)
class ClipForm(RewriteRule):
    """Min(Max(x, low), high) -> Clip(x, low, high), low <= high."""

    def pattern(self) -> tuple[OpPattern, ...]:
        x, low, high = var("x"), const("low"), const("high")
        return tuple(
            outer
            for inner in (op.Max(x, low), op.Max(low, x))
            for outer in (op.Min(inner, high), op.Min(high, inner))
        ) + tuple(
            outer
            for inner in (op.Min(x, high), op.Min(high, x))
            for outer in (op.Max(inner, low), op.Max(low, inner))
        )

    def check(self, m: Match, context: Context) -> str | None:
        if not _is_scalar(m["low"]) or not _is_scalar(m["high"]):
            return "a bound is not a scalar"
        low, high = constant_scalar(m["low"]), constant_scalar(m["high"])
        assert low is not None
        assert high is not None
        return None if low <= high else "the bounds cross"

    def rewrite(self, m: Match, build: Builder) -> ir.Value:
        value: ir.Value = build.Clip(m["x"], m["low"], m["high"])
        return value


@dataclasses.dataclass(frozen=True)
class ClippedRelu(RewriteRule):
    """Clip(Relu(x), low, high) and Min(Relu(x), high) -> Clip(x, 0, high), low <= 0 <= high."""

    def pattern(self) -> tuple[OpPattern, ...]:
        relu = op.Relu(var("x"))
        return (
            op.Clip(relu, const("low"), const("high")),
            op.Min(relu, const("high")),
            op.Min(const("high"), relu),
        )

    def check(self, m: Match, context: Context) -> str | None:
        if not _is_scalar(m["high"]):
            return "a bound is not a scalar"
        if (constant_scalar(m["high"]) or 0) < 0:
            return "the upper bound is negative"
        if "low" in m.values and not (constant_scalar(m["low"]) or 0) <= 0:
            return "the lower bound is positive"
        return must_be_float(m["x"])

    def rewrite(self, m: Match, build: Builder) -> ir.Value:
        zero = m.array("high").dtype.type(0)
        value: ir.Value = build.Clip(m["x"], zero, m["high"])
        return value


@dataclasses.dataclass(frozen=True)
class SigmoidForm(RewriteRule):
    """1 / (1 + Exp(-x)) -> Sigmoid(x)."""

    def pattern(self) -> tuple[OpPattern, ...]:
        below = op.Add(op.Exp(op.Neg(var("x"))), 1.0)
        return op.Div(1.0, below), op.Reciprocal(below)

    def check(self, m: Match, context: Context) -> str | None:
        return check_operator(m, context, "Sigmoid")

    def rewrite(self, m: Match, build: Builder) -> ir.Value:
        value: ir.Value = build.Sigmoid(m["x"])
        return value


_SIXTH = Const("", 1 / 6, 1e-6)


def _line(x: ValuePattern) -> tuple[OpPattern, ...]:
    """alpha * x + beta in its orders; the names are those of HardSigmoid's attributes."""
    alpha, beta = const("alpha"), const("beta")
    return (
        op.Add(op.Mul(x, alpha), beta),
        op.Add(op.Div(x, const("divisor")), beta),
    )


@dataclasses.dataclass(frozen=True)
class HardSigmoidForm(RewriteRule):
    """Clip(x + 3, 0, 6) / 6 -> HardSigmoid(x, 1/6, 0.5).

    Clip(alpha * x + beta, 0, 1) -> HardSigmoid(x, alpha, beta)
    """

    def pattern(self) -> tuple[OpPattern, ...]:
        x = var("x")
        six = op.Clip(op.Add(x, 3.0), const("low", 0.0), const("high", 6.0))
        one = (op.Clip(f, const("low", 0.0), const("high", 1.0)) for f in _line(x))
        return op.Div(six, 6.0), op.Mul(six, _SIXTH), *one

    def check(self, m: Match, context: Context) -> str | None:
        for name in ("alpha", "beta", "divisor"):
            if name in m.values and constant_scalar(m[name]) is None:
                return f"{name} is not one number"
            if name in m.values and len(m[name].shape or ()) > len(dims_of(m["x"]) or ()):
                return f"{name} raises the rank"
        if "divisor" in m.values and not constant_scalar(m["divisor"]):
            return "it divides by zero"
        return check_operator(m, context, "HardSigmoid")

    def rewrite(self, m: Match, build: Builder) -> ir.Value:
        alpha, beta = 1 / 6, 0.5
        if "beta" in m.values:
            beta = float(constant_scalar(m["beta"]) or 0.0)
            if "divisor" in m.values:
                alpha = 1 / float(constant_scalar(m["divisor"]) or 1.0)
            else:
                alpha = float(constant_scalar(m["alpha"]) or 0.0)
        value: ir.Value = build.HardSigmoid(m["x"], alpha=alpha, beta=beta)
        return value


@dataclasses.dataclass(frozen=True)
class HardSwishForm(RewriteRule):
    """x * HardSigmoid(x, 1/6, 0.5), or x * Clip(x + 3, 0, 6) / 6 -> HardSwish(x).

    Howard et al. 2019, arXiv:1905.02244, section 5.2.
    """

    def pattern(self) -> tuple[OpPattern, ...]:
        x = var("x")
        clip = op.Clip(op.Add(x, 3.0), const("low", 0.0), const("high", 6.0))
        return (
            op.Mul(x, op.HardSigmoid(x, _name="gate")),
            op.Div(op.Mul(x, clip), 6.0),
            op.Mul(op.Mul(x, clip), _SIXTH),
            op.Mul(op.Mul(x, _SIXTH), clip),
            op.Mul(op.Div(x, 6.0), clip),
        )

    def check(self, m: Match, context: Context) -> str | None:
        if "gate" in m.nodes:
            alpha, beta = m.attribute("gate", "alpha", 0.2), m.attribute("gate", "beta", 0.5)
            if abs(alpha - 1 / 6) > 1e-6 or beta != 0.5:
                return f"the gate has alpha {alpha:g} and beta {beta:g}, not 1/6 and 0.5"
        return check_operator(m, context, "HardSwish")

    def rewrite(self, m: Match, build: Builder) -> ir.Value:
        value: ir.Value = build.HardSwish(m["x"])
        return value


@dataclasses.dataclass(frozen=True)
class LeakyReluForm(RewriteRule):
    """Max(x, a * x), 0 < a < 1, and Where(x > 0, x, a * x) -> LeakyRelu(x, alpha=a)."""

    def pattern(self) -> tuple[OpPattern, ...]:
        x = var("x")
        slope = op.Mul(x, const("alpha"))
        positive = op.one_of(("Greater", "GreaterOrEqual"), x, 0.0)
        return (
            op.Max(x, slope),
            op.Max(slope, x),
            op.Where(positive, x, slope, _name="where"),
        )

    def check(self, m: Match, context: Context) -> str | None:
        alpha = constant_scalar(m["alpha"])
        if alpha is None or len(m["alpha"].shape or ()) > len(dims_of(m["x"]) or ()):
            return "the slope is not one number"
        if "where" not in m.nodes and not 0 < alpha < 1:
            return f"the greater of x and {alpha:g} x is no LeakyRelu"
        return check_operator(m, context, "LeakyRelu")

    def rewrite(self, m: Match, build: Builder) -> ir.Value:
        alpha = float(constant_scalar(m["alpha"]) or 0.0)
        value: ir.Value = build.LeakyRelu(m["x"], alpha=alpha)
        return value


@dataclasses.dataclass(frozen=True)
class PReluForm(RewriteRule):
    """Relu(x) - slope * Relu(-x) -> PRelu(x, slope), slope a constant that broadcasts to x.

    The same with the sign in the slope, Relu(x) + (-Relu(-x)) * slope. He et al. 2015,
    arXiv:1502.01852, equation 1.
    """

    def pattern(self) -> tuple[OpPattern, ...]:
        x, slope = var("x"), const("slope", data=False)
        below = op.Relu(op.Neg(x))
        return (
            op.Sub(op.Relu(x), op.Mul(below, slope)),
            op.Add(op.Relu(x), op.Mul(op.Neg(below), slope)),
            op.Add(op.Relu(x), op.Neg(op.Mul(below, slope))),
        )

    def check(self, m: Match, context: Context) -> str | None:
        x, slope = dims_of(m["x"]), static_shape(m["slope"])
        if x is None or slope is None:
            return "a shape is not known"
        if len(slope) > len(x):
            return "the slope raises the rank"
        for have, wanted in zip(reversed(slope), reversed(x), strict=False):
            if have not in (1, wanted):
                return "the slope does not broadcast to x"
        return check_operator(m, context, "PRelu")

    def rewrite(self, m: Match, build: Builder) -> ir.Value:
        value: ir.Value = build.PRelu(m["x"], m["slope"])
        return value


@dataclasses.dataclass(frozen=True)
class ThresholdedReluForm(RewriteRule):
    """Where(x > t, x, 0) -> ThresholdedRelu(x, alpha=t). Konda et al. 2014, arXiv:1402.3337."""

    def pattern(self) -> OpPattern:
        x = var("x")
        return op.Where(op.Greater(x, const("t")), x, 0.0)

    def check(self, m: Match, context: Context) -> str | None:
        if constant_scalar(m["t"]) is None or static_shape(m["t"]) != ():
            return "the threshold is not a scalar"
        return check_operator(m, context, "ThresholdedRelu")

    def rewrite(self, m: Match, build: Builder) -> ir.Value:
        alpha = float(constant_scalar(m["t"]) or 0.0)
        value: ir.Value = build.ThresholdedRelu(m["x"], alpha=alpha)
        return value


@dataclasses.dataclass(frozen=True)
class EluForm(RewriteRule):
    """Where(x > 0, x, alpha * (Exp(x) - 1)) -> Elu(x, alpha). Clevert et al. 2015, 1511.07289."""

    def pattern(self) -> tuple[OpPattern, ...]:
        x = var("x")
        grown = any_of(op.Sub(op.Exp(x), 1.0), op.Add(op.Exp(x), -1.0))
        positive = op.one_of(("Greater", "GreaterOrEqual"), x, 0.0)
        return (
            op.Where(positive, x, grown),
            op.Where(positive, x, op.Mul(grown, const("alpha"))),
        )

    def check(self, m: Match, context: Context) -> str | None:
        if "alpha" in m.values and not _is_scalar(m["alpha"]):
            return "alpha is not a scalar"
        return check_operator(m, context, "Elu")

    def rewrite(self, m: Match, build: Builder) -> ir.Value:
        alpha = float(constant_scalar(m["alpha"]) or 0.0) if "alpha" in m.values else 1.0
        value: ir.Value = build.Elu(m["x"], alpha=alpha)
        return value


@dataclasses.dataclass(frozen=True)
class SeluForm(RewriteRule):
    """Mul(Elu(x, alpha), gamma) -> Selu(x, alpha, gamma). Klambauer et al. 2017, 1706.02515."""

    def pattern(self) -> OpPattern:
        return op.Mul(op.Elu(var("x"), _name="elu"), const("gamma"))

    def check(self, m: Match, context: Context) -> str | None:
        gamma = constant_scalar(m["gamma"])
        if gamma is None or not _is_scalar(m["gamma"]):
            return "gamma is not a scalar"
        if not gamma > 0 or attribute(m.node("elu"), "alpha", 1.0) < 0:
            return "a factor is negative"
        return check_operator(m, context, "Selu")

    def rewrite(self, m: Match, build: Builder) -> ir.Value:
        alpha = attribute(m.node("elu"), "alpha", 1.0)
        gamma = float(constant_scalar(m["gamma"]) or 1.0)
        value: ir.Value = build.Selu(m["x"], alpha=alpha, gamma=gamma)
        return value


@dataclasses.dataclass(frozen=True)
class MishForm(RewriteRule):
    """x * Tanh(Softplus(x)) -> Mish(x). Misra 2019, arXiv:1908.08681.

    ONNX Runtime 1.32 has no kernel and expands it to the same three nodes: no slower, no faster.
    """

    def pattern(self) -> OpPattern:
        x = var("x")
        return op.Mul(x, op.Tanh(op.Softplus(x)))

    def check(self, m: Match, context: Context) -> str | None:
        return check_operator(m, context, "Mish")

    def rewrite(self, m: Match, build: Builder) -> ir.Value:
        value: ir.Value = build.Mish(m["x"])
        return value


@dataclasses.dataclass(frozen=True)
class FuseActivations(RuleGroup):
    """Recognizes activations that exporters spell out.

    0.5 * x * (1 + Erf(x / sqrt 2))   ->   Gelu(x)
    """

    stage: ClassVar = RewriteRule.stage
    rules: ClassVar[tuple[type[RewriteRule], ...]] = (
        ReluForm,
        ClipForm,
        ClippedRelu,
        SigmoidForm,
        HardSwishForm,
        HardSigmoidForm,
        GeluErf,
        GeluTanh,
        LeakyReluForm,
        PReluForm,
        ThresholdedReluForm,
        EluForm,
        SeluForm,
        MishForm,
    )

"""Activations and normalizations that exporters spell out, as the one operator runtimes fuse."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from ...ir.edit import Builder
from ...ir.graph import constant_array, constant_scalar, dims_of, static_shape
from ...ir.match import Match, OpPattern, any_of, const, op, var
from ..base import Context
from ..rules import RewriteRule, RuleGroup


@dataclasses.dataclass(frozen=True)
class ClipForm(RewriteRule):
    """Min(Max(x, low), high) -> Clip(x, low, high), low <= high."""

    def pattern(self) -> tuple[OpPattern, ...]:
        return (
            op.Min(op.Max(var("x"), const("low")), const("high")),
            op.Max(op.Min(var("x"), const("high")), const("low")),
        )

    def check(self, m: Match, context: Context) -> str | None:
        low, high = constant_scalar(m["low"]), constant_scalar(m["high"])
        if low is None or high is None:
            return "a bound is not one number"
        if static_shape(m["low"]) != () or static_shape(m["high"]) != ():
            return "a bound is not a scalar"
        return None if low <= high else "the bounds cross"

    def rewrite(self, m: Match, build: Builder) -> ir.Value:
        value: ir.Value = build.Clip(m["x"], m["low"], m["high"])
        return value


@dataclasses.dataclass(frozen=True)
class HardSigmoidForm(RewriteRule):
    """Clip(x + 3, 0, 6) / 6 (or * 1/6) -> HardSigmoid(x, alpha=1/6, beta=0.5)."""

    def pattern(self) -> tuple[OpPattern, ...]:
        clip = op.Clip(op.Add(var("x"), 3.0), const("low"), const("high"))
        return op.Div(clip, 6.0), op.Mul(clip, const(value=1 / 6))

    def check(self, m: Match, context: Context) -> str | None:
        if constant_scalar(m["low"]) != 0 or constant_scalar(m["high"]) != 6:
            return "the bounds are not 0 and 6"
        return _must_be_float(m["x"])

    def rewrite(self, m: Match, build: Builder) -> ir.Value:
        value: ir.Value = build.HardSigmoid(m["x"], alpha=1 / 6, beta=0.5)
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
            op.Mul(op.Mul(x, clip), const(value=1 / 6)),
        )

    def check(self, m: Match, context: Context) -> str | None:
        if _opset(m.root) < 14:
            return "HardSwish is new in opset 14"
        if "gate" in m.nodes:
            alpha, beta = m.attribute("gate", "alpha", 0.2), m.attribute("gate", "beta", 0.5)
            if abs(alpha - 1 / 6) > 1e-6 or beta != 0.5:
                return f"the gate has alpha {alpha:g} and beta {beta:g}, not 1/6 and 0.5"
        return _must_be_float(m["x"])

    def rewrite(self, m: Match, build: Builder) -> ir.Value:
        value: ir.Value = build.HardSwish(m["x"])
        return value


@dataclasses.dataclass(frozen=True)
class GeluForm(RewriteRule):
    """0.5 * x * (1 + Erf(x / sqrt 2)), in its usual orders -> Gelu(x).

    Hendrycks and Gimpel 2016, arXiv:1606.08415. Only from opset 20 on, where Gelu is standard.
    """

    def pattern(self) -> tuple[OpPattern, ...]:
        x = var("x")
        inner = any_of(op.Div(x, const(value=math.sqrt(2))), op.Mul(x, const(value=math.sqrt(0.5))))
        gate = op.Add(op.Erf(inner), 1.0)
        return (
            op.Mul(op.Mul(x, gate), 0.5),
            op.Mul(op.Mul(x, 0.5), gate),
            op.Mul(x, op.Mul(gate, 0.5)),
        )

    def check(self, m: Match, context: Context) -> str | None:
        if _opset(m.root) < 20:
            return "Gelu is new in opset 20"
        return None

    def rewrite(self, m: Match, build: Builder) -> ir.Value:
        value: ir.Value = build.Gelu(m["x"])
        return value


@dataclasses.dataclass(frozen=True)
class LayerNormForm(RewriteRule):
    """(x - mean) / Sqrt(variance + eps) * scale + bias over the last axis -> LayerNormalization.

    Ba et al. 2016, arXiv:1607.06450, equation 4.
    """

    def pattern(self) -> tuple[OpPattern, ...]:
        x = var("x")
        mean = op.ReduceMean(x, _rest=True, _name="mean", _shared=True)
        centred = op.Sub(x, mean, _shared=True, _name="centred")
        square = any_of(op.Pow(centred, 2.0), op.Mul(centred, centred))
        variance = op.ReduceMean(square, _rest=True, _name="variance")
        deviation = op.Sqrt(op.Add(variance, const("eps")))
        normal = op.Div(centred, deviation)
        return (op.Add(op.Mul(normal, const("scale")), const("bias")),)

    def check(self, m: Match, context: Context) -> str | None:
        if _opset(m.root) < 17:
            return "LayerNormalization is new in opset 17"
        dims = dims_of(m["x"])
        if not dims or not isinstance(dims[-1], int):
            return "the normalized axis has no known size"
        for name in ("mean", "variance"):
            if _reduced_axes(m.node(name), len(dims)) != (len(dims) - 1,):
                return f"the {name} is not over the last axis alone"
            if not m.attribute(name, "keepdims", 1):
                return f"the {name} does not keep its dimension"
        for name in ("scale", "bias"):
            if m.array(name).shape != (dims[-1],):
                return f"the {name} is not one number per element of the last axis"
        inner = {id(n) for n in m.matched_nodes}
        for name in ("mean", "centred"):
            if any(id(u) not in inner for u in m.node(name).outputs[0].consumers()):
                return f"the {name} is used elsewhere too"
        if constant_scalar(m["eps"]) is None or m.array("eps").ndim > len(dims):
            return "epsilon is not one number"
        return None

    def rewrite(self, m: Match, build: Builder) -> ir.Value:
        epsilon = constant_scalar(m["eps"])
        value: ir.Value = build.LayerNormalization(
            m["x"], m["scale"], m["bias"], axis=-1, epsilon=float(epsilon or 0.0)
        )
        return value


def _reduced_axes(node: ir.Node, rank: int) -> tuple[int, ...] | None:
    if "axes" in node.attributes:
        axes = np.array(node.attributes["axes"].as_ints())
    else:
        found = constant_array(node.inputs[1] if len(node.inputs) > 1 else None, 16)
        if found is None:
            return None
        axes = found.reshape(-1)
    return tuple(sorted(int(a) % rank for a in axes))


def _must_be_float(value: ir.Value) -> str | None:
    """Why not: the same nodes over integers divide with truncation."""
    if value.dtype is None or not value.dtype.is_floating_point():
        return f"it computes in {value.dtype.name if value.dtype else 'an unknown dtype'}"
    return None


def _opset(node: ir.Node) -> int:
    graph = node.graph
    return 0 if graph is None else int(graph.opset_imports.get("", 0))


@dataclasses.dataclass(frozen=True)
class FuseActivations(RuleGroup):
    """Recognizes activations and normalizations that exporters spell out.

    0.5 * x * (1 + Erf(x / sqrt 2))   ->   Gelu(x)
    """

    stage: ClassVar = RewriteRule.stage
    rules: ClassVar[tuple[type[RewriteRule], ...]] = (
        ClipForm,
        HardSwishForm,
        HardSigmoidForm,
        GeluForm,
        LayerNormForm,
    )

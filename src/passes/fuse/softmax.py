"""Softmax and norms that exporters spell out.

Here: Softmax and LogSoftmax with the greatest element subtracted, Sqrt of a sum of squares. Not
here: what only agrees while nothing overflows or vanishes, so is left alone: Exp(x) / Sum(Exp(x)),
Log(Softmax(x)), Log(Sum(Exp(x))), and x / ReduceL2(x) (0 / 0 where LpNormalization gives 0).
"""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir

from ...ir.edit import Builder
from ...ir.graph import attribute, constant_array, dims_of
from ...ir.match import Match, OpPattern, any_of, op, var
from ..base import Context
from ..operators import missing_operator
from ..rules import RewriteRule


def reduced_axes(node: ir.Node, rank: int) -> tuple[int, ...] | None:
    """The axes that a reduction is over, ascending and not negative; None where not constant."""
    if "axes" in node.attributes:
        axes = np.array(node.attributes["axes"].as_ints())
    elif len(node.inputs) > 1 and node.inputs[1] is not None:
        found = constant_array(node.inputs[1], 16)
        if found is None:
            return None
        axes = found.reshape(-1)
    else:
        axes = np.array([], np.int64)
    if not axes.size:
        return None if attribute(node, "noop_with_empty_axes", 0) else tuple(range(rank))
    if any(not -rank <= int(a) < rank for a in axes):
        return None
    return tuple(sorted({int(a) % rank for a in axes}))


def _check_rows(m: Match, context: Context, operator: str) -> str | None:
    """Why the match is no `operator`: both reductions over one and the same axis, kept."""
    dims = dims_of(m["x"])
    if not dims:
        return "the input's rank is not known"
    axes = [reduced_axes(m.node(name), len(dims)) for name in ("max", "sum")]
    if axes[0] is None or axes[0] != axes[1]:
        return "the maximum and the sum are not over the same axes"
    if len(axes[0]) != 1:
        return "the sum is over several axes"
    if not all(m.attribute(name, "keepdims", 1) for name in ("max", "sum")):
        return "a reduction does not keep its dimension"
    return missing_operator(context, operator, (m["x"],))


def _axis(m: Match) -> int:
    dims = dims_of(m["x"])
    assert dims is not None
    axes = reduced_axes(m.node("sum"), len(dims))
    assert axes is not None
    return axes[0] - len(dims)


@dataclasses.dataclass(frozen=True)
class SoftmaxForm(RewriteRule):
    """Exp(x - max) / ReduceSum(Exp(x - max)) -> Softmax(x)."""

    def pattern(self) -> tuple[OpPattern, ...]:
        x = var("x")
        grown = op.Exp(op.Sub(x, op.ReduceMax(x, _rest=True, _name="max")))
        total = op.ReduceSum(grown, _rest=True, _name="sum")
        return op.Div(grown, total), op.Mul(grown, op.Reciprocal(total))

    def check(self, m: Match, context: Context) -> str | None:
        return _check_rows(m, context, "Softmax")

    def rewrite(self, m: Match, build: Builder) -> ir.Value:
        value: ir.Value = build.Softmax(m["x"], axis=_axis(m))
        return value


@dataclasses.dataclass(frozen=True)
class LogSoftmaxForm(RewriteRule):
    """(x - max) - Log(ReduceSum(Exp(x - max))) -> LogSoftmax(x)."""

    def pattern(self) -> OpPattern:
        x = var("x")
        below = op.Sub(x, op.ReduceMax(x, _rest=True, _name="max"))
        return op.Sub(below, op.Log(op.ReduceSum(op.Exp(below), _rest=True, _name="sum")))

    def check(self, m: Match, context: Context) -> str | None:
        return _check_rows(m, context, "LogSoftmax")

    def rewrite(self, m: Match, build: Builder) -> ir.Value:
        value: ir.Value = build.LogSoftmax(m["x"], axis=_axis(m))
        return value


@dataclasses.dataclass(frozen=True)
class NormForm(RewriteRule):
    """Sqrt(ReduceSum(x * x)) or Sqrt(ReduceSumSquare(x)) -> ReduceL2(x)."""

    def pattern(self) -> tuple[OpPattern, ...]:
        x = var("x")
        square = any_of(op.Mul(x, x), op.Pow(x, 2.0))
        return (
            op.Sqrt(op.ReduceSum(square, _rest=True, _name="sum")),
            op.Sqrt(op.ReduceSumSquare(x, _rest=True, _name="sum")),
        )

    def check(self, m: Match, context: Context) -> str | None:
        if m["x"].dtype is None or not m["x"].dtype.is_floating_point():
            return "it does not compute in a float type"
        axes = [v for v in m.node("sum").inputs[1:] if v is not None]
        if context.opsets.get("", 0) < 18:  # axes are an attribute, and empty ones are all
            if axes and constant_array(axes[0]) is None:
                return "ReduceL2 takes axes that are computed from opset 18 on"
            if m.attribute("sum", "noop_with_empty_axes", 0):
                return "ReduceL2 has noop_with_empty_axes from opset 18 on"
        return missing_operator(context, "ReduceL2", (m["x"],))

    def rewrite(self, m: Match, build: Builder) -> ir.Value:
        total = m.node("sum")
        options = {a.name: a.value for a in total.attributes.values()}
        inputs = total.inputs[1:]
        if inputs and build.opset < 18:  # ReduceSum took axes as an input five versions earlier
            axes = constant_array(inputs[0])
            if axes is not None and axes.size:
                options["axes"] = [int(a) for a in axes.reshape(-1)]
            inputs = ()
            options.pop("noop_with_empty_axes", None)
        return build.node("ReduceL2", m["x"], *inputs, **options).outputs[0]

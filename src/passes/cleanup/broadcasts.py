"""Operators that only prepare a tensor for broadcasting, which elementwise operators do anyway.

Here: Expand, and new leading axes, before an elementwise operator; constants that repeat one
number. Not here: arithmetic (`algebra`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from ...ir.dims import same
from ...ir.edit import Builder
from ...ir.graph import Dim, constant_tensor, dims_of, is_onnx_op
from ...ir.match import Match, OpPattern, op, var
from ..base import Context, Stage
from ..rules import RewriteRule, RuleGroup
from .conditions import CleanupRule, attributes_of, known, same_dims, typed, uniform

ELEMENTWISE = (
    "Add", "Sub", "Mul", "Div", "Pow", "Max", "Min", "And", "Or", "Xor", "Equal", "Less",
    "LessOrEqual", "Greater", "GreaterOrEqual", "Where", "Mod", "BitwiseAnd", "BitwiseOr",
    "BitwiseXor",
)  # fmt: skip
"""Operators whose inputs broadcast in all directions."""


def broadcast_of(shapes: Sequence[Sequence[Dim]]) -> list[Dim] | None:
    """The shape that inputs broadcast to; None unless it is sure for every dimension."""
    rank = max((len(s) for s in shapes), default=0)
    result: list[Dim] = []
    for axis in range(rank):
        column = [s[axis - rank] for s in shapes if axis - rank + len(s) >= 0]
        wide = [d for d in column if d != 1]
        if any(not known(d) or same(d, wide[0]) is not True for d in wide):
            return None
        result.append(wide[0] if wide else 1)
    return result


@dataclasses.dataclass(frozen=True)
class BroadcastByItself(CleanupRule):
    """f(x, Expand(y, s)) -> f(x, y), and f(x, Unsqueeze(y, leading axes)) -> f(x, y), where the
    other inputs give the result its shape. The same for a Reshape to new leading axes."""

    def pattern(self) -> OpPattern:
        return op.one_of(ELEMENTWISE, var("a"), _rest=True)

    def check(self, m: Match, context: Context) -> str | None:
        return None if self._inputs(m.root) else "no input is only broadcast, or it gives the shape"

    def rewrite(self, m: Match, build: Builder) -> ir.Value:
        inputs = self._inputs(m.root)
        assert inputs is not None
        return build.node(m.root.op_type, *inputs, **attributes_of(m.root)).outputs[0]

    @staticmethod
    def _inputs(node: ir.Node) -> list[ir.Value | None] | None:
        out = dims_of(node.outputs[0])
        inputs = list(node.inputs)
        shapes = [dims_of(v) for v in inputs]
        changed = False
        for i, value in enumerate(inputs):
            source = _narrower(value)
            if source is None or out is None or any(s is None for s in shapes):
                continue
            trial = [dims_of(source) if j == i else s for j, s in enumerate(shapes)]
            found = broadcast_of([s for s in trial if s is not None])
            if found is not None and same_dims(found, out):
                inputs[i], shapes, changed = source, trial, True
        return inputs if changed else None


def _narrower(value: ir.Value | None) -> ir.Value | None:
    """What `value` is a broadcast form of, aligned at the last axis."""
    producer = None if value is None else value.producer()
    if value is None or producer is None or not producer.inputs:
        return None
    source = producer.inputs[0]
    before, after = dims_of(source), dims_of(value)
    if source is None or before is None or after is None or len(before) > len(after):
        return None
    if is_onnx_op(producer, "Expand"):
        return source
    if is_onnx_op(producer, "Unsqueeze", "Reshape"):
        added = len(after) - len(before)
        new = all(d == 1 for d in after[:added])
        return source if added and new and same_dims(after[added:], before) else None
    return None


@dataclasses.dataclass(frozen=True)
class NumberForTensor(CleanupRule):
    """f(x, c) with a constant c that repeats one number -> f(x, number), where x alone gives the
    result its shape: fewer bytes are stored and read."""

    def pattern(self) -> OpPattern:
        ops = ("Add", "Sub", "Mul", "Div", "Pow", "Max", "Min")
        return op.one_of(ops, var("a"), var("b"))

    def check(self, m: Match, context: Context) -> str | None:
        found = self._constant(m)
        if found is None:
            return "no input is a constant of two elements or more"
        index, value = found
        other = dims_of(m.root.inputs[1 - index])
        if not same_dims(other, dims_of(m.root.outputs[0])):
            return "the constant broadcasts the other input"
        return None if uniform(value) is not None else "the constant has different elements"

    def rewrite(self, m: Match, build: Builder) -> ir.Value:
        found = self._constant(m)
        assert found is not None
        index, value = found
        tensor = constant_tensor(value)
        assert tensor is not None
        inputs: list[ir.Value | np.ndarray | None] = list(m.root.inputs)
        inputs[index] = typed(
            build.initializer("number", np.array(uniform(value), tensor.dtype.numpy())), value, ()
        )
        return build.node(m.root.op_type, *inputs).outputs[0]

    @staticmethod
    def _constant(m: Match) -> tuple[int, ir.Value] | None:
        for index, value in enumerate(m.root.inputs):
            tensor = constant_tensor(value)
            if tensor is not None and value is not None and tensor.size > 1:
                return index, value
        return None


@dataclasses.dataclass(frozen=True)
class Broadcasts(RuleGroup):
    """Leaves broadcasting to the operators that broadcast.

    Add(x, Expand(y, [1, 12, 128, 128]))   ->   Add(x, y)
    """

    stage: ClassVar[Stage] = Stage.CLEANUP
    rules: ClassVar[tuple[type[RewriteRule], ...]] = (BroadcastByItself, NumberForTensor)

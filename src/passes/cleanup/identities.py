"""Operators that change nothing, and pairs that undo each other."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from ...ir.edit import Builder
from ...ir.graph import (
    attribute,
    constant_array,
    constant_scalar,
    dims_of,
)
from ...ir.match import Match, OpPattern, const, op, var
from ..base import Context, Stage
from ..rules import RewriteRule, RuleGroup
from .conditions import CleanupRule, must_stay, same_shape
from .reshapes import MergeReshapes, UndoAxes
from .transposes import MergeTransposes


@dataclasses.dataclass(frozen=True)
class RemoveIdentity(CleanupRule):
    """Identity(x) -> x, where x may carry the result's name."""

    def pattern(self) -> OpPattern:
        return op.Identity(var("x"))

    def check(self, m: Match, context: Context) -> str | None:
        return must_stay(m.root.outputs[0], m["x"])

    def rewrite(self, m: Match, build: Builder) -> ir.Value:
        return m["x"]


@dataclasses.dataclass(frozen=True)
class RemoveDropout(CleanupRule):
    """Dropout(x), not in training -> x."""

    def pattern(self) -> OpPattern:
        return op.Dropout(var("x"), _rest=True)

    def check(self, m: Match, context: Context) -> str | None:
        node = m.root
        if len(node.outputs) > 1 and (node.outputs[1].uses() or node.outputs[1].is_graph_output()):
            return "its mask is used"
        training = node.inputs[2] if len(node.inputs) > 2 else None
        if training is not None and constant_scalar(training) is not False:
            return "training_mode is not the constant false"
        return must_stay(node.outputs[0], m["x"])

    def rewrite(self, m: Match, build: Builder) -> tuple[ir.Value | None, ...]:
        return (m["x"],)


@dataclasses.dataclass(frozen=True)
class RemoveCast(CleanupRule):
    """Cast(x, to=dtype of x) -> x; CastLike likewise."""

    def pattern(self) -> OpPattern:
        return op.one_of(("Cast", "CastLike"), var("x"), _rest=True)

    def check(self, m: Match, context: Context) -> str | None:
        source, result = m["x"].dtype, m.root.outputs[0].dtype
        if source is None or source != result:
            return f"it converts {source} to {result}"
        return must_stay(m.root.outputs[0], m["x"])

    def rewrite(self, m: Match, build: Builder) -> ir.Value:
        return m["x"]


@dataclasses.dataclass(frozen=True)
class CastLikeToCast(CleanupRule):
    """CastLike(x, y) -> Cast(x, to=dtype of y); the attributes mean the same in both."""

    def pattern(self) -> OpPattern:
        return op.CastLike(var("x"), var("like"))

    def check(self, m: Match, context: Context) -> str | None:
        return None if m["like"].dtype is not None else "the dtype to convert to is not known"

    def rewrite(self, m: Match, build: Builder) -> ir.Value:
        dtype = m["like"].dtype
        assert dtype is not None
        options = {a.name: a.value for a in m.root.attributes.values()}
        value: ir.Value = build.Cast(m["x"], to=int(dtype), **options)
        value.dtype = dtype
        return value


_NEUTRAL = {"Add": 0.0, "Sub": 0.0, "Mul": 1.0, "Div": 1.0, "Pow": 1.0}


@dataclasses.dataclass(frozen=True)
class RemoveNeutral(CleanupRule):
    """x + 0, x - 0, x * 1, x / 1, x ** 1 -> x, where the constant does not broadcast x."""

    def pattern(self) -> tuple[OpPattern, ...]:
        return (
            op.one_of(("Add", "Mul"), var("x"), const("c")),
            op.one_of(("Sub", "Div", "Pow"), var("x"), const("c")),
        )

    def check(self, m: Match, context: Context) -> str | None:
        array = constant_array(m["c"], 1 << 20)
        neutral = _NEUTRAL[m.root.op_type]
        if array is None or not np.all(array == neutral):
            return f"the constant is not {neutral:g} everywhere"
        if m["x"].dtype != m.root.outputs[0].dtype:
            return "it converts the dtype"
        if array.size != 1 and not same_shape(m["x"], m.root.outputs[0]):
            return "it broadcasts x, or shapes are not known"
        if array.size == 1 and array.ndim > 0:
            dims = dims_of(m["x"])
            if dims is None or len(dims) < array.ndim:
                return "it raises the rank of x"
        return must_stay(m.root.outputs[0], m["x"])

    def rewrite(self, m: Match, build: Builder) -> ir.Value:
        return m["x"]


@dataclasses.dataclass(frozen=True)
class RemoveReshape(CleanupRule):
    """Reshape, Flatten, Squeeze, Unsqueeze, Expand, Tile, Slice or Pad to the same shape -> x."""

    def pattern(self) -> OpPattern:
        ops = ("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Expand", "Tile", "Slice")
        return op.one_of(ops, var("x"), _rest=True)

    def check(self, m: Match, context: Context) -> str | None:
        if not same_shape(m["x"], m.root.outputs[0]):
            return "the shape changes, or is not known"
        if m.root.op_type == "Slice" and not _forward(m.root):
            return "it may reverse an axis"
        return must_stay(m.root.outputs[0], m["x"])

    def rewrite(self, m: Match, build: Builder) -> ir.Value:
        return m["x"]


@dataclasses.dataclass(frozen=True)
class RemovePad(CleanupRule):
    """Pad(x, zeros) -> x."""

    def pattern(self) -> OpPattern:
        return op.Pad(var("x"), const("pads"), _rest=True)

    def check(self, m: Match, context: Context) -> str | None:
        if np.any(m.array("pads")):
            return "it pads"
        return must_stay(m.root.outputs[0], m["x"])

    def rewrite(self, m: Match, build: Builder) -> ir.Value:
        return m["x"]


@dataclasses.dataclass(frozen=True)
class RemoveSingle(CleanupRule):
    """Concat, Sum, Max, Min, Mean of one tensor -> the tensor."""

    def pattern(self) -> OpPattern:
        return op.one_of(("Concat", "Sum", "Max", "Min", "Mean"), var("x"))

    def check(self, m: Match, context: Context) -> str | None:
        return must_stay(m.root.outputs[0], m["x"])

    def rewrite(self, m: Match, build: Builder) -> ir.Value:
        return m["x"]


@dataclasses.dataclass(frozen=True)
class RemoveTranspose(CleanupRule):
    """Transpose(x, perm=identity) -> x."""

    def pattern(self) -> OpPattern:
        return op.Transpose(var("x"), _name="t")

    def check(self, m: Match, context: Context) -> str | None:
        perm = attribute(m.root, "perm")
        if perm is None or list(perm) != list(range(len(perm))):
            return f"perm is {perm}"
        return must_stay(m.root.outputs[0], m["x"])

    def rewrite(self, m: Match, build: Builder) -> ir.Value:
        return m["x"]


_IDEMPOTENT = ("Relu", "Abs", "Ceil", "Floor", "Round", "Sign")


@dataclasses.dataclass(frozen=True)
class MergeIdempotent(CleanupRule):
    """Relu(Relu(x)) -> Relu(x); likewise Abs, Ceil, Floor, Round, Sign."""

    def pattern(self) -> tuple[OpPattern, ...]:
        return tuple(
            op.one_of((name,), op.one_of((name,), var("x"), _shared=True, _name="inner"))
            for name in _IDEMPOTENT
        )

    def check(self, m: Match, context: Context) -> str | None:
        return must_stay(m.root.outputs[0], m.node("inner").outputs[0])

    def rewrite(self, m: Match, build: Builder) -> ir.Value:
        return m.node("inner").outputs[0]


@dataclasses.dataclass(frozen=True)
class RemoveInversePair(CleanupRule):
    """Neg(Neg(x)) -> x, Reciprocal excluded (it is not exact), Not(Not(x)) -> x."""

    def pattern(self) -> tuple[OpPattern, ...]:
        return tuple(
            op.one_of((name,), op.one_of((name,), var("x"), _shared=True))
            for name in ("Neg", "Not", "BitwiseNot")
        )

    def check(self, m: Match, context: Context) -> str | None:
        return must_stay(m.root.outputs[0], m["x"])

    def rewrite(self, m: Match, build: Builder) -> ir.Value:
        return m["x"]


@dataclasses.dataclass(frozen=True)
class Identities(RuleGroup):
    """Removes operators that change nothing (Identity, Dropout, neutral arithmetic, casts,
    reshapes and transposes to what is already there) and pairs that undo each other.

    y = Transpose(Transpose(x, [0, 2, 1]), [0, 2, 1]) + 0   ->   y = x
    """

    stage: ClassVar[Stage] = Stage.CLEANUP
    rules: ClassVar[tuple[type[RewriteRule], ...]] = (
        RemoveIdentity,
        RemoveDropout,
        RemoveCast,
        CastLikeToCast,
        RemoveNeutral,
        RemoveReshape,
        RemovePad,
        RemoveSingle,
        RemoveTranspose,
        MergeTransposes,
        UndoAxes,
        MergeReshapes,
        MergeIdempotent,
        RemoveInversePair,
    )


def _forward(node: ir.Node) -> bool:
    """Whether a Slice has no negative step."""
    if len(node.inputs) < 5 or node.inputs[4] is None:
        return True
    steps = constant_array(node.inputs[4], 64)
    return steps is not None and bool(np.all(steps > 0))

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


@dataclasses.dataclass(frozen=True)
class _Cleanup(RewriteRule):
    stage: ClassVar[Stage] = Stage.CLEANUP
    fixpoint: ClassVar[bool] = True


@dataclasses.dataclass(frozen=True)
class RemoveIdentity(_Cleanup):
    """Identity(x) -> x, where x may carry the result's name."""

    def pattern(self) -> OpPattern:
        return op.Identity(var("x"))

    def check(self, m: Match, context: Context) -> str | None:
        return _must_stay(m.root.outputs[0], m["x"])

    def rewrite(self, m: Match, build: Builder) -> ir.Value:
        return m["x"]


@dataclasses.dataclass(frozen=True)
class RemoveDropout(_Cleanup):
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
        return _must_stay(node.outputs[0], m["x"])

    def rewrite(self, m: Match, build: Builder) -> tuple[ir.Value | None, ...]:
        return (m["x"],)


@dataclasses.dataclass(frozen=True)
class RemoveCast(_Cleanup):
    """Cast(x, to=dtype of x) -> x; CastLike likewise."""

    def pattern(self) -> OpPattern:
        return op.one_of(("Cast", "CastLike"), var("x"), _rest=True)

    def check(self, m: Match, context: Context) -> str | None:
        source, result = m["x"].dtype, m.root.outputs[0].dtype
        if source is None or source != result:
            return f"it converts {source} to {result}"
        return _must_stay(m.root.outputs[0], m["x"])

    def rewrite(self, m: Match, build: Builder) -> ir.Value:
        return m["x"]


@dataclasses.dataclass(frozen=True)
class CastLikeToCast(_Cleanup):
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
class RemoveNeutral(_Cleanup):
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
        if array.size != 1 and not _same_shape(m["x"], m.root.outputs[0]):
            return "it broadcasts x, or shapes are not known"
        if array.size == 1 and array.ndim > 0:
            dims = dims_of(m["x"])
            if dims is None or len(dims) < array.ndim:
                return "it raises the rank of x"
        return _must_stay(m.root.outputs[0], m["x"])

    def rewrite(self, m: Match, build: Builder) -> ir.Value:
        return m["x"]


@dataclasses.dataclass(frozen=True)
class RemoveReshape(_Cleanup):
    """Reshape, Flatten, Squeeze, Unsqueeze, Expand, Tile, Slice or Pad to the same shape -> x."""

    def pattern(self) -> OpPattern:
        ops = ("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Expand", "Tile", "Slice")
        return op.one_of(ops, var("x"), _rest=True)

    def check(self, m: Match, context: Context) -> str | None:
        if not _same_shape(m["x"], m.root.outputs[0]):
            return "the shape changes, or is not known"
        if m.root.op_type == "Slice" and not _forward(m.root):
            return "it may reverse an axis"
        return _must_stay(m.root.outputs[0], m["x"])

    def rewrite(self, m: Match, build: Builder) -> ir.Value:
        return m["x"]


@dataclasses.dataclass(frozen=True)
class RemovePad(_Cleanup):
    """Pad(x, zeros) -> x."""

    def pattern(self) -> OpPattern:
        return op.Pad(var("x"), const("pads"), _rest=True)

    def check(self, m: Match, context: Context) -> str | None:
        if np.any(m.array("pads")):
            return "it pads"
        return _must_stay(m.root.outputs[0], m["x"])

    def rewrite(self, m: Match, build: Builder) -> ir.Value:
        return m["x"]


@dataclasses.dataclass(frozen=True)
class RemoveSingle(_Cleanup):
    """Concat, Sum, Max, Min, Mean of one tensor -> the tensor."""

    def pattern(self) -> OpPattern:
        return op.one_of(("Concat", "Sum", "Max", "Min", "Mean"), var("x"))

    def check(self, m: Match, context: Context) -> str | None:
        return _must_stay(m.root.outputs[0], m["x"])

    def rewrite(self, m: Match, build: Builder) -> ir.Value:
        return m["x"]


@dataclasses.dataclass(frozen=True)
class RemoveTranspose(_Cleanup):
    """Transpose(x, perm=identity) -> x."""

    def pattern(self) -> OpPattern:
        return op.Transpose(var("x"), _name="t")

    def check(self, m: Match, context: Context) -> str | None:
        perm = attribute(m.root, "perm")
        if perm is None or list(perm) != list(range(len(perm))):
            return f"perm is {perm}"
        return _must_stay(m.root.outputs[0], m["x"])

    def rewrite(self, m: Match, build: Builder) -> ir.Value:
        return m["x"]


@dataclasses.dataclass(frozen=True)
class MergeTransposes(_Cleanup):
    """Transpose(Transpose(x, p), q) -> Transpose(x, p[q]), or x where they cancel."""

    def pattern(self) -> OpPattern:
        return op.Transpose(op.Transpose(var("x"), _name="first", _shared=True), _name="second")

    def check(self, m: Match, context: Context) -> str | None:
        perms = [attribute(m.node(name), "perm") for name in ("first", "second")]
        if perms[0] is None or perms[1] is None:
            return "a perm is not written out"
        if [perms[0][i] for i in perms[1]] == list(range(len(perms[0]))):
            return _must_stay(m.root.outputs[0], m["x"])
        return None

    def rewrite(self, m: Match, build: Builder) -> ir.Value:
        first, second = (attribute(m.node(name), "perm") for name in ("first", "second"))
        perm = [first[i] for i in second]
        if perm == list(range(len(perm))):
            return m["x"]
        value: ir.Value = build.Transpose(m["x"], perm=perm)
        return value


@dataclasses.dataclass(frozen=True)
class MergeReshapes(_Cleanup):
    """Reshape(Reshape | Flatten | Squeeze | Unsqueeze (x), s) -> Reshape(x, s).

    Only where s is constant and no 0 in it copies a dimension of the inner result.
    """

    def pattern(self) -> OpPattern:
        inner = op.one_of(
            ("Reshape", "Flatten", "Squeeze", "Unsqueeze"), var("x"), _rest=True, _name="inner",
            _shared=True,
        )  # fmt: skip
        return op.Reshape(inner, const("shape"), _name="outer")

    def check(self, m: Match, context: Context) -> str | None:
        if np.any(m.array("shape") == 0):
            return "a 0 in the target refers to the inner shape"
        return None

    def rewrite(self, m: Match, build: Builder) -> ir.Value:
        value: ir.Value = build.Reshape(
            m["x"], m["shape"], allowzero=attribute(m.root, "allowzero")
        )
        return value


_IDEMPOTENT = ("Relu", "Abs", "Ceil", "Floor", "Round", "Sign")


@dataclasses.dataclass(frozen=True)
class MergeIdempotent(_Cleanup):
    """Relu(Relu(x)) -> Relu(x); likewise Abs, Ceil, Floor, Round, Sign."""

    def pattern(self) -> tuple[OpPattern, ...]:
        return tuple(
            op.one_of((name,), op.one_of((name,), var("x"), _shared=True, _name="inner"))
            for name in _IDEMPOTENT
        )

    def check(self, m: Match, context: Context) -> str | None:
        return _must_stay(m.root.outputs[0], m.node("inner").outputs[0])

    def rewrite(self, m: Match, build: Builder) -> ir.Value:
        return m.node("inner").outputs[0]


@dataclasses.dataclass(frozen=True)
class RemoveInversePair(_Cleanup):
    """Neg(Neg(x)) -> x, Reciprocal excluded (it is not exact), Not(Not(x)) -> x."""

    def pattern(self) -> tuple[OpPattern, ...]:
        return tuple(
            op.one_of((name,), op.one_of((name,), var("x"), _shared=True))
            for name in ("Neg", "Not", "BitwiseNot")
        )

    def check(self, m: Match, context: Context) -> str | None:
        return _must_stay(m.root.outputs[0], m["x"])

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
        MergeReshapes,
        MergeIdempotent,
        RemoveInversePair,
    )


def _must_stay(old: ir.Value, new: ir.Value) -> str | None:
    """Why `old` can't simply become `new`: it would only be replaced by an Identity."""
    if not old.is_graph_output():
        return None
    if new.producer() is None:
        return "a graph output can't be an input or a weight itself"
    if new.is_graph_output():
        return "both are graph outputs"
    if new.graph is not old.graph:
        return "it returns a value of an outer graph"
    return None


def _same_shape(a: ir.Value, b: ir.Value) -> bool:
    """Equal dimension for dimension; named symbols count as equal, unnamed ones never do."""
    first, second = dims_of(a), dims_of(b)
    if first is None or second is None or len(first) != len(second):
        return False
    return all(
        x == y and (isinstance(x, int) or x.value is not None)
        for x, y in zip(first, second, strict=True)
    )


def _forward(node: ir.Node) -> bool:
    """Whether a Slice has no negative step."""
    if len(node.inputs) < 5 or node.inputs[4] is None:
        return True
    steps = constant_array(node.inputs[4], 64)
    return steps is not None and bool(np.all(steps > 0))

"""Operators that give a tensor another shape and leave its elements in order: merged.

Here: chains of Reshape, Flatten, Squeeze and Unsqueeze, also through elementwise operators, and
the keepdims form of reductions. Not here: those that change nothing (`identities`), transposes.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir

from ...ir.edit import Builder
from ...ir.graph import Dim, attribute, constant_array, dims_of, is_onnx_op
from ...ir.match import Match, OpPattern, const, op, var
from ..base import Context
from ..rules import RewriteRule
from .conditions import (
    CleanupRule,
    attributes_of,
    axes_of,
    must_stay,
    only_used_once,
    reshape_target,
    reshaped,
    same_dims,
    same_shape,
    typed,
)

RESHAPES = ("Reshape", "Flatten", "Squeeze", "Unsqueeze")
UNARY = (
    "Abs", "Acos", "Asin", "Atan", "Cast", "Ceil", "Celu", "Clip", "Cos", "Elu", "Erf", "Exp",
    "Floor", "Gelu", "HardSigmoid", "HardSwish", "LeakyRelu", "Log", "Mish", "Neg", "Not",
    "Reciprocal", "Relu", "Round", "Selu", "Sigmoid", "Sign", "Sin", "Softplus", "Softsign",
    "Sqrt", "Tanh", "ThresholdedRelu",
)  # fmt: skip
"""Operators that treat each element of their first input alike, whatever its shape."""

BINARY = ("Sub", "Div", "Pow", "Max", "Min", "PRelu")
"""Operators that do so too where the second input is one number; Add and Mul where either is."""

REDUCTIONS = (
    "ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL1", "ReduceL2",
    "ReduceLogSum", "ReduceLogSumExp", "ReduceSumSquare",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class MergeReshapes(CleanupRule):
    """Reshape | Flatten | Squeeze | Unsqueeze of another of these -> one Reshape, or x itself.

    The target is the constant one, if no 0 in it copies a dimension of the inner result, else made
    from the shape inferred: -1 for one symbol, 0 where x has the same symbol at the same place.
    """

    def pattern(self) -> OpPattern:
        inner = op.one_of(RESHAPES, var("x"), _rest=True, _name="inner", _shared=True)
        return op.one_of(RESHAPES, inner, _rest=True)

    def check(self, m: Match, context: Context) -> str | None:
        if same_shape(m["x"], m.root.outputs[0]):
            return must_stay(m.root.outputs[0], m["x"])
        if _asserts(m.node("inner")):
            return "a Squeeze says that a dimension is 1"
        return None if _target(m) is not None else "the shape depends on more than one symbol"

    def rewrite(self, m: Match, build: Builder) -> ir.Value:
        if same_shape(m["x"], m.root.outputs[0]):
            return m["x"]
        target = _target(m)
        assert target is not None
        zero = target.size > 0 and not target.all() and not _copies(m)
        value: ir.Value = build.Reshape(m["x"], target, allowzero=1 if zero else None)
        return value


def _asserts(node: ir.Node) -> bool:
    """Whether a Squeeze drops dimensions that only it says to be 1: a Reshape would lose that."""
    dims = dims_of(node.inputs[0])
    if not is_onnx_op(node, "Squeeze") or dims is None:
        return False
    axes = axes_of(node, len(dims))
    return axes is not None and any(dims[a] != 1 for a in axes)


def _copies(m: Match) -> bool:
    """Whether a 0 of the target copies a dimension, rather than being a size."""
    dims = dims_of(m.root.outputs[0])
    return dims is not None and all(d != 0 for d in dims)


def _target(m: Match) -> np.ndarray | None:
    dims = dims_of(m.root.outputs[0])
    if dims is not None and (target := reshape_target(dims, dims_of(m["x"]))) is not None:
        return target
    if is_onnx_op(m.root, "Reshape"):
        given = constant_array(m.root.inputs[1], 64)
        if given is not None and given.all():
            return given.astype(np.int64)
    return None


@dataclasses.dataclass(frozen=True)
class UndoAxes(CleanupRule):
    """Unsqueeze(Squeeze(x, a), a) -> x, Squeeze(Unsqueeze(x, a), a) -> x, whatever the shape."""

    def pattern(self) -> tuple[OpPattern, ...]:
        a, b, x = const("a"), const("b"), var("x")
        return (
            op.Unsqueeze(op.Squeeze(x, a, _shared=True), b),
            op.Squeeze(op.Unsqueeze(x, a, _shared=True), b),
        )

    def check(self, m: Match, context: Context) -> str | None:
        first, second = (m.array(name).reshape(-1) for name in ("a", "b"))
        dims = dims_of(m["x"])
        if np.any(first < 0) or np.any(second < 0):
            if dims is None:
                return "axes are counted from the end, and the rank is not known"
            rank = len(dims) + (0 if is_onnx_op(m.root, "Unsqueeze") else len(first))
            first, second = first % rank, second % rank
        if sorted(first.tolist()) != sorted(second.tolist()):
            return "the axes are not the same"
        return must_stay(m.root.outputs[0], m["x"])

    def rewrite(self, m: Match, build: Builder) -> ir.Value:
        return m["x"]


@dataclasses.dataclass(frozen=True)
class MergeAxes(CleanupRule):
    """Squeeze(Squeeze(x, a), b) -> Squeeze(x, a and b); Unsqueeze likewise, whatever the shape."""

    def pattern(self) -> tuple[OpPattern, ...]:
        return tuple(
            op.one_of((name,), op.one_of((name,), var("x"), const("a"), _shared=True), const("b"))
            for name in ("Squeeze", "Unsqueeze")
        )

    def check(self, m: Match, context: Context) -> str | None:
        return None if self._axes(m) is not None else "the rank of x is not known"

    def rewrite(self, m: Match, build: Builder) -> ir.Value:
        axes = self._axes(m)
        value: ir.Value = build.node(m.root.op_type, m["x"], np.array(axes, np.int64)).outputs[0]
        return value

    @staticmethod
    def _axes(m: Match) -> list[int] | None:
        dims = dims_of(m["x"])
        if dims is None:
            return None
        rank, first, second = len(dims), m.array("a").reshape(-1), m.array("b").reshape(-1)
        if m.root.op_type == "Squeeze":
            gone = {int(a) % rank for a in first}
            left = [i for i in range(rank) if i not in gone]
            return sorted({*gone, *(left[int(b)] for b in second)})
        middle, last = rank + len(first), rank + len(first) + len(second)
        new = {int(b) % last for b in second}
        old = [i for i in range(last) if i not in new]
        return sorted({*new, *(old[int(a) % middle] for a in first)})


@dataclasses.dataclass(frozen=True)
class ReshapePastElementwise(CleanupRule):
    """Reshape(f(Reshape(x))) -> Reshape(f(x)), f elementwise: one reshape less.

    f is a function of one element, or of one and a scalar constant.
    """

    def pattern(self) -> tuple[OpPattern, ...]:
        inner = op.one_of(RESHAPES, var("x"), _rest=True, _name="inner")
        return (
            op.one_of(RESHAPES, op.one_of(UNARY, inner, _rest=True, _name="f"), _rest=True),
            op.one_of(RESHAPES, op.one_of(BINARY, inner, const("c"), _name="f"), _rest=True),
            op.one_of(
                RESHAPES, op.one_of(("Add", "Mul"), inner, const("c"), _name="f"), _rest=True
            ),
        )

    def check(self, m: Match, context: Context) -> str | None:
        if "c" in m.values and m["c"].shape is not None and len(m["c"].shape) > 0:
            return "the constant is not a scalar"
        if (dims := dims_of(m["x"])) is None:
            return "the shape of x is not known"
        out = dims_of(m.root.outputs[0])
        if out is None or reshape_target(out, dims) is None:
            return "the shape depends on more than one symbol"
        return None

    def rewrite(self, m: Match, build: Builder) -> ir.Value:
        f = m.node("f")
        inner = m.node("inner").outputs[0]
        inputs = [m["x"] if v is inner else v for v in f.inputs]
        value = build.node(f.op_type, *inputs, **attributes_of(f)).outputs[0]
        typed(value, f.outputs[0], dims_of(m["x"]))
        out = dims_of(m.root.outputs[0])
        assert out is not None
        result = reshaped(build, value, out)
        assert result is not None
        return result


@dataclasses.dataclass(frozen=True)
class ReduceKeepsDims(CleanupRule):
    """Unsqueeze | Reshape of ReduceX(x, axes, keepdims=0) that puts the axes back -> keepdims=1;
    Squeeze | Reshape | Flatten of ReduceX(x, axes, keepdims=1) that drops them -> keepdims=0.
    """

    def pattern(self) -> OpPattern:
        inner = op.one_of(REDUCTIONS, var("x"), const("axes"), _name="reduce")
        return op.one_of(RESHAPES, inner, _rest=True)

    def check(self, m: Match, context: Context) -> str | None:
        node, dims, out = m.node("reduce"), dims_of(m["x"]), dims_of(m.root.outputs[0])
        if dims is None or out is None:
            return "a shape is not known"
        axes = axes_of(node, len(dims))
        if not axes:
            return "the axes are not known"
        keep = attribute(node, "keepdims", 1)
        wanted = _reduced(dims, axes, keep=not keep)
        if len(wanted) != len(out) or any(a != b for a, b in zip(wanted, out, strict=True)):
            return "the shape is not that of the reduction"
        if sum(not isinstance(d, int) for d in wanted) > 1 and not is_onnx_op(
            m.root, "Squeeze", "Unsqueeze"
        ):
            return "the shape depends on more than one symbol"
        return None

    def rewrite(self, m: Match, build: Builder) -> ir.Value:
        node = m.node("reduce")
        options = {**attributes_of(node), "keepdims": 1 - attribute(node, "keepdims", 1)}
        return build.node(node.op_type, m["x"], m["axes"], **options).outputs[0]


def _reduced(dims: tuple[Dim, ...], axes: tuple[int, ...], *, keep: bool) -> list[Dim]:
    if keep:
        return [1 if i in axes else d for i, d in enumerate(dims)]
    return [d for i, d in enumerate(dims) if i not in axes]


@dataclasses.dataclass(frozen=True)
class MergeReductions(CleanupRule):
    """ReduceX(ReduceX(x, a), b) -> ReduceX(x, a and b), X one of Sum, Mean, Max, Min, Prod."""

    def pattern(self) -> tuple[OpPattern, ...]:
        return tuple(
            op.one_of(
                (name,),
                op.one_of((name,), var("x"), const("a"), _name="inner"),
                const("b"),
                _name="outer",
            )
            for name in ("ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd")
        )

    def check(self, m: Match, context: Context) -> str | None:
        if m.attribute("inner", "keepdims", 1) != m.attribute("outer", "keepdims", 1):
            return "one keeps its dimensions, the other does not"
        if not m.array("a").size or not m.array("b").size:
            return "it reduces over all axes or none"
        if m.root.outputs[0].dtype is None or not m.root.outputs[0].dtype.is_floating_point():
            return "a mean of integers truncates"
        return None if self._axes(m) is not None else "the rank of x is not known"

    def rewrite(self, m: Match, build: Builder) -> ir.Value:
        options = {"keepdims": m.attribute("outer", "keepdims", 1)}
        axes = np.array(self._axes(m), np.int64)
        return build.node(m.root.op_type, m["x"], axes, **options).outputs[0]

    @staticmethod
    def _axes(m: Match) -> list[int] | None:
        dims = dims_of(m["x"])
        if dims is None:
            return None
        rank = len(dims)
        first = {int(a) % rank for a in m.array("a").reshape(-1)}
        if m.attribute("inner", "keepdims", 1):
            second = {int(b) % rank for b in m.array("b").reshape(-1)}
        else:
            left = [i for i in range(rank) if i not in first]
            second = {left[int(b)] for b in m.array("b").reshape(-1)}
        return sorted(first | second)


@dataclasses.dataclass(frozen=True)
class ReduceOfOne(CleanupRule):
    """ReduceSum | Mean | Max | Min | Prod over axes of size 1 -> x, or Squeeze(x, axes)."""

    def pattern(self) -> OpPattern:
        ops = ("ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd")
        return op.one_of(ops, var("x"), const("axes"))

    def check(self, m: Match, context: Context) -> str | None:
        dims = dims_of(m["x"])
        axes = None if dims is None else axes_of(m.root, len(dims))
        if dims is None or not axes or any(dims[a] != 1 for a in axes):
            return "an axis is not of size 1, or not known"
        if attribute(m.root, "keepdims", 1):
            return must_stay(m.root.outputs[0], m["x"])
        return None

    def rewrite(self, m: Match, build: Builder) -> ir.Value:
        if attribute(m.root, "keepdims", 1):
            return m["x"]
        value: ir.Value = build.Squeeze(m["x"], m["axes"])
        return value


@dataclasses.dataclass(frozen=True)
class ReshapeAroundGemm(CleanupRule):
    """Reshape(Gemm(Reshape(x, [-1, k]), W, b), [.., n]) -> MatMul(x, W) + b, x of rank 3 or more.

    Exporters flatten for a linear layer; the runtime's MatMul does so by itself.
    """

    def pattern(self) -> OpPattern:
        flat = op.one_of(RESHAPES, var("x"), _rest=True)
        return op.one_of(
            RESHAPES, op.Gemm(flat, const("w", data=False), _rest=True, _name="gemm"), _rest=True
        )

    def check(self, m: Match, context: Context) -> str | None:
        gemm, x, out = m.node("gemm"), dims_of(m["x"]), dims_of(m.root.outputs[0])
        k, n = dims_of(gemm.inputs[0]), dims_of(gemm.outputs[0])
        options = [attribute(gemm, a, d) for a, d in (("alpha", 1.0), ("beta", 1.0))]
        if options != [1.0, 1.0] or attribute(gemm, "transA", 0):
            return "the Gemm scales, or transposes x"
        if attribute(gemm, "transB", 0) and not only_used_once(m["w"]):
            return "the weight is transposed and shared"
        if x is None or out is None or k is None or n is None or len(x) < 3 or len(x) != len(out):
            return "a shape is not known, or x is no stack of matrices"
        if x[-1] != k[-1] or out[-1] != n[-1] or not isinstance(x[-1], int):
            return "the last dimension is not the one multiplied"
        if not same_dims(x[:-1], out[:-1]):
            return "the leading dimensions change, or are not known"
        bias = gemm.inputs[2] if len(gemm.inputs) > 2 else None
        if bias is not None and ((c := dims_of(bias)) is None or len(c) > 1):
            return "the bias is not one number per column"
        return None

    def rewrite(self, m: Match, build: Builder) -> ir.Value:
        gemm = m.node("gemm")
        weight = m["w"]
        if attribute(gemm, "transB", 0):
            weight = build.Transpose(weight, perm=[1, 0])  # folded, being constant
            typed(weight, m["w"], tuple(reversed(dims_of(m["w"]) or ())))
        value: ir.Value = build.MatMul(m["x"], weight)
        typed(value, m.root.outputs[0], dims_of(m.root.outputs[0]))
        bias = gemm.inputs[2] if len(gemm.inputs) > 2 else None
        return value if bias is None else build.Add(value, bias)


@dataclasses.dataclass(frozen=True)
class StackByReshape(CleanupRule):
    """Concat(Unsqueeze(x, a), Unsqueeze(y, a), ..., axis=a) -> Reshape(Concat(x, y, ..., axis=a)).

    Stacking before axis a and joining along axis a put the elements in the same order.
    """

    def pattern(self) -> OpPattern:
        return op.Concat(op.one_of(("Unsqueeze", "Reshape"), var("x"), _rest=True), _rest=True)

    def check(self, m: Match, context: Context) -> str | None:
        out, first = dims_of(m.root.outputs[0]), dims_of(m["x"])
        if out is None or first is None or len(first) + 1 != len(out):
            return "a shape is not known, or no axis is new"
        axis = attribute(m.root, "axis") % len(out)
        if axis >= len(first):
            return "it stacks along a new last axis"
        wanted = (*first[:axis], 1, *first[axis:])
        for value in m.root.inputs:
            producer = None if value is None else value.producer()
            if value is None or producer is None or producer.graph is not m.root.graph:
                return "an input is not computed here"
            if not is_onnx_op(producer, "Unsqueeze", "Reshape") or not only_used_once(value):
                return "an input does not get a new axis, or has another user"
            if not same_dims(dims_of(value), wanted) or not same_dims(
                dims_of(producer.inputs[0]), first
            ):
                return "the inputs differ in shape"
        if len(m.root.inputs) < 2 or reshape_target(out, self._joined(m)) is None:
            return "the shape depends on more than one symbol"
        return None

    def rewrite(self, m: Match, build: Builder) -> ir.Value:
        out, joined = dims_of(m.root.outputs[0]), self._joined(m)
        assert out is not None
        sources = [v.producer().inputs[0] for v in m.root.inputs]  # type: ignore[union-attr]
        value = build.Concat(*sources, axis=attribute(m.root, "axis") % len(out))
        typed(value, m["x"], joined)
        result = reshaped(build, value, out)
        assert result is not None
        return result

    @staticmethod
    def _joined(m: Match) -> tuple[Dim, ...]:
        out, first = dims_of(m.root.outputs[0]), dims_of(m["x"])
        assert out is not None
        assert first is not None
        axis = attribute(m.root, "axis") % len(out)
        size = first[axis]
        joined = size * len(m.root.inputs) if isinstance(size, int) else ir.SymbolicDim(None)
        return (*first[:axis], joined, *first[axis + 1 :])


RESHAPE_RULES: tuple[type[RewriteRule], ...] = (
    UndoAxes,
    MergeAxes,
    MergeReshapes,
    ReshapePastElementwise,
    ReduceKeepsDims,
    MergeReductions,
    ReduceOfOne,
    ReshapeAroundGemm,
    StackByReshape,
)

"""Transposes merged, cancelled, and moved past operators where one less is left.

Here: pairs, pairs with an elementwise operator or a reduction between, equal transposes of both
operands, transposes that are reshapes. Not here: those that change nothing (`identities`), those
that a matrix product can take in (`fuse.gemm`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from ...ir.edit import Builder
from ...ir.graph import Dim, attribute, constant_array, constant_tensor, dims_of, is_onnx_op
from ...ir.match import Match, OpPattern, const, op, var
from ..base import Context
from ..rules import RewriteRule
from .conditions import (
    CleanupRule,
    attributes_of,
    axes_of,
    must_stay,
    only_used_once,
    perm_of,
    reshape_target,
    reshaped,
    same_dims,
    typed,
)
from .reshapes import BINARY, REDUCTIONS, RESHAPES, UNARY

_MAX_CONSTANT = 1 << 16


def permuted(dims: Sequence[Dim] | None, perm: Sequence[int]) -> tuple[Dim, ...] | None:
    """The shape after a Transpose."""
    return None if dims is None else tuple(dims[p] for p in perm)


def _identity(perm: Sequence[int]) -> bool:
    return list(perm) == list(range(len(perm)))


@dataclasses.dataclass(frozen=True)
class MergeTransposes(CleanupRule):
    """Transpose(Transpose(x, p), q) -> Transpose(x, p[q]), or x where they cancel."""

    def pattern(self) -> OpPattern:
        return op.Transpose(op.Transpose(var("x"), _name="first", _shared=True), _name="second")

    def check(self, m: Match, context: Context) -> str | None:
        perm = _composed(m)
        if perm is None:
            return "a perm is not known"
        return must_stay(m.root.outputs[0], m["x"]) if _identity(perm) else None

    def rewrite(self, m: Match, build: Builder) -> ir.Value:
        perm = _composed(m)
        assert perm is not None
        if _identity(perm):
            return m["x"]
        value: ir.Value = build.Transpose(m["x"], perm=perm)
        return value


def _composed(m: Match) -> list[int] | None:
    first, second = perm_of(m.node("first")), perm_of(m.node("second"))
    return None if first is None or second is None else [first[i] for i in second]


@dataclasses.dataclass(frozen=True)
class TransposeIsReshape(CleanupRule):
    """Transpose that moves axes of size 1 only, next to a reshape -> Reshape, which merges.

    The order of the axes that have more than one element is what orders the elements.
    """

    def pattern(self) -> OpPattern:
        return op.Transpose(var("x"))

    def check(self, m: Match, context: Context) -> str | None:
        dims, perm = dims_of(m["x"]), perm_of(m.root)
        if dims is None or perm is None:
            return "the shape or the perm is not known"
        long = [p for p in perm if dims[p] != 1]
        if long != sorted(long):
            return "it moves an axis that is longer than 1"
        users = m.root.outputs[0].consumers()
        producer = m["x"].producer()
        after = len(users) == 1 and is_onnx_op(users[0], *RESHAPES)
        before = producer is not None and is_onnx_op(producer, *RESHAPES)
        if not after and not (before and only_used_once(m["x"])):
            return "no reshape is next to it"
        target = permuted(dims, perm)
        if target is None or reshape_target(target, dims) is None:
            return "the shape depends on more than one symbol"
        return None

    def rewrite(self, m: Match, build: Builder) -> ir.Value:
        dims, perm = dims_of(m["x"]), perm_of(m.root)
        assert dims is not None
        assert perm is not None
        result = reshaped(build, m["x"], permuted(dims, perm) or ())
        assert result is not None
        return result


@dataclasses.dataclass(frozen=True)
class TransposePastElementwise(CleanupRule):
    """Transpose(f(Transpose(x, p)), q) -> Transpose(f(x), p[q]), or f(x) where they cancel.

    f is a function of one element, Softmax or a normalization along an axis, or of one element and
    a small constant, which is transposed in advance.
    """

    def pattern(self) -> tuple[OpPattern, ...]:
        inner = op.Transpose(var("x"), _name="first")
        forms = (
            op.one_of((*UNARY, "Softmax", "LogSoftmax"), inner, _rest=True, _name="f"),
            op.one_of(BINARY, inner, const("c"), _name="f"),
            op.one_of(("Add", "Mul"), inner, const("c"), _name="f"),
        )
        return tuple(op.Transpose(form, _name="second") for form in forms)

    def check(self, m: Match, context: Context) -> str | None:
        perm = perm_of(m.node("first"))
        if perm is None or perm_of(m.node("second")) is None:
            return "a perm is not known"
        return _refuse_constant(m, len(perm))

    def rewrite(self, m: Match, build: Builder) -> ir.Value:
        perm, composed = perm_of(m.node("first")), _composed(m)
        assert perm is not None
        assert composed is not None
        value = _below(m, perm, build)
        if _identity(composed):
            return value
        result: ir.Value = build.Transpose(value, perm=composed)
        return result


def _refuse_constant(m: Match, rank: int) -> str | None:
    if "c" not in m.values:
        return None
    array = constant_array(m["c"], _MAX_CONSTANT)
    if array is None:
        return "the constant is large"
    return None if array.ndim <= rank else "the constant raises the rank"


def _below(m: Match, perm: Sequence[int], build: Builder) -> ir.Value:
    """f of x itself, for f of Transpose(x, perm)."""
    f = m.node("f")
    transposed = m.node("first").outputs[0]
    inputs: list[ir.Value | np.ndarray | None] = [
        m["x"] if v is transposed else v for v in f.inputs
    ]
    options = attributes_of(f)
    if "c" in m.values and (array := constant_array(m["c"])) is not None and array.ndim > 0:
        full = array.reshape((1,) * (len(perm) - array.ndim) + array.shape)
        inverse = np.argsort(perm)
        inputs[1 if f.inputs[0] is transposed else 0] = np.ascontiguousarray(
            full.transpose(inverse)
        )
    if f.op_type in ("Softmax", "LogSoftmax"):
        options["axis"] = perm[attribute(f, "axis", -1) % len(perm)]
    value = build.node(f.op_type, *inputs, **options).outputs[0]
    out = dims_of(f.outputs[0])  # not the shape of x: the constant may be wider
    return typed(
        value,
        f.outputs[0],
        None if out is None else permuted(out, [int(i) for i in np.argsort(perm)]),
    )


@dataclasses.dataclass(frozen=True)
class TransposeBothOperands(CleanupRule):
    """f(Transpose(x, p), Transpose(y, p)) -> Transpose(f(x, y), p), f elementwise."""

    def pattern(self) -> OpPattern:
        return op.one_of(
            ("Add", "Sub", "Mul", "Div", "Pow", "Max", "Min"),
            op.Transpose(var("x"), _name="first"),
            op.Transpose(var("y"), _name="second"),
        )

    def check(self, m: Match, context: Context) -> str | None:
        first, second = perm_of(m.node("first")), perm_of(m.node("second"))
        if first is None or first != second:
            return "they are not permuted alike"
        return None

    def rewrite(self, m: Match, build: Builder) -> ir.Value:
        value = build.node(m.root.op_type, m["x"], m["y"], **attributes_of(m.root)).outputs[0]
        perm = perm_of(m.node("first"))
        assert perm is not None
        dims = dims_of(m.root.outputs[0])
        typed(value, m.root.outputs[0], permuted(dims, [int(i) for i in np.argsort(perm)]))
        result: ir.Value = build.Transpose(value, perm=list(perm))
        return result


@dataclasses.dataclass(frozen=True)
class ReduceTransposed(CleanupRule):
    """ReduceX(Transpose(x, p), a, keepdims=0) -> ReduceX(x, p[a], keepdims=0), where the axes that
    are left are in the same order; with keepdims=1 where the Transpose after it cancels."""

    def pattern(self) -> tuple[OpPattern, ...]:
        inner = op.Transpose(var("x"), _name="first")
        reduce = op.one_of(REDUCTIONS, inner, const("axes"), _name="f")
        return op.Transpose(reduce, _name="second"), reduce

    def check(self, m: Match, context: Context) -> str | None:
        perm = perm_of(m.node("first"))
        axes = None if perm is None else axes_of(m.node("f"), len(perm))
        if perm is None or not axes:
            return "the perm or the axes are not known"
        keep = bool(m.attribute("f", "keepdims", 1))
        if "second" in m.nodes:
            composed = _composed(m)
            return None if keep and composed is not None else "it drops its axes"
        left = [p for i, p in enumerate(perm) if i not in axes]
        return None if not keep and left == sorted(left) else "the axes left are in another order"

    def rewrite(self, m: Match, build: Builder) -> ir.Value:
        f, perm = m.node("f"), perm_of(m.node("first"))
        assert perm is not None
        axes = np.array(sorted(perm[a] for a in axes_of(f, len(perm)) or ()), np.int64)
        value = build.node(f.op_type, m["x"], axes, **attributes_of(f)).outputs[0]
        if "second" not in m.nodes:
            return value
        composed = _composed(m)
        assert composed is not None
        dims = dims_of(f.outputs[0])
        typed(value, f.outputs[0], permuted(dims, [int(i) for i in np.argsort(perm)]))
        if _identity(composed):
            return value
        result: ir.Value = build.Transpose(value, perm=composed)
        return result


@dataclasses.dataclass(frozen=True)
class UnitAxesBeforeTranspose(CleanupRule):
    """Reshape(Transpose(Reshape(x))), where the last reshape only adds or drops axes of size 1 ->
    Transpose(Reshape(x)): the axes of size 1 are added before it, where they merge.

    The same where a Gather with constant indices, or a constant, comes first.
    """

    def pattern(self) -> OpPattern:
        return op.one_of(RESHAPES, op.Transpose(var("x"), _name="transpose"), _rest=True)

    def check(self, m: Match, context: Context) -> str | None:
        producer = m["x"].producer()
        if producer is None or not only_used_once(m["x"]):
            return "what is transposed has other users, or is not computed"
        if not is_onnx_op(producer, *RESHAPES) and not (
            is_onnx_op(producer, "Gather") and constant_tensor(producer.inputs[1]) is not None
        ):
            return "no reshape, and no Gather with constant indices, comes first"
        plan = self._plan(m)
        if plan is None:
            return "the last reshape does more than add or drop axes of size 1"
        dims, _ = plan
        x = dims_of(m["x"])
        if any(d == 1 for d in x or ()) and reshape_target(dims, x) is None:
            return "the shape depends on more than one symbol"
        return None

    def rewrite(self, m: Match, build: Builder) -> ir.Value:
        plan = self._plan(m)
        assert plan is not None
        dims, perm = plan
        value = m["x"]
        before = dims_of(value) or ()
        added = len(dims) - len(before)
        if all(d != 1 for d in before) and added > 0:
            value = typed(build.Unsqueeze(value, np.arange(added, dtype=np.int64)), value, dims)
        elif tuple(dims) != tuple(before):
            made = reshaped(build, value, dims)
            assert made is not None
            value = made
        if _identity(perm):
            return value
        result: ir.Value = build.Transpose(value, perm=perm)
        return result

    @staticmethod
    def _plan(m: Match) -> tuple[list[Dim], list[int]] | None:
        """The shape to transpose, with its axes of size 1 first, and the perm from there."""
        x, out, perm = dims_of(m["x"]), dims_of(m.root.outputs[0]), perm_of(m.node("transpose"))
        if x is None or out is None or perm is None:
            return None
        moved = [p for p in perm if x[p] != 1]
        if not same_dims([x[p] for p in moved], [d for d in out if d != 1]):
            return None
        long = sorted(moved)
        units = sum(d == 1 for d in out)
        dims: list[Dim] = [*(1 for _ in range(units)), *(x[p] for p in long)]
        ones, rest = iter(range(units)), iter(moved)
        return dims, [next(ones) if d == 1 else units + long.index(next(rest)) for d in out]


TRANSPOSE_RULES: tuple[type[RewriteRule], ...] = (
    MergeTransposes,
    TransposeIsReshape,
    TransposePastElementwise,
    TransposeBothOperands,
    ReduceTransposed,
    UnitAxesBeforeTranspose,
)

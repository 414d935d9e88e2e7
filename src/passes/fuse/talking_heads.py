"""Heads mixed with one another: a product over the heads axis, and softmax over what is left last.

Touvron et al. 2021, arXiv:2103.17239 (CaiT) mix the scores of all heads before and after softmax;
exporters write it as transposes around a product with a tiny matrix.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from ...ir.edit import Builder
from ...ir.graph import (
    AbsentTensor,
    attribute,
    constant_array,
    constant_tensor,
    dims_of,
    static_shape,
)
from ...ir.match import Match, OpPattern, const, op, var
from ..base import Context, Stage
from ..operators import missing_operator
from ..rules import RewriteRule, RuleGroup

FEW = 16
"""Channels up to which a product over them is slower than a convolution with a 1 x 1 kernel."""


def _channels_last(rank: int) -> tuple[int, ...]:
    return (0, *range(2, rank), 1)


@dataclasses.dataclass(frozen=True)
class ChannelMix(RewriteRule):
    """Transpose(x, 0 2 3 1) @ W + b -> Transpose(Conv(x, W^T as a 1 x 1 kernel, b), 0 2 3 1)

    For the few heads of attention: the rows of the product are as short as there are heads, and the
    transposes on either side move all scores. CaiT XXS-24 spent a sixth of its time in these.
    """

    def pattern(self) -> tuple[OpPattern, ...]:
        product = op.MatMul(op.Transpose(var("x"), _name="to"), const("w", data=False))
        return (op.Add(product, const("b", data=False)), product)

    def check(self, m: Match, context: Context) -> str | None:
        dims, shape = dims_of(m["x"]), static_shape(m["w"])
        if dims is None or len(dims) not in (3, 4):
            return "its rank is not 3 or 4"
        if tuple(m.attribute("to", "perm", ())) != _channels_last(len(dims)):
            return "the transpose does not move the channels last"
        if shape is None or len(shape) != 2 or max(shape) > FEW:
            return f"the weight is no matrix of up to {FEW} rows and columns"
        if "b" in m.values and static_shape(m["b"]) != (shape[1],):
            return "the summand is not one number per column"
        users = m.root.outputs[0].consumers()
        if m.root.op_type == "MatMul" and len(users) == 1 and _adds_constant(users[0]):
            return "a constant is added, which may be the bias"
        return missing_operator(context, "Conv", [m["x"], m["w"]])

    def rewrite(self, m: Match, build: Builder) -> ir.Value:
        dims = dims_of(m["x"])
        assert dims is not None
        kernel = _kernel(m["w"], len(dims), build)
        bias = m.values.get("b")
        mixed: ir.Value = build.Conv(m["x"], kernel, *(() if bias is None else (bias,)))
        mixed.type = m["x"].type
        shape = static_shape(m["w"])
        assert shape is not None
        mixed.shape = ir.Shape([dims[0], shape[1], *dims[2:]])
        value: ir.Value = build.Transpose(mixed, perm=_channels_last(len(dims)))
        return value


def _adds_constant(node: ir.Node) -> bool:
    return node.op_type == "Add" and any(constant_tensor(v) is not None for v in node.inputs)


def _kernel(weight: ir.Value, rank: int, build: Builder) -> ir.Value:
    rows, columns = static_shape(weight) or (0, 0)
    shape = (columns, rows, *([1] * (rank - 2)))
    data = constant_array(weight)
    if data is None:
        assert weight.dtype is not None
        absent = AbsentTensor("kernel", weight.dtype, shape, "it is made of an absent weight")
        return build.initializer("kernel", absent)
    return build.initializer("kernel", np.ascontiguousarray(data.T).reshape(shape))


@dataclasses.dataclass(frozen=True)
class SoftmaxOverLast(RewriteRule):
    """Softmax(Transpose(x, p), axis) -> Transpose(Softmax(x, -1), p), where p took x's last axis to
    `axis`.

    Runtimes transpose for any axis but the last. Where the softmax is over the last already, it is
    left alone.
    """

    def pattern(self) -> OpPattern:
        return op.Softmax(op.Transpose(var("x"), _name="moved"))

    def check(self, m: Match, context: Context) -> str | None:
        dims = dims_of(m["x"])
        if dims is None:
            return "its rank is not known"
        axis = attribute(m.root, "axis", -1) % len(dims)
        perm = m.attribute("moved", "perm") or tuple(range(len(dims)))[::-1]
        if axis == len(dims) - 1:
            return "it is over the last axis already"
        return None if perm[axis] == len(dims) - 1 else "it is over another axis than x's last"

    def rewrite(self, m: Match, build: Builder) -> ir.Value:
        dims = dims_of(m["x"])
        assert dims is not None
        result: ir.Value = build.Softmax(m["x"], axis=-1)
        result.type, result.shape = m["x"].type, ir.Shape(list(dims))
        perm = m.attribute("moved", "perm") or tuple(range(len(dims)))[::-1]
        value: ir.Value = build.Transpose(result, perm=perm)
        return value


@dataclasses.dataclass(frozen=True)
class TransposedSoftmax(RewriteRule):
    """MatMul(Transpose(Softmax(x, axis=-2)), y) -> MatMul(Softmax(Transpose(x), axis=-1), y)

    The transpose swaps the last two axes. It is done once, before, and not twice more inside the
    softmax. Attention over channels has it: Xu et al. 2021, arXiv:2104.06399 (CoaT).
    """

    def pattern(self) -> OpPattern:
        return op.Transpose(op.Softmax(var("x"), _name="softmax"), _name="swap")

    def check(self, m: Match, context: Context) -> str | None:
        dims = dims_of(m["x"])
        if dims is None or len(dims) < 2:
            return "its rank is not known"
        rank = len(dims)
        perm = m.attribute("swap", "perm") or tuple(range(rank))[::-1]
        if m.attribute("softmax", "axis", -1) % rank == rank - 1:
            return "it is over the last axis already"
        moved = perm[-1] == m.attribute("softmax", "axis", -1) % rank
        return None if moved else "the transpose does not move the axis of the softmax last"

    def rewrite(self, m: Match, build: Builder) -> ir.Value:
        dims, perm = dims_of(m["x"]), m.attribute("swap", "perm")
        assert dims is not None
        perm = perm or tuple(range(len(dims)))[::-1]
        moved: ir.Value = build.Transpose(m["x"], perm=perm)
        moved.type, moved.shape = m["x"].type, ir.Shape([dims[i] for i in perm])
        value: ir.Value = build.Softmax(moved, axis=-1)
        return value


@dataclasses.dataclass(frozen=True)
class MixedHeads(RuleGroup):
    """Mixes heads without moving them.

    Transpose(x, 0 2 3 1) @ W   ->   Transpose(Conv(x, W^T), 0 2 3 1), whose transpose cancels
    """

    stage: ClassVar[Stage] = Stage.FUSE
    rules: ClassVar[tuple[type[RewriteRule], ...]] = (
        ChannelMix,
        SoftmaxOverLast,
        TransposedSoftmax,
    )

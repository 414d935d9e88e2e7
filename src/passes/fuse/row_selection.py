"""Rows that are selected late are selected early: a class token alone goes through the last layers.

Here: `SelectRowsEarlier`. Not here: slices of slices and other cleanup of movement (`cleanup`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from ...ir import dims as dim_math
from ...ir.edit import Builder
from ...ir.graph import (
    CONTRIB_DOMAIN,
    Dim,
    attribute,
    constant_array,
    constant_scalar,
    dims_of,
    is_onnx_op,
    static_shape,
)
from ...ir.match import Match, OpPattern, const, op, var
from ...ir.ops import is_elementwise
from ..base import Context, Stage
from ..rules import RewriteRule, RuleGroup

AXIS = 1
"""The axis of the rows in (batch, rows, columns)."""

_BY_ROW = ("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization", "Softmax")
"""Operators over the last axis, or from an axis on: input 0 is what they read."""

_COSTLY = ("MatMul", "MultiHeadAttention", *_BY_ROW)

_LOOKED_BACK = 24
"""Nodes looked at for one that is worth it."""


def selected_index(node: ir.Node) -> int | None:
    """The one index that a Gather takes of the rows, or None where the node is no such Gather."""
    if not is_onnx_op(node, "Gather") or attribute(node, "axis", 0) != AXIS:
        return None
    index = constant_scalar(node.inputs[1])
    return index if isinstance(index, int) else None


@dataclasses.dataclass(frozen=True)
class SelectRowsEarlier(RewriteRule):
    """Gather(f(x), i, axis=1) -> f(Gather(x, i, axis=1)), f each row by itself, or a query's.

    f: elementwise operators, LayerNormalization over the columns, MatMul with a matrix, and
    attention, whose queries alone are selected. It moves only where a product or normalization
    becomes smaller and the value has no other use. A classifier on the first of 197 tokens so
    computes the last of 12 layers for that token, 7 % of the model.
    """

    def pattern(self) -> OpPattern:
        return op.Gather(var("x"), const("i"), axis=AXIS)

    def check(self, m: Match, context: Context) -> str | None:
        index, dims = selected_index(m.root), dims_of(m["x"])
        if index is None:
            return "it selects more than one row"
        if dims is None or len(dims) != 3 or dims[AXIS] == 1:
            return "it selects from no (batch, rows, columns) value of more than one row"
        node = m["x"].producer()
        if node is None or node.graph is not m.root.graph:
            return "it selects from what is given"
        reason = _selectable(node, m["x"])
        if reason is None and not all(
            selected_index(user) == index and user.graph is m.root.graph
            for user in m["x"].consumers()
        ):
            reason = "other rows of the value are used too"
        if reason is None and m["x"].is_graph_output():
            reason = "the value is an output of the graph"
        if reason is None and not _saves(node):
            reason = "nothing costly would become smaller"
        return reason

    def rewrite(self, m: Match, build: Builder) -> ir.Value:
        node = m["x"].producer()
        assert node is not None
        index = selected_index(m.root)
        assert index is not None
        row = _on_rows(node, index, build)
        siblings = [user for user in m["x"].consumers() if user is not m.root]
        for user in siblings:
            build.replace(user.outputs[0], _as_selected(row, user, build))
        m.include([node])
        return _as_selected(row, m.root, build)


def _selectable(node: ir.Node, value: ir.Value) -> str | None:
    """Why the rows of the node's output do not each come of the same rows of its inputs."""
    name = node.op_type
    if len(node.outputs) != 1 and any(
        v.uses() or v.is_graph_output() for v in node.outputs if v is not value
    ):
        return f"{name} has other results"
    if value is not node.outputs[0]:
        return f"it is a further result of {name}"
    if is_onnx_op(node, "LayerNormalization"):
        return (
            None if attribute(node, "axis", -1) in (-1, 2) else "the rows are normalized together"
        )
    if is_onnx_op(node, "MatMul"):
        right, left = static_shape(node.inputs[1]), dims_of(node.inputs[0])
        fits = right is not None and len(right) == 2 and left is not None and len(left) == 3
        return None if fits else "the product is of more than a matrix on the right"
    if (node.domain, name) == (CONTRIB_DOMAIN, "MultiHeadAttention"):
        given = {i for i, v in enumerate(node.inputs) if v is not None}
        return None if not given - {0, 1, 2, 5} else "the attention has a padding mask or a past"
    if is_elementwise(node) and name not in ("Dropout", "QuantizeLinear", "DequantizeLinear"):
        return None if all(_fits(v, value) for v in node.inputs) else "a broadcast is not known"
    return f"{name} mixes rows"


def _fits(operand: ir.Value | None, result: ir.Value) -> bool:
    """Whether the operand is known to have one row for each of the result, or one for all."""
    own, dims = dims_of(operand), dims_of(result)
    if own is None or dims is None:
        return operand is None
    axis = AXIS - len(dims) + len(own)
    return axis < 0 or own[axis] == 1 or dim_math.same(own[axis], dims[AXIS]) is True


def _saves(node: ir.Node) -> bool:
    """Whether something costly lies behind the node, past nodes that the selection would pass."""
    waiting, seen = [node], 0
    while waiting and seen < _LOOKED_BACK:
        at = waiting.pop(0)
        seen += 1
        if at.op_type in _COSTLY:
            return True
        for value in at.inputs:
            producer = None if value is None else value.producer()
            if value is None or producer is None or producer.graph is not node.graph:
                continue
            users = {id(user) for user in value.consumers()}
            if len(users) == 1 and _selectable(producer, value) is None:
                waiting.append(producer)
    return False


def _on_rows(node: ir.Node, index: int, build: Builder) -> ir.Value:
    """The node on the selected row of its inputs: (batch, 1, columns)."""
    inputs: list[ir.Value | None] = list(node.inputs)
    if node.op_type in ("MatMul", "MultiHeadAttention", *_BY_ROW):
        inputs[0] = _select(inputs[0], AXIS, index, build)
        if len(inputs) > 5:
            inputs[5] = _select(inputs[5], 2, index, build)
    else:
        rank = len(dims_of(node.outputs[0]) or ())
        for i, value in enumerate(inputs):
            own = dims_of(value)
            if own is not None:
                inputs[i] = _select(value, AXIS - rank + len(own), index, build)
    options = {a.name: a.value for a in node.attributes.values()}
    made = build.node(node.op_type, *inputs, _domain=node.domain, **options)
    result, dims = made.outputs[0], dims_of(node.outputs[0])
    assert dims is not None
    result.type = node.outputs[0].type
    result.shape = ir.Shape(_with_one(dims, AXIS))
    return result


def _select(value: ir.Value | None, axis: int, index: int, build: Builder) -> ir.Value | None:
    """Element `index` of an axis, which stays as one of size 1; a value that has one there as it
    is."""
    dims = dims_of(value)
    if value is None or dims is None or axis < 0 or dims[axis] == 1:
        return value
    array = constant_array(value, 1 << 22)
    if array is not None:
        return build.initializer("row", np.ascontiguousarray(np.take(array, [index], axis)))
    result: ir.Value = build.Gather(value, np.array([index], np.int64), axis=axis)
    result.type = value.type
    result.shape = ir.Shape(_with_one(dims, axis))
    return result


def _with_one(dims: Sequence[Dim], axis: int) -> list[Dim]:
    return [1 if i == axis else d for i, d in enumerate(dims)]


def _as_selected(row: ir.Value, gather: ir.Node, build: Builder) -> ir.Value:
    """The row with the axis that the index gave it: none for a scalar."""
    own, dims = dims_of(gather.inputs[1]), dims_of(gather.outputs[0])
    if own:
        return row
    result: ir.Value = build.Squeeze(row, np.array([AXIS], np.int64))
    result.type = row.type
    result.shape = None if dims is None else ir.Shape(list(dims))
    return result


@dataclasses.dataclass(frozen=True)
class SelectEarly(RuleGroup):
    """Moves the selection of one row before what computes each row by itself.

    Gather(LayerNormalization(x), 0, axis=1)   ->   LayerNormalization(Gather(x, 0, axis=1))
    """

    stage: ClassVar[Stage] = Stage.FUSE
    rules: ClassVar[tuple[type[RewriteRule], ...]] = (SelectRowsEarlier,)

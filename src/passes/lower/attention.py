"""Projections taken into the attention operator of ONNX Runtime, once nothing may quantize them.

Here: `PackedAttention` and its pass. Not here: attention itself (`fuse.attention`).
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
    AbsentTensor,
    Dim,
    attribute,
    constant_array,
    constant_tensor,
    dims_of,
    is_onnx_op,
    static_shape,
)
from ...ir.match import Match, OpPattern, op, var
from ..base import Context, Stage
from ..operators import missing_operator
from ..rules import RewriteRule, RuleGroup

FLASH_KEYS = 512
"""Keys from which on MultiHeadAttention's flash kernel is the faster one (1500 keys: 1.21 against
1.05 of the spelled-out form, 1024: 1.21 and 1.06; 961: equal; 197: 1.06 and 1.08)."""

PANEL = 16
"""Columns that the runtime's product computes at once. A head that is no multiple wastes the rest:
sizes 20, 24, 36 and 40 made the packed form slower than the spelled-out one (0.93 to 0.99)."""


@dataclasses.dataclass(frozen=True)
class _Projection:
    """`source @ weight[:, start:stop] + bias[start:stop]`, and the nodes that compute it."""

    source: ir.Value
    weight: ir.Value
    bias: ir.Value | None
    start: int
    stop: int
    nodes: tuple[ir.Node, ...]

    @property
    def width(self) -> int:
        return self.stop - self.start


def _read_projection(value: ir.Value, rank: int) -> _Projection | str:
    """The product that `value`, or the Split part that it is, comes from."""
    node = value.producer()
    width = (static_shape_tail(value) or 0) if node is not None else 0
    start, nodes = 0, []
    if node is not None and is_onnx_op(node, "Split"):
        sizes = [static_shape_tail(output) for output in node.outputs]
        if attribute(node, "axis", 0) not in (-1, rank - 1) or None in sizes:
            return "it is a Split of other than columns"
        start = sum(size or 0 for size in sizes[: value.index() or 0])
        nodes.append(node)
        assert node.inputs[0] is not None
        node = node.inputs[0].producer()
    while node is not None and is_onnx_op(node, "Reshape"):
        nodes.append(node)
        assert node.inputs[0] is not None
        node = node.inputs[0].producer()
    found = None if node is None else _product(node)
    if found is None:
        return f"{value.name!r} is no product with a weight"
    source, weight, bias, more = found
    rows = _with_rows(source, dims_of(value), rank)
    if rows is None:
        return f"{value.name!r} is no product of (batch, length, width) rows"
    return _Projection(rows, weight, bias, start, start + width, (*nodes, *more))


def static_shape_tail(value: ir.Value) -> int | None:
    """The last dimension where it is known."""
    dims = dims_of(value)
    return dims[-1] if dims and isinstance(dims[-1], int) else None


def _product(
    node: ir.Node,
) -> tuple[ir.Value, ir.Value, ir.Value | None, tuple[ir.Node, ...]] | None:
    """(x, W, b or None, nodes) of MatMul(x, W), Add(MatMul(x, W), b) or Gemm(x, W, b)."""
    if is_onnx_op(node, "Gemm"):
        options = {"transA": 0, "transB": 0, "alpha": 1.0, "beta": 1.0}
        if any(attribute(node, key, default) != default for key, default in options.items()):
            return None
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        return _constant_product(node, bias, (node,))
    if is_onnx_op(node, "MatMul"):
        return _constant_product(node, None, (node,))
    if not is_onnx_op(node, "Add"):
        return None
    for summand, bias in (node.inputs, node.inputs[::-1]):
        inner = None if summand is None else summand.producer()
        if inner is not None and is_onnx_op(inner, "MatMul"):
            found = _constant_product(inner, bias, (node, inner))
            if found is not None:
                return found
    return None


def _constant_product(
    node: ir.Node, bias: ir.Value | None, nodes: tuple[ir.Node, ...]
) -> tuple[ir.Value, ir.Value, ir.Value | None, tuple[ir.Node, ...]] | None:
    source, weight = node.inputs[:2]
    shape = static_shape(weight)
    if source is None or weight is None or constant_tensor(weight) is None or shape is None:
        return None
    if len(shape) != 2 or (bias is not None and static_shape(bias) != (shape[1],)):
        return None
    if bias is not None and constant_tensor(bias) is None:
        return None
    return source, weight, bias, nodes


def _with_rows(value: ir.Value, wanted: Sequence[Dim] | None, rank: int) -> ir.Value | None:
    """The value, or what it is reshaped from, with as many columns and the wanted leading sizes.

    Sequences may come first in what is multiplied: (length, 1, width) is no (1, length, width).
    """
    columns = static_shape_tail(value)
    if wanted is None or len(wanted) != rank or columns is None:
        return None
    at: ir.Value | None = value
    while at is not None:
        dims = dims_of(at)
        if dims is not None and len(dims) == rank and dims[-1] == columns:
            lead = zip(dims[:-1], wanted[:-1], strict=True)
            if all(dim_math.same(a, b) is True for a, b in lead):
                return at
        node = at.producer()
        if node is None or not is_onnx_op(node, "Reshape"):
            return None
        at = node.inputs[0]
    return None


@dataclasses.dataclass(frozen=True)
class PackedAttention(RewriteRule):
    """MultiHeadAttention(x @ Wq + bq, x @ Wk + bk, x @ Wv + bv) -> Attention(x, [Wq Wk Wv], b)

    The operator computes each head by a product of its own, straight into the layout that its other
    products read. Time of the spelled-out form over this one's, projections included, of ONNX
    Runtime 1.32 on one thread (batch, length, heads, size): (1, 197, 3, 64) 1.08, with a bias 1.15;
    (1, 197, 12, 64) 1.05 and 1.06; (64, 49, 3, 32) 1.26 and 1.17; (1, 128, 12, 64) 1.05 and 1.08.
    """

    stage: ClassVar[Stage] = Stage.LOWER

    def pattern(self) -> OpPattern:
        q, k, v = var("q"), var("k"), var("v")
        return op.MultiHeadAttention(q, k, v, _domain=CONTRIB_DOMAIN, _rest=True, _name="mha")

    def check(self, m: Match, context: Context) -> str | None:
        node = m.root
        reason = _unfit_operator(node)
        if reason is not None:
            return reason
        parts = [_read_projection(m[name], 3) for name in "qkv"]
        for part in parts:
            if isinstance(part, str):
                return part
        found = [part for part in parts if isinstance(part, _Projection)]
        source = found[0].source
        if any(part.source is not source for part in found):
            return "queries, keys and values are products of different values"
        inputs = [source, found[0].weight]
        reason = missing_operator(context, "Attention", inputs, domain=CONTRIB_DOMAIN)
        reason = reason or _slower(m, found) or _kept_anyway(found, node)
        m.findings["parts"] = found
        return reason

    def rewrite(self, m: Match, build: Builder) -> ir.Value:
        parts: list[_Projection] = m.findings["parts"]
        weight = _joined_weights(parts, build)
        bias = _joined_biases(parts, build)
        widths = [part.width for part in parts]
        extra = m.root.inputs[5] if len(m.root.inputs) > 5 else None
        for part in parts:
            m.include(part.nodes)
        value: ir.Value = build.Attention(
            parts[0].source,
            weight,
            bias,
            *(() if extra is None else (None, None, extra)),
            _domain=CONTRIB_DOMAIN,
            num_heads=attribute(m.root, "num_heads"),
            scale=attribute(m.root, "scale"),
            qkv_hidden_sizes=widths if len(set(widths)) > 1 else None,
        )
        return value


def _unfit_operator(node: ir.Node) -> str | None:
    given = {i for i, value in enumerate(node.inputs) if value is not None}
    if given - {0, 1, 2, 5}:
        return "it has a bias, a padding mask or a past"
    if len([v for v in node.outputs if v.uses() or v.is_graph_output()]) > 1:
        return "its present keys and values are used"
    if attribute(node, "unidirectional", 0):
        return "it is unidirectional"
    return None


def _slower(m: Match, parts: Sequence[_Projection]) -> str | None:
    """Why the operator would be no faster."""
    heads = attribute(m.root, "num_heads")
    if any(part.width % (heads * PANEL) for part in parts):
        return f"heads of {parts[0].width // heads} are no multiple of {PANEL}, which is slower"
    dims = dims_of(m["k"])
    biased = len(m.root.inputs) > 5 and m.root.inputs[5] is not None
    keys = dims[1] if dims is not None and len(dims) == 3 else None
    if not biased and isinstance(keys, int) and keys >= FLASH_KEYS:
        return f"the flash kernel of MultiHeadAttention is faster for {keys} keys"
    return None


def _kept_anyway(parts: Sequence[_Projection], user: ir.Node) -> str | None:
    """Whether a projection is used elsewhere, so that it would be computed twice."""
    inside = {id(node) for part in parts for node in part.nodes} | {id(user)}
    for part in parts:
        for node in part.nodes:
            for value in node.outputs:
                others = [c for c in value.consumers() if id(c) not in inside]
                if others or value.is_graph_output():
                    return f"the projection {value.name!r} is used elsewhere too"
    return None


def _joined_weights(parts: Sequence[_Projection], build: Builder) -> ir.Value:
    """The columns of the three weights side by side; the one they share as it is."""
    weights = [part.weight for part in parts]
    if _in_order(parts, weights):
        return weights[0]
    rows = (static_shape(weights[0]) or (0,))[0]
    pieces = [_columns_of(part.weight, part) for part in parts]
    return _side_by_side(pieces, (rows, sum(part.width for part in parts)), weights[0], build)


def _joined_biases(parts: Sequence[_Projection], build: Builder) -> ir.Value | None:
    """The three biases one after another, zeros where one has none; None where none has one."""
    biases = [part.bias for part in parts]
    given = [bias for bias in biases if bias is not None]
    if not given:
        return None
    if len(given) == len(parts) and _in_order(parts, given):
        return given[0]
    dtype = given[0].dtype
    assert dtype is not None
    pieces = [
        np.zeros(part.width, dtype.numpy()) if part.bias is None else _columns_of(part.bias, part)
        for part in parts
    ]
    return _side_by_side(pieces, (sum(part.width for part in parts),), given[0], build)


def _in_order(parts: Sequence[_Projection], values: Sequence[ir.Value]) -> bool:
    """Whether the parts are all the columns of one and the same value, in order."""
    ends = [0, *(part.stop for part in parts)]
    shape = static_shape(values[0])
    assert shape is not None
    same = all(value is values[0] for value in values) and ends[-1] == shape[-1]
    return same and [part.start for part in parts] == ends[:-1]


def _columns_of(value: ir.Value, part: _Projection) -> np.ndarray | None:
    array = constant_array(value)
    return None if array is None else array[..., part.start : part.stop]


def _side_by_side(
    pieces: Sequence[np.ndarray | None], shape: tuple[int, ...], like: ir.Value, build: Builder
) -> ir.Value:
    name = "packed_weight" if len(shape) > 1 else "packed_bias"
    known = [piece for piece in pieces if piece is not None]
    if len(known) < len(pieces):
        assert like.dtype is not None
        absent = AbsentTensor(name, like.dtype, shape, "it is joined of absent weights")
        return build.initializer(name, absent)
    return build.initializer(name, np.ascontiguousarray(np.concatenate(known, axis=-1)))


@dataclasses.dataclass(frozen=True)
class AttentionForms(RuleGroup):
    """Takes the projections into ONNX Runtime's attention where that is faster.

    MultiHeadAttention(x @ Wq, x @ Wk, x @ Wv)   ->   com.microsoft.Attention(x, [Wq Wk Wv])
    """

    stage: ClassVar[Stage] = Stage.LOWER
    rules: ClassVar[tuple[type[RewriteRule], ...]] = (PackedAttention,)

"""Rotary position embeddings, as one operator.

Here: `RotaryEmbedding`, for the form that rotates one half of each head into the other (Llama,
GPT-NeoX). Not here: attention, which reads through the operator's result (`attention`).
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from ...ir.edit import Builder
from ...ir.graph import CONTRIB_DOMAIN, attribute, constant_array, dims_of, is_onnx_op
from ...ir.match import Match, OpPattern, op, var
from ..base import Context, Stage
from ..operators import missing_operator
from ..rules import RewriteRule, RuleGroup
from .heads import Heads, read_heads, target_shape, typed
from .views import Digit, merged, plain_view, views_of


@dataclasses.dataclass(frozen=True)
class RotaryEmbedding(RewriteRule):
    """x * cos + Concat(-x[size / 2:], x[:size / 2]) * sin -> RotaryEmbedding(x, 0, cos, sin)

    x is (batch, heads, length, size); cos and sin are (length, size), each half the same, and the
    same for every sequence and head. The operator gets x as (batch, length, heads * size) where it
    was cut from that. Su et al. 2021, arXiv:2104.09864, equation 34, with the halves of a head for
    its even and odd elements.
    """

    def pattern(self) -> OpPattern:
        turned = op.Concat(op.Neg(var("high")), var("low"), _name="concat")
        return op.Add(op.Mul(var("x"), var("cos")), op.Mul(turned, var("sin")))

    def check(self, m: Match, context: Context) -> str | None:
        dims = dims_of(m["x"])
        if dims is None or len(dims) != 4:
            return "it is not of (batch, heads, length, size)"
        size = dims[3]
        if not isinstance(size, int) or size % 2:
            return "the size of a head is not known, or odd"
        if attribute(m.node("concat"), "axis") not in (-1, 3):
            return "the halves are not joined along the last axis"
        halves = [_half(m["low"], m["x"], 0), _half(m["high"], m["x"], size // 2)]
        m.findings["between"] = [node for nodes in halves if nodes for node in nodes]
        if None in halves:
            return "what is joined are not the halves of what is multiplied by the cosine"
        for name in ("cos", "sin"):
            angles = dims_of(m[name])
            if angles is None or angles[-2:] != dims[2:] or any(d != 1 for d in angles[:-2]):
                return f"the {name} is not of (length, size) for all sequences and heads"
            if not _halves_equal(m[name]):
                return f"the halves of the {name} are not known to be equal"
        return missing_operator(
            context, "RotaryEmbedding", [m["x"], None, m["cos"], m["sin"]], domain=CONTRIB_DOMAIN
        )

    def rewrite(self, m: Match, build: Builder) -> ir.Value:
        dims = dims_of(m["x"])
        assert dims is not None
        m.include(m.findings["between"])
        tables = [_table(m[name], build) for name in ("cos", "sin")]
        start = np.array([0], np.int64)
        heads = read_heads(m["x"])
        if isinstance(heads, str) or not heads.whole or heads.repeats != 1 or heads.scale != 1:
            value = build.RotaryEmbedding(m["x"], start, *tables, _domain=CONTRIB_DOMAIN)
            return typed(value, dims, m["x"])
        rows = heads.rows(build)
        row_dims = dims_of(rows)
        assert row_dims is not None
        value = build.RotaryEmbedding(
            rows, start, *tables, _domain=CONTRIB_DOMAIN, num_heads=heads.count
        )
        m.include(heads.nodes)
        return _split(typed(value, row_dims, rows), heads, build)


def _half(half: ir.Value, whole: ir.Value, start: int) -> tuple[ir.Node, ...] | None:
    """The nodes between, where `half` is half of the last axis of `whole`, from `start` on."""
    plain, dims = plain_view(whole), dims_of(whole)
    if plain is None or dims is None or not isinstance(dims[-1], int):
        return None
    wanted = (Digit(len(dims) - 1, 1, dims[-1] // 2),) * (dims[-1] > 2)
    for view in views_of(half):
        if view.source is whole and view.offset == start and view.scale == 1.0:
            axes = [merged(axis) for axis in view.axes]
            return view.nodes if axes == [*plain.axes[:-1], wanted] else None
    return None


def _halves_equal(value: ir.Value | None, depth: int = 8) -> bool:
    """Whether the halves of the last axis are the same, as constants or Concat(f, f) show it."""
    if value is None or not depth:
        return False
    array = constant_array(value, 1 << 24)
    if array is not None:
        low, high = np.split(array, 2, axis=-1)
        return bool(np.array_equal(low, high))
    node, dims = value.producer(), dims_of(value)
    if node is None or dims is None:
        return False
    if is_onnx_op(node, "Concat"):
        same = len(node.inputs) == 2 and node.inputs[0] is node.inputs[1]
        return same and attribute(node, "axis") in (-1, len(dims) - 1)
    if is_onnx_op(node, "Cos", "Sin", "Cast", "Identity"):
        return _halves_equal(node.inputs[0], depth - 1)
    if is_onnx_op(node, "Unsqueeze", "Squeeze", "Reshape", "Slice"):
        before = dims_of(node.inputs[0])
        kept = before is not None and len(before) > 0 and before[-1] == dims[-1]
        return kept and _halves_equal(node.inputs[0], depth - 1)
    if is_onnx_op(node, "Mul"):
        others = [v for v in node.inputs if v is not None and dims_of(v) not in ((), (1,))]
        return len(others) == 1 and _halves_equal(others[0], depth - 1)
    return False


def _table(angles: ir.Value, build: Builder) -> ir.Value:
    """(length, size / 2): the first half of the cosines or sines."""
    dims = dims_of(angles)
    assert dims is not None
    length, size = dims[-2:]
    half = int(size) // 2  # type: ignore[arg-type]
    array = constant_array(angles, 1 << 24)
    if array is not None:
        flat = array.reshape(array.shape[-2:])[:, :half]
        return build.initializer("table", np.ascontiguousarray(flat))
    table: ir.Value = build.Reshape(angles, target_shape((length, size)))
    typed(table, (length, size), angles)
    ends = (np.array([i], np.int64) for i in (0, half, 1))
    return typed(build.Slice(table, *ends), (length, half), angles)


def _split(rows: ir.Value, heads: Heads, build: Builder) -> ir.Value:
    """(batch, length, heads * size) as (batch, heads, length, size)."""
    split = (heads.batch, heads.length, heads.count, heads.size)
    shape = target_shape(split)
    shape[:2] = 0
    value = typed(build.Reshape(rows, shape), split, rows)
    order = (heads.batch, heads.count, heads.length, heads.size)
    return typed(build.Transpose(value, perm=(0, 2, 1, 3)), order, rows)


@dataclasses.dataclass(frozen=True)
class FuseRotary(RuleGroup):
    """Recognizes rotary position embeddings.

    x * cos + Concat(-x2, x1) * sin   ->   com.microsoft.RotaryEmbedding(x, 0, cos, sin)
    """

    stage: ClassVar[Stage] = Stage.FUSE
    rules: ClassVar[tuple[type[RewriteRule], ...]] = (RotaryEmbedding,)

"""Scaled-dot-product attention in its many spellings, as one operator.

Here: `Attention`, which puts together what `heads`, `scores` and `attention_bias` read, and chooses
the operator. Not here: projections inside the operator, which hide them from quantization
(`lower.attention`); rotary embeddings (`rotary`).

Measured with ONNX Runtime 1.32 on an AMD EPYC with AVX-512, one thread, best of many interleaved
runs, time of the spelled-out form over that of the operator (B batch, L length, H heads, E size):

    B1  L197  H3  E64   MultiHeadAttention 1.05   with a bias 1.01   Attention-23 1.12 and 1.13
    B1  L128  H12 E64   MultiHeadAttention 1.10   with a bias 1.02   Attention-23 1.22 and 1.24
    B64 L49   H3  E32   MultiHeadAttention 1.01   with a bias 0.89   Attention-23 1.11 and 1.08
    B4  L49   H12 E32   MultiHeadAttention 1.07   with a bias 0.92   Attention-23 1.28 and 1.28
    B4  L256  H4  E36   MultiHeadAttention 1.07                      Attention-23 1.00
    B1  L961  H2  E16   MultiHeadAttention 1.08                      Attention-23 1.02
    B1  L1024 H8  E64   MultiHeadAttention 1.10   with a bias 1.10   Attention-23 1.05 and 1.07

MultiHeadAttention has a flash kernel where there is no bias, mask, past or present; Attention-23
given three axes reads the heads in place. Given four axes, either gains nothing (0.94 to 1.04).
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from ...ir import dims as dim_math
from ...ir.edit import Builder
from ...ir.graph import CONTRIB_DOMAIN, Dim, dims_of
from ...ir.match import Match, OpPattern, op, var
from ..base import Context, Stage
from ..operators import missing_operator
from ..rules import RewriteRule, RuleGroup
from .attention_bias import Bias, Sizes, read_bias, write_bias
from .heads import Heads, have_dims, read_heads, target_shape, typed, write_columns
from .scores import Scores, read_scores
from .views import View, merged, plain_view, views_of

LONG = 512
"""Keys from which on the flash kernel of MultiHeadAttention beats Attention-23 (see above)."""


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What the match is: the heads, the sizes, the bias, and the operator to write."""

    query: Heads
    key: Heads
    value: Heads
    sizes: Sizes
    scores: Scores
    bias: Bias | None
    standard: bool


@dataclasses.dataclass(frozen=True)
class Attention(RewriteRule):
    """MatMul(Softmax(MatMul(q, k^T) * scale + bias), v) -> MultiHeadAttention(Q, K, V, bias)

    q, k, v are (batch, heads, length, size), however they were cut from Q, K, V, which are (batch,
    length, heads * size); the heads are split again behind it, for `SameOrder` to cancel with their
    merge. Vaswani et al. 2017, arXiv:1706.03762, section 3.2. A NaN in q or k shows as NaN where
    torch's guard made it 0.
    """

    def pattern(self) -> OpPattern:
        return op.MatMul(var("weights"), var("values"))

    def check(self, m: Match, context: Context) -> str | None:
        plan = _plan(m, context)
        if isinstance(plan, str):
            return plan
        m.findings["plan"] = plan
        return None

    def rewrite(self, m: Match, build: Builder) -> ir.Value:
        plan: _Plan = m.findings["plan"]
        result = _write(plan, build)
        for nodes in (plan.scores.nodes, plan.query.nodes, plan.key.nodes, plan.value.nodes):
            m.include(nodes)
        dims = dims_of(m.root.outputs[0])
        assert dims is not None
        return _split_again(result, plan, dims, build)


def _plan(m: Match, context: Context) -> _Plan | str:
    scores = read_scores(m["weights"], m.root)
    if isinstance(scores, str):
        return scores
    dims = dims_of(scores.nodes[0].outputs[0])
    if dims is None or len(dims) < 3 or dims_of(m.root.outputs[0]) is None:
        return "the shape of the scores is not known"
    parts = (
        read_heads(scores.query),
        read_heads(scores.keys, transposed=True),
        read_heads(m["values"]),
    )
    for part in parts:
        if isinstance(part, str):
            return part
    query, key, value = (part for part in parts if isinstance(part, Heads))
    reason = _disagreement(query, key, value)
    if reason is not None:
        return reason
    sizes = Sizes(query.batch, query.count, query.length, key.length, len(dims))
    bias = read_bias(scores, sizes)
    if isinstance(bias, str):
        return bias
    plan = _Plan(query, key, value, sizes, scores, bias, standard=False)
    return _choose(plan, context)


def _disagreement(query: Heads, key: Heads, value: Heads) -> str | None:
    """Why the three do not make one attention."""
    if (key.count, key.repeats) != (value.count, value.repeats) or query.repeats != 1:
        return "keys and values differ in their heads"
    if query.count != key.count * key.repeats:
        return f"{query.count} heads of queries, {key.count * key.repeats} of keys"
    if query.size != key.size:
        return f"heads of {query.size} in queries, {key.size} in keys"
    if not all(part.contiguous for part in (query, key, value)):
        return "the heads of queries, keys and values are interleaved"
    for a, b in ((query.batch, key.batch), (key.batch, value.batch), (key.length, value.length)):
        if dim_math.same(a, b) is not True:
            return f"sizes {dim_math.text([a])} and {dim_math.text([b])} may differ"
    if value.scale != 1.0:
        return "the values are scaled"
    for part in (query, key, value):
        if sum(not isinstance(d, int) for d in (part.batch, part.length)) > 1:
            dims = dims_of(part.source)
            if dims is None or len(dims) != 3:
                return "batch and length are both symbolic in a matrix"
    return None


def _choose(plan: _Plan, context: Context) -> _Plan | str:
    """The plan with the operator that the target runs faster, or why it runs none."""
    inputs = [plan.query.source, plan.key.source, plan.value.source]
    no_contrib = missing_operator(context, "MultiHeadAttention", inputs, domain=CONTRIB_DOMAIN)
    no_standard = missing_operator(context, "Attention", inputs)
    if no_standard is None and plan.bias is not None and not plan.bias.exact_rows:
        # seen with ONNX Runtime 1.32: a row masked throughout, by the lowest float too, becomes 0
        no_standard = "a row may be masked throughout, which the operator makes 0"
    short = not isinstance(plan.sizes.keys, int) or plan.sizes.keys < LONG
    if no_standard is None and (no_contrib or short):
        return dataclasses.replace(plan, standard=True)
    return plan if no_contrib is None else f"{no_contrib}; {no_standard}"


def _write(plan: _Plan, build: Builder) -> ir.Value:
    """The operator: (batch, length, heads * size of the values)."""
    columns = write_columns((plan.query, plan.key, plan.value), build)
    bias = write_bias(plan.bias, plan.query.source, build)
    scale = plan.scores.scale * plan.query.scale * plan.key.scale
    if not plan.standard and plan.key.repeats > 1:
        columns[1:] = [
            _repeated(value, part, build)
            for value, part in zip(columns[1:], (plan.key, plan.value), strict=True)
        ]
    if plan.standard:
        result = build.Attention(
            *columns,
            *(() if bias is None else (bias,)),
            q_num_heads=plan.query.count,
            kv_num_heads=plan.key.count,
            scale=float(scale),
        )
    else:
        result = build.MultiHeadAttention(
            *columns,
            *(() if bias is None else (None, None, bias)),
            _domain=CONTRIB_DOMAIN,
            num_heads=plan.query.count,
            scale=float(scale),
        )
    width = plan.query.count * plan.value.size
    return typed(result, (plan.query.batch, plan.query.length, width), plan.query.source)


def _as_dims(value: ir.Value, dims: tuple[Dim, ...], build: Builder) -> ir.Value:
    if have_dims(value, dims):
        return value
    return typed(build.Reshape(value, target_shape(dims)), dims, value)


def _repeated(columns: ir.Value, part: Heads, build: Builder) -> ir.Value:
    """Each head `repeats` times in a row, for an operator with as many keys as queries."""
    lead = (part.batch, part.length, part.count)
    split = np.array([0, 0, part.count, 1, part.size], np.int64)
    value = typed(build.Reshape(columns, split), (*lead, 1, part.size), columns)
    times = np.array([1, 1, 1, part.repeats, 1], np.int64)
    value = typed(build.Expand(value, times), (*lead, part.repeats, part.size), columns)
    width = part.width * part.repeats
    result: ir.Value = build.Reshape(value, np.array([0, 0, width], np.int64))
    return typed(result, (part.batch, part.length, width), columns)


def _split_again(value: ir.Value, plan: _Plan, dims: tuple[Dim, ...], build: Builder) -> ir.Value:
    """(batch, length, heads * size) as the (batch..., heads, length, size) of `dims`."""
    batch, length, heads = plan.query.batch, plan.query.length, plan.query.count
    split = (batch, length, heads, plan.value.size)
    shape = target_shape(split)
    shape[:2] = 0
    value = typed(build.Reshape(value, shape), split, value)
    order = (batch, heads, length, plan.value.size)
    value = typed(build.Transpose(value, perm=(0, 2, 1, 3)), order, value)
    return value if len(dims) == 4 else _as_dims(value, dims, build)


@dataclasses.dataclass(frozen=True)
class SameOrder(RewriteRule):
    """Reshape(Transpose(Transpose(Reshape(x)))) -> Reshape(x), where the elements keep their order.

    What stands between may be any chain of operators that only move.
    """

    def pattern(self) -> OpPattern:
        return op.Reshape(var("moved"), var("shape"))

    def check(self, m: Match, context: Context) -> str | None:
        result = m.root.outputs[0]
        reason: str | None = "nothing moves"
        for view in views_of(result):
            reason = _order_kept(view, result)
            if reason is None:
                m.findings["view"] = view
                return None
        return f"{reason} in what it reshapes"

    def rewrite(self, m: Match, build: Builder) -> ir.Value:
        view: View = m.findings["view"]
        dims = dims_of(m.root.outputs[0])
        assert dims is not None
        m.include(view.nodes[1:])
        return _as_dims(view.source, dims, build)


def _order_kept(view: View, result: ir.Value) -> str | None:
    """Why the view does not show all of its source, in order."""
    plain, dims = plain_view(view.source), dims_of(result)
    if plain is None or dims is None or len(view.nodes) < 2:
        return "nothing moves"
    flat, own = ([d for axis in v.axes for d in axis] for v in (view, plain))
    if merged(flat) != merged(own) or view.scale != 1.0 or view.offset:
        return "elements move"
    if not have_dims(view.source, dims) and sum(not isinstance(d, int) for d in dims) > 1:
        return "more than one symbolic size stands"
    return None


@dataclasses.dataclass(frozen=True)
class FuseAttention(RuleGroup):
    """Recognizes attention that exporters spell out.

    MatMul(Softmax(MatMul(q, k^T)), v)   ->   MultiHeadAttention(Q, K, V)
    """

    stage: ClassVar[Stage] = Stage.FUSE
    rules: ClassVar[tuple[type[RewriteRule], ...]] = (Attention, SameOrder)

"""Models for rules whose pattern says too little to make one up: they look around their match.

`EXAMPLES[rule]` are models in ONNX's text form, on at least one of which the rule must fire. A rule
that `test_rule_properties` does not reach from its pattern has to be here. `@opset` is set by the
test.
"""

from __future__ import annotations

import math

import onnx
import onnx.parser

_HEAD = '<ir_version: 10, opset_import: ["" : {opset}, "com.microsoft" : 1]>\n'

EXAMPLES: dict[str, tuple[str, ...]] = {
    "broadcast_by_itself": (
        """g (float[n, 4] x, float[4] y) => (float[n, 4] z)
        <int64[2] s = {1, 4}> { e = Expand(y, s)  z = Add(x, e) }""",
        """g (float[2, 3, 4] x, float[3, 4] y) => (float[2, 3, 4] z)
        <int64[1] a = {0}> { e = Unsqueeze(y, a)  z = Mul(x, e) }""",
    ),
    "merge_concats": (
        """g (float[n, 4] x, float[n, 2] y) => (float[n, 10] z)
        { c = Concat<axis = 1>(x, y)  z = Concat<axis = -1>(c, x) }""",
        """g (float[2, 0] e, float[2, 3] y) => (float[2, 6] z)
        { z = Concat<axis = 1>(e, y, y) }""",
    ),
    "number_for_tensor": (
        """g (float[n, 3] x) => (float[n, 3] z)
        <float[3] c = {2, 2, 2}> { z = Mul(x, c) }""",
    ),
    "sequence_to_split": (
        """g (float[6, n] x) => (float[2, n] a, float[4, n] b)
        <int64[2] s = {2, 4}, int64 zero = {0}, int64 one = {1}>
        { q = SplitToSequence<axis = 0>(x, s)
          a = SequenceAt(q, zero)  b = SequenceAt(q, one) }""",
    ),
    "slices_to_split": (
        """g (float[n, 6] x) => (float[n, 2] a, float[n, 4] b)
        <int64[1] zero = {0}, int64[1] two = {2}, int64[1] end = {9223372036854775807},
         int64[1] axis = {1}>
        { p = Slice(x, zero, two, axis)  q = Slice(x, two, end, axis)
          a = Relu(p)  b = Neg(q) }""",
    ),
    "split_to_gathers": (
        """g (float[2, n, 3] x) => (float[n, 3] a, float[n, 3] b)
        <int64[2] s = {1, 1}, int64[1] axis = {0}>
        { p, q = Split<axis = 0>(x, s)  c = Squeeze(p, axis)  d = Squeeze(q, axis)
          a = Relu(c)  b = Neg(d) }""",
    ),
    "stack_by_reshape": (
        """g (float[n, 3] x, float[n, 3] y) => (float[n, 2, 3] z)
        <int64[1] a = {1}>
        { p = Unsqueeze(x, a)  q = Unsqueeze(y, a)  z = Concat<axis = 1>(p, q) }""",
    ),
    "transpose_is_reshape": (
        """g (float[n, 1, 6] x) => (float[n, 2, 3] z)
        <int64[3] s = {0, 2, 3}>
        { t = Transpose<perm = [0, 2, 1]>(x)  z = Reshape(t, s) }""",
    ),
    "unit_axes_before_transpose": (
        """g (float[2, 12] x) => (float[1, 3, 4, 2] z)
        <int64[3] s = {2, 3, 4}, int64[1] a = {0}>
        { r = Reshape(x, s)  t = Transpose<perm = [1, 2, 0]>(r)  z = Unsqueeze(t, a) }""",
    ),
    "einsum_product": (
        """g (float[b, 3, 4] x, float[b, 5, 4] y) => (float[b, 3, 5] z)
        { z = Einsum<equation = "bik,bjk->bij">(x, y) }""",
    ),
    "instance_norm_form": (
        """g (float[n, 2, 3, 4] x) => (float[n, 2, 3, 4] z)
        <int64[2] a = {2, 3}, float eps = {0.00001}, float two = {2}>
        { m = ReduceMean(x, a)  c = Sub(x, m)  q = Pow(c, two)  v = ReduceMean(q, a)
          w = Add(v, eps)  d = Sqrt(w)  z = Div(c, d) }""",
    ),
    "remove_resize": (
        """g (float[1, 2, 5, 4] x) => (float[1, 2, 5, 4] z)
        <float[4] s = {1, 1, 1, 1}, float[0] roi = {}>
        { r = Resize<mode = "linear">(x, roi, s)  z = Relu(r) }""",
        """g (float[1, 2, 5, 4] x) => (float[1, 2, 5, 4] z)
        { p = MaxPool<kernel_shape = [1, 1]>(x)  z = Relu(p) }""",
    ),
    "same_order": (
        """g (float[n, 2, 3, 4] x) => (float[n, 24] z)
        <int64[2] s = {0, 24}>
        { a = Transpose<perm = [0, 2, 1, 3]>(x)  b = Transpose<perm = [0, 2, 1, 3]>(a)
          z = Reshape(b, s) }""",
    ),
    "select_rows_earlier": (
        """g (float[n, 5, 4] x, float[4, 3] w) => (float[n, 3] z)
        <int64 i = {0}> { p = MatMul(x, w)  r = Relu(p)  z = Gather<axis = 1>(r, i) }""",
    ),
    "conv_residual": (
        """g (float[1, 2, 5, 5] x) => (float[1, 2, 5, 5] z)
        <float[2, 2, 1, 1] w = {0.5, -1, 2, 0.25}, float[2, 2, 1, 1] u = {1, -1, 0.5, 0.25}>
        { a = Conv(x, w)  r = Relu(a)  b = Conv(r, u)  z = Add(b, a) }""",
    ),
}


def _weight(name: str, *shape: int) -> str:
    """An initializer of numbers that look random, in text form."""
    count = math.prod(shape)
    numbers = ", ".join(f"{math.sin(len(name) + 1.7 * i):.4f}" for i in range(count))
    return f"float[{', '.join(map(str, shape))}] {name} = {{{numbers}}}"


EXAMPLES["attention"] = (
    """g (float[n, 12, 6] x, float[6, 6] a, float[6, 6] b, float[6, 6] c) => (float[n, 12, 6] z)
    <int64[4] h = {0, 0, 2, 3}, int64[3] s = {0, 0, 6}, float k = {0.57735}>
    { p = MatMul(x, a)  ph = Reshape(p, h)  q = Transpose<perm = [0, 2, 1, 3]>(ph)
      r = MatMul(x, b)  rh = Reshape(r, h)  kt = Transpose<perm = [0, 2, 3, 1]>(rh)
      t = MatMul(x, c)  th = Reshape(t, h)  v = Transpose<perm = [0, 2, 1, 3]>(th)
      w = MatMul(q, kt)  ws = Mul(w, k)  y = Softmax<axis = -1>(ws)  o = MatMul(y, v)
      ot = Transpose<perm = [0, 2, 1, 3]>(o)  z = Reshape(ot, s) }""",
)
EXAMPLES["rotary_embedding"] = (
    """g (float[2, 5, 12] x, float[5, 2] a) => (float[2, 3, 5, 4] z)
    <int64[4] h = {0, 0, 3, 4}, int64[2] halves = {2, 2}, int64[2] lead = {0, 1}>
    { r = Reshape(x, h)  t = Transpose<perm = [0, 2, 1, 3]>(r)
      both = Concat<axis = -1>(a, a)  u = Unsqueeze(both, lead)  c = Cos(u)  s = Sin(u)
      low, high = Split<axis = -1>(t, halves)  minus = Neg(high)
      turned = Concat<axis = -1>(minus, low)
      p = Mul(t, c)  q = Mul(turned, s)  z = Add(p, q) }""",
)
EXAMPLES["packed_attention"] = (
    f"""g (float[n, 5, 8] x) => (float[n, 5, 32] z)
    <{_weight("a", 8, 32)}, {_weight("bb", 8, 32)}, {_weight("ccc", 8, 32)}>
    {{ q = MatMul(x, a)  k = MatMul(x, bb)  v = MatMul(x, ccc)
      z = com.microsoft.MultiHeadAttention<num_heads = 2>(q, k, v) }}""",
)


def examples(rule: str, opset: int) -> list[onnx.ModelProto]:
    """The models of a rule at an opset; none where the rule has no entry."""
    return [
        onnx.parser.parse_model(_HEAD.format(opset=opset) + text) for text in EXAMPLES.get(rule, ())
    ]

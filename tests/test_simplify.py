"""Simplification rules: what each matches, what it must leave alone and why, and that results stay.

Every case is a graph in text with the operators expected after the pass; the results before and
after are compared in ONNX Runtime, symbolic dimensions at two sizes.
"""

import numpy as np
import onnx_ir as ir
import pytest

from edgepass.ir.graph import AbsentTensor, node_count
from edgepass.ir.shapes import infer_shapes
from edgepass.ir.verify import verify
from edgepass.passes.base import Context
from edgepass.passes.cleanup.algebra import Algebra, KnownCondition, MergeCasts, PadIntoConv
from edgepass.passes.cleanup.branches import FoldBranches
from edgepass.passes.cleanup.broadcasts import Broadcasts
from edgepass.passes.cleanup.duplicates import Duplicates
from edgepass.passes.cleanup.folding import FoldConstants
from edgepass.passes.cleanup.movement import Movement
from edgepass.passes.cleanup.reshapes import MergeReductions, StackByReshape
from edgepass.passes.cleanup.shape_folding import FoldShapes
from edgepass.passes.cleanup.slices import SlicesToSplit
from edgepass.passes.driver import run_passes
from edgepass.passes.fuse.affine import AddParallelConvs, FoldAffine
from edgepass.passes.fuse.linear import FoldBeforeConv, FoldLinear, MergeFactors, MergeSummands
from edgepass.passes.rules import explain_all
from edgepass.pipelines import parse_recipe
from edgepass.targets.onnxruntime import OrtRunner

GENERATOR = np.random.default_rng(0)


def load(text: str, opset: int = 20) -> ir.Model:
    model = ir.from_onnx_text(f'<ir_version: 10, opset_import: ["" : {opset}]> {text}')
    infer_shapes(model)
    return model


def floats(*shape: int) -> tuple[str, str]:
    """The type and the elements of an initializer in text: two digits, none near 0."""
    numbers = GENERATOR.uniform(0.5, 1.5, int(np.prod(shape))) * GENERATOR.choice(
        [-1, 1], int(np.prod(shape))
    )
    return f"float[{','.join(map(str, shape))}]", ", ".join(f"{n:.2f}" for n in numbers)


def weight(name: str, *shape: int) -> str:
    kind, numbers = floats(*shape)
    return f"{kind} {name} = {{{numbers}}}"


def feed_of(model: ir.Model, size: int) -> dict[str, np.ndarray]:
    feed = {}
    for value in model.graph.inputs:
        shape = [d if isinstance(d, int) else size for d in value.shape.dims]
        dtype = value.dtype.numpy()
        if np.issubdtype(dtype, np.floating):
            feed[value.name] = GENERATOR.standard_normal(shape).astype(dtype)
        elif dtype == np.bool_:
            feed[value.name] = GENERATOR.integers(0, 2, shape).astype(dtype)
        else:
            feed[value.name] = GENERATOR.integers(-9, 9, shape).astype(dtype)
    return feed


def run(model: ir.Model, feed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    with OrtRunner(model, optimize=False) as runner:
        return runner.run(feed)


def ops(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def rewritten(text: str, *passes, opset: int = 20) -> list[str]:
    """The operators after the passes and dead code; the results are those of before."""
    model = load(text, opset)
    feeds = [feed_of(model, size) for size in (2, 5)]
    expected = [run(model, feed) for feed in feeds]
    model, _ = run_passes(model, [*passes, *parse_recipe("dead_code,duplicates")])
    verify(model)
    for feed, wanted in zip(feeds, expected, strict=True):
        for name, actual in run(model, feed).items():
            span = np.ptp(wanted[name].astype(np.float64)) if wanted[name].size else 1.0
            np.testing.assert_allclose(actual, wanted[name], rtol=0, atol=1e-5 * max(span, 1e-3))
    return ops(model)


CASES = {
    "reshapes merge, two symbols": (
        """g (float[B,S,8] x) => (float[B,S,2,4] y)
        <int64[3] a = {0, -1, 8}, int64[1] one = {1}, int64[4] b = {0, 0, 2, 4}>
        { u = Unsqueeze(x, one) q = Squeeze(u, one) y = Reshape(q, b) }""",
        ["Reshape"],
    ),
    "squeezes merge": (
        """g (float[1,B,1,3] x) => (float[B,3] y) <int64[1] z = {0}, int64[1] one = {1}>
        { a = Squeeze(x, z) y = Squeeze(a, one) }""",
        ["Squeeze"],
    ),
    "axes put back": (
        """g (float[B,1,C] x) => (float[B,1,C] y) <int64[1] one = {1}>
        { r = Relu(x) a = Squeeze(r, one) y = Unsqueeze(a, one) }""",
        ["Relu"],
    ),
    "reshape past elementwise": (
        """g (float[B,6] x) => (float[B,6] y)
        <int64[3] a = {-1, 2, 3}, int64[2] b = {-1, 6}, float c = {2.5}>
        { p = Reshape(x, a) q = Mul(c, p) r = Reshape(q, b) y = Tanh(r) }""",
        ["Mul", "Tanh"],
    ),
    "reduction keeps dims": (
        """g (float[B,3,4] x) => (float[B,1,4] y) <int64[1] a = {1}>
        { r = ReduceMax<keepdims = 0>(x, a) y = Unsqueeze(r, a) }""",
        ["ReduceMax"],
    ),
    "reduction drops dims": (
        """g (float[B,3,4] x) => (float[B,4] y) <int64[1] a = {1}>
        { r = ReduceSum(x, a) y = Squeeze(r, a) }""",
        ["ReduceSum"],
    ),
    "reductions merge": (
        """g (float[B,3,4] x) => (float[B] y) <int64[1] a = {1}>
        { r = ReduceMean<keepdims = 0>(x, a) y = ReduceMean<keepdims = 0>(r, a) }""",
        ["ReduceMean"],
    ),
    "reduction of one": (
        """g (float[B,1,4] x) => (float[B,4] y) <int64[1] a = {1}>
        { y = ReduceProd<keepdims = 0>(x, a) }""",
        ["Squeeze"],
    ),
    "reshapes around Gemm": (
        f"""g (float[B,3,4] x) => (float[B,3,2] y)
        <int64[2] a = {{-1, 4}}, int64[3] b = {{-1, 3, 2}}, {weight("w", 2, 4)}, {weight("c", 2)}>
        {{ p = Reshape(x, a) q = Gemm<transB = 1>(p, w, c) y = Reshape(q, b) }}""",
        ["MatMul", "Add"],
    ),
    "stack": (
        """g (float[B,3] x, float[B,3] z) => (float[2,B,3] y) <int64[1] a = {0}>
        { p = Unsqueeze(x, a) q = Unsqueeze(z, a) y = Concat<axis = 0>(p, q) }""",
        ["Concat", "Reshape"],
    ),
    "transposes merge": (
        """g (float[A,B,3] x) => (float[3,A,B] y)
        { p = Transpose<perm = [1, 0, 2]>(x) y = Transpose<perm = [2, 1, 0]>(p) }""",
        ["Transpose"],
    ),
    "transpose of ones": (
        """g (float[B,1,6] x) => (float[B,6] y) <int64[2] s = {-1, 6}>
        { p = Transpose<perm = [0, 2, 1]>(x) y = Reshape(p, s) }""",
        ["Reshape"],
    ),
    "transposes around a constant": (
        f"""g (float[B,3,4] x) => (float[B,3,4] y) <{weight("c", 3)}>
        {{ p = Transpose<perm = [0, 2, 1]>(x) q = Sub(p, c)
           y = Transpose<perm = [0, 2, 1]>(q) }}""",
        ["Sub"],
    ),
    "transposes around softmax": (
        """g (float[B,3,4] x) => (float[B,3,4] y)
        { p = Transpose<perm = [0, 2, 1]>(x) r = Softmax<axis = 1>(p)
          y = Transpose<perm = [0, 2, 1]>(r) }""",
        ["Softmax"],
    ),
    "both operands": (
        """g (float[B,3] x, float[B,3] z) => (float[3,B] y)
        { p = Transpose(x) q = Transpose(z) y = Div(p, q) }""",
        ["Div", "Transpose"],
    ),
    "reduction of a transpose": (
        """g (float[B,3,4,5] x) => (float[B,3] y) <int64[2] a = {1, 2}>
        { p = Transpose<perm = [0, 2, 3, 1]>(x) y = ReduceMean<keepdims = 0>(p, a) }""",
        ["ReduceMean"],
    ),
    "unit axes before a transpose": (
        """g (float[1,2,S,4] x) => (float[1,2,4,S] y)
        <int64[3] a = {2, -1, 4}, int64[4] b = {1, 2, 4, -1}>
        { r = Relu(x) p = Reshape(r, a) q = Transpose<perm = [0, 2, 1]>(p) y = Reshape(q, b) }""",
        ["Relu", "Transpose"],
    ),
    "slices to a split": (
        """g (float[B,6] x) => (float[B,2] y)
        <int64[1] z = {0}, int64[1] a = {2}, int64[1] b = {4}, int64[1] e = {99},
         int64[1] one = {1}>
        { r = Relu(x) p = Slice(r, z, a, one) q = Slice(r, a, b, one) s = Slice(r, b, e, one)
          t = Add(p, q) y = Mul(t, s) }""",
        ["Relu", "Split", "Add", "Mul"],
    ),
    "slices merge": (
        """g (float[7,B,9] x) => (float[3,B,4] y)
        <int64[1] z = {0}, int64[1] one = {1}, int64[1] two = {2}, int64[2] s = {1, 1},
         int64[2] e = {4, 5}, int64[2] ax = {0, 2}, int64[1] n = {7}>
        { p = Slice(x, one, n, z) y = Slice(p, s, e, ax) }""",
        ["Slice"],
    ),
    "slice of a concat": (
        """g (float[B,2] x, float[B,3] z) => (float[B,3] y)
        <int64[1] two = {2}, int64[1] five = {5}, int64[1] one = {1}>
        { c = Concat<axis = 1>(x, z) s = Slice(c, two, five, one) y = Relu(s) }""",
        ["Relu"],
    ),
    "split of a concat": (
        """g (float[B,2] x, float[B,3] z) => (float[B,2] y, float[B,3] w) <int64[2] n = {2, 3}>
        { c = Concat<axis = 1>(x, z) p, q = Split<axis = 1>(c, n) y = Relu(p) w = Neg(q) }""",
        ["Relu", "Neg"],
    ),
    "concat of a split": (
        """g (float[B,5] x) => (float[B,5] y) <int64[2] n = {2, 3}>
        { p, q = Split<axis = 1>(x, n) c = Concat<axis = 1>(p, q) y = Relu(c) }""",
        ["Relu"],
    ),
    "concats merge": (
        """g (float[B,2] x, float[B,3] z) => (float[B,7] y)
        { c = Concat<axis = 1>(x, z) y = Concat<axis = -1>(c, x) }""",
        ["Concat"],
    ),
    "one element is gathered": (
        """g (float[B,3,4] x) => (float[B,4] y)
        <int64[1] s = {1}, int64[1] e = {2}, int64[1] ax = {1}>
        { p = Slice(x, s, e, ax) y = Squeeze(p, ax) }""",
        ["Gather"],
    ),
    "a split into ones is gathered": (
        """g (float[3,B,4] x) => (float[B,4] y) <int64[3] n = {1, 1, 1}, int64[1] ax = {0}>
        { p, q, r = Split<axis = 0>(x, n) a = Squeeze(p, ax) b = Squeeze(q, ax) c = Squeeze(r, ax)
          d = Add(a, b) y = Mul(d, c) }""",
        ["Gather", "Gather", "Gather", "Add", "Mul"],
    ),
    "sequence": (
        """g (float[B,7] x) => (float[B,3] y) <int64 n = {3}, int64 z = {0}, int64 one = {1}>
        { s = SplitToSequence<axis = 1>(x, n) a = SequenceAt(s, z) b = SequenceAt(s, one)
          y = Add(a, b) }""",
        ["Split", "Add"],
    ),
    "sequence of parts": (
        """g (float[B,2] x, float[B,2] z) => (float[B,2] y) <int64 one = {-1}>
        { s = SequenceConstruct(x, z) a = SequenceAt(s, one) y = Relu(a) }""",
        ["Relu"],
    ),
    "gather of all": (
        """g (float[B,3] x) => (float[B,3] y) <int64[3] i = {0, 1, 2}>
        { p = Gather<axis = 1>(x, i) y = Relu(p) }""",
        ["Relu"],
    ),
    "indices reshaped": (
        """g (float[5,B] x) => (float[2,3,B] y)
        <int64[6,1] i = {0, 1, 4, 2, 3, 0}, int64[3] s = {2, 3, -1}>
        { p = GatherND(x, i) y = Reshape(p, s) }""",
        ["Gather"],
    ),
    "part of a shape": (
        """g (float[A,B,3] x) => (int64[1] y) <int64 i = {1}, int64[1] z = {0}>
        { s = Shape(x) p = Gather(s, i) y = Unsqueeze(p, z) }""",
        ["Shape"],
    ),
}


@pytest.mark.parametrize("name", sorted(CASES))
def test_movement(name):
    text, expected = CASES[name]
    folded = parse_recipe("movement,fold_constants,identities")
    assert rewritten(text, *folded) == expected


ALGEBRA = {
    "minus a sign": (
        "g (float[B] x, float[B] z) => (float[B] y) { n = Neg(z) y = Add(x, n) }",
        ["Sub"],
    ),
    "bounds": (
        """g (float[B] x) => (float[B] y) <float l = {-1.0}, float h = {0.6}>
        { r = Relu(x) y = Clip(r, l, h) }""",
        ["Clip"],
    ),
    "bounds, the other way": (
        """g (float[B] x) => (float[B] y) <float l = {-1.0}, float h = {0.6}>
        { r = Clip(x, l, h) y = Relu(r) }""",
        ["Clip"],
    ),
    "same operands": (
        "g (float[B] x) => (float[B] y) { m = Max(x, x) y = Exp(m) }",
        ["Exp"],
    ),
    "negated condition": (
        "g (bool[B] c, float[B] x, float[B] z) => (float[B] y) { n = Not(c) y = Where(n, x, z) }",
        ["Where"],
    ),
    "casts": (
        "g (int32[B] x) => (float[B] y) { a = Cast<to = 7>(x) y = Cast<to = 1>(a) }",
        ["Cast"],
    ),
    "casts there and back": (
        "g (bool[B] x) => (bool[B] y) { a = Cast<to = 1>(x) b = Cast<to = 9>(a) y = Not(b) }",
        ["Not"],
    ),
    "resize by 1": (
        """g (float[1,2,3,3] x) => (float[1,2,3,3] y) <float[4] s = {1.0, 1.0, 1.0, 1.0}>
        { r = Resize<mode = "linear">(x, , s) y = Relu(r) }""",
        ["Relu"],
    ),
    "pool of one": (
        """g (float[B,2,3,3] x) => (float[B,2,3,3] y)
        { r = MaxPool<kernel_shape = [1, 1]>(x) y = Relu(r) }""",
        ["Relu"],
    ),
    "pad into conv": (
        f"""g (float[B,2,5,5] x) => (float[B,3,6,6] y)
        <int64[8] p = {{0, 0, 1, 0, 0, 0, 2, 2}}, {weight("w", 3, 2, 3, 3)}>
        {{ a = Pad(x, p) y = Conv<pads = [0, 1, 0, 0]>(a, w) }}""",
        ["Conv"],
    ),
    "pad into average": (
        """g (float[B,2,5,5] x) => (float[B,2,6,5] y) <int64[8] p = {0, 0, 1, 1, 0, 0, 2, 1}>
        { a = Pad(x, p) y = AveragePool<kernel_shape = [3, 3]>(a) }""",
        ["AveragePool"],
    ),
    "transposed product": (
        """g (float[B,3,4] x, float[B,5,3] z) => (float[B,5,4] y)
        { p = Transpose<perm = [0, 2, 1]>(x) q = Transpose<perm = [0, 2, 1]>(z) m = MatMul(p, q)
          y = Transpose<perm = [0, 2, 1]>(m) }""",
        ["MatMul"],
    ),
}


@pytest.mark.parametrize("name", sorted(ALGEBRA))
def test_algebra(name):
    text, expected = ALGEBRA[name]
    assert rewritten(text, Algebra(), *parse_recipe("identities")) == expected


def test_broadcasting_is_left_to_the_operator():
    text = """
        g (float[B,3,4] x, float[4] z) => (float[B,3,4] y, float[B,3,4] w)
        <int64[2] s = {3, 4}, int64[2] a = {0, 1}>
        { e = Expand(z, s) y = Add(x, e) u = Unsqueeze(z, a) w = Mul(u, x) }
    """
    assert rewritten(text, Broadcasts()) == ["Add", "Mul"]


@pytest.mark.parametrize(
    "text",
    [
        # the expansion gives the result its shape
        """g (float[4] x, float[4] z) => (float[3,4] y) <int64[2] s = {3, 4}>
        { e = Expand(z, s) y = Add(x, e) }""",
        # as far as is known: N may be 1 where x has M
        """g (float[N,4] x, float[4] z, int64[2] s) => (float[M,4] y)
        { e = Expand(z, s) y = Add(x, e) }""",
    ],
)
def test_an_expansion_that_gives_the_shape_stays(text):
    model = load(text)
    assert not Broadcasts().run(model, Context()).modified


def test_a_number_repeated_is_stored_once():
    numbers = ", ".join(["2.5"] * 12)
    model = load(
        f"g (float[B,3,4] x) => (float[B,3,4] y) <float[3,4] c = {{{numbers}}}> {{ y = Div(x, c) }}"
    )
    Broadcasts().run(model, Context())
    (value,) = model.graph.initializers.values()
    assert value.const_value.size == 1


def reasons(rule, text: str) -> str:
    found = explain_all(rule, load(text), Context())
    assert found
    assert not any(item.matched for item in found)
    return " / ".join(item.reason for item in found)


NEAR_MISSES = [
    (
        SlicesToSplit(),
        """g (float[B,6] x) => (float[B,2] y, float[B,2] w)
        <int64[1] z = {0}, int64[1] a = {2}, int64[1] b = {4}, int64[1] e = {6}, int64[1] one = {1}>
        { r = Relu(x) p = Slice(r, z, a, one) s = Slice(r, b, e, one) y = Neg(p) w = Neg(s) }""",
        "do not divide",
    ),
    (
        StackByReshape(),
        """g (float[B,3] x, float[B,3] z) => (float[B,3,2] y) <int64[1] a = {2}>
        { p = Unsqueeze(x, a) q = Unsqueeze(z, a) y = Concat<axis = 2>(p, q) }""",
        "new last axis",
    ),
    (
        MergeReductions(),
        """g (int32[B,3,4] x) => (int32[B] y) <int64[1] a = {1}>
        { r = ReduceMean<keepdims = 0>(x, a) y = ReduceMean<keepdims = 0>(r, a) }""",
        "truncates",
    ),
    (
        MergeCasts(),
        "g (float[B] x) => (int64[B] y) { a = Cast<to = 10>(x) y = Cast<to = 7>(a) }",
        "loses something",
    ),
    (
        MergeCasts(),
        "g (float16[B] x) => (uint8[B] y) { a = Cast<to = 1>(x) y = Cast<to = 2>(a) }",
        "does not fit",
    ),
    (
        PadIntoConv(),
        f"""g (float[1,2,5,5] x) => (float[1,3,5,5] y)
        <int64[8] p = {{0, 0, 1, 1, 0, 0, 1, 1}}, float v = {{1.0}}, {weight("w", 3, 2, 3, 3)}>
        {{ a = Pad(x, p, v) y = Conv(a, w) }}""",
        "pads with 1.0",
    ),
    (
        PadIntoConv(),
        f"""g (float[1,2,5,5] x) => (float[1,3,3,3] y)
        <int64[8] p = {{0, 1, 0, 0, 0, 0, 0, 0}}, {weight("w", 3, 3, 3, 3)}>
        {{ a = Pad(x, p) y = Conv(a, w) }}""",
        "channels",
    ),
    (
        KnownCondition(),
        """g (float[4] x, float[3,4] z) => (float[3,4] y) <bool c = {1}>
        { y = Where(c, x, z) }""",
        "widens",
    ),
    (
        MergeSummands(),
        """g (float[B] x) => (float[B] y) <float a = {1000.0}, float b = {-999.0}>
        { p = Add(x, a) y = Add(p, b) }""",
        "cancel",
    ),
    (
        MergeFactors(),
        """g (float[B] x) => (float[B] y) <float a = {1e30}, float b = {1e30}>
        { p = Mul(x, a) y = Mul(p, b) }""",
        "no normal number",
    ),
    (
        MergeFactors(),
        """g (int32[B] x) => (int32[B] y) <int32 a = {3}, int32 b = {2}>
        { p = Mul(x, a) y = Div(p, b) }""",
        "integers",
    ),
    (
        FoldBeforeConv(),
        f"""g (float[1,2,5,5] x) => (float[1,3,5,5] y)
        <float c = {{1.0}}, {weight("w", 3, 2, 3, 3)}>
        {{ a = Add(x, c) y = Conv<pads = [1, 1, 1, 1]>(a, w) }}""",
        "pads, after the summand",
    ),
    (
        AddParallelConvs(),
        f"""g (float[1,2,5,5] x) => (float[1,3,3,3] y)
        <{weight("v", 3, 2, 3, 3)}, {weight("w", 3, 2, 1, 1)}>
        {{ a = Conv(x, v) b = Conv<strides = [2, 2]>(x, w) y = Add(a, b) }}""",
        "strides",
    ),
]


@pytest.mark.parametrize(("rule", "text", "reason"), NEAR_MISSES)
def test_near_misses_are_left_alone_and_say_why(rule, text, reason):
    assert reason in reasons(rule, text)


AFFINE = {
    "before a convolution": (
        f"""g (float[B,4,5,5] x) => (float[B,6,3,3] y)
        <{weight("c", 4, 1, 1)}, {weight("d", 1, 4, 1, 1)}, {weight("w", 6, 2, 3, 3)}>
        {{ a = Mul(x, c) b = Sub(a, d) y = Conv<group = 2>(b, w) }}""",
        ["Conv"],
    ),
    "a factor before a padded one": (
        f"""g (float[B,2,5,5] x) => (float[B,3,5,5] y)
        <float c = {{2.5}}, {weight("w", 3, 2, 3, 3)}, {weight("b", 3)}>
        {{ a = Div(x, c) y = Conv<pads = [1, 1, 1, 1]>(a, w, b) }}""",
        ["Conv"],
    ),
    "after a convolution": (
        f"""g (float[B,2,5,5] x) => (float[B,3,3,3] y)
        <{weight("c", 3, 1, 1)}, float d = {{3.5}}, {weight("w", 3, 2, 3, 3)}>
        {{ h = Conv(x, w) a = Div(h, c) y = Sub(d, a) }}""",
        ["Conv"],
    ),
    "batch norm before": (
        f"""g (float[B,2,5,5] x) => (float[B,3,3,3] y)
        <{weight("s", 2)}, {weight("t", 2)}, {weight("m", 2)}, float[2] v = {{0.5, 2.0}},
         {weight("w", 3, 2, 3, 3)}>
        {{ a = BatchNormalization(x, s, t, m, v) y = Conv(a, w) }}""",
        ["Conv"],
    ),
    "parallel branches": (
        f"""g (float[B,4,5,5] x) => (float[B,4,5,5] y)
        <{weight("s", 4)}, {weight("t", 4)}, {weight("m", 4)}, float[4] u = {{0.5, 2.0, 1.5, 0.7}},
         {weight("v", 4, 2, 3, 3)}, {weight("w", 4, 2, 1, 1)}, {weight("b", 4)}>
        {{ p = Conv<group = 2, pads = [1, 1, 1, 1]>(x, v, b) q = Conv<group = 2>(x, w)
           r = Add(q, p) n = BatchNormalization(x, s, t, m, u) y = Add(r, n) }}""",
        ["Conv"],
    ),
    "layer scale": (
        f"""g (float[B,3,4] x) => (float[B,3,2] y)
        <{weight("w", 4, 2)}, {weight("b", 2)}, {weight("c", 2)}>
        {{ m = MatMul(x, w) a = Add(b, m) y = Mul(c, a) }}""",
        ["MatMul", "Add"],
    ),
    "scale before a product": (
        f"""g (float[B,3,4] x) => (float[B,3,2] y) <{weight("w", 4, 2)}, {weight("c", 4)}>
        {{ m = Div(x, c) y = MatMul(m, w) }}""",
        ["MatMul"],
    ),
    "after Gemm": (
        f"""g (float[B,4] x) => (float[B,2] y)
        <{weight("w", 2, 4)}, {weight("b", 2)}, {weight("c", 2)}, {weight("d", 1, 2)}>
        {{ m = Gemm<transB = 1>(x, w, b) a = Mul(m, c) y = Sub(a, d) }}""",
        ["Gemm"],
    ),
    "batch norm after Gemm": (
        f"""g (float[B,4] x) => (float[B,2] y)
        <{weight("w", 4, 2)}, {weight("s", 2)}, {weight("t", 2)}, {weight("m", 2)},
         float[2] v = {{0.5, 2.0}}>
        {{ a = Gemm(x, w) y = BatchNormalization(a, s, t, m, v) }}""",
        ["Gemm"],
    ),
    "constants": (
        f"""g (float[B,4] x) => (float[B,4] y)
        <{weight("a", 4)}, float b = {{3.0}}, float c = {{2.0}}, float d = {{0.5}}>
        {{ p = Mul(x, a) q = Div(p, b) r = Add(q, c) y = Sub(r, d) }}""",
        ["Mul", "Add"],
    ),
    "reciprocal": (
        """g (float[B] x, float[B] z) => (float[B] y)
        { s = Exp(z) r = Reciprocal(s) y = Mul(x, r) }""",
        ["Exp", "Div"],
    ),
}


@pytest.mark.parametrize("name", sorted(AFFINE))
def test_affine_neighbours(name):
    text, expected = AFFINE[name]
    assert rewritten(text, FoldAffine(), FoldLinear()) == expected


@pytest.mark.parametrize("name", sorted(set(AFFINE) - {"constants", "reciprocal"}))
def test_affine_neighbours_fold_alike_without_weights(name):
    """The same operators are left, whether the weights have data or not."""
    text, expected = AFFINE[name]
    model = load(text)
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if tensor.size > 1:
            value.const_value = AbsentTensor(value.name, tensor.dtype, list(tensor.shape))
    model, _ = run_passes(model, [FoldAffine(), FoldLinear(), *parse_recipe("dead_code")])
    assert ops(model) == expected


def test_equal_operands_in_another_order_are_one_computation():
    text = """
        g (float[B] x, float[B] z) => (float[B] y)
        { a = Add(x, z) b = Add(z, x) c = Sub(x, z) d = Sub(z, x) e = Mul(a, b) f = Mul(c, d)
          y = Add(e, f) }
    """
    assert rewritten(text, Duplicates()) == ["Add", "Sub", "Sub", "Mul", "Mul", "Add"]


def test_equal_sizes_are_computed_once():
    text = """
        g (float[B,S,4] x) => (float[B,S] y, float[B,S] w) <int64 z = {0}, int64 one = {1},
           int64[1] ax = {0}, float[1] c = {0.5}>
        { r = Relu(x) s = Shape(x) a = Gather(s, z) b = Gather(s, one) p = Unsqueeze(a, ax)
          q = Unsqueeze(b, ax) t = Concat<axis = 0>(p, q) y = Expand(c, t)
          s2 = Shape(r) a2 = Gather(s2, z) b2 = Gather(s2, one) p2 = Unsqueeze(a2, ax)
          q2 = Unsqueeze(b2, ax) t2 = Concat<axis = 0>(p2, q2) e = Expand(c, t2) w = Neg(e) }
    """
    found = rewritten(text, *parse_recipe("fold_shapes,movement"))
    assert found.count("Concat") == 1
    assert found.count("Expand") == 1


def test_a_target_with_two_symbols_becomes_constant():
    text = """
        g (float[B,S,8] x) => (float[B,S,2,4] y) <int64 z = {0}, int64 one = {1}, int64[1] ax = {0},
           int64[2] n = {2, 4}>
        { s = Shape(x) a = Gather(s, z) b = Gather(s, one) p = Unsqueeze(a, ax)
          q = Unsqueeze(b, ax) t = Concat<axis = 0>(p, q, n) y = Reshape(x, t) }
    """
    assert rewritten(text, FoldShapes()) == ["Reshape"]


def test_folding_pays_for_chains_but_not_for_masks():
    """A mask as large as the model stays an operator; a chain may store more than one node may."""
    mask = load(
        """g (float[300,300] x) => (float[300,300] y)
        <float one = {1.0}, int64[2] s = {300, 300}, int64 k = {1}>
        { e = Expand(one, s) t = Trilu<upper = 0>(e, k) y = Mul(x, t) }"""
    )
    assert not FoldConstants().run(mask, Context()).modified
    chain = load(
        """g (float[40,40] x) => (float[40,40] y)
        <float one = {1.0}, int64[2] s = {40, 40}, int64 k = {1}>
        { e = Expand(one, s) t = Trilu<upper = 0>(e, k) y = Mul(x, t) }"""
    )
    FoldConstants().run(chain, Context())
    assert ops(chain) == ["Mul"]


def branch_model(rank_needed: str) -> ir.Model:
    """An If whose branches differ in rank, followed by what `rank_needed` allows."""
    return load(
        f"""g (float[1,4,N] x) => (float y)
        <int64[1] last = {{-1}}, int64[1] two = {{2}}, int64[1] three = {{3}}, int64[1] one = {{1}},
         int64[1] z = {{0}}, float[1,8,4] w = {{{", ".join(["0.1"] * 32)}}},
         float[1,8,2] r = {{{", ".join(["0.1"] * 16)}}}>
        {{
          s = Shape(x) d = Slice(s, two, three) c = Equal(d, one)
          h = If(c) <
            then_branch = t () => (a) {{ a = Squeeze(x, last) }},
            else_branch = e () => (b) {{ b = Identity(x) }}
          >
          {rank_needed}
        }}"""
    )


def test_a_branch_that_can_only_fail_gives_way():
    model = branch_model(
        "u = Unsqueeze(h, z) q = LSTM<hidden_size = 2>(u, w, r) y = ReduceSum<keepdims = 0>(q)"
    )
    feed = {"x": np.ones((1, 4, 1), np.float32)}
    before = run(model, feed)
    FoldBranches().run(model, Context())
    assert "If" not in ops(model)
    verify(model)
    np.testing.assert_allclose(run(model, feed)["y"], before["y"], rtol=1e-6)


def test_a_branch_that_may_succeed_stays():
    model = branch_model("y = ReduceSum<keepdims = 0>(h)")
    assert not FoldBranches().run(model, Context()).modified
    assert "If" in ops(model)


def test_rules_reach_into_subgraphs():
    text = """
        g (bool c, float[B,3] x) => (float[B,3] y)
        {
          y = If(c) <
            then_branch = t () => (a) {
              p = Transpose<perm = [1, 0]>(x)
              q = Relu(p)
              a = Transpose<perm = [1, 0]>(q)
            },
            else_branch = e () => (b) { b = Neg(x) }
          >
        }
    """
    model = load(text)
    feed = {"c": np.array(True), "x": np.array([[1, -2, 3]], np.float32)}
    before = run(model, feed)
    Movement().run(model, Context())
    assert node_count(model) == 3
    np.testing.assert_array_equal(run(model, feed)["y"], before["y"])

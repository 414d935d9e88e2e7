"""Attention in its spellings: what becomes one operator, what is refused and why; numbers."""

import numpy as np
import onnx_ir as ir
import pytest
from onnx import helper, numpy_helper

from edgepass import explain
from edgepass.frontends import load_model
from edgepass.ir.graph import AbsentTensor
from edgepass.ir.match import Match
from edgepass.ir.shapes import infer_shapes
from edgepass.ir.verify import verify
from edgepass.passes.base import Context
from edgepass.passes.driver import run_passes
from edgepass.passes.fuse.attention import Attention, FuseAttention
from edgepass.passes.fuse.heads import read_heads
from edgepass.passes.fuse.rotary import FuseRotary, RotaryEmbedding
from edgepass.passes.fuse.views import Digit, merged, regroup
from edgepass.passes.lower.attention import AttentionForms, PackedAttention
from edgepass.passes.probe import Probe, numeric_error
from edgepass.targets.registry import get_target

B, L, H, E = 2, 12, 3, 16
D = H * E
LOWEST = float(np.finfo(np.float32).min)


def rng():
    return np.random.default_rng(0)


class Net:
    """Nodes by name of their result, and weights."""

    def __init__(self):
        self.nodes, self.weights, self.count = [], {}, 0

    def __call__(self, op, *inputs, outs=1, domain="", **attributes):
        self.count += 1
        names = [self.weight(i) if isinstance(i, np.ndarray) else i for i in inputs]
        results = [f"{op}_{self.count}_{i}" for i in range(outs)]
        self.nodes.append(helper.make_node(op, names, results, domain=domain, **attributes))
        return results[0] if outs == 1 else results

    def weight(self, array):
        name = f"w{len(self.weights)}"
        self.weights[name] = numpy_helper.from_array(array, name)
        return name

    def random(self, *shape, scale=0.3):
        return (rng().standard_normal(shape) * scale).astype(np.float32)

    def linear(self, x, columns=D, width=D):
        y = self("MatMul", x, self.random(width, columns))
        return self("Add", y, self.random(columns))

    def heads(self, x, perm=(0, 2, 1, 3), count=H, size=E):
        return self("Transpose", self("Reshape", x, ints(0, 0, count, size)), perm=perm)

    def merge(self, x, width=D):
        return self("Reshape", self("Transpose", x, perm=(0, 2, 1, 3)), ints(0, 0, width))

    def model(self, inputs, *outputs, opset=20):
        kinds = {"f": 1, "i": 7, "b": 9}
        graph = helper.make_graph(
            self.nodes,
            "g",
            [helper.make_tensor_value_info(n, kinds[k], s) for n, (k, s) in inputs.items()],
            [helper.make_tensor_value_info(o, 1, None) for o in outputs],
            list(self.weights.values()),
        )
        imports = [helper.make_opsetid("", opset)]
        model = load_model(helper.make_model(graph, opset_imports=imports, ir_version=10))
        infer_shapes(model)
        return model


def ints(*values):
    return np.array(values, np.int64)


def number(value):
    return np.array(value, np.float32)


X = {"x": ("f", [B, L, D])}
XY = {**X, "y": ("f", [B, L + 5, D])}
HOST = "x86_64"


def feed_of(model, **given):
    feed = {}
    for value in model.graph.inputs:
        shape = [d if isinstance(d, int) else {"n": 2, "l": 7}.get(d.value, 5) for d in value.shape]
        if value.name in given:
            feed[value.name] = given[value.name]
        elif value.dtype == ir.DataType.FLOAT:
            feed[value.name] = rng().standard_normal(shape).astype(np.float32)
        elif value.dtype == ir.DataType.BOOL:
            feed[value.name] = rng().random(shape) > 0.3
        else:
            feed[value.name] = rng().integers(0, 2, shape)
    return feed


FUSE = (FuseAttention(),)


def operators(model, passes=FUSE, target=HOST, **given):
    """The operators left; numbers equal to 1e-5 of the range."""
    probe = Probe(feed_of(model, **given))
    before = probe.run(model)
    model, _ = run_passes(model, list(passes), Context(get_target(target) if target else None))
    verify(model)
    assert numeric_error(before, probe.run(model)).relative <= 1e-5
    return [node.op_type for node in model.graph]


def attend(net, q, k, v, *, scale=True, bias=None, masked=None):
    """softmax(q k^T / sqrt(E) + bias) v; k is (batch, heads, size, length)."""
    scores = net("MatMul", q, k)
    if scale:
        scores = net("Mul", scores, number(E**-0.5))
    if bias is not None:
        scores = net("Add", scores, bias)
    if masked is not None:
        scores = masked(scores)
    return net("MatMul", net("Softmax", scores, axis=-1), v)


def test_self_attention_becomes_one_operator():
    net = Net()
    q, k, v = (net.linear("x") for _ in range(3))
    o = attend(net, net.heads(q), net.heads(k, (0, 2, 3, 1)), net.heads(v))
    model = net.model(X, net.merge(o))
    assert operators(model) == ["MatMul", "Add"] * 3 + ["MultiHeadAttention"]


def test_cross_attention_and_values_of_another_width():
    net = Net()
    q, k = net.linear("x"), net.linear("y")
    v = net.linear("y", 2 * D)
    o = attend(net, net.heads(q), net.heads(k, (0, 2, 3, 1)), net.heads(v, size=2 * E))
    model = net.model(XY, net.merge(o, 2 * D))
    assert "MultiHeadAttention" in operators(model)
    assert "Softmax" not in operators(model)


def spelled_scale(net, q, k, how):
    root = number(E**-0.25)
    match how:
        case "query":
            return net("Mul", q, number(E**-0.5)), k
        case "both":
            return net("Mul", q, root), net("Mul", k, root)
        case "divided":
            return net("Div", q, number(E**0.5)), k
    return q, k


@pytest.mark.parametrize("how", ["query", "both", "divided", "none"])
def test_the_scale_is_found_wherever_it_stands(how):
    net = Net()
    q, k = net.heads(net.linear("x")), net.heads(net.linear("x"), (0, 2, 3, 1))
    q, k = spelled_scale(net, q, k, how)
    o = attend(net, q, k, net.heads(net.linear("x")), scale=False)
    model = net.model(X, net.merge(o))
    assert "MultiHeadAttention" in operators(model)
    node = next(n for n in model.graph if n.op_type == "MultiHeadAttention")
    expected = 1.0 if how == "none" else E**-0.5
    assert node.attributes["scale"].value == pytest.approx(expected)


def test_the_scale_after_the_bias_is_refused():
    net = Net()
    scores = net("MatMul", net.heads("x"), net.heads("x", (0, 2, 3, 1)))
    scores = net("Mul", net("Add", scores, net.random(L, L)), number(0.5))
    o = net("MatMul", net("Softmax", scores, axis=-1), net.heads("x"))
    model = net.model(X, net.merge(o))
    assert "Softmax" in operators(model)
    root = [n for n in model.graph if n.op_type == "MatMul"][-1]
    assert "scaled after a bias" in explain(Attention(), root).reason


def packed(net, how):
    """Queries, keys and values cut from one product, as exporters do it."""
    y = net.linear("x", 3 * D)
    if how == "split":
        parts = net("Split", y, axis=-1, outs=3, num_outputs=3)
        return [net.heads(part) for part in parts]
    if how == "slice":
        parts = [net("Slice", y, ints(i * D), ints((i + 1) * D), ints(2)) for i in range(3)]
        return [net.heads(part) for part in parts]
    five = net("Reshape", y, ints(0, 0, 3, H, E))
    five = net("Transpose", five, perm=(2, 0, 3, 1, 4))
    if how == "gather":
        return [net("Gather", five, np.array(i, np.int64), axis=0) for i in range(3)]
    parts = net("Split", five, axis=0, outs=3, num_outputs=3)
    return [net("Squeeze", part, ints(0)) for part in parts]


@pytest.mark.parametrize("how", ["split", "slice", "gather", "squeeze"])
def test_fused_projections_are_cut_once(how):
    net = Net()
    q, k, v = packed(net, how)
    o = attend(net, q, net("Transpose", k, perm=(0, 1, 3, 2)), v)
    model = net.model(X, net.merge(o))
    assert operators(model) == ["MatMul", "Add", "Split", "MultiHeadAttention"]
    assert operators(model, [AttentionForms()]) == ["Attention"]


def test_interleaved_heads_are_refused():
    net = Net()
    five = net("Reshape", net.linear("x", 3 * D), ints(0, 0, H, 3, E))
    five = net("Transpose", five, perm=(3, 0, 2, 1, 4))
    q, k, v = (net("Gather", five, np.array(i, np.int64), axis=0) for i in range(3))
    o = attend(net, q, net("Transpose", k, perm=(0, 1, 3, 2)), v)
    model = net.model(X, net.merge(o))
    assert "Softmax" in operators(model)
    root = [n for n in model.graph if n.op_type == "MatMul"][-1]
    assert "interleaved" in explain(Attention(), root).reason


def test_heads_merged_with_the_batch():
    """(batch * heads, length, size), as older exporters write it."""
    net = Net()

    def flat(x):
        return net("Reshape", net.heads(x), ints(B * H, L, E))

    q, k, v = (flat(net.linear("x")) for _ in range(3))
    o = attend(net, q, net("Transpose", k, perm=(0, 2, 1)), v, bias=net.random(B * H, L, L))
    model = net.model(X, net.merge(net("Reshape", o, ints(B, H, L, E))))
    assert operators(model)[-1] == "MultiHeadAttention"


def test_one_head_needs_no_split():
    net = Net()
    q, k, v = (net.linear("x") for _ in range(3))
    lifted = [net("Unsqueeze", t, ints(1)) for t in (q, k, v)]
    o = attend(net, lifted[0], net("Transpose", lifted[1], perm=(0, 1, 3, 2)), lifted[2])
    model = net.model(X, net("Squeeze", o, ints(1)))
    assert operators(model).count("MultiHeadAttention") == 1
    assert "Softmax" not in operators(model)


def test_heads_that_are_not_merged_stay_split():
    net = Net()
    o = attend(net, net.heads("x"), net.heads("x", (0, 2, 3, 1)), net.heads("x"))
    model = net.model(X, net("Relu", o))
    assert operators(model) == ["MultiHeadAttention", "Reshape", "Transpose", "Relu"]


BIASES = {
    "whole": (B, H, L, L),
    "relative": (1, H, L, L),
    "batch": (B, 1, L, L),
    "no lead": (L, L),
    "heads": (H, L, L),
    "key padding": (B, 1, 1, L),
    "rows": (1, 1, L, 1),
}


@pytest.mark.parametrize("constant", [True, False])
@pytest.mark.parametrize("shape", BIASES.values(), ids=BIASES.keys())
def test_biases_of_every_shape(shape, constant):
    net = Net()
    bias = net.random(*shape, scale=2.0) if constant else "m"
    o = attend(net, net.heads("x"), net.heads("x", (0, 2, 3, 1)), net.heads("x"), bias=bias)
    inputs = X if constant else {**X, "m": ("f", list(shape))}
    left = operators(net.model(inputs, net.merge(o)))
    assert left[-1] == "MultiHeadAttention"
    assert "Softmax" not in left


@pytest.mark.parametrize("low", [LOWEST, -np.inf])
@pytest.mark.parametrize("kept", [True, False])
def test_boolean_masks(low, kept):
    net = Net()

    def masked(scores):
        choices = (scores, number(low)) if kept else (number(low), scores)
        return net("Where", "m", *choices)

    o = attend(net, net.heads("x"), net.heads("x", (0, 2, 3, 1)), net.heads("x"), masked=masked)
    model = net.model({**X, "m": ("b", [B, 1, L, L])}, net.merge(o))
    mask = np.ones((B, 1, L, L), bool)
    mask[0, 0, :, 3:] = False
    mask[1, 0, np.triu_indices(L, 1)[0], np.triu_indices(L, 1)[1]] = False
    left = operators(model, m=mask if kept else ~mask)
    assert left == ["Where", "MultiHeadAttention"]


def test_rows_masked_throughout_keep_their_values():
    """The lowest float everywhere: equal weights. Minus infinity: NaN, as before."""
    for low in (LOWEST, -np.inf):
        net = Net()
        bias = np.zeros((1, 1, L, L), np.float32)
        bias[..., 4, :] = low
        o = attend(net, net.heads("x"), net.heads("x", (0, 2, 3, 1)), net.heads("x"), bias=bias)
        model = net.model(X, net.merge(o))
        probe = Probe(feed_of(model))
        (before,) = probe.run(model).values()
        run_passes(model, [FuseAttention()], Context(get_target(HOST)))
        assert [n.op_type for n in model.graph] == ["MultiHeadAttention"]
        (after,) = probe.run(model).values()
        np.testing.assert_allclose(after, before, atol=1e-6)


def test_a_mask_that_a_sum_would_not_equal_is_refused():
    net = Net()
    o = attend(
        net,
        net.heads("x"),
        net.heads("x", (0, 2, 3, 1)),
        net.heads("x"),
        masked=lambda scores: net("Where", "m", scores, number(-10000.0)),
    )
    model = net.model({**X, "m": ("b", [B, 1, L, L])}, net.merge(o))
    root = [n for n in model.graph if n.op_type == "MatMul"][-1]
    assert "-10000" in explain(Attention(), root, Context(get_target(HOST))).reason


def guarded(net, bias):
    scores = net("MatMul", net.heads("x"), net.heads("x", (0, 2, 3, 1)))
    p = net("Softmax", net("Add", scores, bias), axis=-1)
    p = net("Where", net("IsNaN", p), number(0.0), p)
    return net.merge(net("MatMul", p, net.heads("x")))


def test_the_guard_against_nan_goes_where_no_row_is_masked_throughout():
    net = Net()
    bias = net("Where", "m", number(0.0), number(LOWEST))
    model = net.model({**X, "m": ("b", [B, 1, L, L])}, guarded(net, bias))
    assert operators(model) == ["Where", "MultiHeadAttention"]


def test_the_guard_against_nan_stays_where_it_may_be_needed():
    net = Net()
    bias = net("Where", "m", number(0.0), number(-np.inf))
    model = net.model({**X, "m": ("b", [B, 1, L, L])}, guarded(net, bias))
    assert "IsNaN" in operators(model)
    root = [n for n in model.graph if n.op_type == "MatMul"][-1]
    assert "minus infinity" in explain(Attention(), root, Context(get_target(HOST))).reason


def test_symbolic_batch_and_length_stay_symbolic():
    net = Net()
    o = attend(net, net.heads("x"), net.heads("x", (0, 2, 3, 1)), net.heads("x"), bias="m")
    inputs = {"x": ("f", ["n", "l", D]), "m": ("f", ["n", 1, "l", "l"])}
    model = net.model(inputs, net.merge(o))
    assert operators(model) == ["MultiHeadAttention"]
    assert [str(d) for d in model.graph.outputs[0].shape] == ["n", "l", str(D)]


def test_a_padding_mask_over_a_symbolic_length_is_refused():
    net = Net()
    o = attend(net, net.heads("x"), net.heads("x", (0, 2, 3, 1)), net.heads("x"), bias="m")
    inputs = {"x": ("f", ["n", "l", D]), "m": ("f", ["n", 1, 1, "l"])}
    model = net.model(inputs, net.merge(o))
    assert "Softmax" in operators(model)
    root = [n for n in model.graph if n.op_type == "MatMul"][-1]
    assert "symbolic lengths" in explain(Attention(), root, Context(get_target(HOST))).reason


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("axis", "not the last"),
        ("shared", "also used by"),
        ("output", "is an output"),
        ("between", "Relu stands between"),
        ("values", "expected Softmax"),
    ],
)
def test_near_misses_say_why(change, words):
    net = Net()
    scores = net("MatMul", net.heads("x"), net.heads("x", (0, 2, 3, 1)))
    if change == "between":
        scores = net("Relu", scores)
    p = net("Softmax", scores, axis=2 if change == "axis" else -1)
    extra = []
    if change == "shared":
        extra = [net("Neg", p)]
    if change == "output":
        extra = [p]
    if change == "values":
        p = net("Sigmoid", p)
    model = net.model(X, net.merge(net("MatMul", p, net.heads("x"))), *extra)
    root = [n for n in model.graph if n.op_type == "MatMul"][-1]
    assert "MultiHeadAttention" not in operators(model)
    assert words in explain(Attention(), root, Context(get_target(HOST))).reason


def grouped(net, opset, *, tiled=False):
    """Two heads of queries to each of keys: the keys are repeated by Expand."""
    heads = net.heads(net.linear("x", 2 * E), count=2, size=E)
    wide = net("Expand", net("Unsqueeze", heads, ints(1 if tiled else 2)), ints(B, 2, 2, L, E))
    keys = net("Reshape", wide, ints(B, 4, L, E))
    q = net.heads(net.linear("x", 4 * E), count=4)
    o = attend(net, q, net("Transpose", keys, perm=(0, 1, 3, 2)), keys)
    return net.model(X, net.merge(o, 4 * E), opset=opset)


def test_grouped_queries_use_the_standard_operator_where_the_opset_has_it():
    model = grouped(Net(), 23)
    left = operators(model)
    assert left[-1] == "Attention"
    assert "Expand" not in left
    node = list(model.graph)[-1]
    assert (node.attributes["q_num_heads"].value, node.attributes["kv_num_heads"].value) == (4, 2)


def test_grouped_queries_repeat_the_keys_where_the_opset_is_older():
    left = operators(grouped(Net(), 20))
    assert left[-1] == "MultiHeadAttention"
    assert left.count("Transpose") == 0


def test_heads_repeated_as_a_whole_are_refused():
    model = grouped(Net(), 20, tiled=True)
    assert "Softmax" in operators(model)
    root = [n for n in model.graph if n.op_type == "MatMul"][-1]
    assert "repeated as a whole" in explain(Attention(), root, Context(get_target(HOST))).reason


def test_the_standard_operator_needs_no_target_but_no_row_masked_throughout():
    for bias, expected in ((None, "Attention"), ("m", "MatMul")):
        net = Net()
        o = attend(net, net.heads("x"), net.heads("x", (0, 2, 3, 1)), net.heads("x"), bias=bias)
        inputs = X if bias is None else {**X, "m": ("f", [B, 1, L, L])}
        model = net.model(inputs, net.merge(o), opset=23)
        assert expected in operators(model, target=None)


def test_without_a_target_older_opsets_are_left_alone():
    net = Net()
    o = attend(net, net.heads("x"), net.heads("x", (0, 2, 3, 1)), net.heads("x"))
    model = net.model(X, net.merge(o))
    assert "Softmax" in operators(model, target=None)


@pytest.mark.parametrize("opset", [20, 23])
def test_what_tvm_has_no_operator_for_stays_spelled_out(opset):
    net = Net()
    x = rotated(net, net.heads("x"), *tables())
    o = attend(net, x, net.heads("x", (0, 2, 3, 1)), net.heads("x"))
    model = net.model(X, net.merge(o), opset=opset)
    run_passes(model, [FuseRotary(), FuseAttention()], Context(get_target("x86_64/tvm")))
    assert {"Softmax", "Neg"} <= {n.op_type for n in model.graph}


def test_weights_may_be_absent():
    net = Net()
    q, k, v = packed(net, "gather")
    o = attend(net, q, net("Transpose", k, perm=(0, 1, 3, 2)), v)
    model = net.model(X, net.merge(o))
    for value in model.graph.initializers.values():
        if value.dtype == ir.DataType.FLOAT and value.shape.rank():
            value.const_value = AbsentTensor(value.name, value.dtype, value.shape)
    run_passes(model, [FuseAttention(), AttentionForms()], Context(get_target(HOST)))
    assert [n.op_type for n in model.graph] == ["Attention"]


# --- projections inside the operator ---------------------------------------------------------


def projected(net, x=("x", "x", "x"), size=E):
    q, k, v = (net.linear(source, H * size) for source in x)
    k = net.heads(k, (0, 2, 3, 1), size=size)
    return net.merge(attend(net, net.heads(q, size=size), k, net.heads(v, size=size)), H * size)


def test_three_projections_become_one_packed_weight():
    net = Net()
    model = net.model(X, projected(net))
    assert operators(model, [FuseAttention(), AttentionForms()]) == ["Attention"]
    assert sorted(v.shape.rank() for v in model.graph.initializers.values()) == [1, 2]


def test_projections_of_rows_in_another_order_stay_outside():
    """(length, 1, width) has the columns that (1, length, width) has, and other batches."""
    net = Net()
    rows = net("Transpose", "x", perm=(1, 0, 2))  # as torch does of sequences of one batch
    o = net("Reshape", net.linear(rows, 3 * D), ints(1, L, 3 * D))
    q, k, v = net("Split", o, ints(D, D, D), outs=3, axis=2)
    y = attend(net, net.heads(q), net.heads(k, (0, 2, 3, 1)), net.heads(v))
    model = net.model({"x": ("f", [1, L, D])}, net.merge(y))
    assert "Attention" not in operators(model, [FuseAttention(), AttentionForms()])


def test_a_missing_bias_is_zero():
    """Whisper's keys have none."""
    net = Net()
    q, v = net.linear("x"), net.linear("x")
    k = net("MatMul", "x", net.random(D, D))
    o = attend(net, net.heads(q), net.heads(k, (0, 2, 3, 1)), net.heads(v))
    model = net.model(X, net.merge(o))
    assert operators(model, [FuseAttention(), AttentionForms()]) == ["Attention"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"x": ("x", "y", "y")}, "different values"),
        ({"size": 20}, "no multiple of 16"),
    ],
)
def test_projections_stay_outside_where_that_is_faster_or_needed(options, words):
    net = Net()
    model = net.model(XY, projected(net, **options))
    assert "MultiHeadAttention" in operators(model, [FuseAttention(), AttentionForms()])
    root = next(n for n in model.graph if n.op_type == "MultiHeadAttention")
    assert words in explain(PackedAttention(), root, Context(get_target(HOST))).reason


def test_projections_used_elsewhere_stay_outside():
    net = Net()
    y = projected(net)
    model = net.model(X, y, net("Relu", "Add_2_0"))
    assert "MultiHeadAttention" in operators(model, [FuseAttention(), AttentionForms()])
    root = next(n for n in model.graph if n.op_type == "MultiHeadAttention")
    assert "used elsewhere" in explain(PackedAttention(), root, Context(get_target(HOST))).reason


# --- rotary embeddings -----------------------------------------------------------------------


def angles(length=L, size=E):
    return np.outer(np.arange(length), 0.5 ** np.arange(size // 2)).astype(np.float32)


def rotated(net, x, cos, sin, *, swapped=False, cut="split"):
    if cut == "split":
        low, high = net("Split", x, axis=-1, outs=2, num_outputs=2)
    else:
        low = net("Slice", x, ints(0), ints(E // 2), ints(3))
        high = net("Slice", x, ints(E // 2), ints(2**31), ints(3))
    if swapped:
        low, high = high, low
    turned = net("Concat", net("Neg", high), low, axis=-1)
    return net("Add", net("Mul", x, cos), net("Mul", turned, sin))


def tables(length=L):
    both = np.concatenate([angles(length)] * 2, axis=-1)[None, None]
    return np.cos(both), np.sin(both)


@pytest.mark.parametrize("cut", ["split", "slice"])
def test_rotary_embeddings_leave_the_heads_unsplit_for_attention(cut):
    net = Net()
    q = rotated(net, net.heads(net.linear("x")), *tables(), cut=cut)
    k = rotated(net, net.heads(net.linear("x")), *tables(), cut=cut)
    o = attend(net, q, net("Transpose", k, perm=(0, 1, 3, 2)), net.heads("x"))
    model = net.model(X, net.merge(o))
    left = operators(model, [FuseRotary(), FuseAttention()])
    assert left == ["MatMul", "Add", "RotaryEmbedding"] * 2 + ["MultiHeadAttention"]


def test_computed_angles_of_equal_halves():
    net = Net()
    both = net("Concat", "a", "a", axis=-1)
    lifted = net("Unsqueeze", both, ints(0, 1))
    x = rotated(net, net.heads("x"), net("Cos", lifted), net("Sin", lifted))
    model = net.model({**X, "a": ("f", [L, E // 2])}, net.merge(x))
    assert "RotaryEmbedding" in operators(model, [FuseRotary()])


def unequal():
    cos, sin = tables()
    return cos * np.linspace(1, 2, E, dtype=np.float32), sin


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda net, x: rotated(net, x, *tables(), swapped=True), "not the halves"),
        (lambda net, x: rotated(net, x, *unequal()), "not known to be equal"),
        (lambda net, x: rotated(net, x, "c", "c"), "all sequences and heads"),
    ],
)
def test_other_rotations_stay(make, words):
    net = Net()
    y = make(net, net.heads("x"))
    inputs = {**X, "c": ("f", [B, 1, L, E])} if words.startswith("all") else X
    model = net.model(inputs, y)
    assert "RotaryEmbedding" not in operators(model, [FuseRotary()])
    root = [n for n in model.graph if n.op_type == "Add"][-1]
    assert words in explain(RotaryEmbedding(), root, Context(get_target(HOST))).reason


# --- views -----------------------------------------------------------------------------------


def test_regrouping_cuts_and_joins_axes():
    six = (Digit(0, 1, 6),)
    assert regroup([six, ()], [2, 3]) == ((Digit(0, 3, 2),), (Digit(0, 1, 3),))
    assert regroup([six], [4]) is None
    assert merged((Digit(0, 3, 2), Digit(0, 1, 3))) == six
    assert merged((Digit(0, 1, 2), Digit(0, 3, 2))) == (Digit(0, 1, 2), Digit(0, 3, 2))


def test_heads_say_which_columns_they_are():
    net = Net()
    _, k, _ = packed(net, "gather")
    model = net.model(X, k)
    heads = read_heads(model.graph.outputs[0])
    assert (heads.count, heads.size, heads.offset, heads.batch, heads.length) == (H, E, D, B, L)
    assert "rows are in another order" in read_heads(swapped_batch().graph.outputs[0])


def swapped_batch():
    net = Net()
    return net.model(X, net("Transpose", net.heads("x"), perm=(2, 1, 0, 3)))


def test_nodes_that_a_check_found_go_with_the_match():
    net = Net()
    model = net.model(X, net("Relu", net("Neg", "x")))
    neg, relu = list(model.graph)
    found = Match(relu)
    found.include([neg])
    assert found.matched_nodes == [relu, neg]

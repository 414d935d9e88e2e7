"""The operator table: complete, and its costs equal to what counting by hand gives."""

import itertools

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgepass.ir import ops
from edgepass.ir.graph import AbsentTensor
from edgepass.ir.shapes import infer_shapes

HEADER = '<ir_version: 9, opset_import: ["" : 21, "com.microsoft" : 1, "custom" : 1]>\n'


def build(text: str) -> ir.Model:
    """A model from ONNX's text form, shapes inferred; `float y` as an output declares no shape."""
    model = ir.from_proto(onnx.parser.parse_model(HEADER + text))
    for value in model.graph.outputs:
        if value.shape is not None and len(value.shape) == 0:
            value.shape = None
    infer_shapes(model)
    return model


def only_cost(text: str, **bindings: int) -> ops.NodeCost:
    """The cost of the last node."""
    return ops.node_cost(list(build(text).graph)[-1], bindings or None)


# --- the table -------------------------------------------------------------------------------


def test_every_standard_operator_is_described():
    missing = {
        (schema.domain, schema.name) for schema in onnx.defs.get_all_schemas()
    } - ops.described_ops()
    assert not missing


def test_no_operator_costs_nothing_silently():
    """Rows that do no arithmetic are copies, views, sequences or shape computations."""
    free = {
        ops.Category.DATA_MOVEMENT,
        ops.Category.GATHER,
        ops.Category.SEQUENCE,
        ops.Category.SHAPE_COMPUTATION,
        ops.Category.POOLING,  # MaxUnpool
        ops.Category.ELEMENTWISE,  # Dropout at inference
        ops.Category.CONTROL_FLOW,
    }
    from edgepass.ir.op_costs import no_work
    from edgepass.ir.op_table import TABLE

    silent = [
        row.name for row in TABLE.values() if row.formula is no_work and row.category not in free
    ]
    assert silent == []
    undescribed = [
        row.name
        for row in TABLE.values()
        if row.formula is None and row.category is not ops.Category.CONTROL_FLOW
    ]
    assert undescribed == []


def test_unknown_operator_says_so():
    node = ir.node("Frobnicate", [ir.val("x", ir.DataType.FLOAT, [2, 3])], domain="custom")
    node.outputs[0].name = "y"
    assert ops.facts(node).category is ops.Category.UNKNOWN
    cost = ops.node_cost(node)
    assert cost.macs is None
    assert "custom.Frobnicate is not described" in cost.unknown_reason
    assert cost.bytes_read == 24
    assert not ops.is_pure(node)
    assert ops.is_deterministic(node)


def test_a_row_is_found_under_both_names_of_the_standard_domain():
    node = ir.node("Relu", [ir.val("x")], domain="ai.onnx")
    assert ops.facts(node).category is ops.Category.ELEMENTWISE


# --- multiply-accumulates --------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    group=st.sampled_from([1, 2, 4]),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 2),
    size=st.integers(4, 7),
)
def test_convolution_counts_every_tap(group, kernel, stride, size):
    text = f"""g (float[2,4,{size},{size}] x, float[8,{4 // group},{kernel},{kernel}] w)
        => (float y) {{ y = Conv<group = {group}, strides = [{stride},{stride}]>(x, w) }}"""
    side = (size - kernel) // stride + 1
    taps = sum(
        1
        for _ in itertools.product(
            range(2), range(8), range(side), range(side), range(4 // group), range(kernel),
            range(kernel),
        )
    )  # fmt: skip
    cost = only_cost(text)
    assert cost.macs == taps
    assert cost.flops == 2 * taps


@pytest.mark.parametrize(
    ("text", "macs"),
    [
        ("g (float[1,8,5,5] x, float[8,4,3,3] w) => (float y) { y = ConvTranspose(x, w) }",
         8 * 25 * 4 * 9),
        ("g (float[2,3,4,5] x, float[5,6] w) => (float y) { y = MatMul(x, w) }", 2 * 3 * 4 * 5 * 6),
        ("g (float[5] x, float[5] w) => (float y) { y = MatMul(x, w) }", 5),
        ("g (float[7,3] x, float[5,7] w) => (float y) { y = Gemm<transA=1,transB=1>(x, w) }",
         3 * 7 * 5),
        ("""g (float[2,3,4] x, float[2,4,5] w) => (float y)
            { y = Einsum<equation="bij,bjk->bik">(x, w) }""", 2 * 3 * 4 * 5),
        ("""g (float[2,3,4] x, float[2,5,4] w) => (float y)
            { y = Einsum<equation="...ij,...kj->...ik">(x, w) }""", 2 * 3 * 4 * 5),
        ("""g (float[6,2,3] x, float[2,20,3] w, float[2,20,5] r) => (float y)
            { y = LSTM<hidden_size=5, direction="bidirectional">(x, w, r) }""",
         6 * 2 * 2 * 20 * (3 + 5)),
        ("""g (float[2,8,10,16] q, float[2,4,12,16] k, float[2,4,12,24] v) => (float y)
            { y = Attention(q, k, v) }""", 2 * 8 * 10 * 12 * (16 + 24)),
        ("""g (float[2,10,64] x, float[64,192] w, float[192] b) => (float y)
            { y = com.microsoft.Attention<num_heads=8>(x, w, b) }""",
         2 * 10 * 64 * 192 + 2 * 2 * 10 * 10 * 64),
        ("""g (float[2,3,64] x, uint8[32,2,16] w, float[64] s) => (float y)
            { y = com.microsoft.MatMulNBits<K=64, N=32, bits=4, block_size=32>(x, w, s) }""",
         2 * 3 * 64 * 32),
        ("""g (float[4,3] x, float[4,5] w) => (float y)
            { y = com.microsoft.FusedMatMul<transA=1>(x, w) }""", 4 * 3 * 5),
        ("""g (uint8[1,3,8,8] x, float s, uint8 z, int8[4,3,3,3] w, float ws, int8 wz, float ys,
            uint8 yz) => (uint8 y) { y = QLinearConv(x, s, z, w, ws, wz, ys, yz) }""",
         4 * 36 * 27),
    ],
)  # fmt: skip
def test_macs(text, macs):
    cost = only_cost(text)
    assert cost.unknown_reason == ""
    assert cost.macs == macs
    assert cost.flops >= 2 * macs


@pytest.mark.parametrize(
    ("text", "flops"),
    [
        ("g (float[3,4] x, float[4] b) => (float y) { y = Add(x, b) }", 12),
        ("g (float[3,4] x) => (float y) { y = Sigmoid(x) }", 48),
        ("g (float[3,4] x) => (float y) { y = Softmax(x) }", 60),
        ("g (float[1,2,6,6] x) => (float y) { y = MaxPool<kernel_shape=[2,2], strides=[2,2]>(x) }",
         2 * 9 * 4),
        ("g (float[3,4] x) => (float y) { y = ReduceMean(x) }", 12),
        ("g (float[3,4] x) => (float y) { y = Transpose(x) }", 0),
        ("g (float[2,4] x, float s, uint8 z) => (uint8 y) { y = QuantizeLinear(x, s, z) }", 32),
        ("g (float[8] x, float[8] y, float[8] z) => (float w) { w = Sum(x, y, z) }", 16),
    ],
)  # fmt: skip
def test_flops_without_macs(text, flops):
    cost = only_cost(text)
    assert cost.macs == 0
    assert cost.flops == flops


def test_what_depends_on_data_is_unknown_with_a_reason():
    text = """g (float[1,6,4] b, float[1,1,6] s) => (int64 y) { y = NonMaxSuppression(b, s) }"""
    cost = only_cost(text)
    assert cost.macs is None
    assert "depends on the scores" in cost.unknown_reason


# --- symbols and bytes -----------------------------------------------------------------------


def test_symbols_are_bound_and_named_when_they_are_not():
    text = "g (float[N,3,H,H] x, float[8,3,3,3] w) => (float y) { y = Conv<strides=[2,2]>(x, w) }"
    assert only_cost(text, N=2, H=9).macs == 2 * 8 * 16 * 27
    cost = only_cost(text, N=2)
    assert cost.macs is None
    assert "'y'" in cost.unknown_reason
    assert "H" in cost.unknown_reason
    assert only_cost(text).bytes_read is None


def test_bytes_count_each_input_once_and_pack_sub_byte_types():
    cost = only_cost("g (float[3,5] x) => (float y) { y = Mul(x, x) }")
    assert (cost.bytes_read, cost.bytes_written) == (60, 60)
    value = ir.val("v", ir.DataType.INT4, [3, 3])
    assert ops.value_bytes(value) == 5
    assert ops.value_bytes(ir.val("v", ir.DataType.FLOAT16, [3, "N"])) is None
    assert ops.value_bytes(ir.val("v", ir.DataType.FLOAT16, [3, "N"]), {"N": 2}) == 12
    assert ops.value_bytes(ir.val("v", ir.DataType.STRING, [3])) is None


def test_views_move_nothing_and_gather_reads_what_it_picks():
    view = only_cost("g (float[3,4] x) => (float y) <int64[1] s = {12}> { y = Reshape(x, s) }")
    assert (view.bytes_read, view.bytes_written, view.flops) == (0, 0, 0)
    gather = only_cost("g (float[1000,4] t, int64[3] i) => (float y) { y = Gather(t, i) }")
    assert gather.bytes_read == 3 * 4 * 4 + 3 * 8


def test_absent_weights_cost_like_present_ones():
    weight = ir.Value(
        name="w",
        type=ir.TensorType(ir.DataType.FLOAT),
        shape=ir.Shape([64, 32]),
        const_value=AbsentTensor("w", ir.DataType.FLOAT, [64, 32]),
    )
    x = ir.val("x", ir.DataType.FLOAT, [2, 64])
    node = ir.node("MatMul", [x, weight])
    node.outputs[0].name = "y"
    model = ir.Model(
        ir.Graph([x], node.outputs, nodes=[node], initializers=[weight], opset_imports={"": 21}),
        ir_version=9,
    )
    infer_shapes(model)
    cost = ops.node_cost(node)
    assert cost.macs == 2 * 64 * 32
    assert cost.weight_bytes == 64 * 32 * 4
    assert ops.weights(node) == (1,)


@given(st.lists(st.tuples(*[st.one_of(st.none(), st.integers(0, 99))] * 3), max_size=6))
def test_costs_add_and_unknown_is_contagious(rows):
    costs = [ops.NodeCost(m, m or 0, r, w, 1, "" if m is not None else "why") for m, r, w in rows]
    total = sum(costs, ops.NodeCost())
    expected = [None if None in c else sum(c) for c in zip(*rows, strict=True)] or [0, 0, 0]
    assert [total.macs, total.bytes_read, total.bytes_written] == expected
    assert total.weight_bytes == len(rows)
    assert (total.unknown_reason == "why") == (total.macs is None)


# --- control flow and functions --------------------------------------------------------------

IF = """g (bool c, float[4,4] x) => (float[4,4] y) {
  y = If (c) <
    then_branch = t () => (float[4,4] a) { a = MatMul(x, x) },
    else_branch = e () => (float[4,4] b) { b = Relu(x) }
  >
}"""


def test_if_costs_its_costlier_branch():
    assert only_cost(IF).macs == 64


def test_loop_costs_its_body_times_a_static_trip_count():
    text = """g (float[4,4] x) => (float[4,4] y) <int64 n = {5}, bool t = {1}> {
      y = Loop (n, t, x) <
        body = b (int64 i, bool c, float[4,4] s) => (bool d, float[4,4] r)
          { d = Identity(c) r = MatMul(s, s) }
      >
    }"""
    cost = only_cost(text)
    assert cost.macs == 5 * 64
    open_ended = only_cost(text.replace("d = Identity(c)", "d = Not(c)"))
    assert open_ended.macs is None
    assert "condition" in open_ended.unknown_reason


def test_scan_costs_its_body_times_the_length():
    text = """g (float[4] s, float[7,4] x) => (float[4] f, float[7,4] y) {
      f, y = Scan <num_scan_inputs = 1,
        body = b (float[4] a, float[4] e) => (float[4] o, float[4] p)
          { o = Add(a, e) p = Identity(o) }
      > (s, x)
    }"""
    assert only_cost(text).flops == 7 * 4


FUNCTION = """g (float[2,3] x, float[3,4] w) => (float y) { y = custom.Dense(x, w) }
<domain: "custom", opset_import: ["" : 21]>
Dense (a, b) => (c) { m = MatMul(a, b)  c = Relu(m) }"""


def test_a_function_call_costs_its_body():
    model = build(FUNCTION)
    node = next(iter(model.graph))
    assert ops.node_cost(node, functions=model.functions).macs == 24
    assert ops.node_cost(node).macs is None
    assert ops.is_pure(node, model.functions)


# --- questions -------------------------------------------------------------------------------


def test_randomness_and_training_are_not_pure():
    random = ir.node("RandomNormal", [], attributes={"shape": [2]})
    assert not ops.is_pure(random)
    assert not ops.is_deterministic(random)
    x = ir.val("x", ir.DataType.FLOAT, [2])
    assert ops.is_pure(ir.node("Dropout", [x]))
    assert ops.is_view(ir.node("Dropout", [x]))
    training = ir.node("Dropout", [x, None, ir.val("training", ir.DataType.BOOL, [])])
    assert not ops.is_pure(training)
    assert not ops.is_view(training)
    assert not ops.is_pure(ir.node("BatchNormalization", [x] * 5, attributes={"training_mode": 1}))


def test_control_flow_is_as_pure_as_its_bodies():
    assert ops.is_pure(next(iter(build(IF).graph)))
    random = build(IF.replace("Relu(x)", "RandomNormalLike(x)"))
    node = next(iter(random.graph))
    assert not ops.is_pure(node)
    assert not ops.is_deterministic(node)


@pytest.mark.parametrize(
    ("op", "domain", "attributes", "index", "axis"),
    [
        ("Conv", "", {}, None, 0),
        ("ConvTranspose", "", {}, None, 1),
        ("Gemm", "", {}, None, 1),
        ("Gemm", "", {"transB": 1}, None, 0),
        ("MatMul", "", {}, 1, -1),
        ("MatMul", "", {}, 0, -2),
        ("FusedMatMul", "com.microsoft", {"transB": 1}, 1, -2),
        ("Relu", "", {}, None, None),
    ],
)
def test_weight_channel_axis(op, domain, attributes, index, axis):
    node = ir.node(op, [ir.val("x"), ir.val("w")], attributes=attributes, domain=domain)
    assert ops.weight_channel_axis(node, index) == axis


def test_weights_are_found_behind_dequantize():
    model = build(
        """g (float[2,4] x) => (float y) <int8[4,3] q = {1,1,1,1,1,1,1,1,1,1,1,1}, float s = {1.0}>
        { w = DequantizeLinear(q, s)  y = MatMul(x, w) }"""
    )
    assert ops.weights(list(model.graph)[-1]) == (1,)


def test_malformed_shapes_are_unknown_not_an_exception():
    node = ir.node("Gemm", [ir.val("x", ir.DataType.FLOAT, [2]), ir.val("w")])
    node.outputs[0].name = "y"
    cost = ops.node_cost(node)
    assert cost.macs is None
    assert cost.unknown_reason


def test_weights_are_never_read():
    def explode() -> ir.TensorProtocol:
        raise AssertionError("a weight was read")

    tensor = ir.LazyTensor(explode, dtype=ir.DataType.FLOAT, shape=ir.Shape([8, 3, 3, 3]), name="w")
    weight = ir.Value(name="w", const_value=tensor, type=ir.TensorType(ir.DataType.FLOAT),
                      shape=ir.Shape([8, 3, 3, 3]))  # fmt: skip
    x = ir.val("x", ir.DataType.FLOAT, [1, 3, 8, 8])
    node = ir.node("Conv", [x, weight])
    node.outputs[0].name = "y"
    graph = ir.Graph([x], node.outputs, nodes=[node], initializers=[weight], opset_imports={"": 21})
    infer_shapes(ir.Model(graph, ir_version=9))
    assert ops.graph_cost(graph).macs == 8 * 36 * 27
    assert np.prod(node.outputs[0].shape.numpy()) == 8 * 36

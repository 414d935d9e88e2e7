"""Shape inference: equal to what ONNX Runtime and numpy make; contradictions are named."""

import os
import pathlib
import warnings

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from edgepass.errors import ShapeError
from edgepass.ir import dims as dim_math
from edgepass.ir.graph import AbsentTensor, node_subgraphs
from edgepass.ir.shapes import ShapeInference, infer_node, infer_shapes, infer_shapes_from

HEADER = '<ir_version: 9, opset_import: ["" : 21, "com.microsoft" : 1, "custom" : 1]>\n'


def parse(text: str) -> ir.Model:
    """A model from ONNX's text form; `float y` as an output or result declares no shape."""
    model = ir.from_proto(onnx.parser.parse_model(HEADER + text))
    for value in model.graph.outputs:
        if value.shape is not None and len(value.shape) == 0:
            value.shape = None
    return model


def shape_of(text: str, name: str = "y") -> str:
    """The inferred shape of a value, as `[1, N, ?]`."""
    model = parse(text)
    infer_shapes(model)
    return dims_text(model, name)


def dims_text(model: ir.Model, name: str) -> str:
    values = {v.name: v for node in model.graph for v in node.outputs}
    shape = values[name].shape
    return dim_math.text(None if shape is None else shape.dims)


# --- against the ONNX backend test cases -----------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("constants", [False, True], ids=["inputs", "constants"])
def test_backend_cases(constants):
    """No inferred dimension or type contradicts a case's expected output.

    With `constants` the small inputs that shapes may depend on are initializers, and then nearly
    all shapes must be found.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the cases themselves overflow and divide by zero
        from onnx.backend.test.case.node import collect_testcases

        cases = [case for case in collect_testcases(None) if case.model is not None]
    wrong, outputs, found = [], 0, 0
    for case in cases:
        model = ir.from_proto(case.model)
        if constants and case.data_sets:
            _freeze_small_inputs(model, case.data_sets[0][0])
        for value in model.graph.outputs:
            value.shape = value.type = None
        infer_shapes(model)
        for _, expected in case.data_sets:
            for value, array in zip(model.graph.outputs, expected, strict=True):
                if not isinstance(array, np.ndarray):
                    continue
                outputs += 1
                complaint, static = _compare(value, array)
                found += static
                if complaint:
                    wrong.append(f"{case.name}: {complaint}")
    assert wrong == []
    assert outputs > 1500
    assert found / outputs > (0.95 if constants else 0.80)


def _freeze_small_inputs(model: ir.Model, arrays: list) -> None:
    for value, array in zip(list(model.graph.inputs), arrays, strict=False):
        small = isinstance(array, np.ndarray) and array.ndim <= 1 and array.dtype.kind in "iubf"
        if small and (array.dtype.kind != "f" or array.size <= 16):
            model.graph.inputs.remove(value)
            value.const_value = ir.tensor(array, name=value.name)
            model.graph.register_initializer(value)


def _compare(value: ir.Value, array: np.ndarray) -> tuple[str, bool]:
    if value.dtype is not None and array.dtype.kind in "iufbc":
        made = ir.DataType.from_numpy(array.dtype)
        if value.dtype != made:
            return f"{value.name} is {value.dtype}, made {made}", False
    if value.shape is None:
        return "", False
    dims = value.shape.dims
    fits = len(dims) == array.ndim and all(
        d == s for d, s in zip(dims, array.shape, strict=True) if isinstance(d, int)
    )
    static = all(isinstance(d, int) for d in dims)
    return ("" if fits else f"{value.name} is {value.shape}, made {array.shape}"), static


# --- symbols ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("g (float[N,3,H,32] x, float[8,3,3,3] w) => (float y) { y = Conv<strides=[2,2]>(x, w) }",
         "[N, 8, floor(H/2 - 1/2), 15]"),
        ("g (float[N,C] x) => (float y) { y = Relu(x) }", "[N, C]"),
        ("g (float[N,1,4] x, float[5,1] z) => (float y) { y = Add(x, z) }", "[N, 5, 4]"),
        ("g (float[N,8] x) => (float y) <int64[2] s = {-1,4}> { y = Reshape(x, s) }", "[2*N, 4]"),
        ("g (float[N,S,8] x) => (float y) <int64[4] s = {0,0,2,-1}> { y = Reshape(x, s) }",
         "[N, S, 2, 4]"),
        ("g (float[N,S,8] x) => (float y) <int64[2] s = {-1,8}> { y = Reshape(x, s) }", "[N*S, 8]"),
        ("g (float[N,S] x) => (float y) { y = Flatten<axis=0>(x) }", "[1, N*S]"),
        ("g (float[N,4] x, float[M,4] z) => (float y) { y = Concat<axis=0>(x, z) }", "[M + N, 4]"),
        ("g (float[N,9] x) => (float a, float y) { a, y = Split<axis=1,num_outputs=2>(x) }",
         "[N, 4]"),
        ("""g (float[N,4] x) => (float y) <int64[1] b = {1}, int64[1] e = {-1}>
            { y = Slice(x, b, e) }""", "[Max(0, N - 2), 4]"),
        ("""g (float[N,4] x) => (float y)
            <int64[1] b = {-1}, int64[1] e = {-9223372036854775807}, int64[1] a = {0},
             int64[1] s = {-1}> { y = Slice(x, b, e, a, s) }""", "[N, 4]"),
        ("g (float[N,4] x) => (float y) <int64[4] p = {0,1,2,3}> { y = Pad(x, p) }", "[N + 2, 8]"),
        ("g (float[1,1,H,W] x) => (float y) <float[4] s = {1.0,1.0,2.0,0.5}> {y = Resize(x,,s)}",
         "[1, 1, 2*H, floor(W/2)]"),
        ("g (float[B,L,8] q, float[B,S,8] k, float[B,S,8] v) => (float y) "
         "{ y = Attention<q_num_heads=2,kv_num_heads=2>(q, k, v) }", "[B, L, 8]"),
        ("g (float[B,I,K] x, float[K,J] w) => (float y) { y = MatMul(x, w) }", "[B, I, J]"),
        ("""g (float[B,I,K] x, float[B,K,J] w) => (float y)
            { y = Einsum<equation="bik,bkj->bji">(x, w) }""", "[B, J, I]"),
        ("g (float[N,4] x) => (int64 y) { y = NonZero(x) }", "[2, y_d1]"),
        ("g (float[2,4] x, float[N] k) => (float y) { y = CastLike(x, k) }", "[2, 4]"),
        ("g (float[T,N,3] x, float[1,20,3] w, float[1,20,5] r) => (float y) "
         "{ y = LSTM<hidden_size=5>(x, w, r) }", "[T, 1, N, 5]"),
        ("g (float[N,2,7] x) => (float y) "
         "{ y = MaxPool<kernel_shape=[3],strides=[2],ceil_mode=1>(x) }", "[N, 2, 3]"),
    ],
)  # fmt: skip
def test_symbols_are_computed(text, expected):
    assert shape_of(text) == expected


SHAPE_CHAIN = """g (float[N,S,12] x) => (float y) <int64 i0 = {0}, int64 i1 = {1}, int64[1] a = {0},
    int64[1] h = {3}, int64[1] m = {-1}> {
  s = Shape(x)
  n = Gather(s, i0)  n1 = Unsqueeze(n, a)
  t = Gather(s, i1)  t1 = Unsqueeze(t, a)
  target = Concat<axis=0>(n1, t1, h, m)
  r = Reshape(x, target)
  y = Transpose<perm=[0,2,1,3]>(r)
}"""


def test_shape_data_is_followed_to_the_reshape():
    model = parse(SHAPE_CHAIN)
    report = infer_shapes(model)
    assert dims_text(model, "y") == "[N, 3, S, 4]"
    values = {v.name: v for node in model.graph for v in node.outputs}
    assert [str(d) for d in report.shape_values(values["target"])] == ["N", "S", "3", "-1"]
    assert report.shape_values(values["y"]) is None


@pytest.mark.parametrize(
    ("nodes", "expected"),
    [
        ("a = Shape(x)  d = Mul(a, two)  y = Expand(one, d)", "[2*N, 8]"),
        ("a = Shape(x)  d = Sub(a, one64)  y = ConstantOfShape(d)", "[N - 1, 3]"),
        ("a = Size(x)  b = Reshape(a, one64)  y = ConstantOfShape(b)", "[4*N]"),
        ("a = Shape(x)  d = ReduceProd<keepdims=1>(a)  y = ConstantOfShape(d)", "[4*N]"),
        ("a = Shape(x)  b = Cast<to=1>(a)  c = Mul(b, half)  d = Floor(c)  e = Cast<to=7>(d) "
         "y = ConstantOfShape(e)", "[floor(N/2), 2]"),
        ("a = Shape(x)  m = Equal(a, minus)  w = Where(m, one64, a)  y = Expand(one, w)", "[N, 4]"),
        ("a = Shape(x)  b = Slice(a, zero, one64)  c = Squeeze(b)  r = Range(z, c, o)  "
         "y = Cast<to=1>(r)", "[N]"),
        ("a = Shape(x)  b = Min(a, two)  y = ConstantOfShape(b)", "[Min(2, N), 2]"),
        ("a = Shape<start=1>(x)  b = Div(a, two)  c = Concat<axis=0>(b, one64)  "
         "y = ConstantOfShape(c)", "[2, 1]"),
        ("a = Concat<axis=0>(zero, one64, two, zero)  b = Reshape(a, grid)  c = Transpose(b) "
         "d = Reshape(c, flat)  y = Pad(x, d)", "[N + 1, 6]"),
    ],
)  # fmt: skip
def test_shape_arithmetic_is_followed(nodes, expected):
    text = (
        "g (float[N,4] x) => (float y) <int64[1] two = {2}, float[1] one = {1.0},"
        " float half = {0.5}, int64[1] one64 = {1}, int64[1] zero = {0},"
        " int64 z = {0}, int64 o = {1},"
        " int64[1] minus = {-1}, int64[2] grid = {2,2}, int64[1] flat = {-1}> { " + nodes + " }"
    )
    assert shape_of(text) == expected


def test_data_dependent_dimensions_get_stable_symbols():
    text = """g (float[6,4] b, float[1,1,6] s, float[1,6,4] bb) => (float y) <int64[1] c = {2}> {
      k = NonMaxSuppression(bb, s)
      i = Gather<axis=1>(k, c)
      j = Squeeze(i, c1)
      y = Gather(b, j)
    }"""
    text = text.replace("int64[1] c = {2}", "int64[1] c = {2}, int64[1] c1 = {1}")
    assert shape_of(text) == "[k_d0, 4]"
    model = parse(text)
    infer_shapes(model)
    first = dims_text(model, "y")
    infer_shapes(model)
    assert dims_text(model, "y") == first


def test_a_made_up_name_never_collides_with_a_symbol_of_the_model():
    model = parse("g (float[y_d1,4] x) => (int64 y) { y = NonZero(x) }")
    infer_shapes(model)
    assert dims_text(model, "y") == "[2, y_d1_2]"


def test_unnamed_dimensions_are_one_symbol_inside():
    model = parse(SHAPE_CHAIN.replace("[N,S,12]", "[?,?,12]"))
    for value in model.graph.inputs:
        value.shape = ir.Shape([None, None, 12])
    infer_shapes(model)
    assert dims_text(model, "r") == "[x_d0, x_d1, 3, 4]"
    assert model.graph.inputs[0].shape.dims[0].value is None


@pytest.mark.parametrize("placeholder", [-1, "?"])
def test_placeholders_of_converters_are_no_sizes(placeholder):
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT),
                 shape=ir.Shape([placeholder, placeholder, 4]))  # fmt: skip
    node = ir.node("Relu", [x])
    node.outputs[0].name = "y"
    graph = ir.Graph([x], node.outputs, nodes=[node], opset_imports={"": 21})
    infer_shapes(ir.Model(graph, ir_version=9))
    assert [str(d) for d in node.outputs[0].shape.dims] == ["x_d0", "x_d1", "4"]


# --- merging with declarations ---------------------------------------------------------------


def test_declared_names_of_the_interface_stay_and_static_wins():
    model = parse("g (float[N,4] x, float[4,5] w) => (float[rows,columns] y) { y = MatMul(x, w) }")
    infer_shapes(model)
    assert dims_text(model, "y") == "[rows, 5]"


def test_a_static_declaration_is_not_lost():
    model = parse("g (float[N,4] x) => (float[3,4] y) { y = Relu(x) }")
    infer_shapes(model)
    assert dims_text(model, "y") == "[3, 4]"


def test_unknown_operators_keep_what_they_declare():
    text = "g (float[N,4] x) => (float y) <float[N,6] h> { h = custom.Thing(x)  y = Relu(h) }"
    model = parse(text)
    infer_shapes(model)
    assert dims_text(model, "y") == "[N, 6]"


def test_refresh_replaces_stale_shapes_and_merge_refuses_them():
    text = "g (float[N,4] x) => (float y) <float[N,9] h> { h = Relu(x)  y = Relu(h) }"
    with pytest.raises(ShapeError, match="axis 1 is 9 or 4"):
        infer_shapes(parse(text))
    model = parse(text)
    infer_shapes(model, refresh=True)
    assert dims_text(model, "y") == "[N, 4]"


# --- contradictions --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("g (float[1,4,8,8] x, float[8,3,3,3] w) => (float y) { y = Conv(x, w) }",
         "the input has 4 channels"),
        ("g (float[1,4,2,2] x, float[8,4,3,3] w) => (float y) { y = Conv(x, w) }", "exceeds axis"),
        ("g (float[2,3] x, float[2,4] z) => (float y) { y = Add(x, z) }", "do not broadcast"),
        ("g (float[2,3] x, float[4,5] w) => (float y) { y = MatMul(x, w) }", "in K: 3 and 4"),
        ("g (float[2,3] x, float[4,5] w) => (float y) { y = Gemm(x, w) }", "differ in K"),
        ("g (float[2,3] x) => (float y) <int64[2] s = {4,2}> { y = Reshape(x, s) }",
         "different element counts"),
        ("g (float[2,3] x) => (float y) <int64[2] s = {4,-1}> { y = Reshape(x, s) }",
         "does not divide"),
        ("g (float[2,3] x, int32[2,3] z) => (float y) { y = Add(x, z) }", "one element type"),
        ("g (int64[2,3] x) => (float y) { y = Conv(x, x) }", "does not take"),
        ("g (float[2,3] x) => (float[2,4] y) { y = Relu(x) }", "declared"),
        ("g (float[2,3] x) => (int64[2,3] y) { y = Relu(x) }", "declared INT64"),
        ("g (float[2,3] x, float[3,3] z) => (float y) { y = Concat<axis=1>(x, z) }",
         "axis 0 differs"),
        ("g (float[2,3] x) => (float y) { y = Transpose<perm=[0,0]>(x) }", "no permutation"),
        ("g (float[2,3] x) => (float y) <int64[1] a = {0}> { y = Squeeze(x, a) }", "is not 1"),
        ("g (float[2,3] x) => (float y) <int64 i = {5}> { y = Gather(x, i) }", "out of range"),
        ("g (float[5,2,3] x, float[1,20,4] w, float[1,20,5] r) => (float y) "
         "{ y = LSTM<hidden_size=5>(x, w, r) }", "expected [1, 20, 3]"),
        ("g (float[2,3] x) => (float y) { y = Softmax<axis=2>(x) }", "out of range"),
        ("g (int8[4,3] x, float[4] s) => (float y) { y = DequantizeLinear<axis=1>(x, s) }",
         "the scale has 4"),
        ("g (float[2,3,4] x) => (float y) { y = MaxPool<kernel_shape=[2,2]>(x) }", "does not fit"),
        ("""g (float[2,3] x, float[2,4] z) => (float y)
            { y = Einsum<equation="ij,ij->i">(x, z) }""", "index 'j'"),
        ("g (float[2,5] x, uint8[8,1,4] w, float[8] s) => (float y) "
         "{ y = com.microsoft.MatMulNBits<K=8,N=8>(x, w, s) }", "does not end in K"),
    ],
)  # fmt: skip
def test_contradictions_are_named(text, why):
    with pytest.raises(ShapeError) as caught:
        infer_shapes(parse(text))
    assert why in caught.value.diagnostic.why
    assert "node 'y'" in caught.value.diagnostic.where
    assert caught.value.diagnostic.fix


def test_the_first_failing_node_is_named_and_lenient_mode_goes_on():
    text = """g (float[2,3] x, float[4,5] w) => (float y) {
      a = Relu(x)  b = MatMul(a, w)  c = Relu(b)  d = MatMul(x, w)  y = Relu(x) }"""
    with pytest.raises(ShapeError) as caught:
        infer_shapes(parse(text))
    assert "node 'b'" in caught.value.diagnostic.where
    model = parse(text)
    report = infer_shapes(model, strict=False)
    assert len(report.diagnostics) == 2
    assert dims_text(model, "y") == "[2, 3]"
    assert report.outputs == 5
    assert report.static == 2


def test_operators_without_a_rule_contradict_too():
    text = "g (float[2,3] x) => (float y) <int64[3] s = {1,1,1}> { y = CenterCropPad(x, s) }"
    with pytest.raises(ShapeError, match="CenterCropPad"):
        infer_shapes(parse(text))


# --- control flow, sequences, functions ------------------------------------------------------


def test_if_says_what_its_branches_agree_on():
    text = """g (bool c, float[N,4] x, float[2,4] z) => (float y) {
      y = If (c) <then_branch = t () => (float a) { a = Relu(x) },
                  else_branch = e () => (float b) { b = Relu(z) }> }"""
    model = parse(text)
    for graph in node_subgraphs(next(iter(model.graph))):
        graph.outputs[0].shape = None
    infer_shapes(model)
    assert [str(d) for d in model.graph.outputs[0].shape.dims] == ["y_d0", "4"]


def test_a_branch_that_never_runs_may_contradict():
    text = """g (float[2,4] x) => (float y) <bool c = {1}> {
      y = If (c) <then_branch = t () => (float[2,4] a) { a = Relu(x) },
                  else_branch = e () => (float[2] b) <int64[1] i = {1}> { b = Squeeze(x, i) }> }"""
    assert shape_of(text) == "[2, 4]"


LOOP = """g (float[N,4] x) => (float y, float z) <int64 n = {5}, bool t = {1}> {
  y, z = Loop (n, t, x) <
    body = b (int64 i, bool c, float[r,4] s) => (bool d, float[p,4] r1, float[q,4] o)
      { d = Identity(c)  r1 = BODY  o = Relu(x) }> }"""


def test_loop_keeps_invariant_shapes_and_stacks_scanned_ones():
    text = LOOP.replace("BODY", "Add(s, s)")
    assert shape_of(text, "y") == "[N, 4]"
    assert shape_of(text, "z") == "[5, N, 4]"


def test_loop_opens_the_dimensions_its_body_changes():
    text = LOOP.replace("BODY", "Concat<axis=0>(s, x)")
    model = parse(text)
    infer_shapes(model)
    rows, columns = model.graph.outputs[0].shape.dims
    assert not isinstance(rows, int)
    assert str(rows) != "N"
    assert columns == 4


def test_scan_slices_its_inputs():
    text = """g (float[4] s, float[T,4] x) => (float f, float y) {
      f, y = Scan <num_scan_inputs = 1,
        body = b (float[4] a, float[4] e) => (float[4] o, float[4] p)
          { o = Add(a, e) p = Identity(o) }> (s, x) }"""
    assert shape_of(text, "f") == "[4]"
    assert shape_of(text, "y") == "[T, 4]"


def test_sequence_elements_are_followed_one_by_one():
    text = """g (float[N,10] x) => (float y) <int64[3] parts = {2,3,5}, int64 i = {1}> {
      s = SplitToSequence<axis=1>(x, parts)  y = SequenceAt(s, i) }"""
    assert shape_of(text) == "[N, 3]"


FUNCTIONS = """g (float[2,3] x, float[N,5] z) => (float a, float b) {
  a = custom.Twice(x)  b = custom.Twice(z) }
<domain: "custom", opset_import: ["" : 21]>
Twice (v) => (w) { w = Concat<axis=0>(v, v) }"""


def test_functions_are_inferred_at_each_call():
    model = parse(FUNCTIONS)
    infer_shapes(model)
    assert dims_text(model, "a") == "[4, 3]"
    assert dims_text(model, "b") == "[2*N, 5]"
    body = next(iter(model.functions.values()))
    assert body.outputs[0].shape.rank() == 2
    assert all(not isinstance(d, int) for d in body.outputs[0].shape.dims)


def test_attributes_set_by_a_functions_caller_are_seen():
    text = """g (float[2,3] x) => (float y) { y = custom.Swap<order = [1,0]>(x) }
<domain: "custom", opset_import: ["" : 21]>
Swap <order> (v) => (w) { w = Transpose<perm: ints = @order>(v) }"""
    assert shape_of(text) == "[3, 2]"


# --- incremental -----------------------------------------------------------------------------


def test_reinference_follows_a_change_and_stops_where_nothing_changes():
    text = """g (float[1,3,8,8] x, float[4,3,3,3] w) => (float y, float z) {
      a = Conv(x, w)  b = Relu(a)  y = GlobalAveragePool(b)  z = Relu(x) }"""
    model = parse(text)
    infer_shapes(model)
    conv = next(iter(model.graph))
    model.graph.inputs[1].shape = ir.Shape([6, 3, 3, 3])
    model.graph.outputs[0].shape = None
    report = infer_shapes_from(model, [conv])
    assert dims_text(model, "y") == "[1, 6, 1, 1]"
    assert report.outputs == 3  # z was not touched


def test_a_single_node_is_reinferred_with_the_shape_data_it_needs():
    model = parse(SHAPE_CHAIN)
    infer_shapes(model)
    reshape = next(n for n in model.graph if n.op_type == "Reshape")
    reshape.outputs[0].shape = None
    context = ShapeInference(model)
    assert infer_node(reshape, context)
    assert dims_text(model, "r") == "[N, S, 3, 4]"
    assert not infer_node(reshape, context)


# --- weights ---------------------------------------------------------------------------------


def test_large_and_absent_constants_are_not_read():
    def explode() -> ir.TensorProtocol:
        raise AssertionError("a constant was read")

    big = ir.LazyTensor(explode, dtype=ir.DataType.INT64, shape=ir.Shape([2000]), name="i")
    index = ir.Value(name="i", const_value=big, type=ir.TensorType(ir.DataType.INT64),
                     shape=ir.Shape([2000]))  # fmt: skip
    target = AbsentTensor("s", ir.DataType.INT64, [3])
    shape = ir.Value(name="s", const_value=target, type=ir.TensorType(ir.DataType.INT64),
                     shape=ir.Shape([3]))  # fmt: skip
    x = ir.val("x", ir.DataType.FLOAT, [7, 4])
    gather, reshape = ir.node("Gather", [x, index]), ir.node("Reshape", [x, shape])
    gather.outputs[0].name, reshape.outputs[0].name = "a", "b"
    graph = ir.Graph(
        [x],
        [*gather.outputs, *reshape.outputs],
        nodes=[gather, reshape],
        initializers=[index, shape],
        opset_imports={"": 21},
    )
    infer_shapes(ir.Model(graph, ir_version=9))
    assert gather.outputs[0].shape == [2000, 4]
    assert reshape.outputs[0].shape is not None
    assert len(reshape.outputs[0].shape) == 3


# --- properties ------------------------------------------------------------------------------

DIMS = st.sampled_from([1, 1, 2, 3, 5])


def run_node(op: str, arrays: list[np.ndarray], outputs: int = 1, opset: int = 21, **attributes):
    """(inferred shapes, what ONNX Runtime makes) of one node; inferred is None on contradiction."""
    import onnxruntime

    inputs = [f"i{n}" for n in range(len(arrays))]
    infos = [
        onnx.helper.make_tensor_value_info(
            name, onnx.helper.np_dtype_to_tensor_dtype(a.dtype), a.shape
        )
        for name, a in zip(inputs, arrays, strict=True)
    ]
    names = [f"o{n}" for n in range(outputs)]
    node = onnx.helper.make_node(op, inputs, names, **attributes)
    graph = onnx.helper.make_graph(
        [node], "g", infos, [onnx.ValueInfoProto(name=name) for name in names]
    )
    proto = onnx.helper.make_model(
        graph, opset_imports=[onnx.helper.make_opsetid("", opset)], ir_version=9
    )
    model = ir.from_proto(proto)
    small = {n: a for n, a in zip(inputs, arrays, strict=True) if a.dtype == np.int64}
    for value in list(model.graph.inputs):
        if value.name in small:
            model.graph.inputs.remove(value)
            value.const_value = ir.tensor(small[value.name], name=value.name)
            model.graph.register_initializer(value)
    infer_shapes(model)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    feeds = {n: a for n, a in zip(inputs, arrays, strict=True) if n not in small}
    made = session.run(None, feeds)
    return [tuple(v.shape.numpy()) for v in model.graph.outputs], [a.shape for a in made]


@settings(max_examples=150, deadline=None)
@given(st.lists(st.lists(DIMS, max_size=4), min_size=2, max_size=3))
def test_broadcasting_is_numpys(shapes):
    ours = dim_math.broadcast_shapes([tuple(s) for s in shapes])
    try:
        theirs = np.broadcast_shapes(*map(tuple, shapes))
    except ValueError:
        theirs = None
    assert ours == theirs


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_symbolic_shapes_evaluate_to_static_ones(data):
    """Slice, Pad, Conv and pool over a symbol, with the symbol's value put in afterwards."""
    size = data.draw(st.integers(6, 40))
    start = data.draw(st.integers(-4, 4))
    end = data.draw(st.one_of(st.integers(-4, -1), st.just(2**31 - 1), st.integers(5, 50)))
    step = data.draw(st.integers(1, 3))
    stride = data.draw(st.integers(1, 3))
    text = f"""g (float[1,1,W] x, float[1,1,3] w) => (float a, float b, float c)
      <int64[1] s = {{{start}}}, int64[1] e = {{{end}}}, int64[1] i = {{2}},
       int64[1] t = {{{step}}}> {{
      a = Slice(x, s, e, i, t)
      b = Conv<strides=[{stride}], pads=[1,0]>(x, w)
      c = MaxPool<kernel_shape=[3], strides=[{stride}], ceil_mode=1>(x) }}"""
    symbolic, static = parse(text), parse(text.replace("W]", f"{size}]"))
    infer_shapes(symbolic)
    infer_shapes(static)
    for one, other in zip(symbolic.graph.outputs, static.graph.outputs, strict=True):
        if one.name == "c":  # whether the last window starts in the padding is not symbolic
            continue
        assert one.shape.evaluate({"W": size}).dims == other.shape.dims, one.name
    values = range(size)[start : end if end < 2**31 - 1 else None : step]
    assert static.graph.outputs[0].shape[2] == len(values)


@settings(max_examples=120, deadline=None)
@given(st.data())
def test_windows_are_the_runtimes(data):
    op = data.draw(st.sampled_from(["MaxPool", "AveragePool", "Conv", "ConvTranspose"]))
    height, width = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 9))
    kernel = data.draw(st.lists(st.integers(1, 3), min_size=2, max_size=2))
    attributes = {
        "strides": data.draw(st.lists(st.integers(1, 3), min_size=2, max_size=2)),
        "dilations": data.draw(st.lists(st.integers(1, 2), min_size=2, max_size=2)),
        "kernel_shape": kernel,
    }
    pad = data.draw(st.sampled_from(["NOTSET", "SAME_UPPER", "SAME_LOWER", "VALID"]))
    if pad == "NOTSET":
        most = min(kernel) - 1
        attributes["pads"] = data.draw(st.lists(st.integers(0, most), min_size=4, max_size=4))
    else:
        attributes["auto_pad"] = pad
        attributes["dilations"] = [1, 1]
        # ONNX Runtime refuses a window that SAME would crop.
        assume(all(k >= s for k, s in zip(kernel, attributes["strides"], strict=True)))
    if "Pool" in op:
        attributes["ceil_mode"] = data.draw(st.integers(0, 1))
    extents = [(k - 1) * d + 1 for k, d in zip(kernel, attributes["dilations"], strict=True)]
    if op != "ConvTranspose" and not pad.startswith("SAME"):
        assume(height >= extents[0] and width >= extents[1])
    if op == "ConvTranspose":
        pads = attributes.get("pads", [0] * 4)
        assume((height - 1) * attributes["strides"][0] + extents[0] > pads[0] + pads[2])
        assume((width - 1) * attributes["strides"][1] + extents[1] > pads[1] + pads[3])
    arrays = [np.zeros((1, 2, height, width), np.float32)]
    if "Conv" in op:
        arrays.append(np.zeros((2, 2, *kernel), np.float32))
    ours, theirs = run_node(op, arrays, **attributes)
    assert ours == theirs


@settings(max_examples=120, deadline=None)
@given(st.data())
def test_moves_are_the_runtimes(data):
    shape = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    x = np.zeros(shape, np.float32)
    rank = len(shape)
    axis = data.draw(st.integers(-rank, rank - 1))
    op = data.draw(
        st.sampled_from(
            ["Slice", "Tile", "Pad", "Unsqueeze", "Gather", "TopK", "Flatten", "ReduceSum"]
        )
    )
    attributes: dict = {}
    extra: list[list[int]] = []
    outputs = 1
    match op:
        case "Slice":
            step = data.draw(st.sampled_from([-2, -1, 1, 2]))
            edge = st.one_of(st.integers(-6, 6), st.sampled_from([2**63 - 1, -(2**63) + 1]))
            extra = [[data.draw(edge)], [data.draw(edge)], [axis], [step]]
            assume(step > 0 or extra[1] != [2**63 - 1])  # the definition and the runtime differ
        case "Tile":
            extra = [data.draw(st.lists(st.integers(0, 3), min_size=rank, max_size=rank))]
        case "Pad":
            extra = [data.draw(st.lists(st.integers(0, 3), min_size=2 * rank, max_size=2 * rank))]
        case "Unsqueeze":
            extra = [[data.draw(st.integers(-rank - 1, rank))]]
        case "Gather":
            attributes["axis"] = axis
            extra = [data.draw(st.lists(st.integers(0, shape[axis] - 1), max_size=3))]
        case "TopK":
            attributes["axis"] = axis
            extra, outputs = [[data.draw(st.integers(0, shape[axis]))]], 2
        case "Flatten":
            attributes["axis"] = data.draw(st.integers(-rank, rank))
        case "ReduceSum":
            attributes["keepdims"] = data.draw(st.integers(0, 1))
            extra = [[axis]]
    arrays = [x, *(np.array(e, np.int64) for e in extra)]
    ours, theirs = run_node(op, arrays, outputs, **attributes)
    assert ours == theirs


# --- optional: a folder of architectures -----------------------------------------------------

ZOO = os.environ.get("EDGEPASS_ZOO", "")


@pytest.mark.slow
@pytest.mark.skipif(not ZOO, reason="EDGEPASS_ZOO names no folder of ONNX files")
def test_zoo_shapes_are_found_again():
    """What the exporter declared for inner values is inferred from inputs and weights alone."""
    files = sorted(pathlib.Path(ZOO).rglob("*.onnx"))
    assert files
    for path in files:
        model = ir.load(path)
        declared = {}
        for node in model.graph:
            for value in node.outputs:
                declared[value] = (value.shape, value.dtype)
                value.shape = value.type = None
        infer_shapes(model)
        for value, (shape, dtype) in declared.items():
            assert dtype is None or value.dtype == dtype, (path.name, value.name)
            assert shape is None or value.shape == shape, (path.name, value.name)

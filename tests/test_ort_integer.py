"""Integer kernels as the cost model sees them, against what a session really runs."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx.helper as oh
import onnx.parser
import onnx_ir as ir
import pytest
from onnx import TensorProto, numpy_helper

from edgepass.cost.kernels import runtime_graph
from edgepass.cost.runtime_graph import Op
from edgepass.ir.random_weights import fill_random_weights
from edgepass.ir.shapes import infer_shapes
from edgepass.passes.base import Context
from edgepass.passes.quantize.static_int8 import StaticInt8
from edgepass.targets.registry import get_target

VIEWS = {"Reshape", "Unsqueeze", "Squeeze", "Flatten", "Identity"}
Launches = Counter[tuple[str, tuple[int, ...]]]


def parsed(body: str, *, opset: int = 17) -> onnx.ModelProto:
    """A model of a graph's text; its inputs are `x*`, what else it takes are random weights."""
    text = f'<ir_version: 9, opset_import: ["" : {opset}]> agraph {body}'
    model = onnx.parser.parse_model(text)
    rng = np.random.default_rng(7)
    for value in list(model.graph.input):
        if value.name.startswith("x"):
            continue
        kind = value.type.tensor_type
        shape = [d.dim_value for d in kind.shape.dim]
        if kind.elem_type == TensorProto.INT64:
            raise AssertionError("integers are written as Constant")
        array = rng.standard_normal(shape).astype(np.float32) * np.float32(0.3)
        model.graph.initializer.append(numpy_helper.from_array(array, value.name))
        model.graph.input.remove(value)
    return onnx.shape_inference.infer_shapes(model, data_prop=True)


def paired(model: onnx.ModelProto, *, zero_point: int = 128) -> onnx.ModelProto:
    """The model with a pair behind every float, all of one scale, and 8-bit weights."""
    graph = model.graph
    weights = {i.name: numpy_helper.to_array(i) for i in graph.initializer}
    outputs = {o.name for o in graph.output}
    nodes: list[onnx.NodeProto] = []
    made: list[onnx.TensorProto] = [
        numpy_helper.from_array(np.float32(0.05), "scale"),
        numpy_helper.from_array(np.uint8(zero_point), "zp"),
        numpy_helper.from_array(np.float32(0.01), "w_scale"),
        numpy_helper.from_array(np.int8(0), "w_zp"),
        numpy_helper.from_array(np.float32(0.05 * 0.01), "b_scale"),
    ]
    behind: dict[str, str] = {}

    def pair(name: str) -> None:
        nodes.append(oh.make_node("QuantizeLinear", [name, "scale", "zp"], [f"{name}_q"]))
        nodes.append(oh.make_node("DequantizeLinear", [f"{name}_q", "scale", "zp"], [f"{name}_dq"]))
        behind[name] = f"{name}_dq"

    for value in graph.input:
        pair(value.name)
    for node in graph.node:
        for index, name in enumerate(node.input):
            array = weights.get(name)
            if array is None or array.dtype != np.float32 or node.op_type == "LayerNormalization":
                continue
            if array.ndim == 1 and index == 2:
                made.append(numpy_helper.from_array(array.astype(np.int32), f"{name}_32"))
                inputs = [f"{name}_32", "b_scale"]
            else:
                made.append(numpy_helper.from_array((array * 40).astype(np.int8), f"{name}_8"))
                inputs = [f"{name}_8", "w_scale", "w_zp"]
            nodes.append(oh.make_node("DequantizeLinear", inputs, [f"{name}_dq"]))
            behind[name] = f"{name}_dq"
        read = [behind.get(name, name) for name in node.input]
        del node.input[:]
        node.input.extend(read)
        nodes.append(node)
        for name in node.output:
            if name not in outputs and node.op_type not in ("Constant", "Greater", "ArgMax"):
                pair(name)
    del graph.node[:]
    graph.node.extend(nodes)
    used = {name for node in nodes for name in node.input}
    kept = [i for i in graph.initializer if i.name in used]
    del graph.initializer[:]
    graph.initializer.extend([*kept, *(i for i in made if i.name in used)])
    del graph.value_info[:]
    return model


def by_pass(model: onnx.ModelProto, target: str, **options: object) -> ir.Model:
    """What static int8 makes of it, with random numbers in its pairs."""
    graph = ir.from_proto(model)
    StaticInt8(**options).preview(graph, Context(get_target(target)))  # type: ignore[arg-type]
    fill_random_weights(graph)
    return graph


def executed(model: ir.Model, folder: Path) -> Launches:
    """What a session ran, with the shapes of the first outputs."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    options.enable_profiling = True
    options.profile_file_prefix = str(folder / "profile")
    session = ort.InferenceSession(
        ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    session.run(None, {i.name: np.ones(i.shape, np.float32) for i in session.get_inputs()})
    events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    found: Launches = Counter()
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            op = event["args"]["op_name"]
            shapes = event["args"]["output_type_shape"]
            if op not in VIEWS:
                found[op, tuple(next(iter(shapes[0].values())))] += 1
    return found


def simulated(model: ir.Model, target: str = "host") -> list[Op]:
    infer_shapes(model)
    return [op for op in runtime_graph(model, get_target(target)) if op.type not in VIEWS]


def launches(ops: list[Op]) -> Launches:
    return Counter((op.type, op.outputs[0].shape or ()) for op in ops)


RESIDUAL = """(float[1,3,16,16] x, float[16,3,3,3] w, float[16] b, float[16,16,3,3] w2,
    float[16,1,3,3] w3, float[10,32] w4, float[10] b4) => (float[1,10] y) {
    a = Conv<pads=[1,1,1,1]>(x, w, b)
    r = Relu(a)
    p = MaxPool<kernel_shape=[2,2], strides=[2,2]>(r)
    c = Conv<pads=[1,1,1,1]>(p, w2)
    s = Add(c, p)
    t = Relu(s)
    d = Conv<pads=[1,1,1,1], group=16>(t, w3)
    v = AveragePool<kernel_shape=[2,2], strides=[2,2]>(d)
    k = Concat<axis=1>(v, v)
    g = GlobalAveragePool(k)
    f = Flatten(g)
    y = Gemm<transB=1>(f, w4, b4)
}"""
GATED = """(float[1,8,12,12] x, float[16,8,1,1] w, float[8,16,1,1] w2, float[16,8,1,1] w3,
    float[8,16,3,3] w4) => (float[1,8,10,10] y) {
    a = Conv(x, w)
    g = Sigmoid(a)
    s = Mul(a, g)
    p = GlobalAveragePool(s)
    c = Conv(p, w2)
    h = HardSwish(c)
    e = Conv(h, w3)
    i = HardSigmoid(e)
    m = Mul(s, i)
    y = Conv(m, w4)
}"""
TOKENS = """(float[1,3,16,16] x, float[32,3,4,4] w, float[32] b, float[32] n, float[32] o,
    float[32,64] w1, float[64] b1, float[64,32] w2, float[32,8,1,1] w3) => (float[1,32,8,8] y) {
    c = Conv<strides=[4,4]>(x, w, b)
    s1 = Constant<value_ints=[1,32,16]>()
    f = Reshape(c, s1)
    t = Transpose<perm=[0,2,1]>(f)
    l = LayerNormalization(t, n, o)
    m = MatMul(l, w1)
    e = Add(m, b1)
    z = Relu(e)
    u = MatMul(z, w2)
    v = Add(t, u)
    q = LayerNormalization(v, n, o)
    s2 = Constant<value_ints=[1,4,4,32]>()
    r = Reshape(q, s2)
    i = Transpose<perm=[0,3,1,2]>(r)
    s3 = Constant<value_ints=[1,8,8,8]>()
    j = Reshape(i, s3)
    y = Conv(j, w3)
}"""
SKIPPED = """(float[1,8,8,8] x, float[8,8,3,3] w, float[8,8,1,1] w2, float[8] n, float[8] o)
    => (float[1,8,8,8] y) {
    a = Conv<pads=[1,1,1,1]>(x, w)
    s = Constant<value_ints=[1,1,512]>()
    f = Reshape(a, s)
    l = Softmax<axis=2>(f)
    k = Constant<value_ints=[1,8,8,8]>()
    r = Reshape(l, k)
    m = Exp(r)
    d = Add(a, m)
    y = Conv(d, w2)
}"""
EVERY_OPERATOR = """(float[1,8,8,8] x, float[8,8,3,3] w, float[1,8,8,8] c, float[8,8] w2)
    => (float[1,4,8,32] y) {
    a = Conv<pads=[1,1,1,1]>(x, w)
    l = LeakyRelu<alpha=0.1>(a)
    s = Sigmoid(l)
    m = Mul(s, c)
    zero = Constant<value_float=0.0>()
    g = Greater(m, zero)
    h = Where(g, m, a)
    k = Concat<axis=1>(h, l)
    p = MaxPool<kernel_shape=[3,3], pads=[1,1,1,1]>(k)
    t = Transpose<perm=[0,2,3,1]>(p)
    sh = Constant<value_ints=[1,8,16,8]>()
    r = Reshape(t, sh)
    d = MatMul(r, w2)
    e = Softmax<axis=-1>(d)
    sf = Constant<value_ints=[1,4,32,8]>()
    u = Reshape(e, sf)
    y = Transpose<perm=[0,1,3,2]>(u)
}"""
SATURATING = """(float[1,8,8,8] x, float[8,8,3,3] w, float[8,8,1,1] w2) => (float[1,8,8,8] y) {
    a = Exp(x)
    r = Relu(a)
    c = Conv<pads=[1,1,1,1]>(r, w)
    b = Relu(c)
    y = Conv(b, w2)
}"""
GREATEST = """(float[1,8,12,12] x, float[16,8,3,3] w, float[8,16,1,1] w2, float[4,8] w3,
    float[4] b) => (float[1,4] y) {
    a = Conv(x, w)
    r = Relu(a)
    m = ReduceMax<axes=[2,3]>(r)
    c = Conv(m, w2)
    f = Flatten(c)
    g = Gemm<transB=1>(f, w3, b)
    y = Relu(g)
}"""
ENLARGED = """(float[1,8,12,12] x, float[16,8,3,3] w, float[16,16,1,1] w2)
    => (float[1,16,20,20] y) {
    a = Conv(x, w)
    s = Constant<value_floats=[1.0,1.0,2.0,2.0]>()
    r = Resize<mode="nearest", coordinate_transformation_mode="asymmetric">(a, , s)
    y = Conv(r, w2)
}"""
NETS = {
    "greatest, with a scale of its own": lambda: by_pass(parsed(GREATEST), "host"),
    "enlarged": lambda: by_pass(parsed(ENLARGED), "host"),
    "enlarged linearly": lambda: by_pass(parsed(ENLARGED.replace("nearest", "linear")), "host"),
    "residual": lambda: by_pass(parsed(RESIDUAL), "host"),
    "residual, per tensor": lambda: by_pass(parsed(RESIDUAL), "host", per_channel=False),
    "residual, signed": lambda: by_pass(parsed(RESIDUAL), "host", scheme="s8s8"),
    "gated": lambda: by_pass(parsed(GATED), "host"),
    "gated, sums excluded": lambda: by_pass(parsed(GATED), "host", exclude=("Mul",)),
    "tokens": lambda: by_pass(parsed(TOKENS), "host"),
    "skipped": lambda: by_pass(parsed(SKIPPED), "host"),
    "pairs everywhere": lambda: ir.from_proto(paired(parsed(EVERY_OPERATOR))),
    "pairs everywhere, residual": lambda: ir.from_proto(paired(parsed(RESIDUAL))),
    "pairs everywhere, tokens": lambda: ir.from_proto(paired(parsed(TOKENS))),
    "Relu before the least integer": lambda: ir.from_proto(
        paired(parsed(SATURATING), zero_point=0)
    ),
    "Relu before another": lambda: ir.from_proto(paired(parsed(SATURATING), zero_point=10)),
}


OPERATORS = {
    "slice": """s = Constant<value_ints=[1]>() e = Constant<value_ints=[3]>()
        i = Constant<value_ints=[2]>() z = Slice(a, s, e, i)""",
    "split": "p, q = Split<axis=2>(a) z = Add(p, q)",
    "split, half in floats": """s = Constant<value_ints=[2,6]>()
        p, q = Split<axis=1>(a, s) e = Exp(p) z = Concat<axis=1>(q, e)""",
    "nearest": """r = Constant<value_floats=[1.0,1.0,2.0,2.0]>()
        z = Resize<mode="nearest">(a, , r)""",
    "linear": """r = Constant<value_floats=[1.0,1.0,2.0,2.0]>()
        z = Resize<mode="linear">(a, , r)""",
    "pad": "p = Constant<value_ints=[0,0,1,1,0,0,1,1]>() z = Pad(a, p)",
    "gather": "i = Constant<value_ints=[0,2,4]>() z = Gather<axis=2>(a, i)",
    "depth to space": """h = DepthToSpace<blocksize=2>(a)
        s = Constant<value_ints=[1,8,8,8]>() z = Reshape(h, s)""",
    "space to depth": """h = SpaceToDepth<blocksize=2>(a)
        s = Constant<value_ints=[1,8,8,8]>() z = Reshape(h, s)""",
    "greatest": """m = ReduceMax<axes=[2]>(a)
        s = Constant<value_ints=[1,8,8,8]>() z = Expand(m, s)""",
    "mean": "z = ReduceMean<axes=[2,3]>(a)",
    "where the greatest is": """m = ArgMax<axis=1, keepdims=1>(a) f = Cast<to=1>(m)
        s = Constant<value_ints=[1,8,8,8]>() z = Expand(f, s)""",
    "sum with itself": "z = Add(a, a)",
    "division": "r = Sigmoid(a) z = Div(a, r)",
    "identity": "z = Identity(a)",
    "global pooling": "z = GlobalMaxPool(a)",
    "transposed and back": """t = Transpose<perm=[0,2,3,1]>(a) r = Sigmoid(t)
        z = Transpose<perm=[0,3,1,2]>(r)""",
    "product of activations": "r = Sigmoid(a) z = MatMul(a, r)",
    "linear layer": """s = Constant<value_ints=[1,64,8]>() r = Reshape(a, s) m = MatMul(r, k)
        o = Add(m, d) t = Constant<value_ints=[1,8,8,8]>() z = Reshape(o, t)""",
    "transposed convolution": "z = ConvTranspose<pads=[1,1,1,1]>(a, u)",
    "residual": "r = Relu(a) e = Conv<pads=[1,1,1,1]>(r, u) z = Add(e, r)",
}
"""Between two convolutions, with a pair behind every result."""


def between(operator: str) -> onnx.ModelProto:
    return parsed(
        """(float[1,8,8,8] x, float[8,8,3,3] w, float[8] b, float[8,8,3,3] v, float[8] c,
            float[8,8,3,3] u, float[8,8] k, float[8] d) => (float[N,C,H,W] y) {
            a = Conv<pads=[1,1,1,1]>(x, w, b)"""
        + operator
        + "y = Conv<pads=[1,1,1,1]>(z, v, c) }"
    )


@pytest.mark.parametrize("zero_point", [0, 128])
@pytest.mark.parametrize("name", OPERATORS)
def test_operators_between_convolutions(name: str, zero_point: int, tmp_path: Path) -> None:
    model = ir.from_proto(paired(between(OPERATORS[name]), zero_point=zero_point))
    truth = executed(model, tmp_path)
    ours = launches(simulated(model))
    assert truth - ours == Counter()
    assert ours - truth == Counter()


@pytest.mark.parametrize("name", NETS)
def test_kernels_are_those_of_the_session(name: str, tmp_path: Path) -> None:
    make: Callable[[], ir.Model] = NETS[name]
    model = make()
    truth = executed(model, tmp_path)
    ours = launches(simulated(model))
    assert truth - ours == Counter()
    assert ours - truth == Counter()


def test_work_is_that_of_the_nodes_of_the_model() -> None:
    ops = simulated(by_pass(parsed(RESIDUAL), "host"))
    convolutions = [op for op in ops if op.type == "QLinearConv"]
    assert [node.op_type for op in convolutions for node in op.origin] == ["Conv"] * 3
    assert not any(op.origin for op in ops if op.type == "Transpose")


def test_what_saturation_does_is_the_convolutions_work() -> None:
    ops = simulated(ir.from_proto(paired(parsed(SATURATING), zero_point=0)))
    first = next(op for op in ops if op.type == "QLinearConv")
    assert "Relu" not in {op.type for op in ops}
    assert first.origin[0].op_type == "Conv"


def test_signed_pairs_run_in_integers_where_the_session_is_told_so() -> None:
    def types(target: str) -> Counter[str]:
        model = by_pass(parsed(RESIDUAL), target, scheme="s8s8")
        return Counter(op.type for op in simulated(model, target))

    assert types("arm64")["QLinearConv"] == 3
    assert types("arm64")["QLinearAdd"] == 1
    assert types("x86_64")["QLinearAdd"] == 0


def test_a_result_read_as_floats_too_keeps_its_node_in_floats() -> None:
    text = """(float[1,8,8,8] x, float[8,8,3,3] w, float[8,8,3,3] v)
        => (float[1,8,8,8] y, float[1,8,8,8] a) {
        a = Conv<pads=[1,1,1,1]>(x, w)
        y = Conv<pads=[1,1,1,1]>(a, v)
    }"""
    model = paired(parsed(text))
    graph = model.graph
    quantized = [
        oh.make_node("QuantizeLinear", ["a", "scale", "zp"], ["a_q"]),
        oh.make_node("DequantizeLinear", ["a_q", "scale", "zp"], ["a_dq"]),
    ]
    place = next(i for i, node in enumerate(graph.node) if "a" in node.output) + 1
    for offset, node in enumerate(quantized):
        graph.node.insert(place + offset, node)
    graph.node[-1].input[0] = "a_dq"
    types = Counter(op.type for op in simulated(ir.from_proto(model)))
    assert types["Conv"] == 2
    assert types["QLinearConv"] == 0


@pytest.mark.parametrize(
    ("image", "bias", "kinds"),
    [
        ("8,8", True, ["Conv", "FusedConv"]),
        ("8,8", False, ["Conv", "Conv", "Add", "Relu"]),
        ("8", True, ["Conv", "Conv", "Add", "Relu"]),
    ],
)
def test_sums_go_into_convolutions_of_images_with_a_bias(
    image: str, bias: bool, kinds: list[str]
) -> None:
    """As sessions on arm64 (and of unblocked channels on x86-64) saved them."""
    ones = ",".join("1" for _ in image.split(","))
    text = f"""(float[1,6,{image}] x, float[6,6,{ones}] w, float[6,6,{ones}] v, float[6] b)
        => (float[1,6,{image}] y) {{
        a = Conv(x, w)
        k = Conv(a, v{", b" if bias else ""})
        s = Add(k, a)
        y = Relu(s)
    }}"""
    assert [op.type for op in simulated(ir.from_proto(parsed(text)), "arm64")] == kinds

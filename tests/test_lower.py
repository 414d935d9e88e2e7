"""Forms of ONNX Runtime's own: what is written, what is refused and why, and that numbers stay."""

import numpy as np
import onnx_ir as ir
import pytest
from onnx import helper, numpy_helper

from edgepass.frontends import load_model
from edgepass.ir.graph import AbsentTensor
from edgepass.ir.match import match
from edgepass.ir.shapes import infer_shapes
from edgepass.ir.verify import verify
from edgepass.passes.base import Context
from edgepass.passes.fuse.einsum import EinsumForms
from edgepass.passes.lower.conv import ConvActivation, ConvResidual
from edgepass.passes.lower.elementwise import AffineByChannel, BiasGelu, QuickGeluForm
from edgepass.passes.lower.products import ProductOfTransposed, ScaledProduct
from edgepass.passes.lower.runtime_forms import RuntimeForms
from edgepass.passes.probe import Probe, numeric_error, sample_inputs
from edgepass.passes.rules import explain
from edgepass.targets.registry import get_target

X86 = Context(get_target("x86_64"))
GENERATOR = np.random.default_rng(0)


def array(*shape, low=-1.0, high=1.0):
    return GENERATOR.uniform(low, high, shape).astype(np.float32)


def number(value):
    return np.array(value, np.float32)


def node(op, inputs, outputs, domain="", **attributes):
    return helper.make_node(op, inputs.split(), outputs.split(), domain=domain, **attributes)


def model_of(nodes, weights, opset=20, dtype=1, **inputs):
    """A model of float inputs by name whose output is y."""
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(n, dtype, s) for n, s in inputs.items()],
        [helper.make_tensor_value_info("y", dtype, None)],
        [numpy_helper.from_array(a, n) for n, a in weights.items()],
    )
    imports = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    model = load_model(helper.make_model(graph, opset_imports=imports, ir_version=10))
    infer_shapes(model)
    return model


def lowered(model: ir.Model, context: Context = X86, item=None) -> list[str]:
    """Apply the forms and compare with before, to 1e-5 of the range; the operators left."""
    sample = sample_inputs(model)
    probe = Probe(sample)
    before = probe.run(model)
    (item or RuntimeForms()).run(model, context)
    infer_shapes(model)
    verify(model)
    assert numeric_error(before, probe.run(model)).relative <= 1e-5
    return [n.op_type for n in model.graph]


def absent(model: ir.Model) -> ir.Model:
    for name, value in model.graph.initializers.items():
        if value.const_value.size > 1:
            value.const_value = AbsentTensor(name, value.dtype, value.shape)
    return model


# --- convolutions ----------------------------------------------------------------------------

ACTIVATIONS = [
    ("Relu", {}),
    ("Sigmoid", {}),
    ("Tanh", {}),
    ("LeakyRelu", {"alpha": 0.2}),
    ("HardSigmoid", {"alpha": 0.3, "beta": 0.4}),
    ("HardSwish", {}),
]


@pytest.mark.parametrize(("name", "options"), ACTIVATIONS)
@pytest.mark.parametrize("shape", [[1, 4, 9], [1, 4, 7, 6], ["n", 4, 5, 5], [1, 4, 3, 4, 5]])
def test_an_activation_goes_into_the_convolution(name, options, shape):
    weights = {"w": array(6, 4, *[1] * (len(shape) - 2)), "b": array(6)}
    nodes = [node("Conv", "x w b", "h"), node(name, "h", "y", **options)]
    assert lowered(model_of(nodes, weights, x=shape)) == ["FusedConv"]


@pytest.mark.parametrize("bounds", ["low high", "low", " high"])
def test_clip_goes_into_the_convolution(bounds):
    inputs = ["h", *("" if part == "" else part for part in bounds.split(" "))]
    nodes = [node("Conv", "x w", "h"), helper.make_node("Clip", inputs, ["y"])]
    weights = {"w": array(6, 4, 3, 3), "low": number(0), "high": number(0.5)}
    weights = {k: v for k, v in weights.items() if k in ("w", *inputs)}
    assert lowered(model_of(nodes, weights, x=[2, 4, 8, 8])) == ["FusedConv"]


@pytest.mark.parametrize("after", [[], [("Relu", {})], [("HardSwish", {})]])
def test_a_residual_sum_goes_into_the_convolution(after):
    nodes = [
        node("Conv", "x v", "z"),
        node("Sigmoid", "z", "q"),
        node("Conv", "q w", "h", pads=[1, 1, 1, 1]),
        node("Add", "z h", "s" if after else "y"),
        *[node(op, "s", "y", **o) for op, o in after],
    ]
    weights = {"v": array(16, 16, 1, 1), "w": array(16, 16, 3, 3)}
    left = lowered(model_of(nodes, weights, x=[1, 16, 8, 8]))
    assert left == ["Conv", "Sigmoid", "FusedConv"]


def test_a_sum_with_what_is_not_blocked_stays_where_the_convolution_would_be():
    nodes = [node("Conv", "x w", "h", pads=[1, 1, 1, 1]), node("Add", "h x", "y")]
    model = model_of(nodes, {"w": array(16, 16, 3, 3)}, x=[1, 16, 8, 8])
    assert "blocked layout" in explain(ConvResidual(), model.graph[1], X86).reason
    assert lowered(model) == ["Conv", "Add"]
    assert lowered(model, Context(get_target("arm64"))) == ["FusedConv"]


def test_a_sum_that_broadcasts_stays():
    nodes = [node("Conv", "x w", "h"), node("Add", "h z", "y")]
    model = model_of(nodes, {"w": array(6, 5, 1)}, x=[2, 5, 8], z=[2, 6, 1])
    assert "shape" in explain(ConvResidual(), model.graph[1], X86).reason
    assert lowered(model) == ["Conv", "Add"]


def test_a_convolution_used_twice_keeps_its_activation_apart():
    nodes = [node("Conv", "x w", "h"), node("Relu", "h", "r"), node("Mul", "r h", "y")]
    model = model_of(nodes, {"w": array(6, 4, 1, 1)}, x=[1, 4, 8, 8])
    assert "also used by Mul" in explain(ConvActivation(), model.graph[1], X86).reason
    assert lowered(model) == ["Conv", "Relu", "Mul"]


def test_what_becomes_an_integer_kernel_is_left_alone():
    nodes = [
        node("DequantizeLinear", "x s z", "f"),
        node("Conv", "f w", "h"),
        node("Relu", "h", "r"),
        node("QuantizeLinear", "r s z", "y"),
    ]
    weights = {"w": array(4, 4, 1, 1), "s": number(0.1), "z": np.array(128, np.uint8)}
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", 2, [1, 4, 8, 8])],
        [helper.make_tensor_value_info("y", 2, None)],
        [numpy_helper.from_array(a, n) for n, a in weights.items()],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    model = load_model(proto)
    infer_shapes(model)
    assert "integers" in explain(ConvActivation(), model.graph[2], X86).reason
    RuntimeForms().run(model, X86)
    assert [n.op_type for n in model.graph] == [n.op_type for n in nodes]


@pytest.mark.parametrize(
    ("context", "reason"),
    [(Context(), "no target"), (Context(get_target("x86_64/tvm")), "does not run on ONNX Runtime")],
)
def test_forms_of_one_runtime_are_written_for_it_alone(context, reason):
    nodes = [node("Conv", "x w", "h"), node("Relu", "h", "y")]
    model = model_of(nodes, {"w": array(6, 4, 1, 1)}, x=[1, 4, 8, 8])
    assert reason in explain(ConvActivation(), model.graph[1], context).reason
    assert lowered(model, context) == ["Conv", "Relu"]


def test_doubles_stay_as_they_are():
    nodes = [node("MatMul", "x z", "h"), node("Mul", "h c", "y")]
    weights = {"c": np.array(2, np.float64)}
    model = model_of(nodes, weights, dtype=11, x=[4, 5], z=[5, 6])
    assert "FLOAT, not DOUBLE" in explain(ScaledProduct(), model.graph[1], X86).reason
    assert lowered(model) == ["MatMul", "Mul"]


# --- products --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "a", "b", "after"),
    [
        ([], "x", "z", [("Mul", "h c", "y")]),
        ([], "x", "z", [("Div", "h c", "y")]),
        ([("Mul", "x c", "p")], "p", "z", []),
        ([("Mul", "c z", "q")], "x", "q", []),
        ([("Div", "x c", "p"), ("Mul", "z c", "q")], "p", "q", [("Mul", "h c", "y")]),
    ],
)
@pytest.mark.parametrize("constant", [number(0.125), array(1, low=2, high=3)])
def test_factors_go_into_the_product(before, a, b, after, constant):
    nodes = [node(*n) for n in before]
    nodes += [node("MatMul", f"{a} {b}", "h" if after else "y"), *[node(*n) for n in after]]
    model = model_of(nodes, {"c": constant}, x=["n", 3, 4, 5], z=["n", 3, 5, 6])
    assert lowered(model) == ["FusedMatMul"]


@pytest.mark.parametrize("ranks", [(4, 4), (2, 2), (3, 4), (4, 2), (2, 3)])
@pytest.mark.parametrize("sides", ["a", "b", "ab"])
def test_transposed_operands_go_into_the_product(ranks, sides):
    full = {"x": [2, 3, 4, 5], "z": [2, 3, 5, 6]}
    shapes = {n: s[-r:] for (n, s), r in zip(full.items(), ranks, strict=True)}
    nodes, names = [], {"a": "x", "b": "z"}
    for side in sides:
        source, rank = names[side], len(shapes[names[side]])
        shapes[source] = [*shapes[source][:-2], shapes[source][-1], shapes[source][-2]]
        perm = [*range(rank - 2), rank - 1, rank - 2]
        nodes.append(node("Transpose", source, f"t{side}", perm=perm))
        names[side] = f"t{side}"
    nodes.append(node("MatMul", f"{names['a']} {names['b']}", "y"))
    assert lowered(model_of(nodes, {}, **shapes)) == ["FusedMatMul"]


def test_other_transpositions_stay():
    nodes = [node("Transpose", "x", "t", perm=[0, 2, 3, 1]), node("MatMul", "z t", "y")]
    model = model_of(nodes, {}, x=[2, 6, 3, 5], z=[2, 3, 4, 5])
    assert "moves more" in explain(ProductOfTransposed(), model.graph[1], X86).reason
    assert lowered(model) == ["Transpose", "MatMul"]


def test_a_factor_per_column_stays():
    nodes = [node("MatMul", "x z", "h"), node("Mul", "h c", "y")]
    model = model_of(nodes, {"c": array(6)}, x=[2, 4, 5], z=[2, 5, 6])
    assert "one number" in explain(ScaledProduct(), model.graph[1], X86).reason
    assert lowered(model) == ["MatMul", "Mul"]


def test_a_vector_stays():
    nodes = [node("MatMul", "x z", "h"), node("Mul", "h c", "y")]
    model = model_of(nodes, {"c": number(2)}, x=[5], z=[5, 6])
    assert "vector" in explain(ScaledProduct(), model.graph[1], X86).reason
    assert lowered(model) == ["MatMul", "Mul"]


@pytest.mark.parametrize(
    ("name", "options"),
    [("Relu", {}), ("Sigmoid", {}), ("Tanh", {}), ("LeakyRelu", {"alpha": 0.3})],
)
def test_an_activation_goes_into_gemm(name, options):
    nodes = [
        node("Gemm", "x w c", "h", transB=1, alpha=0.5, beta=2.0),
        node(name, "h", "y", **options),
    ]
    assert lowered(model_of(nodes, {"w": array(5, 8), "c": array(5)}, x=[3, 8])) == ["FusedGemm"]


@pytest.mark.parametrize(
    ("equation", "a", "b", "left"),
    [
        ("bik,bkj->bij", [2, 3, 4], [2, 4, 5], ["MatMul"]),
        ("bhid,bhjd->bhij", [2, 3, 4, 6], [2, 3, 5, 6], ["Transpose", "MatMul"]),
        ("ki,kj->ij", [4, 3], [4, 5], ["Transpose", "MatMul"]),
        ("bki,bjk->bij", [2, 4, 3], [2, 5, 4], ["Transpose", "Transpose", "MatMul"]),
        ("bik,bkj->bji", [2, 3, 4], [2, 4, 5], ["Einsum"]),
        ("bik,bik->bik", [2, 3, 4], [2, 3, 4], ["Einsum"]),
        ("bik,kj->bij", [2, 3, 4], [4, 5], ["Einsum"]),
        ("bij,bjk->bk", [2, 3, 4], [2, 4, 5], ["Einsum"]),
    ],
)
def test_einsum_that_is_a_product(equation, a, b, left):
    model = model_of([node("Einsum", "x z", "y", equation=equation)], {}, x=a, z=b)
    assert lowered(model, item=EinsumForms()) == left


# --- elementwise -----------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [None, 1.702])
@pytest.mark.parametrize("order", ["x g", "g x"])
def test_gated_sigmoid(alpha, order):
    inner = [] if alpha is None else [node("Mul", "k x", "p")]
    nodes = [*inner, node("Sigmoid", "p" if inner else "x", "g"), node("Mul", order, "y")]
    weights = {} if alpha is None else {"k": number(alpha)}
    assert lowered(model_of(nodes, weights, x=["n", 5])) == ["QuickGelu"]


def test_a_gate_of_something_else_stays():
    nodes = [node("Sigmoid", "z", "g"), node("Mul", "x g", "y")]
    model = model_of(nodes, {}, x=[4, 5], z=[4, 5])
    assert "in one place" in explain(QuickGeluForm(), model.graph[1], X86).reason
    assert lowered(model) == ["Sigmoid", "Mul"]


@pytest.mark.parametrize(("approximate", "left"), [("none", ["BiasGelu"]), ("tanh", ["FastGelu"])])
def test_gelu_takes_its_bias(approximate, left):
    nodes = [node("Add", "b x", "h"), node("Gelu", "h", "y", approximate=approximate)]
    assert lowered(model_of(nodes, {"b": array(8)}, x=[2, 3, 8])) == left


@pytest.mark.parametrize(("batch", "left"), [("n", ["MatMul", "BiasGelu"]), (2, None)])
def test_gelu_takes_the_bias_of_a_product_where_no_gemm_is_made_of_it(batch, left):
    nodes = [node("MatMul", "x w", "m"), node("Add", "m b", "h"), node("Gelu", "h", "y")]
    model = model_of(nodes, {"w": array(4, 8), "b": array(8)}, x=[batch, 3, 4])
    if left is None:
        assert "Gemm" in explain(BiasGelu(), model.graph[2], X86).reason
    assert lowered(model) == (left or ["MatMul", "Add", "Gelu"])


@pytest.mark.parametrize("opset", [20, 23])
def test_a_residual_before_a_layer_norm_is_kept_from_the_slow_kernel(opset):
    nodes = [node("Add", "x z", "s"), node("LayerNormalization", "s w b", "y", epsilon=1e-3)]
    weights = {"w": array(8), "b": array(8)}
    model = model_of(nodes, weights, opset, x=["n", 3, 8], z=["n", 3, 8])
    assert lowered(model) == ["Sum", "LayerNormalization"]


CHAINS = [
    ["Mul", "Add"],
    ["Add", "Mul"],
    ["Sub", "Div"],
    ["Div", "Sub"],
    ["Sub", "Mul", "Add"],
    ["Mul", "Add", "Mul", "Add"],
]


@pytest.mark.parametrize("chain", CHAINS, ids="-".join)
@pytest.mark.parametrize("shape", [["n", 6], [2, 6, 7], [2, 6, 4, "w"]])
@pytest.mark.parametrize("weightless", [False, True])
def test_scale_and_shift_by_channel_are_one_batch_norm(chain, shape, weightless):
    constants = {f"c{i}": array(6, *[1] * (len(shape) - 2), low=0.5) for i in range(len(chain))}
    names = ["x", *[f"h{i}" for i in range(1, len(chain))], "y"]
    nodes = [node(op, f"{names[i]} c{i}", names[i + 1]) for i, op in enumerate(chain)]
    model = model_of(nodes, constants, x=shape)
    if not weightless:
        assert lowered(model) == ["BatchNormalization"]
        return
    RuntimeForms().run(absent(model), X86)
    verify(model)
    assert [n.op_type for n in model.graph] == ["BatchNormalization"]


@pytest.mark.parametrize(
    ("chain", "shape", "reason"),
    [
        (["Mul", "Mul"], [6, 1], "no shift"),
        (["Mul", "Add"], [6, 7], "per channel"),
        (["Mul", "Add"], [7], "per channel"),
    ],
)
def test_other_chains_stay(chain, shape, reason):
    nodes = [node(chain[0], "x c", "h"), node(chain[1], "h d", "y")]
    model = model_of(nodes, {"c": array(*shape), "d": array(*shape)}, x=[2, 6, 7])
    assert reason in explain(AffineByChannel(), model.graph[1], X86).reason
    assert lowered(model) == chain


def test_a_difference_that_cancels_is_taken_before_the_scale():
    nodes = [node("Sub", "x c", "h"), node("Mul", "h d", "y")]
    constants = {"c": np.full((6, 1), 1e4, np.float32), "d": array(6, 1, low=0.5)}
    model = model_of(nodes, constants, x=[2, 6, 7])
    assert "comes first" in explain(AffineByChannel(), model.graph[1], X86).reason
    assert lowered(model) == ["Sub", "Mul"]


def test_the_rules_find_their_own_root():
    model = model_of([node("Add", "x z", "y")], {}, x=[2, 3], z=[2, 3])
    assert not match(ConvResidual().pattern(), model.graph[0])

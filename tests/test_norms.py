"""Activations, normalizations and softmax spelled out: what is recognized, what is not, and why."""

import itertools

import numpy as np
import onnx_ir as ir
import pytest
from onnx import helper, numpy_helper

from edgepass.frontends import load_model
from edgepass.ir.graph import AbsentTensor
from edgepass.ir.shapes import infer_shapes
from edgepass.ir.verify import verify
from edgepass.passes.base import Context
from edgepass.passes.fuse.activations import (
    FuseActivations,
    LeakyReluForm,
    ReluForm,
    SeluForm,
)
from edgepass.passes.fuse.gelu import GeluErf
from edgepass.passes.fuse.normalizations import (
    FuseNormalizations,
    InstanceNormForm,
    LayerNormForm,
    NormScale,
    RmsNormForm,
)
from edgepass.passes.fuse.softmax import SoftmaxForm
from edgepass.passes.probe import Probe, numeric_error, sample_inputs
from edgepass.passes.rules import explain
from edgepass.targets.registry import get_target

X86 = Context(get_target("x86_64"))
GENERATOR = np.random.default_rng(0)
TYPES = {np.dtype(np.float32): 1, np.dtype(np.float64): 11, np.dtype(np.float16): 10}
TYPES[np.dtype(np.int32)] = 6


def array(*shape, low=-1.0, high=1.0):
    return GENERATOR.uniform(low, high, shape).astype(np.float32)


def model_of(lines, constants, shape, opset=20, dtype=np.float32):
    """A model from lines `y = Op a b, attribute=value`; the last line's result is the output."""
    nodes = []
    for line in lines:
        result, call = line.split(" = ")
        head, *options = call.split(", ")
        op_type, *inputs = head.split()
        attributes = dict(o.split("=") for o in options)
        values = {k: _plain(v) for k, v in attributes.items()}
        inputs = ["" if i == "_" else i for i in inputs]
        nodes.append(helper.make_node(op_type, inputs, [result], **values))
    kind = TYPES[np.dtype(dtype)]
    used = {i for n in nodes for i in n.input}
    weights = {}
    for name, data in {**NUMBERS, **constants}.items():
        if name in used:
            data = np.asarray(data)
            weights[name] = data.astype(dtype) if data.dtype.kind == "f" else data
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", kind, shape)],
        [helper.make_tensor_value_info(nodes[-1].output[0], kind, None)],
        [numpy_helper.from_array(a, n) for n, a in weights.items()],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    model = load_model(proto)
    infer_shapes(model)
    return model


def _plain(text):
    if text.startswith("["):
        return [int(p) for p in text.strip("[]").split(";")]
    return float(text) if "." in text else int(text)


NUMBERS = {
    "zero": 0.0, "one": 1.0, "two": 2.0, "three": 3.0, "six": 6.0, "half": 0.5, "sixth": 1 / 6,
    "root": np.sqrt(2), "inverse_root": np.sqrt(0.5), "eps": 1e-5, "minus_half": -0.5,
    "minus_one": -1.0, "pi": np.sqrt(2 / np.pi), "cubic": 0.044715, "slope": 0.1,
    "pi_cubic": np.sqrt(2 / np.pi) * 0.044715, "inf": np.inf, "last": np.array([-1]),
    "gamma": 1.0507,
}  # fmt: skip


def fused(item, model, context=X86) -> list[str]:
    """Apply and compare with before, to 1e-5 of the range; the operators left."""
    sample = sample_inputs(model)
    probe = Probe(sample)
    before = probe.run(model)
    item.run(model, context)
    infer_shapes(model)
    verify(model)
    bound = 1e-5 if model.graph.inputs[0].dtype != ir.DataType.FLOAT16 else 2e-3
    assert numeric_error(before, probe.run(model)).relative <= bound
    return [node.op_type for node in model.graph]


# --- GELU ------------------------------------------------------------------------------------

HALVES = {
    "last": ["p = Mul x g", "y = Mul p half"],
    "divided": ["p = Mul g x", "y = Div p two"],
    "first": ["p = Mul half x", "y = Mul p g"],
    "first divided": ["p = Div x two", "y = Mul g p"],
    "on the gate": ["p = Mul g half", "y = Mul x p"],
}
INNER = ["a = Div x root", "a = Mul inverse_root x"]


@pytest.mark.parametrize("order", sorted(HALVES))
@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize(("opset", "domain"), [(18, "com.microsoft"), (20, "")])
def test_gelu_in_every_order(order, inner, opset, domain):
    lines = [inner, "e = Erf a", "g = Add one e", *HALVES[order]]
    model = model_of(lines, {}, ["n", 7], opset)
    assert fused(FuseActivations(), model) == ["Gelu"]
    assert model.graph[0].domain == domain


def test_gelu_with_distributed_half():
    lines = ["a = Div x root", "e = Erf a", "h = Mul e half", "g = Add h half", "y = Mul x g"]
    assert fused(FuseActivations(), model_of(lines, {}, [3, 7])) == ["Gelu"]


CUBES = {
    "pow": ["c = Pow x three"],
    "products": ["s = Mul x x", "c = Mul s x"],
    "square": ["s = Pow x two", "c = Mul x s"],
}
TANHS = {
    "sum": ["k = Mul cubic c", "o = Add x k", "t = Mul o pi"],
    "other sum": ["k = Mul c cubic", "o = Add k x", "t = Mul pi o"],
}


@pytest.mark.parametrize(
    "lines",
    [
        *[[*c, *t] for c, t in itertools.product(CUBES.values(), TANHS.values())],
        # x sqrt(2/pi) (1 + 0.044715 x x), from left to right
        ["q = Mul x pi", "k = Mul x cubic", "l = Mul k x", "b = Add one l", "t = Mul q b"],
        ["s = Mul x x", "k = Mul s cubic", "b = Add k one", "q = Mul x b", "t = Mul q pi"],
        ["s = Mul x x", "k = Mul pi_cubic s", "b = Add k pi", "t = Mul x b"],
    ],
    ids=str,
)
@pytest.mark.parametrize("order", sorted(HALVES))
@pytest.mark.parametrize(("opset", "name"), [(18, "FastGelu"), (20, "Gelu")])
def test_tanh_gelu(lines, order, opset, name):
    model = model_of([*lines, "h = Tanh t", "g = Add h one", *HALVES[order]], {}, [5, 6], opset)
    assert fused(FuseActivations(), model) == [name]


def test_gelu_below_opset_20_needs_a_runtime_that_has_it():
    lines = ["a = Div x root", "e = Erf a", "g = Add one e", *HALVES["last"]]
    model = model_of(lines, {}, [3, 7], 18)
    context = Context(opsets={"": 18})
    assert "no target" in explain(GeluErf(), model.graph[4], context).reason
    assert "Erf" in fused(FuseActivations(), model, Context())


# --- other activations -----------------------------------------------------------------------

ACTIVATIONS = [
    ("Relu", ["y = Max x zero"]),
    ("Relu", ["y = Max zero x"]),
    ("Relu", ["y = Clip x zero"]),
    ("Relu", ["y = Clip x zero inf"]),
    ("Clip", ["r = Relu x", "y = Clip r zero half"]),
    ("Clip", ["r = Relu x", "y = Min half r"]),
    ("Clip", ["r = Max x zero", "y = Min r half"]),
    ("Clip", ["r = Min half x", "y = Max minus_half r"]),
    ("Sigmoid", ["n = Neg x", "e = Exp n", "s = Add one e", "y = Div one s"]),
    ("Sigmoid", ["n = Neg x", "e = Exp n", "s = Add e one", "y = Reciprocal s"]),
    ("HardSigmoid", ["a = Add x three", "b = Clip a zero six", "y = Div b six"]),
    ("HardSigmoid", ["a = Mul x sixth", "b = Add a half", "y = Clip b zero one"]),
    ("HardSigmoid", ["a = Div x six", "b = Add half a", "y = Clip b zero one"]),
    ("HardSwish", ["a = Add x three", "b = Clip a zero six", "c = Mul x b", "y = Div c six"]),
    ("HardSwish", ["a = Add x three", "b = Clip a zero six", "c = Div b six", "y = Mul x c"]),
    ("HardSwish", ["a = Add x three", "b = Clip a zero six", "c = Mul x sixth", "y = Mul c b"]),
    ("LeakyRelu", ["a = Mul x slope", "y = Max x a"]),
    ("LeakyRelu", ["a = Mul slope x", "g = Greater x zero", "y = Where g x a"]),
    ("PRelu", ["n = Neg x", "a = Relu n", "p = Mul a w", "r = Relu x", "y = Sub r p"]),
    ("PRelu", ["n = Neg x", "a = Relu n", "b = Neg a", "p = Mul w b", "r = Relu x", "y = Add p r"]),
    ("ThresholdedRelu", ["g = Greater x half", "y = Where g x zero"]),
    ("Elu", ["e = Exp x", "d = Sub e one", "g = Greater x zero", "y = Where g x d"]),
    ("Elu", ["e = Exp x", "d = Sub e one", "m = Mul d half", "g = Greater x zero",
             "y = Where g x m"]),
    ("Selu", ["e = Elu x, alpha=1.67", "y = Mul e gamma"]),
    ("Mish", ["s = Softplus x", "t = Tanh s", "y = Mul t x"]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "lines"), ACTIVATIONS, ids=str)
def test_activations(name, lines):
    model = model_of(lines, {"w": array(6, 1)}, ["n", 6, 5])
    assert fused(FuseActivations(), model) == [name]


@pytest.mark.parametrize(
    ("name", "lines"),
    [a for a in ACTIVATIONS if a[0] not in ("Selu", "Mish")],  # their sources have no kernels
    ids=str,
)
def test_activations_in_double_precision(name, lines):
    model = model_of(lines, {"w": array(6, 1)}, ["n", 6, 5], 20, np.float64)
    found = fused(FuseActivations(), model)
    if name in ("Relu", "Clip", "Sigmoid"):
        assert found == [name]
    else:  # the runtime has no kernel for them: they are not made
        assert name not in found


@pytest.mark.parametrize(
    ("rule", "lines", "reason"),
    [
        (ReluForm, ["y = Clip x zero half"], "upper bound"),
        (LeakyReluForm, ["a = Mul x two", "y = Max x a"], "no LeakyRelu"),
        (LeakyReluForm, ["a = Mul x w", "y = Max x a"], "one number"),
        (SeluForm, ["e = Elu x, alpha=1.67", "y = Mul e minus_half"], "negative"),
    ],
)
def test_near_misses_of_activations(rule, lines, reason):
    model = model_of(lines, {"w": array(6, 1)}, [2, 6, 5])
    before = [node.op_type for node in model.graph]
    assert reason in explain(rule(), model.graph[-1], X86).reason
    assert fused(FuseActivations(), model) == before


def test_integers_are_not_activated():
    model = model_of(["y = Max x low"], {"low": np.array(0, np.int32)}, [3], 20, np.int32)
    assert "INT32" in explain(ReluForm(), model.graph[0], X86).reason
    assert fused(FuseActivations(), model) == ["Max"]


@pytest.mark.parametrize("lines", [["e = Exp x", "s = Add e one", "y = Log s"]])
def test_what_overflows_where_the_operator_does_not_is_left_alone(lines):
    assert len(fused(FuseActivations(), model_of(lines, {}, [4, 4]))) == 3


# --- layer, RMS and instance norms -----------------------------------------------------------

SQUARES = {"pow": "q = Pow d two", "mul": "q = Mul d d"}
DEVIATIONS = {
    "sqrt div": ["r = Sqrt e", "n = Div d r"],
    "reciprocal": ["r = Sqrt e", "i = Reciprocal r", "n = Mul d i"],
    "one over": ["r = Sqrt e", "i = Div one r", "n = Mul i d"],
    "power": ["i = Pow e minus_half", "n = Mul d i"],
    "half power": ["r = Pow e half", "n = Div d r"],
}


def layer_norm(
    square="pow", deviation="sqrt div", axes="last", tail=("h = Mul n w", "y = Add h b")
):
    return [
        f"m = ReduceMean x {axes}",
        "d = Sub x m",
        SQUARES[square],
        f"v = ReduceMean q {axes}",
        "e = Add v eps",
        *DEVIATIONS[deviation],
        *tail,
    ]


@pytest.mark.parametrize("square", sorted(SQUARES))
@pytest.mark.parametrize("deviation", sorted(DEVIATIONS))
@pytest.mark.parametrize("shape", [["n", 8], ["n", "s", 8], [2, 3, 4, 8]])
def test_layer_norm(square, deviation, shape):
    model = model_of(layer_norm(square, deviation), {"w": array(8), "b": array(8)}, shape)
    assert fused(FuseNormalizations(), model) == ["LayerNormalization"]
    assert set(model.graph.initializers) == {"w", "b"}


@pytest.mark.parametrize("dtype", [np.float64, np.float16])
def test_layer_norm_in_other_types(dtype):
    model = model_of(layer_norm(), {"w": array(8), "b": array(8)}, [4, 8], 20, dtype)
    assert fused(FuseNormalizations(), model) == ["LayerNormalization"]


@pytest.mark.parametrize(
    "tail",
    [(), ("y = Mul w n",), ("y = Add n b",), ("h = Mul n w", "i = Mul h w", "y = Add b i")],
)
def test_layer_norm_without_scale_or_bias(tail):
    lines = layer_norm(tail=tail)
    assert fused(
        FuseNormalizations(), model_of(lines, {"w": array(8), "b": array(8)}, ["n", 3, 8])
    ) == ["LayerNormalization"]


@pytest.mark.parametrize(
    ("shape", "axes", "parameter", "left"),
    [
        ([2, 3, 4, 5], [2, 3], (4, 5), ["LayerNormalization"]),
        ([2, 3, 4, 5], [-1, -2], (1, 4, 5), ["LayerNormalization"]),
        ([2, 3, 4, 5], [1, 2, 3], (3, 4, 5), ["LayerNormalization"]),
        ([2, 3, 4, 5], [2, 3], (3, 1, 1), ["InstanceNormalization"]),
        (["n", 3, "h", 5], [2, 3], (3, 1, 1), ["InstanceNormalization"]),
        ([2, 3, 6], [2], (3, 1), ["InstanceNormalization"]),
        ([2, 6, 4, 5], [1], (6, 1, 1), ["Transpose", "LayerNormalization", "Transpose"]),
        (["n", 6, "h", "w"], [1], (6, 1, 1), ["Transpose", "LayerNormalization", "Transpose"]),
        (["n", 6, "h"], [1], (1, 6, 1), ["Transpose", "LayerNormalization", "Transpose"]),
    ],
)
def test_norms_over_other_axes(shape, axes, parameter, left):
    constants = {"axes": np.array(axes), "w": array(*parameter), "b": array(*parameter)}
    model = model_of(layer_norm(axes="axes"), constants, shape)
    assert fused(FuseNormalizations(), model) == left


def test_a_bias_of_higher_rank_stays():
    model = model_of(layer_norm(tail=("y = Add n b",)), {"b": array(1, 8)}, [8])
    assert fused(FuseNormalizations(), model) == ["LayerNormalization", "Add"]


def test_norms_without_weights():
    constants = {"axes": np.array([1]), "w": array(6, 1, 1), "b": array(6, 1, 1)}
    model = model_of(layer_norm(axes="axes"), constants, ["n", 6, 4, 5])
    for name in ("w", "b"):
        value = model.graph.initializers[name]
        value.const_value = AbsentTensor(name, value.dtype, value.shape)
    FuseNormalizations().run(model, X86)
    verify(model)
    assert [n.op_type for n in model.graph] == ["Transpose", "LayerNormalization", "Transpose"]
    assert [v.shape for v in model.graph[1].inputs[1:]] == [ir.Shape([6])] * 2


@pytest.mark.parametrize(
    ("rule", "shape", "changes", "reason"),
    [
        (LayerNormForm, [2, 8], {"eps": array(8, low=1e-5, high=1e-4)}, "epsilon"),
        (LayerNormForm, [2, 8], {"eps": np.float32(-1e-9)}, "negative"),
        (LayerNormForm, [2, 8], {"last": np.array([0])}, "neither the last"),
        (LayerNormForm, [2, "k"], {}, "no known size"),
        (InstanceNormForm, [2, 4, 8], {}, "over the last axis"),
    ],
)
def test_near_misses_of_layer_norm(rule, shape, changes, reason):
    model = model_of(layer_norm(tail=()), changes, shape)
    assert reason in explain(rule(), model.graph[-1], X86).reason
    if rule is LayerNormForm:
        before = [node.op_type for node in model.graph]
        assert fused(FuseNormalizations(), model) == before


def test_a_norm_whose_insides_are_used_stays():
    lines = [*layer_norm(tail=()), "y = Add n v"]
    model = model_of(lines, {}, [2, 8])
    assert "also used by Add" in explain(LayerNormForm(), model.graph[-2], X86).reason
    assert "LayerNormalization" not in fused(FuseNormalizations(), model)


def test_different_axes_are_no_norm():
    lines = [line.replace("q last", "q zeroth") for line in layer_norm(tail=())]
    model = model_of(lines, {"zeroth": np.array([0])}, [4, 8])
    assert "different axes" in explain(LayerNormForm(), model.graph[-1], X86).reason
    assert "LayerNormalization" not in fused(FuseNormalizations(), model)


def test_a_scale_along_another_axis_stays():
    model = model_of(layer_norm(tail=("y = Mul n w",)), {"w": array(4, 1)}, [2, 3, 4, 8])
    found = fused(FuseNormalizations(), model)
    assert found == ["LayerNormalization", "Mul"]
    assert "normalized shape" in explain(NormScale(), model.graph[1], X86).reason


def rms_norm(deviation, tail=("y = Mul n w",)):
    inverse = [line.replace(" d", " x") for line in DEVIATIONS[deviation]]
    square = "q = Pow x two"
    return [square, "v = ReduceMean q last", "e = Add eps v", *inverse, *tail]


@pytest.mark.parametrize("deviation", sorted(DEVIATIONS))
@pytest.mark.parametrize(
    ("opset", "name"), [(20, "SimplifiedLayerNormalization"), (23, "RMSNormalization")]
)
@pytest.mark.parametrize("tail", [("y = Mul n w",), ("y = Mul w n",), ()])
def test_rms_norm(deviation, opset, name, tail):
    model = model_of(rms_norm(deviation, tail), {"w": array(8)}, ["n", 3, 8], opset)
    assert fused(FuseNormalizations(), model) == [name]


def test_rms_norm_below_opset_23_is_for_one_runtime():
    model = model_of(rms_norm("sqrt div", ()), {}, [3, 8], 20)
    for context in (Context(), Context(get_target("x86_64/tvm"))):
        assert not explain(RmsNormForm(), model.graph[-1], context).matched
    assert len(fused(FuseNormalizations(), model, Context())) == 5


# --- softmax and norms -----------------------------------------------------------------------

SOFTMAX = ["m = ReduceMax x last", "d = Sub x m", "e = Exp d", "s = ReduceSum e last"]


@pytest.mark.parametrize(
    ("tail", "left"),
    [
        (["y = Div e s"], ["Softmax"]),
        (["r = Reciprocal s", "y = Mul r e"], ["Softmax"]),
        (["l = Log s", "y = Sub d l"], ["LogSoftmax"]),
    ],
)
@pytest.mark.parametrize("axis", [-1, 1, 0])
def test_softmax(tail, left, axis):
    model = model_of([*SOFTMAX, *tail], {"last": np.array([axis])}, ["n", 4, 5])
    assert fused(FuseNormalizations(), model) == left
    assert model.graph[0].attributes["axis"].as_int() % 3 == axis % 3


@pytest.mark.parametrize(
    ("lines", "constants", "reason"),
    [
        ([*SOFTMAX, "y = Div e s"], {"last": np.array([1, 2])}, "several axes"),
        (
            [SOFTMAX[0].replace("last", "other"), *SOFTMAX[1:], "y = Div e s"],
            {"other": np.array([0])},
            "same axes",
        ),
    ],
)
def test_near_misses_of_softmax(lines, constants, reason):
    model = model_of(lines, constants, [3, 4, 5])
    assert reason in explain(SoftmaxForm(), model.graph[-1], X86).reason
    assert "Softmax" not in fused(FuseNormalizations(), model)


@pytest.mark.parametrize(
    "lines",
    [
        ["q = Mul x x", "s = ReduceSum q last", "y = Sqrt s"],
        ["q = Pow x two", "s = ReduceSum q last, keepdims=0", "y = Sqrt s"],
        ["s = ReduceSumSquare x last", "y = Sqrt s"],
        ["s = ReduceSumSquare x", "y = Sqrt s"],
    ],
)
def test_euclidean_norm(lines):
    assert fused(FuseNormalizations(), model_of(lines, {}, [3, 4])) == ["ReduceL2"]

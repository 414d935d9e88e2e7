"""Fusion rules: what they make, what they refuse, and that numbers stay."""

import numpy as np
import onnx_ir as ir
import pytest
from onnx import helper, numpy_helper

from edgepass import explain
from edgepass.frontends import load_model
from edgepass.ir.graph import AbsentTensor
from edgepass.ir.shapes import infer_shapes
from edgepass.ir.verify import verify
from edgepass.passes.base import Context
from edgepass.passes.fuse.activations import FuseActivations
from edgepass.passes.fuse.affine import FoldAffine, FoldBatchNorm, FoldConvBias
from edgepass.passes.fuse.gemm import GemmForms
from edgepass.passes.probe import Probe, numeric_error, sample_inputs

GENERATOR = np.random.default_rng(0)


def model_of(nodes, weights, shape, opset=20, output=None):
    inputs = [helper.make_tensor_value_info("x", 1, shape)]
    outputs = [helper.make_tensor_value_info("y", 1, output)]
    initializers = [numpy_helper.from_array(a, n) for n, a in weights.items()]
    graph = helper.make_graph(nodes, "g", inputs, outputs, initializers)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    model = load_model(proto)
    infer_shapes(model)
    return model


def fused(item, model: ir.Model) -> list[str]:
    """Apply and compare with before, to 1e-5 of the range; the operators left."""
    probe = Probe(sample_inputs(model))
    before = probe.run(model)
    item.run(model, Context())
    verify(model)
    assert numeric_error(before, probe.run(model)).relative <= 1e-5
    return [node.op_type for node in model.graph]


def array(*shape, low=-1.0, high=1.0):
    return GENERATOR.uniform(low, high, shape).astype(np.float32)


def norm_weights(channels):
    return {
        "s": array(channels),
        "b": array(channels),
        "m": array(channels),
        "v": array(channels, low=0.5, high=2.0),
    }


@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize("op", ["Conv", "ConvTranspose"])
@pytest.mark.parametrize("bias", [False, True])
def test_batch_norm_folds_into_a_convolution(op, group, bias):
    out = 6
    shape = (out, 4 // group, 3, 3) if op == "Conv" else (4, out // group, 3, 3)
    weights = {"w": array(*shape), **norm_weights(out)}
    inputs = ["x", "w"]
    if bias:
        weights["c"] = array(out)
        inputs.append("c")
    nodes = [
        helper.make_node(op, inputs, ["h"], group=group),
        helper.make_node("BatchNormalization", ["h", "s", "b", "m", "v"], ["y"], epsilon=1e-3),
    ]
    model = model_of(nodes, weights, [1, 4, 8, 8])
    assert fused(FoldAffine(), model) == [op]
    assert len(model.graph.initializers) == 2


def test_batch_norm_is_refused_across_a_non_linearity_and_says_so():
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["h"]),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("BatchNormalization", ["r", "s", "b", "m", "v"], ["y"]),
    ]
    model = model_of(nodes, {"w": array(4, 4, 1, 1), **norm_weights(4)}, [1, 4, 8, 8])
    assert fused(FoldAffine(), model) == ["Conv", "Relu", "BatchNormalization"]
    assert "found Relu" in explain(FoldBatchNorm(), model.graph[2]).reason


def test_a_small_shared_weight_is_copied_and_a_large_one_is_not():
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["h"]),
        helper.make_node("BatchNormalization", ["h", "s", "b", "m", "v"], ["n"]),
        helper.make_node("Conv", ["n", "w"], ["y"]),
    ]
    model = model_of(nodes, {"w": array(4, 4, 1, 1), **norm_weights(4)}, [1, 4, 8, 8])
    assert fused(FoldAffine(), model) == ["Conv", "Conv"]
    model = model_of(nodes, {"w": array(520, 520, 1, 1), **norm_weights(520)}, [1, 520, 2, 2])
    reason = explain(FoldBatchNorm(), model.graph[1]).reason
    assert "large and shared" in reason


def test_scale_and_bias_fold_into_a_convolution():
    weights = {"w": array(4, 3, 3, 3), "k": array(1, 4, 1, 1), "c": array(4, 1, 1)}
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["h"]),
        helper.make_node("Mul", ["h", "k"], ["i"]),
        helper.make_node("Add", ["c", "i"], ["y"]),
    ]
    assert fused(FoldAffine(), model_of(nodes, weights, [2, 3, 8, 8])) == ["Conv"]


def test_a_constant_over_space_is_no_bias():
    weights = {"w": array(4, 3, 1, 1), "c": array(8)}
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["h"]),
        helper.make_node("Add", ["h", "c"], ["y"]),
    ]
    model = model_of(nodes, weights, [2, 3, 8, 8])
    assert fused(FoldAffine(), model) == ["Conv", "Add"]
    assert "per channel" in explain(FoldConvBias(), model.graph[1]).reason


def test_batch_norm_folds_without_weights():
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["h"]),
        helper.make_node("BatchNormalization", ["h", "s", "b", "m", "v"], ["y"]),
    ]
    model = model_of(nodes, {"w": array(4, 4, 1, 1), **norm_weights(4)}, [1, 4, 8, 8])
    for name, value in model.graph.initializers.items():
        value.const_value = AbsentTensor(name, value.dtype, value.shape)
    FoldAffine().run(model, Context())
    verify(model)
    assert [node.op_type for node in model.graph] == ["Conv"]
    assert [v.shape for v in model.graph[0].inputs[1:]] == [ir.Shape([4, 4, 1, 1]), ir.Shape([4])]


def test_matmul_and_bias_become_gemm():
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("Add", ["h", "c"], ["y"]),
    ]
    model = model_of(nodes, {"w": array(8, 5), "c": array(5)}, [3, 8])
    assert fused(GemmForms(), model) == ["Gemm"]


def test_a_batched_matmul_stays():
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("Add", ["h", "c"], ["y"]),
    ]
    model = model_of(nodes, {"w": array(8, 5), "c": array(5)}, [2, 3, 8])
    assert fused(GemmForms(), model) == ["MatMul", "Add"]


def test_a_transpose_goes_into_gemm():
    nodes = [
        helper.make_node("Transpose", ["x"], ["t"], perm=[1, 0]),
        helper.make_node("Gemm", ["t", "w", "c"], ["h"]),
        helper.make_node("Relu", ["h"], ["y"]),
    ]
    model = model_of(nodes, {"w": array(8, 5), "c": array(5)}, [8, 3])
    assert fused(GemmForms(), model) == ["Gemm", "Relu"]
    assert model.graph[0].attributes["transA"].as_int() == 1


def scalar(value):
    return np.array(value, np.float32)


SPELLINGS = {
    "HardSwish": [
        ("Add", ["x", "three"], "a"),
        ("Clip", ["a", "zero", "six"], "b"),
        ("Mul", ["x", "b"], "c"),
        ("Div", ["c", "six"], "y"),
    ],
    "HardSigmoid": [
        ("Add", ["three", "x"], "a"),
        ("Clip", ["a", "zero", "six"], "b"),
        ("Div", ["b", "six"], "y"),
    ],
    "Gelu": [
        ("Div", ["x", "sqrt2"], "a"),
        ("Erf", ["a"], "b"),
        ("Add", ["b", "one"], "c"),
        ("Mul", ["x", "c"], "d"),
        ("Mul", ["d", "half"], "y"),
    ],
    "Clip": [("Max", ["x", "zero"], "a"), ("Min", ["a", "six"], "y")],
}
CONSTANTS = {
    "zero": scalar(0), "one": scalar(1), "two": scalar(2), "three": scalar(3), "six": scalar(6),
    "half": scalar(0.5), "sqrt2": scalar(np.sqrt(2)),
}  # fmt: skip


def spelled(name, opset=20, **changed):
    nodes = [helper.make_node(op, inputs, [out]) for op, inputs, out in SPELLINGS[name]]
    used = {i for _, inputs, _ in SPELLINGS[name] for i in inputs}
    weights = {k: v for k, v in {**CONSTANTS, **changed}.items() if k in used}
    return model_of(nodes, weights, [2, 4, 8], opset)


@pytest.mark.parametrize("name", sorted(SPELLINGS))
def test_spelled_out_operators_are_recognized(name):
    assert fused(FuseActivations(), spelled(name)) == [name]


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("HardSwish", {"three": scalar(2)}),
        ("HardSwish", {"six": scalar(5)}),
        ("Gelu", {"sqrt2": scalar(1.4)}),
        ("Gelu", {"half": scalar(0.25)}),
        ("Clip", {"zero": scalar(1), "six": scalar(-1)}),
    ],
)
def test_near_misses_are_left_alone(name, changed):
    model = spelled(name, **changed)
    before = [node.op_type for node in model.graph]
    assert fused(FuseActivations(), model) == before


def test_an_operator_newer_than_the_opset_is_not_made():
    assert "Gelu" not in fused(FuseActivations(), spelled("Gelu", opset=18))

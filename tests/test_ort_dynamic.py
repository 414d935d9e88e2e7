"""Products by stored or run-time integers: predicted operators against those of a real session."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx.helper as oh
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, numpy_helper

from edgepass.cost.kernels import kernels
from edgepass.ir.shapes import infer_shapes
from edgepass.passes.base import Context, Pass
from edgepass.passes.quantize.dynamic_int8 import DynamicInt8
from edgepass.passes.quantize.weight_only import WeightOnly
from edgepass.targets.registry import get_target

HOST = get_target("host")
VIEWS = {"Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity"}
node = oh.make_node
NETS: dict[str, list[onnx.NodeProto]] = {
    "one reader": [node("MatMul", ["x", "w"], ["y"], "m")],
    "several readers": [
        node("MatMul", ["x", "w"], ["a"], "m"),
        node("MatMul", ["x", "w2"], ["b"], "n"),
        node("Mul", ["a", "b"], ["y"], "mul"),
    ],
    "bias": [node("MatMul", ["x", "w"], ["a"], "m"), node("Add", ["a", "bias"], ["y"], "add")],
    "bias and residual": [
        node("MatMul", ["x", "w"], ["a"], "m"),
        node("Add", ["bias", "a"], ["b"], "add"),
        node("Add", ["b", "x"], ["y"], "sum"),
    ],
    "residual": [node("MatMul", ["x", "w"], ["a"], "m"), node("Add", ["a", "x"], ["y"], "sum")],
    "row of scales": [
        node("MatMul", ["x", "w"], ["a"], "m"),
        node("Mul", ["a", "bias"], ["y"], "mul"),
    ],
    "Gemm": [
        node("Reshape", ["x", "flat"], ["r"], "r"),
        node("Gemm", ["r", "w", "bias"], ["y"], "g"),
    ],
    "transposed Gemm": [
        node("Reshape", ["x", "flat"], ["r"], "r"),
        node("Gemm", ["r", "w", "bias"], ["y"], "g", transB=1),
    ],
    "stack of matrices": [node("MatMul", ["x4", "w4"], ["y"], "m")],
    "shared weight": [
        node("MatMul", ["x", "w"], ["a"], "m"),
        node("Relu", ["a"], ["b"], "relu"),
        node("MatMul", ["b", "w"], ["y"], "n"),
    ],
    "two activations": [
        node("Transpose", ["x"], ["t"], "t", perm=[0, 2, 1]),
        node("MatMul", ["x", "t"], ["a"], "m"),
        node("MatMul", ["a", "x"], ["b"], "n"),
        node("MatMul", ["b", "w"], ["y"], "o"),
    ],
    "Conv": [node("Conv", ["x4", "k", "bias"], ["y"], "c")],
}
PASSES: dict[str, Pass] = {
    "dynamic": DynamicInt8(),
    "dynamic per tensor": DynamicInt8(per_channel=False),
    "weights 8": WeightOnly(),
    "weights 8 blocks": WeightOnly(block=32),
    "weights 4": WeightOnly(bits=4),
}


def build(nodes: list[onnx.NodeProto], opset: int) -> ir.Model:
    rng = np.random.default_rng(1)
    shapes = {"w": (64, 64), "w2": (64, 64), "bias": (64,), "w4": (2, 64, 64), "k": (64, 2, 1, 1)}
    constants = {name: rng.standard_normal(s).astype(np.float32) for name, s in shapes.items()}
    used = {name for n in nodes for name in n.input}
    floats = [v for name, v in constants.items() if name in used]
    initializers = [
        numpy_helper.from_array(v, name) for name, v in constants.items() if name in used
    ]
    assert len(floats) == len(initializers)
    if "flat" in used:
        initializers.append(numpy_helper.from_array(np.array([6, 64], np.int64), "flat"))
    inputs = {"x": [2, 3, 64], "x4": [1, 2, 16, 64]}
    graph = oh.make_graph(
        nodes,
        "g",
        [
            oh.make_tensor_value_info(n, TensorProto.FLOAT, s)
            for n, s in inputs.items()
            if n in used
        ],
        [oh.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        initializers,
    )
    opsets = [oh.make_opsetid("", opset), oh.make_opsetid("com.microsoft", 1)]
    model = ir.from_proto(oh.make_model(graph, opset_imports=opsets, ir_version=10))
    infer_shapes(model)
    return model


def session_ops(model: ir.Model, folder: Path) -> Counter[str]:
    path = folder / "optimized.onnx"
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(path)
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    data = ir.to_proto(model).SerializeToString()
    ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    return Counter(n.op_type for n in onnx.load(path).graph.node if n.op_type not in VIEWS)


@pytest.mark.parametrize("opset", [17, 21])
@pytest.mark.parametrize("name", PASSES)
@pytest.mark.parametrize("net", NETS)
def test_products_are_those_of_the_session(net: str, name: str, opset: int, tmp_path: Path) -> None:
    item = PASSES[name]
    before, model = build(NETS[net], opset), build(NETS[net], opset)
    plan = item.plan(before, Context(HOST))
    model = item.run(model, Context(HOST)).model
    expected = session_ops(model, tmp_path)
    assert Counter(k.type for k in kernels(model, HOST)) == expected
    assert Counter(k.type for k in kernels(before, HOST, plan)) == expected


def test_a_product_with_its_weights_inside_has_the_work_of_its_nodes() -> None:
    before = build(NETS["bias"], 21)
    plan = DynamicInt8().plan(before, Context(HOST))
    (kernel,) = kernels(before, HOST, plan)
    assert kernel.type == "DynamicQuantizeMatMul"
    assert kernel.macs == 2 * 3 * 64 * 64
    assert [n.op_type for n in kernel.nodes if n.op_type != "DynamicQuantizeLinear"] == [
        "MatMul",
        "Add",
    ]
    assert kernel.weight_bytes < 64 * 64 * 2

"""fp16 and bf16: what is converted, what stays, and that the result runs and is right."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from edgepass.errors import PassOptionError
from edgepass.frontends import load_model
from edgepass.ir.graph import AbsentTensor
from edgepass.ir.quant import planned_model_bytes
from edgepass.ir.shapes import infer_shapes
from edgepass.ir.verify import interface, interface_difference, verify
from edgepass.passes.base import Context
from edgepass.passes.quantize.half import Bf16, Fp16
from edgepass.passes.quantize.half_ops import Ports, half_ports, misfit
from edgepass.targets.onnxruntime import OrtRunner
from edgepass.targets.target import Hardware, Target
from generated import feed_for, models

QUICK = settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
HALF_TARGET = Target(
    name="halves",
    description="",
    hardware=Hardware(arch="x"),
    float_dtypes=(ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16),
)
FLOAT_TARGET = Target(name="floats", description="", hardware=Hardware(arch="x"))


def normal(*shape, seed=0, scale=1.0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(np.float32)


def graph_of(nodes, inputs, outputs, weights, *, opset=18) -> ir.Model:
    protos = [
        helper.make_node(op, list(ins), list(outs), name=f"n{i}", **attributes)
        for i, (op, ins, outs, attributes) in enumerate(nodes)
    ]
    kinds = {np.dtype(np.float32): TensorProto.FLOAT, np.dtype(np.int64): TensorProto.INT64}
    info = [
        helper.make_tensor_value_info(name, kinds[np.dtype(kind)], shape)
        for name, (kind, shape) in inputs.items()
    ]
    outs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in outputs.items()]
    tensors = [numpy_helper.from_array(a, n) for n, a in weights.items()]
    graph = helper.make_graph(protos, "g", info, outs, tensors)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    model = ir.from_proto(proto)
    infer_shapes(model)
    return model


def net(opset=18) -> ir.Model:
    return graph_of(
        [
            ("Conv", ["x", "w", "b"], ["c"], {}),
            ("Relu", ["c"], ["r"], {}),
            ("Resize", ["r", "", "scales"], ["z"], {"mode": "nearest"}),
            ("GlobalAveragePool", ["z"], ["g"], {}),
            ("Flatten", ["g"], ["f"], {}),
            ("Gemm", ["f", "v", "d"], ["y"], {}),
        ],
        {"x": (np.float32, ["n", 3, 8, 8])},
        {"y": ["n", 10]},
        {
            "w": normal(16, 3, 3, 3, scale=0.3),
            "b": normal(16),
            "scales": np.array([1, 1, 2, 2], np.float32),
            "v": normal(16, 10),
            "d": normal(10),
        },
        opset=opset,
    )


def relative(reference: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(reference - other).max() / np.abs(reference).max())


def stored_bytes(model: ir.Model) -> int:
    return sum(v.const_value.nbytes for v in model.graph.initializers.values())


def test_fp16_converts_weights_and_arithmetic_and_keeps_the_interface():
    model = net()
    for node in model.graph:
        node.metadata_props["origin"] = node.name
    feed = {"x": normal(2, 3, 8, 8)}
    reference = OrtRunner(model).run(feed)["y"]
    planned = planned_model_bytes(Fp16().plan(model, Context()), model)
    before = interface(model.graph.inputs), interface(model.graph.outputs)
    result = Fp16().run(model, Context())
    verify(model)
    assert result.modified
    assert not interface_difference("input", before[0], interface(model.graph.inputs))
    assert not interface_difference("output", before[1], interface(model.graph.outputs))
    assert Counter(n.op_type for n in model.graph)["Cast"] == 2
    dtypes = {name: v.dtype for name, v in model.graph.initializers.items()}
    assert dtypes.pop("scales") == ir.DataType.FLOAT  # Resize takes float32 scales only
    assert set(dtypes.values()) == {ir.DataType.FLOAT16}
    assert all(node.metadata_props["origin"] for node in model.graph)
    assert planned == stored_bytes(model)
    assert relative(reference, OrtRunner(model).run(feed)["y"]) < 5e-3
    assert not Fp16().run(model, Context()).modified


@pytest.mark.parametrize("item", [Fp16(), Bf16()], ids=str)
def test_without_half_arithmetic_only_storage_changes(item):
    model = net()
    feed = {"x": normal(2, 3, 8, 8)}
    reference = OrtRunner(model).run(feed)["y"]
    planned = planned_model_bytes(item.plan(model, Context(target=FLOAT_TARGET)), model)
    result = item.run(model, Context(target=FLOAT_TARGET))
    verify(model)
    assert "arithmetic in float32" in result.notes[0]
    assert planned == stored_bytes(model)
    assert all(n.outputs[0].dtype == ir.DataType.FLOAT for n in model.graph)
    bound = 5e-3 if isinstance(item, Fp16) else 3e-2
    assert relative(reference, OrtRunner(model).run(feed)["y"]) < bound


def test_arithmetic_follows_the_target_and_the_option():
    for item, target, computes in [
        (Fp16(), HALF_TARGET, True),
        (Bf16(), HALF_TARGET, True),
        (Bf16(), None, False),
        (Fp16(), None, True),
        (Fp16(arithmetic="no"), HALF_TARGET, False),
        (Fp16(arithmetic="yes"), FLOAT_TARGET, True),
    ]:
        model = net(opset=22)
        item.run(model, Context(target=target))
        conv = next(n for n in model.graph if n.op_type == "Conv")
        assert (conv.outputs[0].dtype == item.dtype) is computes
    with pytest.raises(PassOptionError):
        Fp16(arithmetic="maybe")


def test_bf16_arithmetic_needs_the_opset_that_defines_it():
    """Conv takes bfloat16 from opset 22 on: before, its weight is stored so and cast back."""
    model = net(opset=18)
    Bf16(arithmetic="yes").run(model, Context())
    verify(model)
    conv = next(n for n in model.graph if n.op_type == "Conv")
    assert conv.outputs[0].dtype == ir.DataType.FLOAT
    assert conv.inputs[1].producer().op_type == "Cast"
    gemm = next(n for n in model.graph if n.op_type == "Gemm")
    assert gemm.outputs[0].dtype == ir.DataType.BFLOAT16


def test_keep_leaves_nodes_and_operators():
    model = net()
    Fp16(keep=("Gemm", "n0")).run(model, Context())
    verify(model)
    by_type = {n.op_type: n for n in model.graph}
    assert by_type["Conv"].outputs[0].dtype == ir.DataType.FLOAT
    assert by_type["Conv"].inputs[1].dtype == ir.DataType.FLOAT
    assert by_type["Gemm"].inputs[1].dtype == ir.DataType.FLOAT
    assert by_type["Relu"].outputs[0].dtype == ir.DataType.FLOAT16
    assert OrtRunner(model).run({"x": normal(1, 3, 8, 8)})["y"].shape == (1, 10)


def test_constants_out_of_range_keep_their_node_in_float32():
    model = graph_of(
        [
            ("Mul", ["x", "big"], ["a"], {}),
            ("Div", ["a", "big"], ["b"], {}),
            ("Add", ["b", "epsilon"], ["c"], {}),
            ("Clip", ["c", "low", "high"], ["d"], {}),
            ("Tanh", ["d"], ["y"], {}),
        ],
        {"x": (np.float32, [2, 8])},
        {"y": [2, 8]},
        {
            "big": np.array(1e6, np.float32),
            "epsilon": np.array(1e-12, np.float32),
            "low": np.array(-3e38, np.float32),
            "high": np.array(3e38, np.float32),
        },
    )
    feed = {"x": normal(2, 8)}
    reference = OrtRunner(model).run(feed)["y"]
    result = Fp16().run(model, Context())
    verify(model)
    assert sum("beyond 6.55e+04" in note for note in result.notes) == 1
    assert any("become zero" in note for note in result.notes)
    by_type = {n.op_type: n for n in model.graph}
    assert by_type["Mul"].outputs[0].dtype == ir.DataType.FLOAT
    assert by_type["Tanh"].outputs[0].dtype == ir.DataType.FLOAT16
    assert relative(reference, OrtRunner(model).run(feed)["y"]) < 2e-3


def test_a_mask_of_the_lowest_float_does_not_make_nan():
    """-3.4e38 cast to float16 would be -inf, and a row of nothing but -inf has no softmax."""
    model = graph_of(
        [
            ("Cast", ["mask"], ["m"], {"to": TensorProto.FLOAT}),
            ("Mul", ["m", "lowest"], ["n"], {}),
            ("Add", ["x", "n"], ["s"], {}),
            ("Softmax", ["s"], ["y"], {"axis": -1}),
        ],
        {"x": (np.float32, [2, 8]), "mask": (np.int64, [2, 8])},
        {"y": [2, 8]},
        {"lowest": np.array(np.finfo(np.float32).min, np.float32)},
    )
    mask = np.zeros((2, 8), np.int64)
    mask[0, 3:], mask[1] = 1, 1
    feed = {"x": normal(2, 8), "mask": mask}
    Fp16().run(model, Context())
    verify(model)
    result = OrtRunner(model).run(feed)["y"]
    assert np.isfinite(result).all()
    assert (result[0, 3:] == 0).all()


def test_positions_computed_from_integers_stay_exact():
    """4001 is not a float16: positions and sizes must not pass through one."""
    model = graph_of(
        [
            ("Cast", ["i"], ["f"], {"to": TensorProto.FLOAT}),
            ("Add", ["f", "one"], ["g"], {}),
            ("Cast", ["g"], ["j"], {"to": TensorProto.INT64}),
            ("Gather", ["table", "j"], ["t"], {}),
            ("Mul", ["t", "t"], ["y"], {}),
        ],
        {"i": (np.int64, [3])},
        {"y": [3, 4]},
        {"one": np.array(1, np.float32), "table": normal(4100, 4)},
    )
    feed = {"i": np.array([4000, 2049, 7])}
    reference = OrtRunner(model).run(feed)["y"]
    Fp16().run(model, Context())
    verify(model)
    assert relative(reference, OrtRunner(model).run(feed)["y"]) < 3e-3


def test_subgraphs_stay_in_float32_and_see_float32():
    then = helper.make_graph(
        [helper.make_node("MatMul", ["h", "w"], ["o"])],
        "then",
        [],
        [helper.make_tensor_value_info("o", TensorProto.FLOAT, [2, 8])],
    )
    other = helper.make_graph(
        [helper.make_node("Identity", ["h"], ["p"])],
        "else",
        [],
        [helper.make_tensor_value_info("p", TensorProto.FLOAT, [2, 8])],
    )
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("If", ["flag"], ["y"], then_branch=then, else_branch=other),
    ]
    inputs = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 8]),
        helper.make_tensor_value_info("flag", TensorProto.BOOL, []),
    ]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 8])]
    weights = [numpy_helper.from_array(normal(8, 8), "w")]
    graph = helper.make_graph(nodes, "g", inputs, outputs, weights)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    for flag in (True, False):
        model = load_model(proto)
        feed = {"x": normal(2, 8), "flag": np.array(flag)}
        reference = OrtRunner(model).run(feed)["y"]
        assert Fp16().run(model, Context()).modified
        verify(model)
        assert relative(reference, OrtRunner(model).run(feed)["y"]) < 5e-3


def test_architectures_without_weights_convert_to_the_same_size():
    model, bare = net(), net()
    for value in bare.graph.initializers.values():
        if value.name != "scales":
            tensor = value.const_value
            value.const_value = AbsentTensor(value.name, tensor.dtype, tensor.shape)
    Fp16().run(model, Context())
    assert Fp16().run(bare, Context()).modified
    verify(bare)
    assert [n.op_type for n in model.graph] == [n.op_type for n in bare.graph]
    assert stored_bytes(model) == stored_bytes(bare)


def test_ports_come_from_the_schema():
    node = ir.from_proto(helper.make_node("Resize", ["x", "", "s"], ["y"]))
    node.inputs[0].type = node.inputs[2].type = ir.TensorType(ir.DataType.FLOAT)
    node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    assert half_ports(node, ir.DataType.FLOAT16, 18) == Ports((0,), (0,))
    range_node = ir.from_proto(helper.make_node("Range", ["a", "b", "c"], ["y"]))
    assert isinstance(half_ports(range_node, ir.DataType.FLOAT16, 18), str)


def test_misfit_says_why():
    f16, b16 = ir.DataType.FLOAT16, ir.DataType.BFLOAT16
    assert misfit(np.array([1.0, 65504.0], np.float32), f16) == ""
    assert "beyond" in misfit(np.array([1.0, 70000.0], np.float32), f16)
    assert misfit(np.array([1.0, 70000.0], np.float32), b16) == ""
    assert "beyond" in misfit(np.array(np.finfo(np.float32).max), b16)
    assert misfit(np.array([np.inf, 1.0], np.float32), f16) == ""
    assert "zero" in misfit(np.array(1e-12, np.float32), f16)
    assert misfit(np.zeros(4, np.float32), f16) == ""


def test_a_quantized_model_is_left_alone_where_pairs_are():
    from edgepass.passes.quantize.static_int8 import StaticInt8

    model = net()
    feed = {"x": normal(2, 3, 8, 8)}
    StaticInt8().run(model, Context(calibration=[feed]))
    reference = OrtRunner(model, optimize=False).run(feed)["y"]
    Fp16().run(model, Context())
    verify(model)
    assert relative(reference, OrtRunner(model, optimize=False).run(feed)["y"]) < 1e-2


@QUICK
@given(
    proto=models(),
    flag=st.integers(0, 1),
    item=st.sampled_from([Fp16(), Fp16(arithmetic="no"), Bf16(), Fp16(keep=("Conv",))]),
)
def test_half_on_generated_models(proto, flag, item):
    model = load_model(proto)
    infer_shapes(model)
    feed = feed_for(proto, flag)
    reference = OrtRunner(model, optimize=False).run(feed)
    before = interface(model.graph.inputs), interface(model.graph.outputs)
    item.run(model, Context())
    verify(model)
    assert not interface_difference("input", before[0], interface(model.graph.inputs))
    assert not interface_difference("output", before[1], interface(model.graph.outputs))
    step = 2.0**-11 if isinstance(item, Fp16) else 2.0**-8
    for name, array in OrtRunner(model, optimize=False).run(feed).items():
        scale = max(1.0, float(np.abs(reference[name]).max()))
        assert np.abs(array - reference[name]).max() <= 60 * step * scale

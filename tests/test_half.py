"""fp16 and bf16: what is converted, what stays, and that the result runs and is right."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from edgepass.errors import CalibrationError, PassOptionError
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
    kinds = {
        np.dtype(np.float32): TensorProto.FLOAT,
        np.dtype(np.int64): TensorProto.INT64,
        np.dtype(np.bool_): TensorProto.BOOL,
    }
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


# --- what calibration data and structure say ---------------------------------------------------


def with_overflow() -> ir.Model:
    """`n2` gives some 1e6, which `n4` brings back; all weights fit float16."""
    return graph_of(
        [
            ("MatMul", ["x", "w"], ["a"], {}),
            ("Tanh", ["a"], ["t"], {}),
            ("MatMul", ["t", "v"], ["huge"], {}),
            ("Relu", ["huge"], ["r"], {}),
            ("Mul", ["r", "small"], ["b"], {}),
            ("MatMul", ["b", "u"], ["y"], {}),
        ],
        {"x": (np.float32, ["n", 16])},
        {"y": ["n", 4]},
        {
            "w": normal(16, 16, scale=0.3),
            "v": normal(16, 16, seed=1, scale=2e4),
            "small": np.array(1e-5, np.float32),
            "u": normal(16, 4, seed=2),
        },
    )


def node_by_node(model: ir.Model, feed) -> dict[str, np.ndarray]:
    """Every value as hardware with 16-bit arithmetic has it.

    Where ONNX Runtime's CPU has no 16-bit kernel it computes in float32, and takes the Casts
    between two such nodes out: what overflows there never shows.
    """
    values = dict(feed)
    values |= {n: v.const_value.numpy() for n, v in model.graph.initializers.items()}
    for node in model.graph:
        inputs = [v for v in dict.fromkeys(node.inputs) if v is not None]
        copies = {v: ir.Value(name=v.name, type=v.type, shape=v.shape) for v in inputs}
        alone = ir.Node(
            node.domain,
            node.op_type,
            [None if v is None else copies[v] for v in node.inputs],
            list(node.attributes.values()),
            outputs=[ir.Value(name=v.name, type=v.type) for v in node.outputs],
        )
        graph = ir.Graph(
            list(copies.values()), alone.outputs, nodes=[alone], opset_imports={"": 18}
        )
        runner = OrtRunner(ir.Model(graph, ir_version=10), optimize=False)
        values |= runner.run({v.name: np.asarray(values[v.name]) for v in inputs})
    return values


def test_a_planted_overflow_is_named_and_kept_in_float32():
    samples = [{"x": normal(4, 16, seed=i)} for i in range(4)]
    feed = {"x": normal(8, 16, seed=9)}
    reference = OrtRunner(with_overflow()).run(feed)["y"]
    blind = with_overflow()
    Fp16().run(blind, Context())
    assert np.isinf(node_by_node(blind, feed)["huge"]).any()
    assert not relative(reference, node_by_node(blind, feed)["y"]) < 0.01
    model = with_overflow()
    result = Fp16().run(model, Context(calibration=samples))
    verify(model)
    values = node_by_node(model, feed)
    assert all(np.isfinite(array).all() for array in values.values())
    assert relative(reference, values["y"]) < 3e-3
    assert relative(reference, OrtRunner(model).run(feed)["y"]) < 3e-3
    kinds = {n.name: n.outputs[0].dtype for n in model.graph}
    for name, kind in {"n0": "FLOAT16", "n2": "FLOAT", "n3": "FLOAT", "n5": "FLOAT16"}.items():
        assert kinds[name] == ir.DataType[kind], name
    hidden = np.tanh(np.concatenate([s["x"] for s in samples]) @ normal(16, 16, scale=0.3))
    peak = np.abs(hidden @ normal(16, 16, seed=1, scale=2e4)).max()
    note = next(n for n in result.notes if "'n2'" in n)
    assert f"reaches {peak:.4g}" in note
    assert "65504" in note
    assert not any("'n0'" in n for n in result.notes)
    plan = Fp16().plan(with_overflow(), Context(calibration=samples))
    assert planned_model_bytes(plan, with_overflow()) == stored_bytes(model)


def test_headroom_subnormals_and_masks():
    model = graph_of(
        [
            ("Mul", ["x", "ten"], ["near"], {}),
            ("Mul", ["x", "tiny"], ["low"], {}),
            ("Mul", ["low", "many"], ["back"], {}),
            ("Where", ["m", "x", "never"], ["masked"], {}),
            ("Softmax", ["masked"], ["p"], {"axis": -1}),
            ("Sum", ["near", "back", "p"], ["y"], {}),
        ],
        {"x": (np.float32, [2, 8]), "m": (np.bool_, [2, 8])},
        {"y": [2, 8]},
        {
            "ten": np.array(1e4, np.float32),
            "tiny": np.array(1e-5, np.float32),
            "many": np.array(6e4, np.float32),
            "never": np.array(-np.inf, np.float32),
        },
    )
    x = np.linspace(-2, 2, 16, dtype=np.float32).reshape(2, 8)
    feed = {"x": x, "m": np.arange(16).reshape(2, 8) % 2 == 0}
    reference = OrtRunner(model).run(feed)["y"]
    result = Fp16().run(model, Context(calibration=[feed]))
    verify(model)
    dtypes = {n.name: n.outputs[0].dtype for n in model.graph}
    assert dtypes["n0"] == ir.DataType.FLOAT  # 2e4, and other data may give four times that
    assert dtypes["n1"] == dtypes["n2"] == ir.DataType.FLOAT  # 2e-5 has few bits
    assert dtypes["n3"] == dtypes["n4"] == ir.DataType.FLOAT16  # -inf is a mask, no overflow
    assert any("'n1'" in n and "reaches only 2e-05" in n for n in result.notes)
    assert relative(reference, OrtRunner(model, optimize=False).run(feed)["y"]) < 1e-3


def test_rounding_before_a_softmax_and_sums_of_a_pool():
    model = graph_of(
        [
            ("Mul", ["x", "steep"], ["scores"], {}),
            ("Softmax", ["scores"], ["p"], {"axis": -1}),
            ("Mul", ["x", "wide"], ["image"], {}),
            ("GlobalAveragePool", ["image"], ["g"], {}),
            ("Add", ["p", "g"], ["y"], {}),
        ],
        {"x": (np.float32, [1, 2, 16, 16])},
        {"y": [1, 2, 16, 16]},
        {"steep": np.array(900, np.float32), "wide": np.array(500, np.float32)},
    )
    feed = {"x": np.random.default_rng(0).uniform(0.5, 1, (1, 2, 16, 16)).astype(np.float32)}
    reference = OrtRunner(model).run(feed)["y"]
    notes = Fp16().run(model, Context(calibration=[feed])).notes
    dtypes = {n.name: n.outputs[0].dtype for n in model.graph}
    assert dtypes["n0"] == dtypes["n1"] == dtypes["n3"] == ir.DataType.FLOAT
    assert dtypes["n2"] == ir.DataType.FLOAT16
    assert any("before a Softmax" in n for n in notes)
    assert any("comes of sums" in n for n in notes)
    assert relative(reference, OrtRunner(model, optimize=False).run(feed)["y"]) < 1e-3


def decomposed_norm(square: str) -> ir.Model:
    """RMSNorm of Zhang and Sennrich 2019 as exporters write it, on values of some 1000."""
    squared = ("Mul", ["x", "x"]) if square == "Mul" else ("Pow", ["x", "two"])
    return graph_of(
        [
            (*squared, ["s"], {}),
            ("ReduceMean", ["s", "last"], ["m"], {"keepdims": 1}),
            ("Add", ["m", "epsilon"], ["e"], {}),
            ("Sqrt", ["e"], ["q"], {}),
            ("Reciprocal", ["q"], ["i"], {}),
            ("Mul", ["x", "i"], ["n"], {}),
            ("Mul", ["n", "g"], ["y"], {}),
        ],
        {"x": (np.float32, [4, 32])},
        {"y": [4, 32]},
        {
            "two": np.array(2, np.float32),
            "last": np.array([-1], np.int64),
            "epsilon": np.array(1e-6, np.float32),
            "g": normal(32),
        },
    )


@pytest.mark.parametrize("square", ["Mul", "Pow"])
def test_statistics_of_norms_stay_in_float32_without_data(square):
    model = decomposed_norm(square)
    x = normal(4, 32, scale=1000)
    x[3] = 0  # 1 / sqrt(1e-6) fits; with a smaller epsilon only the Clip keeps it finite
    reference = OrtRunner(model).run({"x": x})["y"]
    Fp16().run(model, Context())
    verify(model)
    dtypes = {n.name: n.outputs[0].dtype for n in model.graph}
    assert all(dtypes[f"n{i}"] == ir.DataType.FLOAT for i in range(5))
    assert dtypes["n5"] == dtypes["n6"] == ir.DataType.FLOAT16
    found = OrtRunner(model, optimize=False).run({"x": x})["y"]
    assert np.isfinite(found).all()
    assert relative(reference, found) < 3e-3


def test_bf16_needs_no_headroom():
    samples = [{"x": normal(4, 16, seed=i)} for i in range(2)]
    model = with_overflow()
    notes = Bf16(arithmetic="yes").run(model, Context(calibration=samples)).notes
    assert not any("reaches" in n for n in notes)


def test_a_bad_sample_is_named():
    with pytest.raises(CalibrationError, match="dimensions"):
        Fp16().run(with_overflow(), Context(calibration=[{"x": normal(16)}]))


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

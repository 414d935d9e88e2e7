"""LSTM in integers, GRU and RNN with stored weights, and weights that integer plans leave over."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgepass.cost.kernels import kernels, runtime_graph
from edgepass.errors import PassOptionError
from edgepass.frontends import load_model
from edgepass.ir.ops import node_cost
from edgepass.ir.quant import planned_model_bytes
from edgepass.ir.verify import verify
from edgepass.passes.base import Context, Pass
from edgepass.passes.quantize.dynamic_int8 import DynamicInt8
from edgepass.passes.quantize.static_int8 import StaticInt8
from edgepass.targets.onnxruntime import OrtRunner
from edgepass.targets.registry import get_target

GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
STEPS, BATCH, INPUT = 7, 3, 24
ALWAYS: list[Pass] = [StaticInt8(recurrent="always"), DynamicInt8(recurrent="always")]


def recurrent(
    kind: str = "LSTM",
    *,
    hidden: int = 16,
    directions: int = 1,
    lengths: bool = False,
    states: bool = False,
    peepholes: bool = False,
    bias: bool = True,
    opset: int = 17,
    **attributes: Any,
) -> onnx.ModelProto:
    rng = np.random.default_rng(5)
    gates = GATES[kind]

    def weight(name: str, *shape: int) -> str:
        # rows and directions of different sizes: one scale for all would show
        sizes = np.exp(rng.uniform(-2, 0.5, (shape[0], shape[1], *([1] * (len(shape) - 2)))))
        array = (rng.standard_normal(shape) * sizes / np.sqrt(shape[-1])).astype(np.float32)
        weights.append(numpy_helper.from_array(array, name))
        return name

    weights: list[onnx.TensorProto] = []
    inputs = ["x", weight("W", directions, gates * hidden, INPUT)]
    inputs.append(weight("R", directions, gates * hidden, hidden))
    inputs.append(weight("B", directions, 2 * gates * hidden) if bias else "")
    feeds = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [STEPS, BATCH, INPUT])]
    if lengths:
        feeds.append(helper.make_tensor_value_info("lengths", TensorProto.INT32, [BATCH]))
    inputs.append("lengths" if lengths else "")
    for name in ("h0", "c0")[: 2 if kind == "LSTM" else 1]:
        if states:
            shape = [directions, BATCH, hidden]
            feeds.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
        inputs.append(name if states else "")
    if peepholes:
        inputs.append(weight("P", directions, 3 * hidden))
    while not inputs[-1]:
        inputs.pop()
    outputs = ["y", "h", "c"] if kind == "LSTM" else ["y", "h"]
    direction = "bidirectional" if directions == 2 else attributes.pop("direction", "forward")
    node = helper.make_node(
        kind, inputs, outputs, "layer", hidden_size=hidden, direction=direction, **attributes
    )
    infos = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs]
    graph = helper.make_graph([node], "g", feeds, infos, weights)
    opsets = [helper.make_opsetid("", opset)]
    proto = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    return onnx.shape_inference.infer_shapes(proto)


def sample(model: ir.Model) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(9)
    return {
        v.name: rng.integers(1, STEPS + 1, v.shape.numpy()).astype(np.int32)
        if v.dtype == ir.DataType.INT32
        else rng.standard_normal(v.shape.numpy()).astype(np.float32)
        for v in model.graph.inputs
    }


def worst(proto: onnx.ModelProto, model: ir.Model) -> float:
    """The largest relative error of a result."""
    feeds = sample(model)
    with OrtRunner(load_model(proto)) as original, OrtRunner(model) as runner:
        found = runner.run(feeds)
        return max(
            float(np.linalg.norm(found[name] - value) / np.linalg.norm(value))
            for name, value in original.run(feeds).items()
        )


def context() -> Context:
    return Context(get_target("x86_64"))


def ops(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


# --- LSTM --------------------------------------------------------------------------------------

FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "reverse": {"direction": "reverse"},
    "bidirectional": {"directions": 2},
    "lengths": {"lengths": True},
    "states": {"states": True},
    "no bias": {"bias": False},
    "all": {"directions": 2, "lengths": True, "states": True, "opset": 11},
    "defaults said": {"activations": ["Sigmoid", "Tanh", "Tanh"]},
}


@pytest.mark.parametrize("item", ALWAYS, ids=lambda p: p.name)
@pytest.mark.parametrize("form", FORMS)
def test_lstm_runs_in_integers(form: str, item: Pass) -> None:
    proto = recurrent(**FORMS[form])
    model = load_model(proto)
    result = item.run(model, context())
    verify(model)
    assert ops(model) == ["DynamicQuantizeLSTM"]
    assert any("LSTM in integers" in note for note in result.notes)
    assert worst(proto, model) < 0.02


def test_rows_have_scales_of_their_own() -> None:
    proto = recurrent(directions=2)
    fine, coarse = load_model(proto), load_model(proto)
    DynamicInt8(recurrent="always").run(fine, context())
    DynamicInt8(recurrent="always", per_channel=False).run(coarse, context())
    assert fine.graph.initializers["W/scale"].shape == ir.Shape([2, 64])
    assert coarse.graph.initializers["W/scale"].shape == ir.Shape([2])
    assert worst(proto, fine) < worst(proto, coarse) < 0.05


@pytest.mark.parametrize(
    ("form", "reason"),
    [
        ({"peepholes": True}, "peepholes"),
        ({"clip": 1.0}, "clipping"),
        ({"input_forget": 1}, "couples"),
        ({"activations": ["Sigmoid", "Relu", "Tanh"]}, "activations"),
    ],
)
def test_unusual_lstms_keep_their_arithmetic(form: dict[str, Any], reason: str) -> None:
    proto = recurrent(**form)
    model = load_model(proto)
    result = DynamicInt8(recurrent="always").run(model, context())
    assert "LSTM" in ops(model)
    assert any(reason in note for note in result.notes)
    assert model.graph.initializers["W/int8"].dtype == ir.DataType.INT8
    assert worst(proto, model) < 0.02


def test_small_lstms_stay_float_unless_told() -> None:
    """The integer kernel is slower below a size; the weights are small in the file all the same."""
    small, large = load_model(recurrent()), load_model(recurrent(hidden=256))
    result = DynamicInt8().run(small, context())
    assert "LSTM" in ops(small)
    assert any("the float kernel is as fast" in note for note in result.notes)
    DynamicInt8().run(large, context())
    assert ops(large) == ["DynamicQuantizeLSTM"]
    never = load_model(recurrent(hidden=256))
    DynamicInt8(recurrent="never").run(never, context())
    assert "LSTM" in ops(never)


@pytest.mark.parametrize("target", ["x86_64/tvm", "arm64"])
def test_targets_without_the_kernel_get_stored_weights(target: str) -> None:
    model = load_model(recurrent(hidden=256))
    DynamicInt8().run(model, Context(get_target(target)))
    assert ("DynamicQuantizeLSTM" in ops(model)) == (target == "arm64")
    assert ("LSTM" in ops(model)) == (target != "arm64")


def test_portable_models_have_standard_operators() -> None:
    model = load_model(recurrent(hidden=256))
    DynamicInt8().run(model, Context(get_target("x86_64"), portable=True))
    assert "DynamicQuantizeLSTM" not in ops(model)


# --- GRU, RNN, and what else is left over ------------------------------------------------------


@pytest.mark.parametrize("kind", ["GRU", "RNN"])
@pytest.mark.parametrize("item", ALWAYS, ids=lambda p: p.name)
def test_gru_and_rnn_store_their_weights(kind: str, item: Pass) -> None:
    proto = recurrent(kind, hidden=32, directions=2, lengths=True, states=True)
    model = load_model(proto)
    result = item.run(model, context())
    verify(model)
    assert any(f"2 {kind}" in note and "stored in 8 bits" in note for note in result.notes)
    assert {"W/int8", "R/int8"} <= set(model.graph.initializers)
    assert worst(proto, model) < 0.02


def transposed() -> onnx.ModelProto:
    """x -> ConvTranspose -> y, MatMul(m, w) -> z: no kernel for one, no reader of the other."""
    rng = np.random.default_rng(2)
    weights = {"wt": (8, 16, 3, 3), "wm": (40, 40)}
    nodes = [
        helper.make_node("ConvTranspose", ["x", "wt"], ["y"], "up"),
        helper.make_node("MatMul", ["m", "wm"], ["z"], "product"),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 8, 5, 5]),
            helper.make_tensor_value_info("m", TensorProto.FLOAT, [3, 40]),
        ],
        [
            helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 16, 7, 7]),
            helper.make_tensor_value_info("z", TensorProto.FLOAT, [3, 40]),
        ],
        [
            numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), name)
            for name, shape in weights.items()
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def names(model: ir.Model) -> set[str]:
    return set(model.graph.initializers)


def test_leftovers_are_stored_and_exclusions_are_not() -> None:
    proto = transposed()
    samples = [sample(load_model(proto))]
    stored = load_model(proto)
    StaticInt8().run(stored, Context(get_target("x86_64"), calibration=samples))
    assert {"wt/int8", "wm/int8"} <= names(stored)
    assert not {"wt", "wm"} & names(stored)
    assert worst(proto, stored) < 0.03
    given = Context(get_target("x86_64"), calibration=samples)
    for item in (StaticInt8(exclude=("up",)), StaticInt8(leftovers="float")):
        model = load_model(proto)
        item.run(model, given)
        assert {"wt", "wm/int8"} <= names(model)
    for item in (DynamicInt8(exclude=("MatMul",)), StaticInt8(exclude=("MatMul",))):
        model = load_model(proto)
        item.run(model, given)
        assert {"wt/int8", "wm"} <= names(model)


@pytest.mark.parametrize("make", [StaticInt8, DynamicInt8])
@pytest.mark.parametrize("option", ["recurrent", "leftovers"])
def test_unknown_words_are_refused(make: type[Pass], option: str) -> None:
    with pytest.raises(PassOptionError, match=f"There is no {option} 'sometimes'"):
        make(**{option: "sometimes"})


# --- the cost model ----------------------------------------------------------------------------


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("directions", [1, 2])
def test_a_plan_is_what_the_pass_writes(directions: int, per_channel: bool) -> None:
    proto = recurrent(hidden=32, directions=directions, states=True)
    item = DynamicInt8(recurrent="always", per_channel=per_channel)
    target = get_target("x86_64")
    before, after, absent = (load_model(proto) for _ in range(3))
    plan = item.plan(before, context())
    assert plan is not None
    assert plan.nodes == ("layer",)
    item.run(after, context())
    item.preview(absent, context())

    def found(model: ir.Model, given: Any = None) -> list[tuple[Any, ...]]:
        return [
            (op.domain, op.type, *(t and (t.shape, t.dtype, t.constant) for t in op.inputs))
            for op in runtime_graph(model, target, given)
        ]

    assert found(before, plan) == found(after) == found(absent)
    assert [k.type for k in kernels(before, target, plan)] == ["DynamicQuantizeLSTM"]
    stored = sum(v.const_value.nbytes for v in after.graph.initializers.values())
    assert planned_model_bytes(plan, before) == stored


def test_an_integer_lstm_has_the_work_of_a_float_one() -> None:
    before, after = (load_model(recurrent(hidden=32, directions=2)) for _ in range(2))
    DynamicInt8(recurrent="always").run(after, context())
    costs = [node_cost(next(iter(model.graph))) for model in (before, after)]
    assert costs[0].macs == costs[1].macs == STEPS * BATCH * 2 * 128 * (INPUT + 32)
    assert costs[0].flops == costs[1].flops

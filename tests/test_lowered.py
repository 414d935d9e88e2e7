"""What int8 writes in other operators: gates and means, joined groups, stacked Gemms."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgepass.ir.edit import Editor
from edgepass.ir.graph import attribute
from edgepass.ir.verify import interface, interface_difference, verify
from edgepass.passes.base import Context
from edgepass.passes.quantize.biases import merge_biases
from edgepass.passes.quantize.groups import widen_groups
from edgepass.passes.quantize.lowered import lower_members
from edgepass.passes.quantize.numbers import Range, activation_affine
from edgepass.passes.quantize.plan import plan_int8
from edgepass.passes.quantize.scheme import SCHEMES
from edgepass.passes.quantize.static_int8 import StaticInt8
from edgepass.targets.onnxruntime import OrtRunner
from test_quantize import (
    graph_of,
    normal,
    optimized_ops,
    sqnr,
    stored_bytes,
    without_weights,
)

SHAPE = [1, 8, 6, 6]
PLAIN = {"protect": False, "leftovers": "float", "observer": "minmax"}


def gate(*rows, opset: int = 17, **more: np.ndarray) -> ir.Model:
    """A convolution, what is in `rows` from `a` to `m`, and a convolution."""
    nodes = [("Conv", ["x", "u", "b"], ["a"], {}), *rows, ("Conv", ["m", "v"], ["y"], {})]
    values = {
        "u": normal(8, 8, 1, 1, seed=1, scale=0.35),
        "v": normal(8, 8, 1, 1, seed=2, scale=0.35),
        "b": normal(8, seed=3),
        **more,
    }
    return graph_of(nodes, {"x": SHAPE}, {"y": SHAPE}, values, opset=opset)


def hard_sigmoid(alpha: float, beta: float, opset: int = 17) -> ir.Model:
    rows = [
        ("HardSigmoid", ["a"], ["s"], {"alpha": alpha, "beta": beta}),
        ("Mul", ["a", "s"], ["m"], {}),
    ]
    return gate(*rows, opset=opset)


def hard_swish(opset: int = 17) -> ir.Model:
    return gate(("HardSwish", ["a"], ["m"], {}), opset=opset)


def silu() -> ir.Model:
    return gate(("Sigmoid", ["a"], ["s"], {}), ("Mul", ["a", "s"], ["m"], {}))


def squeeze_and_excite(mean: str) -> ir.Model:
    pooled = {"axes": [2, 3]} if mean == "ReduceMean" else {}
    rows = [
        ("Relu", ["a"], ["r"], {}),
        (mean, ["r"], ["g"], pooled),
        ("Conv", ["g", "v", "b"], ["h"], {}),
        ("Relu", ["h"], ["hr"], {}),
        ("Conv", ["hr", "t"], ["i"], {}),
        ("HardSigmoid", ["i"], ["s"], {"alpha": 1 / 6}),
        ("Mul", ["r", "s"], ["m"], {}),
    ]
    return gate(*rows, t=normal(8, 8, 1, 1, seed=4, scale=0.35))


def residual_mean() -> ir.Model:
    rows = [
        ("ReduceMean", ["a"], ["g"], {"axes": [-1, -2]}),
        ("Conv", ["g", "t"], ["h"], {}),
        ("Add", ["a", "h"], ["m"], {}),
    ]
    return gate(*rows, t=normal(8, 8, 1, 1, seed=4, scale=0.35))


MODELS = {
    "HardSwish": (hard_swish, {"QLinearAdd": 1, "QLinearMul": 1}),
    "HardSigmoid, default": (
        lambda: hard_sigmoid(0.2, 0.5),
        {"QLinearAdd": 1, "QLinearMul": 1},
    ),
    "HardSigmoid, torch": (lambda: hard_sigmoid(1 / 6, 0.5), {"QLinearAdd": 1, "QLinearMul": 1}),
    "HardSigmoid, no offset": (lambda: hard_sigmoid(1.0, 0.0), {"QLinearAdd": 1, "QLinearMul": 1}),
    "HardSigmoid, offset": (lambda: hard_sigmoid(0.5, 1.2), {"QLinearAdd": 1, "QLinearMul": 1}),
    "HardSigmoid, below": (lambda: hard_sigmoid(0.3, -0.4), {"QLinearAdd": 1, "QLinearMul": 1}),
    "SiLU": (silu, {"QLinearSigmoid": 1, "QLinearMul": 1}),
    "squeeze, ReduceMean": (
        lambda: squeeze_and_excite("ReduceMean"),
        {"QLinearGlobalAveragePool": 1, "QLinearAdd": 1, "QLinearMul": 1},
    ),
    "squeeze, pool": (
        lambda: squeeze_and_excite("GlobalAveragePool"),
        {"QLinearGlobalAveragePool": 1, "QLinearAdd": 1, "QLinearMul": 1},
    ),
    "mean": (residual_mean, {"QLinearGlobalAveragePool": 1, "QLinearAdd": 1}),
}
_FLOAT = ("HardSwish", "HardSigmoid", "Sigmoid", "Mul", "Add", "ReduceMean", "Conv", "Relu")


def samples(count: int, seed: int = 0) -> list[dict[str, np.ndarray]]:
    return [{"x": normal(*SHAPE, seed=100 * seed + i)} for i in range(count)]


def signature(model: ir.Model):
    return interface([*model.graph.inputs, *model.graph.outputs])


def one(model: ir.Model, feed, **options) -> np.ndarray:
    with OrtRunner(model, **options) as runner:
        (result,) = runner.run(feed).values()
    return result


# --- gates and means -----------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["u8s8", "s8s8"])
@pytest.mark.parametrize("name", MODELS)
def test_gates_and_means_run_in_integers(name, scheme, tmp_path):
    make, expected = MODELS[name]
    model = make()
    before = signature(model)
    result = StaticInt8(scheme=scheme, **PLAIN).run(model, Context(calibration=samples(8)))
    assert result.modified
    verify(model)
    assert not interface_difference("value", before, signature(model))
    options = SCHEMES[scheme].session_options
    ops = optimized_ops(model, tmp_path, **options)
    assert {op: ops[op] for op in expected} == expected
    assert not any(ops[op] for op in _FLOAT), ops
    assert ops["QuantizeLinear"] == ops["DequantizeLinear"] == 1
    for feed in samples(3, seed=1):
        integers = one(model, feed, session_options=options)
        step = np.ptp(integers) / 255
        # the pairs computed in float are what the integers stand for
        assert np.abs(integers - one(model, feed, optimize=False)).max() <= 1.01 * step


@pytest.mark.parametrize("name", MODELS)
def test_lowering_costs_no_more_than_rounding_the_function_itself(name):
    """Held against the function in float between the same pairs."""
    make, _ = MODELS[name]
    item = StaticInt8(**PLAIN)
    model, context = make(), Context(calibration=samples(8))
    switched, _ = item.switched(make(), context)
    item.run(model, context)
    assert switched is not None
    with switched:
        for feed in samples(3, seed=1):
            reference = one(make(), feed)
            lowered = one(model, feed, optimize=False)
            (rounded,) = switched.run(feed, switched.every())
            assert np.abs(lowered - rounded).max() <= 3.5 * np.ptp(reference) / 255
            assert sqnr(reference, lowered) > sqnr(reference, rounded) - 3


@given(
    alpha=st.floats(0.02, 2),
    beta=st.floats(-1.5, 1.5),
    low=st.floats(-20, 0),
    high=st.floats(0.1, 20),
    dtype=st.sampled_from([ir.DataType.UINT8, ir.DataType.INT8]),
)
@settings(max_examples=40, deadline=None)
def test_a_lowered_gate_is_the_function_within_a_step(alpha, beta, low, high, dtype):
    """x -> Q -> DQ -> HardSigmoid -> Q -> DQ, as the writer leaves it and lowered."""
    read = activation_affine(Range(low, high), dtype, False)
    written = activation_affine(Range(0.0, 1.0), dtype, False)
    nodes = [
        ("QuantizeLinear", ["x", "rs", "rz"], ["q"], {}),
        ("DequantizeLinear", ["q", "rs", "rz"], ["a"], {}),
        ("HardSigmoid", ["a"], ["s"], {"alpha": alpha, "beta": beta}),
        ("QuantizeLinear", ["s", "ws", "wz"], ["t"], {}),
        ("DequantizeLinear", ["t", "ws", "wz"], ["y"], {}),
    ]
    numbers = {
        "rs": read.scale,
        "rz": read.zero_point,
        "ws": written.scale,
        "wz": written.zero_point,
    }
    plain = graph_of(nodes, {"x": [64]}, {"y": [64]}, numbers)
    lowered = plain.clone()
    lower_members(Editor(), [lowered.graph[2]], dtype)
    assert Counter(n.op_type for n in lowered.graph)["HardSigmoid"] == 0
    feed = {"x": np.linspace(low, high, 64).astype(np.float32)}
    gap = np.abs(one(plain, feed, optimize=False) - one(lowered, feed, optimize=False))
    assert gap.max() <= 1.01 / 255
    assert np.mean(gap > 1e-6) < 0.1  # ties fall either way


def test_what_has_no_integer_form_stays_float():
    kept = {
        "slope down": hard_sigmoid(-0.3, 0.5),
        "also read by an Add": gate(
            ("HardSigmoid", ["a"], ["s"], {}),
            ("Mul", ["a", "s"], ["p"], {}),
            ("Add", ["p", "s"], ["m"], {}),
        ),
    }
    for model in kept.values():
        assert "n1_HardSigmoid" not in plan_int8(model, SCHEMES["u8s8"]).nodes
    for axes, keep in (([1], 1), ([2], 1), ([2, 3], 0), ([1, 2, 3], 1)):
        rows = [("ReduceMean", ["a"], ["g"], {"axes": axes, "keepdims": keep})]
        if keep:
            rows.append(("Add", ["a", "g"], ["m"], {}))
        else:
            rows += [
                ("Reshape", ["g", "to"], ["e"], {}),
                ("Add", ["a", "e"], ["m"], {}),
            ]
        more = {} if keep else {"to": np.array([1, 8, 1, 1], np.int64)}
        plan = plan_int8(gate(*rows, **more), SCHEMES["u8s8"])
        assert "n1_ReduceMean" not in plan.nodes, axes


def test_symmetric_activations_do_not_clip_at_zero():
    for model, name in ((hard_swish(21), "n1_HardSwish"), (hard_sigmoid(0.2, 0.5, 21), "n1_Hard")):
        assert any(n.startswith(name) for n in plan_int8(model, SCHEMES["u8s8"]).nodes)
        assert not any(n.startswith(name) for n in plan_int8(model, SCHEMES["s16s8"]).nodes)
        StaticInt8(scheme="s16s8", **PLAIN).run(model, Context(calibration=samples(4)))
        assert any(node.op_type.startswith("Hard") for node in model.graph)


@pytest.mark.parametrize("scheme", ["u8s8", "s8s8"])
@pytest.mark.parametrize("name", MODELS)
def test_a_preview_without_weights_is_the_real_thing(name, scheme):
    make, _ = MODELS[name]
    real, preview = make(), without_weights(make())
    item = StaticInt8(scheme=scheme, **PLAIN)
    item.run(real, Context(calibration=samples(4)))
    item.preview(preview, Context())

    def rows(model: ir.Model):
        return [
            (n.op_type, [v.name for v in n.inputs if v is not None], [v.name for v in n.outputs])
            for n in model.graph
        ]

    assert rows(preview) == rows(real)
    assert stored_bytes(preview) == stored_bytes(real)
    shapes = {n: (v.const_value.dtype, v.shape) for n, v in real.graph.initializers.items()}
    assert shapes == {
        n: (v.const_value.dtype, v.shape) for n, v in preview.graph.initializers.items()
    }


# --- groups ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("groups", "width", "outputs", "kernel", "limit", "left"),
    [
        (4, 2, 2, (3, 3), 4, 2),
        (4, 2, 2, (3, 3), 8, 1),
        (6, 2, 3, (3, 2), 4, 3),
        (6, 2, 1, (1, 1), 8, 2),  # three groups of two, not four: six has to be divided
        (6, 4, 5, (2,), 8, 3),
        (2, 3, 4, (1, 3, 2), 6, 1),
        (8, 2, 2, (3, 3), 1, 8),
        (8, 1, 2, (3, 3), 64, 8),  # depthwise
    ],
)
def test_joined_groups_are_the_same_convolution(groups, width, outputs, kernel, limit, left):
    rng = np.random.default_rng(groups)
    channels, size = groups * width, [1, groups * width, *[7] * len(kernel)]
    weight = rng.integers(-5, 6, (groups * outputs, width, *kernel)).astype(np.float32)
    bias = rng.integers(-5, 6, groups * outputs).astype(np.float32)
    out = [1, groups * outputs, *(7 - k + 1 for k in kernel)]
    node = ("Conv", ["x", "w", "b"], ["y"], {"group": groups})
    model = graph_of([node], {"x": size}, {"y": out}, {"w": weight, "b": bias})
    feed = {"x": rng.integers(-9, 10, size).astype(np.float32)}
    expected = one(model, feed)
    assert widen_groups(model.graph, limit) == (left != groups)
    verify(model)
    assert attribute(model.graph[0], "group", 1) == left
    assert model.graph[0].inputs[1].shape == ir.Shape([groups * outputs, channels // left, *kernel])
    np.testing.assert_array_equal(one(model, feed), expected)
    stored = [v for v in model.graph.initializers.values() if len(v.shape) > 1]
    assert len(stored) == 1  # the old weight is gone


def test_joined_groups_of_an_architecture():
    node = ("Conv", ["x", "w"], ["y"], {"group": 4})
    size = [1, 8, 5, 5]
    model = without_weights(graph_of([node], {"x": size}, {"y": size}, {"w": normal(8, 2, 1, 1)}))
    assert widen_groups(model.graph, 4) == 1
    assert model.graph[0].inputs[1].shape == ir.Shape([8, 4, 1, 1])


def test_a_weight_of_two_grouped_convolutions():
    size = [1, 8, 5, 5]
    nodes = [
        ("Conv", ["x", "w"], ["a"], {"group": 4}),
        ("Conv", ["a", "w"], ["y"], {"group": 4}),
    ]
    model = graph_of(nodes, {"x": size}, {"y": size}, {"w": normal(8, 2, 1, 1)})
    feed = {"x": normal(*size, seed=5)}
    expected = one(model, feed)
    assert widen_groups(model.graph, 8) == 2
    verify(model)
    np.testing.assert_allclose(one(model, feed), expected, rtol=1e-5, atol=1e-6)


# --- products with a bias ------------------------------------------------------------------------


def product(shape, bias_shape=(12,), *, right=(16, 12)) -> ir.Model:
    out = [*shape[:-1], right[1]]
    nodes = [("MatMul", ["x", "w"], ["p"], {}), ("Add", ["p", "c"], ["y"], {})]
    weights = {"w": normal(*right, scale=0.25), "c": normal(*bias_shape, seed=1)}
    return graph_of(nodes, {"x": shape}, {"y": out}, weights)


@pytest.mark.parametrize("shape", [[2, 7, 16], [2, 3, 5, 16], ["n", 7, 16], [2, "n", 16]])
@pytest.mark.parametrize("bias_shape", [(12,), (1, 12), (1, 1, 12)])
def test_stacked_products_with_a_bias_become_a_gemm(shape, bias_shape, tmp_path):
    model = product(shape, bias_shape)
    before = signature(model)
    feeds = [{"x": normal(*(3 if d == "n" else d for d in shape), seed=20 + i)} for i in range(6)]
    expected = one(model, feeds[0])
    merged = model.clone()
    merge_biases(merged, Context())
    verify(merged)
    kinds = Counter(node.op_type for node in merged.graph)
    assert (kinds["Gemm"], kinds["Reshape"], kinds["MatMul"], kinds["Add"]) == (1, 2, 0, 0)
    np.testing.assert_allclose(one(merged, feeds[0]), expected, rtol=1e-4, atol=1e-5)

    StaticInt8(**PLAIN).run(model, Context(calibration=feeds))
    verify(model)
    assert not interface_difference("value", before, signature(model))
    ops = optimized_ops(model, tmp_path)
    assert ops["QGemm"] == 1
    assert ops["Gemm"] == ops["MatMul"] == ops["Add"] == 0
    for feed in feeds[:2]:
        assert sqnr(one(product(shape, bias_shape), feed), one(model, feed)) > 30


@pytest.mark.parametrize(
    ("shape", "bias_shape"),
    [
        (["n", "m", 16], (12,)),  # the shape of the result can't be written down
        ([2, 7, 16], (7, 12)),  # one bias a row
        ([2, 7, 16], (1,)),
        ([2, 7, 16], (2, 1, 12)),
        ([7, 16], (1, 1, 12)),  # the sum has an axis more than the product
    ],
)
def test_other_sums_stay(shape, bias_shape):
    if len(shape) == 2:
        nodes = [("MatMul", ["x", "w"], ["p"], {}), ("Add", ["p", "c"], ["y"], {})]
        weights = {"w": normal(16, 12), "c": normal(*bias_shape)}
        model = graph_of(nodes, {"x": shape}, {"y": [1, 7, 12]}, weights)
    else:
        model = product(shape, bias_shape)
    merge_biases(model, Context())
    assert [node.op_type for node in model.graph] == ["MatMul", "Add"]
    sizes = [5 if isinstance(d, str) else d for d in shape]
    feeds = [{"x": normal(*sizes, seed=i)} for i in range(6)]
    expected = one(model, feeds[0])
    StaticInt8(**PLAIN).run(model, Context(calibration=feeds))
    assert sqnr(expected, one(model, feeds[0])) > 30


@pytest.mark.parametrize("shape", [[2, 7, 16], ["n", 7, 16]])
@pytest.mark.parametrize("bias_shape", [(12,), (1, 1, 12)])
def test_stacked_products_of_an_architecture(shape, bias_shape):
    real, preview = product(shape, bias_shape), without_weights(product(shape, bias_shape))
    feeds = [{"x": normal(*(3 if d == "n" else d for d in shape), seed=i)} for i in range(4)]
    item = StaticInt8(**PLAIN)
    item.run(real, Context(calibration=feeds))
    item.preview(preview, Context())
    assert [n.op_type for n in preview.graph] == [n.op_type for n in real.graph]
    assert stored_bytes(preview) == stored_bytes(real)


def test_a_sum_read_elsewhere_too():
    """The product has another reader: it stays, and so does its sum."""
    nodes = [
        ("MatMul", ["x", "w"], ["p"], {}),
        ("Add", ["p", "c"], ["s"], {}),
        ("Mul", ["p", "s"], ["y"], {}),
    ]
    weights = {"w": normal(16, 12, scale=0.25), "c": normal(12, seed=1)}
    model = graph_of(nodes, {"x": [2, 7, 16]}, {"y": [2, 7, 12]}, weights)
    merge_biases(model, Context())
    assert Counter(node.op_type for node in model.graph)["MatMul"] == 1

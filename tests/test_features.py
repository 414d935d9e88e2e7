"""What a kernel is described by: attention, pools and reductions as runtimes run them; traces."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from edgepass.architecture import Architecture
from edgepass.cost.attention_shape import Heads, attention_heads
from edgepass.cost.features import features
from edgepass.cost.microbench import Bench
from edgepass.cost.microbench_builder import NetBuilder
from edgepass.cost.operand import Operand
from edgepass.ir.random_weights import fill_random_weights

CONTRIB = "com.microsoft"


def weight(*shape: int) -> Operand:
    return Operand(shape, "float32", True)


@pytest.mark.parametrize(
    ("op", "domain", "inputs", "outputs", "attributes", "expected"),
    [
        (
            "Attention",
            CONTRIB,
            [Operand((2, 50, 64)), weight(64, 192), weight(192)],
            [Operand((2, 50, 64))],
            {"num_heads": 4},
            Heads(8, 50, 50, 16, 2 * 50 * 64 * 192.0),
        ),
        (
            "MultiHeadAttention",
            CONTRIB,
            [*[Operand((1, 7, 32)), Operand((1, 9, 32)), Operand((1, 9, 32))],
             None, None, Operand((1, 2, 7, 9))],
            [Operand((1, 7, 32))],
            {"num_heads": 2},
            Heads(2, 7, 9, 16, biased=True),
        ),
        (
            "GroupQueryAttention",
            CONTRIB,
            [Operand((1, 1, 64)), Operand((1, 1, 32)), Operand((1, 1, 32))],
            [Operand((1, 1, 64)), Operand((1, 2, 33, 16)), Operand((1, 2, 33, 16))],
            {"num_heads": 4, "kv_num_heads": 2},
            Heads(4, 1, 33, 16),
        ),
        (
            "Attention",
            "",
            [Operand((1, 4, 7, 16)), Operand((1, 4, 9, 16)), Operand((1, 4, 9, 16))],
            [Operand((1, 4, 7, 16))],
            {},
            Heads(4, 7, 9, 16),
        ),
    ],
)  # fmt: skip
def test_heads_are_read_off_shapes(op, domain, inputs, outputs, attributes, expected) -> None:
    assert attention_heads(op, domain, inputs, outputs, attributes) == expected
    found = features(op, domain, inputs, outputs, attributes)
    assert found.family == "attention"
    assert found.amounts["score_macs"] == 2.0 * expected.scores * expected.width
    assert found.amounts["macs"] == expected.score_macs + expected.projection_macs


def test_an_attention_of_unknown_layout_is_described_all_the_same() -> None:
    found = features("MultiHeadAttention", CONTRIB, [Operand((4, 4))], [Operand((4, 4))], {}, 99.0)
    assert found.family == "attention"
    assert found.amounts["macs"] == 99.0


def test_pools_of_the_blocked_layout_are_a_class_of_their_own() -> None:
    shapes = [Operand((1, 32, 8, 8))], [Operand((1, 32, 4, 4))]
    plain = features("AveragePool", "", *shapes, {"kernel_shape": (2, 2)})
    blocked = features("AveragePool", "com.microsoft.nchwc", *shapes, {"kernel_shape": (2, 2)})
    assert plain.keys[0] != blocked.keys[0]
    assert plain.family == blocked.family == "pooling"


def test_softmax_along_an_inner_axis_moves_its_elements() -> None:
    shape = Operand((1, 10, 20, 30))
    last = features("Softmax", "", [shape], [shape], {"axis": -1}).amounts
    inner = features("Softmax", "", [shape], [shape], {"axis": 2}).amounts
    assert (last["rows"], last["strided"]) == (200, 0)
    assert (inner["rows"], inner["strided"]) == (300, 6000)


@pytest.mark.parametrize(("activation", "kind"), [("HardSwish", "hard_activated"), ("Relu", "")])
def test_a_hard_activation_costs_a_convolution(activation: str, kind: str) -> None:
    shapes = [Operand((1, 16, 8, 8)), weight(16, 16, 3, 3)], [Operand((1, 16, 8, 8))]
    amounts = features("FusedConv", CONTRIB, *shapes, {"activation": activation}).amounts
    assert {name for name in ("hard_activated", "activated") if amounts[name]} == {kind} - {""}


def test_kernels_without_a_name_are_in_the_trace() -> None:
    """HardSwish is a function to ONNX Runtime: its parts have no name in the graph it saves."""
    b = NetBuilder("unnamed", seed=1)
    x = b.transpose(b.input((1, 6, 10, 8)), 0, 2, 1, 3)
    for _ in range(2):
        x = b.unary("HardSwish", b.transpose(x, 0, 1, 3, 2))
    model = b.model(b.reduce("ReduceMean", x, (2,)))
    with Bench([1], rounds=1) as bench:
        (net,) = bench.run([("unnamed", "fp32", model, {})])
    found = [k.type for k in net.kernels]
    assert found.count("HardSigmoid") == 2
    mean = next(k for k in net.kernels if k.type == "ReduceMean")
    assert mean.inputs[0] is not None
    assert mean.features.dtype == "float32"


def test_scales_that_a_product_applies_are_small() -> None:
    """Weights of dynamic int8 are scaled by a Mul: a scale of about one would overflow softmax."""
    b = NetBuilder("dynamic", seed=1)
    x = b.input((1, 8, 64))
    model = Architecture(b.model(b.softmax(b.linear(x, 64)))).prepared("dynamic-int8", "x86_64")
    drawn = fill_random_weights(model)
    scales = {
        name: value.const_value.numpy()
        for name in drawn
        if (value := model.graph.initializers[name]).const_value.dtype == ir.DataType.FLOAT
        and any(node.op_type == "Mul" for node, _ in value.uses())
    }
    assert scales
    assert all(np.max(array) < 0.01 for array in scales.values())


@pytest.mark.parametrize("recipe", ["fp32", "cleanup"])
def test_the_end_of_a_residual_branch_is_drawn_smaller(recipe: str) -> None:
    """With the sum inside the convolution, and with the sum behind it."""
    b = NetBuilder("residual", seed=1)
    x = b.unary("Relu", b.conv(b.input((1, 64, 8, 8)), 64, 3))
    y = b.conv(b.unary("Relu", b.conv(x, 64, 3)), 64, 3)
    model = Architecture(b.model(b.binary("Add", x, y))).prepared(recipe, "x86_64")
    fill_random_weights(model)
    deviations = sorted(
        float(value.const_value.numpy().std())
        for value in model.graph.initializers.values()
        if len(value.shape) == 4
    )
    assert deviations[0] < 0.4 * deviations[1] <= deviations[2]

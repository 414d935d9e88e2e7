"""Selecting rows early, and mixing heads where they lie: what moves, what does not, the numbers."""

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
from edgepass.passes.driver import run_passes
from edgepass.passes.fuse.row_selection import SelectEarly, SelectRowsEarlier
from edgepass.passes.fuse.talking_heads import (
    ChannelMix,
    MixedHeads,
    SoftmaxOverLast,
    TransposedSoftmax,
)
from edgepass.passes.fuse.tidy import Tidy
from edgepass.passes.probe import Probe, numeric_error, sample_inputs
from edgepass.targets.registry import get_target

HOST = Context(get_target("x86_64"))


def array(*shape):
    return np.random.default_rng(len(shape)).standard_normal(shape).astype(np.float32)


def model_of(nodes, weights, shape, outputs=("y",), opset=20):
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", 1, shape)],
        [helper.make_tensor_value_info(name, 1, None) for name in outputs],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    imports = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    model = load_model(helper.make_model(graph, opset_imports=imports, ir_version=10))
    infer_shapes(model)
    return model


def rewritten(model, *passes):
    probe = Probe(sample_inputs(model))
    before = probe.run(model)
    run_passes(model, list(passes), HOST)
    verify(model)
    assert numeric_error(before, probe.run(model)).relative <= 1e-5
    return [node.op_type for node in model.graph]


def node(op, inputs, output, **attributes):
    return helper.make_node(op, inputs.split(), [output], **attributes)


def block(selection, shape=(2, 9, 16)):
    """A residual layer, its normalization, and what is selected of that."""
    weights = {
        "s": array(16),
        "b": array(16),
        "w": array(16, 32),
        "c": array(32),
        "v": array(32, 16),
        "p": array(1, 9, 16),
        "i": np.array(0, np.int64),
        "j": np.array([-1], np.int64),
        "k": np.array([0, 1], np.int64),
    }
    nodes = [
        node("Add", "x p", "a"),
        node("LayerNormalization", "a s b", "n", axis=-1),
        node("MatMul", "n w", "h"),
        node("Add", "h c", "g"),
        node("Sigmoid", "g", "r"),
        node("MatMul", "r v", "m"),
        node("Add", "a m", "z"),
        node("LayerNormalization", "z s b", "f", axis=-1),
        *selection,
    ]
    return nodes, weights, shape


@pytest.mark.parametrize("index", ["i", "j"])
def test_one_row_is_selected_before_the_layer_that_computes_it(index):
    nodes, weights, shape = block([node("Gather", f"f {index}", "y", axis=1)])
    model = model_of(nodes, weights, shape)
    left = rewritten(model, SelectEarly(), Tidy())
    assert left[:2] == ["Add", "Gather"]
    assert left.count("Gather") == 1
    assert left.count("Squeeze") == (1 if index == "i" else 0)
    product = next(n for n in model.graph if n.op_type == "MatMul")
    assert product.inputs[0].shape[1] == 1


@pytest.mark.parametrize(
    ("selection", "outputs", "words"),
    [
        ([node("Gather", "f k", "y", axis=1)], ("y",), "more than one row"),
        ([node("Gather", "f i", "y", axis=1), node("Neg", "f", "o")], ("y", "o"), "are used too"),
        ([node("Gather", "f i", "y", axis=1)], ("y", "f"), "is an output of the graph"),
        ([node("Softmax", "f", "q", axis=1), node("Gather", "q i", "y", axis=1)], ("y",), "rows"),
    ],
)
def test_rows_are_not_selected_early_where_others_matter(selection, outputs, words):
    nodes, weights, shape = block(selection)
    model = model_of(nodes, weights, shape, outputs)
    assert next(iter(rewritten(model, SelectEarly()))) == "Add"
    root = next(n for n in model.graph if n.op_type == "Gather")
    assert words in explain(SelectRowsEarlier(), root, HOST).reason


def test_rows_are_not_selected_early_for_nothing():
    nodes = [node("Sigmoid", "x", "a"), node("Gather", "a i", "y", axis=1)]
    model = model_of(nodes, {"i": np.array(0, np.int64)}, [2, 5, 4])
    assert rewritten(model, SelectEarly()) == ["Sigmoid", "Gather"]
    root = list(model.graph)[-1]
    assert "nothing costly" in explain(SelectRowsEarlier(), root, HOST).reason


def test_only_the_queries_of_attention_are_selected():
    weights = {"m": array(1, 1, 6, 6), "w": array(32, 8), "i": np.array(0, np.int64)}
    attention = helper.make_node(
        "MultiHeadAttention",
        ["x", "x", "x", "", "", "m"],
        ["a"],
        domain="com.microsoft",
        num_heads=2,
    )
    nodes = [attention, node("MatMul", "a w", "h"), node("Gather", "h i", "y", axis=1)]
    model = model_of(nodes, weights, [2, 6, 32])
    left = rewritten(model, SelectEarly())
    assert left[:2] == ["Gather", "MultiHeadAttention"]
    found = next(n for n in model.graph if n.op_type == "MultiHeadAttention")
    assert [v.shape[1] for v in found.inputs[:3]] == [1, 6, 6]
    assert found.inputs[5].shape.dims == (1, 1, 1, 6)


# --- heads mixed -----------------------------------------------------------------------------


def talking(bias):
    weights = {"v": array(4, 4), "w": array(4, 6), "b": array(6), "c": array(4)}
    nodes = [
        node("Transpose", "x", "t", perm=[0, 2, 3, 1]),
        node("MatMul", "t v", "h"),
        node("Softmax", "h", "p", axis=2),
        node("MatMul", "p w", "m"),
        *([node("Add", "m b", "n")] if bias else []),
        node("Transpose", "n" if bias else "m", "y", perm=[0, 3, 1, 2]),
    ]
    return model_of(nodes, weights, [2, 4, 5, 7])


@pytest.mark.parametrize("bias", [False, True])
def test_heads_are_mixed_by_convolutions_without_transposes(bias):
    assert rewritten(talking(bias), MixedHeads(), Tidy()) == ["Conv", "Softmax", "Conv"]


def test_heads_are_mixed_without_weights():
    model = talking(True)
    for value in model.graph.initializers.values():
        value.const_value = AbsentTensor(value.name, value.dtype, value.shape)
    run_passes(model, [MixedHeads(), Tidy()], HOST)
    assert [n.op_type for n in model.graph] == ["Conv", "Softmax", "Conv"]


@pytest.mark.parametrize(
    ("perm", "columns", "words"),
    [((0, 2, 1, 3), 7, "channels last"), ((0, 2, 3, 1), 20, "up to 16")],
)
def test_other_products_of_transposed_values_stay(perm, columns, words):
    rows = 7 if perm[-1] == 3 else 4
    nodes = [node("Transpose", "x", "t", perm=perm), node("MatMul", "t w", "y")]
    model = model_of(nodes, {"w": array(rows, columns)}, [2, 4, 5, 7])
    assert rewritten(model, MixedHeads()) == ["Transpose", "MatMul"]
    assert words in explain(ChannelMix(), list(model.graph)[-1], HOST).reason


def test_softmax_is_taken_over_the_last_axis():
    nodes = [node("Transpose", "x", "t", perm=[0, 3, 1, 2]), node("Softmax", "t", "y", axis=1)]
    model = model_of(nodes, {}, [2, 4, 5, 7])
    assert rewritten(model, MixedHeads()) == ["Softmax", "Transpose"]
    nodes = [node("Softmax", "x", "s", axis=1), node("Transpose", "s", "y", perm=[0, 2, 1])]
    model = model_of(nodes, {}, [2, 4, 5])
    assert rewritten(model, MixedHeads()) == ["Transpose", "Softmax"]


@pytest.mark.parametrize(
    ("nodes", "rule", "words"),
    [
        (
            [node("Transpose", "x", "t", perm=[0, 2, 1]), node("Softmax", "t", "y", axis=-1)],
            SoftmaxOverLast(),
            "last axis already",
        ),
        (
            [node("Softmax", "x", "s", axis=-1), node("Transpose", "s", "y", perm=[0, 2, 1])],
            TransposedSoftmax(),
            "last axis already",
        ),
        (
            [node("Softmax", "x", "s", axis=0), node("Transpose", "s", "y", perm=[0, 2, 1])],
            TransposedSoftmax(),
            "does not move",
        ),
    ],
)
def test_other_softmaxes_stay(nodes, rule, words):
    model = model_of(nodes, {}, [2, 4, 5])
    assert rewritten(model, MixedHeads()) == [n.op_type for n in nodes]
    assert words in explain(rule, list(model.graph)[-1], HOST).reason


def test_symbolic_batch_stays_symbolic():
    nodes, weights, _ = block([node("Gather", "f i", "y", axis=1)])
    model = model_of(nodes, weights, ["n", 9, 16])
    assert rewritten(model, SelectEarly())[1] == "Gather"
    assert isinstance(model.graph.outputs[0].shape[0], ir.SymbolicDim)

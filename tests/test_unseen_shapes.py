"""Kinds of models that trained models from other places brought along, as small graphs.

Each test is of a shape of model, its outputs or its data that once was quantized badly, slowly or
not at all. Not here: the trained models themselves, and how near int8 comes to float on them.
"""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import edgepass
from edgepass.errors import ShapeError
from edgepass.ir.shapes import infer_shapes
from edgepass.passes.quantize.switched import divergence_over


def test_of_single_probabilities_the_signal_is_how_they_differ_between_samples():
    reference = [[np.array([[0.01]])], [np.array([[0.99]])]]
    found = [[np.array([[0.02]])], [np.array([[0.98]])]]
    pairs = list(zip(reference, found, strict=True))
    assert divergence_over(pairs) == pytest.approx(2e-4 / (2 * 0.49**2))
    assert divergence_over(pairs[:1]) == pytest.approx(1.0)  # one by itself has but its square


def test_divergence_is_the_mean_over_outputs_and_counts_integers_and_what_is_not_finite():
    a = np.array([1.0, 3.0, np.inf])
    same = divergence_over([([a, np.array([1, 2])], [a, np.array([1, 5])])])
    assert same == pytest.approx((0.0 + 0.5) / 2)
    assert divergence_over([([a], [np.array([1.0, np.nan, np.inf])])]) == np.inf
    far = 1e6 + np.array([-1.0, 1.0])
    assert divergence_over([([far], [far + 0.1]), ([far], [far])]) == pytest.approx(0.02 / 4)
    assert divergence_over([([np.zeros(0)], [np.zeros(0)])]) == 0.0


def test_a_sample_in_which_next_to_nothing_happens_does_not_decide():
    rng = np.random.default_rng(0)
    loud, faint = rng.normal(0, 1, 400), rng.normal(0, 1e-4, 400)
    wrong = divergence_over([([loud], [loud]), ([faint], [faint + 1e-3])])
    assert wrong < 1e-4
    half = divergence_over([([loud], [loud]), ([loud / 2], [0 * loud])])
    assert half == pytest.approx(0.5, rel=0.01)  # a quiet one still counts as much as a loud one


# --- what exporters leave behind ---------------------------------------------------------------


@pytest.mark.parametrize("declared", ["1,seqlen", "N,4,7"])
def test_a_declared_output_shape_that_can_t_be_gives_way_as_in_onnx_runtime(declared: str):
    model = onnx.parser.parse_model(f"""<ir_version: 8, opset_import: ["" : 17]>
        g (float[N,4] x) => (float[{declared}] y)
        <int64[1] axes = {{1}}, float[1,4,3] w = {{{", ".join(["0.5"] * 12)}}}>
        {{ h = Relu(x)  i = Unsqueeze(h, axes)  y = MatMul(i, w) }}""")
    compiled = edgepass.compile(model, recipe="int8", calibration=_feeds(4, [2, 4]), force=True)
    result = compiled.run({"x": np.ones((2, 4), np.float32)})["y"]
    np.testing.assert_allclose(result, np.full((2, 1, 3), 2.0), atol=0.1)
    assert "declares a shape that can't be: 'y' is declared" in str(compiled.ledger)
    with pytest.raises(ShapeError, match="declared"):
        infer_shapes(ir.from_proto(model))


def _feeds(count: int, shape: list[int]) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    return [{"x": rng.uniform(-1, 1, shape).astype(np.float32)} for _ in range(count)]


# --- recurrent layers ----------------------------------------------------------------------------


def _speaker_net() -> tuple[onnx.ModelProto, list[dict[str, np.ndarray]]]:
    """An LSTM on inputs of which the telling ones are a thousandth of the loudest."""
    rng = np.random.default_rng(3)
    hidden, channels, steps = 224, 8, 12
    w = rng.normal(0, 1, (1, 4 * hidden, channels)).astype(np.float32)
    w[..., 1:] *= 300
    w[..., 0] *= 0.05
    r = (rng.normal(0, 0.5, (1, 4 * hidden, hidden)) / hidden**0.5).astype(np.float32)
    head = rng.normal(0, 0.2, (hidden, 16)).astype(np.float32)
    make = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [
            onnx.helper.make_node("LSTM", ["x", "w", "r"], ["", "h"], hidden_size=hidden),
            onnx.helper.make_node("Squeeze", ["h", "axes"], ["last"]),
            onnx.helper.make_node("MatMul", ["last", "head"], ["y"]),
        ],
        "speaker",
        [make("x", onnx.TensorProto.FLOAT, [steps, 1, channels])],
        [make("y", onnx.TensorProto.FLOAT, [1, 16])],
        [
            onnx.numpy_helper.from_array(array, name)
            for name, array in (("w", w), ("r", r), ("head", head), ("axes", np.array([0])))
        ],
    )
    model = onnx.helper.make_model(
        graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8
    )
    scales = np.array([3.0] + [0.003] * (channels - 1), np.float32)
    feeds = [
        {"x": (rng.normal(0, 1, (steps, 1, channels)) * scales).astype(np.float32)}
        for _ in range(16)
    ]
    return model, feeds


@pytest.mark.parametrize("recipe", ["int8", "int8_dynamic"])
def test_an_lstm_that_integers_would_ruin_stays_float(recipe: str):
    model, feeds = _speaker_net()

    def compiled(text: str) -> edgepass.Compiled:
        return edgepass.compile(
            model, recipe=text, calibration=feeds[:12], time_budget_s=0, force=True
        )

    float_model = compiled("default")
    expected = np.array([float_model.run(feed)["y"] for feed in feeds[12:]])

    def error(one: edgepass.Compiled) -> float:
        found = np.array([one.run(feed)["y"] for feed in feeds[12:]])
        return float(np.sum((found - expected) ** 2) / np.sum((expected - expected.mean()) ** 2))

    guarded, naive = compiled(recipe), compiled(f"{recipe}{{protect=false}}")
    assert "DynamicQuantizeLSTM" in [node.op_type for node in naive.model.graph]
    assert error(naive) > 0.1
    assert error(guarded) < 0.02
    assert "LSTM" in [node.op_type for node in guarded.model.graph]
    assert "1 of 1 LSTMs and stored weights kept float" in str(guarded.ledger)

"""What is done to a float model before and around int8: scales moved between layers, weights and
biases corrected against calibration data."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgepass.errors import PassOptionError, UsageError
from edgepass.ir.shapes import infer_shapes
from edgepass.ir.verify import verify
from edgepass.passes.base import Context
from edgepass.passes.quantize.adaround import adaround
from edgepass.passes.quantize.capture import channel_stats, gram, grams_in_turn, iterate
from edgepass.passes.quantize.equalize import Equalize
from edgepass.passes.quantize.layers import linear_layer
from edgepass.passes.quantize.moments import Moments
from edgepass.passes.quantize.reconstruct import reconstruct
from edgepass.passes.quantize.smooth_quant import SmoothQuant
from edgepass.passes.quantize.static_int8 import StaticInt8
from edgepass.targets.onnxruntime import OrtRunner
from edgepass.targets.registry import get_target

F32 = np.float32


class Net:
    """A growing graph: `net.Op(...)` adds a node, arrays become weights, and names its result."""

    def __init__(self, seed: int = 0, **inputs: tuple) -> None:
        self.rng = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.inputs = inputs

    def normal(self, *shape: int, uneven: int | None = None) -> np.ndarray:
        """Weights; along axis `uneven` their size differs by orders of magnitude."""
        array = self.rng.standard_normal(shape) / np.sqrt(max(1, np.prod(shape[1:])))
        if uneven is not None:
            factors = np.exp(self.rng.normal(0, 1.5, shape[uneven]))
            array *= factors.reshape([-1 if i == uneven else 1 for i in range(len(shape))])
        return array.astype(F32)

    def put(self, op: str, *args, domain: str = "", **attributes) -> str:
        names = []
        for arg in args:
            if isinstance(arg, np.ndarray):
                self.weights.append(numpy_helper.from_array(arg, f"w{len(self.weights)}"))
                arg = self.weights[-1].name
            names.append(arg or "")
        node = helper.make_node(
            op, names, [f"v{len(self.nodes)}"], f"n{len(self.nodes)}", domain=domain, **attributes
        )
        self.nodes.append(node)
        return node.output[0]

    def __getattr__(self, op: str):
        return lambda *args, **kwargs: self.put(op, *args, **kwargs)

    def model(self, *outputs: str, opset: int = 17) -> ir.Model:
        inputs = [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
            for name, shape in self.inputs.items()
        ]
        results = [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in outputs]
        graph = helper.make_graph(self.nodes, "net", inputs, results, self.weights)
        opsets = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
        model = ir.from_proto(helper.make_model(graph, opset_imports=opsets, ir_version=9))
        infer_shapes(model)
        return model

    def feeds(self, count: int, uneven: int | None = None, **dims: int) -> list[dict]:
        """Samples; along axis `uneven` channels differ by orders of magnitude."""
        found = []
        for i in range(count):
            rng = np.random.default_rng(1000 + i)
            feed = {}
            for name, shape in self.inputs.items():
                size = [dims.get(d, d) for d in shape]
                array = rng.standard_normal(size)
                if uneven is not None:
                    factors = np.exp(np.random.default_rng(7).normal(0, 1.5, size[uneven]))
                    axes = [-1 if i == uneven % len(size) else 1 for i in range(len(size))]
                    array *= factors.reshape(axes)
                feed[name] = array.astype(F32)
            found.append(feed)
        return found


def run(model: ir.Model, feed) -> list[np.ndarray]:
    with OrtRunner(model, optimize=False) as runner:
        return list(runner.run(feed).values())


def difference(a: list[np.ndarray], b: list[np.ndarray]) -> float:
    """The largest difference relative to the largest magnitude of the output."""
    return max(
        float(np.abs(x - y).max() / max(np.abs(x).max(), 1e-20)) for x, y in zip(a, b, strict=True)
    )


# --- graphs whose scales can move ----------------------------------------------------------------


def plain_convs():
    net = Net(x=(2, 3, 10, 10))
    x = net.Conv("x", net.normal(8, 3, 3, 3, uneven=0), net.normal(8), pads=[1] * 4)
    x = net.Relu(x)
    x = net.Conv(x, net.normal(8, 1, 3, 3, uneven=0), net.normal(8), group=8, pads=[1] * 4)
    x = net.LeakyRelu(net.MaxPool(x, kernel_shape=[2, 2], strides=[2, 2]), alpha=0.1)
    x = net.Conv(x, net.normal(12, 4, 1, 1, uneven=0), net.normal(12), group=2)
    x = net.PRelu(x, np.full((12, 1, 1), 0.3, F32))
    x = net.Flatten(net.GlobalAveragePool(net.Conv(x, net.normal(6, 12, 3, 3))))
    return net, net.model(net.Gemm(x, net.normal(5, 6), net.normal(5), transB=1)), 4


def flattened_maps():
    """A channel's scale must be one and the same for all places of a flattened map."""
    net = Net(x=(2, 2, 8, 8))
    x = net.Relu(net.Conv("x", net.normal(4, 2, 3, 3, uneven=0), net.normal(4)))
    x = net.Flatten(net.MaxPool(x, kernel_shape=[3, 3], strides=[3, 3]))
    x = net.Relu(net.Gemm(x, net.normal(16, 7, uneven=1), net.normal(7)))
    return net, net.model(net.Gemm(x, net.normal(7, 3))), 2


def inception():
    """Branches joined by channels, a transposed convolution, a sum of two products."""
    net = Net(x=(1, 3, 6, 6))
    a = net.Relu(net.Conv("x", net.normal(4, 3, 1, 1, uneven=0), net.normal(4)))
    b = net.AveragePool(net.Conv("x", net.normal(5, 3, 1, 1, uneven=0)), kernel_shape=[1, 1])
    x = net.ConvTranspose(net.Concat(a, b, axis=1), net.normal(9, 4, 2, 2), net.normal(4))
    y = net.Conv(net.Conv(x, net.normal(4, 4, 1, 1)), net.normal(4, 4, 1, 1))
    z = net.Conv(net.Identity(y), net.normal(4, 4, 1, 1))
    return net, net.model(z), 4


def encoder(bias: bool = True):
    """Before each product a norm; q, k and v share one; attention carries its values' channels."""
    net = Net(x=("b", "t", 16))
    x = net.LayerNormalization("x", net.normal(16), net.normal(16), axis=-1)
    heads = []
    for perm in ((0, 2, 1, 3), (0, 2, 3, 1), (0, 2, 1, 3)):
        y = net.MatMul(x, net.normal(16, 16, uneven=1))
        y = net.Add(y, net.normal(16)) if bias else y
        y = net.Reshape(y, np.array([0, 0, 4, 4], np.int64))
        heads.append(net.Transpose(y, perm=perm))
    scores = net.Softmax(net.MatMul(heads[0], heads[1]), axis=-1)
    y = net.Transpose(net.MatMul(scores, heads[2]), perm=[0, 2, 1, 3])
    y = net.Reshape(y, np.array([0, 0, 16], np.int64))
    y = net.Add(net.MatMul(y, net.normal(16, 16)), "x")
    z = net.LayerNormalization(y, net.normal(16), axis=-1)
    gate = net.MatMul(z, net.normal(16, 24))
    gate = net.Mul(net.Sigmoid(gate), net.MatMul(z, net.normal(16, 24, uneven=1)))
    return net, net.model(net.Add(net.MatMul(gate, net.normal(24, 16)), y)), 4


def contrib_norms():
    net = Net(x=(1, 5, 8), skip=(1, 5, 8))
    x = net.SkipLayerNormalization(
        "x", "skip", net.normal(8), net.normal(8), net.normal(8), domain="com.microsoft"
    )
    x = net.MatMul(x, net.normal(8, 8, uneven=1))
    x = net.SkipSimplifiedLayerNormalization(x, "skip", net.normal(8), domain="com.microsoft")
    return net, net.model(net.MatMul(x, net.normal(8, 3))), 2


def split_and_divided():
    net = Net(x=(2, 6, 4))
    y = net.MatMul("x", net.normal(4, 6, uneven=1))
    part = net.put("Split", y, np.array([6], np.int64), axis=-1)
    part = net.Div(part, net.rng.uniform(1, 2, 6).astype(F32))
    part = net.Reshape(net.Transpose(part, perm=[1, 0, 2]), np.array([12, 6], np.int64))
    return net, net.model(net.Gemm(part, net.normal(6, 5), net.normal(5))), 1


GRAPHS = [plain_convs, flattened_maps, inception, encoder, contrib_norms, split_and_divided]


@pytest.mark.parametrize("make", GRAPHS, ids=lambda f: f.__name__)
@pytest.mark.parametrize(
    "item",
    [Equalize(), SmoothQuant(alpha="0.7"), SmoothQuant(alpha="0.5", insert=True), SmoothQuant()],
    ids=str,
)
def test_moving_scales_leaves_results_as_they_are(make, item):
    net, model, count = make()
    feeds = net.feeds(3, -1 if len(next(iter(net.inputs.values()))) == 3 else 1, b=2, t=5)
    before = run(model, feeds[0])
    weights = {n: v.const_value.numpy().copy() for n, v in model.graph.initializers.items()}

    result = item.run(model, Context(calibration=feeds))

    verify(model)
    assert difference(before, run(model, feeds[0])) < 1e-4
    if item == SmoothQuant(alpha="0.7"):
        # every activation that can take a scale has got one: its readers' weights have changed
        assert f"smoothed {count} of {count}" in result.notes[0], result.notes
        assert result.modified
    if result.modified:
        now = {n: v.const_value.numpy() for n, v in model.graph.initializers.items()}
        assert any(n not in weights or not np.array_equal(weights[n], a) for n, a in now.items())


def test_what_holds_a_scale_back_is_said():
    net = Net(x=(1, 4, 8))
    x = net.LayerNormalization("x", net.normal(8), axis=-1)
    y = net.Add(net.MatMul(x, net.normal(8, 8)), x)
    y = net.MatMul(net.Gelu(y, domain="com.microsoft"), net.normal(8, 8))
    y = net.Clip(net.MatMul(y, net.normal(8, 8)), np.zeros((), F32))
    y = net.Clip(net.MatMul(y, net.normal(8, 8)), np.zeros((), F32), np.full((), 6, F32))
    z = net.MatMul(y, net.normal(8, 8))
    model = net.model(z, y)
    before = run(model, net.feeds(1)[0])

    result = SmoothQuant(alpha="0.5").run(model, Context(calibration=net.feeds(2)))

    notes = " ".join(result.notes)
    assert "Add reads the activation too" in notes
    assert "Gelu lets no factor through" in notes
    assert "a graph output" in notes
    assert "smoothed 2 of 2" in notes  # before the products behind a MatMul and an open Clip
    assert difference(before, run(model, net.feeds(1)[0])) < 1e-4


def test_a_bound_of_six_stops_a_scale():
    net = Net(x=(1, 3, 6, 6))
    x = net.Conv("x", net.normal(4, 3, 1, 1, uneven=0))
    x = net.Clip(x, np.zeros((), F32), np.full((), 6, F32))
    model = net.model(net.Conv(x, net.normal(4, 4, 1, 1)))

    result = Equalize().run(model, Context())

    assert not result.modified
    assert "Clip at a bound that would scale, too" in " ".join(result.notes)


def test_a_shared_matrix_stays_and_a_shared_bias_is_copied():
    net = Net(x=(1, 8))
    bias = net.normal(8)
    x = net.Relu(net.Gemm("x", net.normal(8, 8, uneven=1), bias))
    shared = net.weights[1].name
    y = net.Gemm(x, net.normal(8, 8))
    big = net.Relu(net.Gemm(net.Relu(y), net.normal(8, 8200)))  # over SMALL, and read twice
    again = net.Gemm(net.Relu(net.Gemm("x", net.normal(8, 8))), net.weights[3].name)
    model = net.model(net.Gemm("x", net.normal(8, 8), shared), again, big)
    matrix = model.graph.initializers[net.weights[3].name].const_value.numpy().copy()
    before = run(model, net.feeds(1)[0])

    result = Equalize().run(model, Context())

    assert result.modified
    assert "a weight is shared or absent" in " ".join(result.notes)
    assert difference(before, run(model, net.feeds(1)[0])) < 1e-5
    stored = {n: v.const_value.numpy() for n, v in model.graph.initializers.items()}
    assert np.array_equal(stored[shared], bias)
    assert np.array_equal(stored[net.weights[3].name], matrix)


def test_equalized_ranges_are_even():
    """Nagel et al.: the ranges of both sides of a channel meet at their geometric mean."""
    net = Net(x=(1, 6))
    model = net.model(
        net.Gemm(net.Relu(net.Gemm("x", net.normal(6, 5, uneven=1))), net.normal(5, 7))
    )
    Equalize().run(model, Context())
    first, second = (v.const_value.numpy() for v in model.graph.initializers.values())
    assert np.abs(first).max(axis=0) == pytest.approx(np.abs(second).max(axis=1), rel=1e-3)


def test_smoothing_follows_the_formula_and_the_best_strength_wins():
    net = Net(x=(4, 16))
    norm = np.exp(net.rng.normal(0, 2, 16)).astype(F32)
    weight = net.normal(16, 8)
    x = net.LayerNormalization("x", norm, axis=-1)
    model = net.model(net.MatMul(x, weight))
    feeds = net.feeds(8)
    value = model.graph[0].outputs[0]
    peak = channel_stats(model, {value: -1}, feeds)[value].peak
    other = model.clone()

    SmoothQuant(alpha="0.5").run(model, Context(calibration=feeds))

    s = peak**0.5 / np.abs(weight).max(axis=1) ** 0.5
    s /= np.exp(np.log(s).mean())  # a common factor changes no product
    found = [v.const_value.numpy() for v in model.graph.initializers.values()]
    assert found[0] == pytest.approx(norm / s, rel=1e-4)
    assert found[1] == pytest.approx(weight * s[:, None], rel=1e-4)

    plain = sqnr_of(other.clone(), StaticInt8(), feeds)
    SmoothQuant().run(other, Context(calibration=feeds))
    assert sqnr_of(other, StaticInt8(), feeds) > plain + 3


@pytest.mark.parametrize("alpha", ["2", "-0.1", "much"])
def test_a_strength_out_of_range_is_refused(alpha):
    with pytest.raises(PassOptionError, match="alpha"):
        SmoothQuant(alpha=alpha)


def test_smoothing_without_samples_is_a_usage_error():
    net = Net(x=(1, 4))
    with pytest.raises(UsageError, match="needs calibration data"):
        SmoothQuant().run(net.model(net.MatMul("x", net.normal(4, 4))), Context())


# --- capturing ------------------------------------------------------------------------------------

CONVS = [
    ((8, 3, 3, 3), (2, 3, 9, 11), {"pads": [1, 1, 1, 1]}),
    (
        (8, 1, 3, 3),
        (2, 4, 9, 11),
        {"group": 4, "strides": [2, 2], "dilations": [2, 1], "pads": [1, 0, 2, 1]},
    ),
    ((6, 4, 5), (2, 4, 20), {"auto_pad": "SAME_LOWER", "strides": [3]}),
    ((6, 4, 5), (2, 4, 20), {"auto_pad": "VALID"}),
    (
        (6, 2, 2, 3, 2),
        (1, 4, 5, 6, 7),
        {"auto_pad": "SAME_UPPER", "strides": [2, 1, 2], "group": 2},
    ),
]


@pytest.mark.parametrize(("kernel", "shape", "attributes"), CONVS)
def test_a_convolution_is_rows_times_a_matrix(kernel, shape, attributes):
    net = Net(x=shape)
    weight, bias = net.normal(*kernel), net.normal(kernel[0])
    model = net.model(net.Conv("x", weight, bias, **attributes))
    node = model.graph[0]
    layer = linear_layer(node)
    feeds = net.feeds(3)
    found = list(iterate(model, [node.inputs[0], node.outputs[0]], feeds))
    rows = [layer.inputs(f["x"], layer.positions(f["x"])) for f in found]
    wanted = [layer.outputs(f["v0"], layer.positions(f["x"])) for f in found]

    for x, y in zip(rows, wanted, strict=True):
        made = x @ layer.matrix(weight) + bias.reshape(layer.groups, 1, -1)
        assert np.abs(made - y).max() < 1e-4
    assert np.array_equal(layer.restore(layer.matrix(weight)), weight)
    assert len(layer.positions(feeds[0]["x"], 5)) == 5

    sums = gram(model, [node], feeds, limit=0)[node]
    x = np.concatenate(rows, axis=1).astype(np.float64)
    assert sums.matrix == pytest.approx(x.swapaxes(1, 2) @ x, rel=1e-4, abs=1e-3)
    assert sums.mean == pytest.approx(x.mean(axis=1), abs=1e-5)
    assert sums.rows == x.shape[1]


def test_sums_come_in_batches_that_fit():
    net = Net(x=(3, 6))
    x = "x"
    for _ in range(4):
        x = net.Relu(net.Gemm(x, net.normal(6, 6)))
    model = net.model(x)
    nodes = [node for node in model.graph if node.op_type == "Gemm"]
    whole = gram(model, nodes, net.feeds(4))
    parts = dict(grams_in_turn(model, nodes, net.feeds(4), budget_bytes=2 * 8 * 36))
    assert list(parts) == nodes
    for node in nodes:
        assert np.array_equal(parts[node].matrix, whole[node].matrix)


def test_statistics_of_channels():
    net = Net(x=(2, 3, 4))
    model = net.model(net.Relu("x"))
    feeds = net.feeds(5)
    value = model.graph.inputs[0]
    stats = channel_stats(model, {value: 1}, feeds)[value]
    rows = np.concatenate([f["x"] for f in feeds]).swapaxes(1, 2).reshape(-1, 3)
    assert stats.low == pytest.approx(rows.min(axis=0))
    assert stats.high == pytest.approx(rows.max(axis=0))
    assert stats.mean == pytest.approx(rows.mean(axis=0), abs=1e-6)
    assert stats.mean_abs == pytest.approx(np.abs(rows).mean(axis=0))
    assert stats.count == len(rows)


# --- corrections of static int8 -------------------------------------------------------------------


def sqnr_of(model: ir.Model, item: StaticInt8, feeds, calibration=None) -> float:
    """Signal to error in dB of a pass, over samples it has not seen where others are given."""
    before = [run(model, feed)[0] for feed in feeds]
    item.run(model, Context(target=get_target("x86_64"), calibration=calibration or feeds))
    verify(model)
    after = [run(model, feed)[0] for feed in feeds]
    signal = sum(float(np.square(a).sum()) for a in before)
    noise = sum(float(np.square(a - b).sum()) for a, b in zip(before, after, strict=True))
    return 10 * np.log10(signal / noise)


def conv_chain():
    net = Net(3, x=(4, 8, 8, 8))
    x = net.Relu(net.Conv("x", net.normal(16, 8, 3, 3, uneven=0), net.normal(16), pads=[1] * 4))
    x = net.Relu(net.Conv(x, net.normal(16, 1, 3, 3, uneven=0), group=16, pads=[1] * 4))
    x = net.Relu(net.Conv(x, net.normal(24, 16, 1, 1), net.normal(24)))
    x = net.Flatten(net.GlobalAveragePool(x))
    x = net.Gemm(x, net.normal(24, 16), net.normal(16))
    return net, net.model(net.MatMul(net.Relu(x), net.normal(16, 8)))


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize(
    "options",
    [{"bias_correction": True}, {"rounding": "adaround"}, {"reconstruct": True},
     {"bias_correction": True, "rounding": "adaround", "reconstruct": True}],
    ids=str,
)  # fmt: skip
def test_corrections_beat_plain_int8_on_unseen_samples(options, per_channel):
    net, model = conv_chain()
    feeds = net.feeds(40)
    plain = sqnr_of(model.clone(), StaticInt8(per_channel=per_channel), feeds[30:], feeds[:30])
    item = StaticInt8(per_channel=per_channel, **options)
    assert sqnr_of(model, item, feeds[30:], feeds[:30]) > plain


def test_a_planted_bias_is_taken_away():
    """Weights that all round the same way, and inputs that are all positive: a constant error."""
    rng = np.random.default_rng(5)
    weight = rng.integers(-100, 100, (3, 64, 8)).astype(F32)
    weight[:, 0] = 127
    weight += np.where(np.abs(weight) < 127, F32(0.4), F32(0))
    net = Net(x=(8, 64))
    net.inputs = {"x": (8, 64)}
    x = net.Gemm("x", weight[0] / 127, net.normal(8))
    model = net.model(net.Identity(x))
    feeds = [{"x": np.abs(f["x"])} for f in net.feeds(20)]
    before = np.concatenate([run(model, f)[0] for f in feeds])

    errors = []
    for flag in (False, True):
        copy = model.clone()
        item = StaticInt8(bias_correction=flag)
        item.run(copy, Context(calibration=feeds))  # scales of 1/127: no reduced range
        errors.append(np.concatenate([run(copy, f)[0] for f in feeds]) - before)

    # what is left is rounding of the result's own pair, if it has one, and of the bias
    assert np.abs(errors[0].mean(axis=0)).min() > 0.05
    assert np.abs(errors[1].mean(axis=0)).max() < 2e-3


def moments_of(layer, x: np.ndarray, y: np.ndarray) -> Moments:
    sums = Moments(layer)
    sums.add(x, y, limit=0)
    return sums


def correlated(net: Net, rows: int, size: int) -> np.ndarray:
    return (net.rng.standard_normal((rows, size // 4)) @ net.normal(size // 4, size)).astype(
        F32
    ) + net.rng.standard_normal((rows, size)).astype(F32) * F32(0.1)


@pytest.mark.parametrize("bits", [4, 8])
def test_adaround_beats_the_nearest_integers(bits):
    net = Net(x=("n", 32))
    weight = net.normal(32, 12)
    model = net.model(net.MatMul("x", weight))
    layer = linear_layer(model.graph[0])
    x = correlated(net, 2000, 32)
    x, unseen = x[:1500], x[1500:]
    limit = 2 ** (bits - 1) - 1
    scale = np.abs(weight).max(axis=0) / limit

    integers = adaround(
        moments_of(layer, x, x @ weight), weight[None], None, scale[None, None], (-limit, limit)
    )[0]

    assert np.array_equal(integers, np.rint(integers))
    assert np.abs(integers - weight / scale).max() < 1 + 1e-6
    nearest = np.rint(weight / scale)

    def error(q: np.ndarray) -> float:
        return float(np.square(unseen @ (q * scale) - unseen @ weight).mean())

    assert error(integers) < 0.6 * error(nearest)


def test_reconstruction_makes_up_for_spoilt_inputs_and_else_does_nothing():
    net = Net(x=("n", 24))
    weight = net.normal(24, 6)
    layer = linear_layer(net.model(net.MatMul("x", weight)).graph[0])
    x = correlated(net, 3000, 24)
    y = x @ weight
    spoilt = np.round(x * np.linspace(0.9, 1.1, 24)).astype(F32)  # coarse, and off in scale

    halves = tuple(moments_of(layer, spoilt[a:b], y[a:b]) for a, b in ((0, 1000), (1000, 2000)))
    solved = reconstruct(halves, weight[None], None)[0]
    left = [np.square((spoilt[2000:] @ w) - y[2000:]).mean() for w in (weight, solved)]
    assert left[1] < 0.95 * left[0]

    halves = tuple(moments_of(layer, x[a:b], y[a:b]) for a, b in ((0, 1000), (1000, 2000)))
    same = reconstruct(halves, weight[None], None)[0]
    assert np.abs(same - weight).max() < 1e-4


def test_corrections_do_not_depend_on_the_order_of_samples():
    net, model = conv_chain()
    feeds = net.feeds(12)
    item = StaticInt8(bias_correction=True, reconstruct=True)
    results = []
    for order in (feeds, feeds[::-1]):
        copy = model.clone()
        item.run(copy, Context(target=get_target("x86_64"), calibration=order))
        results.append(run(copy, feeds[0]))
    assert difference(*results) < 1e-6


def test_notes_and_options_of_corrections():
    net, model = conv_chain()
    item = StaticInt8(bias_correction=True, rounding="adaround", reconstruct=True)
    context = Context(target=get_target("x86_64"), calibration=net.feeds(4))
    notes = " ".join(item.run(model, context).notes)
    assert "of 5 layers: solved the weights of" in notes
    assert "rounded" in notes
    assert "corrected 4 biases" in notes  # the last MatMul has no place for one
    with pytest.raises(PassOptionError, match="rounding"):
        StaticInt8(rounding="upwards")


@pytest.mark.parametrize("scheme", ["u8s8", "s8s8", "u8u8", "s16s8"])
@pytest.mark.parametrize("per_channel", [True, False])
def test_schemes_compute_what_they_say(scheme, per_channel):
    net, model = conv_chain()
    model.graph.opset_imports[""] = 21
    feeds = net.feeds(10)
    plain = sqnr_of(model.clone(), StaticInt8(), feeds)
    found = sqnr_of(model, StaticInt8(scheme=scheme, per_channel=per_channel), feeds)
    if not per_channel:  # the net's channels are uneven, which one scale serves badly
        assert found > 20
    elif scheme == "s16s8":  # what is left is the error of the weights
        assert found > plain + 1
    else:
        assert found > plain - 3


def test_int16_says_that_it_is_not_faster_and_what_opset_it_needs():
    net, model = conv_chain()
    item = StaticInt8(scheme="s16s8")
    with pytest.raises(UsageError, match="no 16-bit QuantizeLinear"):
        item.run(model.clone(), Context(calibration=net.feeds(2)))
    model.graph.opset_imports[""] = 21
    notes = item.run(model, Context(calibration=net.feeds(2))).notes
    assert any("no integer kernels" in note for note in notes)


def test_layers_in_a_row_do_not_make_up_for_the_same_error():
    """Corrected one behind another, mean errors of results vanish instead of being paid twice."""
    net = Net(9, x=(16, 32))
    x = "x"
    for _ in range(6):
        x = net.Relu(net.Gemm(x, net.normal(32, 32), net.normal(32)))
    model = net.model(net.Gemm(x, net.normal(32, 8), net.normal(8)))
    feeds = net.feeds(16)
    before = np.concatenate([run(model, f)[0] for f in feeds])
    errors = []
    for flag in (False, True):
        copy = model.clone()
        StaticInt8(bias_correction=flag, per_channel=False).run(copy, Context(calibration=feeds))
        after = np.concatenate([run(copy, f)[0] for f in feeds])
        errors.append(np.abs((after - before).mean(axis=0)).max())
    assert errors[1] < 0.5 * errors[0]

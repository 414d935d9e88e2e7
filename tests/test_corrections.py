"""What is done to a float model before and around int8: scales moved between layers, weights and
biases corrected against calibration data."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgepass.ir.shapes import infer_shapes
from edgepass.ir.verify import verify
from edgepass.passes.base import Context
from edgepass.passes.quantize.equalize import Equalize
from edgepass.passes.quantize.smooth_quant import SmoothQuant
from edgepass.targets.onnxruntime import OrtRunner

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

"""Random networks of blocks that channels run through, for tests of dependency groups.

Here: `image_network` and `sequence_network`, made from a seed; `choose`, which picks units at
random, `zeroed`, which zeroes the weights they run through, and `outputs`.
"""

from __future__ import annotations

import collections
from collections.abc import Callable

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper, numpy_helper

from edgepass.passes.prune.groups import Group, Groups, parameter_tracks
from edgepass.targets.onnxruntime import OrtRunner

Tensor = tuple[str, tuple[int, ...]]


class Net:
    """Grows a graph; tensors are (name, shape).

    A `calm` one has activations that keep zero wherever a constant would not reach a bias exactly:
    before padded convolutions and products.
    """

    def __init__(self, seed: int):
        self.calm = bool(seed % 2)
        self.rng = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.count = 0

    def op(self, op: str, inputs: list[str], shape: tuple[int, ...], **attributes) -> Tensor:
        self.count += 1
        name = f"v{self.count}"
        self.nodes.append(helper.make_node(op, inputs, [name], f"n{self.count}", **attributes))
        return name, shape

    def ops(self, op: str, inputs: list[str], outputs: int, **attributes) -> list[str]:
        self.count += 1
        names = [f"v{self.count}_{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(op, inputs, names, f"n{self.count}", **attributes))
        return names

    def weight(self, *shape: int, low: float | None = None) -> str:
        scale = 1.0 / np.sqrt(max(1, np.prod(shape[1:]))) if low is None else 1.0
        array = (
            self.rng.normal(size=shape) * scale if low is None else self.rng.uniform(low, 1, shape)
        )
        return self.constant(array.astype(np.float32))

    def constant(self, array: np.ndarray) -> str:
        self.count += 1
        self.weights.append(numpy_helper.from_array(np.asarray(array), f"w{self.count}"))
        return f"w{self.count}"

    def ints(self, *values: int) -> str:
        return self.constant(np.array(values, np.int64))

    def model(self, inputs: list[tuple[str, int, tuple[int, ...]]], results: list[Tensor]):
        graph = helper.make_graph(
            self.nodes,
            "net",
            [helper.make_tensor_value_info(n, t, s) for n, t, s in inputs],
            [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in results],
            self.weights,
        )
        opsets = [helper.make_opsetid("", 23)]
        proto = helper.make_model(graph, opset_imports=opsets, ir_version=10)
        onnx.checker.check_model(proto)
        return ir.from_proto(proto)

    # --- parts --------------------------------------------------------------------------------

    def act(self, x: Tensor, *, free: bool = False) -> Tensor:
        names = ["Relu", "HardSwish", "Gelu", "Tanh"]
        if free or not self.calm:
            names += ["Sigmoid", "HardSigmoid", "Softplus"]
        op = self.rng.choice(names)
        return self.op(str(op), [x[0]], x[1])

    def conv(self, x: Tensor, out: int, kernel: int = 1, group: int = 1, stride: int = 1) -> Tensor:
        n, c, h, w = x[1]
        inputs = [x[0], self.weight(out, c // group, kernel, kernel)]
        if self.rng.random() < 0.6:
            inputs.append(self.weight(out))
        p = kernel // 2
        shape = (n, out, (h + stride - 1) // stride, (w + stride - 1) // stride)
        return self.op("Conv", inputs, shape, group=group, pads=[p] * 4, strides=[stride] * 2)

    def norm(self, x: Tensor) -> Tensor:
        c = x[1][1]
        kind = self.rng.integers(4)
        if kind < 2:
            vectors = [self.weight(c), self.weight(c), self.weight(c), self.weight(c, low=0.5)]
            return self.op("BatchNormalization", [x[0], *vectors], x[1])
        if kind == 2:
            return self.op("InstanceNormalization", [x[0], self.weight(c), self.weight(c)], x[1])
        groups = int(self.rng.choice([1, 2, c]))
        vectors = [self.weight(c), self.weight(c)]
        return self.op("GroupNormalization", [x[0], *vectors], x[1], num_groups=groups)

    def reshape(self, x: Tensor, *shape: int) -> Tensor:
        return self.op("Reshape", [x[0], self.ints(*shape)], shape)

    def transpose(self, x: Tensor, *perm: int) -> Tensor:
        return self.op("Transpose", [x[0]], tuple(x[1][p] for p in perm), perm=perm)

    def linear(self, x: Tensor, out: int, bias: bool | None = None) -> Tensor:
        y = self.op("MatMul", [x[0], self.weight(x[1][-1], out)], (*x[1][:-1], out))
        if self.rng.random() < 0.6 if bias is None else bias:
            y = self.op("Add", [y[0], self.weight(out)], y[1])
        return y

    def layer_norm(self, x: Tensor) -> Tensor:
        c = x[1][-1]
        if self.rng.random() < 0.5:
            return self.op("LayerNormalization", [x[0], self.weight(c), self.weight(c)], x[1])
        return self.op("RMSNormalization", [x[0], self.weight(c)], x[1])

    def split(self, x: Tensor, axis: int, *sizes: int) -> list[Tensor]:
        names = self.ops("Split", [x[0], self.ints(*sizes)], len(sizes), axis=axis)
        return [
            (n, (*x[1][:axis], s, *x[1][axis + 1 :])) for n, s in zip(names, sizes, strict=True)
        ]


# --- blocks of images ----------------------------------------------------------------------------


def plain(net: Net, x: Tensor) -> Tensor:
    y = net.conv(x, int(net.rng.choice([4, 8, 12])), int(net.rng.choice([1, 3])))
    return net.act(net.norm(y) if net.rng.random() < 0.6 else y)


def residual(net: Net, x: Tensor) -> Tensor:
    y = net.conv(plain(net, x), x[1][1], 3)
    return net.act(net.op("Add", [x[0], y[0]], x[1]))


def inverted(net: Net, x: Tensor) -> Tensor:
    wide = net.act(net.conv(x, 2 * x[1][1]))
    deep = net.act(net.norm(net.conv(wide, wide[1][1], 3, group=wide[1][1])))
    y = net.conv(squeeze(net, deep) if net.rng.random() < 0.5 else deep, x[1][1])
    return net.op("Add", [y[0], x[0]], x[1])


def squeeze(net: Net, x: Tensor) -> Tensor:
    n, c, _, _ = x[1]
    if net.rng.random() < 0.5:
        pooled = net.op("GlobalAveragePool", [x[0]], (n, c, 1, 1))
    else:
        pooled = net.op("ReduceMean", [x[0], net.ints(2, 3)], (n, c, 1, 1))
    gate = net.conv(net.act(net.conv(pooled, 6), free=True), c)
    gate = net.op(str(net.rng.choice(["Sigmoid", "HardSigmoid"])), [gate[0]], gate[1])
    return net.op("Mul", [x[0], gate[0]], x[1])


def grouped(net: Net, x: Tensor) -> Tensor:
    y = net.conv(x, 16)
    group = int(net.rng.choice([2, 4]))
    return net.act(net.conv(y, int(net.rng.choice([8, 16])), 3, group=group))


def shuffled(net: Net, x: Tensor) -> Tensor:
    n, c, h, w = x[1]
    y = net.transpose(net.reshape(x, n, 2, c // 2, h, w), 0, 2, 1, 3, 4)
    y = net.reshape(y, n, c, h, w)
    return net.act(net.conv(y, 8, 3, group=2))


def dense(net: Net, x: Tensor) -> Tensor:
    y = plain(net, x)
    return net.op("Concat", [x[0], y[0]], (x[1][0], x[1][1] + y[1][1], *x[1][2:]), axis=1)


def branches(net: Net, x: Tensor) -> Tensor:
    a, b = net.split(x, 1, x[1][1] // 4, x[1][1] - x[1][1] // 4)
    a = plain(net, a)
    start, end = net.ints(0), net.ints(2)
    c = net.op("Slice", [b[0], start, end, net.ints(1)], (x[1][0], 2, *x[1][2:]))
    c = net.conv(c, 4, 3)
    width = a[1][1] + b[1][1] + 4
    return net.op("Concat", [a[0], b[0], c[0]], (x[1][0], width, *x[1][2:]), axis=1)


def padded_shortcut(net: Net, x: Tensor) -> Tensor:
    n, c, h, w = x[1]
    pads = net.ints(0, 2, 0, 0, 0, 2, 0, 0)
    short = net.op("Pad", [x[0], pads], (n, c + 4, h, w))
    y = net.conv(plain(net, x), c + 4, 3)
    return net.op("Relu", [net.op("Add", [short[0], y[0]], y[1])[0]], y[1])


def pixel_shuffle(net: Net, x: Tensor) -> Tensor:
    n, _, h, w = x[1]
    y = net.conv(x, 16)
    kind = net.rng.integers(3)
    if kind < 2:
        mode = ["DCR", "CRD"][kind]
        y = net.op("DepthToSpace", [y[0]], (n, 4, 2 * h, 2 * w), blocksize=2, mode=mode)
    else:
        y = net.transpose(net.reshape(y, n, 4, 2, 2, h, w), 0, 1, 4, 2, 5, 3)
        y = net.reshape(y, n, 4, 2 * h, 2 * w)
    back = net.op("SpaceToDepth", [net.conv(y, 4)[0]], (n, 16, h, w), blocksize=2)
    return net.conv(back, 8)


def channels_last(net: Net, x: Tensor) -> Tensor:
    y = net.transpose(x, 0, 2, 3, 1)
    y = net.linear(net.act(net.linear(net.layer_norm(y), 12), free=True), x[1][1])
    y = net.transpose(y, 0, 3, 1, 2)
    return net.op("Add", [x[0], y[0]], x[1])


def up_and_down(net: Net, x: Tensor) -> Tensor:
    n, c, h, w = x[1]
    weight = net.weight(c, 6, 2, 2)
    y = net.op("ConvTranspose", [x[0], weight, net.weight(6)], (n, 6, 2 * h, 2 * w), strides=[2, 2])
    y = net.act(y, free=True)
    kind = str(net.rng.choice(["MaxPool", "AveragePool"]))
    y = net.op(kind, [y[0]], (n, 6, h, w), kernel_shape=[2, 2], strides=[2, 2])
    return net.conv(y, 8)


def attention_2d(net: Net, x: Tensor) -> Tensor:
    n, c, h, w = x[1]
    qkv = net.reshape(net.conv(x, 24), n, 3, 2, 4, h * w)
    one = [
        net.op("Gather", [qkv[0], net.constant(np.int64(i))], (n, 2, 4, h * w), axis=1)
        for i in range(3)
    ]
    q, k, v = one
    scores = net.op("MatMul", [net.transpose(q, 0, 1, 3, 2)[0], k[0]], (n, 2, h * w, h * w))
    scores = net.op("Softmax", [scores[0]], scores[1], axis=-1)
    y = net.op("MatMul", [v[0], net.transpose(scores, 0, 1, 3, 2)[0]], v[1])
    return net.op("Add", [net.conv(net.reshape(y, n, 8, h, w), c)[0], x[0]], x[1])


IMAGE_BLOCKS: list[Callable[[Net, Tensor], Tensor]] = [
    plain, residual, inverted, squeeze, grouped, shuffled, dense, branches, padded_shortcut,
    pixel_shuffle, channels_last, up_and_down, attention_2d,
]  # fmt: skip


def image_network(seed: int) -> ir.Model:
    """A classifier of three blocks on [2, 3, 8, 8]."""
    net = Net(seed)
    x = plain(net, ("x", (2, 3, 8, 8)))
    for block in net.rng.choice(len(IMAGE_BLOCKS), 3):
        x = IMAGE_BLOCKS[block](net, x)
        if x[1][1] % 4:
            x = net.conv(x, 8)
    n, c, h, w = x[1]
    results = []
    if net.rng.random() < 0.5:
        y = net.op("Flatten", [net.op("GlobalAveragePool", [x[0]], (n, c, 1, 1))[0]], (n, c))
    else:
        y = net.op("Flatten", [x[0]], (n, c * h * w))
    inputs = [y[0], net.weight(5, y[1][1]), net.weight(5)]
    results.append(net.op("Gemm", inputs, (n, 5), transB=1))
    return net.model([("x", TensorProto.FLOAT, (2, 3, 8, 8))], results)


# --- blocks of sequences -------------------------------------------------------------------------


def gated(net: Net, x: Tensor) -> Tensor:
    a, b = net.linear(x, 12), net.linear(x, 12)
    gate = net.op(str(net.rng.choice(["Sigmoid", "HardSwish", "Gelu"])), [a[0]], a[1])
    y = net.op("Mul", [gate[0], b[0]], a[1])
    return net.op("Add", [x[0], net.linear(y, x[1][-1])[0]], x[1])


def fused_gate(net: Net, x: Tensor) -> Tensor:
    a, b = net.split(net.linear(x, 16), 2, 8, 8)
    y = net.op("Mul", [net.op("Sigmoid", [a[0]], a[1])[0], b[0]], b[1])
    return net.linear(y, 8)


def mlp(net: Net, x: Tensor) -> Tensor:
    y = net.linear(net.act(net.linear(net.layer_norm(x), 16), free=True), x[1][-1])
    return net.op("Add", [x[0], y[0]], x[1])


def _attend(net: Net, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    b, heads, t, _ = q[1]
    scores = net.op("MatMul", [q[0], net.transpose(k, 0, 1, 3, 2)[0]], (b, heads, t, t))
    scores = net.op("Softmax", [scores[0]], scores[1], axis=-1)
    y = net.transpose(net.op("MatMul", [scores[0], v[0]], v[1]), 0, 2, 1, 3)
    return net.reshape(y, b, t, heads * v[1][-1])


def fused_attention(net: Net, x: Tensor) -> Tensor:
    b, t, c = x[1]
    qkv = net.transpose(net.reshape(net.linear(x, 24), b, t, 3, 2, 4), 2, 0, 3, 1, 4)
    parts = [
        net.op("Gather", [qkv[0], net.constant(np.int64(i))], (b, 2, t, 4), axis=0)
        for i in range(3)
    ]
    return net.op("Add", [x[0], net.linear(_attend(net, *parts), c)[0]], x[1])


def attention(net: Net, x: Tensor) -> Tensor:
    """Separate projections; sometimes two heads of queries for one of keys, or normed heads."""
    b, t, c = x[1]
    shared = net.rng.random() < 0.4
    normed = net.rng.random() < 0.3
    heads = []
    for count in (4, 2, 2) if shared else (4, 4, 4):
        y = net.reshape(net.linear(net.layer_norm(x), 4 * count), b, t, count, 4)
        y = net.transpose(y, 0, 2, 1, 3)
        heads.append(net.layer_norm(y) if normed and len(heads) < 2 else y)
    if shared:
        for i in (1, 2):
            y = net.op("Unsqueeze", [heads[i][0], net.ints(2)], (b, 2, 1, t, 4))
            y = net.op("Expand", [y[0], net.ints(b, 2, 2, t, 4)], (b, 2, 2, t, 4))
            heads[i] = net.reshape(y, b, 4, t, 4)
    return net.op("Add", [x[0], net.linear(_attend(net, *heads), c)[0]], x[1])


def recurrent(net: Net, x: Tensor) -> Tensor:
    b, t, c = x[1]
    kind, gates = [("LSTM", 4), ("GRU", 3)][int(net.rng.integers(2))]
    ways = int(net.rng.integers(1, 3))
    weights = [net.weight(ways, gates * 6, c), net.weight(ways, gates * 6, 6)]
    weights.append(net.weight(ways, 2 * gates * 6))
    y = net.transpose(x, 1, 0, 2)
    direction = "bidirectional" if ways == 2 else "forward"
    linear = {"linear_before_reset": int(net.rng.integers(2))} if kind == "GRU" else {}
    attributes = {"hidden_size": 6, "direction": direction, **linear}
    y = net.op(kind, [y[0], *weights], (t, ways, b, 6), **attributes)
    y = net.reshape(net.transpose(y, 2, 0, 1, 3), b, t, ways * 6)
    return net.linear(y, 8)


def convolved(net: Net, x: Tensor) -> Tensor:
    b, t, c = x[1]
    y = net.reshape(net.transpose(x, 0, 2, 1), b, c, t, 1)
    y = net.act(net.conv(net.conv(y, 2 * c), 2 * c, 3, group=2 * c), free=True)
    y = net.conv(y, c)
    return net.transpose(net.reshape(y, b, c, t), 0, 2, 1)


SEQUENCE_BLOCKS: list[Callable[[Net, Tensor], Tensor]] = [
    gated, fused_gate, mlp, fused_attention, attention, recurrent, convolved,
]  # fmt: skip


def sequence_network(seed: int) -> ir.Model:
    """Embeddings of tokens [2, 5], three blocks, scores of classes."""
    net = Net(seed)
    x = net.op("Gather", [net.weight(11, 8), "x"], (2, 5, 8))
    x = net.op("Add", [x[0], net.weight(5, 8)], x[1])
    for block in net.rng.choice(len(SEQUENCE_BLOCKS), 3):
        x = SEQUENCE_BLOCKS[block](net, x)
    if net.rng.random() < 0.5:
        y = net.op("ReduceMean", [x[0], net.ints(1)], (2, 8), keepdims=0)
    else:
        y = net.op("Gather", [x[0], net.constant(np.int64(0))], (2, 8), axis=1)
    return net.model([("x", TensorProto.INT64, (2, 5))], [net.linear(y, 5)])


# --- what is done with them ----------------------------------------------------------------------


def outputs(model: ir.Model) -> list[np.ndarray]:
    """What a model gives for inputs made from a seed."""
    rng = np.random.default_rng(7)
    feed = {}
    for value in model.graph.inputs:
        shape = [d if isinstance(d, int) else 3 for d in value.shape]
        feed[value.name] = (
            rng.integers(0, 5, shape)
            if value.dtype == ir.DataType.INT64
            else rng.normal(size=shape).astype(np.float32)
        )
    with OrtRunner(model, optimize=False) as runner:
        return list(runner.run(feed).values())


def choose(groups: Groups, ratio: float, seed: int) -> dict[Group, list[int]]:
    """As many units of each row of a cluster, at random."""
    rng = np.random.default_rng(seed)
    chosen: dict[Group, list[int]] = {}
    clusters = collections.defaultdict(list)
    for group in groups.free:
        clusters[group.cluster].append(group)
    for members in clusters.values():
        rows = [
            (g, np.flatnonzero(g.rows == row)) for g in members for row in range(g.rows.max() + 1)
        ]
        size = len(rows[0][1])
        count = min(round(ratio * size), size - 1)
        for group, units in rows if count else ():
            chosen.setdefault(group, []).extend(rng.choice(units, count, replace=False).tolist())
    return chosen


def zeroed(groups: Groups, chosen: dict[Group, list[int]], *, makers_only: bool) -> None:
    """Zero all weights that units run through, or those that make them only."""
    gone, root = groups.labels_of(chosen), groups.resolved.root
    roles = collections.defaultdict(list)
    for use in groups.flow.uses:
        roles[use.weight].append(use)
    for value, shape, tracks in parameter_tracks(groups.flow):
        array = value.const_value.numpy().reshape(shape)
        for track in tracks:
            ids = root[track.ids].reshape(-1)
            own = {u.role for u in roles[value] if np.array_equal(root[u.ids], ids)}
            if makers_only and "in" in own:
                continue
            mask = gone[track.ids].transpose(np.argsort(track.axes))
            missing = tuple(a for a in range(len(shape)) if a not in track.axes)
            array = np.where(np.expand_dims(mask, missing), np.zeros((), array.dtype), array)
        array = np.ascontiguousarray(array.reshape(value.const_value.shape.numpy()))
        value.const_value = ir.Tensor(array, name=value.name)

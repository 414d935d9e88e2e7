"""Steps that networks are made of, as exporters spell them; see `fuzz_graph`."""

from __future__ import annotations

import math

import numpy as np

from fuzz_graph import Grower, Value, step
from fuzz_steps import f32, i64, static_tail

# --- activations -------------------------------------------------------------------------------


def activation(g: Grower, x: str) -> str:
    """One of many, as one operator or spelled out."""
    kinds = [_simple, _clip, _hard_swish, _hard_sigmoid, _gelu, _gelu_tanh, _quick_gelu]
    return g.choose([*kinds, _silu, _mish, _leaky, _elu, _selu, _sigmoid, _p_relu])(g, x)


def _simple(g: Grower, x: str) -> str:
    return g.node(g.choose(["Relu", "Sigmoid", "Tanh", "LeakyRelu", "Elu", "HardSigmoid"]), x)


def _clip(g: Grower, x: str) -> str:
    low, high = f32(g.choose([0.0, -0.5])), f32(g.choose([6.0, 0.5]))
    kind = int(g.rng.integers(3))
    if kind == 0:
        return g.node("Clip", x, low, high)
    if kind == 1:
        return g.node("Min", g.node("Max", x, low), high)
    return g.node("Max", g.node("Min", high, x), low)


def _gate(g: Grower, x: str) -> str:
    shifted = g.node("Add", x, f32(3))
    return g.node("Clip", shifted, f32(0), f32(6))


def _hard_swish(g: Grower, x: str) -> str:
    kind = int(g.rng.integers(3))
    if kind == 0:
        return g.node("Div", g.node("Mul", x, _gate(g, x)), f32(6))
    if kind == 1:
        return g.node("Mul", x, g.node("HardSigmoid", x, alpha=1 / 6, beta=0.5))
    return g.node("Mul", x, g.node("Div", _gate(g, x), f32(6)))


def _hard_sigmoid(g: Grower, x: str) -> str:
    return g.node("Div", _gate(g, x), f32(6)) if g.chance(0.5) else g.node("HardSigmoid", x)


def _gelu(g: Grower, x: str) -> str:
    if g.chance(0.5):
        inner = g.node("Div", x, f32(math.sqrt(2)))
    else:
        inner = g.node("Mul", x, f32(math.sqrt(0.5)))
    gate = g.node("Add", g.node("Erf", inner), f32(1))
    if g.chance(0.5):
        return g.node("Mul", g.node("Mul", x, gate), f32(0.5))
    return g.node("Mul", g.node("Mul", x, f32(0.5)), gate)


def _gelu_tanh(g: Grower, x: str) -> str:
    cube = g.node("Pow", x, f32(3)) if g.chance(0.5) else g.node("Mul", g.node("Mul", x, x), x)
    inner = g.node("Add", x, g.node("Mul", cube, f32(0.044715)))
    gate = g.node("Add", g.node("Tanh", g.node("Mul", inner, f32(math.sqrt(2 / math.pi)))), f32(1))
    return g.node("Mul", g.node("Mul", x, f32(0.5)), gate)


def _quick_gelu(g: Grower, x: str) -> str:
    return g.node("Mul", x, g.node("Sigmoid", g.node("Mul", x, f32(1.702))))


def _silu(g: Grower, x: str) -> str:
    return g.node("Mul", g.node("Sigmoid", x), x)


def _mish(g: Grower, x: str) -> str:
    return g.node("Mul", x, g.node("Tanh", g.node("Softplus", x)))


def _leaky(g: Grower, x: str) -> str:
    if g.chance(0.5):
        return g.node("LeakyRelu", x, alpha=0.2)
    return g.node("Max", x, g.node("Mul", x, f32(0.1)))


def _elu(g: Grower, x: str) -> str:
    x = g.node("Tanh", x)
    grown = g.node("Sub", g.node("Exp", x), f32(1))
    return g.node("Where", g.node("Greater", x, f32(0)), x, grown)


def _sigmoid(g: Grower, x: str) -> str:
    grown = g.node("Add", g.node("Exp", g.node("Neg", g.node("Tanh", x))), f32(1))
    return g.node("Reciprocal", grown) if g.chance(0.5) else g.node("Div", f32(1), grown)


def _p_relu(g: Grower, x: str) -> str:
    slope = f32(g.choose([0.1, -0.2, 1.5]))
    kind = int(g.rng.integers(3))
    if kind == 0:
        return g.node("PRelu", x, slope)
    if kind == 1:
        below = g.node("Mul", g.node("Neg", g.node("Relu", g.node("Neg", x))), slope)
        return g.node("Add", g.node("Relu", x), below)
    return g.node("Where", g.node("Greater", x, f32(0)), x, g.node("Mul", x, slope))


def _selu(g: Grower, x: str) -> str:
    return g.node("Mul", g.node("Elu", x, alpha=1.5), f32(1.05))


@step(4)
def activations(g: Grower) -> None:
    x = g.pick()
    g.keep(activation(g, x.name), x.shape)


# --- convolutions ------------------------------------------------------------------------------


def _image(g: Grower) -> Value | None:
    return g.pick(
        lambda v: len(v.shape) == 4 and static_tail(v) and v.shape[1] == 4 and min(v.shape[2:]) >= 3
    )


def batch_norm(g: Grower, name: str, channels: int) -> str:
    parts = [g.random(channels) for _ in range(3)]
    return g.node("BatchNormalization", name, *parts, g.random(channels, low=0.5, high=2.0))


def _per_channel(g: Grower, name: str, channels: int) -> str:
    shape = g.choose([(channels, 1, 1), (1, channels, 1, 1), (), (1,)])
    return g.node(g.choose(["Mul", "Add", "Sub"]), name, g.random(*shape, low=0.5, high=1.5))


@step(6)
def convolution(g: Grower) -> None:
    """Affine before, Conv or ConvTranspose, affine and activation after, residual."""
    x = _image(g)
    if x is None:
        return
    name = x.name
    before = int(g.rng.integers(6))
    kernel, group = g.choose([1, 3]), g.choose([1, 1, 2, 4])
    pad = kernel // 2
    options = {"pads": [pad] * 4, "group": group}
    if before == 0:
        name = batch_norm(g, name, 4)
    elif before == 1:
        name = _per_channel(g, name, 4)
    elif before == 2 and pad:
        name = g.node("Pad", name, i64(0, 0, 1, 1, 0, 0, 1, 1))
        options["pads"] = [0] * 4
    inputs = [g.random(4, 4 // group, kernel, kernel)]
    if g.chance(0.5):
        inputs.append(g.random(4))
    out = g.node(g.choose(["Conv", "Conv", "Conv", "ConvTranspose"]), name, *inputs, **options)
    if g.nodes[-1].op_type == "ConvTranspose" and options["pads"] != [pad] * 4:
        return  # it would grow
    for _ in range(int(g.rng.integers(3))):
        out = batch_norm(g, out, 4) if g.chance(0.5) else _per_channel(g, out, 4)
    if g.chance(0.6):
        out = activation(g, out)
    if g.chance(0.3):
        out = g.node("Add", *([out, x.name] if g.chance(0.5) else [x.name, out]))
        out = g.node("Relu", out) if g.chance(0.5) else out
    g.keep(out, x.shape)


@step(2)
def parallel_convolutions(g: Grower) -> None:
    """Two over the same image, added: of one size, or a point and a square."""
    x = _image(g)
    if x is None:
        return
    sizes = g.choose([(3, 3), (3, 1), (1, 1)])
    parts = []
    for kernel in sizes:
        out = g.node("Conv", x.name, g.random(4, 4, kernel, kernel), pads=[kernel // 2] * 4)
        parts.append(batch_norm(g, out, 4) if g.chance(0.3) else out)
    out = g.node("Add", *parts)
    g.keep(g.node("Relu", out) if g.chance(0.5) else out, x.shape)


@step(2)
def pools(g: Grower) -> None:
    x = g.pick(lambda v: len(v.shape) == 4 and static_tail(v) and min(v.shape[2:]) >= 2)
    if x is None:
        return
    kind = int(g.rng.integers(3))
    if kind == 0:
        out = g.node(g.choose(["MaxPool", "AveragePool"]), x.name, kernel_shape=[2, 2])
        g.keep(out, (*x.shape[:2], *(d - 1 for d in x.shape[2:])))
    elif kind == 1:
        out = g.node("Flatten", g.node("GlobalAveragePool", x.name), axis=1)
        g.keep(out, x.shape[:2])
    else:
        squeezed = g.axes("ReduceMean", x.name, [2, 3], keepdims=1)
        gate = g.node("Sigmoid", g.node("Conv", squeezed, g.random(x.shape[1], x.shape[1], 1, 1)))
        g.keep(g.node("Mul", x.name, gate), x.shape)


@step(1)
def norms_of_batches(g: Grower) -> None:
    x = g.pick(lambda v: len(v.shape) >= 3 and isinstance(v.shape[1], int) and v.shape[1] > 0)
    if x is not None:
        g.keep(batch_norm(g, x.name, x.shape[1]), x.shape)


# --- products ----------------------------------------------------------------------------------


def _rows(value: Value) -> bool:
    return len(value.shape) in (2, 3) and value.shape[-1] in (4, 6, 8, 16)


def linear(g: Grower, name: str, rank: int, inner: int, width: int) -> str:
    """x W + b, as MatMul and Add, as Gemm, with W transposed, with a scale."""
    kind = int(g.rng.integers(4))
    if kind == 0 and rank == 2:
        flip = int(g.chance(0.5))
        weight = g.random(width, inner) if flip else g.random(inner, width)
        bias = [g.random(width)] if g.chance(0.6) else []
        out = g.node("Gemm", name, weight, *bias, transB=flip)
        return g.node("Add", out, g.random(width)) if g.chance(0.2) else out
    if kind == 1:
        weight = g.node("Transpose", g.random(width, inner), perm=[1, 0])
        out = g.node("MatMul", name, weight)
    else:
        out = g.node("MatMul", name, g.random(inner, width))
    if g.chance(0.2):
        out = g.node("Mul", out, f32(0.5) if g.chance(0.5) else g.random(width))
    if g.chance(0.6):
        bias = g.random(width)
        out = g.node("Add", *([out, bias] if g.chance(0.5) else [bias, out]))
    return out


@step(4)
def products(g: Grower) -> None:
    x = g.pick(_rows)
    width = g.choose([4, 8, 8, 16])
    out = linear(g, x.name, len(x.shape), x.shape[-1], width)
    if g.chance(0.5):
        out = activation(g, out)
    g.keep(out, (*x.shape[:-1], width))


@step(2)
def product_of_values(g: Grower) -> None:
    """x y^T by Transpose or Einsum, scaled."""
    x = g.pick(lambda v: len(v.shape) == 3 and isinstance(v.shape[-1], int) and v.shape[-1] > 0)
    if x is None:
        return
    if g.chance(0.3):
        out = g.node("Einsum", x.name, x.name, equation="bik,bjk->bij")
    else:
        out = g.node("MatMul", x.name, g.node("Transpose", x.name, perm=[0, 2, 1]))
    out = g.node("Mul", out, f32(0.2)) if g.chance(0.5) else g.node("Div", out, f32(4))
    g.keep(g.node("MatMul", out, x.name), x.shape)


@step(2)
def gated(g: Grower) -> None:
    """A gated MLP: two products, one through an activation; or one product, cut in two."""
    x = g.pick(_rows)
    width = x.shape[-1]
    if g.chance(0.5):
        left, right = (linear(g, x.name, len(x.shape), width, 8) for _ in range(2))
    else:
        whole = linear(g, x.name, len(x.shape), width, 16)
        left, right = g.split(whole, [8, 8], len(x.shape) - 1)
    out = g.node("Mul", activation(g, left), right)
    g.keep(linear(g, out, len(x.shape), 8, 8), (*x.shape[:-1], 8))


# --- normalizations ----------------------------------------------------------------------------


def layer_norm(g: Grower, name: str, width: int) -> str:
    mean = g.axes("ReduceMean", name, [-1], keepdims=1)
    centred = g.node("Sub", name, mean)
    if g.chance(0.5):
        square = g.node("Pow", centred, f32(2))
    else:
        square = g.node("Mul", centred, centred)
    variance = g.node("Add", g.axes("ReduceMean", square, [-1], keepdims=1), f32(1e-2))
    deviation = g.node("Sqrt", variance)
    if g.chance(0.6):
        normal = g.node("Div", centred, deviation)
    else:
        normal = g.node("Mul", centred, g.node("Reciprocal", deviation))
    return _scaled(g, normal, width)


def rms_norm(g: Grower, name: str, width: int) -> str:
    square = g.node("Pow", name, f32(2)) if g.chance(0.5) else g.node("Mul", name, name)
    mean = g.node("Add", g.axes("ReduceMean", square, [-1], keepdims=1), f32(1e-2))
    if g.chance(0.5):
        normal = g.node("Mul", name, g.node("Reciprocal", g.node("Sqrt", mean)))
    else:
        normal = g.node("Div", name, g.node("Sqrt", mean))
    return _scaled(g, normal, width)


def _scaled(g: Grower, normal: str, width: int) -> str:
    if g.chance(0.8):
        scale = g.random(width)
        normal = g.node("Mul", *([normal, scale] if g.chance(0.5) else [scale, normal]))
        if g.chance(0.7):
            normal = g.node("Add", normal, g.random(width))
    return normal


@step(4)
def normalizations(g: Grower) -> None:
    x = g.pick(_rows)
    width, name = x.shape[-1], x.name
    if g.chance(0.3):  # a skip connection
        other = g.pick(lambda v: v.shape == x.shape)
        name = g.node("Add", name, other.name)
    kind = int(g.rng.integers(3))
    if kind == 0 and g.opset >= 17:
        scale, bias = g.random(width), g.random(width)
        out = g.node("LayerNormalization", name, scale, bias, axis=-1, epsilon=1e-2)
        out = g.node("Add", out, g.random(width)) if g.chance(0.3) else out
    elif kind == 1:
        out = rms_norm(g, name, width)
    else:
        out = layer_norm(g, name, width)
    g.keep(out, x.shape)


@step(1)
def group_norms(g: Grower) -> None:
    """GroupNorm by a Reshape to groups and an InstanceNormalization."""
    x = _image(g)
    if x is None:
        return
    size = g.node("Shape", x.name)
    groups = g.node("Reshape", x.name, i64(0, 2, -1))
    normal = g.node("InstanceNormalization", groups, g.random(2), g.random(2), epsilon=1e-2)
    back = g.node("Reshape", normal, size)
    g.keep(g.node("Mul", back, g.random(1, 4, 1, 1)), x.shape)


@step(2)
def softmax(g: Grower) -> None:
    x = g.pick(lambda v: len(v.shape) >= 2 and 0 not in v.shape)
    if g.chance(0.5):
        op = g.choose(["Softmax", "LogSoftmax"])
        g.keep(g.node(op, x.name, axis=g.choose([-1, 1])), x.shape)
        return
    below = g.node("Sub", x.name, g.axes("ReduceMax", x.name, [-1], keepdims=1))
    grown = g.node("Exp", below)
    total = g.axes("ReduceSum", grown, [-1], keepdims=1)
    if g.chance(0.4):
        g.keep(g.node("Sub", below, g.node("Log", total)), x.shape)
    else:
        g.keep(g.node("Div", grown, total), x.shape)


@step(1)
def lengths(g: Grower) -> None:
    """The 2-norm over an axis, spelled out, and a value divided by it."""
    x = g.pick(lambda v: len(v.shape) >= 2 and 0 not in v.shape)
    square = g.node("Pow", x.name, f32(2)) if g.chance(0.5) else g.node("Mul", x.name, x.name)
    length = g.node("Sqrt", g.axes("ReduceSum", square, [-1], keepdims=1))
    g.keep(g.node("Div", x.name, g.node("Add", length, f32(0.1))), x.shape)


@step(2)
def classifiers(g: Grower) -> None:
    """A product and a norm on all rows of the tokens, of which one is taken."""
    x = g.pick(lambda v: v.shape == g.inputs["tokens"][1])
    name = layer_norm(g, x.name, 8) if g.chance(0.5) else x.name
    name = linear(g, name, 3, 8, 8)
    name = activation(g, name) if g.chance(0.5) else name
    row = np.array(g.choose([0, -1]))
    _take(g, name, x, row)


def _take(g: Grower, name: str, x: Value, row: np.ndarray) -> None:
    if g.chance(0.7):
        g.keep(g.node("Gather", name, row, axis=1), (x.shape[0], 8))
    else:
        taken = g.node("Gather", name, row.reshape(1), axis=1)
        g.keep(g.node("Squeeze", taken, i64(1)), (x.shape[0], 8))


# --- attention ---------------------------------------------------------------------------------


def _heads(g: Grower, name: str, heads: int, size: int, perm: list[int]) -> str:
    return g.node("Transpose", g.node("Reshape", name, i64(0, 0, heads, size)), perm=perm)


def _weights(g: Grower, q: str, k: str, size: int) -> str:
    """Softmax of the scaled scores, with a mask in one of its forms."""
    scale = 1 / math.sqrt(size)
    kind = int(g.rng.integers(3))
    if kind == 0:
        q = g.node("Mul", q, f32(scale))
    scores = g.node("MatMul", q, k)
    if kind == 1:
        scores = g.node("Mul", scores, f32(scale))
    elif kind == 2:
        scores = g.node("Div", scores, f32(1 / scale))
    masked = int(g.rng.integers(4))
    if masked == 0:  # ids of padding are not looked at
        hidden = g.node("Cast", g.node("Equal", "ids", np.array(0)), to=1)
        bias = g.node("Mul", hidden, f32(-1e4))
        scores = g.node("Add", scores, g.node("Unsqueeze", bias, i64(1, 2)))
    elif masked == 1:  # causal, computed from the length
        length = g.node("Gather", g.node("Shape", "ids"), np.array(1))
        steps = g.node("Range", np.array(0), length, np.array(1))
        rows, columns = (g.node("Unsqueeze", steps, i64(a)) for a in (1, 0))
        seen = g.node("GreaterOrEqual", rows, columns)
        scores = g.node("Where", seen, scores, f32(-1e9))
    return g.node("Softmax", scores, axis=-1)


@step(4)
def attention(g: Grower) -> None:
    """Self-attention over the tokens, with separate or packed projections, spelled out."""
    x = g.pick(lambda v: v.shape == g.inputs["tokens"][1])
    heads, size = g.choose([(2, 4), (1, 8), (4, 4)])
    width = heads * size
    if g.chance(0.6):
        q, k, v = (linear(g, x.name, 3, 8, width) for _ in range(3))
    else:
        q, k, v = g.split(linear(g, x.name, 3, 8, 3 * width), [width] * 3, 2)
    q = _heads(g, q, heads, size, [0, 2, 1, 3])
    if g.chance(0.6):
        k = _heads(g, k, heads, size, [0, 2, 3, 1])
    else:
        k = g.node("Transpose", _heads(g, k, heads, size, [0, 2, 1, 3]), perm=[0, 1, 3, 2])
    v = _heads(g, v, heads, size, [0, 2, 1, 3])
    out = g.node("MatMul", _weights(g, q, k, size), v)
    out = g.node("Transpose", out, perm=[0, 2, 1, 3])
    out = g.node("Reshape", out, i64(0, 0, width))
    out = linear(g, out, 3, width, 8)
    if g.chance(0.5):
        out = g.node("Add", x.name, out)
    g.keep(out, x.shape)


@step(1)
def rotary(g: Grower) -> None:
    """x * cos + rotate_half(x) * sin over the last axis."""
    x = g.pick(lambda v: len(v.shape) == 3 and v.shape[-1] == 8)
    if x is None:
        return
    angles = g.random(8)
    left, right = (
        g.node("Slice", x.name, i64(a), i64(b), i64(2)) for a, b in ((0, 4), (4, 2**63 - 1))
    )
    turned = g.node("Concat", g.node("Neg", right), left, axis=-1)
    parts = g.node("Mul", x.name, np.cos(angles)), g.node("Mul", turned, np.sin(angles))
    g.keep(g.node("Add", *parts), x.shape)

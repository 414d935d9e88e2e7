"""Random blocks on tokens, [n, t, c]: attention in its many spellings, mixers, decoders.

Each takes the builder and a value and returns one of the same shape. Sizes and variants come from
the builder's random numbers. Not here: blocks on images (`microbench_images`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir

from .microbench_builder import NetBuilder, shape_of

TokenBlock = Callable[[NetBuilder, ir.Value], ir.Value]


def heads_of(b: NetBuilder, channels: int) -> int:
    """A number of heads that divides the channels."""
    wanted = [w for w in (16, 24, 32, 32, 48, 64, 64, 64, 128) if channels % w == 0]
    return channels // b.random.choice(wanted) if wanted else 1


def _unbind(b: NetBuilder, x: ir.Value) -> list[ir.Value]:
    """The slices along the first axis, as one of two exporters writes them."""
    count, *rest = shape_of(x)
    if b.random.random() < 0.3:
        return [b.gather(x, index, 0) for index in range(count)]
    pieces = [b.slice(x, 0, index, index + 1) for index in range(count)]
    axes = b.constant([0])
    return [b.op("Squeeze", [piece, axes], [tuple(rest)])[0] for piece in pieces]


def _projected(b: NetBuilder, x: ir.Value, parts: int, heads: int) -> list[ir.Value]:
    """Queries, keys and values, [n, heads, t, d] each, from one product."""
    n, t, c = shape_of(x)
    y = b.linear(x, parts * c, bias=b.random.random() < 0.8)
    y = b.transpose(b.reshape(y, n, t, parts, heads, c // heads), 2, 0, 3, 1, 4)
    return _unbind(b, y)


def _scores(b: NetBuilder, q: ir.Value, k: ir.Value) -> ir.Value:
    """Scaled products of queries and keys, [n, heads, t, s]."""
    n, heads, s, d = shape_of(k)
    if b.random.random() < 0.5:  # both scaled by the root
        flat = b.transpose(b.reshape(k, n * heads, s, d), 0, 2, 1)
        k = b.reshape(flat, n, heads, d, s)
        root = b.constant([d**-0.25], np.float32)
        return b.matmul(b.binary("Mul", q, root), b.binary("Mul", k, root))
    q = b.binary("Mul", q, b.constant(d**-0.5, np.float32))
    return b.matmul(q, b.transpose(k, 0, 1, 3, 2))


def _merged(b: NetBuilder, y: ir.Value) -> ir.Value:
    n, heads, t, d = shape_of(y)
    return b.reshape(b.transpose(y, 0, 2, 1, 3), n, t, heads * d)


def attention(b: NetBuilder, x: ir.Value) -> ir.Value:
    """Self-attention, plain, with a bias by position, or with mixed heads."""
    _, t, c = shape_of(x)
    heads = heads_of(b, c)
    q, k, v = _projected(b, x, 3, heads)
    scores = _scores(b, q, k)
    kind = b.random.choice(("plain", "plain", "bias", "bias", "talking"))
    if kind == "bias":
        scores = b.scaled(scores, (1, heads, t, t), "Add")
    elif kind == "talking" and heads > 1:
        scores = _mix_heads(b, scores)
        return b.linear(_merged(b, b.matmul(_mix_heads(b, b.softmax(scores)), v)), c)
    return b.linear(_merged(b, b.matmul(b.softmax(scores), v)), c)


def _mix_heads(b: NetBuilder, x: ir.Value) -> ir.Value:
    heads = shape_of(x)[1]
    return b.transpose(b.linear(b.transpose(x, 0, 2, 3, 1), heads), 0, 3, 1, 2)


def reduced_attention(b: NetBuilder, x: ir.Value) -> ir.Value:
    """Keys and values from a coarser grid (pyramid transformers)."""
    n, t, c = shape_of(x)
    side = math.isqrt(t)
    ratio = max((r for r in (1, 2, 4, 8) if side % r == 0 and side // r >= 3), default=1)
    if side * side != t or ratio == 1:
        return attention(b, x)
    heads = heads_of(b, c)
    q = b.transpose(b.reshape(b.linear(x, c), n, t, heads, c // heads), 0, 2, 1, 3)
    image = b.reshape(b.transpose(x, 0, 2, 1), n, c, side, side)
    small = (side // ratio) ** 2
    weight, bias = b.weight((c, c, ratio, ratio)), b.weight((c,))
    b.macs += small * c * c * ratio * ratio
    image = b.op(
        "Conv",
        [image, weight, bias],
        [(n, c, side // ratio, side // ratio)],
        kernel_shape=[ratio, ratio],
        strides=[ratio, ratio],
    )[0]
    tokens = b.layer_norm(b.transpose(b.reshape(image, n, c, small), 0, 2, 1))
    k, v = _projected(b, tokens, 2, heads)
    return b.linear(_merged(b, b.matmul(b.softmax(_scores(b, q, k)), v)), c)


def window_attention(b: NetBuilder, x: ir.Value) -> ir.Value:
    """Attention inside of windows, with positions, shifted at times (Liu et al. 2021)."""
    n, t, c = shape_of(x)
    side = math.isqrt(t)
    size = max((w for w in (4, 6, 7, 8) if side % w == 0), default=0)
    if side * side != t or not size:
        return attention(b, x)
    count = side // size
    grid = b.reshape(x, n, side, side, c)
    shifted = b.random.random() < 0.5 and count > 1
    if shifted:
        grid = _rolled(b, grid, size // 2)
    windows = b.transpose(b.reshape(grid, n, count, size, count, size, c), 0, 1, 3, 2, 4, 5)
    windows = b.reshape(windows, n * count * count, size * size, c)
    heads = heads_of(b, c)
    q, k, v = _projected(b, windows, 3, heads)
    scores = b.scaled(_scores(b, q, k), (1, heads, size * size, size * size), "Add")
    if shifted:
        area = size * size
        parts = b.reshape(scores, n, count * count, heads, area, area)
        parts = b.scaled(parts, (1, count * count, 1, area, area), "Add")
        scores = b.reshape(parts, n * count * count, heads, area, area)
    y = b.linear(_merged(b, b.matmul(b.softmax(scores), v)), c)
    y = b.reshape(y, n, count, count, size, size, c)
    y = b.reshape(b.transpose(y, 0, 1, 3, 2, 4, 5), n, side, side, c)
    if shifted:
        y = _rolled(b, y, side - size // 2)
    return b.reshape(y, n, t, c)


def _rolled(b: NetBuilder, x: ir.Value, by: int) -> ir.Value:
    for axis in (1, 2):
        size = shape_of(x)[axis]
        x = b.concat([b.slice(x, axis, by, size), b.slice(x, axis, 0, by)], axis)
    return x


def channel_cross(b: NetBuilder, x: ir.Value) -> ir.Value:
    """Attention between channels (El-Nouby et al. 2021), or factorized (Xu et al. 2021)."""
    n, t, c = shape_of(x)
    heads = heads_of(b, c)
    q, k, v = _projected(b, x, 3, heads)
    if b.random.random() < 0.5:
        context = b.matmul(b.transpose(b.softmax(k, 2), 0, 1, 3, 2), v)
        y = b.matmul(q, context)
        y = b.binary("Mul", y, b.constant((c // heads) ** -0.5, np.float32))
        return b.linear(_merged(b, y), c)
    q, k, v = (b.transpose(z, 0, 1, 3, 2) for z in (q, k, v))
    norms = [b.reduce("ReduceL2", z, (-1,)) for z in (q, k)]
    q, k = (b.binary("Div", z, norm) for z, norm in zip((q, k), norms, strict=True))
    scores = b.matmul(q, b.transpose(k, 0, 1, 3, 2))
    scores = b.scaled(scores, (heads, 1, 1))
    y = b.matmul(b.softmax(scores), v)
    return b.linear(b.reshape(b.transpose(y, 0, 3, 1, 2), n, t, c), c)


def gated_positions(b: NetBuilder, x: ir.Value) -> ir.Value:
    """Content and position weighed against each other (ConViT)."""
    n, t, c = shape_of(x)
    heads = heads_of(b, c)
    q, k = _projected(b, x, 2, heads)
    v = b.transpose(b.reshape(b.linear(x, c, False), n, t, heads, c // heads), 0, 2, 1, 3)
    patch = b.softmax(_scores(b, q, k))
    position = b.softmax(b.scaled(patch, (1, heads, t, t), "Add"))
    gate = b.weight((1, heads, 1, 1))
    scores = b.binary("Add", b.binary("Mul", patch, gate), b.binary("Mul", position, gate))
    scores = b.binary("Div", scores, b.reduce("ReduceSum", scores, (-1,)))
    return b.linear(_merged(b, b.matmul(scores, v)), c)


def mlp(b: NetBuilder, x: ir.Value) -> ir.Value:
    """Two linear layers and an activation, gated at times."""
    c = shape_of(x)[-1]
    hidden = int(c * b.random.choice((1, 2, 3, 4, 4, 4)))
    kind = b.random.choice(("gelu", "gelu", "gelu", "quick", "relu", "tanh", "swiglu"))
    bias = b.random.random() < 0.9
    y = b.linear(x, hidden, bias)
    match kind:
        case "gelu":
            y = b.unary("Gelu", y)
        case "tanh":
            y = b.unary("Gelu", y, approximate="tanh")
        case "quick":
            scaled = b.binary("Mul", y, b.constant(1.702, np.float32))
            y = b.binary("Mul", y, b.unary("Sigmoid", scaled))
        case "relu":
            y = b.unary("Relu", y)
        case _:
            gate = b.linear(x, hidden, bias)
            y = b.binary("Mul", y, b.binary("Mul", gate, b.unary("Sigmoid", gate)))
    return b.linear(y, c, bias)


def convolved_mlp(b: NetBuilder, x: ir.Value) -> ir.Value:
    """An MLP with a depthwise convolution in its middle."""
    n, t, c = shape_of(x)
    side = math.isqrt(t)
    if side * side != t:
        return mlp(b, x)
    hidden = 4 * c
    y = b.transpose(b.linear(x, hidden), 0, 2, 1)
    y = b.conv(b.reshape(y, n, hidden, side, side), hidden, 3, 1, hidden)
    y = b.transpose(b.reshape(y, n, hidden, t), 0, 2, 1)
    return b.linear(b.unary("Gelu", y), c)


def position_conv(b: NetBuilder, x: ir.Value) -> ir.Value:
    """A depthwise convolution over the tokens' grid, a class token left out of it."""
    n, t, c = shape_of(x)
    side = math.isqrt(t)
    extra = t - side * side
    if extra > 1:
        return x
    tokens = b.slice(x, 1, extra, t) if extra else x
    image = b.reshape(b.transpose(tokens, 0, 2, 1), n, c, side, side)
    y = b.conv(image, c, b.random.choice((3, 3, 5, 7)), 1, c)
    y = b.binary("Add", y, image)
    y = b.transpose(b.reshape(y, n, c, side * side), 0, 2, 1)
    return b.concat([b.slice(x, 1, 0, 1), y], 1) if extra else y


def token_mixer(b: NetBuilder, x: ir.Value) -> ir.Value:
    """An MLP along the tokens (Tolstikhin et al. 2021), gated at times."""
    _, t, c = shape_of(x)
    y = b.transpose(x, 0, 2, 1)
    if b.random.random() < 0.3:
        y = b.transpose(b.linear(y, t), 0, 2, 1)
        left, right = b.split(b.linear(y, 2 * c), [c, c], 2)
        return b.binary("Mul", left, right)
    y = b.linear(b.unary("Gelu", b.linear(y, b.random.choice((2, 4)) * t // 2)), t)
    return b.transpose(y, 0, 2, 1)


def block(
    b: NetBuilder, x: ir.Value, mixer: TokenBlock, feed: TokenBlock, scaled: bool
) -> ir.Value:
    """A mixer and an MLP, each behind a norm and in front of a sum."""
    c = shape_of(x)[-1]
    for part in (mixer, feed):
        y = part(b, b.layer_norm(x))
        if scaled:
            y = b.scaled(y, (c,))
        x = b.binary("Add", x, y)
    return x


# --- decoders, sequences -----------------------------------------------------------------------


def rms_norm(b: NetBuilder, x: ir.Value) -> ir.Value:
    """As exporters spell it: squares, their mean, its root."""
    c = shape_of(x)[-1]
    square = b.binary("Pow", x, b.constant(2.0, np.float32))
    mean = b.reduce("ReduceMean", square, (-1,))
    root = b.unary("Sqrt", b.binary("Add", mean, b.constant(1e-6, np.float32)))
    y = b.binary("Mul", x, b.unary("Reciprocal", root))
    return b.binary("Mul", b.weight((c,)), y)


def _rotated(b: NetBuilder, x: ir.Value, cos: ir.Value, sin: ir.Value) -> ir.Value:
    d = shape_of(x)[-1]
    left, right = b.slice(x, 3, 0, d // 2), b.slice(x, 3, d // 2, d)
    turned = b.concat([b.unary("Neg", right), left], 3)
    return b.binary("Add", b.binary("Mul", x, cos), b.binary("Mul", turned, sin))


def decoder_block(b: NetBuilder, x: ir.Value) -> ir.Value:
    """Causal attention with rotated queries and keys, and a gated MLP (Llama)."""
    n, t, c = shape_of(x)
    heads = heads_of(b, c)
    d = c // heads
    cos, sin = b.weight((1, 1, t, d)), b.weight((1, 1, t, d))
    y = rms_norm(b, x)
    q, k, v = (
        b.transpose(b.reshape(b.linear(y, c, False), n, t, heads, d), 0, 2, 1, 3) for _ in range(3)
    )
    q, k = _rotated(b, q, cos, sin), _rotated(b, k, cos, sin)
    scores = b.matmul(q, b.transpose(k, 0, 1, 3, 2))
    scores = b.binary("Mul", scores, b.constant(d**-0.5, np.float32))
    mask = np.triu(np.full((1, 1, t, t), -1e4, np.float32), 1)
    scores = b.binary("Add", scores, b.constant(mask, np.float32))
    x = b.binary("Add", x, b.linear(_merged(b, b.matmul(b.softmax(scores), v)), c, False))
    y = rms_norm(b, x)
    gate = b.linear(y, 8 * c // 3 // 8 * 8, False)
    up = b.linear(y, 8 * c // 3 // 8 * 8, False)
    gated = b.binary("Mul", b.binary("Mul", gate, b.unary("Sigmoid", gate)), up)
    return b.binary("Add", x, b.linear(gated, c, False))


def recurrent(b: NetBuilder, x: ir.Value) -> ir.Value:
    """An LSTM or GRU over [n, t, c], one or both directions."""
    n, t, c = shape_of(x)
    kind, gates = b.random.choice((("LSTM", 4), ("GRU", 3)))
    hidden = b.random.choice((32, 64, 128, 256, 384))
    both = b.random.random() < 0.4
    directions = 2 if both else 1
    y = b.transpose(x, 1, 0, 2)
    weights = [
        b.weight((directions, gates * hidden, c)),
        b.weight((directions, gates * hidden, hidden)),
        b.weight((directions, 2 * gates * hidden)),
    ]
    b.macs += n * t * directions * gates * hidden * (c + hidden)
    outputs = [(t, directions, n, hidden), (directions, n, hidden)]
    more: dict[str, Any] = {"linear_before_reset": 1} if kind == "GRU" else {}
    if kind == "LSTM":
        outputs.append((directions, n, hidden))
    y = b.op(
        kind,
        [y, *weights],
        outputs,
        hidden_size=hidden,
        direction="bidirectional" if both else "forward",
        **more,
    )[0]
    return b.reshape(b.transpose(y, 2, 0, 1, 3), n, t, directions * hidden)


MIXERS: dict[str, tuple[TokenBlock, ...]] = {
    "attention": (attention,),
    "pyramid": (reduced_attention, reduced_attention, window_attention),
    "windows": (window_attention, window_attention, attention),
    "channels": (channel_cross, gated_positions),
    "mixer": (token_mixer, attention),
}
"""What mixes tokens, by the family of networks that it appears in."""
FEEDS: tuple[TokenBlock, ...] = (mlp, mlp, mlp, convolved_mlp)

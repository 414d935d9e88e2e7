"""Random blocks on images, [n, c, h, w]: what convolutional networks are made of.

Each takes the builder, a value and the wanted channels and stride, and returns a value. Sizes and
variants come from the builder's random numbers. Not here: blocks on tokens (`microbench_tokens`).
"""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from .microbench_builder import NetBuilder, shape_of

Block = Callable[[NetBuilder, ir.Value, int, int, str], ir.Value]
ACTIVATIONS = ("relu", "relu", "silu", "relu6", "hardswish", "gelu", "leaky", "none")


def activate(b: NetBuilder, x: ir.Value, kind: str) -> ir.Value:
    """An activation as exporters write it."""
    match kind:
        case "relu":
            return b.unary("Relu", x)
        case "relu6":
            bounds = [b.constant(bound, "float32") for bound in (0.0, 6.0)]
            return b.op("Clip", [x, *bounds], [shape_of(x)])[0]
        case "silu":
            return b.binary("Mul", x, b.unary("Sigmoid", x))
        case "hardswish":
            return b.unary("HardSwish", x)
        case "gelu":
            return b.unary("Gelu", x)
        case "leaky":
            return b.unary("LeakyRelu", x, alpha=0.01)
        case "mish":
            return b.binary("Mul", x, b.unary("Tanh", b.unary("Softplus", x)))
        case "elu":
            return b.unary("Elu", x)
    return x


def conv_act(
    b: NetBuilder,
    x: ir.Value,
    channels: int,
    act: str,
    kernel: int = 3,
    stride: int = 1,
    groups: int = 1,
    dilation: int = 1,
) -> ir.Value:
    """A convolution and its activation."""
    return activate(b, b.conv(x, channels, kernel, stride, groups, dilation), act)


def squeeze_excite(b: NetBuilder, x: ir.Value, act: str) -> ir.Value:
    """Channels weighted by what their means say (Hu et al. 2018)."""
    channels = shape_of(x)[1]
    middle = max(4, channels // b.random.choice((4, 8, 16)))
    if b.random.random() < 0.5:
        pooled = b.op("GlobalAveragePool", [x], [(*shape_of(x)[:2], 1, 1)])[0]
    else:
        pooled = b.reduce("ReduceMean", x, (2, 3))
    hidden = conv_act(b, pooled, middle, "relu" if act in ("none", "gelu") else act, 1)
    gate = b.conv(hidden, channels, 1)
    gate = b.unary("HardSigmoid" if b.random.random() < 0.3 else "Sigmoid", gate)
    return b.binary("Mul", x, gate)


def _residual(b: NetBuilder, x: ir.Value, y: ir.Value, channels: int, stride: int) -> ir.Value:
    if stride != 1 or shape_of(x)[1] != channels:
        if stride == 2 and b.random.random() < 0.3:
            x = b.pool("AveragePool", x, 2, 2)
            x = _crop(b, x, y)
            stride = 1
        x = b.conv(x, channels, 1, stride)
    return b.binary("Add", y, x)


def _crop(b: NetBuilder, x: ir.Value, like: ir.Value) -> ir.Value:
    """A pooled shortcut of an odd size is one row short: padded to fit."""
    have, want = shape_of(x), shape_of(like)
    if have[2:] == want[2:]:
        return x
    after = [0, 0, want[2] - have[2], want[3] - have[3]]
    return b.pad(x, [0, 0, 0, 0], after, "constant")


def _divisor(b: NetBuilder, channels: int, *wanted: int) -> int:
    fits = [w for w in wanted if channels % w == 0]
    return b.random.choice(fits) if fits else 1


# --- blocks ------------------------------------------------------------------------------------


def plain(b: NetBuilder, x: ir.Value, channels: int, stride: int, act: str) -> ir.Value:
    """Two 3x3 convolutions and a shortcut."""
    dilation = b.random.choice((1, 1, 1, 1, 2))
    y = conv_act(b, x, channels, act, 3, stride)
    y = b.conv(y, channels, 3, dilation=dilation)
    if b.random.random() < 0.15:
        y = squeeze_excite(b, y, act)
    return activate(b, _residual(b, x, y, channels, stride), act)


def chain(b: NetBuilder, x: ir.Value, channels: int, stride: int, act: str) -> ir.Value:
    """Convolutions without a shortcut."""
    kernel = b.random.choice((1, 3, 3, 5))
    return conv_act(b, conv_act(b, x, channels, act, 3, stride), channels, act, kernel)


def bottleneck(b: NetBuilder, x: ir.Value, channels: int, stride: int, act: str) -> ir.Value:
    """1x1, 3x3 (grouped at times), 1x1 and a shortcut."""
    middle = max(8, channels // b.random.choice((2, 4, 4)))
    if b.random.random() < 0.5:
        middle = -(-middle // 32) * 32
    groups = _divisor(b, middle, 1, 1, 2, 4, 8, 32) if middle > 31 else 1
    dilation = b.random.choice((1, 1, 1, 1, 2)) if stride == 1 else 1
    y = conv_act(b, x, middle, act, 1)
    y = conv_act(b, y, middle, act, 3, stride, groups, dilation)
    if b.random.random() < 0.25:
        y = squeeze_excite(b, y, act)
    y = b.conv(y, channels, 1)
    return activate(b, _residual(b, x, y, channels, stride), act)


def wide_groups(b: NetBuilder, x: ir.Value, channels: int, stride: int, act: str) -> ir.Value:
    """A bottleneck whose grouped convolution is as wide as its result (RegNet, ResNeXt)."""
    width = b.random.choice((2, 4, 8, 16, 16, 16, 24, 32, 32, 48, 64))
    channels = max(2 * width, channels // width * width)
    y = conv_act(b, x, channels, act, 1)
    y = conv_act(b, y, channels, act, 3, stride, channels // width)
    if b.random.random() < 0.4:
        y = squeeze_excite(b, y, act)
    return activate(b, _residual(b, x, b.conv(y, channels, 1), channels, stride), act)


def inverted(b: NetBuilder, x: ir.Value, channels: int, stride: int, act: str) -> ir.Value:
    """Expansion, depthwise, projection (Sandler et al. 2018)."""
    before = shape_of(x)[1]
    middle = before * b.random.choice((1, 2, 3, 4, 6, 6))
    kernel = b.random.choice((3, 3, 3, 5, 5, 7, 9))
    y = conv_act(b, x, middle, act, 1) if middle != before else x
    y = conv_act(b, y, middle, act, kernel, stride, middle)
    if b.random.random() < 0.4:
        y = squeeze_excite(b, y, act)
    y = b.conv(y, channels, 1)
    return b.binary("Add", y, x) if stride == 1 and before == channels else y


def fused_inverted(b: NetBuilder, x: ir.Value, channels: int, stride: int, act: str) -> ir.Value:
    """A 3x3 expansion and a projection (EfficientNetV2)."""
    before = shape_of(x)[1]
    y = conv_act(b, x, before * b.random.choice((1, 2, 4)), act, 3, stride)
    y = b.conv(y, channels, 1)
    return b.binary("Add", y, x) if stride == 1 and before == channels else y


def separable(b: NetBuilder, x: ir.Value, channels: int, stride: int, act: str) -> ir.Value:
    """Depthwise and pointwise pairs (Chollet 2017), the activation first."""
    y = x
    for index in range(2):
        before = shape_of(y)[1]
        kernel = b.random.choice((3, 3, 5, 7))
        y = activate(b, y, act) if index else y
        y = b.conv(y, before, kernel, stride if index else 1, before)
        y = b.conv(y, channels, 1)
    return _residual(b, x, y, channels, stride)


def dense(b: NetBuilder, x: ir.Value, channels: int, stride: int, act: str) -> ir.Value:
    """Layers that each read all before them, normalized first (Huang et al. 2017)."""
    growth = b.random.choice((12, 16, 24, 32, 48))
    values = [x]
    for _ in range(b.random.randint(2, 4)):
        y = b.concat(values, 1) if len(values) > 1 else values[0]
        if b.random.random() < 0.6:
            y = activate(b, b.batch_norm(y), "relu")
        y = conv_act(b, y, 4 * growth, "relu", 1)
        values.append(b.conv(y, growth, 3))
    y = b.conv(activate(b, b.batch_norm(b.concat(values, 1)), "relu"), channels, 1)
    return b.pool("AveragePool", y, 2, 2) if stride == 2 else y


def aggregated(b: NetBuilder, x: ir.Value, channels: int, stride: int, act: str) -> ir.Value:
    """A chain of convolutions, all of them concatenated (VoVNet, CSP)."""
    middle = max(8, channels // 4)
    y = conv_act(b, x, middle, act, 3, stride)
    values = [y]
    for _ in range(b.random.randint(2, 4)):
        values.append(conv_act(b, values[-1], middle, act, b.random.choice((1, 3, 3))))
    return conv_act(b, b.concat(values, 1), channels, act, 1)


def cross_stage(b: NetBuilder, x: ir.Value, channels: int, stride: int, act: str) -> ir.Value:
    """Half of the channels go round the blocks (Wang et al. 2020)."""
    half = max(8, channels // 2)
    y = conv_act(b, x, 2 * half, act, 3 if stride == 2 else 1, stride)
    left, right = b.split(y, [half, half], 1)
    for _ in range(b.random.randint(1, 2)):
        middle = conv_act(b, conv_act(b, right, half, act, 1), half, act, 3)
        right = b.binary("Add", right, middle)
    return conv_act(b, b.concat([left, right], 1), channels, act, 1)


def hierarchical(b: NetBuilder, x: ir.Value, channels: int, stride: int, act: str) -> ir.Value:
    """Parts of the channels in a chain of small convolutions (Res2Net)."""
    parts = b.random.choice((3, 4, 4, 8))
    width = max(6, channels // b.random.choice((4, 8)) // parts * 2)
    y = conv_act(b, x, width * parts, act, 1, stride)
    pieces = b.split(y, [width] * parts, 1)
    done = [pieces[0]]
    for piece in pieces[1:]:
        joined = b.binary("Add", piece, done[-1]) if len(done) > 1 else piece
        groups = _divisor(b, width, 1, 1, 2, 4)
        done.append(conv_act(b, joined, width, act, 3, 1, groups))
    y = b.conv(b.concat(done, 1), channels, 1)
    return activate(b, _residual(b, x, y, channels, stride), act)


def shuffled(b: NetBuilder, x: ir.Value, channels: int, stride: int, act: str) -> ir.Value:
    """Channels split, worked on, and shuffled (ShuffleNetV2)."""
    half = max(8, channels // 2)
    y = conv_act(b, x, 2 * half, act, 1, 1)
    left, right = b.split(y, [half, half], 1)
    right = conv_act(b, right, half, act, 1)
    right = b.conv(b.conv(right, half, 3, 1, half), half, 1)
    y = b.concat([left, activate(b, right, act)], 1)
    n, c, h, w = shape_of(y)
    y = b.reshape(b.transpose(b.reshape(y, n, 2, c // 2, h, w), 0, 2, 1, 3, 4), n, c, h, w)
    return conv_act(b, y, channels, act, 3, 2, _divisor(b, channels, 1)) if stride == 2 else y


def mixed(b: NetBuilder, x: ir.Value, channels: int, stride: int, act: str) -> ir.Value:
    """Depthwise convolutions of several sizes side by side (MixNet)."""
    middle = max(32, shape_of(x)[1] * b.random.choice((2, 3, 6)) // 16 * 16)
    y = conv_act(b, x, middle, act, 1)
    parts = b.random.choice((2, 3, 4))
    sizes = [middle // parts] * (parts - 1)
    sizes.append(middle - sum(sizes))
    pieces = b.split(y, sizes, 1)
    y = b.concat(
        [
            b.conv(p, s, 3 + 2 * i, stride, s)
            for i, (p, s) in enumerate(zip(pieces, sizes, strict=True))
        ],
        1,
    )
    y = squeeze_excite(b, activate(b, y, act), act) if b.random.random() < 0.5 else y
    y = b.conv(y, channels, 1)
    same = stride == 1 and shape_of(x)[1] == channels
    return b.binary("Add", y, x) if same else y


def split_attention(b: NetBuilder, x: ir.Value, channels: int, stride: int, act: str) -> ir.Value:
    """Two groups of channels weighted against each other (ResNeSt, selective kernels)."""
    y = conv_act(b, x, channels, "relu", 1)
    n, c, h, w = shape_of(y)
    groups = _divisor(b, c, 2, 2, 4)
    y = conv_act(b, y, 2 * c, "relu", 3, 1, groups)
    parts = b.reshape(y, n, 2, c, h, w)
    pooled = b.reduce("ReduceMean", b.reduce("ReduceSum", parts, (1,), keep=False), (2, 3))
    gate = b.conv(conv_act(b, pooled, max(32, c // 4), "relu", 1), 2 * c, 1)
    gate = b.softmax(b.reshape(gate, n, 2, c), 1)
    y = b.binary("Mul", parts, b.reshape(gate, n, 2, c, 1, 1))
    y = b.reduce("ReduceSum", y, (1,), keep=False)
    if stride == 2:
        y = b.pool("AveragePool", y, 3, 2)
    return activate(b, _residual(b, x, b.conv(y, channels, 1), channels, stride), "relu")


def inception(b: NetBuilder, x: ir.Value, channels: int, stride: int, act: str) -> ir.Value:
    """Branches of other extents, 1xk and kx1 among them (Szegedy et al. 2016)."""
    quarter = max(8, channels // 4)
    k = b.random.choice((3, 7, 7))
    long = conv_act(b, x, quarter, act, 1)
    long = activate(b, b.conv(long, quarter, (1, k)), act)
    long = activate(b, b.conv(long, quarter, (k, 1)), act)
    pooled = b.pool(b.random.choice(("AveragePool", "MaxPool")), x, 3, 1)
    branches = [
        conv_act(b, x, quarter, act, 1),
        long,
        conv_act(b, conv_act(b, x, quarter, act, 1), quarter, act, b.random.choice((3, 5))),
        conv_act(b, pooled, quarter, act, 1),
    ]
    y = b.concat(branches, 1)
    return b.pool("MaxPool", y, 3, 2) if stride == 2 else y


def preactivated(b: NetBuilder, x: ir.Value, channels: int, stride: int, act: str) -> ir.Value:
    """Normalization and activation before the convolutions (He et al. 2016)."""
    middle = max(8, channels // 4)
    y = activate(b, group_norm(b, x) if b.random.random() < 0.4 else b.batch_norm(x), act)
    y = conv_act(b, y, middle, act, 1)
    y = b.conv(conv_act(b, y, middle, act, 3, stride), channels, 1)
    return _residual(b, x, y, channels, stride)


def group_norm(b: NetBuilder, x: ir.Value) -> ir.Value:
    """As exporters spell it: reshaped, normalized by instance, reshaped, scaled."""
    n, c, h, w = shape_of(x)
    groups = _divisor(b, c, 1, 1, 8, 32)
    flat = b.reshape(x, n, groups, c // groups * h * w)
    ones = [b.weight((groups,)), b.weight((groups,))]
    flat = b.op("InstanceNormalization", [flat, *ones], [shape_of(flat)], epsilon=1e-5)[0]
    y = b.scaled(b.reshape(flat, n, c, h, w), (c, 1, 1))
    return b.scaled(y, (c, 1, 1), "Add")


def normalized(b: NetBuilder, x: ir.Value, channels: int, stride: int, act: str) -> ir.Value:
    """A bottleneck with group norms."""
    middle = max(8, channels // 4)
    y = activate(b, group_norm(b, b.conv(x, middle, 1)), act)
    y = activate(b, group_norm(b, b.conv(y, middle, 3, stride)), act)
    y = group_norm(b, b.conv(y, channels, 1))
    return activate(b, _residual(b, x, y, channels, stride), act)


def pool_mixer(b: NetBuilder, x: ir.Value, channels: int, stride: int, act: str) -> ir.Value:
    """Pooling in the place of attention (PoolFormer)."""
    if stride == 2 or shape_of(x)[1] != channels:
        x = b.conv(x, channels, 3, stride)
    y = group_norm(b, x) if b.random.random() < 0.7 else x
    y = b.binary("Sub", b.pool("AveragePool", y, 3, 1), y)
    x = b.binary("Add", x, b.scaled(y, (channels, 1, 1)))
    y = group_norm(b, x) if b.random.random() < 0.7 else x
    y = b.conv(conv_act(b, y, 4 * channels, "gelu", 1), channels, 1)
    return b.binary("Add", x, b.scaled(y, (channels, 1, 1)))


def modern(b: NetBuilder, x: ir.Value, channels: int, stride: int, act: str) -> ir.Value:
    """A large depthwise kernel and an MLP on channels last (ConvNeXt)."""
    if stride == 2 or shape_of(x)[1] != channels:
        x = b.conv(x, channels, 2 if stride == 2 else 1, stride)
    y = b.conv(x, channels, b.random.choice((5, 7, 7, 9)), 1, channels)
    y = b.layer_norm(b.transpose(y, 0, 2, 3, 1))
    y = b.linear(b.unary("Gelu", b.linear(y, 4 * channels)), channels)
    if b.random.random() < 0.6:
        y = b.scaled(y, (channels,))
    return b.binary("Add", x, b.transpose(y, 0, 3, 1, 2))


def blurred(b: NetBuilder, x: ir.Value, channels: int, stride: int, act: str) -> ir.Value:
    """A fixed filter before each step down (Zhang 2019)."""
    y = conv_act(b, x, channels, act, 3)
    if stride == 2:
        y = b.pad(y, (0, 0, 1, 1), (0, 0, 1, 1), "reflect")
        n, c, h, w = shape_of(y)
        y = b.op(
            "Conv",
            [y, b.weight((c, 1, 3, 3))],
            [(n, c, (h - 3) // 2 + 1, (w - 3) // 2 + 1)],
            group=c,
            kernel_shape=[3, 3],
            strides=[2, 2],
        )[0]
    return conv_act(b, y, channels, act, 1)


def channel_attention(b: NetBuilder, x: ir.Value, channels: int, stride: int, act: str) -> ir.Value:
    """Gates by a convolution along the channels, or by a global context (ECA, GCNet)."""
    y = conv_act(b, x, channels, act, 3, stride)
    n, c, h, w = shape_of(y)
    if b.random.random() < 0.5:
        means = b.reduce("ReduceMean", y, (2, 3), keep=False)
        gate = b.unary("Sigmoid", b.conv(b.reshape(means, n, 1, c), 1, 5, bias=False))
        return b.binary("Mul", y, b.reshape(gate, n, c, 1, 1))
    weights = b.softmax(b.reshape(b.conv(y, 1, 1), n, 1, h * w))
    flat = b.reshape(y, n, 1, c, h * w)
    context = b.matmul(flat, b.reshape(weights, n, 1, h * w, 1))
    context = b.conv(b.reshape(context, n, c, 1, 1), max(8, c // 8), 1)
    normed = b.transpose(b.layer_norm(b.transpose(context, 0, 2, 3, 1)), 0, 3, 1, 2)
    return b.binary("Add", y, b.conv(b.unary("Relu", normed), c, 1))


def linear_attention(b: NetBuilder, x: ir.Value, channels: int, stride: int, act: str) -> ir.Value:
    """Attention of linear cost on unfolded patches (MobileViTv2)."""
    x = conv_act(b, x, channels, act, 3, stride)
    n, c, h, w = shape_of(x)
    h2, w2 = h // 2, w // 2
    if h % 2 or w % 2:
        return x
    y = b.reshape(x, n * c * h2, 2, w2, 2)
    y = b.reshape(b.transpose(y, 0, 2, 1, 3), n, c, h2 * w2, 4)
    y = b.reshape(b.transpose(y, 0, 1, 3, 2), n, c, 4, h2 * w2)
    normed = group_norm(b, y)
    q, k, v = b.split(b.conv(normed, 1 + 2 * c, 1), [1, c, c], 1)
    context = b.reduce("ReduceSum", b.binary("Mul", k, b.softmax(q)), (-1,))
    y = b.binary("Add", y, b.conv(b.binary("Mul", b.unary("Relu", v), context), c, 1))
    hidden = conv_act(b, group_norm(b, y), 2 * c, "silu", 1)
    y = b.binary("Add", y, b.conv(hidden, c, 1))
    y = b.transpose(b.reshape(y, n, c, 4, h2 * w2), 0, 1, 3, 2)
    y = b.transpose(b.reshape(y, n * c * h2, w2, 2, 2), 0, 2, 1, 3)
    return b.conv(b.reshape(y, n, c, h, w), channels, 1)


BLOCKS: dict[str, tuple[Block, ...]] = {
    "residual": (plain, plain, bottleneck, bottleneck, chain, blurred),
    "grouped": (wide_groups, wide_groups, bottleneck, hierarchical),
    "mobile": (inverted, inverted, inverted, fused_inverted, mixed, separable),
    "concatenated": (aggregated, cross_stage, dense, inception, shuffled),
    "gated": (split_attention, channel_attention, bottleneck, plain),
    "normalized": (preactivated, normalized, dense),
    "convmixer": (pool_mixer, modern, modern, separable),
    "hybrid": (linear_attention, inverted, modern),
}
"""Blocks by the family of networks that they appear in."""

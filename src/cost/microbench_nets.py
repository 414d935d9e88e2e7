"""The networks that a device is calibrated on: made of random blocks, the same for the same seed.

Here: families of networks, and `synthetic_net`, one member. Their kernels lie where those of real
networks lie: channels and sizes over the usual ranges, operators in their usual company, so that
caches and layouts are as they would be. None is a network that anybody uses. Not here: timing
(`microbench`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from . import microbench_images as images
from . import microbench_tokens as tokens
from .microbench_builder import NetBuilder, shape_of

MAX_MACS = 450e6
MIN_MACS = 40e6
REFERENCE = 0
"""The network that tells how fast the machine is."""
MAX_BLOCKS = 10
"""More of the same teaches little and costs calibration time."""


@dataclasses.dataclass(frozen=True)
class SyntheticNet:
    """A network without weights; `family` is what it is held out by."""

    name: str
    family: str
    model: ir.Model
    macs: int


def synthetic_net(index: int) -> SyntheticNet:
    """Network number `index`; families take turns.

    Every weight is absent: `fill_random_weights` makes it runnable.
    """
    family = _ORDER[index % len(_ORDER)]
    b = NetBuilder(f"{family}-{index}", seed=index)
    outputs = FAMILIES[family](b)
    return SyntheticNet(b.name, family, b.model(*outputs), b.macs)


def _budget(b: NetBuilder) -> float:
    """MACs to stop at, small networks as often as large ones."""
    return math.exp(b.random.uniform(math.log(MIN_MACS), math.log(MAX_MACS)))


def _channels(b: NetBuilder, low: float, high: float) -> int:
    """A number of channels as networks have them: multiples of 8 mostly, of 16 or 32 often."""
    wanted = math.exp(b.random.uniform(math.log(low), math.log(high)))
    step = b.random.choice((4, 8, 8, 16, 16, 32, 32, 64))
    return max(step, round(wanted / step) * step)


def _head(b: NetBuilder, x: ir.Value) -> list[ir.Value]:
    """A mean over the image and a classifier."""
    n, c = shape_of(x)[:2]
    if b.random.random() < 0.5:
        pooled = b.reduce("ReduceMean", x, (2, 3), keep=False)
    else:
        pooled = b.reshape(b.op("GlobalAveragePool", [x], [(n, c, 1, 1)])[0], n, c)
    return [b.gemm(pooled, b.random.choice((10, 100, 1000, 1000)))]


def _stem(b: NetBuilder, side: int, channels: int, act: str) -> ir.Value:
    x = b.input((1, 3, side, side))
    kind = b.random.choice(("conv3", "conv3", "conv7", "deep", "patch", "none"))
    if kind == "conv7":
        x = images.conv_act(b, x, channels, act, 7, 2)
        return b.pool("MaxPool", x, 3, 2) if b.random.random() < 0.7 else x
    if kind == "deep":
        for index in range(3):
            wide = channels if index == 2 else max(8, channels // 2)
            x = images.conv_act(b, x, wide, act, 3, 1 if index else 2)
        return b.pool("MaxPool", x, 3, 2)
    if kind == "patch":
        return b.conv(x, channels, b.random.choice((4, 7)), 4)
    return images.conv_act(b, x, channels, act, 3, 1 if kind == "none" and side < 97 else 2)


def _image_net(kind: str) -> Callable[[NetBuilder], list[ir.Value]]:
    def build(b: NetBuilder) -> list[ir.Value]:
        budget = _budget(b)
        side = b.random.choice((32, 56, 64, 96, 112, 128, 160, 192, 224, 224, 256, 288, 320))
        act = b.random.choice(images.ACTIVATIONS)
        channels = _channels(b, 8, 96)
        x = _stem(b, side, channels, act)
        growth = b.random.choice((1.5, 2, 2))
        cost = 0
        for _ in range(MAX_BLOCKS):
            stride = 1
            if (b.random.random() < 0.3 or cost > budget / 3) and shape_of(x)[2] > 12:
                stride = 2
                channels = min(2048, max(8, round(channels * growth / 8) * 8))
            if b.random.random() < 0.25:
                channels = _channels(b, max(8, channels / 2), min(2048, channels * 2))
            block = b.random.choice(images.BLOCKS[kind])
            before = b.macs
            x = block(b, x, channels, stride, act)
            cost = b.macs - before
            if min(shape_of(x)[2:]) < 3 or b.macs > budget:
                break
        if b.random.random() < 0.4:
            wide = _channels(b, 256, 2048)
            if b.macs + wide * math.prod(shape_of(x)[1:]) < 2 * budget:
                x = images.conv_act(b, x, wide, act, 1)
        return _head(b, x)

    return build


def _late(b: NetBuilder) -> list[ir.Value]:
    """The last stages alone: many channels, few pixels, much weight."""
    act = b.random.choice(images.ACTIVATIONS)
    channels = _channels(b, 192, 1536)
    x = b.input((1, channels, *[b.random.choice((4, 7, 7, 8, 9, 10, 12, 14, 14, 16))] * 2))
    budget = _budget(b)
    kinds = [block for blocks in images.BLOCKS.values() for block in blocks]
    for _ in range(MAX_BLOCKS):
        stride = 2 if b.random.random() < 0.15 and shape_of(x)[2] > 8 else 1
        if b.random.random() < 0.3:
            channels = _channels(b, 128, 2048)
        x = b.random.choice(kinds)(b, x, channels, stride, act)
        if min(shape_of(x)[2:]) < 3 or b.macs > budget:
            break
    return _head(b, x)


def _early(b: NetBuilder) -> list[ir.Value]:
    """The first stages alone: few channels, many pixels."""
    act = b.random.choice(images.ACTIVATIONS)
    channels = _channels(b, 12, 96)
    side = b.random.choice((56, 64, 80, 96, 112, 128, 144, 160))
    x = b.input((1, channels, side, side))
    budget = _budget(b)
    kinds = [block for blocks in images.BLOCKS.values() for block in blocks]
    for _ in range(MAX_BLOCKS):
        stride = 2 if b.random.random() < 0.2 else 1
        if b.random.random() < 0.3:
            channels = _channels(b, 12, 128)
        x = b.random.choice(kinds)(b, x, channels, stride, act)
        if b.macs > budget or shape_of(x)[2] < 20:
            break
    return [x]


def _token_net(kind: str) -> Callable[[NetBuilder], list[ir.Value]]:
    def build(b: NetBuilder) -> list[ir.Value]:
        budget = max(3e7, _budget(b))
        channels = b.random.choice(
            (48, 64, 96, 128, 144, 160, 192, 192, 224, 256, 288, 320, 384, 384, 448, 512, 576, 768)
        )
        side = b.random.choice((7, 7, 8, 12, 14, 14, 14, 16, 18, 24, 24, 28))
        if kind in ("pyramid", "windows") and b.random.random() < 0.5:
            side, channels = b.random.choice((28, 32, 49, 56, 56)), min(channels, 128)
        if kind == "mixer":
            side = min(side, 16)
        patch = b.random.choice((4, 8, 8, 14, 16, 16, 32))
        image = b.input((1, 3, side * patch, side * patch))
        x = b.op(
            "Conv",
            [image, b.weight((channels, 3, patch, patch)), b.weight((channels,))],
            [(1, channels, side, side)],
            kernel_shape=[patch, patch],
            strides=[patch, patch],
        )[0]
        x = b.transpose(b.reshape(x, 1, channels, side * side), 0, 2, 1)
        scaled = b.random.random() < 0.35
        with_class = kind == "attention" and b.random.random() < 0.6
        if with_class:
            x = b.concat([b.weight((1, 1, channels)), x], 1)
        if b.random.random() < 0.7:
            x = b.scaled(x, (1, shape_of(x)[1], channels), "Add")
        if b.random.random() < 0.2:
            x = tokens.position_conv(b, x)
        for _ in range(4):
            mixer, feed = b.random.choice(tokens.MIXERS[kind]), b.random.choice(tokens.FEEDS)
            x = tokens.block(b, x, mixer, feed, scaled)
            if b.macs > budget:
                break
            if kind in ("pyramid", "windows", "channels"):
                if b.random.random() < 0.3:
                    x = _merged_patches(b, x)
                if b.random.random() < 0.2:
                    x = tokens.position_conv(b, x)
        x = b.layer_norm(x)
        if with_class:
            return [b.gemm(b.gather(x, 0, 1), 1000)]
        return [b.gemm(b.reduce("ReduceMean", x, (1,), keep=False), 1000)]

    return build


def _merged_patches(b: NetBuilder, x: ir.Value) -> ir.Value:
    """Half the grid, twice the channels: by strided slices or by a convolution."""
    n, t, c = shape_of(x)
    side = math.isqrt(t)
    if side * side != t or side % 2 or side < 8 or c > 512:
        return x
    if b.random.random() < 0.5:
        grid = b.reshape(x, n, side, side, c)
        rows = [b.slice(grid, 1, start, side, 2) for start in (0, 1)]
        corners = [b.slice(row, 2, start, side, 2) for start in (0, 1) for row in rows]
        y = b.reshape(b.concat(corners, 3), n, t // 4, 4 * c)
        return b.linear(b.layer_norm(y), 2 * c, bias=False)
    image = b.reshape(b.transpose(x, 0, 2, 1), n, c, side, side)
    y = b.conv(image, 2 * c, 3, 2)
    return b.layer_norm(b.transpose(b.reshape(y, n, 2 * c, t // 4), 0, 2, 1))


def _decoder(b: NetBuilder) -> list[ir.Value]:
    channels = b.random.choice((128, 192, 256, 384, 512, 768))
    length = b.random.choice((1, 8, 16, 32, 64, 128, 128, 256))
    ids = b.input((1, length), ir.DataType.INT64)
    words = b.random.choice((1000, 4000, 16000))
    table = b.weight((words, channels))
    x = b.op("Gather", [table, ids], [(1, length, channels)], axis=0)[0]
    budget = _budget(b)
    for _ in range(3):
        x = tokens.decoder_block(b, x)
        if b.macs > budget or b.weight_bytes > 60e6:
            break
    return [b.linear(tokens.rms_norm(b, x), words, bias=False)]


def _sequence(b: NetBuilder) -> list[ir.Value]:
    """Sound and text: convolutions along one axis, recurrence, attention."""
    channels = _channels(b, 32, 256)
    length = b.random.choice((32, 64, 100, 128, 200, 256, 500))
    x = b.input((1, _channels(b, 16, 128), length))
    for _ in range(b.random.randint(1, 4)):
        kernel = b.random.choice((1, 3, 5, 7, 9))
        act = b.random.choice(images.ACTIVATIONS)
        x = images.activate(b, b.conv(x, channels, kernel, b.random.choice((1, 1, 2))), act)
    if b.random.random() < 0.4:
        x = b.conv(x, channels, b.random.choice((5, 9, 15)), 1, channels)
    y = b.transpose(x, 0, 2, 1)
    if b.random.random() < 0.6:
        y = tokens.recurrent(b, y)
    if b.random.random() < 0.6:
        for _ in range(b.random.randint(1, 3)):
            y = tokens.block(b, y, tokens.attention, tokens.mlp, scaled=False)
    return [b.softmax(b.linear(y, b.random.choice((30, 100, 1000))))]


def _dense_prediction(b: NetBuilder) -> list[ir.Value]:
    """An encoder, and a decoder that upsamples and joins (segmentation, detection)."""
    act = b.random.choice(images.ACTIVATIONS)
    side = b.random.choice((64, 96, 128, 160))
    channels = _channels(b, 8, 32)
    x = images.conv_act(b, b.input((1, 3, side, side)), channels, act)
    levels = []
    for _ in range(3):
        levels.append(x)
        channels = min(256, 2 * channels)
        x = images.conv_act(b, images.conv_act(b, x, channels, act, 3, 2), channels, act)
    outputs = []
    for level in reversed(levels):
        kind = b.random.choice(("nearest", "linear", "transposed"))
        wide = shape_of(level)[1]
        if kind == "transposed":
            x = b.conv_transpose(x, wide, b.random.choice((2, 4)))
        else:
            x = b.resize(x, kind)
        x = b.concat([x, level], 1)
        x = images.conv_act(b, x, wide, act)
        if b.random.random() < 0.4:
            outputs.append(b.conv(x, 4, 1))
    if b.random.random() < 0.5:
        return [*outputs, b.unary("Sigmoid", b.conv(x, b.random.choice((1, 2, 21)), 1))]
    return [*outputs, b.op("ArgMax", [x], [(1, 1, *shape_of(x)[2:])], ir.DataType.INT64, axis=1)[0]]


def _volumes(b: NetBuilder) -> list[ir.Value]:
    """Three spatial axes."""
    channels = _channels(b, 8, 32)
    x = b.input((1, b.random.choice((1, 3)), 8, *[b.random.choice((16, 24, 32))] * 2))
    for _ in range(b.random.randint(2, 4)):
        x = images.activate(b, b.conv(x, channels, 3), "relu")
        if shape_of(x)[2] > 2 and b.random.random() < 0.5:
            x = b.pool("MaxPool", x, 2, 2)
            channels *= 2
    return [b.reduce("ReduceMean", x, (2, 3, 4), keep=False)]


def _assorted(b: NetBuilder) -> list[ir.Value]:
    """Elementwise operators, broadcasts, reductions and movements of many sizes, in a chain."""
    rank = b.random.choice((3, 4, 4))
    sizes = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 49, 56, 64, 100, 128, 196, 256, 384, 768)
    while True:
        shape = (1, *(b.random.choice(sizes) for _ in range(rank - 1)))
        if 2000 < math.prod(shape) < 3e6:
            break
    x = b.input(shape)
    kinds = ["Relu", "Sigmoid", "Tanh", "Erf", "Gelu", "Abs", "Neg", "Sqrt", "HardSigmoid", "Exp",
             "Softplus", "Elu", "LeakyRelu", "HardSwish", "Mish"]  # fmt: skip
    outputs: list[ir.Value] = []
    for _ in range(b.random.randint(10, 20)):
        now = shape_of(x)
        choice = b.random.random()
        if choice < 0.3:
            x = b.unary(b.random.choice(kinds), x)
        elif choice < 0.5:
            other = tuple(d if b.random.random() < 0.5 else 1 for d in now)
            x = b.scaled(x, other, b.random.choice(("Add", "Mul", "Sub", "Div")))
        elif choice < 0.65:
            order = list(range(len(now)))
            order[1:] = b.random.sample(order[1:], len(order) - 1)
            x = b.transpose(x, *order)
        elif choice < 0.72:
            x = b.softmax(x, b.random.choice((-1, -1, 1)))
        elif choice < 0.8:
            kind = b.random.choice(("ReduceMean", "ReduceSum", "ReduceMax", "ReduceL2"))
            axes = b.random.choice(((-1,), (1,), (-2, -1), (-2,)))
            y = b.reduce(kind, x, axes)
            x = b.binary(b.random.choice(("Sub", "Mul", "Add")), x, y)
        elif choice < 0.88:
            axis = b.random.randint(1, len(now) - 1)
            if now[axis] > 3:
                left = b.random.randint(1, now[axis] - 1)
                pieces = b.split(x, [left, now[axis] - left], axis)
                x = b.concat(pieces[::-1], axis)
        elif choice < 0.94:
            axis = b.random.randint(1, len(now) - 1)
            index = np.random.default_rng(len(outputs)).integers(0, now[axis], now[axis])
            x = b.gather(x, index, axis)
        elif now[-1] > 4:
            x = b.layer_norm(x)
        if b.random.random() < 0.05:
            outputs.append(x)
    return [*outputs, b.unary("Identity", x)]


FAMILIES: dict[str, Callable[[NetBuilder], list[ir.Value]]] = {
    **{kind: _image_net(kind) for kind in images.BLOCKS},
    **{kind: _token_net(kind) for kind in tokens.MIXERS},
    "late": _late,
    "early": _early,
    "decoder": _decoder,
    "sequence": _sequence,
    "dense-prediction": _dense_prediction,
    "volumes": _volumes,
    "assorted": _assorted,
}
_ORDER = (
    "residual", "mobile", "attention", "grouped", "late", "windows", "early", "concatenated",
    "pyramid", "mobile", "assorted", "gated", "attention", "late", "normalized", "channels",
    "residual", "convmixer", "early", "decoder", "grouped", "hybrid", "attention",
    "dense-prediction", "late", "mixer", "mobile", "sequence", "concatenated", "pyramid", "early",
    "volumes", "grouped", "gated",
)  # fmt: skip

"""The networks of ncnn's benchmark as graphs without weights, for fitting boards to its table.

    python benchmarks/board_nets.py [--save FOLDER]

Built from the published architectures (the papers, and the layer widths of ncnn's benchmark models)
at the input sizes that ncnn's benchmark uses. Normalizations are folded, as in its files. Prints
each network's multiply-accumulates beside the published figure; `--save` writes ONNX files. No
figure is given where none is published. ncnn's MobileNet v3 has one block more before the last
stride than the paper, its ProxylessNAS a wider first block, and its SqueezeNet reads 227 x 227.
Not built: yolo-fastestv2 and FastestDet. A detector's last step (boxes, suppression) is left out.
"""

from __future__ import annotations

import argparse
import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import onnx_ir as ir

from edgepass.cost.microbench_builder import NetBuilder, shape_of

Value = ir.Value
LEAKY = "LeakyRelu"


class Net(NetBuilder):
    """A builder with what the old networks need: no padding, LRN, windows that round up."""

    def __init__(self, name: str, size: int) -> None:
        super().__init__(name, 0)
        self.image = self.input((1, 3, size, size))

    def act(self, x: Value, kind: str) -> Value:
        if kind == "Relu6":
            bounds = [self.constant(bound, "float32") for bound in (0.0, 6.0)]
            return self.op("Clip", [x, *bounds], [shape_of(x)])[0]
        return self.unary(kind, x) if kind else x

    def unit(
        self,
        x: Value,
        width: int,
        kernel: int = 1,
        stride: int = 1,
        act: str = "Relu",
        group: int = 1,
    ) -> Value:
        """A convolution with padding of half its window, and an activation."""
        return self.act(self.conv(x, width, kernel, stride, group), act)

    def depthwise(self, x: Value, kernel: int = 3, stride: int = 1, act: str = "Relu") -> Value:
        return self.unit(x, shape_of(x)[1], kernel, stride, act, shape_of(x)[1])

    def valid(self, x: Value, width: int, kernel: int, stride: int) -> Value:
        """A convolution without padding, then ReLU."""
        n, before, *extents = shape_of(x)
        after = [(size - kernel) // stride + 1 for size in extents]
        self.macs += math.prod(after) * width * before * kernel * kernel
        weights = [self.weight((width, before, kernel, kernel)), self.weight((width,))]
        result = self.op(
            "Conv",
            [x, *weights],
            [(n, width, *after)],
            group=1,
            kernel_shape=[kernel] * 2,
            strides=[stride] * 2,
        )
        return self.act(result[0], "Relu")

    def window(
        self, x: Value, kernel: int = 3, stride: int = 2, pad: int = 0, kind: str = "MaxPool"
    ) -> Value:
        """Pooling whose last window may hang over the edge."""
        n, c, *extents = shape_of(x)
        after = [-(-(size + 2 * pad - kernel) // stride) + 1 for size in extents]
        return self.op(
            kind,
            [x],
            [(n, c, *after)],
            kernel_shape=[kernel] * 2,
            strides=[stride] * 2,
            pads=[pad] * 4,
            ceil_mode=1,
        )[0]

    def mean(self, x: Value) -> Value:
        return self.op("GlobalAveragePool", [x], [(*shape_of(x)[:2], 1, 1)])[0]

    def classify(self, x: Value, *widths: int) -> ir.Model:
        """Fully connected layers on all there is, and softmax."""
        x = self.reshape(x, 1, math.prod(shape_of(x)))
        for width in widths[:-1]:
            x = self.act(self.gemm(x, width), "Relu")
        return self.model(self.softmax(self.gemm(x, widths[-1])))

    def excite(self, x: Value, middle: int, gate: str) -> Value:
        """Squeeze and excitation (Hu et al. 2018) by fully connected layers."""
        channels = shape_of(x)[1]
        y = self.reshape(self.mean(x), 1, channels)
        y = self.act(self.gemm(self.act(self.gemm(y, middle), "Relu"), channels), gate)
        return self.binary("Mul", x, self.reshape(y, 1, channels, 1, 1))


def _fire(b: Net, x: Value, squeeze: int, expand: int) -> Value:
    x = b.unit(x, squeeze)
    return b.concat([b.unit(x, expand), b.unit(x, expand, 3)], 1)


def squeezenet() -> ir.Model:
    """SqueezeNet 1.1 (Iandola et al. 2016)."""
    b = Net("squeezenet", 227)
    x, _ = _squeezenet_body(b)
    for squeeze in (48, 48, 64, 64):
        x = _fire(b, x, squeeze, 4 * squeeze)
    x = b.mean(b.unit(x, 1000))
    return b.model(b.softmax(b.reshape(x, 1, 1000)))


def _squeezenet_body(b: Net) -> tuple[Value, Value]:
    """Up to the third pooling; and what goes into that."""
    x = b.window(b.valid(b.image, 64, 3, 2))
    x = b.window(_fire(b, _fire(b, x, 16, 64), 16, 64))
    before = _fire(b, _fire(b, x, 32, 128), 32, 128)
    return b.window(before), before


def squeezenet_ssd() -> ir.Model:
    """SqueezeNet with six heads of 3x3 convolutions."""
    b = Net("squeezenet_ssd", 300)
    x, first = _squeezenet_body(b)
    scale = [b.weight((1, 256, 1, 1)) for _ in range(2)]
    first = b.binary("Add", b.binary("Mul", first, scale[0]), scale[1])
    for squeeze in (48, 48, 64, 64):
        x = _fire(b, x, squeeze, 4 * squeeze)
    second = x
    third = _fire(b, b.window(second), 96, 384)
    fourth = _fire(b, b.window(third), 96, 384)
    fifth = b.unit(b.unit(fourth, 128), 256, 3, 2)
    sixth = b.unit(b.unit(fifth, 64), 128, 3, 2)
    return _ssd(b, [first, second, third, fourth, fifth, sixth], [4, 6, 6, 6, 6, 4], 3)


def _ssd(b: Net, levels: Sequence[Value], boxes: Sequence[int], kernel: int) -> ir.Model:
    """Boxes and classes of every level, side by side (Liu et al. 2016), 21 classes."""
    found: list[list[Value]] = [[], []]
    for level, count in zip(levels, boxes, strict=True):
        for index, width in enumerate((4, 21)):
            y = b.transpose(b.conv(level, width * count, kernel), 0, 2, 3, 1)
            found[index].append(b.reshape(y, 1, math.prod(shape_of(y))))
    places, classes = (b.concat(parts, 1) for parts in found)
    classes = b.softmax(b.reshape(classes, 1, shape_of(classes)[1] // 21, 21))
    return b.model(places, classes)


def _mobilenet_body(b: Net) -> tuple[Value, Value]:
    """MobileNet v1's convolutions (Howard et al. 2017); and its last at a stride of 16."""
    x = b.unit(b.image, 32, 3, 2)
    middle = x
    widths = [64, 128, 128, 256, 256, *[512] * 6, 1024, 1024]
    for index, width in enumerate(widths):
        if index == 11:
            middle = x
        x = b.unit(b.depthwise(x, stride=2 if index in (1, 3, 5, 11) else 1), width)
    return x, middle


def mobilenet() -> ir.Model:
    b = Net("mobilenet", 224)
    return b.classify(b.mean(_mobilenet_body(b)[0]), 1000)


def mobilenet_ssd() -> ir.Model:
    """MobileNet with six heads of 1x1 convolutions."""
    b = Net("mobilenet_ssd", 300)
    x, middle = _mobilenet_body(b)
    levels = [middle, x]
    for width in (256, 128, 128, 64):
        x = b.unit(b.unit(x, width), 2 * width, 3, 2)
        levels.append(x)
    return _ssd(b, levels, [3, 6, 6, 6, 6, 6], 1)


def mobilenet_yolo() -> ir.Model:
    """MobileNet with two separable heads, as ncnn's benchmark has had it since 2019."""
    b = Net("mobilenet_yolo", 416)
    x, middle = _mobilenet_body(b)
    deep = b.unit(b.depthwise(x), 1024)
    n, channels, h, w = shape_of(deep)
    upsampled = b.op(
        "ConvTranspose",
        [deep, b.weight((channels, 1, 4, 4))],
        [(n, 512, 2 * h, 2 * w)],
        group=512,
        kernel_shape=[4, 4],
        strides=[2, 2],
        pads=[1] * 4,
    )[0]
    x = b.unit(b.depthwise(b.binary("Add", middle, upsampled)), 1024)
    return b.model(b.conv(deep, 125, 1), b.conv(x, 125, 1))


def _inverted(
    b: Net,
    x: Value,
    width: int,
    expanded: int,
    kernel: int = 3,
    stride: int = 1,
    act: str = "Relu",
    excite: bool = False,
) -> Value:
    """An inverted residual (Sandler et al. 2018), with excitation as in MobileNet v3."""
    before = shape_of(x)[1]
    y = b.unit(x, expanded, act=act) if expanded != before else x
    y = b.depthwise(y, kernel, stride, "" if excite else act)
    if excite:
        y = b.act(b.excite(y, expanded // 4, "HardSigmoid"), act)
    y = b.conv(y, width, 1)
    return b.binary("Add", x, y) if stride == 1 and before == width else y


Row = tuple[int, int, int, int, int]  # times, kernel, stride of the first, expansion, width


def _inverted_net(b: Net, rows: Sequence[Row], act: str = "Relu") -> ir.Model:
    x = b.conv(b.depthwise(b.unit(b.image, 32, 3, 2, act), act=act), rows[0][4], 1)
    for times, kernel, stride, expansion, width in rows[1:]:
        for index in range(times):
            expanded = expansion * shape_of(x)[1]
            x = _inverted(b, x, width, expanded, kernel, 1 if index else stride, act)
    return b.classify(b.mean(b.unit(x, 1280, act=act)), 1000)


_V2: tuple[Row, ...] = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (3, 3, 2, 6, 32),
    (4, 3, 2, 6, 64),
    (3, 3, 1, 6, 96),
    (3, 3, 2, 6, 160),
    (1, 3, 1, 6, 320),
)


def mobilenet_v2() -> ir.Model:
    return _inverted_net(Net("mobilenet_v2", 224), _V2, "Relu6")


def mnasnet() -> ir.Model:
    """MnasNet without excitation, B1 (Tan et al. 2019)."""
    rows = (
        (1, 3, 1, 1, 16),
        (3, 3, 2, 3, 24),
        (3, 5, 2, 3, 40),
        (3, 5, 2, 6, 80),
        (2, 3, 1, 6, 96),
        (4, 5, 2, 6, 192),
        (1, 3, 1, 6, 320),
    )
    return _inverted_net(Net("mnasnet", 224), rows)


def proxylessnasnet() -> ir.Model:
    """ProxylessNAS found for phones (Cai et al. 2019)."""
    rows: tuple[Row, ...] = (
        (1, 3, 1, 1, 32),
        (1, 5, 2, 0, 32),
        (1, 3, 1, 3, 32),
        (1, 7, 2, 3, 40),
        (1, 3, 1, 3, 40),
        (2, 5, 1, 3, 40),
        (1, 7, 2, 6, 80),
        (3, 5, 1, 3, 80),
        (1, 5, 1, 6, 96),
        (3, 5, 1, 3, 96),
        (1, 7, 2, 6, 192),
        (1, 7, 1, 6, 192),
        (2, 7, 1, 3, 192),
        (1, 7, 1, 6, 320),
    )
    b = Net("proxylessnasnet", 224)
    x = b.conv(b.depthwise(b.unit(b.image, 32, 3, 2)), 32, 1)
    for times, kernel, stride, expansion, width in rows[1:]:
        for _ in range(times):
            x = _inverted(b, x, width, expansion * shape_of(x)[1] or 48, kernel, stride)
    return b.classify(b.mean(b.unit(x, 1280)), 1000)


def mobilenet_v3() -> ir.Model:
    """MobileNet v3 large (Howard et al. 2019)."""
    b = Net("mobilenet_v3", 224)
    swish, relu = "HardSwish", "Relu"
    x = _inverted(b, b.unit(b.image, 16, 3, 2, swish), 16, 16)
    for kernel, stride, expanded, width, act, excite in (
        (3, 2, 64, 24, relu, False),
        (3, 1, 72, 24, relu, False),
        (5, 2, 72, 40, relu, True),
        (5, 1, 120, 40, relu, True),
        (5, 1, 120, 40, relu, True),
        (3, 2, 240, 80, swish, False),
        (3, 1, 200, 80, swish, False),
        (3, 1, 184, 80, swish, False),
        (3, 1, 184, 80, swish, False),
        (3, 1, 480, 112, swish, True),
        (3, 1, 672, 112, swish, True),
        (5, 1, 672, 160, swish, True),
        (5, 2, 672, 160, swish, True),
        (5, 1, 960, 160, swish, True),
    ):
        x = _inverted(b, x, width, expanded, kernel, stride, act, excite)
    x = b.reshape(b.mean(b.unit(x, 960, act=swish)), 1, 960)
    return b.model(b.softmax(b.gemm(b.act(b.gemm(x, 1280), swish), 1000)))


def mobilenetv2_yolov3() -> ir.Model:
    """MobileNet v2 with two separable heads."""
    b = Net("mobilenetv2_yolov3", 352)
    x = b.conv(b.depthwise(b.unit(b.image, 32, 3, 2)), 16, 1)
    middle = x
    for times, kernel, stride, expansion, width in _V2[1:]:
        for index in range(times):
            if width == 160 and not index:  # its expansion feeds the second head too
                middle = b.unit(x, 6 * 96)
                x = b.conv(b.depthwise(middle, 3, 2), width, 1)
            else:
                expanded = expansion * shape_of(x)[1]
                x = _inverted(b, x, width, expanded, kernel, 1 if index else stride)
    deep = b.unit(b.depthwise(b.unit(x, 1280)), 576)
    x = b.binary("Add", b.resize(deep), b.unit(b.depthwise(middle), 576))
    x = b.unit(b.depthwise(x), 576)
    return b.model(b.conv(deep, 75, 1), b.conv(x, 75, 1))


def regnety_400m() -> ir.Model:
    """RegNetY-400MF (Radosavovic et al. 2020)."""
    b = Net("regnety_400m", 224)
    x = b.unit(b.image, 32, 3, 2)
    for times, width in ((1, 48), (3, 104), (6, 208), (6, 440)):
        for index in range(times):
            before, stride = shape_of(x)[1], 1 if index else 2
            y = b.unit(b.unit(x, width), width, 3, stride, group=width // 8)
            y = b.conv(b.excite(y, before // 4, "Sigmoid"), width, 1)
            x = b.act(b.binary("Add", x if index else b.conv(x, width, 1, stride), y), "Relu")
    return b.classify(b.mean(x), 1000)


def blazeface() -> ir.Model:
    """BlazeFace's body (Bazarevsky et al. 2019)."""
    b = Net("blazeface", 128)
    x = b.unit(b.image, 24, 5, 2)
    widths = [24, 28, 32, 36, 42, 48, 56, 64, 72, 80, 88, *[96] * 5]
    for width in widths:
        stride = 2 if width in (32, 48) or (width == 96 and shape_of(x)[1] == 88) else 1
        y = b.conv(b.depthwise(x, 3, stride, ""), width, 1)
        x = b.window(x, 2) if stride == 2 else x
        more = width - shape_of(x)[1]
        if more:
            x = b.pad(x, [0] * 4, [0, more, 0, 0], "constant")
        x = b.act(b.binary("Add", y, x), "Relu")
    return b.model(x)


def googlenet() -> ir.Model:
    """GoogLeNet without its auxiliary classifiers (Szegedy et al. 2015)."""
    b = Net("googlenet", 224)
    x = b.unary("LRN", b.window(b.unit(b.image, 64, 7, 2)), size=5)
    x = b.window(b.unary("LRN", b.unit(b.unit(x, 64), 192, 3), size=5))
    for index, (a, c, d, e, f, g) in enumerate(
        (
            (64, 96, 128, 16, 32, 32),
            (128, 128, 192, 32, 96, 64),
            (192, 96, 208, 16, 48, 64),
            (160, 112, 224, 24, 64, 64),
            (128, 128, 256, 24, 64, 64),
            (112, 144, 288, 32, 64, 64),
            (256, 160, 320, 32, 128, 128),
            (256, 160, 320, 32, 128, 128),
            (384, 192, 384, 48, 128, 128),
        )
    ):
        if index in (2, 7):
            x = b.window(x)
        pooled = b.window(x, 3, 1, 1)
        parts = [b.unit(x, a), b.unit(b.unit(x, c), d, 3), b.unit(b.unit(x, e), f, 5)]
        x = b.concat([*parts, b.unit(pooled, g)], 1)
    return b.classify(b.mean(x), 1000)


def resnet18() -> ir.Model:
    """ResNet-18 (He et al. 2016)."""
    b = Net("resnet18", 224)
    x = b.window(b.unit(b.image, 64, 7, 2))
    for width in (64, 128, 256, 512):
        for index in range(2):
            stride = 2 if width > 64 and not index else 1
            y = b.conv(b.unit(x, width, 3, stride), width, 3)
            x = x if stride == 1 else b.conv(x, width, 1, stride)
            x = b.act(b.binary("Add", x, y), "Relu")
    return b.classify(b.mean(x), 1000)


def resnet50() -> ir.Model:
    """ResNet-50 with strides in the first 1x1, as it was published."""
    b = Net("resnet50", 224)
    x = b.window(b.unit(b.image, 64, 7, 2))
    for times, width in ((3, 64), (4, 128), (6, 256), (3, 512)):
        for index in range(times):
            stride = 2 if width > 64 and not index else 1
            y = b.conv(b.unit(b.unit(x, width, 1, stride), width, 3), 4 * width, 1)
            x = x if index else b.conv(x, 4 * width, 1, stride)
            x = b.act(b.binary("Add", x, y), "Relu")
    return b.classify(b.mean(x), 1000)


def alexnet() -> ir.Model:
    """AlexNet in two groups (Krizhevsky et al. 2012)."""
    b = Net("alexnet", 227)
    x = b.window(b.unary("LRN", b.valid(b.image, 96, 11, 4), size=5))
    x = b.window(b.unary("LRN", b.unit(x, 256, 5, group=2), size=5))
    x = b.unit(b.unit(x, 384, 3), 384, 3, group=2)
    return b.classify(b.window(b.unit(x, 256, 3, group=2)), 4096, 4096, 1000)


def vgg16() -> ir.Model:
    """VGG-16 (Simonyan and Zisserman 2015)."""
    b = Net("vgg16", 224)
    x = b.image
    for times, width in ((2, 64), (2, 128), (3, 256), (3, 512), (3, 512)):
        for _ in range(times):
            x = b.unit(x, width, 3)
        x = b.window(x, 2)
    return b.classify(x, 4096, 4096, 1000)


def yolov4_tiny() -> ir.Model:
    """YOLOv4-tiny (Wang et al. 2021), 80 classes."""
    b = Net("yolov4-tiny", 416)
    unit = functools.partial(b.unit, act=LEAKY)
    x = unit(unit(b.image, 32, 3, 2), 64, 3, 2)
    middle = x
    for width in (64, 128, 256):
        x = unit(x, width, 3)
        half = b.slice(x, 1, width // 2, width)
        first = unit(half, width // 2, 3)
        second = unit(first, width // 2, 3)
        middle = unit(b.concat([second, first], 1), width)
        x = b.window(b.concat([x, middle], 1), 2)
    deep = unit(unit(x, 512, 3), 256)
    x = b.concat([b.resize(unit(deep, 128)), middle], 1)
    return b.model(b.conv(unit(deep, 512, 3), 255, 1), b.conv(unit(x, 256, 3), 255, 1))


def nanodet_m() -> ir.Model:
    """NanoDet-m: ShuffleNet v2 (Ma et al. 2018), a pyramid of 96 channels, 80 classes."""
    b = Net("nanodet_m", 320)
    x = b.pool("MaxPool", b.unit(b.image, 24, 3, 2, LEAKY))
    levels = []
    for times, width in ((4, 116), (8, 232), (4, 464)):
        for index in range(times):
            x = _shuffle_block(b, x, width // 2, bool(index))
        levels.append(x)
    fine, middle, deep = (b.conv(level, 96, 1) for level in levels)
    middle = b.binary("Add", middle, b.resize(deep, "linear"))
    fine = b.binary("Add", fine, b.resize(middle, "linear"))
    middle = b.binary("Add", middle, _halved(b, fine))
    deep = b.binary("Add", deep, _halved(b, middle))
    results = []
    for level in (fine, middle, deep):
        x = level
        for _ in range(2):
            x = b.unit(b.depthwise(x, act=LEAKY), 96, act=LEAKY)
        classes, boxes = b.split(b.conv(x, 112, 1), [80, 32], 1)
        for part in (b.unary("Sigmoid", classes), boxes):
            _, width, h, w = shape_of(part)
            results.append(b.transpose(b.reshape(part, 1, width, h * w), 0, 2, 1))
    return b.model(*results)


def _shuffle_block(b: Net, x: Value, half: int, keeps: bool) -> Value:
    """Half of the channels pass, or both halves are halved in size; then channels are shuffled."""
    if keeps:
        left, x = b.split(x, [half, half], 1)
    else:
        left = b.unit(b.depthwise(x, 3, 2, ""), half, act=LEAKY)
    right = b.depthwise(b.unit(x, half, act=LEAKY), 3, 1 if keeps else 2, "")
    x = b.concat([left, b.unit(right, half, act=LEAKY)], 1)
    n, c, h, w = shape_of(x)
    x = b.transpose(b.reshape(x, n, 2, c // 2, h, w), 0, 2, 1, 3, 4)
    return b.reshape(x, n, c, h, w)


def _halved(b: Net, x: Value) -> Value:
    n, c, h, w = shape_of(x)
    scales = b.constant([1, 1, 0.5, 0.5], "float32")
    return b.op("Resize", [x, None, scales], [(n, c, h // 2, w // 2)], mode="linear")[0]


def yolo_fastest() -> ir.Model:
    """Yolo-Fastest 1.1, 80 classes."""
    b = Net("yolo-fastest-1.1", 320)
    unit = functools.partial(b.unit, act=LEAKY)
    inverted = functools.partial(_inverted, act=LEAKY)
    x = unit(unit(b.image, 8, 3, 2), 8)
    x = inverted(b, b.conv(b.depthwise(x, act=LEAKY), 4, 1), 4, 8)
    for times, expanded, width, stride, first in (
        (3, 32, 8, 2, 24),
        (3, 48, 8, 2, 32),
        (5, 96, 16, 1, 48),
        (5, 136, 24, 2, 96),
        (6, 224, 48, 2, 136),
    ):
        middle = x
        x = inverted(b, x, width, first, 3, stride)
        for _ in range(times - 1):
            x = inverted(b, x, width, expanded)
    pooled = [b.pool("MaxPool", x, size, 1) for size in (9, 5, 3)]
    deep = unit(b.concat([*pooled, x], 1), 96)
    results = []
    for y in (deep, b.concat([b.resize(deep), middle], 1)):
        width = shape_of(y)[1]
        for _ in range(2):
            y = b.conv(b.depthwise(y, 5, 1, LEAKY), width, 1)
        results.append(b.conv(y, 255, 1))
    return b.model(*results)


NETS: dict[str, tuple[Callable[[], ir.Model], float | None]] = {
    "squeezenet": (squeezenet, 349.0),
    "mobilenet": (mobilenet, 569.0),
    "mobilenet_v2": (mobilenet_v2, 300.0),
    "mobilenet_v3": (mobilenet_v3, 219.0),
    "mnasnet": (mnasnet, 315.0),
    "proxylessnasnet": (proxylessnasnet, 320.0),
    "regnety_400m": (regnety_400m, 404.0),
    "blazeface": (blazeface, None),
    "googlenet": (googlenet, 1583.0),
    "resnet18": (resnet18, 1814.0),
    "resnet50": (resnet50, 3858.0),
    "alexnet": (alexnet, 724.0),
    "vgg16": (vgg16, 15470.0),
    "squeezenet_ssd": (squeezenet_ssd, None),
    "mobilenet_ssd": (mobilenet_ssd, 1150.0),
    "mobilenet_yolo": (mobilenet_yolo, None),
    "mobilenetv2_yolov3": (mobilenetv2_yolov3, None),
    "yolov4-tiny": (yolov4_tiny, 3450.0),
    "nanodet_m": (nanodet_m, 360.0),
    "yolo-fastest-1.1": (yolo_fastest, 126.0),
}
"""Name in ncnn's benchmark -> builder, and published millions of multiply-accumulates."""


def build(name: str) -> ir.Model:
    """One of `NETS`, without weights."""
    return NETS[name][0]()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--save", type=Path, help="a folder for ONNX files without weights")
    folder = parser.parse_args().save
    print(f"{'network':20} {'M MACs':>9} {'published':>10}")
    for name, (_, published) in NETS.items():
        model = build(name)
        macs = conv_macs(model) / 1e6
        print(f"{name:20} {macs:9.1f} {'' if published is None else format(published, '10.0f')}")
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            ir.save(model, folder / f"{name}.onnx")


def conv_macs(model: ir.Model) -> float:
    """Multiply-accumulates of convolutions and fully connected layers."""
    total = 0.0
    for node in model.graph:
        if node.op_type in ("Conv", "Gemm", "ConvTranspose"):
            weight, result = shape_of(node.inputs[1]), shape_of(node.outputs[0])
            positions = math.prod(result)
            if node.op_type == "ConvTranspose":
                total += math.prod(shape_of(node.inputs[0])) * math.prod(weight[1:])
            else:
                total += positions * math.prod(weight[1:])
    return total


if __name__ == "__main__":
    main()

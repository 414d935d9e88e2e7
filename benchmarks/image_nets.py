"""Networks for small pictures, one of each family that is in use.

Here: `NETS`, name -> a function that builds the module for a number of classes; inputs are
[batch, 3, 32, 32]. Not here: their training (`image_tasks`).

resnet20      He et al. 2016, "Deep Residual Learning", section 4.2, with projections
resnet18_thin the same paper's ImageNet block layout at a quarter of the width
resnet_neck   its bottleneck blocks, pre-activated (He et al. 2016, "Identity Mappings")
mobilenet     Sandler et al. 2018: inverted residuals, depthwise, ReLU6
efficientnet  Tan and Le 2019: the same with squeeze-excite and SiLU
shufflenet    Ma et al. 2018 (v2): channel split, concat, shuffle
densenet      Huang et al. 2017: each layer reads the concat of all before it
vgg           Simonyan and Zisserman 2015 with BatchNorm
convnext      Liu et al. 2022: depthwise 7 x 7, LayerNorm, GELU, layer scale
vit           Dosovitskiy et al. 2021: patches, attention, GELU
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

Act = Callable[[], nn.Module]


def conv(
    inputs: int,
    outputs: int,
    size: int = 3,
    stride: int = 1,
    groups: int = 1,
    act: Act | None = nn.ReLU,
) -> nn.Sequential:
    """Convolution, BatchNorm, activation."""
    parts: list[nn.Module] = [
        nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
    ]
    return nn.Sequential(*parts, *([act()] if act else []))


def head(channels: int, classes: int) -> nn.Sequential:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))


class Residual(nn.Module):
    """shortcut(x) + body(x), then an activation."""

    def __init__(
        self, body: nn.Module, shortcut: nn.Module | None = None, act: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.body = body
        self.shortcut = shortcut or nn.Identity()
        self.act = act or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.shortcut(x) + self.body(x))


def _basic(inputs: int, outputs: int, stride: int) -> Residual:
    body = nn.Sequential(conv(inputs, outputs, 3, stride), conv(outputs, outputs, act=None))
    same = inputs == outputs and stride == 1
    return Residual(body, None if same else conv(inputs, outputs, 1, stride, act=None), nn.ReLU())


def _resnet(widths: tuple[int, ...], blocks: int, classes: int) -> nn.Module:
    layers: list[nn.Module] = [conv(3, widths[0])]
    channels = widths[0]
    for stage, width in enumerate(widths):
        for block in range(blocks):
            layers.append(_basic(channels, width, 2 if stage and not block else 1))
            channels = width
    return nn.Sequential(*layers, head(channels, classes))


def resnet20(classes: int) -> nn.Module:
    return _resnet((16, 32, 64), 3, classes)


def resnet18_thin(classes: int) -> nn.Module:
    return _resnet((16, 32, 64, 128), 2, classes)


def resnet_neck(classes: int) -> nn.Module:
    def block(inputs: int, width: int, stride: int) -> nn.Module:
        def part(c: int, out: int, size: int, step: int = 1) -> nn.Sequential:
            layer = nn.Conv2d(c, out, size, step, size // 2, bias=False)
            return nn.Sequential(nn.BatchNorm2d(c), nn.ReLU(), layer)

        outputs = width * 4
        body = nn.Sequential(
            part(inputs, width, 1), part(width, width, 3, stride), part(width, outputs, 1)
        )
        same = inputs == outputs and stride == 1
        return Residual(body, None if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False))

    layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, 1, 1, bias=False)]
    channels = 16
    for stage, width in enumerate((16, 32, 64)):
        for index in range(3):
            layers.append(block(channels, width, 2 if stage and not index else 1))
            channels = width * 4
    return nn.Sequential(*layers, nn.BatchNorm2d(channels), nn.ReLU(), head(channels, classes))


class SqueezeExcite(nn.Module):
    """Channels scaled by a function of their means (Hu et al. 2018)."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.gate = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(channels, hidden, 1),
            nn.SiLU(),
            nn.Conv2d(hidden, channels, 1),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x)


def _inverted(
    inputs: int, outputs: int, expand: int, size: int, stride: int, act: Act, squeeze: bool
) -> nn.Module:
    hidden = inputs * expand
    parts = [] if expand == 1 else [conv(inputs, hidden, 1, act=act)]
    parts.append(conv(hidden, hidden, size, stride, hidden, act))
    if squeeze:
        parts.append(nn.Sequential(SqueezeExcite(hidden, max(4, inputs // 4))))
    body = nn.Sequential(*parts, conv(hidden, outputs, 1, act=None))
    return Residual(body) if inputs == outputs and stride == 1 else body


def _inverted_net(
    rows: tuple[tuple[int, int, int, int, int], ...], act: Act, squeeze: bool, classes: int
) -> nn.Module:
    layers: list[nn.Module] = [conv(3, 24, stride=2, act=act)]
    channels = 24
    for expand, width, count, stride, size in rows:
        for index in range(count):
            step = stride if index == 0 else 1
            layers.append(_inverted(channels, width, expand, size, step, act, squeeze))
            channels = width
    return nn.Sequential(*layers, conv(channels, 256, 1, act=act), head(256, classes))


def mobilenet(classes: int) -> nn.Module:
    rows = (
        (1, 16, 1, 1, 3),
        (4, 32, 2, 1, 3),
        (4, 48, 3, 2, 3),
        (4, 80, 3, 2, 3),
        (4, 112, 1, 1, 3),
    )
    return _inverted_net(rows, nn.ReLU6, False, classes)


def efficientnet(classes: int) -> nn.Module:
    rows = (
        (1, 16, 1, 1, 3),
        (4, 32, 2, 1, 3),
        (4, 48, 2, 2, 5),
        (4, 80, 3, 2, 3),
        (4, 112, 1, 1, 3),
    )
    return _inverted_net(rows, nn.SiLU, True, classes)


class _Shuffle(nn.Module):
    """A block of ShuffleNet v2; with `stride` 2 both halves are computed."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        half = outputs // 2
        self.stride = stride
        given = inputs if stride == 2 else half
        self.right = nn.Sequential(
            conv(given, half, 1), conv(half, half, 3, stride, half, None), conv(half, half, 1)
        )
        self.left = nn.Sequential(conv(given, given, 3, 2, given, None), conv(given, half, 1))
        if stride == 1:
            self.left = nn.Sequential()

    def forward(self, x: Tensor) -> Tensor:
        left, right = (x, x) if self.stride == 2 else x.chunk(2, 1)
        joined = torch.cat([self.left(left), self.right(right)], 1)
        batch, channels, height, width = joined.shape
        pairs = joined.view(batch, 2, channels // 2, height, width)
        return pairs.transpose(1, 2).reshape(batch, channels, height, width)


def shufflenet(classes: int) -> nn.Module:
    layers: list[nn.Module] = [conv(3, 24)]
    channels = 24
    for width, count in ((64, 3), (128, 5), (256, 3)):
        for index in range(count):
            layers.append(_Shuffle(channels, width, 1 if index else 2))
            channels = width
    return nn.Sequential(*layers, conv(channels, 256, 1), head(256, classes))


class _Dense(nn.Module):
    def __init__(self, channels: int, growth: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.BatchNorm2d(channels), nn.ReLU(), conv(channels, 2 * growth, 1),
            nn.Conv2d(2 * growth, growth, 3, 1, 1, bias=False),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.body(x)], 1)


def densenet(classes: int) -> nn.Module:
    growth, channels = 16, 32
    layers: list[nn.Module] = [nn.Conv2d(3, channels, 3, 2, 1, bias=False)]
    for stage in range(3):
        for _ in range(6):
            layers.append(_Dense(channels, growth))
            channels += growth
        layers += [nn.BatchNorm2d(channels), nn.ReLU()]
        if stage < 2:
            layers += [nn.Conv2d(channels, channels // 2, 1, bias=False), nn.AvgPool2d(2)]
            channels //= 2
    return nn.Sequential(*layers, head(channels, classes))


def vgg(classes: int) -> nn.Module:
    layers: list[nn.Module] = []
    channels = 3
    for width, count in ((24, 2), (48, 2), (96, 3)):
        for _ in range(count):
            layers.append(conv(channels, width))
            channels = width
        layers.append(nn.MaxPool2d(2))
    flat = [nn.Flatten(), nn.Linear(channels * 16, 128), nn.ReLU(), nn.Linear(128, classes)]
    return nn.Sequential(*layers, *flat)


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of [batch, channels, height, width]."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class _Scaled(nn.Module):
    """A body whose outputs are scaled by channel, for channels last."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.spatial = nn.Conv2d(width, width, 7, 1, 3, groups=width)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )
        self.scale = nn.Parameter(torch.full((width,), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        return (self.mlp(self.spatial(x).permute(0, 2, 3, 1)) * self.scale).permute(0, 3, 1, 2)


def convnext(classes: int) -> nn.Module:
    widths = (32, 64, 96)
    layers: list[nn.Module] = [nn.Conv2d(3, widths[0], 2, 2), ChannelNorm(widths[0])]
    for stage, width in enumerate(widths):
        if stage:
            layers += [ChannelNorm(widths[stage - 1]), nn.Conv2d(widths[stage - 1], width, 2, 2)]
        layers += [Residual(_Scaled(width)) for _ in range(2)]
    pooled = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LayerNorm(widths[-1])]
    return nn.Sequential(*layers, *pooled, nn.Linear(widths[-1], classes))


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(x).view(batch, tokens, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = nn.functional.scaled_dot_product_attention(query, key, value)
        return self.out(mixed.transpose(1, 2).reshape(batch, tokens, width))


class VisionTransformer(nn.Module):
    """Patches of 4 x 4 behind a small convolutional stem, mean over the tokens at the end."""

    def __init__(self, classes: int, width: int = 64, depth: int = 5, heads: int = 4) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv(3, 32, 3, 2), nn.Conv2d(32, width, 2, 2))
        self.position = nn.Parameter(torch.randn(1, 64, width) * 0.02)
        blocks: list[nn.Module] = []
        for _ in range(depth):
            hidden = nn.Sequential(
                nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.GELU(),
                nn.Linear(3 * width, width),
            )  # fmt: skip
            attention = nn.Sequential(nn.LayerNorm(width), _Attention(width, heads))
            blocks += [Residual(attention), Residual(hidden)]
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.stem(x).flatten(2).transpose(1, 2) + self.position
        return self.head(self.norm(self.blocks(tokens)).mean(1))


def vit(classes: int) -> nn.Module:
    return VisionTransformer(classes)


NETS: dict[str, Callable[[int], nn.Module]] = {
    "resnet20": resnet20,
    "resnet18_thin": resnet18_thin,
    "resnet_neck": resnet_neck,
    "mobilenet": mobilenet,
    "efficientnet": efficientnet,
    "shufflenet": shufflenet,
    "densenet": densenet,
    "vgg": vgg,
    "convnext": convnext,
    "vit": vit,
}

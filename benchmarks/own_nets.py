"""Convolutional and recurrent nets of our own, in torch, of as many styles as are in use.

Here: `NETS`, name -> a function that builds (module, example inputs); small, weights random. Used
by `architectures.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - its usual name

Built = tuple[nn.Module, tuple[Any, ...]]


def image(size: int, channels: int = 3, batch: int = 1) -> tuple[Tensor]:
    return (torch.randn(batch, channels, size, size),)


def conv(
    inputs: int,
    outputs: int,
    size: int = 3,
    stride: int = 1,
    groups: int = 1,
    act: Callable[[], nn.Module] | None = nn.ReLU,
    norm: Callable[[int], nn.Module] | None = nn.BatchNorm2d,
) -> nn.Sequential:
    """Convolution, normalization, activation."""
    parts: list[nn.Module] = [
        nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=norm is None)
    ]
    if norm is not None:
        parts.append(norm(outputs))
    if act is not None:
        parts.append(act())
    return nn.Sequential(*parts)


class Call(nn.Module):
    """A module out of parts and a function of (parts, inputs)."""

    def __init__(self, forward: Callable[..., Any], *parts: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self._forward = forward

    def forward(self, *inputs: Tensor) -> Any:
        return self._forward(self.parts, *inputs)


def head(channels: int, classes: int = 10) -> nn.Module:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))


def residual(body: nn.Module, act: nn.Module | None = None) -> nn.Module:
    if act is None:
        return Call(lambda p, x: x + p[0](x), body)
    return Call(lambda p, x: p[1](p[0](x) + x), body, act)


def fire() -> Built:
    def block(inputs: int, squeeze: int, expand: int) -> nn.Module:
        return Call(
            lambda p, x: torch.cat([p[1](p[0](x)), p[2](p[0](x))], 1),
            conv(inputs, squeeze, 1, norm=None),
            conv(squeeze, expand, 1, norm=None),
            conv(squeeze, expand, 3, norm=None),
        )

    body = [conv(3, 64, 3, 2, norm=None), nn.MaxPool2d(3, 2, ceil_mode=True)]
    body += [block(64, 16, 64), block(128, 16, 64), nn.MaxPool2d(3, 2), block(128, 32, 128)]
    return nn.Sequential(*body, nn.Dropout(), nn.Conv2d(256, 10, 1), nn.ReLU(), head(10)), image(96)


def dense() -> Built:
    def layer(inputs: int) -> nn.Module:
        body = nn.Sequential(
            nn.BatchNorm2d(inputs),
            nn.ReLU(),
            nn.Conv2d(inputs, 64, 1, bias=False),
            nn.BatchNorm2d(64),
            nn.ReLU(),
            nn.Conv2d(64, 16, 3, padding=1, bias=False),
        )
        return Call(lambda p, x: torch.cat([x, p[0](x)], 1), body)

    parts = [conv(3, 32, 7, 2), nn.MaxPool2d(3, 2, 1), *(layer(32 + 16 * i) for i in range(4))]
    parts += [nn.BatchNorm2d(96), nn.ReLU(), nn.Conv2d(96, 48, 1, bias=False), nn.AvgPool2d(2)]
    parts += [layer(48 + 16 * i) for i in range(3)]
    return nn.Sequential(*parts, nn.BatchNorm2d(96), nn.ReLU(), head(96)), image(96)


def shuffle() -> Built:
    def mix(x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)

    def unit(channels: int) -> nn.Module:
        half = channels // 2
        body = nn.Sequential(
            conv(half, half, 1), conv(half, half, 3, 1, half, act=None), conv(half, half, 1)
        )

        def run(p: nn.ModuleList, x: Tensor) -> Tensor:
            a, b = x.chunk(2, dim=1)
            return mix(torch.cat([a, p[0](b)], 1))

        return Call(run, body)

    def down(inputs: int, outputs: int) -> nn.Module:
        half = outputs // 2
        left = nn.Sequential(conv(inputs, inputs, 3, 2, inputs, act=None), conv(inputs, half, 1))
        right = nn.Sequential(
            conv(inputs, half, 1), conv(half, half, 3, 2, half, act=None), conv(half, half, 1)
        )
        return Call(lambda p, x: mix(torch.cat([p[0](x), p[1](x)], 1)), left, right)

    body = [conv(3, 24, 3, 2), nn.MaxPool2d(3, 2, 1), down(24, 116), unit(116), unit(116)]
    return nn.Sequential(*body, down(116, 232), unit(232), conv(232, 256, 1), head(256)), image(128)


def inception() -> Built:
    def block(inputs: int) -> nn.Module:
        return Call(
            lambda p, x: torch.cat([part(x) for part in p], 1),
            conv(inputs, 32, 1),
            nn.Sequential(conv(inputs, 24, 1), conv(24, 32, 3)),
            nn.Sequential(conv(inputs, 8, 1), conv(8, 16, 5)),
            nn.Sequential(nn.MaxPool2d(3, 1, 1), conv(inputs, 16, 1)),
        )

    body = [conv(3, 32, 7, 2), nn.MaxPool2d(3, 2, 1), nn.LocalResponseNorm(5), block(32), block(96)]
    return nn.Sequential(*body, nn.AvgPool2d(2, ceil_mode=True), block(96), head(96)), image(96)


class Detector(nn.Module):
    """YOLO-like: CSP blocks, pooling pyramid, nearest upsampling, three heads."""

    def __init__(self, act: Callable[[], nn.Module] = nn.SiLU) -> None:
        super().__init__()

        def c(i: int, o: int, k: int = 3, s: int = 1) -> nn.Module:
            return conv(i, o, k, s, act=act)

        self.stem = nn.Sequential(c(3, 16, 3, 2), c(16, 32, 3, 2))
        self.csp = nn.ModuleList([self._csp(32, c), self._csp(64, c), self._csp(128, c)])
        self.down = nn.ModuleList([c(32, 64, 3, 2), c(64, 128, 3, 2)])
        self.squeeze, self.spread = c(128, 64, 1), c(256, 128, 1)
        self.lateral = c(128, 64, 1)
        self.merge = c(128, 64)
        self.heads = nn.ModuleList([nn.Conv2d(64, 24, 1), nn.Conv2d(128, 24, 1)])

    def _csp(self, channels: int, c: Any) -> nn.ModuleList:
        half = channels // 2
        return nn.ModuleList(
            [
                c(channels, channels, 1),
                c(half, half),
                c(half, half),
                c(channels + half, channels, 1),
            ]
        )

    def _run(self, csp: Any, x: Tensor) -> Tensor:
        parts = list(csp[0](x).chunk(2, 1))
        parts.append(parts[-1] + csp[2](csp[1](parts[-1])))
        return csp[3](torch.cat(parts, 1))

    def forward(self, x: Tensor) -> Any:
        a = self._run(self.csp[0], self.stem(x))
        b = self._run(self.csp[1], self.down[0](a))
        d = self._run(self.csp[2], self.down[1](b))
        e = self.squeeze(d)
        pools = [e]
        for _ in range(3):
            pools.append(F.max_pool2d(pools[-1], 5, 1, 2))
        f = self.spread(torch.cat(pools, 1))
        up = F.interpolate(self.lateral(f), scale_factor=2, mode="nearest")
        g = self.merge(torch.cat([up, b], 1))
        outs = [self.heads[0](g), self.heads[1](f)]
        flat = [o.view(o.shape[0], 3, 8, -1).permute(0, 1, 3, 2).flatten(1, 2) for o in outs]
        y = torch.cat(flat, 1)
        return torch.cat(
            [y[..., :2].sigmoid() * 2 - 0.5, y[..., 2:4].exp(), y[..., 4:].sigmoid()], -1
        )


class Segmenter(nn.Module):
    """DeepLab-like: dilated branches, image pooling, bilinear upsampling."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(conv(3, 32, 3, 2), conv(32, 64, 3, 2), conv(64, 64, 3, 2))
        self.low = conv(64, 24, 1)
        self.branches = nn.ModuleList(
            [conv(64, 32, 1)]
            + [
                nn.Sequential(
                    nn.Conv2d(64, 32, 3, padding=r, dilation=r, bias=False),
                    nn.BatchNorm2d(32),
                    nn.ReLU(),
                )
                for r in (2, 4)
            ]
        )
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), conv(64, 32, 1))
        self.join, self.final = conv(128, 32, 1), nn.Conv2d(32, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        size = y.shape[-2:]
        parts = [b(y) for b in self.branches]
        parts.append(F.interpolate(self.pool(y), size=size, mode="bilinear", align_corners=False))
        z = self.final(self.join(torch.cat(parts, 1)))
        return F.interpolate(z, size=x.shape[-2:], mode="bilinear", align_corners=False)


def super_resolution() -> Built:
    body = [nn.Conv2d(3, 32, 5, padding=2), nn.PReLU(32)]
    body += [
        residual(
            nn.Sequential(
                nn.Conv2d(32, 32, 3, padding=1), nn.PReLU(32), nn.Conv2d(32, 32, 3, padding=1)
            )
        )
        for _ in range(3)
    ]
    return nn.Sequential(*body, nn.Conv2d(32, 48, 3, padding=1), nn.PixelShuffle(4)), image(32)


def style() -> Built:
    def c(i: int, o: int, k: int, s: int = 1) -> nn.Module:
        return nn.Sequential(
            nn.ReflectionPad2d(k // 2),
            nn.Conv2d(i, o, k, s),
            nn.InstanceNorm2d(o, affine=True),
            nn.ReLU(),
        )

    up = nn.Upsample(scale_factor=2, mode="nearest")
    body = [c(3, 16, 9), c(16, 32, 3, 2), c(32, 64, 3, 2), residual(c(64, 64, 3)), up, c(64, 32, 3)]
    return nn.Sequential(*body, up, c(32, 16, 3), nn.Conv2d(16, 3, 9, padding=4), nn.Tanh()), image(
        64
    )


def group_norm() -> Built:
    def norm(channels: int) -> nn.Module:
        return nn.GroupNorm(8, channels)

    def block(channels: int) -> nn.Module:
        return residual(
            nn.Sequential(
                norm(channels),
                nn.SiLU(),
                nn.Conv2d(channels, channels, 3, padding=1),
                norm(channels),
                nn.SiLU(),
                nn.Conv2d(channels, channels, 3, padding=1),
            )
        )

    body = [nn.Conv2d(4, 32, 3, padding=1), block(32), nn.Conv2d(32, 64, 3, 2, 1), block(64)]
    return nn.Sequential(*body, nn.Upsample(scale_factor=2), nn.Conv2d(64, 4, 3, padding=1)), image(
        32, 4
    )


def inverted(act: Callable[[], nn.Module], gate: Callable[[], nn.Module] | None) -> Built:
    def squeeze(channels: int) -> nn.Module:
        assert gate is not None
        body = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(channels, channels // 4, 1),
            act(),
            nn.Conv2d(channels // 4, channels, 1),
            gate(),
        )
        return Call(lambda p, x: x * p[0](x), body)

    def block(i: int, o: int, k: int, s: int) -> nn.Module:
        wide = i * 4
        parts = [conv(i, wide, 1, act=act), conv(wide, wide, k, s, wide, act=act)]
        if gate is not None:
            parts.append(squeeze(wide))
        parts.append(conv(wide, o, 1, act=None))
        body = nn.Sequential(*parts)
        return residual(body) if s == 1 and i == o else body

    body = [
        conv(3, 16, 3, 2, act=act),
        block(16, 24, 3, 2),
        block(24, 24, 3, 1),
        block(24, 40, 5, 2),
    ]
    body += [
        block(40, 40, 5, 1),
        block(40, 80, 3, 2),
        block(80, 80, 3, 1),
        conv(80, 160, 1, act=act),
    ]
    return nn.Sequential(*body, head(160)), image(128)


def ghost() -> Built:
    def module(i: int, o: int) -> nn.Module:
        half = o // 2
        return Call(
            lambda p, x: torch.cat([p[0](x), p[1](p[0](x))], 1),
            conv(i, half, 1),
            conv(half, half, 3, 1, half),
        )

    body = [conv(3, 16, 3, 2), residual(nn.Sequential(module(16, 48), module(48, 16)))]
    body += [
        conv(16, 16, 3, 2, 16),
        module(16, 40),
        residual(nn.Sequential(module(40, 120), module(120, 40))),
    ]
    return nn.Sequential(*body, head(40)), image(96)


def rep() -> Built:
    def block(i: int, o: int, s: int) -> nn.Module:
        parts = [conv(i, o, 3, s, act=None), conv(i, o, 1, s, act=None)]
        if i == o and s == 1:
            parts.append(nn.BatchNorm2d(i))
        return Call(lambda p, x: F.relu(sum(part(x) for part in p)), *parts)

    return nn.Sequential(
        block(3, 32, 2), block(32, 64, 2), block(64, 64, 1), block(64, 128, 2), head(128)
    ), image(96)


class ConvNextBlock(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dw, self.norm = nn.Conv2d(dim, dim, 7, padding=3, groups=dim), nn.LayerNorm(dim)
        self.a, self.b = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        self.gamma = nn.Parameter(torch.full((dim,), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.dw(x).permute(0, 2, 3, 1))
        return x + (self.gamma * self.b(F.gelu(self.a(y)))).permute(0, 3, 1, 2)


def convnext() -> Built:
    body = [nn.Conv2d(3, 32, 4, 4), ConvNextBlock(32), ConvNextBlock(32), nn.BatchNorm2d(32)]
    return nn.Sequential(*body, nn.Conv2d(32, 64, 2, 2), ConvNextBlock(64), head(64)), image(96)


class Mixer(nn.Module):
    def __init__(self, tokens: int, dim: int) -> None:
        super().__init__()
        self.a, self.b = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.tokens = nn.Sequential(nn.Linear(tokens, 64), nn.GELU(), nn.Linear(64, tokens))
        self.dims = nn.Sequential(nn.Linear(dim, 128), nn.GELU(), nn.Linear(128, dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.tokens(self.a(x).transpose(1, 2)).transpose(1, 2)
        return x + self.dims(self.b(x))


def mixer() -> Built:
    def run(p: nn.ModuleList, x: Tensor) -> Tensor:
        y = p[0](x).flatten(2).transpose(1, 2)
        return p[4](p[3](p[2](p[1](y))).mean(1))

    return Call(
        run,
        nn.Conv2d(3, 64, 8, 8),
        Mixer(64, 64),
        Mixer(64, 64),
        nn.LayerNorm(64),
        nn.Linear(64, 10),
    ), image(64)


def recurrent(kind: str) -> Built:
    """CRNN: a small convolutional net, a bidirectional recurrent layer, a row of letters."""
    rnn = getattr(nn, kind)(64, 48, 2, batch_first=True, bidirectional=True)

    def run(p: nn.ModuleList, x: Tensor) -> Tensor:
        y = p[0](x).mean(2).transpose(1, 2)
        return p[2](p[1](y)[0]).log_softmax(-1)

    body = nn.Sequential(conv(1, 32, 3, 2), conv(32, 64, 3, 2))
    return Call(run, body, rnn, nn.Linear(96, 40)), (torch.randn(1, 1, 32, 128),)


def temporal() -> Built:
    def block(i: int, o: int, d: int) -> nn.Module:
        body = nn.Sequential(
            nn.ConstantPad1d((2 * d, 0), 0.0),
            nn.Conv1d(i, o, 3, dilation=d),
            nn.ReLU(),
            nn.ConstantPad1d((2 * d, 0), 0.0),
            nn.Conv1d(o, o, 3, dilation=d),
            nn.ReLU(),
        )
        return Call(lambda p, x: F.relu(p[0](x) + p[1](x)), body, nn.Conv1d(i, o, 1))

    return nn.Sequential(
        block(4, 32, 1),
        block(32, 32, 2),
        block(32, 64, 4),
        nn.AdaptiveAvgPool1d(1),
        nn.Flatten(),
        nn.Linear(64, 5),
    ), (torch.randn(1, 4, 200),)


def keyword() -> Built:
    body = [nn.Conv2d(1, 64, (10, 4), (2, 2), (5, 1), bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    for _ in range(4):
        body += [conv(64, 64, 3, 1, 64), conv(64, 64, 1)]
    return nn.Sequential(*body, nn.AvgPool2d((25, 5)), nn.Flatten(), nn.Linear(64, 12)), (
        torch.randn(1, 1, 49, 10),
    )


def points() -> Built:
    def run(p: nn.ModuleList, x: Tensor) -> Tensor:
        return p[1](p[0](x).amax(2))

    def c(i: int, o: int) -> nn.Module:
        return nn.Sequential(nn.Conv1d(i, o, 1), nn.BatchNorm1d(o), nn.ReLU())

    deep = nn.Sequential(nn.Linear(256, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 10))
    return Call(run, nn.Sequential(c(3, 32), c(32, 64), c(64, 256)), deep), (
        torch.randn(1, 3, 512),
    )


def activations() -> Built:
    parts: list[nn.Module] = []
    channels = 3
    for act in (
        nn.ELU,
        nn.Mish,
        nn.Hardswish,
        nn.LeakyReLU,
        nn.Softplus,
        nn.ReLU6,
        nn.GELU,
        nn.SELU,
        nn.Hardsigmoid,
        nn.Sigmoid,
    ):
        parts.append(conv(channels, 32, act=act))
        channels = 32
    return nn.Sequential(*parts, head(32)), image(32)


def autoencoder() -> Built:
    down = [conv(1, 16, 3, 2), conv(16, 32, 3, 2), nn.Flatten(), nn.Linear(32 * 49, 16)]
    up = [
        nn.Linear(16, 32 * 49),
        nn.ReLU(),
        nn.Unflatten(1, (32, 7, 7)),
        nn.ConvTranspose2d(32, 16, 4, 2, 1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.ConvTranspose2d(16, 1, 4, 2, 1),
        nn.Sigmoid(),
    ]
    return nn.Sequential(*down, *up), image(28, 1)


def vgg() -> Built:
    body = [
        conv(3, 32, norm=None),
        conv(32, 32),
        nn.MaxPool2d(2),
        conv(32, 64),
        conv(64, 64),
        nn.MaxPool2d(2),
    ]
    last = [
        nn.Flatten(),
        nn.Linear(64 * 64, 128),
        nn.ReLU(),
        nn.Dropout(),
        nn.Linear(128, 10),
        nn.Softmax(1),
    ]
    return nn.Sequential(*body, *last), image(32)


def attention_unet() -> Built:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = conv(3, 16), conv(16, 32), conv(32, 64)
            self.att = nn.MultiheadAttention(64, 4, batch_first=True)
            self.norm = nn.GroupNorm(8, 64)
            self.up1, self.up2 = nn.ConvTranspose2d(64, 32, 2, 2), nn.ConvTranspose2d(32, 16, 2, 2)
            self.d, self.e, self.out = conv(64, 32), conv(32, 16), nn.Conv2d(16, 3, 1)
            self.time = nn.Sequential(nn.Linear(8, 64), nn.SiLU(), nn.Linear(64, 64))

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            a = self.a(x)
            b = self.b(F.max_pool2d(a, 2))
            c = self.c(F.max_pool2d(b, 2)) + self.time(t)[:, :, None, None]
            n, ch, h, w = c.shape
            seq = self.norm(c).flatten(2).transpose(1, 2)
            c = c + self.att(seq, seq, seq, need_weights=False)[0].transpose(1, 2).view(n, ch, h, w)
            y = self.d(torch.cat([self.up1(c), b], 1))
            return self.out(self.e(torch.cat([self.up2(y), a], 1)))

    return Net(), (torch.randn(1, 3, 32, 32), torch.randn(1, 8))


def cbam() -> Built:
    def run(p: nn.ModuleList, x: Tensor) -> Tensor:
        g = torch.sigmoid(p[0](x.mean((2, 3), keepdim=True)) + p[0](x.amax((2, 3), keepdim=True)))
        x = x * g
        s = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)
        return x * torch.sigmoid(p[1](s))

    def block(c: int) -> nn.Module:
        mlp = nn.Sequential(nn.Conv2d(c, c // 8, 1), nn.ReLU(), nn.Conv2d(c // 8, c, 1))
        return residual(
            nn.Sequential(
                conv(c, c), conv(c, c, act=None), Call(run, mlp, nn.Conv2d(2, 1, 7, padding=3))
            ),
            nn.ReLU(),
        )

    return nn.Sequential(
        conv(3, 32, 7, 2), nn.MaxPool2d(3, 2, 1), block(32), conv(32, 64, 3, 2), block(64), head(64)
    ), image(96)


def hrnet() -> Built:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Sequential(conv(3, 32, 3, 2), conv(32, 32, 3, 2))
            self.high, self.low = conv(32, 18), conv(32, 36, 3, 2)
            self.hh, self.ll = conv(18, 18), conv(36, 36)
            self.hl, self.lh = conv(18, 36, 3, 2, act=None), conv(36, 18, 1, act=None)
            self.out = nn.Conv2d(54, 17, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.stem(x)
            h, low = self.hh(self.high(y)), self.ll(self.low(y))
            h2 = F.relu(h + F.interpolate(self.lh(low), scale_factor=2.0, mode="nearest"))
            l2 = F.relu(low + self.hl(h))
            up = F.interpolate(l2, size=h2.shape[-2:], mode="bilinear", align_corners=True)
            return self.out(torch.cat([h2, up], 1))

    return Net(), image(128)


def wide_kernel() -> Built:
    class Gate(nn.Module):
        def __init__(self, c: int) -> None:
            super().__init__()
            self.p1, self.p2 = nn.Conv2d(c, c, 1), nn.Conv2d(c, c, 1)
            self.a = nn.Conv2d(c, c, 5, padding=2, groups=c)
            self.b = nn.Conv2d(c, c, 7, padding=9, groups=c, dilation=3)
            self.c = nn.Conv2d(c, c, 1)

        def forward(self, x: Tensor) -> Tensor:
            u = F.gelu(self.p1(x))
            return x + self.p2(u * self.c(self.b(self.a(u))))

    return nn.Sequential(
        conv(3, 32, 7, 4),
        Gate(32),
        nn.BatchNorm2d(32),
        Gate(32),
        conv(32, 64, 3, 2),
        Gate(64),
        head(64),
    ), image(96)


def wavenet() -> Built:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv1d(1, 32, 1)
            self.gates = nn.ModuleList(
                [nn.Conv1d(32, 64, 3, padding=2**i, dilation=2**i) for i in range(4)]
            )
            self.mix = nn.ModuleList([nn.Conv1d(32, 64, 1) for _ in range(4)])
            self.last = nn.Sequential(
                nn.ReLU(), nn.Conv1d(32, 32, 1), nn.ReLU(), nn.Conv1d(32, 1, 1)
            )

        def forward(self, x: Tensor) -> Tensor:
            x, total = self.first(x), 0.0
            for gate, mix in zip(self.gates, self.mix, strict=True):
                a, b = gate(x).chunk(2, 1)
                r, s = mix(torch.tanh(a) * torch.sigmoid(b)).chunk(2, 1)
                x, total = x + r, total + s
            return self.last(total)

    return Net(), (torch.randn(1, 1, 1000),)


def tabular() -> Built:
    def run(p: nn.ModuleList, ids: Tensor, x: Tensor) -> Tensor:
        e = p[0](ids).flatten(1)
        return torch.sigmoid(p[1](torch.cat([e, p[2](x)], 1)))

    deep = nn.Sequential(nn.Linear(5 * 8 + 16, 64), nn.ReLU(), nn.BatchNorm1d(64), nn.Linear(64, 1))
    return Call(run, nn.Embedding(100, 8), deep, nn.Linear(13, 16)), (
        torch.randint(0, 100, (4, 5)),
        torch.randn(4, 13),
    )


def resnet50(classes: int = 1000) -> nn.Module:
    """He et al., 2015, with the stride in the 3 x 3 convolutions."""

    def block(inputs: int, width: int, stride: int) -> nn.Module:
        body = nn.Sequential(
            conv(inputs, width, 1),
            conv(width, width, 3, stride),
            conv(width, 4 * width, 1, act=None),
        )
        if stride == 1 and inputs == 4 * width:
            return residual(body, nn.ReLU())
        side = conv(inputs, 4 * width, 1, stride, act=None)
        return Call(lambda p, x: F.relu(p[0](x) + p[1](x)), body, side)

    parts = [conv(3, 64, 7, 2), nn.MaxPool2d(3, 2, 1)]
    inputs = 64
    for width, count, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for i in range(count):
            parts.append(block(inputs, width, stride if i == 0 else 1))
            inputs = 4 * width
    return nn.Sequential(*parts, head(inputs, classes))


NETS: dict[str, Callable[[], Built]] = {
    "fire": fire,
    "dense": dense,
    "shuffle": shuffle,
    "inception": inception,
    "detector": lambda: (Detector(), image(128)),
    "detector, leaky": lambda: (Detector(lambda: nn.LeakyReLU(0.1)), image(128)),
    "segmenter": lambda: (Segmenter(), image(96)),
    "super-resolution": super_resolution,
    "style": style,
    "group norm": group_norm,
    "inverted, swish": lambda: inverted(nn.SiLU, nn.Sigmoid),
    "inverted, hard swish": lambda: inverted(nn.Hardswish, nn.Hardsigmoid),
    "inverted, relu6": lambda: inverted(nn.ReLU6, None),
    "ghost": ghost,
    "rep": rep,
    "convnext": convnext,
    "mixer": mixer,
    "lstm": lambda: recurrent("LSTM"),
    "gru": lambda: recurrent("GRU"),
    "temporal": temporal,
    "keyword": keyword,
    "points": points,
    "activations": activations,
    "autoencoder": autoencoder,
    "vgg": vgg,
    "attention U-Net": attention_unet,
    "cbam": cbam,
    "hrnet": hrnet,
    "wide kernels": wide_kernel,
    "wavenet": wavenet,
    "tabular": tabular,
}

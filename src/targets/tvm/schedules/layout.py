"""Kernels of the channel-blocked layout: into it, out of it, elementwise in it, and global pooling.

NCHWc holds [n, ceil(c / lanes), h, w, lanes]. The lanes beyond the last channel hold whatever the
zeros of padded weights became in epilogues: finite, and met by zero weights only.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from .builder import Expr, KernelBuilder
from .epilogue import NO_EPILOGUE, Access, Epilogue
from .spec import CpuSpec
from .tile import RegisterTile
from .tiling import Tile


def blocked_shape(shape: tuple[int, ...], lanes: int) -> tuple[int, ...]:
    """The storage shape of an NCHW tensor in blocks of `lanes` channels."""
    n, c, h, w = shape
    return (n, -(-c // lanes), h, w, lanes)


def blocked_access(shape: tuple[int, ...], lanes: int, broadcast: bool = True) -> Access:
    """Addressing of a blocked tensor by (n, channel block, row, column)."""
    storage = blocked_shape(shape, lanes)
    _, blocks, h, w, _ = storage
    strides = [blocks * h * w * lanes, h * w * lanes, w * lanes, lanes]
    if broadcast:
        strides = [
            0 if extent == 1 else stride
            for extent, stride in zip(storage[:4], strides, strict=True)
        ]
    return Access(storage, tuple(strides))


def into_blocks(shape: tuple[int, ...], spec: CpuSpec, name: str) -> Any:
    """`(data [n, c, h, w], out)`: the blocked copy, zero beyond the last channel."""
    n, c, h, w = shape
    lanes = spec.lanes
    b = KernelBuilder(lanes, spec.threads)
    data = b.param("data", shape)
    out = b.param("out", blocked_shape(shape, lanes))
    blocks = -(-c // lanes)
    with b.loop(n) as image, b.loop(blocks, parallel=True) as block, b.loop(h * w) as pixel:
        target = ((image * blocks + block) * (h * w) + pixel) * lanes
        with b.loop(lanes) as lane:
            channel = block * lanes + lane
            value = b.load(data, (image * c + channel) * (h * w) + pixel, 1)
            if c % lanes:
                value = b.tirx.op.if_then_else(channel < b.int64(c), value, b.splat(0.0, 1))
            b.store(out, target + lane, value)
    return b.finish(name)


def out_of_blocks(shape: tuple[int, ...], spec: CpuSpec, name: str) -> Any:
    """`(data [n, c / lanes, h, w, lanes], out [n, c, h, w])`."""
    n, c, h, w = shape
    lanes = spec.lanes
    b = KernelBuilder(lanes, spec.threads)
    data = b.param("data", blocked_shape(shape, lanes))
    out = b.param("out", shape)
    blocks = -(-c // lanes)
    start = 0
    for size, count in ((lanes, c // lanes), (c % lanes, 1)):
        if size and count:
            with (
                b.loop(n) as image,
                b.loop(count, parallel=True) as j,
                b.loop(size) as lane,
                b.loop(h * w) as pixel,
            ):
                block = j + start
                source = ((image * blocks + block) * (h * w) + pixel) * lanes + lane
                target = (image * c + block * lanes + lane) * (h * w) + pixel
                b.store(out, target, b.load(data, source, 1))
            start += count
    return b.finish(name)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Elementwise:
    """An epilogue on its own: its value is the tensor `data` at (n, channel block, row, column)."""

    shape: tuple[int, ...]
    data: Access
    epilogue: Epilogue


def elementwise_kernel(config: Elementwise, spec: CpuSpec, name: str) -> Any:
    """The PrimFunc `(data, *operands, out)` of a blocked elementwise expression."""
    lanes = spec.lanes
    b = KernelBuilder(lanes, spec.threads)
    data = b.param("data", config.data.shape)
    operands = config.epilogue.declare(b)
    storage = blocked_access(config.shape, lanes)
    out = b.param("out", storage.shape)
    n, blocks, h, w, _ = storage.shape
    with (
        b.loop(n) as image,
        b.loop(blocks, parallel=True) as block,
        b.loop(h) as row,
        b.loop(w) as column,
    ):
        coordinates = [image, block, row, column]
        value = b.load(data, config.data.offset(coordinates), lanes)
        value = config.epilogue.apply(b, operands, value, coordinates, lanes)
        b.store(out, storage.offset(coordinates), value)
    return b.finish(name)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GlobalPool:
    """The mean or the maximum over all pixels of a blocked tensor of NCHW shape `shape`."""

    mean: bool
    shape: tuple[int, ...]
    epilogue: Epilogue = NO_EPILOGUE


def global_pool_kernel(config: GlobalPool, spec: CpuSpec, name: str) -> Any:
    """The PrimFunc `(data, *operands, out [n, c / lanes, 1, 1, lanes])`."""
    lanes = spec.lanes
    b = KernelBuilder(lanes, spec.threads)
    n, c, h, w = config.shape
    data = b.param("data", blocked_shape(config.shape, lanes))
    operands = config.epilogue.declare(b)
    storage = blocked_access((n, c, 1, 1), lanes)
    out = b.param("out", storage.shape)
    blocks = -(-c // lanes)
    partials = min(4, h * w)
    groups, rest = divmod(h * w, partials)

    def combine(a: Expr, value: Expr) -> Expr:
        return a + value if config.mean else b.tirx.Max(a, value)

    with b.loop(n) as image, b.loop(blocks, parallel=True) as block:
        base = b.let((image * blocks + block) * (h * w * lanes), 1, "int64")
        acc = RegisterTile(b, Tile(partials, 1))
        if not config.mean:
            for slot in range(partials):
                acc.replace(slot, 0, b.splat(float("-inf"), lanes))
        with b.loop(groups) as i:
            for slot in range(partials):
                value = b.load(data, base + (i * partials + slot) * lanes, lanes)
                acc.replace(slot, 0, combine(acc.value(slot, 0), value))
        for slot in range(rest):
            value = b.load(data, base + (groups * partials + slot) * lanes, lanes)
            acc.replace(slot, 0, combine(acc.value(slot, 0), value))
        total = acc.value(0, 0)
        for slot in range(1, partials):
            total = combine(total, acc.value(slot, 0))
        if config.mean:
            total = total * b.splat(1.0 / (h * w), lanes)
        zero = b.int64(0)
        coordinates = [image, block, zero, zero]
        total = config.epilogue.apply(b, operands, b.let(total, lanes), coordinates, lanes)
        b.store(out, storage.offset(coordinates), total)
    return b.finish(name)

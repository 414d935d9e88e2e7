"""Depthwise convolution and pooling over channel-blocked activations.

Both slide a window over each channel on its own: a vector of channels at a time, a few pixels of
an output row in registers.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from .builder import Expr, KernelBuilder
from .epilogue import NO_EPILOGUE, Access, Epilogue
from .spec import CpuSpec
from .tile import OutputWriter, RegisterTile
from .tiling import Tile
from .window import ColumnTiles, Window, column_tiles


@dataclasses.dataclass(frozen=True, kw_only=True)
class Channelwise:
    """A depthwise convolution (weights [c / lanes, kh, kw, lanes]) or a pooling (no weights).

    `average_all` divides by the whole window, `average_inside` by the taps inside the input.
    """

    kind: Literal["depthwise", "max", "average_all", "average_inside"]
    batch: int
    blocks: int
    window: Window
    epilogue: Epilogue = NO_EPILOGUE


class _Writer:
    def __init__(self, config: Channelwise, spec: CpuSpec, out: Access) -> None:
        self.config = config
        self.window = config.window
        self.lanes = spec.lanes
        self.b = KernelBuilder(spec.lanes, spec.threads)
        self.storage = out
        # Half the registers: the taps of a row need some too.
        self.pixels = min(self.window.output[1], spec.registers // 2 - 2)
        tiles = -(-self.window.output[1] // self.pixels)
        self.pixels = -(-self.window.output[1] // tiles)

    def write(self, name: str) -> Any:
        config, b = self.config, self.b
        height, width = self.window.input
        shape = (config.batch, config.blocks, height, width, self.lanes)
        self.data = b.param("data", shape)
        if config.kind == "depthwise":
            self.weight = b.param("weight", (config.blocks, *self.window.kernel, self.lanes))
        operands = config.epilogue.declare(b)
        out = b.param("out", self.storage.shape)
        self.writer = OutputWriter(b, config.epilogue, operands, out, self.storage)
        with (
            b.loop(config.batch, parallel=config.batch > 1) as n,
            b.loop(config.blocks, parallel=config.batch == 1) as block,
            b.loop(self.window.output[0]) as oh,
        ):
            for run in column_tiles(self.window, self.pixels):
                with b.loop(run.count) as i:
                    self._tile(run, n, block, oh, i * run.pixels + run.start)
        return b.finish(name)

    def _tile(self, run: ColumnTiles, n: Expr, block: Expr, oh: Expr, ow: Expr) -> None:
        b, window, lanes = self.b, self.window, self.lanes
        acc = RegisterTile(b, Tile(run.pixels, 1))
        pooling_max = self.config.kind == "max"
        if pooling_max:
            for p in range(run.pixels):
                acc.replace(p, 0, b.splat(float("-inf"), lanes))
        kh, kw = window.kernel
        with b.loop(kh) as y:
            row = window.row(oh, y)
            with b.when(window.row_inside(b, row)):
                base = ((n * self.config.blocks + block) * window.input[0] + row) * window.input[1]
                for x, valid in enumerate(run.taps):
                    column = ow * window.strides[1] + x * window.dilations[1] - window.pads[1]
                    if self.config.kind == "depthwise":
                        offset = ((block * kh + y) * kw + x) * lanes
                        weight = b.let(b.load(self.weight, offset, lanes), lanes)
                    for p in valid:
                        offset = (base + column + p * window.strides[1]) * lanes
                        value = b.load(self.data, offset, lanes)
                        if pooling_max:
                            acc.replace(p, 0, b.tirx.Max(acc.value(p, 0), value))
                        else:
                            if self.config.kind == "depthwise":
                                value = value * weight
                            acc.add(p, 0, value)

        def result(p: int, _: int) -> Expr:
            total = acc.value(p, 0)
            average = self.config.kind.startswith("average")
            return total * self._reciprocal(run, oh, p) if average else total

        self.writer.store_tile(result, lambda p, _: [n, block, oh, ow + p], run.pixels, 1, lanes)

    def _reciprocal(self, run: ColumnTiles, oh: Expr, pixel: int) -> Expr:
        """One over the number of taps that are averaged."""
        b, window = self.b, self.window
        kh, kw = window.kernel
        if self.config.kind == "average_all":
            return b.splat(1.0 / (kh * kw), self.lanes)
        columns = sum(pixel in valid for valid in run.taps)
        rows: Any = b.int64(0)
        for y in range(kh):
            inside = window.row_inside(b, window.row(oh, b.int64(y)))
            one = b.int64(1)
            rows = rows + (one if inside is None else b.tirx.Select(inside, one, b.int64(0)))
        count = b.tirx.Cast("float32", rows * columns)
        return b.splat(b.splat(1.0, 1) / count, self.lanes)


def channelwise_kernel(config: Channelwise, spec: CpuSpec, name: str, out: Access) -> Any:
    """The PrimFunc `(data, [weight,] *operands, out)`, all blocked, of a depthwise convolution or
    a pooling. Operands and `out` are addressed by (n, channel block, row, column)."""
    return _Writer(config, spec, out).write(name)

"""Convolution over channel-blocked activations (NCHWc: [n, c / lanes, h, w, lanes]).

The vector lanes are output channels, so that images of any width vectorize; the register tile is a
few pixels of one output row by a few channel blocks. The input is either channel-blocked too or
plain NCHW, which suits the few channels of a stem. Grouped convolutions whose groups are whole
blocks are covered; depthwise ones are in `depthwise.py`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from .builder import Expr, KernelBuilder
from .epilogue import NO_EPILOGUE, Access, Epilogue
from .spec import CpuSpec
from .tile import OutputWriter, RegisterTile
from .tiling import Tile, choose_tile, split_extent
from .window import ColumnTiles, Window, column_tiles


@dataclasses.dataclass(frozen=True, kw_only=True)
class Conv:
    """A convolution; channel counts are those of the whole operator, not of a group."""

    batch: int
    in_channels: int
    out_channels: int
    groups: int
    window: Window
    blocked_input: bool
    epilogue: Epilogue = NO_EPILOGUE

    def tile(self, spec: CpuSpec) -> Tile:
        """The register tile used, which fixes the packing of the weights."""
        blocks = -(-self.out_channels // self.groups // spec.lanes)
        return choose_tile(self.window.output[1], blocks, spec)


class _Writer:
    def __init__(self, config: Conv, spec: CpuSpec, storage: Access) -> None:
        self.config = config
        self.window = config.window
        self.lanes = spec.lanes
        self.b = KernelBuilder(spec.lanes, spec.threads)
        self.tile = config.tile(spec)
        self.in_channels = config.in_channels // config.groups
        self.in_blocks = -(-self.in_channels // self.lanes)
        self.out_blocks = -(-config.out_channels // config.groups // self.lanes)
        kh, kw = self.window.kernel
        depth = self.in_blocks * self.lanes if config.blocked_input else self.in_channels
        self.reduction = depth * kh * kw
        height, width = self.window.input
        if config.blocked_input:
            blocks = config.groups * self.in_blocks
            in_shape: tuple[int, ...] = (config.batch, blocks, height, width, self.lanes)
        else:
            in_shape = (config.batch, config.in_channels, height, width)
        self.data_shape = in_shape
        self.storage = storage

    def write(self, name: str, data_shape: tuple[int, ...]) -> Any:
        config = self.config
        self.data = self.b.param("data", data_shape)
        packed = config.groups * self.out_blocks * self.lanes * self.reduction
        self.weight = self.b.param("weight", (packed,))
        operands = config.epilogue.declare(self.b)
        out = self.b.param("out", self.storage.shape)
        self.writer = OutputWriter(self.b, config.epilogue, operands, out, self.storage)
        runs = column_tiles(self.window, self.tile.rows)
        blocks = split_extent(self.out_blocks, self.tile.vectors)
        height, width = self.window.input
        weights_bigger = packed > self.in_channels * config.groups * height * width
        rows = self.window.output[0]
        with self.b.loop(config.batch, parallel=True) as n, self.b.loop(config.groups) as group:
            if weights_bigger:
                self._over_blocks(
                    blocks,
                    lambda size, block: self._over_rows(
                        rows, lambda oh: self._over_columns(runs, n, group, oh, block, size)
                    ),
                    parallel=config.batch == 1,
                )
            elif rows == 1:
                self._over_columns_outside(runs, blocks, n, group)
            else:
                self._over_rows(
                    rows,
                    lambda oh: self._over_blocks(
                        blocks,
                        lambda size, block: self._over_columns(runs, n, group, oh, block, size),
                    ),
                    parallel=config.batch == 1,
                )
        return self.b.finish(name)

    def _over_blocks(self, blocks: Any, body: Any, parallel: bool = False) -> None:
        start = 0
        for size, count in blocks:
            with self.b.loop(count, parallel=parallel) as j:
                body(size, j * size + start)
            start += size * count

    def _over_rows(self, rows: int, body: Any, parallel: bool = False) -> None:
        with self.b.loop(rows, parallel=parallel) as oh:
            body(oh)

    def _over_columns(
        self, runs: list[ColumnTiles], n: Expr, group: Expr, oh: Expr, block: Expr, size: int
    ) -> None:
        for run in runs:
            with self.b.loop(run.count) as i:
                self._tile(run, n, group, oh, i * run.pixels + run.start, block, size)

    def _over_columns_outside(
        self, runs: list[ColumnTiles], blocks: Any, n: Expr, group: Expr
    ) -> None:
        """For one long row: a tile of pixels meets all channels while it is in the cache."""
        oh = self.b.int64(0)
        for run in runs:
            with self.b.loop(run.count, parallel=self.config.batch == 1) as i:
                ow = i * run.pixels + run.start
                self._over_blocks(
                    blocks,
                    lambda size, block, run=run, ow=ow: self._tile(
                        run, n, group, oh, ow, block, size
                    ),
                )

    def _tile(
        self,
        run: ColumnTiles,
        n: Expr,
        group: Expr,
        oh: Expr,
        ow: Expr,
        block: Expr,
        size: int,
    ) -> None:
        b, window = self.b, self.window
        accumulators = RegisterTile(b, Tile(run.pixels, size))
        kh, kw = window.kernel
        outer = self.in_blocks if self.config.blocked_input else self.in_channels
        inner = self.lanes if self.config.blocked_input else 1
        weights = (group * self.out_blocks + block) * (self.lanes * self.reduction)
        with b.loop(outer) as ic, b.loop(kh) as y:
            row = window.row(oh, y)
            with b.when(window.row_inside(b, row)):
                channel = group * outer + ic
                base = ((n * (self.config.groups * outer) + channel) * window.input[0] + row) * (
                    window.input[1] * inner
                )
                base = b.let(base, 1, "int64")

                def taps(x: Expr, valid: tuple[int, ...], base: Expr = base) -> None:
                    column = ow * window.strides[1] + x * window.dilations[1] - window.pads[1]
                    with b.loop(inner) as lane:
                        depth = (((ic * kh + y) * kw + x) * inner + lane) * (size * self.lanes)
                        accumulators.rank_one_update(
                            [
                                (
                                    p,
                                    b.load(
                                        self.data,
                                        base + (column + p * window.strides[1]) * inner + lane,
                                        1,
                                    ),
                                )
                                for p in valid
                            ],
                            lambda v: b.load(
                                self.weight, weights + depth + v * self.lanes, self.lanes
                            ),
                        )

                if run.inside:
                    with b.loop(kw) as x:
                        taps(x, run.taps[0])
                else:
                    for x, valid in enumerate(run.taps):
                        if valid:
                            taps(b.int64(x), valid)
        first = group * self.out_blocks + block
        self.writer.store_tile(
            accumulators.value,
            lambda p, v: [n, first + v, oh, ow + p],
            run.pixels,
            size,
            self.lanes,
        )


def conv_kernel(
    config: Conv, spec: CpuSpec, name: str, data_shape: tuple[int, ...], out: Access
) -> Any:
    """The PrimFunc `(data, weight, *operands, out)` of a convolution.

    `data_shape` is the storage shape of the input: [n, c / lanes, h, w, lanes], or [n, c, h, w]
    for a plain one. `out` and the epilogue's operands are addressed by (n, channel block, row,
    column); with a flattened pointwise window the row is 0 and the column counts all pixels.
    """
    return _Writer(config, spec, out).write(name, data_shape)

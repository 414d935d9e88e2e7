"""Sliding windows: what convolution, depthwise convolution and pooling share.

A row of output pixels is cut into tiles. Where a tile's window lies inside the input it is one of
many equal iterations of a loop; a tile at an edge is written out on its own, with the taps outside
the input left out. So no input is ever copied into a padded buffer. Rows outside the input are
skipped by a test per kernel row.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from .builder import Expr, KernelBuilder
from .tiling import split_extent


@dataclasses.dataclass(frozen=True, kw_only=True)
class Window:
    """The spatial part of a windowed operator: pairs are (height, width).

    `pads` are those at the top and left; what lies beyond the input at the bottom and right
    follows from the output's size.
    """

    input: tuple[int, int]
    output: tuple[int, int]
    kernel: tuple[int, int]
    strides: tuple[int, int] = (1, 1)
    dilations: tuple[int, int] = (1, 1)
    pads: tuple[int, int] = (0, 0)

    @property
    def pointwise(self) -> bool:
        """1x1, stride 1, no padding: pixels may be flattened to one dimension."""
        return (self.kernel, self.strides, self.pads) == ((1, 1), (1, 1), (0, 0)) and (
            self.input == self.output
        )

    def flattened(self) -> Window:
        """A pointwise window over one row of all pixels."""
        pixels = (1, self.input[0] * self.input[1])
        return dataclasses.replace(self, input=pixels, output=pixels)

    def taps(self, start: int, pixels: int, tap: int) -> tuple[int, ...]:
        """Which of `pixels` output columns from `start` have column tap `tap` inside the input."""
        first = tap * self.dilations[1] - self.pads[1]
        return tuple(
            p for p in range(pixels) if 0 <= (start + p) * self.strides[1] + first < self.input[1]
        )

    def row(self, oh: Expr, tap: Expr) -> Expr:
        """The input row under kernel row `tap` of output row `oh`."""
        return oh * self.strides[0] + tap * self.dilations[0] - self.pads[0]

    def row_inside(self, builder: KernelBuilder, row: Expr) -> Expr | None:
        """The test that an input row exists; None where all do."""
        bottom = (
            (self.output[0] - 1) * self.strides[0]
            + (self.kernel[0] - 1) * self.dilations[0]
            - self.pads[0]
        )
        tests: list[Any] = []
        if self.pads[0] > 0:
            tests.append(row >= builder.int64(0))
        if bottom >= self.input[0]:
            tests.append(row < builder.int64(self.input[0]))
        if len(tests) == 2:
            return builder.tirx.And(*tests)
        return tests[0] if tests else None


@dataclasses.dataclass(frozen=True)
class ColumnTiles:
    """`count` equal tiles of `pixels` columns from `start`; `taps[kw]` lists the valid pixels."""

    start: int
    pixels: int
    count: int
    taps: tuple[tuple[int, ...], ...]

    @property
    def inside(self) -> bool:
        """Every tap of every pixel lies inside the input."""
        return all(len(valid) == self.pixels for valid in self.taps)


def column_tiles(window: Window, pixels: int) -> list[ColumnTiles]:
    """An output row as runs of equal tiles of at most `pixels` columns."""
    runs: list[ColumnTiles] = []
    start = 0
    for size, count in split_extent(window.output[1], pixels):
        for _ in range(count):
            taps = tuple(window.taps(start, size, kw) for kw in range(window.kernel[1]))
            last = runs[-1] if runs else None
            if last is not None and (last.pixels, last.taps) == (size, taps):
                runs[-1] = dataclasses.replace(last, count=last.count + 1)
            else:
                runs.append(ColumnTiles(start, size, 1, taps))
            start += size
    return runs

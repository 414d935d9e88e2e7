"""Few-bit grids of a matrix [in, out]: scales and zero points of runs of rows, codes, and back.

Here: `Grid` (bits, block, zero points), `Codes`, rounding to nearest with and without a search for
the best clipping, all arrays in and arrays out. Not here: rounding that looks at inputs (`gptq`),
zero points by half-quadratic splitting (`hqq`), graphs.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from .numbers import MIN_SCALE

_SHRINK = np.linspace(1.0, 0.45, 23)
"""Shares of the range that a search tries."""


@dataclasses.dataclass(frozen=True)
class Grid:
    """How the columns of a matrix are stored: unsigned codes of `bits`, a scale for each `block`
    rows of a column (0: the whole column), and integer zero points unless `symmetric`."""

    bits: int
    block: int = 0
    symmetric: bool = True

    @property
    def levels(self) -> int:
        """The greatest code."""
        return (1 << self.bits) - 1

    @property
    def middle(self) -> int:
        """The code of zero where there are no zero points."""
        return 1 << (self.bits - 1)

    def size(self, depth: int) -> int:
        """Rows in a block of a matrix with that many rows."""
        return self.block or max(1, depth)

    def blocks(self, depth: int) -> int:
        """Blocks of a column."""
        return -(-depth // self.size(depth))


@dataclasses.dataclass(frozen=True)
class Codes:
    """A stored matrix: codes uint8 [in, out]; scale float32 and zero uint8 [blocks, out]."""

    grid: Grid
    codes: np.ndarray
    scale: np.ndarray
    zero: np.ndarray

    def restored(self) -> np.ndarray:
        """The float32 matrix that a runtime computes with."""
        depth = len(self.codes)
        scale, zero = (spread(p, self.grid, depth) for p in (self.scale, self.zero))
        restored: np.ndarray = (self.codes.astype(np.float32) - zero) * scale
        return restored


def spread(parameters: np.ndarray, grid: Grid, depth: int) -> np.ndarray:
    """Parameters of blocks, [blocks, out], repeated for each of `depth` rows."""
    repeated: np.ndarray = np.repeat(parameters, grid.size(depth), axis=0)[:depth]
    return repeated


def encode(matrix: np.ndarray, grid: Grid, scale: np.ndarray, zero: np.ndarray) -> Codes:
    """Round to nearest on a given grid."""
    depth = len(matrix)
    codes = np.rint(matrix / spread(scale, grid, depth)) + spread(zero, grid, depth)
    return Codes(grid, np.clip(codes, 0, grid.levels).astype(np.uint8), scale, zero)


def nearest(matrix: np.ndarray, grid: Grid) -> Codes:
    """Round to nearest, each block's range in full."""
    return encode(matrix, grid, *full_range(block_rows(matrix, grid), grid))


def clipped(matrix: np.ndarray, grid: Grid, importance: np.ndarray | None = None) -> Codes:
    """Round to nearest, with the range of each block that gives the least squared error.

    `importance` [in] weighs the rows: mean squares of what they are multiplied by.
    """
    scale, zero = best_range(
        block_rows(matrix, grid),
        grid,
        None if importance is None else block_rows(importance[:, None], grid)[..., 0],
    )
    return encode(matrix, grid, scale, zero)


# --- ranges ------------------------------------------------------------------------------------


def full_range(blocks: np.ndarray, grid: Grid) -> tuple[np.ndarray, np.ndarray]:
    """Scales and zero points that hold every element of [blocks, size, out]."""
    low, high = blocks.min(axis=1), blocks.max(axis=1)
    return _grid_of(low, high, grid)


def best_range(
    blocks: np.ndarray, grid: Grid, importance: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Scales and zero points of least squared error, of [blocks, size, out].

    `importance` is [blocks, size]. Both ends shrink together; without zero points either end may
    be the one that uses the extra code below the middle.
    """
    weight = 1.0 if importance is None else importance[:, :, None].astype(np.float32)
    low, high = blocks.min(axis=1), blocks.max(axis=1)
    best = np.full(low.shape, np.inf, np.float32)
    scale, zero = _grid_of(low, high, grid)
    for share in _SHRINK:
        for candidate, point in _candidates(low * share, high * share, grid):
            codes = np.rint(blocks / candidate[:, None]) + point[:, None]
            codes = np.clip(codes, 0, grid.levels)
            error = codes - point[:, None]
            error *= candidate[:, None]
            error -= blocks
            error *= error
            error *= weight
            total = error.sum(axis=1)
            better = total < best
            best = np.where(better, total, best)
            scale = np.where(better, candidate, scale)
            zero = np.where(better, point, zero)
    return scale, zero


def _candidates(
    low: np.ndarray, high: np.ndarray, grid: Grid
) -> list[tuple[np.ndarray, np.ndarray]]:
    found = [_grid_of(low, high, grid)]
    if grid.symmetric:  # the end of greater magnitude on the code that has no partner
        end = np.where(-low > high, low, high)
        scale = _safe(-end / grid.middle)
        found.append((scale, found[0][1]))
    return found


def _grid_of(low: np.ndarray, high: np.ndarray, grid: Grid) -> tuple[np.ndarray, np.ndarray]:
    if grid.symmetric:
        half = max(1, grid.middle - 1)
        scale = _safe(np.maximum(-low, high) / half)
        return scale, np.full(scale.shape, grid.middle, np.uint8)
    low, high = np.minimum(low, 0), np.maximum(high, 0)
    scale = _safe((high - low) / grid.levels)
    zero = np.clip(np.rint(-low / scale), 0, grid.levels)
    return scale, zero.astype(np.uint8)


def _safe(scale: np.ndarray) -> np.ndarray:
    """float32 scales, negative ones too; 1 where a block is all zero."""
    safe: np.ndarray = np.where(np.abs(scale) >= MIN_SCALE, scale, 1.0).astype(np.float32)
    return safe


def block_rows(matrix: np.ndarray, grid: Grid) -> np.ndarray:
    """[blocks, size, out], the last block filled up with zeros."""
    depth, out = matrix.shape
    size, blocks = grid.size(depth), grid.blocks(depth)
    padded = np.zeros((blocks * size, out), np.float32)
    padded[:depth] = matrix
    return padded.reshape(blocks, size, out)

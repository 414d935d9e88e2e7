"""GPTQ: codes of a matrix rounded one input after the other, each error passed on to the rest.

Here: `gptq`, arrays in and arrays out. Not here: second moments of inputs (`capture`), grids
(`grids`), graphs.
"""

from __future__ import annotations

import numpy as np

from .grids import Codes, Grid, best_range, block_rows, spread

_LAZY = 64
"""Inputs after which what was passed on is added to the rest in one product."""


def gptq(
    matrix: np.ndarray,
    moments: np.ndarray,
    grid: Grid,
    *,
    damping: float = 0.01,
    act_order: bool = True,
    zeros: np.ndarray | None = None,
) -> Codes:
    """Codes of `matrix` [in, out] that keep the products with inputs of second moments [in, in].

    Frantar, Ashkboos, Hoefler and Alistarh, "GPTQ: Accurate Post-Training Quantization for
    Generative Pre-trained Transformers" (2022), algorithm 1: with U the upper Cholesky factor of
    the inverse of `moments`, the error of row i goes to the rows after it by U[i, j] / U[i, i].
    `damping` times the mean of the diagonal is added to it. `act_order` takes the inputs of largest
    second moment first; the grid is then that of the matrix as given, since blocks are of
    neighbouring rows; without it each block's grid is chosen when its turn comes. Grids are those
    of least error weighed by the diagonal. Where the mask `zeros` says the code is that of zero.
    """
    depth, out = matrix.shape
    work = np.array(matrix, np.float64)
    diagonal = np.diag(moments).copy()
    dead = diagonal <= 0
    moments = np.array(moments, np.float64)
    moments[dead, dead] = 1.0
    ridge = damping * float(np.mean(np.diag(moments)))
    moments[np.arange(depth), np.arange(depth)] += max(ridge, 1e-12)
    order = np.argsort(-diagonal, kind="stable") if act_order else np.arange(depth)
    upper = inverse_factor(moments[np.ix_(order, order)])
    importance = np.where(dead, 0.0, diagonal) + ridge
    size, blocks = grid.size(depth), grid.blocks(depth)
    scale = np.empty((blocks, out), np.float32)
    zero = np.empty((blocks, out), np.uint8)
    if act_order:
        scale, zero = best_range(
            block_rows(matrix, grid), grid, block_rows(importance[:, None], grid)[..., 0]
        )
        scales, points = spread(scale, grid, depth)[order], spread(zero, grid, depth)[order]
    work = work[order]
    kept = None if zeros is None else zeros[order]
    codes = np.empty((depth, out), np.uint8)
    for start in range(0, depth, _LAZY):
        stop = min(depth, start + _LAZY)
        errors = np.empty((stop - start, out))
        for i in range(start, stop):
            if not act_order and i % size == 0:
                rows = slice(i, min(depth, i + size))
                # what earlier rows of this lazy block passed on is in `work` up to `stop` only
                now = work[rows].copy()
                if rows.stop > stop:
                    now[stop - i :] -= upper[start:i, stop : rows.stop].T @ errors[: i - start]
                found = best_range(
                    block_rows(now, Grid(grid.bits, 0, grid.symmetric)),
                    grid,
                    importance[None, rows],
                )
                scale[i // size], zero[i // size] = found[0][0], found[1][0]
            s, z = (scales[i], points[i]) if act_order else (scale[i // size], zero[i // size])
            row = work[i]
            code = np.clip(np.rint(row / s) + z, 0, grid.levels)
            if kept is not None:
                code = np.where(kept[i], z, code)
            codes[i] = code
            error = (row - (code - z) * s) / upper[i, i]
            errors[i - start] = error
            work[i + 1 : stop] -= upper[i, i + 1 : stop, None] * error
        work[stop:] -= upper[start:stop, stop:].T @ errors
    back = np.empty_like(codes)
    back[order] = codes
    return Codes(grid, back, scale, zero)


def inverse_factor(moments: np.ndarray) -> np.ndarray:
    """The upper triangular U with U'U the inverse."""
    inverse = np.linalg.inv(moments)
    upper: np.ndarray = np.linalg.cholesky((inverse + inverse.T) / 2).T
    return upper

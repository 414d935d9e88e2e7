"""HQQ: zero points of a matrix by half-quadratic splitting, without data.

Here: `hqq`, arrays in and arrays out. Not here: grids (`grids`), graphs.
"""

from __future__ import annotations

import numpy as np

from .grids import Codes, Grid, block_rows, encode, full_range

_NORM = 0.7
_BETA = 10.0
_GROWTH = 1.01
_STEPS = 20


def hqq(matrix: np.ndarray, grid: Grid) -> Codes:
    """Codes of `matrix` [in, out] whose error has few large elements; `grid` has zero points.

    Badri and Shaji, "Half-Quadratic Quantization of Large Machine Learning Models" (2023): the
    error's l_p norm, p = 0.7, is split into a quadratic term and one with a closed-form shrinkage;
    zero points are the mean over a block of codes less the shrunk weights in units of the scale.
    They are then rounded to codes, as kernels read them, and scales fitted to the codes by least
    squares once more.
    """
    blocks = block_rows(matrix, grid)
    scale, zero = full_range(blocks, grid)
    point = zero.astype(np.float32)
    beta, least = _BETA, np.inf
    best = point
    for _ in range(_STEPS):
        codes = np.clip(np.rint(blocks / scale[:, None] + point[:, None]), 0, grid.levels)
        restored = (codes - point[:, None]) * scale[:, None]
        error = blocks - restored
        loss = float(np.mean(np.abs(error) ** _NORM))
        if loss >= least:
            break
        least, best = loss, point
        magnitude = np.abs(error)
        shrunk = magnitude - np.maximum(magnitude, 1e-12) ** (_NORM - 1) / beta
        shrunk = np.sign(error) * np.maximum(shrunk, 0)
        point = np.mean(codes - (blocks - shrunk) / scale[:, None], axis=1)
        beta *= _GROWTH
    zero = np.clip(np.rint(best), 0, grid.levels).astype(np.uint8)
    return encode(matrix, grid, _refitted(blocks, scale, zero, grid), zero)


def _refitted(blocks: np.ndarray, scale: np.ndarray, zero: np.ndarray, grid: Grid) -> np.ndarray:
    """Scales of least squared error for the codes that the present ones give."""
    codes = np.clip(np.rint(blocks / scale[:, None]) + zero[:, None], 0, grid.levels)
    steps = codes - zero[:, None]
    power = (steps * steps).sum(axis=1)
    fitted = (steps * blocks).sum(axis=1) / np.maximum(power, 1.0)
    found: np.ndarray = np.where(fitted > 0, fitted, scale).astype(np.float32)
    return found

"""Codes and scales of a matrix improved in turns, for inputs of known second moments.

Here: `refine`, arrays in and arrays out; the error of the products never grows. Not here: the codes
to start from (`gptq`, `grids`), graphs.
"""

from __future__ import annotations

import numpy as np

from .grids import Codes, spread

_LAZY = 64
"""Inputs whose pulls are computed in one product."""


def refine(
    matrix: np.ndarray,
    moments: np.ndarray,
    codes: Codes,
    *,
    damping: float = 0.01,
    rounds: int = 3,
    zeros: np.ndarray | None = None,
) -> Codes:
    """Codes of less error in the products with inputs of second moments [in, in].

    Each round fits the scales of every column to its codes by least squares, then takes one input
    after the other and gives it the code that is best with all others as they are: Behdin et al.,
    "QuantEase: Optimization-based Quantization for Language Models" (2023), algorithm 1. `damping`
    and `zeros` are as for `gptq`. Where a round does not lower the error, the codes before it are
    returned.
    """
    moments = np.array(moments, np.float64)
    ridge = max(damping * float(np.mean(np.diag(moments))), 1e-12)
    moments[np.arange(len(moments)), np.arange(len(moments))] += ridge
    wanted = np.asarray(matrix, np.float64)
    least = _loss(wanted, moments, codes)
    for _ in range(rounds):
        tried = _descend(wanted, moments, _refit(wanted, moments, codes), zeros)
        loss = _loss(wanted, moments, tried)
        if not loss < least:
            break
        codes, least = tried, loss
    return codes


def _loss(wanted: np.ndarray, moments: np.ndarray, codes: Codes) -> float:
    error = codes.restored() - wanted
    return float((moments @ error * error).sum())


def _refit(wanted: np.ndarray, moments: np.ndarray, codes: Codes) -> Codes:
    """Scales of least error for the codes as they are: one small system for each column."""
    grid, depth = codes.grid, len(wanted)
    size, blocks = grid.size(depth), grid.blocks(depth)
    steps = codes.codes - spread(codes.zero, grid, depth).astype(np.float64)
    starts = np.arange(0, depth, size)
    target = np.add.reduceat(steps * (moments @ wanted), starts, axis=0)  # [blocks, out]
    system = np.empty((wanted.shape[1], blocks, blocks))
    for b, start in enumerate(starts):
        rows = slice(start, min(depth, start + size))
        part = steps * (moments[:, rows] @ steps[rows])
        system[:, :, b] = np.add.reduceat(part, starts, axis=0).T
    # towards the present scales where a block's codes are all zero
    trace = np.trace(system, axis1=1, axis2=2)[:, None] / blocks
    weak = 1e-6 * trace + 1e-30
    system[:, np.arange(blocks), np.arange(blocks)] += weak
    right = target.T + weak * codes.scale.T
    scale = np.linalg.solve(system, right[..., None])[..., 0].T.astype(np.float32)
    usable = np.isfinite(scale) & (np.abs(scale) > 1e-20)
    return Codes(grid, codes.codes, np.where(usable, scale, codes.scale), codes.zero)


def _descend(
    wanted: np.ndarray, moments: np.ndarray, codes: Codes, zeros: np.ndarray | None
) -> Codes:
    """One pass over the inputs, each given its best code with the others as they are."""
    grid, depth = codes.grid, len(wanted)
    scale = spread(codes.scale, grid, depth).astype(np.float64)
    zero = spread(codes.zero, grid, depth).astype(np.float64)
    chosen = codes.codes.copy()
    error = wanted - (chosen - zero) * scale
    for start in range(0, depth, _LAZY):
        rows = slice(start, min(depth, start + _LAZY))
        pull = moments[rows] @ error  # of the block at once; kept up to date row by row
        for i in range(start, rows.stop):
            at = i - start
            now = wanted[i] - error[i] + pull[at] / moments[i, i]
            code = np.clip(np.rint(now / scale[i]) + zero[i], 0, grid.levels)
            chosen[i] = code
            if zeros is not None:
                code = np.where(zeros[i], zero[i], code)
            moved = wanted[i] - (code - zero[i]) * scale[i] - error[i]
            error[i] += moved
            pull[at + 1 :] += moments[i + 1 : rows.stop, i, None] * moved
    return Codes(grid, chosen, codes.scale, codes.zero)

"""A layer's weights and bias solved again by least squares, as firmly as held-out samples allow.

Here: the arithmetic, on moments of one layer. Not here: which layers and what for (`repair`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..quantize.moments import Moments, excess

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""How firmly the weights are held where they are, in units of the mean variance of an input."""
_FEW_RIDGES = (1e-2, 1e-1)
_WIDE = 2304
"""Solving takes the cube of the inputs: of more than these, two ridges are tried."""


def solve(halves: Sequence[Moments], matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """The weights [groups, in, out] and bias [groups, out] of least error, None without rows.

    Minimises |X W + b - Y|^2 + ridge |W - W0|^2, b free and W0 the weights given. The ridge is
    chosen by solving on each half of the samples and measuring on the other; where no ridge helps
    there, the weights stay and the bias alone is solved.
    """
    both = halves[0].union(halves[1])
    if both.rows < 2:
        return None
    ridge = _ridge(halves, matrix)
    if ridge is not None:
        matrix = _solved(*both.problem(None), matrix, ridge)
    bias = both.y / both.rows - np.einsum("gi,gio->go", both.x / both.rows, matrix)
    return matrix, bias


def _ridge(halves: Sequence[Moments], matrix: np.ndarray) -> float | None:
    """The ridge of least error on samples that it was not solved on."""
    if min(half.rows for half in halves) < 2:
        return None
    problems = [half.problem(None) for half in halves]
    best, least = None, sum(float(excess(a, b, matrix).sum()) for a, b in problems)
    worse = 0
    ridges = RIDGES if matrix.shape[1] <= _WIDE else _FEW_RIDGES
    for ridge in sorted(ridges, reverse=True):
        loss = 0.0
        for own, other in (problems, problems[::-1]):
            loss += float(excess(*other, _solved(*own, matrix, ridge)).sum())
        if loss < least:
            best, least, worse = ridge, loss, 0
        else:
            worse += 1
            if best is not None or worse > 1:
                break
    return best


def _solved(a: np.ndarray, b: np.ndarray, matrix: np.ndarray, ridge: float) -> np.ndarray:
    size = a.shape[-1]
    weight = np.trace(a, axis1=1, axis2=2) / size * ridge
    weight = np.maximum(weight, 1e-12)[:, None, None]
    moved = matrix + np.linalg.solve(a + weight * np.eye(size), b - a @ matrix)
    found: np.ndarray = moved
    return found

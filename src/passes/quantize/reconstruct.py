"""Least-squares reconstruction: a layer's weights solved again for the inputs that it really gets.

Here: the arithmetic, on moments of one layer. Not here: which layers (`corrections`), rounding.
"""

from __future__ import annotations

import numpy as np

from .moments import Moments, excess
from .zeros import solve_around

RIDGES = (1e-3, 1e-2, 1e-1, 1.0)
"""How firmly the weights are held where they are, in units of the mean variance of an input."""
MAX_INPUTS = 2304
"""Wider layers are left alone: solving takes the cube of it."""


def reconstruct(
    halves: tuple[Moments, Moments],
    matrix: np.ndarray,
    bias: np.ndarray | None,
    zeros: np.ndarray | None = None,
) -> np.ndarray:
    """The weights [groups, in, out] with the least error of the float result, or those given.

    Minimises |X W + b - Y|^2 + ridge |W - W0|^2 for X as the quantized layers before make it: what
    He et al. 2017, "Channel pruning for accelerating very deep neural networks", arXiv:1707.06168,
    section 3.1, solve after pruning. The ridge is chosen by solving on each half of the samples and
    measuring on the other; where no ridge helps there, nothing changes. Weights stay zero where
    `zeros` says.
    """
    problems = [half.problem(bias) for half in halves]
    best, least = 0.0, sum(float(excess(a, b, matrix).sum()) for a, b in problems)
    for ridge in RIDGES:
        loss = 0.0
        for own, other in (problems, problems[::-1]):
            loss += float(excess(*other, _solve(*own, matrix, ridge, zeros)).sum())
        if loss < least:
            best, least = ridge, loss
    if not best:
        return matrix
    return _solve(*halves[0].union(halves[1]).problem(bias), matrix, best, zeros)


def _solve(
    a: np.ndarray, b: np.ndarray, matrix: np.ndarray, ridge: float, zeros: np.ndarray | None
) -> np.ndarray:
    if zeros is not None:
        return solve_around(zeros, a, b, matrix, ridge)
    size = a.shape[-1]
    weight = np.trace(a, axis1=1, axis2=2) / size * ridge
    weight = np.maximum(weight, 1e-12)[:, None, None]
    moved = matrix + np.linalg.solve(a + weight * np.eye(size), b - a @ matrix)
    found: np.ndarray = moved.astype(np.float32)
    return found

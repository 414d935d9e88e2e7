"""Zeros of sparsified weights: which are to stay, and weights solved again around them.

Here: `zeros_to_keep`, by which methods that write weights anew (least squares, rounding, GPTQ)
leave a sparse weight sparse, and `solve_around`. Not here: choosing what becomes zero
(`prune.sparsify`).
"""

from __future__ import annotations

import numpy as np

MIN_SHARE = 0.05
"""Trained weights have hardly an exact zero: a weight with more than this has been sparsified."""
STEPS = 60


def zeros_to_keep(array: np.ndarray) -> np.ndarray | None:
    """Where a sparsified weight is exactly zero; None for one with few zeros or none.

    No mark goes with a weight: its zeros are the mask, whoever made them, and they survive folding,
    scaling, saving and loading.
    """
    zeros = array == 0
    return zeros if zeros.mean() >= MIN_SHARE else None


def solve_around(
    zeros: np.ndarray,
    a: np.ndarray,
    b: np.ndarray,
    matrix: np.ndarray,
    ridge: float,
    start: np.ndarray | None = None,
    steps: int = STEPS,
) -> np.ndarray:
    """The weights [groups, in, out] of least tr(W'A W) / 2 - tr(W'B) + ridge |W - W0|^2 / 2.

    W is zero wherever `zeros` says; W0 is `matrix` with those zeros, `ridge` is in units of the
    mean of A's diagonal. Conjugate gradients, all columns at once, each within its own pattern:
    what solving one system for each column would give, without the systems. `start` is where to
    begin, W0 unless given.
    """
    free = ~zeros
    size = a.shape[-1]
    weight = np.trace(a, axis1=1, axis2=2) / size * ridge
    a = (a + np.maximum(weight, 1e-12)[:, None, None] * np.eye(size)).astype(np.float32)
    centre = np.where(free, matrix, 0)
    wanted = (b + np.maximum(weight, 1e-12)[:, None, None] * centre).astype(np.float32)
    found = centre if start is None else np.where(free, start, 0)
    found = found.astype(np.float32)
    scale = 1 / np.diagonal(a, axis1=1, axis2=2)[:, :, None]
    rest = (wanted - a @ found) * free
    step = rest * scale
    power = _dot(rest, step)
    for _ in range(steps):
        moved = a @ step
        moved *= free
        found += (length := power / np.maximum(_dot(step, moved), 1e-30)) * step
        rest -= length * moved
        scaled = rest * scale
        last, power = power, _dot(rest, scaled)
        step = scaled + power / np.maximum(last, 1e-30) * step
    return found


def _dot(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Products of columns, [groups, 1, out]."""
    found: np.ndarray = np.einsum("gio,gio->go", left, right)[:, None, :]
    return found

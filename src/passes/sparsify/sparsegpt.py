"""SparseGPT: weights set to zero one input after the other, each loss passed on to the rest.

Here: `sparsegpt`, arrays in and arrays out. Not here: second moments of inputs (`sparsify_data`),
graphs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from ..quantize.gptq import inverse_factor

BLOCK = 128
"""Inputs that are chosen from together, and after which what was passed on reaches the rest."""


def damped(moments: np.ndarray, damping: float = 0.01) -> np.ndarray:
    """Second moments [..., in, in] that can be inverted: a share of the mean diagonal added."""
    size = moments.shape[-1]
    mean = np.trace(moments, axis1=-2, axis2=-1)[..., None, None] / size
    found: np.ndarray = moments + np.maximum(damping * mean, 1e-12) * np.eye(size)
    return found


def saliency(matrix: np.ndarray, moments: np.ndarray) -> np.ndarray:
    """The error of removing each weight of [groups, in, out] alone, the others made the best of.

    Hassibi and Stork, "Second order derivatives for network pruning: Optimal Brain Surgeon" (1992):
    w^2 / [H^-1]_ii.
    """
    inverse = np.linalg.inv(damped(moments))
    found: np.ndarray = np.square(matrix) / np.diagonal(inverse, axis1=1, axis2=2)[:, :, None]
    return found


def sparsegpt(
    matrix: np.ndarray,
    moments: np.ndarray,
    runs: Sequence[tuple[int, int]],
    choose: Callable[[np.ndarray], np.ndarray],
) -> tuple[np.ndarray, np.ndarray]:
    """`matrix` [in, out] with zeros that keep the products with inputs of second moments [in, in].

    Frantar and Alistarh, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot"
    (2023), algorithm 1: with U the upper Cholesky factor of the inverse of `moments`, what becomes
    zero in row i is made up for by the rows after it. The zeros of each run of rows are chosen when
    its turn comes, by `choose(w^2 / U[i, i]^2)`, scores [rows, out]. Returns the weights and where
    they were set to zero.
    """
    depth, out = matrix.shape
    work = np.array(matrix, np.float64)
    upper = inverse_factor(damped(np.asarray(moments, np.float64)))
    diagonal = np.diag(upper)
    zeros = np.zeros((depth, out), bool)
    for batch in _batches(runs):
        first, last = batch[0][0], batch[-1][1]
        errors = np.zeros((last - first, out))
        for start, stop in batch:
            scores = np.square(work[start:stop] / diagonal[start:stop, None])
            zeros[start:stop] = choose(scores)
            for i in range(start, stop):
                error = np.where(zeros[i], work[i], 0) / diagonal[i]
                errors[i - first] = error
                work[i + 1 : last] -= upper[i, i + 1 : last, None] * error
                work[i, zeros[i]] = 0
        work[last:] -= upper[first:last, last:].T @ errors
    return work.astype(np.float32), zeros


def _batches(runs: Sequence[tuple[int, int]]) -> Iterator[list[tuple[int, int]]]:
    """Runs of rows, about `BLOCK` rows together."""
    batch: list[tuple[int, int]] = []
    for run in runs:
        if batch and run[1] - batch[0][0] > BLOCK:
            yield batch
            batch = []
        batch.append(run)
    if batch:
        yield batch

"""One-dimensional k-means, deterministic: codebooks of weights.

Here: `codebook`, arrays in and arrays out. Not here: what is stored (`palettize`).
"""

from __future__ import annotations

import numpy as np

_STEPS = 30
_SAMPLE = 1 << 18


def codebook(values: np.ndarray, size: int) -> np.ndarray:
    """At most `size` float32 centres of flat `values`, ascending, padded by repeating the last.

    Lloyd, "Least squares quantization in PCM" (1957; IEEE Trans. Inf. Theory 1982), started from
    quantiles spread over both the values and their range; sorted, each centre's members are a run,
    so that a step is a few lookups. Many values are represented by evenly spaced order statistics.
    The use for weights is that of Han, Mao and Dally, "Deep Compression" (2016), section 3.
    """
    ordered = np.sort(np.asarray(values, np.float64).reshape(-1))
    if not len(ordered):
        return np.zeros(size, np.float32)
    if len(ordered) > _SAMPLE:
        ordered = ordered[np.linspace(0, len(ordered) - 1, _SAMPLE).astype(np.int64)]
    distinct = np.unique(ordered)
    if len(distinct) <= size:
        return np.pad(distinct, (0, size - len(distinct)), mode="edge").astype(np.float32)
    centres = min(
        (_lloyd(ordered, start) for start in _starts(ordered, size)),
        key=lambda found: _error(ordered, found),
    )
    return centres.astype(np.float32)


def assign(values: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """The index of the nearest centre (ascending) of each value, uint8 of the same shape."""
    middles = (centres[1:].astype(np.float64) + centres[:-1]) / 2
    found: np.ndarray = np.searchsorted(middles, values, side="right").astype(np.uint8)
    return found


def _starts(ordered: np.ndarray, size: int) -> list[np.ndarray]:
    shares = (np.arange(size) + 0.5) / size
    by_count = ordered[(shares * len(ordered)).astype(np.int64)]
    by_range = ordered[0] + shares * (ordered[-1] - ordered[0])
    return [by_count, by_range, np.sort((by_count + by_range) / 2)]


def _lloyd(ordered: np.ndarray, centres: np.ndarray) -> np.ndarray:
    sums = np.concatenate([[0.0], np.cumsum(ordered)])
    for _ in range(_STEPS):
        cuts = np.searchsorted(ordered, (centres[1:] + centres[:-1]) / 2, side="right")
        ends = np.concatenate([[0], cuts, [len(ordered)]])
        counts = np.diff(ends)
        means = np.diff(sums[ends]) / np.maximum(counts, 1)
        moved = np.where(counts > 0, means, centres)
        if np.array_equal(moved, centres):
            break
        centres = moved
    return centres


def _error(ordered: np.ndarray, centres: np.ndarray) -> float:
    return float(np.square(ordered - centres[assign(ordered, centres)]).sum())

"""A histogram that takes values one array at a time and does not depend on their order.

Here: `Histogram`. Not here: ranges made of one (`clipping`), running models (`calibrate`).
"""

from __future__ import annotations

import math

import numpy as np

LOG_BINS = 13
"""2^13 bins a side at most, of which the greatest magnitude uses more than half."""

SIDE = 1 << LOG_BINS
_CHUNK = 1 << 16
"""Elements counted at a time: their temporaries stay in the cache."""
_LEAST_NORMAL = -126
"""Below it, the reciprocal of the bin width is no float32."""


class Histogram:
    """Counts in bins [i w, (i + 1) w) of width w = 2^k, aligned at zero; exact zeros apart.

    k is the least exponent at which SIDE bins a side hold the greatest magnitude seen. When it
    grows, bins merge in pairs, which is exact: floor(floor(x / w) / 2) = floor(x / 2w). The result
    is a function of the multiset of values alone, in whatever order and arrays they come. Values
    are finite float32.
    """

    __slots__ = ("_above", "_below", "exponent", "high", "low", "zeros")

    def __init__(self) -> None:
        self.exponent: int | None = None
        self.low, self.high = math.inf, -math.inf
        self.zeros = 0
        self._above = np.zeros(0, np.int64)
        self._below = np.zeros(0, np.int64)  # the last one is [-w, 0)

    def add(self, array: np.ndarray) -> None:
        """Count every element."""
        values = array.reshape(-1)
        if values.size == 0:
            return
        low, high = float(values.min()), float(values.max())
        self.low, self.high = min(self.low, low + 0.0), max(self.high, high + 0.0)
        peak = max(-low, high)
        if peak == 0.0:
            self.zeros += values.size
            return
        self._grow(math.frexp(peak)[1] - LOG_BINS)
        if high > 0 and not self._above.size:
            self._above = np.zeros(SIDE, np.int64)
        if low < 0 and not self._below.size:
            self._below = np.zeros(SIDE, np.int64)
        for start in range(0, values.size, _CHUNK):
            self._count(values[start : start + _CHUNK], signed=low < 0)

    def _count(self, values: np.ndarray, signed: bool) -> None:
        zeros = values.size - int(np.count_nonzero(values))
        self.zeros += zeros
        index = np.floor(self._in_bins(values)).astype(np.intp)
        if not signed:
            self._above += np.bincount(index, minlength=SIDE)
            self._above[0] -= zeros
            return
        counts = np.bincount(index + SIDE, minlength=2 * SIDE)
        counts[SIDE] -= zeros
        self._below += counts[:SIDE]
        if self._above.size:
            self._above += counts[SIDE:]

    def _in_bins(self, values: np.ndarray) -> np.ndarray:
        """Values over the bin width: a power of two, so exact, and less than SIDE.

        A negative one that underflows must not become -0.0, whose bin is on the other side.
        """
        assert self.exponent is not None
        if self.exponent >= _LEAST_NORMAL:
            scaled: np.ndarray = values * np.float32(math.ldexp(1.0, -self.exponent))
        else:
            scaled = values.astype(np.float64) * math.ldexp(1.0, -self.exponent)
        if self.exponent > 0:
            scaled[(scaled == 0) & (values < 0)] = -0.5
        return scaled

    def _grow(self, exponent: int) -> None:
        if self.exponent is None:
            self.exponent = exponent
        steps = min(exponent - self.exponent, LOG_BINS + 1)
        for _ in range(steps):
            if self._above.size:
                self._above = np.concatenate([_pairs(self._above), np.zeros(SIDE // 2, np.int64)])
            if self._below.size:
                self._below = np.concatenate([np.zeros(SIDE // 2, np.int64), _pairs(self._below)])
        self.exponent = max(self.exponent, exponent)

    @property
    def count(self) -> int:
        """How many values there were, zeros included."""
        return self.zeros + int(self._above.sum()) + int(self._below.sum())

    @property
    def width(self) -> float:
        """The width of a bin; 0 while there was nothing but zeros."""
        return 0.0 if self.exponent is None else math.ldexp(1.0, self.exponent)

    def bins(self) -> tuple[np.ndarray, int]:
        """Counts from the lowest bin in use to the highest, and the index of the bin [0, w).

        Both ends reach at least to zero.
        """
        below = self._below[_leading_zeros(self._below) :]
        above = self._above[: self._above.size - _leading_zeros(self._above[::-1])]
        return np.concatenate([below, above]), below.size

    def magnitudes(self) -> np.ndarray:
        """Counts of |x| in bins [i w, (i + 1) w), up to the highest in use."""
        counts, zero = self.bins()
        below, above = counts[:zero][::-1], counts[zero:]
        folded = np.zeros(max(below.size, above.size), np.int64)
        folded[: above.size] += above
        folded[: below.size] += below
        return folded


def merged(counts: np.ndarray, zero: int, times: int) -> tuple[np.ndarray, int]:
    """Counts in bins 2^times as wide, and where zero is then."""
    size = 1 << times
    before = -zero % size
    after = -(counts.size - zero) % size
    padded = np.pad(counts, (before, after))
    wide: np.ndarray = padded.reshape(-1, size).sum(axis=1)
    return wide, (zero + before) // size


def _pairs(counts: np.ndarray) -> np.ndarray:
    pairs: np.ndarray = counts.reshape(-1, 2).sum(axis=1)
    return pairs


def _leading_zeros(counts: np.ndarray) -> int:
    used = np.flatnonzero(counts)
    return int(used[0]) if used.size else counts.size

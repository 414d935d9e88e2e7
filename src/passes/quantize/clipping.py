"""Ranges that clip: where to cut a distribution so that the rest is quantized better.

Here: `percentile_range`, `mse_range`, `entropy_range`, each from a `Histogram`. Exact zeros take no
part: every range holds zero exactly, so that however many zeros padding and Relu make, they lose
nothing and say nothing about where to cut. Not here: counting (`histogram`), scales (`numbers`).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from .histogram import Histogram, merged
from .numbers import Range, activation_affine, integer_range

_COARSE = 0.72
_COARSE_STEPS = 14
"""The first grid of ends: as shares of the full range, 0.72^0 to 0.72^13 = 0.014."""
_FINEST = 1.004
"""The search ends when an end moves by less than this factor."""
_STARTS = 3
"""The divergence has many shallow minima: from how many windows of the grid the search descends."""
_BINS_A_LEVEL = 16
"""Of entropy: bins of the full range for each level of the integers, as 2048 for 128."""


def percentile_range(histogram: Histogram, percentile: float, symmetric: bool) -> Range:
    """The range that holds `percentile` % of the values that are not zero.

    What is cut is cut in equal shares at both ends where values have both signs, else at the far
    end; of magnitudes for symmetric schemes. Within a bin values count as evenly spread.
    """
    full = Range(histogram.low, histogram.high)
    counts, zero = histogram.bins()
    width = histogram.width
    if not counts.size:
        return full
    if symmetric:
        peak = max(-full.low, full.high)
        cut = min(peak, width * _quantile(histogram.magnitudes(), percentile / 100))
        return _within(full, -cut, cut)
    both = full.low < 0 < full.high
    outside = (1 - percentile / 100) / (2 if both else 1)
    low, high = full
    if full.high > 0:
        high = width * (_quantile(counts, 1 - outside) - zero)
    if full.low < 0:
        backwards = _quantile(counts[::-1], 1 - outside)
        low = width * (counts.size - backwards - zero)
    return _within(full, low, high)


def _within(full: Range, low: float, high: float) -> Range:
    """The ends, as far as they are in the full range."""
    return Range(min(max(low, full.low), full.high), max(min(high, full.high), full.low))


def _quantile(counts: np.ndarray, share: float) -> float:
    """How many bins from the first hold that share of all; within a bin, in proportion."""
    total = np.concatenate([[0], np.cumsum(counts)])
    goal = share * float(total[-1])
    index = int(np.searchsorted(total, goal, side="left"))
    if index == 0:
        return 0.0
    inside = int(counts[index - 1]) if index <= counts.size else 0
    if not inside:
        return float(min(index, counts.size))
    return index - 1 + (goal - float(total[index - 1])) / inside


# --- the least squared error ---------------------------------------------------------------------


def mse_range(histogram: Histogram, dtype: ir.DataType, symmetric: bool) -> Range:
    """The range whose quantization to `dtype` has the least mean squared error.

    As in Banner, Nahshan, Soudry: Post training 4-bit quantization of convolutional networks for
    rapid-deployment (NeurIPS 2019), and Nagel et al.: A white paper on neural network quantization
    (2021), section 3.1, but searched over both ends, with the zero point rounded as it will be,
    and with the error integrated exactly over each bin rather than taken at its centre. The full
    range is among the candidates.
    """
    full = Range(histogram.low, histogram.high)
    counts, zero = histogram.bins()
    if not counts.size:
        return full
    least, greatest = integer_range(dtype)
    width = histogram.width
    edges = (np.arange(counts.size + 1, dtype=np.float64) - zero) * width
    # the outer bins end where the values do
    if full.low < 0:
        edges[0] = min(full.low, edges[1] - width / 64)
    if full.high > 0:
        edges[-1] = max(full.high, edges[-2] + width / 64)
    density = counts / np.diff(edges)
    steps = -np.diff(density, prepend=0.0, append=0.0)
    used = np.flatnonzero(steps)
    steps, edges = steps[used], edges[used]

    def error(low: float, high: float) -> float:
        affine = activation_affine(Range(low, high), dtype, symmetric)
        scale, middle = float(affine.scale), int(affine.zero_point)
        return scale**3 * float(steps @ _integral(edges / scale, least - middle, greatest - middle))

    return _search(full, error, symmetric)


def _integral(u: np.ndarray, least: int, greatest: int) -> np.ndarray:
    """The integral from 0 to u of (t - round(t))^2, rounding saturated at the given integers."""
    nearest = np.clip(np.rint(u), least, greatest)
    off = u - nearest
    found: np.ndarray = nearest / 12 + off * off * off / 3
    return found


def _search(full: Range, error: Callable[[float, float], float], symmetric: bool) -> Range:
    """Ends as shares of the full range's: a coarse grid, then steps that halve."""
    low, high = min(full.low, 0.0), max(full.high, 0.0)
    if symmetric:
        low, high = min(low, -high), max(high, -low)
    cache: dict[tuple[float, float], float] = {}

    def cost(at: tuple[float, float]) -> float:
        if at not in cache:
            cache[at] = error(low * at[0], high * at[1])
        return cache[at]

    grid = [_COARSE**i for i in range(_COARSE_STEPS)]
    if symmetric:
        points = [(share, share) for share in grid]
        moves = [(-1, -1), (1, 1)]
    else:
        points = [(a, b) for a in (grid if low < 0 else [1.0]) for b in (grid if high else [1.0])]
        moves = [(a, b) for a in (-1, 0, 1) for b in (-1, 0, 1) if a or b]
        moves = [(a, b) for a, b in moves if (low < 0 or not a) and (high > 0 or not b)]
    best = min(points, key=lambda at: (cost(at), -at[0], -at[1]))
    factor = math.sqrt(_COARSE)
    while 1 / factor > _FINEST:
        near = [(min(1.0, best[0] * factor**a), min(1.0, best[1] * factor**b)) for a, b in moves]
        found = min(near, key=cost, default=best)
        if cost(found) < cost(best):
            best = found
        else:
            factor = math.sqrt(factor)
    return _within(full, low * best[0], high * best[1])


# --- the least divergence ------------------------------------------------------------------------


def entropy_range(histogram: Histogram, dtype: ir.DataType, symmetric: bool) -> Range:
    """The range whose quantization to `dtype` diverges least from the distribution (KL).

    The method of TensorRT (Migacz: 8-bit inference with TensorRT, GTC 2017): the reference P is
    the histogram cut to a window, what is outside added to the outermost bins in use; Q is the
    inside merged into the levels and spread again over the bins in use; the window of least
    KL(P || Q) wins. Beyond that, windows have two ends where the scheme is asymmetric and values
    have both signs, and a spike next to zero (which one level holds) is cut down to its neighbour:
    it would buy the rest of the range at its price. With more levels than bins (16 bits) nothing is
    cut.
    """
    full = Range(histogram.low, histogram.high)
    least, greatest = integer_range(dtype)
    if symmetric:
        counts, zero, levels = histogram.magnitudes(), 0, (greatest - least) // 2 + 1
    else:
        (counts, zero), levels = histogram.bins(), greatest - least + 1
    times = 0
    while counts.size >> times > _BINS_A_LEVEL * levels:
        times += 1
    counts, zero = merged(counts, zero, times)
    if counts.size <= levels:
        return full
    width = histogram.width * (1 << times)
    window = _Windows(_without_spike(counts.astype(np.float64), zero), zero, levels).best()
    low, high = (window[0] - zero) * width, (window[1] - zero) * width
    if symmetric:
        low = -high
    return _within(full, low, high)


def _without_spike(counts: np.ndarray, zero: int) -> np.ndarray:
    """The bins on both sides of zero, no higher than the next ones outwards that are in use."""
    for at, outwards in ((zero, counts[zero + 1 :]), (zero - 1, counts[: max(zero - 1, 0)][::-1])):
        beyond = outwards[outwards > 0]
        if 0 <= at < counts.size and beyond.size:
            counts[at] = min(counts[at], beyond[0])
    return counts


class _Windows:
    """Windows [a, b) of bins around zero, at least `levels` bins wide, and their divergence."""

    def __init__(self, counts: np.ndarray, zero: int, levels: int) -> None:
        self.counts, self.zero, self.levels = counts, zero, levels
        self.sums = np.concatenate([[0.0], np.cumsum(counts)])
        self.cache: dict[tuple[int, int], float] = {}

    def best(self) -> tuple[int, int]:
        size, zero = self.counts.size, self.zero
        if zero in (0, size):
            step = max(1, size // 256)
            ends = {*range(step, size, step), size}
            windows = [(0, b) if zero == 0 else (size - b, size) for b in ends]
        else:
            step = max(1, size // 24)
            shares = [_COARSE ** (i / 2) for i in range(2 * _COARSE_STEPS)]
            lows = sorted({zero - math.ceil(zero * share) for share in shares})
            highs = sorted({zero + math.ceil((size - zero) * share) for share in shares})
            windows = [(a, b) for a in lows for b in highs]
        starts = sorted(windows, key=self._rank)[:_STARTS]
        return min((self._descend(start, step) for start in starts), key=self._rank)

    def _descend(self, window: tuple[int, int], step: int) -> tuple[int, int]:
        """Both ends moved by steps that halve where no move helps."""
        size, zero = self.counts.size, self.zero
        while step:
            near = [
                (a, b)
                for a in {window[0] - step, window[0], window[0] + step}
                for b in {window[1] - step, window[1], window[1] + step}
                if 0 <= a <= zero <= b <= size
            ]
            found = min([window, *near], key=self._rank)
            if found == window:
                step //= 2
            window = found
        return window

    def _rank(self, window: tuple[int, int]) -> tuple[float, int, int]:
        """By divergence; of equals, the widest."""
        if window not in self.cache:
            self.cache[window] = self._divergence(*window)
        return self.cache[window], window[0] - window[1], window[0]

    def _divergence(self, a: int, b: int) -> float:
        if b - a < self.levels:
            return math.inf
        inside = self.counts[a:b]
        used = inside > 0
        inner = np.flatnonzero(used)
        if not inner.size:
            return math.inf
        reference = inside.copy()
        reference[inner[0]] += self.sums[a]
        reference[inner[-1]] += self.sums[-1] - self.sums[b]
        starts = -(-np.arange(self.levels) * (b - a) // self.levels)
        mass = np.add.reduceat(inside, starts)
        share = mass / np.maximum(np.add.reduceat(used, starts, dtype=np.float64), 1.0)
        p, spread = reference[used], np.repeat(share, np.diff(starts, append=b - a))[used]
        total, kept = p.sum(), spread.sum()
        return float((p / total) @ np.log((p / total) / (spread / kept)))

"""How far arrays drift from a reference, summed over samples in memory that does not grow.

Here: `Extent` (ranges), `Histogram`, `Drift` (error, gain and offset, whole and by channel) and
`Rounding` (what a quantizer alone does to the reference). Arrays in, numbers out. Not here: graphs.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from .internals_graph import Quantizer

BINS = 128
MAX_CHANNELS = 8192


def decibels(signal: float, noise: float) -> float:
    """10 log10 of a ratio of powers: infinite without noise, minus infinite without signal."""
    if math.isnan(signal) or math.isnan(noise) or math.isinf(noise):
        return -math.inf
    if noise <= 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf


def by_channel(array: np.ndarray, axis: int | None) -> np.ndarray:
    """[channels, elements] in float64; one channel where there is no such axis."""
    wide = np.asarray(array, np.float64)
    if axis is None or not -wide.ndim <= axis < wide.ndim or wide.shape[axis] > MAX_CHANNELS:
        return wide.reshape(1, -1)
    rows: np.ndarray = np.moveaxis(wide, axis, 0).reshape(wide.shape[axis], -1)
    return rows


class Extent:
    """Least and greatest finite value, whole and by channel, and the peak magnitude by channel."""

    def __init__(self, axis: int | None) -> None:
        self.axis = axis
        self.low = math.inf
        self.high = -math.inf
        self.peaks = np.zeros(1)

    def add(self, array: np.ndarray) -> None:
        """One more array."""
        rows = by_channel(array, self.axis)
        if not rows.size:
            return
        finite = np.isfinite(rows)
        self.low = min(self.low, float(rows.min(initial=math.inf, where=finite)))
        self.high = max(self.high, float(rows.max(initial=-math.inf, where=finite)))
        peaks = np.abs(rows).max(axis=1, initial=0.0, where=finite)
        if len(self.peaks) == 1:
            self.peaks = np.maximum(self.peaks, peaks)
        elif len(self.peaks) == len(peaks):
            np.maximum(self.peaks, peaks, out=self.peaks)
        else:  # the axis has another length in every sample: these are no channels
            self.axis, self.peaks = None, np.array([max(self.peaks.max(), peaks.max())])

    @property
    def span(self) -> tuple[float, float]:
        """The range, (0, 0) when nothing was finite."""
        return (self.low, self.high) if self.low <= self.high else (0.0, 0.0)


class Histogram:
    """Counts in equal bins between two ends; what is beyond an end counts in the last bin."""

    def __init__(self, low: float, high: float, bins: int = BINS) -> None:
        width = (high - low) or abs(high) or 1.0
        self.low, self.high = low - 0.05 * width, high + 0.05 * width
        self.counts = np.zeros(bins, np.int64)

    def add(self, array: np.ndarray) -> None:
        """One more array; what is not finite is left out."""
        flat = np.asarray(array, np.float64).reshape(-1)
        flat = flat[np.isfinite(flat)]
        bins = len(self.counts)
        places = ((flat - self.low) * (bins / (self.high - self.low))).astype(np.int64)
        self.counts += np.bincount(np.clip(places, 0, bins - 1), minlength=bins)

    @property
    def edges(self) -> np.ndarray:
        """One more than bins."""
        return np.linspace(self.low, self.high, len(self.counts) + 1)


@dataclasses.dataclass(frozen=True)
class Line:
    """The straight line through (reference, result), least squares, of each channel.

    `gain` and `offset` are per channel; `spread` the reference's variance, `residue` the mean
    square of what the line leaves.
    """

    gain: np.ndarray
    offset: np.ndarray
    spread: np.ndarray
    residue: np.ndarray
    overall: float


class Drift:
    """Sums of a result against a reference."""

    def __init__(self, axis: int | None) -> None:
        self.axis = axis
        self.count = 0
        self.broken = 0
        self.signal = self.noise = self.cross = self.power = self.worst = 0.0
        self.ends = [math.inf, -math.inf]
        self.rows = np.zeros((6, 1))

    def add(self, reference: np.ndarray, result: np.ndarray) -> None:
        """One more pair of arrays of equal size."""
        r, x = by_channel(reference, self.axis), by_channel(result, self.axis)
        if r.shape != x.shape:
            self.broken += x.size
            return
        finite = np.isfinite(r) & np.isfinite(x)
        self.broken += int((np.isfinite(r) & ~np.isfinite(x)).sum())
        r, x = np.where(finite, r, 0.0), np.where(finite, x, 0.0)
        error = x - r
        self.count += int(finite.sum())
        self.signal += float(np.sum(r * r))
        self.noise += float(np.sum(error * error))
        self.cross += float(np.sum(r * x))
        self.power += float(np.sum(x * x))
        self.worst = max(self.worst, float(np.abs(error).max(initial=0.0)))
        self.ends[0] = min(self.ends[0], float(x.min(initial=math.inf, where=finite)))
        self.ends[1] = max(self.ends[1], float(x.max(initial=-math.inf, where=finite)))
        sums = [np.sum(a, axis=1) for a in (finite, r, x, r * r, r * x, error * error)]
        new = np.array(sums, np.float64)
        if self.rows.shape[1] == 1 and not self.rows.any():
            self.rows = np.zeros_like(new)
        if self.rows.shape != new.shape:
            self.axis = None
            self.rows, new = (a.sum(axis=1, keepdims=True) for a in (self.rows, new))
        self.rows = self.rows + new

    @property
    def sqnr(self) -> float:
        """Signal to error, in dB; minus infinite where the result is not finite."""
        return -math.inf if self.broken else decibels(self.signal, self.noise)

    @property
    def cosine(self) -> float:
        """Of the angle between reference and result, both as one long vector."""
        norm = math.sqrt(self.signal * self.power)
        return self.cross / norm if norm > 0 else float(self.signal == self.power)

    @property
    def offset_share(self) -> float:
        """Which part of the error's power is a constant of each channel."""
        n, r, x = (np.maximum(self.rows[0], 1.0), self.rows[1], self.rows[2])
        constant = float(np.sum((x - r) ** 2 / n))
        return constant / self.noise if self.noise > 0 else 0.0

    def channel_sqnr(self) -> np.ndarray:
        """In dB, of each channel."""
        return np.array([decibels(s, e) for s, e in zip(self.rows[3], self.rows[5], strict=True)])

    def line(self) -> Line:
        """The best gain and offset of each channel, and the gain of all pooled."""
        n, r, x, rr, rx, ee = self.rows
        n = np.maximum(n, 1.0)
        spread = np.maximum(rr - r * r / n, 0.0)
        product = rx - r * x / n
        usable = spread > 1e-12 * np.maximum(rr, 1e-300)
        gain = np.where(usable, product / np.where(usable, spread, 1.0), 1.0)
        offset = (x - gain * r) / n
        xx = ee + 2 * rx - rr
        residue = np.maximum(xx - x * x / n - gain * product, 0.0) / n
        total = float(spread[usable].sum())
        overall = float(product[usable].sum()) / total if total > 0 else 1.0
        return Line(gain, offset, spread / n, residue, overall)


class Rounding:
    """What a quantizer does to a reference, beside an ideal one of the same bits.

    The ideal one spans the range of the reference (and zero) exactly.
    """

    def __init__(self, quantizer: Quantizer, extent: Extent) -> None:
        self.quantizer = quantizer
        self.ideal = ideal_quantizer(quantizer, *extent.span)
        self.axis = extent.axis
        channels = len(extent.peaks)
        self.count = self.clipped = self.at_ends = 0
        self.signal = self.noise = self.least = 0.0
        self.rows = np.zeros((4, channels))

    def add(self, reference: np.ndarray) -> None:
        """One more array of the reference."""
        wide = np.nan_to_num(np.asarray(reference, np.float64))
        integers = self.quantizer.integers(wide)
        low, high = self.quantizer.limits
        error = self.quantizer.floats(integers) - wide
        out = (integers < low) | (integers > high)
        zero = self.quantizer.zero_point
        at_ends = out | (integers == low) | (integers == high)
        if zero.size == 1:  # what is exactly zero is not clipped, though its integer be an end
            out &= integers != zero.reshape(())
            at_ends &= wide != 0
        best = self.ideal.floats(self.ideal.integers(wide)) - wide
        self.count += wide.size
        self.clipped += int(out.sum())
        self.at_ends += int(at_ends.sum())
        self.signal += float(np.sum(wide * wide))
        self.noise += float(np.sum(error * error))
        self.least += float(np.sum(best * best))
        parts = (np.ones_like(wide), out, wide * wide, error * error)
        new = np.array([by_channel(p, self.axis).sum(axis=1) for p in parts])
        if new.shape == self.rows.shape:
            self.rows += new

    @property
    def sqnr(self) -> float:
        """Signal to rounding and clipping error, in dB."""
        return decibels(self.signal, self.noise)

    @property
    def ideal_sqnr(self) -> float:
        """The same of the ideal quantizer."""
        return decibels(self.signal, self.least)

    @property
    def clipped_share(self) -> float:
        """The share of elements outside the quantizer's range."""
        return self.clipped / self.count if self.count else 0.0

    @property
    def end_share(self) -> float:
        """The share of elements, zeros aside, that become the least or greatest integer."""
        return self.at_ends / self.count if self.count else 0.0

    def channel_clipped(self) -> np.ndarray:
        """The clipped share of each channel."""
        share: np.ndarray = self.rows[1] / np.maximum(self.rows[0], 1.0)
        return share

    def channel_sqnr(self) -> np.ndarray:
        """In dB, of each channel."""
        return np.array([decibels(s, e) for s, e in zip(self.rows[2], self.rows[3], strict=True)])


def ideal_quantizer(like: Quantizer, low: float, high: float) -> Quantizer:
    """One scale for the range, of the bits and the symmetry of another quantizer."""
    least, greatest = like.limits
    low, high = min(low, 0.0), max(high, 0.0)
    middle = 0 if least < 0 else (greatest + 1) // 2
    if bool(np.all(like.zero_point == middle)):
        scale = max(-low, high) / ((greatest - least) // 2)
        zero = middle
    else:
        scale = (high - low) / (greatest - least)
        zero = int(np.clip(np.rint(least - low / scale), least, greatest)) if scale else least
    scale = scale if scale > 1e-20 else 1.0
    return dataclasses.replace(like, scale=np.array(scale), zero_point=np.array(zero, np.int64))

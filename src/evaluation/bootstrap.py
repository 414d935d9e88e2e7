"""Confidence intervals by resampling units, the same resamples for all models and metrics.

Here: `intervals`. Not here: which rows belong to a unit (`measure`), slices (`permutation`).
Paired: the interval of a difference is that of the differences on the same resamples (Efron and
Tibshirani 1993, ch. 13 and 14). Metrics of the whole set are computed anew on each resample.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from statistics import NormalDist

import numpy as np

from .report import ORIGINAL, Estimate
from .scored import Scored

_CHUNK = 50
_JACKKNIFE = 200
_DEFINED = 0.5
"""Share of resamples on which a metric must be defined for an interval to be given."""

Intervals = dict[str, tuple[Estimate, Estimate | None]]


def intervals(
    scored: Scored, *, resamples: int, confidence: float, seed: int, method: str
) -> tuple[Intervals, float]:
    """By model its value and difference to the original, each with its interval; and the share of
    resamples on which the metric was undefined."""
    point = scored.point()
    size = int(scored.units.max(initial=-1)) + 1
    if resamples == 0 or size < 2:
        return {name: _bare(point, name) for name in point}, 0.0
    drawn: dict[str, list[np.ndarray]] = {name: [] for name in point}
    for counts in draws(size, resamples, seed):
        for name, values in scored.values(counts).items():
            drawn[name].append(values)
    replicates = {name: np.concatenate(chunks) for name, chunks in drawn.items()}
    left_out = None
    if method == "bca":
        left_out = scored.values(_leave_out(size, seed))
    defined = np.all([np.isfinite(values) for values in replicates.values()], axis=0)
    undefined = 1 - float(defined.mean())
    if 1 - undefined < _DEFINED:
        return {name: _bare(point, name) for name in point}, undefined
    kept = {name: values[defined] for name, values in replicates.items()}
    return {name: _pair(name, point, kept, left_out, confidence) for name in point}, undefined


def draws(units: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """How often each unit is taken, [resamples, units] in chunks; the same for the same seed."""
    rng = np.random.default_rng(seed)
    for start in range(0, resamples, _CHUNK):
        rows = min(_CHUNK, resamples - start)
        chosen = rng.integers(0, units, (rows, units)) + units * np.arange(rows)[:, None]
        yield np.bincount(chosen.ravel(), minlength=rows * units).reshape(rows, units)


def _leave_out(units: int, seed: int) -> np.ndarray:
    """Counts of the jackknife: each unit left out in turn, or one of 200 random blocks."""
    blocks = min(units, _JACKKNIFE)
    block = np.random.default_rng(seed).permutation(units) % blocks
    return np.asarray(block[None, :] != np.arange(blocks)[:, None], np.int64)


def _bare(point: Mapping[str, float], name: str) -> tuple[Estimate, Estimate | None]:
    change = None if name == ORIGINAL else Estimate(point[name] - point[ORIGINAL])
    return Estimate(point[name]), change


def _pair(
    name: str,
    point: Mapping[str, float],
    kept: Mapping[str, np.ndarray],
    left_out: Mapping[str, np.ndarray] | None,
    confidence: float,
) -> tuple[Estimate, Estimate | None]:
    jack = None if left_out is None else left_out[name]
    value = _estimate(point[name], kept[name], jack, confidence)
    if name == ORIGINAL:
        return value, None
    if jack is not None and left_out is not None:
        jack = jack - left_out[ORIGINAL]
    change = point[name] - point[ORIGINAL]
    return value, _estimate(change, kept[name] - kept[ORIGINAL], jack, confidence)


def _estimate(
    value: float, replicates: np.ndarray, jack: np.ndarray | None, confidence: float
) -> Estimate:
    tail = (1 - confidence) / 2
    shares = (tail, 1 - tail)
    if jack is not None:
        shares = _bca_shares(value, replicates, jack, tail)
    low, high = np.quantile(replicates, shares)
    return Estimate(value, float(low), float(high))


def _bca_shares(
    value: float, replicates: np.ndarray, jack: np.ndarray, tail: float
) -> tuple[float, float]:
    """Quantiles to read instead of `tail` and `1 - tail`: bias-corrected and accelerated (Efron
    1987). Ties with the value count half, so that a difference that is mostly 0 stays sane."""
    normal = NormalDist()
    below = float(np.mean(replicates < value) + 0.5 * np.mean(replicates == value))
    edge = 0.5 / len(replicates)
    bias = normal.inv_cdf(min(max(below, edge), 1 - edge))
    centred = np.nanmean(jack) - jack[np.isfinite(jack)]
    power = float(np.sum(centred**2)) ** 1.5
    acceleration = float(np.sum(centred**3)) / (6 * power) if power else 0.0

    def share(quantile: float) -> float:
        z = bias + normal.inv_cdf(quantile)
        scale = 1 - acceleration * z
        return normal.cdf(bias + z / scale) if scale > 0 else float(math.copysign(0.5, z) + 0.5)

    return share(tail), share(1 - tail)

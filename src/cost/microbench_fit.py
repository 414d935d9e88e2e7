"""Fitting one class of kernels to its measured times: a non-negative base, then a correction.

Here: `fit_class`. The base is least squares on relative errors with coefficients that can't be
negative (Lawson and Hanson 1974, ch. 23); the correction is a Gaussian process on the logarithm of
time over base, on a few of the kernels (subset of regressors; Rasmussen and Williams 2006, ch. 8).
Its widths are those of greatest likelihood. numpy alone. Not here: which classes there are
(`calibrate`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from .features import Features
from .profile import ClassModel, Correction, similarity

Array = NDArray[np.float64]

CLOCK_MS = 0.0007
"""What a kernel's time is uncertain by at the least: the profiler counts microseconds."""
NOISE = 0.03
"""The relative noise of a kernel's time, at the least."""
Relatives = tuple[Sequence[Features], Array]
_RELATIVES = 6.0
MAX_POINTS = 160
MIN_FOR_CORRECTION = 10
_CLIP = 1.6  # logarithm; what is further off is an outlier
_EXTRA = 0.15  # of the residuals' variance, what no coordinate explains, when widths are given
_SEARCH = 260  # kernels that the widths are looked for on
_SPANS = (0.35, 0.6, 1.0, 1.8, 3.2, 8.0, 30.0)  # widths, in deviations of a coordinate


def relative_noise(ms: Array) -> Array:
    """The deviation of measured times, relative to them."""
    found: Array = np.sqrt(NOISE**2 + (CLOCK_MS / ms) ** 2)
    return found


def non_negative(matrix: Array, target: Array, rounds: int = 300) -> Array:
    """Non-negative least squares by the active-set method of Lawson and Hanson."""
    count = matrix.shape[1]
    scale = np.sqrt((matrix**2).sum(0))
    scale[scale == 0] = 1.0
    a = matrix / scale
    gram, moment = a.T @ a, a.T @ target
    x, passive = np.zeros(count), np.zeros(count, bool)
    for _ in range(rounds):
        gradient = moment - gram @ x
        gradient[passive] = -np.inf
        best = int(np.argmax(gradient))
        if gradient[best] <= 1e-10 * max(1.0, float(np.abs(moment).max())):
            break
        passive[best] = True
        while True:
            index = np.flatnonzero(passive)
            square = gram[np.ix_(index, index)] + 1e-12 * np.eye(len(index))
            trial = np.linalg.solve(square, moment[index])
            if trial.min(initial=0.0) >= 0 or not len(index):
                x[:] = 0.0
                x[index] = trial
                break
            negative = trial < 0
            steps = x[index][negative] / (x[index][negative] - trial[negative] + 1e-300)
            x[index] += steps.min() * (trial - x[index])
            passive[index[x[index] <= 1e-14]] = False
            x[~passive] = 0.0
    found: Array = x / scale
    return found


def fit_base(
    found: Sequence[Features], ms: Array, relatives: Relatives | None = None
) -> dict[str, float]:
    """Milliseconds per unit of each amount; amounts that do not help are left out.

    Errors are relative, and those of few kernels far off count less (Huber's weights). `relatives`
    count as `_RELATIVES` kernels together, whatever their number, and at the class's own level.
    """
    names = sorted({name for features in found for name in features.amounts})
    matrix = _amounts_of(found, names)
    trust = np.ones(len(ms))
    if relatives is not None and len(relatives[0]):
        others, other_ms = _amounts_of(relatives[0], names), relatives[1]
        shared = fit_base(*relatives)
        level = float(np.median(ms / np.maximum(base_of(shared, found), CLOCK_MS)))
        matrix = np.vstack([matrix, others])
        share = math.sqrt(_RELATIVES / len(other_ms))
        trust = np.concatenate([trust, np.full(len(other_ms), min(1.0, share))])
        ms = np.concatenate([ms, level * other_ms])
    scale = trust / (ms * relative_noise(ms) / NOISE)
    weights = scale
    terms = np.zeros(len(names))
    for _ in range(4):
        terms = non_negative(matrix * weights[:, None], ms * weights)
        off = np.abs(matrix @ terms - ms) / ms
        bound = max(0.05, 1.5 * float(np.median(off)))
        weights = scale * np.sqrt(np.minimum(1.0, bound / np.maximum(off, 1e-9)))
    if not terms.any():  # times of zero, or amounts of zero
        terms[names.index("launch")] = float(np.median(ms))
    return {name: float(term) for name, term in zip(names, terms, strict=True) if term > 0}


def _amounts_of(found: Sequence[Features], names: Sequence[str]) -> Array:
    return np.array([[f.amounts.get(name, 0.0) for name in names] for f in found])


def base_of(terms: dict[str, float], found: Sequence[Features]) -> Array:
    """The base's milliseconds."""
    total = [sum(c * f.amounts.get(name, 0.0) for name, c in terms.items()) for f in found]
    base: Array = np.maximum(np.array(total), CLOCK_MS / 2)
    return base


def fit_class(
    found: Sequence[Features],
    ms: Array,
    *,
    points: int = MAX_POINTS,
    relatives: Relatives | None = None,
) -> ClassModel:
    """The model of kernels of one class from their times in milliseconds, [n].

    `relatives`: other kernels of its family and their times, which say how time grows where the
    class's own do not.
    """
    terms = fit_base(found, ms, relatives)
    # families that share a root may have coordinates of their own: those in common are used
    coordinates = sorted(set.intersection(*(set(f.coordinates) for f in found)))
    rows = np.array([[f.coordinates[name] for name in coordinates] for f in found])
    low = {name: float(rows[:, i].min()) for i, name in enumerate(coordinates)}
    high = {name: float(rows[:, i].max()) for i, name in enumerate(coordinates)}
    model = ClassModel(terms=terms, low=low, high=high, samples=len(found))
    if len(found) < MIN_FOR_CORRECTION:
        return model
    residual = np.log(ms / base_of(terms, found))
    correction = fit_correction(coordinates, rows, residual, relative_noise(ms), points)
    return dataclasses.replace(model, correction=correction)


def refit_class(
    model: ClassModel, found: Sequence[Features], ms: Array, relatives: Relatives | None = None
) -> ClassModel:
    """The same class on other kernels, with the widths that were found before."""
    terms = fit_base(found, ms, relatives)
    before = model.correction
    if before is None or len(found) < MIN_FOR_CORRECTION:
        return ClassModel(terms=terms, samples=len(found))
    rows = np.array([[f.coordinates[name] for name in before.coordinates] for f in found])
    residual = np.log(ms / base_of(terms, found)).clip(-_CLIP, _CLIP)
    variance = max(1e-4, float(np.var(residual)))
    correction = _solve(
        before.coordinates,
        rows,
        residual,
        relative_noise(ms) ** 2 + _EXTRA * variance,
        before.scales,
        variance,
        len(before.points),
    )
    return ClassModel(terms=terms, correction=correction, samples=len(found))


def fit_correction(
    names: Sequence[str], rows: Array, residual: Array, noise: Array, points: int
) -> Correction | None:
    """A Gaussian process on [n, len(names)] coordinates; None where it would explain nothing."""
    moving = np.flatnonzero(rows.std(0) > 1e-6)
    if not len(moving):
        return None
    rows = rows[:, moving]
    residual = residual.clip(-_CLIP, _CLIP)
    spread = rows.std(0)
    search = spread_out(rows / spread, min(_SEARCH, len(rows)))
    spans, variance, extra = _widths(rows[search] / spread, residual[search], noise[search])
    if variance < 1e-5:
        return None
    return _solve(
        [names[int(i)] for i in moving],
        rows,
        residual,
        noise**2 + extra,
        spans * spread,
        variance,
        points,
    )


def _solve(
    names: Sequence[str],
    rows: Array,
    residual: Array,
    noise: Array,
    scales: Array,
    variance: float,
    points: int,
) -> Correction:
    """The mean of the process at given widths, on points spread out among the rows."""
    chosen = spread_out(rows / scales, min(points, len(rows)))
    centres = rows[chosen]
    cross = similarity(rows / scales, centres / scales)
    inner = similarity(centres / scales, centres / scales)
    precision = 1.0 / noise
    square = cross.T @ (cross * precision[:, None]) + inner / variance
    square[np.diag_indices(len(square))] += 1e-6 * np.trace(square) / len(square)
    moment = cross.T @ (precision * residual)
    weights = np.asarray(np.linalg.solve(square, moment), np.float64)
    return Correction(tuple(names), scales, centres, weights)


def spread_out(rows: Array, count: int) -> NDArray[np.intp]:
    """Rows far from each other, the farthest from those chosen next; all where few."""
    if count >= len(rows):
        return np.arange(len(rows))
    chosen = [int(np.argmin(((rows - rows.mean(0)) ** 2).sum(1)))]
    distance = ((rows - rows[chosen[0]]) ** 2).sum(1)
    while len(chosen) < count and distance.max() > 1e-9:
        chosen.append(int(np.argmax(distance)))
        distance = np.minimum(distance, ((rows - rows[chosen[-1]]) ** 2).sum(1))
    return np.array(chosen)


def _widths(rows: Array, residual: Array, noise: Array) -> tuple[Array, float, float]:
    """Widths, variance and noise variance of greatest likelihood, by coordinate descent."""
    count = rows.shape[1]
    spans = np.full(count, 1.8)
    variance = max(1e-4, float(np.var(residual)))
    extra = max(1e-5, 0.2 * variance)
    squares = [(rows[:, i, None] - rows[None, :, i]) ** 2 for i in range(count)]
    total = sum(square / span**2 for square, span in zip(squares, spans, strict=True))
    best = _likelihood(total, variance, noise**2 + extra, residual)
    for _ in range(2):
        for index in range(count):
            without = total - squares[index] / spans[index] ** 2
            for span in _SPANS:
                trial = without + squares[index] / span**2
                value = _likelihood(trial, variance, noise**2 + extra, residual)
                if value > best:
                    best, spans[index], total = value, span, trial
        for factor in (0.3, 0.6, 1.7, 3.0):
            value = _likelihood(total, variance * factor, noise**2 + extra, residual)
            if value > best:
                best, variance = value, variance * factor
        for factor in (0.1, 0.4, 2.5, 6.0):
            value = _likelihood(total, variance, noise**2 + extra * factor, residual)
            if value > best:
                best, extra = value, extra * factor
    return spans, variance, extra


def _likelihood(squares: Array, variance: float, noise: Array, residual: Array) -> float:
    kernel = variance * np.exp(-0.5 * squares)
    kernel[np.diag_indices(len(kernel))] += noise + 1e-8
    try:
        lower = np.linalg.cholesky(kernel)
    except np.linalg.LinAlgError:
        return -math.inf
    solved = np.linalg.solve(lower, residual)
    return float(-0.5 * solved @ solved - np.log(np.diag(lower)).sum())

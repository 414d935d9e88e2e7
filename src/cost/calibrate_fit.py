"""The classes of a setting fitted to measured kernels, and the proof on networks held out.

Here: `fit_setting` and its parts. How one class is fitted is for `microbench_fit` to say. Not here:
measuring (`calibrate`, `microbench`).
"""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from .features import Features
from .microbench import NetTime
from .microbench_fit import Relatives, fit_class, refit_class
from .profile import LEAST_SHARE, ClassModel, HeldOut, Interval, Setting

Array = NDArray[np.float64]

FOLDS = 3
LEAST_MS = 0.0003
"""What a kernel is taken to cost at the least."""
_MIN_OWN, _MIN_FAMILY = 2, 4  # kernels for an operator's class beside its family's, for a family
_MAX_ROWS = 2500
_SUM_OF = 3  # held-out nets of a family that stand for one model: models are larger than nets
COVERED = 0.8


@dataclasses.dataclass(frozen=True)
class _Row:
    """A measured kernel: the number of its network, what it is, its corrected milliseconds."""

    net: int
    features: Features
    ms: float


def fit_setting(nets: Sequence[NetTime], threads: int) -> Setting:
    """Every class of kernels for one number of threads, and the proof on networks held out."""
    mine = [net for net in nets if net.threads == threads and net.kernels]
    overhead = profiling_overhead(mine)
    rows = [
        _Row(index, kernel.features, max(LEAST_MS, kernel.ms - overhead))
        for index, net in enumerate(mine)
        for kernel in net.kernels
    ]
    grouped = _by_class(rows)
    classes = {
        key: fit_class(*_samples(found), relatives=_relatives(key, found, grouped))
        for key, found in grouped.items()
    }
    held_out = _held_out(mine, rows, grouped, classes, threads)
    classes = {
        key: dataclasses.replace(model, error=held_out.errors.get(key))
        for key, model in classes.items()
    }
    return Setting(
        threads,
        classes,
        scale=held_out.scale,
        per_kernel_ms=held_out.per_kernel_ms,
        intervals=held_out.intervals,
        held_out=held_out.proofs,
    )


def profiling_overhead(nets: Sequence[NetTime]) -> float:
    """Milliseconds that the profiler adds to every kernel.

    From networks of many small kernels: the sum of their kernels less what a run takes without the
    profiler, per kernel; the median.
    """
    found = [
        (math.fsum(kernel.ms for kernel in net.kernels) - net.ms) / len(net.kernels)
        for net in nets
        if len(net.kernels) > 8 * net.ms
    ]
    return max(0.0, float(np.median(found))) if found else 0.0


def _by_class(rows: Sequence[_Row]) -> dict[str, list[_Row]]:
    """Rows by operator, by family and by the family's root, where there are enough."""
    grouped: dict[str, list[_Row]] = defaultdict(list)
    for row in rows:
        own, family = row.features.keys
        root = f"{row.features.family.partition('/')[0]}:{row.features.dtype}"
        for key in dict.fromkeys((own, family, root)):
            grouped[key].append(row)
    kept = {}
    for key, found in grouped.items():
        if len(found) < (_MIN_OWN if key.count(":") == 2 else _MIN_FAMILY):
            continue
        step = -(-len(found) // _MAX_ROWS)
        kept[key] = found[::step]
    return kept


def _samples(rows: Sequence[_Row]) -> Relatives:
    return [row.features for row in rows], np.array([row.ms for row in rows])


_FEW = 400
"""Relatives that a class looks at, at the most."""


def _relatives(
    key: str, own: Sequence[_Row], grouped: Mapping[str, Sequence[_Row]]
) -> Relatives | None:
    """Other operators of an operator's family; None for a family."""
    if key.count(":") < 2:
        return None
    _, family = own[0].features.keys
    others = [row for row in grouped.get(family, ()) if row.features.type != own[0].features.type]
    return _samples(others[:: -(-len(others) // _FEW)]) if len(others) >= _MIN_FAMILY else None


def kernel_times(setting: Setting, found: Sequence[Features]) -> Array:
    """Milliseconds of kernels under a setting, [n]; NaN where it has no class."""
    times = np.full(len(found), np.nan)
    by_class: dict[str, list[int]] = defaultdict(list)
    for index, features in enumerate(found):
        key, _ = setting.find(features)
        if key:
            by_class[key].append(index)
    for key, indices in by_class.items():
        times[indices], _ = setting.classes[key].predict([found[i] for i in indices])
    return times


def fit_level(sums: Array, counts: Array, walls: Array) -> tuple[float, float]:
    """How runs follow from the sums of their kernels: a factor, and milliseconds a kernel.

    Least absolute relative error, by iteratively reweighted least squares. Milliseconds a kernel
    are mostly negative: what the profiler adds beyond its mean.
    """
    rows = np.stack([sums / walls, counts / walls], axis=1)
    size = (walls / np.median(walls)).clip(0.2, 3.0)  # models are larger than most networks here
    weights = size
    level = np.array([1.0, 0.0])
    for _ in range(20):
        root = np.sqrt(weights)[:, None]
        level = np.linalg.lstsq(rows * root, root[:, 0], rcond=None)[0]
        weights = size / np.maximum(np.abs(rows @ level - 1.0), 0.02)
    if not 0.5 < level[0] < 2.0:  # too few networks to tell
        return float(np.median(walls / sums)), 0.0
    return float(level[0]), float(level[1])


# --- proof -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Proof:
    scale: float
    per_kernel_ms: float
    intervals: Mapping[str, Interval]
    proofs: Mapping[str, HeldOut]
    errors: Mapping[str, float]


def _held_out(
    nets: Sequence[NetTime],
    rows: Sequence[_Row],
    grouped: Mapping[str, list[_Row]],
    classes: Mapping[str, ClassModel],
    threads: int,
) -> _Proof:
    """Predict every network from fits that have not seen it, nor the same under another recipe."""
    names = sorted({net.net for net in nets})
    fold_of = {name: index % FOLDS for index, name in enumerate(names)}
    sums = np.zeros(len(nets))
    errors: dict[str, list[float]] = defaultdict(list)
    for fold in range(FOLDS):
        fitted = {}
        left = {
            key: [row for row in found if fold_of[nets[row.net].net] != fold]
            for key, found in grouped.items()
        }
        for key, seen in left.items():
            if len(seen) >= _MIN_FAMILY:
                relatives = _relatives(key, seen, left)
                fitted[key] = refit_class(classes[key], *_samples(seen), relatives)
        setting = Setting(threads, fitted)
        mine = [row for row in rows if fold_of[nets[row.net].net] == fold]
        times = kernel_times(setting, [row.features for row in mine])
        for row, found_ms in zip(mine, times.tolist(), strict=True):
            # no class at all: unknown, and said so, when predicting
            guess = row.ms if math.isnan(found_ms) else float(found_ms)
            sums[row.net] += guess
            errors[row.features.keys[0]].append(abs(guess - row.ms) / row.ms)
    truths = np.array([net.ms for net in nets])
    counts = np.array([float(len(net.kernels)) for net in nets])
    scale, per_kernel = fit_level(sums, counts, truths)
    predicted = np.maximum(scale * sums + per_kernel * counts, LEAST_SHARE * sums)
    intervals, proofs = {}, {}
    for dtype, recipe_is_int8 in (("float32", False), ("int8", True)):
        chosen = [i for i, net in enumerate(nets) if ("int8" in net.recipe) == recipe_is_int8]
        if len(chosen) >= 10:
            intervals[dtype], proofs[dtype] = _interval(nets, chosen, predicted, truths)
    medians = {key: float(np.median(e)) for key, e in errors.items()}
    return _Proof(scale, per_kernel, intervals, proofs, medians)


def _interval(
    nets: Sequence[NetTime], chosen: Sequence[int], predicted: Array, truths: Array
) -> tuple[Interval, HeldOut]:
    """A split-conformal interval on log(truth / prediction), and the error of the networks.

    Models are larger than the networks, so their errors average out more: `_SUM_OF` networks of
    one family stand for a model.
    """
    by_family: dict[str, list[int]] = defaultdict(list)
    for index in chosen:
        by_family[nets[index].net.rpartition("-")[0]].append(index)
    ratios = []
    for members in by_family.values():
        for start in range(len(members)):
            group = [members[(start + k) % len(members)] for k in range(_SUM_OF)]
            weights = 1.0 / truths[group]  # each network counts the same
            ratios.append(
                float((weights * truths[group]).sum() / (weights * predicted[group]).sum())
            )
    logs = np.log(ratios)
    rank = min(1.0, COVERED + (1 - COVERED) / len(logs))
    low, high = np.quantile(logs, [(1 - rank) / 2, (1 + rank) / 2])
    low, high = min(low, -0.01), max(high, 0.01)
    off = np.abs(predicted[list(chosen)] / truths[list(chosen)] - 1)
    inside = float(np.mean((logs >= low) & (logs <= high)))
    proof = HeldOut(
        models=len(chosen),
        median_error=float(np.median(off)),
        within_10=float(np.mean(off <= 0.1)),
        within_20=float(np.mean(off <= 0.2)),
        coverage=inside,
        method=f"{FOLDS}-fold over random networks",
    )
    return Interval(float(math.exp(low)), float(math.exp(high))), proof

"""Whole models as sums over kernels: the linear algebra that a fit to model timings stands on.

Here: `Sums`, the amounts of every class of kernels in every model; `least_error`, non-negative
rates of least absolute relative error; `smooth_factors`, corrections of single kernels learned from
the times of whole models. Not here: which rates are fitted and how they are proved (`timings`).
"""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from .features import Features
from .microbench_fit import non_negative, spread_out
from .profile import Correction, similarity

Array = NDArray[np.float64]
Key = tuple[str, str]  # a class, and an amount

NOISE = 0.03
"""Relative error below which timings are not taken to differ."""
POINTS = 60
"""Kernels of a class that a correction is learned around."""
SPAN = 1.5
"""Doublings of a coordinate over which a correction changes."""
_NARROW = {"fill": 0.5, "square": 0.5, "function": 0.5, "single": 0.5}  # shares, not doublings
_FINE = frozenset({"aligned", "depth_aligned"})
"""Coordinates that only timings of single kernels can tell of."""
_COMPUTE = ("convolution", "matmul", "attention", "recurrent")
_MEMORY_AMOUNTS = ("read", "written", "weights", "launch", "elements")
_COMPUTE_AMOUNTS = (
    *("macs", "read", "written", "weights", "launch"),
    *("tiled_macs", "groups", "group_written"),
)
_UNEVEN = ("uneven_launch", "uneven_read", "uneven_macs")


def class_of(kernel: Features) -> str:
    """The class that a kernel is fitted in: its family, and its operator among normalizations,
    whose passes over the data differ."""
    if kernel.family == "normalization":
        return f"{kernel.family}:{kernel.type}"
    return kernel.family


def root_of(name: str) -> str:
    """The kind of work of a class: "convolution" of "convolution/depthwise"."""
    return name.partition(":")[0].partition("/")[0]


def sort_of(name: str) -> str:
    """Whether arithmetic or memory is what a class of kernels usually waits for."""
    return "compute" if root_of(name) in _COMPUTE else "memory"


def amounts_of(name: str) -> tuple[str, ...]:
    """What the time of a class of kernels grows with."""
    if sort_of(name) == "memory":
        return _MEMORY_AMOUNTS
    return _COMPUTE_AMOUNTS + (_UNEVEN if root_of(name) == "convolution" else ())


def key_of(name: str, amount: str) -> Key:
    """What a rate belongs to: uneven padding costs the same in every kind of convolution."""
    return (root_of(name), amount) if amount in _UNEVEN else (name, amount)


@dataclasses.dataclass(frozen=True, eq=False)
class ClassSums:
    """The distinct kernels of a class: `amounts` [kernels, rates], `counts` [models, kernels], and
    `rows` [kernels, names], their coordinates."""

    amounts: Array
    counts: Array
    names: tuple[str, ...]
    rows: Array

    def seen(self, models: NDArray[np.bool_]) -> Array:
        """Coordinates of the kernels that these models have, [n, names]."""
        found: Array = self.rows[self.counts[models].sum(0) > 0]
        return found


@dataclasses.dataclass(frozen=True, eq=False)
class Sums:
    """Models as sums of kernels by class. `matrix` [models, rates]: how much of each amount."""

    classes: dict[str, ClassSums]
    keys: tuple[Key, ...]
    matrix: Array

    @classmethod
    def of(cls, models: Sequence[Sequence[Features]]) -> Sums:
        """The sums of models given as kernels."""
        counts: dict[str, dict[object, dict[int, int]]] = defaultdict(dict)
        first: dict[object, Features] = {}
        for index, kernels in enumerate(models):
            for kernel in kernels:
                name = class_of(kernel)
                mark = (name, _marks(kernel, name))
                first.setdefault(mark, kernel)
                row = counts[name].setdefault(mark, {})
                row[index] = row.get(index, 0) + 1
        keys = tuple(
            sorted(
                {
                    key_of(name, amount)
                    for name, marks in counts.items()
                    for mark in marks
                    for amount in amounts_of(name)
                    if first[mark].amount(amount)
                }
            )
        )
        place = {key: i for i, key in enumerate(keys)}
        classes = {}
        matrix = np.zeros((len(models), len(keys)))
        for name in sorted(counts):
            found = [first[mark] for mark in counts[name]]
            amounts = np.zeros((len(found), len(keys)))
            many = np.zeros((len(models), len(found)))
            for column, (kernel, uses) in enumerate(zip(found, counts[name].values(), strict=True)):
                for amount in amounts_of(name):
                    if value := kernel.amount(amount):
                        amounts[column, place[key_of(name, amount)]] += value
                for index, count in uses.items():
                    many[index, column] = count
            classes[name] = _class_sums(found, amounts, many)
            matrix += many @ amounts
        return cls(classes, keys, matrix)

    def parts(self, rates: Array) -> dict[str, Array]:
        """Milliseconds of each class in each model, [models]."""
        return {name: c.counts @ (c.amounts @ rates) for name, c in self.classes.items()}


def _marks(kernel: Features, name: str) -> tuple[object, ...]:
    """What tells kernels of a class apart."""
    return (
        tuple(round(kernel.amount(amount), 1) for amount in amounts_of(name)),
        tuple(sorted((n, round(v, 3)) for n, v in kernel.coordinates.items())),
    )


def _class_sums(found: Sequence[Features], amounts: Array, counts: Array) -> ClassSums:
    common = set.intersection(*(set(kernel.coordinates) for kernel in found))
    names = tuple(sorted(common - _FINE))
    rows = np.array([[k.coordinates[n] for n in names] for k in found]).reshape(len(found), -1)
    return ClassSums(amounts, counts, names, rows)


def least_error(matrix: Array, ms: Array, expected: Array, widths: Array) -> Array:
    """Non-negative rates of least absolute relative error plus squared distance to `expected`.

    `widths`: how far each rate may reasonably be from the expected one, above zero.
    """
    scaled = matrix * widths / ms[:, None]
    center = expected / widths
    count = len(widths)
    weights = np.ones(len(ms))
    found = center
    for _ in range(12):
        root = np.sqrt(weights)
        system = np.vstack([scaled * root[:, None], NOISE * np.eye(count)])
        found = non_negative(system, np.concatenate([root, NOISE * center]), rounds=20 * count)
        off = np.abs(scaled @ found - 1.0)
        weights = NOISE / np.maximum(off, 0.5 * NOISE)
    rates: Array = found * widths
    return rates


def smooth_factors(
    sums: Sums,
    rates: Array,
    ms: Array,
    models: NDArray[np.bool_],
    variance: float,
    class_variance: float = 0.0,
) -> dict[str, tuple[float, Correction]]:
    """For each class a factor on its rates and a correction, from what the models took.

    A kernel's time is its base b(z) times 1 + c + g(z), z its coordinates, c ~ N(0,
    `class_variance`) and g a Gaussian process of that `variance`. A model's time is linear in both,
    so the posterior is a least-squares problem, here with errors of Laplace (reweighted), on a
    few points of each class (subset of regressors; Rasmussen and Williams 2006, ch. 8).
    """
    parts = sums.parts(rates)
    base = np.maximum(np.sum(list(parts.values()), axis=0), 1e-9 * ms)
    bases = {name: _basis(c, models) for name, c in sums.classes.items() if c.counts[models].any()}
    columns = []
    for name, (basis, _, _) in bases.items():
        c = sums.classes[name]
        columns.append(math.sqrt(variance) * (c.counts @ ((c.amounts @ rates)[:, None] * basis)))
        columns.append(math.sqrt(class_variance) * parts[name][:, None])
    design = (np.hstack(columns) / ms[:, None])[models]
    weights = design.T @ _laplace(design @ design.T, ((ms - base) / ms)[models])
    found = {}
    start = 0
    for name, (basis, unmix, known) in bases.items():
        count = basis.shape[1]
        own = unmix.T @ weights[start : start + count] * math.sqrt(variance)
        shift = float(weights[start + count]) * math.sqrt(class_variance)
        start += count + 1
        factor = max(0.2, 1.0 + shift)
        found[name] = (factor, dataclasses.replace(known, weights=own / factor))
    return found


def _basis(sums: ClassSums, models: NDArray[np.bool_]) -> tuple[Array, Array, Correction]:
    """Functions of a class's kernels that are independent in the prior, [kernels, points]; what
    takes weights of them to weights of the points; and the correction without its weights."""
    scales = np.array([_NARROW.get(name, SPAN) for name in sums.names])
    seen = sums.seen(models)
    points = seen[spread_out(seen / scales, min(POINTS, len(seen)))]
    prior = similarity(points / scales, points / scales) + 1e-4 * np.eye(len(points))
    unmix = np.linalg.inv(np.linalg.cholesky(prior))
    basis = similarity(sums.rows / scales, points / scales) @ unmix.T
    return basis, unmix, Correction(sums.names, scales, points, np.zeros(len(points)), "linear")


def _laplace(covariance: Array, off: Array) -> Array:
    """What to multiply covariances by for the mean of a process seen with errors of Laplace."""
    noise = np.full(len(off), NOISE**2)
    solved = off
    for _ in range(8):
        solved = np.asarray(np.linalg.solve(covariance + np.diag(noise), off), np.float64)
        left = np.abs(off - covariance @ solved)
        noise = NOISE * np.maximum(left, 0.5 * NOISE)
    return solved

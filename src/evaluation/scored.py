"""A metric applied to all models, in a form that can be resampled, restricted and swapped.

Here: `Sums` (ratios of sums over rows) and `Calls` (a function of all rows), `value`s from both.
Not here: what to resample (`bootstrap`, `permutation`), making them from samples (`measure`).
A row is what a metric sees as one entry: a sample, or one position of a joined sequence. A unit is
what is resampled as a whole: a sample, or a group of them.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np

from ..errors import EdgepassError, UsageError


class Scored(Protocol):
    """One metric of several models on the same rows; units are numbered from 0."""

    @property
    def units(self) -> np.ndarray:
        """The unit of each row."""

    @property
    def samples(self) -> np.ndarray:
        """The sample of each row."""

    def values(self, counts: np.ndarray) -> dict[str, np.ndarray]:
        """By model, a value for each row of `counts`: how often each unit is taken. NaN where it
        is undefined."""

    def point(self) -> dict[str, float]:
        """By model, the value on all rows as they are."""

    def only(self, rows: np.ndarray) -> Scored:
        """The same on some rows (indices), their units numbered anew."""

    def swapped(self, first: str, second: str, swaps: np.ndarray) -> np.ndarray:
        """For each row of `swaps` (bool, by unit): value of the second model less that of the
        first, after the two have exchanged those units."""


@dataclasses.dataclass(frozen=True)
class Sums:
    """`finish(sum of numerators / sum of denominators)`; `parts` by model is [rows, 2]."""

    parts: Mapping[str, np.ndarray]
    units: np.ndarray
    samples: np.ndarray
    finish: Callable[[Any], Any] = lambda value: value

    def point(self) -> dict[str, float]:
        return {n: float(self._ratio(p.sum(0)[None])[0]) for n, p in self.parts.items()}

    def values(self, counts: np.ndarray) -> dict[str, np.ndarray]:
        return {
            name: self._ratio(counts.astype(np.float64) @ self._by_unit(name))
            for name in self.parts
        }

    def only(self, rows: np.ndarray) -> Sums:
        parts = {name: part[rows] for name, part in self.parts.items()}
        return dataclasses.replace(
            self, parts=parts, units=renumbered(self.units[rows]), samples=self.samples[rows]
        )

    def swapped(self, first: str, second: str, swaps: np.ndarray) -> np.ndarray:
        a, b = self._by_unit(first), self._by_unit(second)
        moved = swaps.astype(np.float64) @ (a - b)
        return np.asarray(self._ratio(b.sum(0) + moved) - self._ratio(a.sum(0) - moved))

    def _by_unit(self, name: str) -> np.ndarray:
        size = int(self.units.max(initial=-1)) + 1
        part = self.parts[name]
        columns = [np.bincount(self.units, part[:, k], minlength=size) for k in range(2)]
        return np.stack(columns, axis=1)

    def _ratio(self, sums: np.ndarray) -> np.ndarray:
        with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
            ratio = np.where(sums[:, 1] != 0, sums[:, 0] / sums[:, 1], np.nan)
            return np.asarray(self.finish(ratio), np.float64)


@dataclasses.dataclass(frozen=True)
class Calls:
    """`call(predictions, labels)` on the rows that are taken; `name` is the metric's, for errors.

    `weighted` gives the values for many weightings of the rows at once, where the metric can.
    """

    name: str
    call: Callable[[Any, Any], Any]
    predictions: Mapping[str, Any]
    labels: Any
    units: np.ndarray
    samples: np.ndarray
    weighted: Callable[[Any, Any, np.ndarray], np.ndarray] | None = None

    def point(self) -> dict[str, float]:
        return {n: self._call(p, self.labels) for n, p in self.predictions.items()}

    def values(self, counts: np.ndarray) -> dict[str, np.ndarray]:
        if self.weighted is not None:
            weights = counts[:, self.units].astype(np.float64)
            return {
                name: np.asarray(self.weighted(given, self.labels, weights), np.float64)
                for name, given in self.predictions.items()
            }
        found: dict[str, list[float]] = {name: [] for name in self.predictions}
        every = np.arange(len(self.units))
        for row in counts:
            rows = np.repeat(every, row[self.units])
            labels = take(self.labels, rows)
            for name, given in self.predictions.items():
                found[name].append(self.tried(take(given, rows), labels))
        return {name: np.array(values) for name, values in found.items()}

    def only(self, rows: np.ndarray) -> Calls:
        return dataclasses.replace(
            self,
            predictions={name: take(given, rows) for name, given in self.predictions.items()},
            labels=take(self.labels, rows),
            units=renumbered(self.units[rows]),
            samples=self.samples[rows],
        )

    def swapped(self, first: str, second: str, swaps: np.ndarray) -> np.ndarray:
        a, b = self.predictions[first], self.predictions[second]
        found = []
        for row in swaps:
            moved = row[self.units]
            left = self.tried(exchanged(a, b, moved), self.labels)
            found.append(self.tried(exchanged(b, a, moved), self.labels) - left)
        return np.array(found)

    def tried(self, predictions: Any, labels: Any) -> float:
        """The value, NaN where the metric is undefined on these rows (AUC of one class)."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return as_number(self.call(predictions, labels), self.name)
        except Exception:
            return float("nan")

    def _call(self, predictions: Any, labels: Any) -> float:
        try:
            return as_number(self.call(predictions, labels), self.name)
        except EdgepassError as error:
            found = error.diagnostic
            where = found.where or f"metric {self.name!r}"
            raise UsageError(found.what, where=where, why=found.why, fix=found.fix) from error
        except Exception as error:
            shapes = f"predictions {_described(predictions)}, labels {_described(labels)}"
            raise UsageError(
                f"The metric {self.name!r} failed",
                where=shapes,
                why=f"{type(error).__name__}: {str(error).strip().splitlines()[0][:300]}"
                if str(error).strip()
                else type(error).__name__,
                fix="it is called as metric(predictions, labels), or (labels, predictions) where "
                "its first parameter is called y_true or labels; `predict` can decode outputs",
            ) from error


def take(column: Any, rows: np.ndarray) -> Any:
    """Some rows of an array, a list, or a mapping of such."""
    if isinstance(column, Mapping):
        return {name: take(part, rows) for name, part in column.items()}
    if isinstance(column, np.ndarray):
        return column[rows]
    return None if column is None else [column[i] for i in rows]


def exchanged(column: Any, other: Any, moved: np.ndarray) -> Any:
    """`column` with the moved rows (bool) taken from `other`."""
    if isinstance(column, Mapping):
        return {name: exchanged(part, other[name], moved) for name, part in column.items()}
    if isinstance(column, np.ndarray) and isinstance(other, np.ndarray):
        return np.where(moved.reshape(-1, *[1] * (column.ndim - 1)), other, column)
    return [b if move else a for a, b, move in zip(column, other, moved, strict=True)]


def renumbered(units: np.ndarray) -> np.ndarray:
    """Units numbered from 0 without gaps."""
    return np.unique(units, return_inverse=True)[1]


def as_number(value: Any, name: str) -> float:
    """What a metric returned, as a float.

    Raises:
        UsageError: several numbers, or none.
    """
    if hasattr(value, "detach"):
        value = value.detach().cpu().numpy()
    if np.ndim(value) != 0 and np.size(value) != 1:
        raise UsageError(
            f"The metric {name!r} returned {np.size(value)} numbers",
            fix="return one; give several metrics for several numbers",
        )
    return float(np.asarray(value).reshape(-1)[0])


def _described(column: Any) -> str:
    if isinstance(column, Mapping):
        return ", ".join(f"{name}: {_described(part)}" for name, part in column.items())
    if isinstance(column, np.ndarray):
        return f"{column.dtype}{list(column.shape)}"
    return "none" if column is None else f"a list of {len(column)}"

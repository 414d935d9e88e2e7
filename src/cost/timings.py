"""A latency profile from whole-model timings: published numbers, or a few made on a phone.

Here: `read_timings`, `fit_timings`, and what they take. A model's time is the sum over its kernels
of non-negative rates times amounts; rates are fitted to relative errors, drawn towards those of
kernels of the same sort, or of a related device's profile (`prior`), so that ten models can do. Not
here: micro-benchmarks (`calibrate`), many devices at once (`fleet`), loading the models.

The fit is a maximum a posteriori estimate: absolute relative errors (Laplace, by iteratively
reweighted least squares), and a Gaussian prior on each rate whose width is a multiple of the rate
expected. The multiple is chosen by leaving out families of models in turn.
"""

from __future__ import annotations

import csv
import dataclasses
import datetime
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..errors import ProfileError
from .features import Features
from .microbench_fit import non_negative
from .profile import ClassModel, HeldOut, Interval, Profile, Setting

Array = NDArray[np.float64]
ProgressCall = Callable[[int, int, str], None]

_COMPUTE = ("convolution", "matmul", "attention", "recurrent")
_MEMORY_AMOUNTS = ("read", "written", "weights", "launch")
_COMPUTE_AMOUNTS = ("macs", *_MEMORY_AMOUNTS, "tiled_macs", "groups", "group_written")
_UNEVEN = ("uneven_launch", "uneven_read", "uneven_macs")
_ROOTS = (
    *_COMPUTE,
    *("elementwise", "normalization", "softmax", "reduction", "pooling", "movement", "gather"),
    *("resize", "quantization", "cast", "other"),
)
WIDTHS = (0.5, 2.0, 10.0, 30.0)
"""Multiples of an expected rate that its prior may be wide, to choose among."""
PRIOR_WIDTH = 0.7
"""The multiple around a related device's rates."""
_NOISE = 0.03  # relative error below which timings are not taken to differ
_SHARE = 0.05  # of a model's time that a rate may explain where the pooled fit gives it none
_LEVEL = 0.8  # of truths inside the interval
_FEW = 15  # models below which single ones are held out, not families


@dataclasses.dataclass(frozen=True)
class TimedModel:
    """One model's time on the device, milliseconds a run; `family` for holding out relatives."""

    name: str
    kernels: Sequence[Features]
    ms: float
    family: str = ""
    threads: int = 1


@dataclasses.dataclass(frozen=True)
class TimingRow:
    """One line of a table of timings; `model` is a path as written there."""

    line: int
    model: str
    ms: float
    family: str
    threads: int
    dims: Mapping[str, int]


def read_timings(path: str | Path) -> list[TimingRow]:
    """The rows of a CSV with columns `model` and `latency_ms`; `family`, `threads` and `dims`
    (`batch=1;length=128`) may be there. Without `family`, the model's own name is its family.

    Raises:
        ProfileError: no such file, no such columns, or a value that can't be read; with its line.
    """
    path = Path(path)
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            missing = {"model", "latency_ms"} - set(reader.fieldnames or ())
            if missing:
                raise ProfileError(
                    f"The table of timings has no column {sorted(missing)[0]!r}",
                    where=str(path),
                    why=f"its columns are {', '.join(reader.fieldnames or ()) or 'none'}",
                    fix="name the columns model and latency_ms (also: family, threads, dims)",
                )
            rows = [_row(path, reader.line_num, row) for row in reader]
    except (OSError, UnicodeDecodeError) as error:
        raise ProfileError(
            "The table of timings can't be read", where=str(path), why=str(error)
        ) from error
    if not rows:
        raise ProfileError("The table of timings is empty", where=str(path))
    return rows


def _row(path: Path, line: int, row: Mapping[str, str | None]) -> TimingRow:
    def wrong(column: str, wanted: str) -> ProfileError:
        return ProfileError(
            f"A timing can't be read: {column} is {row.get(column)!r}",
            where=f"{path}, line {line}",
            fix=f"give {wanted}",
        )

    model = (row.get("model") or "").strip()
    if not model:
        raise wrong("model", "the path of an ONNX file")
    try:
        ms = float(row.get("latency_ms") or "")
    except ValueError:
        ms = math.nan
    if not (math.isfinite(ms) and ms > 0):
        raise wrong("latency_ms", "milliseconds above zero, like 12.5")
    threads = (row.get("threads") or "1").strip()
    if not threads.isdecimal() or int(threads) < 1:
        raise wrong("threads", "a whole number above zero")
    dims: dict[str, int] = {}
    for part in (row.get("dims") or "").split(";"):
        name, equals, size = part.strip().partition("=")
        if not part.strip():
            continue
        if not equals or not size.isdecimal() or int(size) < 1:
            raise wrong("dims", "sizes like batch=1;length=128")
        dims[name] = int(size)
    family = (row.get("family") or "").strip() or Path(model).stem.partition("@")[0]
    return TimingRow(line, model, ms, family, int(threads), dims)


# --- fitting ---------------------------------------------------------------------------------


def fit_timings(
    samples: Sequence[TimedModel],
    *,
    name: str,
    device: str,
    runtime: str,
    target: str = "arm64",
    source: str = "",
    prior: Profile | None = None,
    progress: ProgressCall | None = None,
) -> Profile:
    """Fit a profile to the times of whole models, a setting for each thread count among them.

    Held-out figures (leaving out a family at a time; single models where there are few) and 80 %
    intervals from them are stored in it. With `prior` the rates start from a related device's,
    scaled; without one they are drawn towards rates that kernels of the same sort share.

    Raises:
        ProfileError: fewer than three models at some thread count, or the prior has no rates.
    """
    if not samples:
        raise ProfileError("There are no timings to fit", where=name)
    settings = []
    counts = sorted({sample.threads for sample in samples})
    for threads in counts:
        chosen = [sample for sample in samples if sample.threads == threads]
        if len(chosen) < 3:
            raise ProfileError(
                f"{len(chosen)} timings with {threads} thread(s) are too few",
                where=name,
                fix="time at least three models, ten for a profile that is worth much",
            )
        settings.append(_setting(chosen, prior, threads, progress))
    return Profile(
        name=name,
        device=device,
        runtime=runtime,
        target=target,
        source=source or f"{len(samples)} whole-model timings",
        settings=tuple(settings),
        date=datetime.date.today().isoformat(),
        measured="models",
        notes=() if prior is None else (f"started from the profile {prior.name!r}",),
    )


def hold_out(
    samples: Sequence[TimedModel],
    prior: Profile | None = None,
    progress: ProgressCall | None = None,
) -> Array:
    """Predicted milliseconds of every model by a fit that has not seen its family, [n]."""
    table = _Table.of(samples)
    fit = _Fit(table, None if prior is None else _rates_of(prior, table, samples[0].threads))
    return fit.held_out(progress)


def _setting(
    samples: Sequence[TimedModel],
    prior: Profile | None,
    threads: int,
    progress: ProgressCall | None,
) -> Setting:
    table = _Table.of(samples)
    fit = _Fit(table, None if prior is None else _rates_of(prior, table, threads))
    predicted = fit.held_out(progress)
    rates = fit.rates(np.ones(len(samples), bool), fit.best_width())
    error = np.abs(predicted / table.ms - 1)
    low, high = _interval(table.ms / predicted)
    inside = (table.ms >= predicted * low) & (table.ms <= predicted * high)
    families = len(set(table.families))
    proof = HeldOut(
        models=len(samples),
        median_error=float(np.median(error)),
        within_10=float((error <= 0.1).mean()),
        within_20=float((error <= 0.2).mean()),
        coverage=float(inside.mean()),
        method=f"leaving out one of {families} families at a time",
    )
    return Setting(
        threads=threads,
        classes=table.classes(rates, fit.expected, samples),
        intervals={"": Interval(low, high)},
        held_out={"": proof},
    )


def _interval(ratios: Array) -> tuple[float, float]:
    """Factors around a prediction between which `_LEVEL` of truths lie, as many out on each side.

    Split conformal prediction (Vovk et al. 2005): the rank is that of one more sample.
    """
    ordered = np.sort(ratios)
    count = len(ordered)
    tail = (1 - _LEVEL) / 2 * (count + 1)
    below = max(0, math.floor(tail) - 1)
    above = min(count - 1, math.ceil(count + 1 - tail) - 1)
    return float(min(ordered[below], 0.999)), float(max(ordered[above], 1.001))


Key = tuple[str, str]


def _root(family: str) -> str:
    return family.partition("/")[0]


def _sort_of(family: str) -> str:
    return "compute" if _root(family) in _COMPUTE else "memory"


def _amounts_of(family: str) -> tuple[str, ...]:
    if _sort_of(family) == "memory":
        return _MEMORY_AMOUNTS
    return _COMPUTE_AMOUNTS + (_UNEVEN if _root(family) == "convolution" else ())


def _key(family: str, amount: str) -> Key:
    """What a rate belongs to: uneven padding costs the same in every kind of convolution."""
    return (_root(family), amount) if amount in _UNEVEN else (family, amount)


@dataclasses.dataclass(frozen=True)
class _Table:
    """Models as rows, rates as columns: how much of an amount a model has in a family."""

    matrix: Array
    keys: tuple[Key, ...]
    ms: Array
    families: tuple[str, ...]

    @classmethod
    def of(cls, samples: Sequence[TimedModel]) -> _Table:
        rows: list[dict[Key, float]] = []
        for sample in samples:
            row: dict[Key, float] = {}
            for kernel in sample.kernels:
                for amount in _amounts_of(kernel.family):
                    value = kernel.amount(amount)
                    if value:
                        key = _key(kernel.family, amount)
                        row[key] = row.get(key, 0.0) + value
            rows.append(row)
        keys = tuple(sorted({key for row in rows for key in row}))
        matrix = np.array([[row.get(key, 0.0) for key in keys] for row in rows])
        return cls(
            matrix,
            keys,
            np.array([sample.ms for sample in samples]),
            tuple(sample.family or sample.name for sample in samples),
        )

    def classes(
        self, rates: Array, expected: Mapping[Key, float], samples: Sequence[TimedModel]
    ) -> dict[str, ClassModel]:
        """Rates by class; roots get what kernels of their sort are expected to take."""
        by_key = dict(zip(self.keys, rates, strict=True))
        found: dict[str, ClassModel] = {}
        seen: dict[str, list[Features]] = {}
        for sample in samples:
            for kernel in sample.kernels:
                seen.setdefault(kernel.family, []).append(kernel)
        for family, kernels in sorted(seen.items()):
            terms = {
                amount: float(rate)
                for amount in _amounts_of(family)
                if (rate := by_key.get(_key(family, amount), 0.0)) > 0
            }
            names = set.intersection(*(set(kernel.coordinates) for kernel in kernels))
            low = {n: min(k.coordinates[n] for k in kernels) for n in sorted(names)}
            high = {n: max(k.coordinates[n] for k in kernels) for n in sorted(names)}
            found[f"{family}:float32"] = ClassModel(terms, None, low, high, len(kernels))
        for root in _ROOTS:
            terms = {
                amount: rate
                for amount in _amounts_of(root)
                if (rate := expected.get((_sort_of(root), amount), 0.0)) > 0
            }
            if terms:
                found.setdefault(f"{root}:float32", ClassModel(terms))
        return found


class _Fit:
    """Rates of a table's columns from any of its rows; `prior`: rates of a related device."""

    def __init__(self, table: _Table, prior: Array | None) -> None:
        self.table = table
        self.prior = prior
        self._errors: dict[float, Array] = {}
        self._pooled_keys = sorted({(_sort_of(f), a) for f, a in table.keys})
        index = {key: i for i, key in enumerate(self._pooled_keys)}
        self._pool = np.zeros((len(table.keys), len(self._pooled_keys)))
        for row, (family, amount) in enumerate(table.keys):
            self._pool[row, index[_sort_of(family), amount]] = 1.0
        everything = np.ones(len(table.ms), bool)
        rates, _ = self._pooled(everything)
        self.expected = dict(zip(self._pooled_keys, rates.tolist(), strict=True))

    @property
    def _widths(self) -> tuple[float, ...]:
        return WIDTHS if self.prior is None else (PRIOR_WIDTH,)

    def rates(self, rows: NDArray[np.bool_], width: float) -> Array:
        """Milliseconds a unit for every column, from the chosen rows."""
        matrix, ms = self.table.matrix[rows], self.table.ms[rows]
        if self.prior is None:
            pooled, caps = self._pooled(rows)
            expected, spread = self._pool @ pooled, self._pool @ np.maximum(pooled, caps)
        else:
            scale = float(np.median(ms / np.maximum(matrix @ self.prior, 1e-12)))
            expected = self.prior * scale
            means = self._pool @ ((self._pool.T @ expected) / self._pool.sum(0))
            spread = np.maximum(expected, means)
        return _posterior(matrix, ms, expected, width * np.maximum(spread, 1e-18))

    def _pooled(self, rows: NDArray[np.bool_]) -> tuple[Array, Array]:
        """Rates that all kernels of a sort share, and what each could be at a small share."""
        matrix, ms = self.table.matrix[rows] @ self._pool, self.table.ms[rows]
        spans = np.sqrt(((matrix / ms[:, None]) ** 2).mean(0)) + 1e-300
        rates = _posterior(matrix, ms, np.zeros(len(spans)), 10.0 / spans)
        caps = np.array(
            [
                _SHARE * float(np.median(ms[column > 0] / column[column > 0]))
                if (column > 0).any()
                else 0.0
                for column in matrix.T
            ]
        )
        return rates, caps

    def held_out(self, progress: ProgressCall | None = None) -> Array:
        """Predictions of every row from the rows of other families.

        The width for a family is the one that serves the others best.
        """
        table = self.table
        groups = sorted(set(table.families))
        if len(groups) < 3 or len(table.ms) < _FEW:
            labels = np.array([str(i) for i in range(len(table.ms))])
            groups = labels.tolist()
        else:
            labels = np.array(table.families)
        by_width = {width: np.zeros(len(table.ms)) for width in self._widths}
        for done, group in enumerate(groups):
            if progress is not None:
                progress(done, len(groups), "holding out models")
            out = labels == group
            for width, predicted in by_width.items():
                predicted[out] = table.matrix[out] @ self.rates(~out, width)
        floor = 1e-6 * table.ms
        self._errors = {
            width: np.abs(np.log(np.maximum(p, floor) / table.ms)) for width, p in by_width.items()
        }
        found = np.zeros(len(table.ms))
        for group in groups:
            out = labels == group
            best = min(self._widths, key=lambda width: _score(self._errors[width][~out]))
            found[out] = by_width[best][out]
        return np.maximum(found, floor)

    def best_width(self) -> float:
        """The width that held-out rows were predicted best with (after `held_out`)."""
        return min(self._widths, key=lambda width: _score(self._errors[width]))


def _score(errors: Array) -> float:
    return float(np.median(errors) + 0.5 * np.minimum(errors, 0.5).mean())


def _posterior(matrix: Array, ms: Array, expected: Array, widths: Array, rounds: int = 12) -> Array:
    """Non-negative rates of least absolute relative error plus squared distance to `expected`."""
    scaled = matrix * widths / ms[:, None]
    center = expected / widths
    count = len(widths)
    weights = np.ones(len(ms))
    found = center
    for _ in range(rounds):
        root = np.sqrt(weights)
        system = np.vstack([scaled * root[:, None], _NOISE * np.eye(count)])
        found = non_negative(system, np.concatenate([root, _NOISE * center]), rounds=20 * count)
        off = np.abs(scaled @ found - 1.0)
        weights = _NOISE / np.maximum(off, 0.5 * _NOISE)
    rates: Array = found * widths
    return rates


def _rates_of(prior: Profile, table: _Table, threads: int) -> Array:
    """A profile's rates for a table's columns: the class's own, its root's, or its sort's."""
    classes = prior.setting(threads).classes
    rates = np.zeros(len(table.keys))
    for index, (family, amount) in enumerate(table.keys):
        for name in (f"{family}:float32", f"{_root(family)}:float32"):
            if name in classes:
                rates[index] = classes[name].terms.get(amount, 0.0)
                break
    if not rates.any():
        raise ProfileError(
            "The prior has no rates for these models' kernels",
            where=f"profile {prior.name!r}",
            fix="start from a profile that was fitted on whole models (`edgepass profiles`)",
        )
    return rates

"""A latency profile from whole-model timings: published numbers, or a few made on a phone.

Here: `fit_timings` and `hold_out`. A model's time is the sum over its kernels of non-negative rates
times amounts, times smooth corrections. Rates are fitted to relative errors and drawn towards those
of kernels of the same sort; with a related device's profile (`prior`) only a few factors on its
rates are fitted, so that ten models can do. How much is drawn is chosen by leaving out families.
Not here: the algebra (`timing_sums`), reading tables (`timing_rows`), micro-benchmarks
(`calibrate`), many devices at once (`fleet`), loading the models.
"""

from __future__ import annotations

import dataclasses
import datetime
import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from ..errors import ProfileError
from .features import Features
from .profile import ClassModel, HeldOut, Interval, Profile, Setting
from .timing_rows import TimingRow, read_timings
from .timing_sums import (
    Sums,
    amounts_of,
    key_of,
    least_error,
    root_of,
    smooth_factors,
    sort_of,
)

__all__ = ["TimedModel", "TimingRow", "fit_timings", "hold_out", "read_timings"]

Array = NDArray[np.float64]
Rows = NDArray[np.bool_]
ProgressCall = Callable[[int, int, str], None]

_ROOTS = (
    *("convolution", "matmul", "attention", "recurrent"),
    *("elementwise", "normalization", "softmax", "reduction", "pooling", "movement", "gather"),
    *("resize", "quantization", "cast", "other"),
)
WIDTHS = (0.3, 1.0, 3.0, 10.0, 30.0)
"""Multiples of an expected rate that its prior may be wide, to choose among."""
VARIANCE = 0.1
"""Of the smooth corrections of single kernels; with a prior device, `PRIOR_VARIANCE`."""
PRIOR_VARIANCE = 0.03
_SHARE = 0.05  # of a model's time that a rate may explain where the pooled fit gives it none
_LEVEL = 0.8  # of truths inside the interval
_FEW = 15  # models below which single ones are held out, not families
_MANY = 30  # models from which rates are fitted freely though there is a prior
_NOVEL = 2.0  # how much wider intervals are where all is novel (`Interval.novel`)
_KEPT = 0.8  # of a model's time, what the prior's groups are expected to explain
_LOOSE = 0.5  # how far factors may be from those expected, as shares of all time
_ALIKE = 0.05  # scores that differ by less are taken to be alike
_FROM_PRIOR = 0.0  # stands for a fit of factors on the prior's rates among widths


@dataclasses.dataclass(frozen=True)
class TimedModel:
    """One model's time on the device, milliseconds a run; `family` for holding out relatives."""

    name: str
    kernels: Sequence[Features]
    ms: float
    family: str = ""
    threads: int = 1


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
    return _Fit(samples, prior).held_out(progress)[0]


def _setting(
    samples: Sequence[TimedModel],
    prior: Profile | None,
    threads: int,
    progress: ProgressCall | None,
) -> Setting:
    fit = _Fit(samples, prior)
    predicted, novel, labels = fit.held_out(progress)
    error = np.abs(predicted / fit.ms - 1)
    scores = np.log(fit.ms / predicted) / (1.0 + _NOVEL * novel)
    low, high = _interval(scores)
    inside = [
        lowest <= score <= highest
        for label, score in zip(labels, scores, strict=True)
        for lowest, highest in [_interval(scores[labels != label])]
    ]
    proof = HeldOut(
        models=len(samples),
        median_error=float(np.median(error)),
        within_10=float((error <= 0.1).mean()),
        within_20=float((error <= 0.2).mean()),
        coverage=float(np.mean(inside)),
        method=f"leaving out one of {len(set(labels))} families at a time",
    )
    return dataclasses.replace(
        fit.setting(np.ones(len(samples), bool), fit.best_width(), threads),
        intervals={"": Interval(math.exp(low), math.exp(high), _NOVEL)},
        held_out={"": proof},
    )


def _interval(scores: Array) -> tuple[float, float]:
    """Logarithms of factors around a prediction between which `_LEVEL` of truths lie, as many out
    on each side.

    Split conformal prediction (Vovk et al. 2005): the rank is that of one more sample.
    """
    ordered = np.sort(scores)
    count = len(ordered)
    tail = (1 - _LEVEL) / 2 * (count + 1)
    below = max(0, math.floor(tail) - 1)
    above = min(count - 1, math.ceil(count + 1 - tail) - 1)
    return float(min(ordered[below], -0.001)), float(max(ordered[above], 0.001))


class _Fit:
    """Settings of samples, from any of them; `prior`: a related device's profile."""

    def __init__(self, samples: Sequence[TimedModel], prior: Profile | None) -> None:
        self.samples = samples
        self.sums = Sums.of([sample.kernels for sample in samples])
        self.ms = np.array([sample.ms for sample in samples])
        self.prior = None
        if prior is not None:
            self.prior = _rates_of(prior, self.sums, samples[0].threads)
            self.prior_classes = prior.setting(samples[0].threads).classes
        self._errors: dict[float, Array] = {}
        keys = self.sums.keys
        self._sorts = sorted({(sort_of(name), amount) for name, amount in keys})
        self._pool = _membership([(sort_of(name), amount) for name, amount in keys], self._sorts)

    @property
    def widths(self) -> tuple[float, ...]:
        """What is to choose among: widths, or the prior's rates."""
        if self.prior is None:
            return WIDTHS
        return (_FROM_PRIOR,) + (WIDTHS if len(self.ms) >= _MANY else ())

    def setting(self, rows: Rows, width: float, threads: int = 1) -> Setting:
        """What the chosen samples teach."""
        if width == _FROM_PRIOR:
            expected: dict[tuple[str, str], float] = {}
            rates = self._scaled(rows)
            factors = smooth_factors(
                self.sums, rates, self.ms, rows, PRIOR_VARIANCE, PRIOR_VARIANCE
            )
        else:
            rates, expected = self._free(rows, width)
            factors = smooth_factors(self.sums, rates, self.ms, rows, VARIANCE)
        by_key = dict(zip(self.sums.keys, rates.tolist(), strict=True))
        found: dict[str, ClassModel] = {}
        for name, sums in self.sums.classes.items():
            factor, correction = factors.get(name, (1.0, None))
            terms = {
                amount: rate * factor
                for amount in amounts_of(name)
                if (rate := by_key.get(key_of(name, amount), 0.0)) > 0
            }
            if correction is None or not terms:
                continue
            seen = sums.seen(rows)
            low = dict(zip(sums.names, seen.min(0).tolist(), strict=True))
            high = dict(zip(sums.names, seen.max(0).tolist(), strict=True))
            count = int(sums.counts[rows].sum())
            found[f"{name}:float32"] = ClassModel(terms, correction, low, high, count)
        for root in _ROOTS:
            terms = {
                amount: rate
                for amount in amounts_of(root)
                if (rate := expected.get((sort_of(root), amount), 0.0)) > 0
            }
            if terms:
                found.setdefault(f"{root}:float32", ClassModel(terms))
        if width == _FROM_PRIOR:  # what the samples lack is as on the other device, but for speed
            scale = self._speed(rows)
            for known, model in self.prior_classes.items():
                scaled = {amount: rate * scale for amount, rate in model.terms.items()}
                found.setdefault(known, ClassModel(scaled))
        return Setting(threads, found)

    def _speed(self, rows: Rows) -> float:
        """How many times longer samples take than the prior's rates say."""
        assert self.prior is not None
        known = np.maximum(self.sums.matrix[rows] @ self.prior, 1e-12)
        return float(np.median(self.ms[rows] / known))

    def _free(self, rows: Rows, width: float) -> tuple[Array, dict[tuple[str, str], float]]:
        """Rates drawn towards those that all kernels of a sort share, and these."""
        matrix, ms = self.sums.matrix[rows], self.ms[rows]
        pooled = matrix @ self._pool
        spans = np.sqrt(((pooled / ms[:, None]) ** 2).mean(0)) + 1e-300
        shared = least_error(pooled, ms, np.zeros(len(spans)), 10.0 / spans)
        caps = [_SHARE * _unit(column, ms, 1) for column in pooled.T]
        spread = self._pool @ np.maximum(shared, caps)
        rates = least_error(matrix, ms, self._pool @ shared, width * np.maximum(spread, 1e-18))
        return rates, dict(zip(self._sorts, shared.tolist(), strict=True))

    def _scaled(self, rows: Rows) -> Array:
        """Rates from a few factors: on the prior's rates by groups of classes, and on plain sums.

        The prior's groups are expected to explain most of a model's time, at one speed, and the
        sums the rest; a group that few samples have keeps that speed.
        """
        assert self.prior is not None
        keys = self.sums.keys
        groups = [_group(name) for name, _ in keys]
        scaled = _membership(groups, sorted(set(groups))) * self.prior[:, None]
        plain = [_plain_sum(name, amount) for name, amount in keys]
        sums = _membership(plain, sorted(set(plain) - {""}))
        matrix, ms = self.sums.matrix[rows], self.ms[rows]
        speed = self._speed(rows)
        own = [_unit(column, ms, 3) for column in (matrix @ sums).T]
        expected = np.array(
            [_KEPT * speed] * scaled.shape[1] + [(1 - _KEPT) * unit / len(own) for unit in own]
        )
        widths = np.array([_LOOSE * speed] * scaled.shape[1] + [_LOOSE * unit for unit in own])
        columns = np.hstack([scaled, sums])
        used = ((matrix @ columns > 0).sum(0) >= 3) & (widths > 0)
        found = np.where(np.arange(len(used)) < scaled.shape[1], speed, 0.0)
        if used.any():
            found[used] = least_error(matrix @ columns[:, used], ms, expected[used], widths[used])
        rates: Array = columns @ found
        return rates

    def held_out(
        self, progress: ProgressCall | None = None
    ) -> tuple[Array, Array, NDArray[np.str_]]:
        """Every sample's prediction from samples of other families, the share of it that is novel,
        and what was held out together.

        The width for a family is the one that serves the others best.
        """
        labels = np.array([sample.family or sample.name for sample in self.samples])
        if len(set(labels.tolist())) < 3 or len(labels) < _FEW:
            labels = np.array([str(i) for i in range(len(labels))])
        groups = sorted(set(labels.tolist()))
        ms = {width: np.zeros(len(labels)) for width in self.widths}
        novel = {width: np.zeros(len(labels)) for width in self.widths}
        for done, group in enumerate(groups):
            if progress is not None:
                progress(done, len(groups), "holding out models")
            out = labels == group
            for width in self.widths:
                profile = Profile("", "", "", "", "", (self.setting(~out, width),))
                for index in np.flatnonzero(out).tolist():
                    found = profile.predict(self.samples[index].kernels)
                    ms[width][index] = max(found.ms, 1e-3 * self.ms[index])
                    novel[width][index] = found.novel
        self._errors = {width: np.abs(np.log(found / self.ms)) for width, found in ms.items()}
        predicted, share = np.zeros(len(labels)), np.zeros(len(labels))
        for group in groups:
            out = labels == group
            best = self._best(~out)
            predicted[out], share[out] = ms[best][out], novel[best][out]
        return predicted, share, labels

    def best_width(self) -> float:
        """The width that serves held-out samples best (after `held_out`)."""
        return self._best(np.ones(len(self.ms), bool))

    def _best(self, rows: Rows) -> float:
        """The narrowest width whose score is no worse than the best one's, but for chance.

        Where several do alike, the least would go from one to another with the family left out;
        the most constrained of them is taken, as pruning of trees does (Breiman et al. 1984).
        """
        scores = {width: _score(self._errors[width][rows]) for width in self.widths}
        bound = min(scores.values()) * (1.0 + _ALIKE)
        return min(width for width, score in scores.items() if score <= bound)


def _score(errors: Array) -> float:
    return float(np.median(errors) + 0.5 * np.minimum(errors, 0.5).mean())


def _membership(labels: Sequence[object], names: Sequence[object]) -> Array:
    """1 where a label is the name of the column, [labels, names]."""
    return np.array([[float(label == name) for name in names] for label in labels])


def _unit(column: Array, ms: Array, least: int) -> float:
    """The rate at which a column alone explains a model; 0 where fewer than `least` have it."""
    has = column > 0
    return float(np.median(ms[has] / column[has])) if has.sum() >= least else 0.0


def _group(name: str) -> str:
    """Classes whose speed relative to each other is taken from the prior."""
    if name in ("convolution/pointwise", "convolution/spatial", "convolution/first"):
        return "dense"
    if root_of(name) == "convolution":
        return name
    return "matmul" if sort_of(name) == "compute" else "memory"


def _plain_sum(name: str, amount: str) -> str:
    """A sum over many classes that an amount counts in; "" for none."""
    if amount == "weights":
        return "weights"
    if amount in ("read", "written"):
        return "bytes" if sort_of(name) == "memory" else ""
    if amount != "macs":
        return ""
    return name if name in ("convolution/depthwise", "convolution/grouped") else "macs"


def _rates_of(prior: Profile, sums: Sums, threads: int) -> Array:
    """A profile's rates for the columns: the class's own, or its family's, or its root's."""
    classes = prior.setting(threads).classes
    rates = np.zeros(len(sums.keys))
    for index, (name, amount) in enumerate(sums.keys):
        for known in (name, name.partition(":")[0], root_of(name)):
            if f"{known}:float32" in classes:
                rates[index] = classes[f"{known}:float32"].terms.get(amount, 0.0)
                break
    if not rates.any():
        raise ProfileError(
            "The prior has no rates for these models' kernels",
            where=f"profile {prior.name!r}",
            fix="start from a profile that was fitted on whole models (`edgepass profiles`)",
        )
    return rates

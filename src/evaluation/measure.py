"""From what was seen of all samples to a report: metrics, intervals, slices, flips, divergence.

Here: `measure`. Not here: running models (`observe`), the statistics themselves (`bootstrap`,
`permutation`, `classification`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import UsageError
from .bootstrap import Intervals, intervals
from .classification import flips
from .metrics import Decided, Metric, PerSample
from .observe import Seen
from .recognise import recognised
from .report import ORIGINAL, Flips, MetricResult, Report, Rung
from .scored import Calls, Scored, Sums, renumbered
from .slices import Slice, make_slices, slice_results

if TYPE_CHECKING:
    from .evaluation import Evaluation

_UNDEFINED_NOTED = 0.02


def measure(evaluation: Evaluation, seen: Seen, sizes: Mapping[str, int | None]) -> Report:
    """The report, without verdicts.

    Raises:
        UsageError: a metric that can't be computed from these predictions and labels.
    """
    layout = Layout(evaluation, seen)
    metrics = dict(seen.metrics)
    classifies = all(d.usable for d in seen.decisions.values()) and layout.labelled
    if not metrics and classifies:
        metrics = {"accuracy": Decided()}
    notes: list[str] = []
    scored = {name: layout.scored(name, metric) for name, metric in metrics.items()}
    better = {name: metric.higher_is_better for name, metric in metrics.items()}
    found: dict[str, Intervals] = {}
    for name, one in scored.items():
        found[name], undefined = intervals(
            one,
            resamples=evaluation.resamples,
            confidence=evaluation.confidence,
            seed=evaluation.seed,
            method=evaluation.interval,
        )
        if undefined > _UNDEFINED_NOTED:
            notes.append(
                f"{name} was undefined on {undefined:.0%} of resamples, left out of its interval"
            )
    slices = make_slices(seen.slices, evaluation.bins)
    decided = _Decided(seen) if classifies else None
    rungs = []
    for name in seen.models:
        level = 1 - evaluation.confidence
        rungs.append(
            Rung(
                name=name,
                metrics={m: MetricResult(*found[m][name], better[m]) for m in metrics},
                slices=()
                if name == ORIGINAL
                else slice_results(slices, scored, better, name, level=level, seed=evaluation.seed),
                flips=None if decided is None or name == ORIGINAL else decided.flips(name),
                ece=None if decided is None else decided.ece(name),
                divergence={} if name == ORIGINAL else seen.divergences[name].results(),
                bytes=sizes.get(name),
            )
        )
    notes += _notes(rungs, layout, slices)
    return Report(tuple(rungs), seen.count, layout.unit_count, evaluation.confidence, tuple(notes))


def _notes(rungs: Sequence[Rung], layout: Layout, slices: Sequence[Slice]) -> list[str]:
    notes = []
    units = layout.unit_count
    still = [
        r.name for r in rungs[1:] if r.flips is not None and r.flips.broken + r.flips.mended == 0
    ]
    if still:
        notes.append(
            f"no decision changed in {', '.join(still)}: with {units} independent samples, changes "
            f"in fewer than {3 / units:.1%} of cases can't be ruled out"
        )
    if units < 30 and rungs[0].metrics:
        notes.append(f"{units} independent samples are few: take the intervals as rough")
    names = {piece.name for piece in slices}
    untested = {row.name for rung in rungs[1:] for row in rung.slices if row.p_value is None}
    if names and untested:
        notes.append(f"{len(untested)} slices are too small or undefined, and were not tested")
    return notes


class _Decided:
    """Right or wrong, by model and sample."""

    def __init__(self, seen: Seen) -> None:
        self._seen = seen
        self._threshold = seen.decisions[ORIGINAL].threshold()
        self._before = seen.decisions[ORIGINAL].right(self._threshold)

    def flips(self, name: str) -> Flips:
        return flips(self._before, self._seen.decisions[name].right(self._threshold))

    def ece(self, name: str) -> float | None:
        return self._seen.decisions[name].calibration_error(self._threshold)


class Layout:
    """Samples as rows and units: what metrics see as entries, and what is resampled whole."""

    def __init__(self, evaluation: Evaluation, seen: Seen) -> None:
        self._seen = seen
        self.labelled = all(label is not None for label in seen.labels)
        count = seen.count
        self._unit = np.arange(count)
        if evaluation.group is not None:
            self._unit = renumbered(np.array([str(value) for value in seen.groups]))
        self.unit_count = int(self._unit.max(initial=-1)) + 1
        self.joined = self._is_joined(evaluation)
        self._labels = self._column(seen.labels) if self.labelled else None

    def _is_joined(self, evaluation: Evaluation) -> bool:
        """Whether predictions and labels are sequences of rows, one label a row."""
        lengths = [_length(label) for label in self._seen.labels]
        fits = all(n is not None and n == m for n, m in zip(lengths, self._given(), strict=True))
        if evaluation.join is not None:
            if evaluation.join and not fits:
                raise UsageError(
                    "Predictions can't be joined: they and their labels differ in length",
                    fix="give one label for each row of a sample's prediction",
                )
            return evaluation.join
        stateful = evaluation.carry is not None or evaluation.step is not None
        if not fits:
            return False
        flat = all(np.ndim(label) == 1 or len(label) == 1 for label in self._seen.labels)
        return stateful or (flat and len(set(lengths)) > 1)

    def _given(self) -> list[int | None]:
        """Rows of each prediction; a batch of one in front of them does not count."""
        found = []
        for length, inner, label in zip(
            self._seen.lengths, self._seen.inner_lengths, self._seen.labels, strict=True
        ):
            found.append(inner if length == 1 and _length(label) != 1 else length)
        return found

    def _column(self, values: Sequence[Any]) -> Any:
        if self.joined:
            return _joined(values, [_length(label) or 0 for label in self._seen.labels])
        return stacked(values)

    def _rows(self) -> np.ndarray:
        """The sample of each row."""
        if not self.joined:
            return np.arange(self._seen.count)
        return np.repeat(np.arange(self._seen.count), [_length(y) or 0 for y in self._seen.labels])

    def scored(self, name: str, metric: Metric) -> Scored:
        """A metric on all rows of all models."""
        seen = self._seen
        if isinstance(metric, PerSample):
            samples = np.arange(seen.count)
            parts = {m: np.array(p, np.float64) for m, p in seen.parts[name].items()}
            return Sums(parts, self._unit, samples, metric.finish)
        if isinstance(metric, Decided):
            return self._decided(name)
        samples = self._rows()
        predictions = {
            model: self._everything(model)
            if metric.takes_all
            else self._column(seen.predictions[model])
            for model in seen.models
        }
        units = self._unit[samples]
        call, weighted = metric.call, metric.weighted
        calls = Calls(name, call, predictions, self._labels, units, samples, weighted)
        return calls if weighted is not None or metric.takes_all else recognised(calls)

    def _everything(self, model: str) -> dict[str, Any]:
        outputs = self._seen.everything[model]
        return {name: self._column([o[name] for o in outputs]) for name in outputs[0]}

    def _decided(self, name: str) -> Sums:
        decisions = self._seen.decisions
        if not all(one.usable for one in decisions.values()):
            raise UsageError(
                f"The metric {name!r} needs decisions, and these are not a classifier's",
                why="labels must be classes, and predictions classes or scores of classes",
                fix="choose the output with `output`, decode it with `predict`, or say what is "
                "right with `is_right`",
            )
        threshold = decisions[ORIGINAL].threshold()
        right = {model: one.right(threshold) for model, one in decisions.items()}
        sizes = [len(entry) for entry in right[ORIGINAL]]
        if self.joined and sizes == [_length(label) for label in self._seen.labels]:
            samples = self._rows()
            flat = {m: np.concatenate(r).astype(np.float64) for m, r in right.items()}
            parts = {m: np.stack([r, np.ones_like(r)], axis=1) for m, r in flat.items()}
        else:
            samples = np.arange(len(sizes))
            parts = {m: np.array([(r.sum(), len(r)) for r in rs], float) for m, rs in right.items()}
        return Sums(parts, self._unit[samples], samples)


def stacked(values: Sequence[Any]) -> Any:
    """One array of all samples where their shapes are equal, else a list.

    A batch of one in front takes part in the stack: [1, 10] of 300 samples is [300, 10].
    """
    if all(isinstance(v, int | float | np.number | np.bool_ | str | bytes) for v in values):
        return np.array(values)
    if not all(isinstance(value, np.ndarray) for value in values):
        lists = all(isinstance(v, list | tuple) for v in values)
        if lists and len({np.shape(v) if _is_regular(v) else None for v in values}) == 1:
            return np.array(values) if _is_regular(values[0]) else list(values)
        return list(values)
    batches = all(value.ndim > 0 and len(value) == 1 for value in values)
    if len({value.shape for value in values}) != 1:
        return [value[0] for value in values] if batches else list(values)
    return np.concatenate(values) if batches else np.stack(values)


def _is_regular(value: Any) -> bool:
    try:
        return np.asarray(value).dtype.kind in "fiubU"
    except ValueError:
        return False


def _joined(values: Sequence[Any], lengths: Sequence[int]) -> Any:
    """Rows of all samples end to end; a batch of one in front of the rows is taken off."""
    arrays = [np.asarray(value) for value in values]
    arrays = [
        array[0] if array.ndim > 1 and len(array) == 1 and length != 1 else array
        for array, length in zip(arrays, lengths, strict=True)
    ]
    rank = min(array.ndim for array in arrays)
    return np.concatenate([array[0] if array.ndim > rank else array for array in arrays])


def _length(value: Any) -> int | None:
    """Rows of a label that is a sequence; None for one that is not."""
    if isinstance(value, list | tuple):
        return len(value)
    if isinstance(value, np.ndarray) and value.ndim:
        return value.shape[1] if value.ndim > 1 and len(value) == 1 else len(value)
    return None

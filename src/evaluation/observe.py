"""Every sample through every model, once: predictions, decisions, divergence, slice values.

Here: `observe`, `Seen`. Not here: reading samples (`data`), states (`stateful`), statistics
(`measure`). A sample's outputs are dropped when the next sample is read; what metrics need stays.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import EdgepassError, UsageError
from .classification import Decisions
from .data import Sample, call_with, samples_of, to_numpy
from .divergence import Divergences, aligned
from .metrics import Metric, PerSample, Whole, resolve
from .report import ORIGINAL
from .runners import Outputs, Runner, inputs_of
from .stateful import run_sequence

if TYPE_CHECKING:
    from .evaluation import Evaluation, Progress


@dataclasses.dataclass
class Seen:
    """What was kept of all samples: lists by sample, mappings by model.

    `predictions` of the chosen output and `everything` (all outputs) are empty where no metric
    needs them; `parts` are the contributions to `PerSample` metrics.
    """

    metrics: Mapping[str, Metric]
    models: Sequence[str]
    labels: list[Any] = dataclasses.field(default_factory=list)
    predictions: dict[str, list[Any]] = dataclasses.field(default_factory=dict)
    everything: dict[str, list[Outputs]] = dataclasses.field(default_factory=dict)
    parts: dict[str, dict[str, list[tuple[float, float]]]] = dataclasses.field(default_factory=dict)
    decisions: dict[str, Decisions] = dataclasses.field(default_factory=dict)
    divergences: dict[str, Divergences] = dataclasses.field(default_factory=dict)
    slices: dict[str, list[Any]] = dataclasses.field(default_factory=dict)
    groups: list[Any] = dataclasses.field(default_factory=list)
    lengths: list[int | None] = dataclasses.field(default_factory=list)
    inner_lengths: list[int | None] = dataclasses.field(default_factory=list)

    @property
    def count(self) -> int:
        return len(self.labels)


def observe(
    evaluation: Evaluation, runners: Mapping[str, Runner], progress: Progress | None = None
) -> Seen:
    """Run all samples. The first runner is the original.

    Raises:
        UsageError: no sample, or a metric, slice or `predict` that fails.
        CalibrationError: a feed does not fit a model.
    """
    seen = _empty(evaluation, runners)
    given = (inputs_of(runner) for runner in runners.values())
    inputs = next((found for found in given if found is not None), None)
    total = len(evaluation.data) if _has_length(evaluation.data) else 0
    for sample in samples_of(evaluation, inputs):
        if sample.index == 0 and sample.label is None:
            _without_labels(seen, evaluation)
        reference: Outputs | None = None
        for name, runner in runners.items():
            outputs = _run(evaluation, runner, sample, name)
            if reference is None:
                reference = outputs
            else:
                outputs = aligned(reference, outputs, name)
                seen.divergences[name].add(reference, outputs)
            _keep(seen, evaluation, name, outputs, sample, reference)
        seen.labels.append(sample.label)
        for key, rule in evaluation.slices.items():
            seen.slices[key].append(_value_of(rule, sample, f"slice {key!r}"))
        if evaluation.group is not None:
            seen.groups.append(_value_of(evaluation.group, sample, "group"))
        if progress is not None:
            progress(sample.index + 1, max(total, sample.index + 1), "samples")
    return seen


def _empty(evaluation: Evaluation, runners: Mapping[str, Runner]) -> Seen:
    metrics = resolve(evaluation.metrics, evaluation.limits)
    seen = Seen(metrics, list(runners))
    for name in runners:
        seen.decisions[name] = Decisions(evaluation.is_right, evaluation.logits)
        seen.predictions[name], seen.everything[name] = [], []
        if name != ORIGINAL:
            seen.divergences[name] = Divergences(evaluation.logits)
    seen.slices = {name: [] for name in evaluation.slices}
    _make_parts(seen)
    return seen


def _make_parts(seen: Seen) -> None:
    seen.parts = {
        key: {name: [] for name in seen.models}
        for key, metric in seen.metrics.items()
        if isinstance(metric, PerSample)
    }


def _without_labels(seen: Seen, evaluation: Evaluation) -> None:
    """Metrics can't be computed; a user who asked for some should hear of it now."""
    needing = [
        name
        for name, metric in seen.metrics.items()
        if not (isinstance(metric, Whole) and metric.label_free)
    ]
    if needing:
        raise UsageError(
            f"The metric {needing[0]!r} needs labels, and the data has none",
            fix="give `labels`, (feed, label) pairs, or an entry `labels` in the data; without "
            "metrics, divergence from the original is measured",
        )


def _run(evaluation: Evaluation, runner: Runner, sample: Sample, name: str) -> Outputs:
    with _named("model" if evaluation.step is None else "`step`", sample, name):
        if evaluation.step is not None:
            return _outputs_of_step(evaluation.step(runner.run, sample.feed))
        if evaluation.carry is not None:
            return run_sequence(runner, sample.feed, evaluation.carry)
        return runner.run(sample.feed)


@contextlib.contextmanager
def _named(what: str, sample: Sample, model: str = "") -> Iterator[None]:
    """Says in every error what failed, of which model, and on which sample."""
    place = ", ".join(filter(None, [what, model and repr(model), f"sample {sample.index}"]))
    try:
        yield
    except EdgepassError as error:
        found = error.diagnostic
        where = f"{place}, {found.where}" if found.where else place
        raise type(error)(found.what, where=where, why=found.why, fix=found.fix) from error
    except Exception as error:
        raise UsageError(
            f"The {what} failed", where=place, why=f"{type(error).__name__}: {error}"
        ) from error


def _outputs_of_step(result: Any) -> Outputs:
    """What the user's step returned: outputs by name, one array, or a list of steps' outputs."""
    if isinstance(result, list | tuple) and result and isinstance(result[0], Mapping):
        from .stateful import end_to_end

        return {name: end_to_end([step[name] for step in result]) for name in result[0]}
    if isinstance(result, Mapping):
        return {str(name): np.asarray(to_numpy(value)) for name, value in result.items()}
    return {"output": np.asarray(to_numpy(result))}


def _keep(
    seen: Seen, evaluation: Evaluation, name: str, outputs: Outputs, sample: Sample, first: Outputs
) -> None:
    prediction = _prediction(evaluation, outputs, sample, first)
    if name == ORIGINAL:
        shape = np.shape(prediction) if isinstance(prediction, np.ndarray) else ()
        seen.lengths.append(shape[0] if shape else None)
        seen.inner_lengths.append(shape[1] if len(shape) > 1 else None)
    for key, by_model in seen.parts.items():
        metric = seen.metrics[key]
        assert isinstance(metric, PerSample)
        with _named(f"metric {key!r}", sample, name):
            by_model[name].append(metric.contribution(prediction, sample.label))
    wholes = [metric for metric in seen.metrics.values() if isinstance(metric, Whole)]
    if any(not metric.takes_all for metric in wholes):
        seen.predictions[name].append(prediction)
    if any(metric.takes_all for metric in wholes):
        seen.everything[name].append(outputs)
    with _named("`is_right`", sample, name):
        seen.decisions[name].add(prediction, sample.label, outputs)


def _prediction(
    evaluation: Evaluation, outputs: Outputs, sample: Sample, reference: Outputs
) -> Any:
    if evaluation.predict is not None:
        with _named("`predict`", sample):
            return to_numpy(call_with(evaluation.predict, outputs, sample.label, sample.index))
    name = evaluation.output if evaluation.output is not None else next(iter(reference))
    if name not in outputs:
        raise UsageError(f"There is no output {name!r}", fix=f"outputs are: {sorted(outputs)}")
    array = outputs[name]
    return array.astype(np.float32) if array.dtype.kind == "V" else array  # bfloat16 and its kin


def _value_of(rule: Any, sample: Sample, what: str) -> Any:
    """A slice's value for one sample."""
    if callable(rule):
        with _named(what, sample):
            return to_numpy(call_with(rule, sample.feed, sample.label, sample.index))
    if isinstance(rule, str):
        if rule not in sample.extra:
            raise UsageError(
                f"The data has no entry {rule!r} for the {what}",
                fix=f"name one of {sorted(sample.extra)}, or give a function"
                if sample.extra
                else "give a function of (feed, label, index), or one value a sample",
            )
        return to_numpy(sample.extra[rule])
    if not hasattr(rule, "__len__") or len(rule) <= sample.index:
        raise UsageError(
            f"The {what} has no value for sample {sample.index}",
            fix="give one value a sample, or a function of (feed, label, index)",
        )
    return to_numpy(rule[sample.index])


def _has_length(data: Any) -> bool:
    return isinstance(data, Sequence) and not isinstance(data, str)

"""Subsets of the layers in 8 bits, measured: on the user's metrics, or by the outputs alone.

Here: `Trials` and `Outcome`. Not here: the switches (`passes.quantize.switched`), which subsets to
ask for (`sensitivity`, `mixed`).
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ..evaluation.evaluation import Evaluation
from ..evaluation.limits import FIGURES, WORST
from ..evaluation.report import NO_LIMITS, Report, Rung
from ..passes.base import Feed
from ..passes.quantize.switched import Switched, divergence_over
from ..targets.feed import TensorSpec

Mask = np.ndarray
Progress = Callable[[int, int, str], None]
TOGETHER = 16
"""Masks that a sample goes through before the next is read; float runs once for all of them."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What some layers in 8 bits do. `error`: power of the outputs' error over the signal's, the
    mean over outputs. `changes`: each metric's difference to float, in the metric's own unit."""

    error: float
    changes: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @property
    def sqnr_db(self) -> float:
        """Signal to error of the outputs; infinite where there is no error."""
        if self.error <= 0:
            return math.inf
        return -math.inf if math.isinf(self.error) else -10 * math.log10(self.error)

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {"sqnr_db": self.sqnr_db, "changes": dict(self.changes)}


class Masked:
    """A `Runner` with the layers of a mask in 8 bits; `names` are the model's own of its outputs,
    `inputs` what the model takes."""

    def __init__(
        self, switched: Switched, names: Sequence[str], inputs: tuple[TensorSpec, ...], mask: Mask
    ) -> None:
        self.inputs, self.mask = inputs, mask
        self._switched, self._names = switched, names

    def run(self, feed: Mapping[str, np.ndarray], /) -> dict[str, np.ndarray]:
        """Outputs by name."""
        return dict(zip(self._names, self._switched.run(feed, self.mask), strict=True))


class Trials:
    """One switched session with what it is measured on: `evaluation`, else `samples`.

    `higher` says of each metric whether more is better; it is filled by the first measurement.
    """

    def __init__(
        self,
        switched: Switched,
        names: Sequence[str],
        inputs: tuple[TensorSpec, ...],
        samples: Sequence[Feed],
        evaluation: Evaluation | None,
    ) -> None:
        self.switched, self.evaluation = switched, evaluation
        self.higher: dict[str, bool] = {}
        self._names, self._inputs, self._samples = tuple(names), inputs, samples
        self._references: list[list[np.ndarray]] = []
        self._limits: Mapping[str, float | str] = {}

    def runner(self, mask: Mask) -> Masked:
        """The model with the layers of a mask in 8 bits."""
        return Masked(self.switched, self._names, self._inputs, mask)

    def measure(self, masks: Sequence[Mask], progress: Progress) -> Iterator[Outcome]:
        """An outcome a mask, in order."""
        if self.evaluation is None:
            for i, mask in enumerate(masks):
                progress(i, len(masks), "")
                yield Outcome(self._divergence(self.runner(mask)))
            return
        lean = _lean(self.evaluation)
        for start in range(0, len(masks), TOGETHER):
            progress(start, len(masks), "")
            group = masks[start : start + TOGETHER]
            report = self._report(lean, {str(i): self.runner(m) for i, m in enumerate(group)})
            yield from (self._outcome(report[str(i)]) for i in range(len(group)))

    def judge(self, runner: Any, limits: Mapping[str, float | str]) -> tuple[Outcome, bool, str]:
        """One model held against limits: outcome, whether it is within all, and what it is not.

        Without an evaluation the limit is that on `sqnr_db`, a number of dB.
        """
        if self.evaluation is None:
            found = Outcome(self._divergence(runner))
            least = float(limits["sqnr_db"])
            return found, found.sqnr_db >= least, f"{found.sqnr_db:.1f} dB, limit {least:g} dB"
        asked = dataclasses.replace(self.evaluation, limits=limits)
        if not _needs_all(asked):
            asked = dataclasses.replace(asked, resamples=0, slices={})
        rung = self._report(asked, {"candidate": runner})["candidate"]
        missed = [
            f"{held.name} {held.value:.4g}, limit {held.limit}"
            for held in rung.limits
            if held.verdict != "within" and held.value is not None
        ]
        return self._outcome(rung), rung.verdict in ("within", NO_LIMITS), "; ".join(missed)

    def _report(self, evaluation: Evaluation, candidates: Mapping[str, Any]) -> Report:
        return evaluation.run(self.runner(self.switched.none()), candidates)

    def _outcome(self, rung: Rung) -> Outcome:
        errors = [_error(one.sqnr_db) for one in rung.divergence.values()]
        self.higher.update({name: m.higher_is_better for name, m in rung.metrics.items()})
        changes = {
            name: math.nan if metric.difference is None else metric.difference.value
            for name, metric in rung.metrics.items()
        }
        return Outcome(float(np.mean(errors)) if errors else 0.0, changes)

    def _divergence(self, runner: Any) -> float:
        if not self._references:
            none = self.switched.none()
            self._references = [self.switched.run(sample, none) for sample in self._samples]
        pairs = zip(self._references, self._samples, strict=True)
        return divergence_over((reference, self._outputs(runner, s)) for reference, s in pairs)

    def _outputs(self, runner: Any, sample: Any) -> list[np.ndarray]:
        found = runner.run(sample)
        return [found[name] for name in self._names]


def loss(outcome: Outcome, higher: Mapping[str, bool]) -> tuple[float, float]:
    """What an outcome is ranked by, more is worse: the first metric, then the outputs' error."""
    if not outcome.changes:
        return outcome.error, outcome.error
    name, change = next(iter(outcome.changes.items()))
    if math.isnan(change):
        return math.inf, outcome.error
    return (-change if higher.get(name, True) else change), outcome.error


def length_of(data: Any) -> int | None:
    """How many samples evaluation data has, where that can be told without reading it."""
    if isinstance(data, Mapping):
        lengths = [len(value) for value in data.values() if hasattr(value, "__len__")]
        return lengths[0] if lengths else None
    if isinstance(data, Sequence | np.ndarray) and not isinstance(data, str):
        return len(data)
    return None


def samples_in(evaluation: Evaluation, runner: Any) -> int:
    """How many samples an evaluation has; goes through them where they have no length."""
    known = length_of(evaluation.data)
    return (
        known if known is not None else sum(1 for _ in itertools.chain(evaluation.samples(runner)))
    )


def _lean(evaluation: Evaluation) -> Evaluation:
    """The evaluation without what one layer's effect needs not: intervals, slices, verdicts."""
    kept = {
        name: limit
        for name, limit in evaluation.limits.items()
        if name not in FIGURES and not name.endswith(WORST)
    }
    return dataclasses.replace(evaluation, limits=kept, slices={}, confident=False, resamples=0)


def _needs_all(evaluation: Evaluation) -> bool:
    """Whether limits are on slices, or on whole intervals."""
    sliced = any(name.endswith(WORST) or name == "harmed_slices" for name in evaluation.limits)
    return sliced or evaluation.confident


def _error(sqnr_db: float) -> float:
    return (
        0.0 if sqnr_db == math.inf else math.inf if sqnr_db == -math.inf else 10 ** (-sqnr_db / 10)
    )

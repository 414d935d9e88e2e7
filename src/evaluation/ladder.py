"""The original and its compressed candidates on the same labelled data, in one table.

Here: `evaluate`, its table, and accuracy as the metric to begin with. Not here: numeric error of
single passes (`passes.probe`), timing (`speed`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from ..errors import UsageError
from ..passes.probe import numeric_error

Outputs = Mapping[str, np.ndarray]
Judge = Callable[[Outputs, Any], bool]
"""Whether the outputs for one sample are right, given its label."""


class Runner(Protocol):
    """A compiled model, a loaded artifact, or anything else that runs a feed."""

    def run(self, feed: Mapping[str, np.ndarray], /) -> Outputs:
        """Outputs by name."""


@dataclasses.dataclass(frozen=True)
class Rung:
    """One model of the ladder against the first, over all samples.

    `accuracy` is the share judged right; `broken` and `mended` count samples that the original had
    right and this one wrong, and the other way round; `error` is the largest difference of an
    output, relative to that output's range in the sample.
    """

    name: str
    accuracy: float
    broken: int
    mended: int
    error: float


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The rungs, the original first, and how many samples they saw."""

    rungs: tuple[Rung, ...]
    samples: int

    def __getitem__(self, name: str) -> Rung:
        return next(rung for rung in self.rungs if rung.name == name)

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for `--json`."""
        return dataclasses.asdict(self)

    def table(self) -> Any:
        """A `rich.table.Table`: a line a model."""
        from rich.table import Table

        title = f"{self.samples} samples"
        table = Table(title=title, title_justify="left", show_edge=False, pad_edge=False)
        for heading in ("model", "accuracy", "right > wrong", "wrong > right", "largest error"):
            table.add_column(heading, justify="left" if heading == "model" else "right")
        for rung in self.rungs:
            table.add_row(*_cells(rung))
        return table

    def __str__(self) -> str:
        lines = [
            f"{name:16} {accuracy} right, {broken} broken, {mended} mended, error {error}"
            for name, accuracy, broken, mended, error in map(_cells, self.rungs)
        ]
        return "\n".join([f"{self.samples} samples", *lines])


def is_argmax(outputs: Outputs, label: Any) -> bool:
    """Classification: whether the first output is largest at the label."""
    return int(np.argmax(next(iter(outputs.values())))) == int(label)


def evaluate(
    original: Runner,
    candidates: Mapping[str, Runner],
    samples: Sequence[Mapping[str, np.ndarray]],
    labels: Sequence[Any],
    *,
    judge: Judge = is_argmax,
) -> Evaluation:
    """Run the original and each candidate on every sample and compare what they got right.

    `samples` are feeds, one for each of `labels`. `judge` says whether the outputs for a sample are
    right; the default is for classifiers.

    Raises:
        UsageError: no samples, not one label a sample, or another number of outputs.
        CalibrationError: a feed does not fit a model.
    """
    if not samples or len(samples) != len(labels):
        raise UsageError(
            f"{len(samples)} samples and {len(labels)} labels can't be evaluated",
            why="each sample needs its label",
            fix="give as many labels as samples, and at least one",
        )
    reference = [original.run(feed) for feed in samples]
    right = [judge(outputs, label) for outputs, label in zip(reference, labels, strict=True)]
    rungs = [Rung("original", float(np.mean(right)), 0, 0, 0.0)]
    for name, runner in candidates.items():
        outputs = [runner.run(feed) for feed in samples]
        now = [judge(found, label) for found, label in zip(outputs, labels, strict=True)]
        rungs.append(
            Rung(
                name,
                float(np.mean(now)),
                sum(a and not b for a, b in zip(right, now, strict=True)),
                sum(b and not a for a, b in zip(right, now, strict=True)),
                max(_error(a, b, name) for a, b in zip(reference, outputs, strict=True)),
            )
        )
    return Evaluation(tuple(rungs), len(samples))


def _error(expected: Outputs, actual: Outputs, name: str) -> float:
    """Compared by name; by position where the names are others (torch has none)."""
    if set(expected) != set(actual):
        if len(expected) != len(actual):
            raise UsageError(
                f"{name!r} has {len(actual)} outputs, the original {len(expected)}",
                why=f"{sorted(actual)} against {sorted(expected)}",
                fix="compare models with the same outputs",
            )
        actual = dict(zip(expected, actual.values(), strict=True))
    return numeric_error(expected, actual).relative


def _cells(rung: Rung) -> tuple[str, ...]:
    return (
        rung.name,
        f"{rung.accuracy:.4f}",
        str(rung.broken),
        str(rung.mended),
        f"{rung.error:.1e}",
    )

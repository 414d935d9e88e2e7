"""What compression did to a model: the question, and the call that answers it.

Here: `Evaluation` (data, metrics, slices, limits), `evaluate`. Not here: the answer (`report`),
reading samples (`data`), running them (`observe`), statistics (`measure` and what it uses).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from ..errors import UsageError
from .report import ORIGINAL, Report
from .runners import as_runner, bytes_of

Progress = Callable[[int, int, str], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Data, what to measure on it, and how much may be lost. docs/evaluation.md is the long form.

    `data`: whatever gives samples. An iterable of feeds, of (feed, label), of tuples in input order
        with or without a label; a torch DataLoader; a function that returns such an iterable; a
        mapping from input to stack of samples; an `.npz` path; a folder. Read lazily, one sample
        at a time; an iterator that can be read only once can be evaluated only once.
    `labels`: one a sample, where `data` does not bring them along.
    `metrics`: name -> `metric(predictions, labels) -> float`: a function, one of scikit-learn or
        a torchmetrics object as it is, a built-in name (`"accuracy"`), or `PerSample`. A sequence
        of built-in names is enough too.
    `slices`: name -> `callable(feed, label, index) -> value`, one value a sample, or the name of a
        further entry of the data. Numbers of many values are binned into `bins` quantiles.
    `limits`: metric -> allowed change from the original, whose sign says the direction (`-0.003`:
        may fall by that much); or text: `">= 0.95"`, `"<= 3.56"`, `"-1%"`.
    `confident`: a limit holds only if the whole interval of the change is within it.
    `group`: as a slice; samples of the same value (frames of one recording) are resampled together.
    `output`: which output the metrics see; the first where not given.
    `predict`: `predict(outputs) -> prediction` of one sample, for decoding before metrics see it.
    `is_right`: `is_right(outputs, label) -> bool`, for flips; classifiers need none.
    `logits`: True softmaxes the outputs before the calibration error is computed.
    `carry`: for stateful models, output -> input: what a step gives the next; a sample is then a
        sequence of feeds, or a feed of sequences. `step(run, sample) -> outputs` does it by hand.
    `batched`: items of `data` are batches of samples (a DataLoader's are, unless this says False).
    `join`: labels and predictions of a sample are sequences of rows, which metrics see end to end;
        found out where not given (ragged lengths, stateful models). Samples are still resampled
        whole.
    `resamples`, `confidence`, `interval` ("percentile" or "bca"), `seed`: of the bootstrap.
    """

    data: Any
    labels: Any = None
    metrics: Mapping[str, Any] | Sequence[str] = dataclasses.field(default_factory=dict)
    slices: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    limits: Mapping[str, float | str] = dataclasses.field(default_factory=dict)
    confident: bool = False
    group: Any = None
    output: str | None = None
    predict: Callable[[Any], Any] | None = None
    is_right: Callable[[Any, Any], bool] | None = None
    logits: bool = False
    step: Callable[..., Any] | None = None
    carry: Mapping[str, str] | None = None
    batched: bool | None = None
    join: bool | None = None
    bins: int = 4
    resamples: int = 1000
    confidence: float = 0.95
    interval: str = "percentile"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.interval not in ("percentile", "bca"):
            raise UsageError(
                f"There is no interval {self.interval!r}", fix='say "percentile" or "bca"'
            )
        if not 0.5 <= self.confidence < 1 or self.resamples < 0 or self.bins < 1:
            raise UsageError(
                "confidence must be in [0.5, 1), resamples at least 0, bins at least 1",
                why=f"they are {self.confidence}, {self.resamples}, {self.bins}",
            )

    def run(
        self, original: Any, candidates: Mapping[str, Any], *, progress: Progress | None = None
    ) -> Report:
        """Run every sample through all models and compare them with the original.

        Models may be paths, graphs, torch modules, `Compiled`, `Artifact`, or anything with `run`.
        Each sample goes through all of them before the next is read.

        Raises:
            UsageError: no samples, labels that do not fit, a metric that fails, a bad limit.
            CalibrationError: a feed does not fit a model.
        """
        from .measure import measure
        from .observe import observe

        if ORIGINAL in candidates:
            raise UsageError(f"No candidate can be called {ORIGINAL!r}", fix="give it another name")
        models = {ORIGINAL: original, **candidates}
        runners = {name: as_runner(model) for name, model in models.items()}
        seen = observe(self, runners, progress)
        sizes = {name: bytes_of(model) for name, model in models.items()}
        return self.judge(measure(self, seen, sizes))

    def judge(self, report: Report) -> Report:
        """The report held against this evaluation's `limits` (which may have changed since).

        Raises:
            UsageError: a limit of something that was not measured, or that can't be read.
        """
        from .limits import judged

        return judged(report, self.limits, self.confident)

    def fingerprint(self) -> str:
        """A hash of everything that `run` measures by: data, labels, metrics, slices, options.

        Not of `limits` and `confident`, which `judge` applies to what was measured. Reads all data
        once; the order of samples that come one at a time does not matter. Functions count by
        their code and what they close over, not by what they call. An iterator that can be read
        only once is kept as a list from then on.
        """
        from .fingerprint import fingerprint

        if isinstance(self.data, Iterator):
            object.__setattr__(self, "data", list(self.data))
        if isinstance(self.labels, Iterator):
            object.__setattr__(self, "labels", list(self.labels))
        return fingerprint(self)

    def samples(self, runner: Any = None) -> Iterator[Any]:
        """The samples one at a time (`data.Sample`), as `run` reads them: checked against, and
        shaped for, the inputs of `runner`."""
        from .data import samples_of
        from .runners import inputs_of

        inputs = None if runner is None else inputs_of(as_runner(runner))
        return samples_of(self, inputs)


def evaluate(
    original: Any,
    candidates: Any,
    data: Any,
    labels: Any = None,
    *,
    progress: Progress | None = None,
    **options: Any,
) -> Report:
    """What each candidate does to the original, on data: `Evaluation(...).run(...)` in one call.

    `candidates` is a mapping from name to model, one model, or a list of them. `data` may be an
    `Evaluation`; else it, `labels` and `options` make one. With labels and no metrics, accuracy is
    measured.

    Raises:
        EdgepassError: see `Evaluation.run`.
    """
    if isinstance(data, Evaluation):
        chosen = dataclasses.replace(data, **options) if options else data
        if labels is not None:
            chosen = dataclasses.replace(chosen, labels=labels)
    else:
        chosen = Evaluation(data=data, labels=labels, **options)
    return chosen.run(original, _named(candidates), progress=progress)


def _named(candidates: Any) -> Mapping[str, Any]:
    if isinstance(candidates, Mapping):
        return candidates
    models = candidates if isinstance(candidates, list | tuple) else [candidates]
    names: dict[str, Any] = {}
    for i, model in enumerate(models):
        path = getattr(model, "path", model)
        base = str(path).rstrip("/") if isinstance(path, str) or hasattr(path, "parts") else ""
        name = base or getattr(model, "recipe", "") or f"candidate {i + 1}"
        names[name if name not in names else f"{name} ({i + 1})"] = model
    return names

"""What 8 bits in each layer do to the result, on the user's metric or on the outputs.

Here: `sensitivity`, and `Sensitivity`, its answer. Not here: measuring (`trials`), choosing layers
to keep float (`mixed`), table and picture (`sensitivity_report`), what the pass `int8` does by
itself (`passes.quantize.sensitivity`).
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UsageError
from ..evaluation.evaluation import Evaluation
from ..evaluation.limits import parse_limit
from ..frontends import load_supported
from ..samples import as_feeds
from ..targets.feed import input_specs
from ..targets.registry import get_target
from ..targets.target import Target
from .layer_job import LayerJob
from .mixed import Mixed, MixedSearch, check_budget
from .trials import Outcome, Progress, loss

SCHEMA, SCHEMA_VERSION = "edgepass.sensitivity", 1
SAMPLES, MAX_RUNS = 16, 50_000
GOOD_DB = 20.0
"""Signal to error of the outputs that `mixed` reaches for where no limit is given."""


@dataclasses.dataclass(frozen=True)
class LayerSensitivity:
    """One layer. `alone`: it in 8 bits and all others float; `without`: all but it in 8 bits.
    `depth` counts layers from the input, `macs` is its share of multiply-accumulates."""

    name: str
    op_type: str
    described: str
    depth: int
    macs: float
    weighted: bool
    alone: Outcome
    without: Outcome

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        plain = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return plain | {"alone": self.alone.as_dict(), "without": self.without.as_dict()}


@dataclasses.dataclass(frozen=True)
class Sensitivity:
    """The layers in the order of the model, and what all of them in 8 bits do together.

    `higher`: of each metric, whether more is better. `runs` of the model were made, on `samples`.
    """

    target: str
    recipe: str
    layers: tuple[LayerSensitivity, ...]
    every: Outcome
    higher: Mapping[str, bool]
    samples: int
    runs: int
    seconds: float
    notes: tuple[str, ...] = ()
    _job: LayerJob | None = dataclasses.field(default=None, repr=False, compare=False)

    def __getitem__(self, name: str) -> LayerSensitivity:
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise UsageError(
            f"There is no layer {name!r} in 8 bits",
            fix=f"there are: {', '.join(layer.name for layer in self.layers[:20])}",
        )

    @property
    def ranked(self) -> tuple[LayerSensitivity, ...]:
        """The layers, the most harmful first: by the first metric, then by the outputs' error."""
        key = self._harm
        return tuple(sorted(self.layers, key=lambda layer: (-key(layer)[0], -key(layer)[1])))

    def mixed(
        self,
        limit: float | Mapping[str, float | str] | None = None,
        *,
        at_most: int | None = None,
        macs: float | None = None,
        progress: Progress | None = None,
    ) -> Mixed:
        """The fewest layers to keep float so that a limit holds, measured on the model as written.

        Args:
            limit: as `Evaluation.limits`, or a number for its only metric; without an evaluation
                decibels of signal to error at the outputs. By default the evaluation's own limits,
                else 20 dB; with a budget and neither, the budget is put to its best use.
            at_most: so many layers at most.
            macs: layers with so large a share of the multiply-accumulates at most.

        Raises:
            UsageError: a limit that can't be held against what was measured, or a bad budget.
        """
        job = self._job
        if job is None:
            raise UsageError("This sensitivity was read from data", fix="measure it again")
        budget = check_budget(at_most, macs)
        limits = self._limits(limit, budget.layers is not None or budget.macs is not None)
        search = MixedSearch(
            job.trials,
            self._rankings(),
            [layer.macs for layer in self.layers],
            limits,
            budget,
            progress or _silent,
        )
        return job.proved(search, search.run(), self.every)

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON; docs/sensitivity.md describes it."""
        return {
            "schema": SCHEMA,
            "schema_version": SCHEMA_VERSION,
            "target": self.target,
            "recipe": self.recipe,
            "metrics": {name: {"higher_is_better": up} for name, up in self.higher.items()},
            "every": self.every.as_dict(),
            "layers": [layer.as_dict() for layer in self.layers],
            "ranked": [layer.name for layer in self.ranked],
            "samples": self.samples,
            "runs": self.runs,
            "seconds": round(self.seconds, 3),
            "notes": list(self.notes),
        }

    def table(self, limit: int = 40) -> Any:
        """A `rich.table.Table`, the most harmful layers first."""
        from .sensitivity_report import sensitivity_table

        return sensitivity_table(self, limit)

    def save_plot(self, path: str | Path) -> Path:
        """Effect by depth, as a PNG file.

        Raises:
            MissingDependencyError: matplotlib is not installed.
        """
        from .sensitivity_report import plot_sensitivity

        return plot_sensitivity(self, Path(path))

    def __str__(self) -> str:
        from .sensitivity_report import sensitivity_text

        return sensitivity_text(self)

    def _harm(self, layer: LayerSensitivity) -> tuple[float, float]:
        return loss(layer.alone, self.higher)

    def _rankings(self) -> list[list[int]]:
        """Orders to keep layers float in: by harm alone, by the outputs' error alone, and by what
        leaving a layer out gains."""
        layers, everything = self.layers, range(len(self.layers))

        def gain(i: int) -> tuple[float, float]:
            return loss(layers[i].without, self.higher)

        return [
            sorted(everything, key=lambda i: tuple(-x for x in self._harm(layers[i]))),
            sorted(everything, key=lambda i: -layers[i].alone.error),
            sorted(everything, key=gain),
        ]

    def _limits(
        self, limit: float | Mapping[str, float | str] | None, budgeted: bool
    ) -> Mapping[str, float | str] | None:
        assert self._job is not None
        evaluation = self._job.trials.evaluation
        if isinstance(limit, Mapping):
            if evaluation is None and set(limit) != {"sqnr_db"}:
                raise UsageError(
                    "Without an evaluation only the outputs can be limited",
                    why=f"limits: {', '.join(limit)}",
                    fix="give a number of dB, or `evaluate=` to `edgepass.sensitivity`",
                )
            return limit if evaluation is not None else {"sqnr_db": _decibels(limit["sqnr_db"])}
        if limit is not None:
            if evaluation is None:
                return {"sqnr_db": limit}
            if len(self.higher) != 1:
                raise UsageError(
                    "A single limit needs a single metric",
                    why=f"metrics: {', '.join(self.higher) or 'none'}",
                    fix='limit={"metric": -0.003}',
                )
            return {next(iter(self.higher)): limit}
        if evaluation is not None and evaluation.limits:
            return evaluation.limits
        if budgeted:
            return None
        return {"sqnr_db": GOOD_DB if evaluation is None else f">= {GOOD_DB:g}"}


def sensitivity(
    model: Any,
    target: str | Target = "host",
    *,
    calibration: Any,
    evaluate: Evaluation | None = None,
    recipe: str = "int8",
    samples: int = SAMPLES,
    max_runs: int = MAX_RUNS,
    dims: Mapping[str, int] | None = None,
    progress: Progress | None = None,
) -> Sensitivity:
    """What 8 bits in each layer do: with that layer alone in 8 bits, and with all but it.

    One session has a switch for each layer, so that a layer costs two runs a sample and no more.
    (Per-layer analysis as in Nagel et al., "A White Paper on Neural Network Quantization", 2021,
    arXiv 2106.08295, section 3.7.) On ONNX Runtime's CPU a layer is in 8 bits or in float: there is
    nothing between to ask for.

    Args:
        model, target, dims: see `compile`.
        calibration: representative inputs; ranges come from all of them.
        evaluate: data and metrics. Without it, or without metrics, the outputs' error counts;
            without it, on the calibration samples.
        recipe: static int8 with its options and whatever comes before it; `protect` and corrections
            (`bias_correction`, `rounding`, `reconstruct`) are left out of what is measured.
        samples: of calibration that layers are tried on, evenly spread; fewer where `max_runs` asks
            for it.
        max_runs: runs of the model that may be made. An evaluation with more is refused.
        progress: called with (done, total, what); before layers are tried, `what` says how many
            runs that takes.

    Raises:
        UsageError: the recipe has no static int8, no layer runs in 8 bits, or the model or the
            evaluation is too large.
        EdgepassError: see `compile` and `Evaluation.run`.
    """
    started = time.perf_counter()
    tell = progress or _silent
    device = get_target(target)
    graph = load_supported(model, weights_required=True)
    if samples < 1 or max_runs < 1:
        raise UsageError("samples and max_runs must be at least 1")
    job = LayerJob(graph, device, recipe, as_feeds(calibration, input_specs(graph)), dims, tell)
    trials, count = job.prepare(_again(evaluate), samples, max_runs)
    n = len(job.units)
    none, every = trials.switched.none(), trials.switched.every()
    one = [np.arange(n) == i for i in range(n)]
    masks = [every, *one, *(~mask for mask in one)]
    runs = (len(masks) + 1) * count
    text = f"{n} layers, {len(masks)} variants on {count} samples: {runs} runs"
    tell(0, len(masks), f"{text}{job.estimate(none, runs)}")

    def tell_layers(done: int, total: int, _: str) -> None:
        tell(done, total, f"trying layers one by one ({runs} runs)")

    found = list(trials.measure(masks, tell_layers))
    tell(len(masks), len(masks), "")
    shares = job.shares
    layers = tuple(
        LayerSensitivity(
            u.name, u.op_type, u.described, i, shares[i], u.weighted, found[1 + i], found[1 + n + i]
        )
        for i, u in enumerate(job.units)
    )
    return Sensitivity(
        device.name,
        recipe,
        layers,
        found[0],
        dict(trials.higher),
        count,
        runs,
        time.perf_counter() - started,
        tuple(job.notes),
        job,
    )


# --- parts -----------------------------------------------------------------------------------


def _decibels(limit: float | str) -> float:
    return parse_limit("sqnr_db", limit).bound


def _again(evaluation: Evaluation | None) -> Evaluation | None:
    """The evaluation with data that can be read once kept in a list."""
    if evaluation is None:
        return None
    data, labels = (
        list(given) if isinstance(given, Iterator) else given
        for given in (evaluation.data, evaluation.labels)
    )
    return dataclasses.replace(evaluation, data=data, labels=labels)


def _silent(done: int, total: int, what: str) -> None:
    """No progress shown."""

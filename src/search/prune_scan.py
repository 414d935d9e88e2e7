"""What pruning each group of a model would cost and gain, one group at a time.

Here: `prune_scan`, and `PruneScan`, its answer. Not here: what a group is and how it is removed
(`passes.prune`), its table and text (`prune_report`), choosing how much to prune (`prune_budget`).
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Mapping, Sequence
from typing import Any

import onnx_ir as ir

from ..api import sample_for
from ..cost.latency import Latency
from ..errors import UsageError
from ..evaluation.evaluation import Evaluation
from ..frontends import load_notes, load_supported
from ..ir.graph import absent_weights
from ..passes.probe import default_dims
from ..samples import Feed, as_feeds
from ..targets.feed import input_specs
from ..targets.registry import get_target
from ..targets.target import Target
from .prune_job import PruneJob
from .prune_rows import BlockedRow, GroupRow
from .trials import Progress

SCHEMA, SCHEMA_VERSION = "edgepass.prune_scan", 1
SAMPLES = 96
"""Calibration samples that a scan looks at; every eighth of them only judges."""
RATIO = 0.3


@dataclasses.dataclass(frozen=True)
class PruneScan:
    """The groups in the order of the model.

    `measured`: what errors are of, "outputs" (on `samples` samples that no repair has seen) or
    "weights"; "" where there are neither. `reach`: the share of the parameters that some group can
    remove. `latency`: the prediction for the model as it is.
    """

    target: str
    recipe: str
    ratio: float
    rows: tuple[GroupRow, ...]
    blocked: tuple[BlockedRow, ...]
    reach: float
    parameters: int
    macs: int | None
    latency: Latency
    measured: str
    samples: int
    seconds: float
    notes: tuple[str, ...] = ()

    def __getitem__(self, name: str) -> GroupRow:
        for row in self.rows:
            if row.name == name or name in row.also:
                return row
        raise UsageError(
            f"There is no group {name!r} that can be pruned",
            fix=f"there are: {', '.join(row.name for row in self.rows[:20])}",
        )

    @property
    def ranked(self) -> tuple[GroupRow, ...]:
        """In the suggested order: what gains most time for its error comes first."""
        return tuple(sorted(self.rows, key=lambda row: row.order))

    @property
    def worst(self) -> GroupRow | None:
        """The group that does most harm."""
        known = [row for row in self.rows if row.error is not None]
        return max(known, key=lambda row: row.error or 0.0, default=None)

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON; docs/pruning.md describes it."""
        return {
            "schema": SCHEMA,
            "schema_version": SCHEMA_VERSION,
            "target": self.target,
            "recipe": self.recipe,
            "ratio": self.ratio,
            "reach": self.reach,
            "parameters": self.parameters,
            "macs": self.macs,
            "latency": self.latency.as_dict(),
            "measured": self.measured,
            "samples": self.samples,
            "groups": [row.as_dict() for row in self.rows],
            "order": [row.name for row in self.ranked],
            "blocked": [row.as_dict() for row in self.blocked],
            "seconds": round(self.seconds, 3),
            "notes": list(self.notes),
        }

    def table(self, limit: int = 60) -> Any:
        """A rich renderable: the groups in the suggested order, then the blocked ones."""
        from .prune_report import scan_table

        return scan_table(self, limit)

    def __str__(self) -> str:
        from .prune_report import scan_table, text_of

        return text_of(scan_table(self))


def prune_scan(
    model: Any,
    target: str | Target = "host",
    *,
    ratio: float | None = None,
    recipe: str = "prune",
    calibration: Any = None,
    samples: int = SAMPLES,
    example_inputs: Any = None,
    dynamic_shapes: Any = None,
    input_shapes: Sequence[str] | Mapping[str, str] | None = None,
    dims: Mapping[str, int] | None = None,
    progress: Progress | None = None,
) -> PruneScan:
    """What pruning each group of a model alone would gain and cost.

    Args:
        model, target, example_inputs, dynamic_shapes, input_shapes, dims: see `compile`. Weights
            may be absent, and then errors are.
        ratio: the share of each group's units that is tried, 0.3 by default.
        recipe: the pass `prune` with its options: `prune{heads=whole}`; its ratio counts where
            `ratio` is not given.
        calibration: representative inputs, or an `Evaluation`, of which only the data count. Every
            eighth only judges the outputs, and weights are solved again on the others. Without any,
            the weights' energy says what is small.
        samples: how many of them at most, evenly spread.
        progress: called with (done, total, what).

    Raises:
        UsageError: the recipe is not the pass `prune`, or a number that can't be.
        EdgepassError: see `compile`.
    """
    started = time.perf_counter()
    device = get_target(target)
    graph = load_supported(
        model,
        example_inputs=example_inputs,
        dynamic_shapes=dynamic_shapes,
        input_shapes=input_shapes,
        weights_required=False,
    )
    notes = list(load_notes(graph))
    if samples < 1:
        raise UsageError("samples must be at least 1")
    feeds: Sequence[Feed] | None = None
    if isinstance(calibration, Evaluation):
        feeds = _feeds_of(calibration, graph, samples)
    elif calibration is not None:
        feeds = as_feeds(calibration, input_specs(graph))
    if absent_weights(graph):
        sizes: Mapping[str, int] = default_dims(graph, dims)
    else:
        sizes = sample_for(graph, feeds, dims).dims
    job = PruneJob(graph, device, recipe, ratio, feeds, sizes, samples, progress or _silent)
    rows = _ordered(job.rows())
    return PruneScan(
        target=device.name,
        recipe=recipe,
        ratio=job.ratio,
        rows=rows,
        blocked=job.blocked(),
        reach=job.groups.reach,
        parameters=job.parameters,
        macs=job.macs,
        latency=job.latency,
        measured=job.measured,
        samples=len(job.judges),
        seconds=time.perf_counter() - started,
        notes=tuple(dict.fromkeys((*notes, *job.notes))),
    )


def _ordered(rows: list[GroupRow]) -> tuple[GroupRow, ...]:
    """With the suggested order: by error for each millisecond gained, or each MAC, or parameter.

    Groups that gain nothing come last.
    """
    for gain in ("gained_ms", "fewer_macs", "fewer_parameters"):
        if any(getattr(row, gain) for row in rows):
            break

    def key(i: int) -> tuple[bool, float]:
        gained = getattr(rows[i], gain) or 0.0
        found = rows[i].error
        error = 1.0 if found is None else found
        return gained <= 0, error / gained if gained > 0 else -gained

    places = {i: place for place, i in enumerate(sorted(range(len(rows)), key=key), 1)}
    return tuple(dataclasses.replace(row, order=places[i]) for i, row in enumerate(rows))


def _feeds_of(evaluation: Evaluation, graph: ir.Model, most: int) -> list[Feed] | None:
    """The first feeds of an evaluation's data; None where its samples are sequences of steps."""
    found = [sample.feed for sample in itertools.islice(evaluation.samples(graph), most)]
    return found if all(isinstance(feed, Mapping) for feed in found) else None


def _silent(done: int, total: int, what: str) -> None:
    """No progress shown."""

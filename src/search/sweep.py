"""Every variant worth trying of a model on a target, made, judged and timed.

Here: `sweep`. Not here: what is worth trying (`recipes`), doing it (`stages`), the answer
(`result`).
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import onnx_ir as ir

from ..architecture import Architecture
from ..cost.budget import Budget, Verdict
from ..cost.latency import MEASURED, Latency
from ..cost.report import CostReport
from ..errors import UsageError
from ..evaluation.evaluation import Evaluation
from ..evaluation.report import Rung
from ..frontends import load_notes, load_supported
from ..ir.sizing import check_dims
from ..passes.base import Pass
from ..pipelines import parse_recipe
from ..samples import Feed, as_feeds
from ..targets.feed import input_specs
from ..targets.registry import get_target
from ..targets.target import Target
from .blame import SAMPLES
from .cache import Cache, default_folder
from .pareto import front
from .recipes import (
    PRUNE,
    PTQ,
    Plan,
    Recipe,
    as_recipes,
    model_facts,
    prune_recipes,
    ptq_recipes,
)
from .result import SweepResult
from .rows import Row, stored_cost
from .stages import CANDIDATE, Bench, Made
from .timing import Timing, groups, measured_here

ProgressCall = Callable[[int, int, str], None]
AUTO = "auto"


def sweep(
    model: Any,
    target: str | Target = "host",
    recipes: str | Iterable[Any] = PTQ,
    *,
    calibration: Any = None,
    evaluate: Evaluation | None = None,
    budget: Budget | None = None,
    passes: Sequence[Pass] = (),
    dims: Mapping[str, int] | None = None,
    example_inputs: Any = None,
    dynamic_shapes: Any = None,
    input_shapes: Sequence[str] | Mapping[str, str] | None = None,
    time_budget_s: float = 1.0,
    cache: str | Path | None = AUTO,
    progress: ProgressCall | None = None,
) -> SweepResult:
    """Compile a model by every recipe, evaluate each against the original, and time it.

    A recipe that fails or is refused is a row with its reason. What is done is kept by the hash of
    all that it depends on, so that a sweep that was stopped goes on where it was, and one that is
    asked again with another evaluation, budget or list compiles only what is new.

    Args:
        model, example_inputs, dynamic_shapes, input_shapes, dims, passes: see `compile`.
        target: a name, `host`, or a `Target`. Latency is measured where this machine runs it.
        recipes: "ptq" for the post-training variants worth trying, "prune" for structured pruning
            from 10 to 70 % with and without int8; or texts, or (name, text).
        calibration: representative inputs, for recipes that observe ranges.
        evaluate: data, metrics, slices and limits. Without it, outputs are held against the
            original's on the calibration samples.
        budget: limits on size, latency and memory, which a row must meet besides.
        time_budget_s: seconds of timing for each recipe; 0 for none.
        cache: a folder, or None to keep nothing; by default `$EDGEPASS_CACHE`, or the user's cache
            folder.
        progress: called with (done, total, what).

    Raises:
        EdgepassError: the model can't be read, there is no such target, no recipe is given, or the
            evaluation itself can't be run on the original.
    """
    device = get_target(target)
    graph = load_supported(
        model,
        example_inputs=example_inputs,
        dynamic_shapes=dynamic_shapes,
        input_shapes=input_shapes,
        weights_required=True,
    )
    if dims:
        check_dims(graph, dims)
    samples = _again_and_again(calibration)
    feeds = None if samples is None else as_feeds(samples, input_specs(graph))
    plan = _plan(recipes, graph, device, feeds is not None)
    evaluation, notes = _evaluation(evaluate, feeds)
    keeper: Any = None
    if cache is None:
        keeper = tempfile.TemporaryDirectory(prefix="edgepass-sweep-")
        store = Cache(keeper.name)
    else:
        store = Cache(default_folder() if cache == AUTO else cache)
    bench = Bench(
        graph,
        device,
        store,
        calibration=samples,
        feeds=feeds,
        dims=dims,
        passes=passes,
        evaluation=evaluation,
        time_budget_s=time_budget_s,
    )
    job = _Job(bench, plan, budget, progress or _silent)
    job.run()
    return SweepResult(
        target=device.name,
        rows=job.rows(),
        original=job.original,
        left_out=plan.left_out,
        notes=tuple(dict.fromkeys((*load_notes(graph), *notes, *job.notes, *store.notes))),
        measured=job.timed,
        done=bench.done,
        cache=store.folder,
        graph=graph,
        evaluation=evaluation,
        budget=budget,
        _feeds=tuple((feeds or ())[:SAMPLES]),
        _keeper=keeper,
    )


class _Job:
    """One pass over the plan: compile and evaluate recipe by recipe, then time them together."""

    def __init__(
        self, bench: Bench, plan: Plan, budget: Budget | None, progress: ProgressCall
    ) -> None:
        self.bench, self.plan, self.budget = bench, plan, budget
        self.made: dict[str, Made] = {}
        self.rungs: dict[str, Rung] = {}
        self.times: dict[str, Timing] = {}
        self.remarks: dict[str, list[str]] = {recipe.name: [] for recipe in plan.recipes}
        self.broken: dict[str, str] = {}
        self.original: Rung | None = None
        self.notes: list[str] = []
        self.shared: dict[str, list[str]] = {}
        self.timed = False
        self._progress = progress
        self._done, self._total = 0, 2 * len(plan.recipes) + 1

    def run(self) -> None:
        """All that is not in the cache yet, in an order that a kill harms least."""
        for recipe in self.plan.recipes:
            made = self._step(recipe.name, "compiling", partial(self._compile, recipe))
            self.made[recipe.name] = made
            if self.bench.evaluation is None or made.artifact is None:
                self._done += 1
            else:
                self._step(recipe.name, "evaluating", partial(self._evaluate, recipe))
        self._time()
        self.notes += [n.replace(CANDIDATE, ", ".join(who)) for n, who in self.shared.items()]
        self._progress(self._total, self._total, "")

    def rows(self) -> tuple[Row, ...]:
        """The results, with those marked that no other beats."""
        rows = [self._row(recipe) for recipe in self.plan.recipes]
        points = [
            (row.file_bytes, row.latency_on(self.timed), row.loss)
            if not row.failed
            else (None, None, None)
            for row in rows
        ]
        marks = front(points)
        return tuple(
            dataclasses.replace(row, front=mark) for row, mark in zip(rows, marks, strict=True)
        )

    # --- steps -----------------------------------------------------------------------------------

    def _step(self, name: str, what: str, call: Callable[[], Any]) -> Any:
        self._progress(self._done, self._total, f"{what} {name}")
        found = call()
        self._done += 1
        return found

    def _within(self, what: str) -> ProgressCall:
        """Progress inside a step: the bar stays, the words go on."""

        def tell(done: int, total: int, detail: str) -> None:
            part = f" {done}/{total}" if total > 1 else ""
            self._progress(self._done, self._total, f"{what}: {detail}{part}")

        return tell

    def _compile(self, recipe: Recipe) -> Made:
        try:
            return self.bench.compile(recipe, self._within(recipe.name))
        except Exception as error:
            text = f"{type(error).__name__}: {str(error) or 'no message'}"
            return Made({"failed": f"failed in a way that edgepass did not expect: {text}"})

    def _evaluate(self, recipe: Recipe) -> None:
        made = self.made[recipe.name]
        if not made.data["runs_here"]:
            self.remarks[recipe.name].append("not evaluated: a library for another machine")
            return
        try:
            report = self.bench.evaluate(recipe, made, self._within(recipe.name))
        except Exception as error:
            self._require_original()
            self.broken[recipe.name] = f"compiled, but can't be evaluated: {error}"
            return
        self.original = self.original or report.original
        self.rungs[recipe.name] = dataclasses.replace(
            report.candidates[0], name=recipe.name, bytes=made.data["file_bytes"]
        )
        for note in report.notes:
            self.shared.setdefault(note, []).append(recipe.name)

    def _require_original(self) -> None:
        """Raises what is wrong with the evaluation itself, rather than blame a candidate for it."""
        if self.original is None and self.bench.evaluation is not None:
            self.bench.evaluation.run(self.bench.reference(), {})

    def _time(self) -> None:
        bench = self.bench
        if not measured_here(bench.target):
            self.notes.append(f"latency is predicted: this machine is no {bench.target.name}")
            return
        feed = bench.timing_feed() if bench.time_budget_s > 0 else None
        if feed is None:
            if bench.time_budget_s > 0:
                self.notes.append("not timed: give one real sample as `calibration`")
            return
        first = self._first_of_each()
        todo: dict[str, Made] = {}
        for name in dict.fromkeys(first.values()):
            known = bench.known_time(self.made[name], feed)
            if known is None:
                todo[name] = self.made[name]
            else:
                self.times[name] = known
        parts = list(groups(list(todo)))
        for i, names in enumerate(parts):
            text = f"timing {', '.join(names)} ({i + 1}/{len(parts)})"
            self._progress(self._done, self._total, text)
            found, failed = bench.time({name: todo[name] for name in names}, feed)
            self.times |= found
            for name, why in failed.items():
                self.remarks[name].append(why)
        self.times |= {name: self.times[same] for name, same in first.items() if same in self.times}
        self.timed = bool(self.times)

    def _first_of_each(self) -> dict[str, str]:
        """Every recipe with an artifact, to the first with the very same."""
        seen: dict[str, str] = {}
        found = {}
        for name, made in self.made.items():
            if made.artifact is not None and name not in self.broken:
                found[name] = seen.setdefault(made.digest, name)
        return found

    # --- rows ------------------------------------------------------------------------------------

    def _row(self, recipe: Recipe) -> Row:
        made = self.made[recipe.name]
        plain = Row(recipe.name, recipe.text, recipe.why)
        if made.artifact is None:
            return dataclasses.replace(plain, failed=made.failed, reused=made.reused)
        cost = stored_cost(made.data["cost"], self.bench.target.name, recipe.name)
        cost = dataclasses.replace(cost, file_bytes=made.data["file_bytes"])
        timing = self.times.get(recipe.name)
        same = self._first_of_each().get(recipe.name, recipe.name)
        return dataclasses.replace(
            plain,
            passes=made.data["passes"],
            failed=self.broken.get(recipe.name, ""),
            file_bytes=made.data["file_bytes"],
            cost=cost,
            timing=timing,
            rung=self.rungs.get(recipe.name),
            budget=_verdicts(self.budget, cost, timing),
            same_as="" if same == recipe.name else same,
            lossless=all(item.lossless for item in parse_recipe(recipe.text)),
            notes=(*self.remarks[recipe.name], *made.data["notes"], *made.data["ledger"]),
            seconds=made.data["seconds"],
            reused=made.reused,
            artifact=made.artifact,
        )


# --- parts -----------------------------------------------------------------------------------


def _plan(recipes: str | Iterable[Any], graph: ir.Model, target: Target, calibrated: bool) -> Plan:
    if not isinstance(recipes, str):
        return as_recipes(recipes)
    families = {PTQ: ptq_recipes, PRUNE: prune_recipes}
    if recipes not in families:
        raise UsageError(
            f"There is no set of recipes {recipes!r}",
            fix=f'recipes="{PTQ}" or "{PRUNE}", or a list: recipes=["fp32", "{recipes}"]',
        )
    clean = Architecture(graph).prepared("fp32", target)
    return families[recipes](model_facts(clean), target, calibrated=calibrated)


def _evaluation(
    given: Evaluation | None, feeds: Sequence[Feed] | None
) -> tuple[Evaluation | None, list[str]]:
    """The evaluation to run, its data readable more than once."""
    if given is not None:
        kept = {"data": _again_and_again(given.data), "labels": _again_and_again(given.labels)}
        return dataclasses.replace(given, **kept), []
    if feeds is None:
        return None, ["nothing was evaluated: give `evaluate=edgepass.Evaluation(data=...)`"]
    text = "outputs were held against the original's on the calibration samples: no `evaluate`"
    return Evaluation(data=list(feeds)), [text]


def _again_and_again(samples: Any) -> Any:
    """Samples that every recipe can read: what can be read once is kept in a list."""
    return list(samples) if isinstance(samples, Iterator) else samples


def _verdicts(
    budget: Budget | None, cost: CostReport, timing: Timing | None
) -> tuple[Verdict, ...]:
    if budget is None:
        return ()
    if timing is not None:
        cost = dataclasses.replace(cost, latency=Latency(timing.ms, timing.ms, timing.ms, MEASURED))
    return budget.check(cost)


def _silent(done: int, total: int, what: str) -> None:
    """No progress shown."""

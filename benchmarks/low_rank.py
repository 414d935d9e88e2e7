"""Low-rank factorization: what is chosen, whether it is as fast as predicted, and how accurate.

    python benchmarks/low_rank.py [TASK...] [--zoo MODEL.onnx...] [--ratios 0.1 ... 0.5]
                                  [--recipes RECIPE...] [--samples 64]

Each task of `labelled_tasks` at each ratio, with calibration samples and without (`data=false`):
layers factorized, predicted and measured time over float's (all variants in turns in one process,
one thread, after the default recipe), and the scores on the test data. Models of `--zoo` get random
weights, and only time is told of them. `{ratio}` in a recipe is filled in.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from host import describe_host
from labelled_tasks import NotThere, Task, tasks
from random_weights import with_random_weights

import edgepass
from edgepass.errors import EdgepassError
from edgepass.passes.probe import working_sample
from edgepass.speed import time_in_turns
from edgepass.targets.onnxruntime import OrtRunner

RECIPES = ("low_rank{{ratio={ratio}}}", "low_rank{{ratio={ratio},data=false,limit=1e9}}")
RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5)
Feed = Mapping[str, np.ndarray]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tasks", nargs="*", metavar="TASK", default=["minilm", "rapidocr_rec"])
    parser.add_argument("--zoo", nargs="+", type=Path, default=[], metavar="MODEL.onnx")
    parser.add_argument("--ratios", type=float, nargs="+", default=RATIOS)
    parser.add_argument("--recipes", nargs="+", default=RECIPES)
    parser.add_argument("--samples", type=int, default=64, help="calibration samples at most")
    parser.add_argument("--budget", type=float, default=1.0, help="seconds of timing a variant")
    parser.add_argument("--only-zoo", action="store_true", help="no tasks")
    options = parser.parse_args()
    print(f"{describe_host()}\n")
    recipes = [(r, recipe.format(ratio=r)) for recipe in options.recipes for r in options.ratios]
    for name in [] if options.only_zoo else options.tasks:
        try:
            task = tasks()[name]()
        except NotThere as missing:
            print(f"{name}: left out, {missing}")
            continue
        samples = list(task.calibration)[: options.samples]
        table(name, str(task.model), task.timing, recipes, samples, task, options.budget)
    for path in options.zoo:
        model = with_random_weights(path)
        feed = working_sample(model).feed
        kept = dict.fromkeys(r for r in recipes if "data=false" in r[1]) or recipes
        table(path.stem, model, feed, list(kept), None, None, options.budget)


def table(
    name: str,
    model: Any,
    feed: Feed,
    recipes: Sequence[tuple[float, str]],
    samples: Sequence[Feed] | None,
    task: Task | None,
    budget_s: float,
) -> None:
    """A line a recipe."""
    made: dict[str, Any] = {}
    notes: dict[str, tuple[str, ...]] = {}
    sizes = {} if task is None else {"dims": _sizes(model, feed)}
    for recipe in ("default", *(recipe for _, recipe in recipes)):
        try:
            made[recipe] = edgepass.compile(
                model, recipe=recipe, calibration=samples, check_numerics=False, time_budget_s=0,
                force=True, **sizes,
            )  # fmt: skip
        except EdgepassError as error:
            print(f"{name}, {recipe}: {error.diagnostic.what}")
            continue
        rows = [r for r in made[recipe].ledger.rows if r.name.startswith("low_rank")]
        notes[recipe] = rows[0].notes if rows else ()
    runners = {r: OrtRunner(m.model, session_options=m.session_options) for r, m in made.items()}
    calls = [lambda runner=runner: runner.run(feed) for runner in runners.values()]
    for call in calls:
        call()
    ms = dict(zip(runners, time_in_turns(calls, budget_s=budget_s), strict=True))
    plain = made["default"].report
    print(f"\n{name}: {plain.latency}, {plain.macs:,} MACs, {ms['default']:.3g} ms measured")
    for recipe, compiled in made.items():
        report = compiled.report
        told = f"predicted {report.latency.ms / plain.latency.ms:.3f}" if report.latency.ms else ""
        line = (
            f"{recipe}: MACs {report.macs / plain.macs:.3f}, file "
            f"{report.file_bytes / plain.file_bytes:.3f}, {told}, measured "
            f"{ms[recipe] / ms['default']:.3f}"
        )
        if task is not None:
            runner = runners[recipe]
            scores = task.score(lambda f, runner=runner: runner.run(f))
            line += "".join(f", {metric} {value:.4f}" for metric, value in scores.items())
        print(line, flush=True)
        for note in notes.get(recipe, ()):
            print(f"    {note}")


def _sizes(model: Any, feed: Feed) -> dict[str, int]:
    """Symbolic dimensions as the timing feed has them."""
    from edgepass.frontends import load_model
    from edgepass.ir.sizing import dim_name

    found = {}
    for value in load_model(model).graph.inputs:
        for axis, dim in enumerate(value.shape.dims if value.shape is not None else ()):
            if not isinstance(dim, int) and value.name in feed:
                found[dim_name(value, axis)] = feed[value.name].shape[axis]
    return found


if __name__ == "__main__":
    main()

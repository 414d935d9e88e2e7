"""Curves of accuracy over the share of units that `prune` removes, without any training.

    python benchmarks/pruning.py [TASK...] [--ratios 0.1 ... 0.7] [--recipes R...] [--keep F.jsonl]

Every task of `labelled_tasks` and `image_tasks`. A recipe's `%` stands for the ratio; those of
`RECIPES` are `prune` as it is, its peers' way (each layer's L1 norms, no repair), and both followed
by int8. All have the same calibration samples; scores are on the whole test data. Parameters are
elements of constants, MACs those of the timing feed, both over the float model's after the default
recipe. With `--time` also milliseconds, all ratios of a recipe in turns in this process.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from host import describe_host
from image_tasks import image_tasks
from labelled_tasks import NotThere, Task, tasks

import edgepass
from edgepass.errors import EdgepassError
from edgepass.ir.ops import graph_macs
from edgepass.speed import time_in_turns

RECIPES = {
    "prune": "prune{ratio=%}",
    "L1, no repair": "prune{ratio=%,importance=l1,repair=false,limit=1e9}",
    "prune + int8": "prune{ratio=%},int8",
    "L1, no repair + int8": "prune{ratio=%,importance=l1,repair=false,limit=1e9},int8",
}
FLOAT = "default"


@dataclasses.dataclass
class Row:
    """One recipe at one ratio. `error` where nothing came of it, and why."""

    task: str
    recipe: str
    ratio: float
    scores: dict[str, float] = dataclasses.field(default_factory=dict)
    parameters: int = 0
    macs: int = 0
    seconds: float = 0.0
    ms: float | None = None
    notes: list[str] = dataclasses.field(default_factory=list)
    error: str = ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tasks", nargs="*", metavar="TASK")
    parser.add_argument("--ratios", type=float, nargs="+", default=[r / 10 for r in range(1, 8)])
    parser.add_argument("--recipes", nargs="+", help=f"names ({', '.join(RECIPES)}) or recipes")
    parser.add_argument("--stories", type=Path, help="the folder of stories260k")
    parser.add_argument("--keep", type=Path, help="rows are added here, and not made again")
    parser.add_argument("--time", action="store_true", help="milliseconds as well")
    parser.add_argument("--notes", action="store_true", help="what edgepass says of each model")
    options = parser.parse_args()
    makers = {**tasks(options.stories), **image_tasks()}
    unknown = [name for name in options.tasks if name not in makers]
    if unknown:
        parser.error(f"no task {unknown[0]!r}; there are {', '.join(makers)}")
    wanted = [(name, RECIPES.get(name, name)) for name in options.recipes or RECIPES]
    print(f"{describe_host()}\n")
    kept = _read(options.keep)
    for name in options.tasks or makers:
        try:
            task = makers[name]()
        except NotThere as missing:
            print(f"{name}: left out, {missing}\n")
            continue
        rows = _rows(task, wanted, options, kept)
        print(table(task, rows, [recipe for recipe, _ in wanted]), flush=True)
        if options.notes:
            print("\n".join(f"- {r.recipe} {r.ratio}: {n}" for r in rows for n in r.notes), "\n")


def _rows(task: Task, wanted: list[tuple[str, str]], options: Any, kept: list[Row]) -> list[Row]:
    rows = []
    plans = [(FLOAT, FLOAT, 0.0)]
    plans += [(name, text, ratio) for name, text in wanted for ratio in options.ratios]
    runs: list[tuple[Row, Callable[[], Any]]] = []
    for name, text, ratio in plans:
        known = [r for r in kept if (r.task, r.recipe, r.ratio) == (task.name, name, ratio)]
        if known and not options.time:
            rows.append(known[-1])
            continue
        row, made = measured(task, name, text.replace("%", f"{ratio:g}"), ratio)
        rows.append(row)
        if made is not None and options.time:
            runs.append((row, lambda made=made: made.run(task.timing)))
        elif options.keep is not None:
            _add(options.keep, row)
    if runs:
        for (row, _), ms in zip(runs, time_in_turns([call for _, call in runs]), strict=True):
            row.ms = ms
            if options.keep is not None:
                _add(options.keep, row)
    return rows


def measured(task: Task, name: str, recipe: str, ratio: float) -> tuple[Row, Any]:
    """A model made and scored; or why not, and None."""
    row, started = Row(task.name, name, ratio), time.perf_counter()
    try:
        made = edgepass.compile(
            task.model, recipe=recipe, calibration=task.calibration, time_budget_s=0, force=True
        )
        row.seconds = time.perf_counter() - started
        row.notes = [*made.notes, *(n for line in made.ledger.rows for n in line.notes)]
        row.parameters = sum(v.const_value.size for v in made.model.graph.initializers.values())
        row.macs = _macs(made.model, task)
        row.scores = task.score(made.run)
    except EdgepassError as error:
        row.error = " ".join(str(error).split())
        return row, None
    return row, made


def _macs(model: Any, task: Task) -> int:
    """At the timing feed's sizes."""
    sizes = {}
    for value in model.graph.inputs:
        for dim, size in zip(value.shape or (), task.timing[value.name].shape, strict=False):
            if not isinstance(dim, int):
                sizes[str(dim.value)] = size
    return graph_macs(model.graph, sizes) or 0


def table(task: Task, rows: list[Row], recipes: list[str]) -> str:
    """Markdown: a line a ratio, for each recipe the scores and what is left."""
    float_row = rows[0]
    metrics = list(float_row.scores)
    title = f"{task.name} ({', '.join(metrics)})"
    lines = [
        f"| {title} | {' | '.join(f'{recipe} | parameters, MACs' for recipe in recipes)} |",
        f"|---|{'---|---|' * len(recipes)}",
        f"| 0 | {_scores(float_row, metrics)} | {float_row.parameters:,}, {float_row.macs:,} |"
        + " | |" * (len(recipes) - 1),
    ]
    for ratio in sorted({row.ratio for row in rows[1:]}):
        cells = []
        for recipe in recipes:
            row = next(r for r in rows if (r.recipe, r.ratio) == (recipe, ratio))
            left = row.parameters / max(1, float_row.parameters)
            spent = row.macs / max(1, float_row.macs)
            times = "" if row.ms is None else f", {row.ms:.2f} ms"
            cells += [_scores(row, metrics), f"{left:.0%}, {spent:.0%}{times}"]
        lines.append(f"| {ratio:g} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def _scores(row: Row, metrics: Iterable[str]) -> str:
    if row.error:
        return row.error[:160]
    return ", ".join(f"{row.scores[metric]:.3f}" for metric in metrics)


def _read(path: Path | None) -> list[Row]:
    if path is None or not path.exists():
        return []
    return [Row(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


def _add(path: Path, row: Row) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(dataclasses.asdict(row)) + "\n")


if __name__ == "__main__":
    main()

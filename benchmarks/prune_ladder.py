"""Pruned, quantized, and both: accuracy, size, MACs and time of trained models in one table.

    python benchmarks/prune_ladder.py [TASK...] [--curve] [--pictures] [--keep FILE]

Each task of `labelled_tasks` (with `--pictures` also of `image_tasks`, which are trained first) by
the recipes default, prune30, int8 and prune30+int8; with `--curve` by 10 to 70 % with and without
int8. Calibration samples are the task's own and never test data. Every score is on the whole test
data. "predicted" is the cost model's time for this host, "measured" that of one feed on one thread,
all models of a task in turns in this process. `--keep FILE` keeps scores and models beside FILE;
`--only times` takes times of what is kept, when the machine is quiet.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from host import describe_host
from labelled_tasks import NotThere, Task, session, tasks

import edgepass
from edgepass.cost.latency import format_ms
from edgepass.cost.text import format_bytes, format_count
from edgepass.errors import EdgepassError
from edgepass.speed import time_in_turns
from edgepass.targets.onnx_file import write_onnx
from edgepass.targets.onnxruntime import OrtRunner

ORIGINAL = "original"
LADDER = ("default", "prune30", "int8", "prune30+int8")
PERCENT = (10, 20, 30, 40, 50, 60, 70)


@dataclasses.dataclass
class Row:
    """A task's model by one recipe; `error` where there is none, and why."""

    task: str
    recipe: str
    scores: dict[str, float] = dataclasses.field(default_factory=dict)
    file: str = ""
    session: dict[str, str] = dataclasses.field(default_factory=dict)
    file_bytes: int | None = None
    parameters: int | None = None
    macs: int | None = None
    predicted_ms: float | None = None
    measured_ms: float | None = None
    original_ms: float | None = None
    seconds: float = 0.0
    notes: list[str] = dataclasses.field(default_factory=list)
    error: str = ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tasks", nargs="*", metavar="TASK")
    parser.add_argument("--recipes", nargs="*", default=None, help="instead of the ladder's")
    parser.add_argument("--curve", action="store_true", help="10 to 70 %%, with and without int8")
    parser.add_argument("--pictures", action="store_true", help="also the image classifiers")
    parser.add_argument("--stories", type=Path, help="the folder of stories260k")
    parser.add_argument("--keep", type=Path, metavar="FILE", help="rows, as JSON; made once")
    parser.add_argument("--only", choices=("scores", "times"))
    parser.add_argument("--budget", type=float, default=1.0, help="seconds of timing a model")
    parser.add_argument("--notes", action="store_true", help="what edgepass says of each model")
    options = parser.parse_args()
    makers: dict[str, Any] = dict(tasks(options.stories))
    if options.pictures:
        from image_tasks import image_tasks

        makers |= image_tasks()
    unknown = [name for name in options.tasks if name not in makers]
    if unknown:
        parser.error(f"no task {unknown[0]!r}; there are {', '.join(makers)}")
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.keep.with_suffix("") if options.keep else Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        rows = _read(options.keep)
        for name in options.tasks or makers:
            try:
                task = makers[name]()
            except NotThere as missing:
                print(f"{name}: left out, {missing}")
                continue
            own = ladder(task, _recipes(options), folder, rows, options)
            rows = [row for row in rows if row not in own] + own
            if options.keep:
                text = json.dumps([dataclasses.asdict(row) for row in rows], indent=1)
                options.keep.write_text(text, encoding="utf-8")
            print(f"{name}: {len(own)} models", flush=True)
    shown = [row for row in rows if not options.tasks or row.task in options.tasks]
    print(f"\n{describe_host()}\n\n{table(shown)}")
    if options.notes:
        print("\n".join(f"- {r.task}, {r.recipe}: {note}" for r in shown for note in r.notes))


def _recipes(options: Any) -> list[str]:
    if options.recipes:
        return list(options.recipes)
    found = list(LADDER)
    if options.curve:
        found += [f"prune{p}{rest}" for rest in ("", "+int8") for p in PERCENT]
    return list(dict.fromkeys(found))


def ladder(
    task: Task, recipes: Iterable[str], folder: Path, rows: Iterable[Row], options: Any
) -> list[Row]:
    """The rows of one task, made and timed; those kept with a score are not made again."""
    known = {row.recipe: row for row in rows if row.task == task.name}
    found = [known.get(ORIGINAL) or _original(task)]
    for recipe in recipes:
        row = known.get(recipe)
        if (row is None or row.error) and options.only != "times":
            row = made(task, recipe, folder)
        if row is not None:
            found.append(row)
    if options.only != "scores":
        time_rows(task, found, options.budget)
    return found


def _original(task: Task) -> Row:
    row = Row(task.name, ORIGINAL, file=str(task.model))
    row.scores = task.score(session(task.model))
    (cost,) = edgepass.estimate(task.model, recipes=["default"]).rows
    row.parameters, row.macs = cost.parameters, cost.macs
    row.file_bytes = task.model.stat().st_size
    row.predicted_ms = cost.latency.ms
    return row


def made(task: Task, recipe: str, folder: Path) -> Row:
    """A model compiled, written and scored; or why not."""
    row = Row(task.name, recipe)
    started = time.perf_counter()
    try:
        compiled = edgepass.compile(
            task.model, recipe=recipe, calibration=task.calibration, time_budget_s=0, force=True
        )
        out = folder / f"{task.name}-{recipe.replace('+', '-and-')}.onnx"
        write_onnx(compiled.model, out)
        row.seconds = time.perf_counter() - started
        row.file, row.session = str(out), dict(compiled.session_options)
        cost = compiled.cost
        row.file_bytes, row.parameters = cost["file_bytes"], cost["parameters"]
        row.macs, row.predicted_ms = cost["macs"], cost["latency"]["ms"]
        row.notes = [*compiled.notes, *(n for line in compiled.ledger.rows for n in line.notes)]
        row.scores = task.score(OrtRunner(out, session_options=row.session).run)
    except EdgepassError as error:
        row.error = " ".join(str(error).split())
    return row


def time_rows(task: Task, rows: Iterable[Row], budget_s: float) -> None:
    """Milliseconds of all models of a task, in turns."""
    there = [row for row in rows if not row.error]
    runners = [OrtRunner(Path(row.file), session_options=row.session) for row in there]
    calls = [lambda runner=runner: runner.run(task.timing) for runner in runners]
    times = time_in_turns(calls, budget_s=budget_s)
    for row, ms in zip(there, times, strict=True):
        row.measured_ms, row.original_ms = ms, times[0]


def table(rows: Iterable[Row]) -> str:
    """Markdown: a line a model, scores with their differences to the original."""
    lines = [
        "| task | recipe | score | size | parameters | MACs | predicted, ms | measured, ms "
        "| of original |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    base: dict[str, Mapping[str, float]] = {}
    for row in rows:
        base.setdefault(row.task, row.scores)
        if row.error:
            lines.append(f"| {row.task} | {row.recipe} | {row.error[:200]} | | | | | | |")
            continue
        share = ""
        if row.measured_ms is not None and row.original_ms:
            share = f"{row.measured_ms / row.original_ms:.2f}"
        cells = (
            _scores(row.scores, base[row.task]),
            format_bytes(row.file_bytes),
            format_count(row.parameters),
            format_count(row.macs),
            "?" if row.predicted_ms is None else format_ms(row.predicted_ms),
            "" if row.measured_ms is None else format_ms(row.measured_ms),
            share,
        )
        lines.append(f"| {row.task} | {row.recipe} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _scores(scores: Mapping[str, float], base: Mapping[str, float]) -> str:
    parts = []
    for name, value in scores.items():
        change = "" if scores is base else f" ({value - base[name]:+.4f})"
        parts.append(f"{name} {value:.4f}{change}")
    return ", ".join(parts)


def _read(path: Path | None) -> list[Row]:
    if path is None or not path.exists():
        return []
    return [Row(**entry) for entry in json.loads(path.read_text(encoding="utf-8"))]


if __name__ == "__main__":
    main()

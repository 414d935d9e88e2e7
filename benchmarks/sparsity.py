"""Scores of trained models with half or three quarters of their weights zero, by method.

    python benchmarks/sparsity.py [TASK...] [--stories FOLDER] [--recipes R...] [--samples N]

Every task of `labelled_tasks`: the float model, then for each pattern (50 % unstructured, 2:4, 1:4)
magnitude, Wanda, SparseGPT (zeros compared within each output), and SparseGPT's zeros with what is
left solved again (`sparsify`'s default where there is calibration data). No training. Scores are on
the whole test data; calibration samples are never test data. `file` is what edgepass saves, zeros
packed away, of what it saves in float. Seconds are those of compiling.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from host import describe_host
from labelled_tasks import NotThere, Task, tasks

import edgepass
from edgepass.errors import EdgepassError
from edgepass.measuring import saved_bytes
from edgepass.targets.onnxruntime import OrtRunner

TASKS = ("minilm", "magika", "rapidocr_rec", "stories260k", "silero_vad_op18_ifless", "digits_cnn")
METHODS = (
    "method=magnitude",
    "method=wanda,solve=false",
    "method=sparsegpt,solve=false",
    "method=sparsegpt",
)
PATTERNS = ("ratio=0.5", "pattern=2:4", "pattern=1:4")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tasks", nargs="*", metavar="TASK")
    parser.add_argument("--stories", type=Path, help="the folder of stories260k")
    parser.add_argument("--recipes", nargs="*", default=recipes())
    parser.add_argument("--samples", type=int, default=0, help="of calibration; 0: all")
    options = parser.parse_args()
    print(describe_host())
    makers = tasks(options.stories)
    for name in options.tasks or TASKS:
        try:
            task = makers[name]()
        except NotThere as missing:
            print(f"\n{name}: left out, {missing}")
            continue
        _table(task, options.recipes, options.samples)


def recipes() -> list[str]:
    """Every method at every pattern."""
    return [f"sparsify{{{p},{m}}}" for p in PATTERNS for m in METHODS]


def _table(task: Task, wanted: list[str], samples: int) -> None:
    calibration = list(task.calibration)[: samples or None]
    print(f"\n{task.name}: {len(calibration)} calibration samples\n", flush=True)
    whole = 0
    for recipe in ["fp32", *wanted]:
        started = time.perf_counter()
        try:
            made = edgepass.compile(
                task.model, recipe=recipe, calibration=calibration, check_numerics=False
            )
        except EdgepassError as error:
            print(f"| {recipe} | {error.diagnostic.what} |", flush=True)
            continue
        seconds = time.perf_counter() - started
        size = saved_bytes(made.model)
        if not whole:
            whole = size
            score = _scores(task, made)
            print(f"| recipe | zeros | {' | '.join(score)} | file | s |")
            print("|---" * (len(score) + 4) + "|")
        else:
            score = _scores(task, made)
        cells = [recipe, _zeros(made), *(f"{value:.4f}" for value in score.values())]
        cells += [f"{size / whole:.2f}", f"{seconds:.0f}"]
        print(f"| {' | '.join(cells)} |", flush=True)


def _scores(task: Task, made: edgepass.CompiledModel) -> dict[str, float]:
    with OrtRunner(made.model, session_options=made.session_options, threads=1) as runner:
        return task.score(runner.run)


def _zeros(made: edgepass.CompiledModel) -> str:
    """The share that the pass itself reports."""
    notes = [n for row in made.ledger.rows if row.name.startswith("sparsify") for n in row.notes]
    return notes[0].split(" ")[0] if notes else ""


if __name__ == "__main__":
    main()

"""Residual blocks removed one after the other: what trained models lose, and what is in reach.

    python benchmarks/depth.py [--stories FOLDER] [--most K] [--by POLICY] [--repair] [TASK...]
    python benchmarks/depth.py --find MODEL.onnx ...

The first prints a table for each task: the pass `depth{blocks=k}` for k = 0 ... K without a limit
to the harm (`max_harm=-100`), the ratio of signal to error on the calibration samples, the scores
on test data, and milliseconds, all candidates timed in turns, one thread. `depth{}` with its
defaults is the last row. The second prints how many blocks each model has, and the share of its
multiply-accumulates that lies in them; weights may be missing.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from host import describe_host
from labelled_tasks import NotThere, Task, tasks

import edgepass
from edgepass.frontends import load_supported
from edgepass.passes.depth.blocks import find_blocks
from edgepass.passes.driver import run_passes
from edgepass.passes.probe import default_dims
from edgepass.pipelines import parse_recipe
from edgepass.speed import time_in_turns

NAMES = ("minilm", "rapidocr_rec", "magika", "stories260k", "silero_vad", "digits_cnn")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tasks", nargs="*", metavar="TASK")
    parser.add_argument("--stories", type=Path, help="the folder of stories260k")
    parser.add_argument("--most", type=int, default=4, help="blocks removed at most")
    parser.add_argument("--by", default="harm", help="harm, influence, last or random")
    parser.add_argument("--repair", action="store_true", help="scales and shifts")
    parser.add_argument("--find", nargs="+", type=Path, metavar="MODEL")
    options = parser.parse_args()
    if options.find:
        print("| model | blocks | share of MACs | sums refused |\n|---|---|---|---|")
        for path in options.find:
            print(in_reach(path), flush=True)
        return
    print(describe_host())
    makers = tasks(options.stories)
    rest = f"by={options.by},repair={str(options.repair).lower()},max_harm=-100"
    for name in options.tasks or NAMES:
        try:
            task = makers[name]()
        except NotThere as missing:
            print(f"\n{name}: left out, {missing}")
            continue
        recipes = [f"depth{{blocks={k},{rest}}}" for k in range(1, options.most + 1)]
        print(f"\n{name}\n", flush=True)
        table(task, ["default", *recipes, "depth"])


def in_reach(path: Path) -> str:
    """One model's line: its blocks after cleanup."""
    model = load_supported(str(path), weights_required=False)
    cleanup = parse_recipe("cleanup,duplicates")
    model, _ = run_passes(model, cleanup, quick=True)
    found = find_blocks(model, default_dims(model))
    share = "unknown" if found.share is None else f"{found.share:.0%}"
    return f"| {path.stem} | {len(found.blocks)} | {share} | {len(found.refused)} |"


def table(task: Task, recipes: Sequence[str]) -> None:
    """Score each recipe and time all of them in turns."""
    rows: list[tuple[str, Any, str, dict[str, float]]] = []
    for recipe in recipes:
        compiled = edgepass.compile(
            task.model, "x86_64", recipe=recipe, calibration=list(task.calibration), time_budget_s=0
        )
        notes = next((r.notes for r in compiled.ledger.rows if r.name.startswith("depth")), ())
        if recipe != "default" and not any(note.startswith("removed") for note in notes):
            print(f"{recipe}: {notes[0]}", flush=True)
            if "nothing to remove" in notes[0]:
                return
            continue
        rows.append((recipe, compiled, "; ".join(notes), task.score(compiled.run)))
        print(f"{recipe}: {rows[-1][3]} {rows[-1][2]}", file=sys.stderr, flush=True)
    times = time_in_turns([lambda c=c: c.run(task.timing) for _, c, *_ in rows], budget_s=2.0)
    print(f"| recipe | removed | outputs | {' | '.join(rows[0][3])} | ms |")
    print("|---" * (4 + len(rows[0][3])) + "|")
    for (recipe, _, notes, scores), ms in zip(rows, times, strict=True):
        removed = re.search(r"removed (\d+ of \d+).*?(\d+)% of the model", notes)
        text = f"{removed[1]}, {removed[2]} % of MACs" if removed else "none"
        left = re.findall(r"(-?[\d.]+ dB) at the outputs on", notes)
        numbers = " | ".join(f"{value:.4f}" for value in scores.values())
        short = re.sub(r"\{.*?(blocks=\d+).*\}", r" \1", recipe)
        print(
            f"| {short} | {text} | {left[0] if left else ''} | {numbers} | {ms:.3f} |", flush=True
        )


if __name__ == "__main__":
    main()

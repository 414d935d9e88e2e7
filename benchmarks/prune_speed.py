"""Whether predicted and measured speed of pruned models agree in order.

    python benchmarks/prune_speed.py [--keep FILE.jsonl] [--recipe RECIPE] MODEL.onnx ...

Each model, with weights drawn at random, is compiled at ratios 0, 10, ..., 70 %; the variants run
in turns in one process on one thread. A line gives predicted and measured milliseconds at each
ratio, Spearman's rank correlation between the two, and the worst case of a narrower model that is
slower than a wider one. The last line has the medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np
from host import describe_host
from random_weights import with_random_weights

import edgepass
from edgepass.passes.probe import working_sample
from edgepass.speed import time_in_turns
from edgepass.targets.onnxruntime import OrtRunner

RATIOS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--keep", type=Path, help="rows are added here, and not measured again")
    parser.add_argument("--budget", type=float, default=1.0, help="seconds of timing a variant")
    parser.add_argument("--recipe", default="prune{{ratio={ratio}}}", help="{ratio} is filled in")
    options = parser.parse_args()
    print(f"{describe_host()}\n")
    known = _read(options.keep)
    rows = []
    for path in options.models:
        row = known.get(path.stem) or measured(path, options.recipe, options.budget)
        if options.keep is not None and path.stem not in known:
            with options.keep.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        rows.append(row)
        print(_line(row), flush=True)
    agreement = [spearman(r["predicted"], r["measured"]) for r in rows]
    print(
        f"\n{len(rows)} models: Spearman median {statistics.median(agreement):.3f}, least "
        f"{min(agreement):.3f}; a narrower model is slower than a wider one by at most "
        f"{max(backwards(r['measured']) for r in rows) - 1:.1%}"
    )


def measured(path: Path, recipe: str, budget_s: float) -> dict[str, Any]:
    """One model at all ratios."""
    model = with_random_weights(path)
    feed = working_sample(model).feed
    made = [
        edgepass.compile(
            model,
            recipe=recipe.format(ratio=ratio) if ratio else "default",
            check_numerics=False,
        )
        for ratio in RATIOS
    ]
    runners = [OrtRunner(m.model, session_options=m.session_options) for m in made]
    calls = [lambda r=r: r.run(feed) for r in runners]
    for call in calls:
        call()
    return {
        "model": path.stem,
        "predicted": [m.cost["latency"]["ms"] for m in made],
        "measured": time_in_turns(calls, budget_s=budget_s),
    }


def spearman(a: list[float], b: list[float]) -> float:
    """Spearman's rank correlation, equal values at their mean rank."""
    from scipy.stats import spearmanr

    return float(spearmanr(np.round(a, 6), b).statistic)


def backwards(times: list[float]) -> float:
    """The most by which a model is slower than one that is wider."""
    return max(later / earlier for i, earlier in enumerate(times) for later in times[i:])


def _line(row: dict[str, Any]) -> str:
    pairs = zip(row["predicted"], row["measured"], strict=True)
    shown = "  ".join(f"{p:.2f}/{m:.2f}" for p, m in pairs)
    rank = spearman(row["predicted"], row["measured"])
    worst = backwards(row["measured"])
    return f"{row['model']:36s} {shown}  rank {rank:.3f}, backwards {worst:.3f}"


def _read(path: Path | None) -> dict[str, dict[str, Any]]:
    if path is None or not path.exists():
        return {}
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {row["model"]: row for row in rows}


if __name__ == "__main__":
    main()

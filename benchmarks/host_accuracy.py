"""Latency on this machine, predicted from architectures and measured with random weights.

    python benchmarks/host_accuracy.py --profile PROFILE.json --models MODEL.onnx ... \\
        [--threads 1 2] [--recipes fp32 int8] [--truths truths.json]

Make the profile first: `edgepass calibrate --target host -o PROFILE.json`. Each model is predicted
without its weights; then they are drawn at random, the recipe is applied (int8 with one random
calibration sample) and the result is timed in ONNX Runtime with the runtime's own defaults.
Sessions take turns, one that has just become active warms up for `--warm` seconds, and the time is
the fastest round's, a round's being that of its fastest run: other work on the machine only adds.
Where a reference network takes over a tenth longer meanwhile than it ever did, the model is
measured again, three times at the most. Printed are, for each number of threads and recipe: the
median absolute error, the share of models within 10 % and 20 %, Spearman's rank correlation and the
share of truths inside the 80 % intervals; and how often the sign of "int8 is slower than fp32" is
right where the difference exceeds 10 %. Then the same with the machine's own speed taken out: times
are multiplied by what the reference took when the profile was made over what it took meanwhile.
`--truths` keeps what was measured, so that another profile can be tried in seconds. The truths
depend on the machine being otherwise idle.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from host import describe_host

import edgepass
from edgepass.calibrating import prepared_recipes
from edgepass.cost.calibrate import reference_network
from edgepass.cost.microbench import Bench
from edgepass.cost.profile import load_profile
from edgepass.errors import EdgepassError
from edgepass.frontends import load_model
from edgepass.ir.random_weights import fill_random_weights
from edgepass.measuring import apply_recipe
from edgepass.passes.base import Context
from edgepass.passes.probe import working_sample
from edgepass.targets.onnxruntime import OrtRunner
from edgepass.targets.registry import get_target

Key = tuple[str, str, int]  # model, recipe, threads


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--profile", type=Path, required=True)
    parser.add_argument("--models", type=Path, nargs="+", required=True)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--recipes", nargs="+", default=["fp32", "int8"])
    parser.add_argument("--truths", type=Path, help="JSON: read if there, added to and written")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warm", type=float, default=0.1, help="seconds before each round")
    parser.add_argument("--limit", type=float, default=1e9, help="seconds of measuring, then stop")
    arguments = parser.parse_args()
    print(describe_host())
    truths, speeds = _read(arguments.truths)
    predictions: dict[Key, tuple[float, float, float]] = {}
    profile = load_profile(arguments.profile)
    end = time.monotonic() + arguments.limit
    reference = Reference(arguments.threads)
    for path in arguments.models:
        try:
            net = edgepass.Architecture(path)
            for threads in arguments.threads:
                found = net.estimate("host", arguments.recipes, threads=threads, profile=profile)
                for row in found.rows:
                    time_ = row.latency
                    if time_.ms is not None and time_.high_ms is not None:
                        key = path.stem, row.recipe, threads
                        predictions[key] = time_.ms, time_.low_ms or 0.0, time_.high_ms
            missing = [
                (recipe, threads)
                for recipe in arguments.recipes
                for threads in arguments.threads
                if (path.stem, recipe, threads) not in truths
            ]
            if missing and time.monotonic() < end:
                reference.now.clear()
                found = _measure(path, missing, arguments, reference)
                speeds[path.stem] = reference.now[min(arguments.threads)]
                for (recipe, threads), ms in found.items():
                    truths[path.stem, recipe, threads] = ms
                _write(arguments.truths, truths, speeds)
        except (EdgepassError, RuntimeError) as error:
            print(f"{path.stem:44} left out: {str(error).splitlines()[0]}", flush=True)
            continue
        print(_line(path.stem, predictions, truths), flush=True)
    _summary(predictions, truths, arguments)
    recorded = profile.host.get("reference_ms")
    if recorded and speeds:
        factors = {name: float(recorded) / ms for name, ms in speeds.items()}
        print(
            f"\nThe machine's speed taken out: it took {1 / max(factors.values()):.2f} to "
            f"{1 / min(factors.values()):.2f} times what it took when the profile was made"
        )
        adjusted = {key: ms * factors[key[0]] for key, ms in truths.items() if key[0] in factors}
        _summary(predictions, adjusted, arguments)


class Reference:
    """How slow the machine is just now, by a network that always takes equally long."""

    def __init__(self, threads: Sequence[int]) -> None:
        network = reference_network(prepared_recipes(get_target("host")))
        self.bench = Bench(threads, reference=network)
        self.best = {count: self.bench.reference(count) for count in threads}
        self.now: dict[int, float] = {}
        """The least since `now` was emptied."""

    def slowdown(self) -> float:
        """The worst over thread counts of its time now over the best ever."""
        worst = 1.0
        for count, best in self.best.items():
            now = self.bench.reference(count)
            self.now[count] = min(self.now.get(count, now), now)
            self.best[count] = min(best, now)
            worst = max(worst, now / self.best[count])
        return worst


def _measure(
    path: Path,
    wanted: Sequence[tuple[str, int]],
    arguments: argparse.Namespace,
    reference: Reference,
) -> dict[tuple[str, int], float]:
    """Milliseconds by recipe and threads."""
    target = get_target("host")
    model = load_model(path, weights_required=False)
    fill_random_weights(model)
    sample = working_sample(model)
    context = Context(target, [sample.feed], sample.dims)
    ready = {recipe: apply_recipe(model, recipe, context) for recipe, _ in wanted}
    runners = {
        key: OrtRunner(
            ready[key[0]],
            threads=key[1],
            session_options=edgepass.api.session_options(target, ready[key[0]]),
        )
        for key in wanted
    }
    found: dict[tuple[str, int], list[float]] = {key: [] for key in wanted}
    feed = {name: np.asarray(array) for name, array in sample.feed.items()}
    for _ in range(3):
        slow = reference.slowdown()
        for _ in range(arguments.rounds):
            for key, runner in runners.items():
                found[key].append(_least(lambda runner=runner: runner.run(feed), arguments.warm))
        if max(slow, reference.slowdown()) < 1.1:
            break
    for runner in runners.values():
        runner.close()
    return {key: min(times) for key, times in found.items()}


def _least(call: Callable[[], Any], warm: float) -> float:
    """The fastest of a few runs in milliseconds, after warming up.

    Another session's threads spin on for a while after its last run: that is waited for.
    """
    end = time.perf_counter() + warm
    call()
    while time.perf_counter() < end:
        call()
    times = []
    stop = time.perf_counter() + 0.15
    while len(times) < 3 or (time.perf_counter() < stop and len(times) < 30):
        started = time.perf_counter()
        call()
        times.append((time.perf_counter() - started) * 1e3)
    return min(times)


def _line(name: str, predictions: dict[Key, Any], truths: dict[Key, float]) -> str:
    cells = []
    for key, (ms, _, _) in predictions.items():
        if key[0] == name and key in truths:
            cells.append(f"{key[1]}/{key[2]} {truths[key]:8.2f} ms {ms / truths[key] - 1:+6.1%}")
    return f"{name:36} " + "  ".join(cells)


def _summary(
    predictions: dict[Key, tuple[float, float, float]],
    truths: dict[Key, float],
    arguments: argparse.Namespace,
) -> None:
    print("\nthreads recipe  models  median  <=10%  <=20%  Spearman  in interval  bias")
    for threads in arguments.threads:
        for recipe in arguments.recipes:
            keys = [k for k in predictions if k[1:] == (recipe, threads) and k in truths]
            if len(keys) < 3:
                continue
            truth = np.array([truths[key] for key in keys])
            ms, low, high = np.array([predictions[key] for key in keys]).T
            off = np.abs(ms / truth - 1)
            inside = np.mean((low <= truth) & (truth <= high))
            print(
                f"{threads:7} {recipe:7} {len(keys):6} {np.median(off):7.1%} "
                f"{np.mean(off <= 0.1):6.0%} {np.mean(off <= 0.2):6.0%} "
                f"{_spearman(ms, truth):9.4f} {inside:12.0%} {np.median(ms / truth) - 1:+6.1%}"
            )
    right = total = 0
    for (name, recipe, threads), prediction in predictions.items():
        other = name, "fp32", threads
        key = name, recipe, threads
        if recipe != "int8" or other not in predictions or not {key, other} <= truths.keys():
            continue
        ratio = truths[key] / truths[other]
        if abs(ratio - 1) > 0.1:
            total += 1
            right += (prediction[0] > predictions[other][0]) == (ratio > 1)
    if total:
        print(f"\nint8 slower or faster than fp32: {right} of {total} right ({right / total:.1%})")


def _spearman(left: np.ndarray, right: np.ndarray) -> float:
    ranks = [np.argsort(np.argsort(values)).astype(float) for values in (left, right)]
    return float(np.corrcoef(ranks)[0, 1])


def _read(path: Path | None) -> tuple[dict[Key, float], dict[str, float]]:
    """Milliseconds of models, and of the reference meanwhile."""
    if path is None or not path.is_file():
        return {}, {}
    rows = json.loads(path.read_text(encoding="utf-8"))
    truths = {(row["model"], row["recipe"], row["threads"]): row["ms"] for row in rows}
    return truths, {row["model"]: row["reference_ms"] for row in rows if row.get("reference_ms")}


def _write(path: Path | None, truths: dict[Key, float], speeds: dict[str, float]) -> None:
    if path is None:
        return
    rows = [
        {
            "model": model,
            "recipe": recipe,
            "threads": threads,
            "ms": ms,
            "reference_ms": speeds.get(model),
        }
        for (model, recipe, threads), ms in truths.items()
    ]
    path.write_text(json.dumps(rows, indent=0), encoding="utf-8")


if __name__ == "__main__":
    main()

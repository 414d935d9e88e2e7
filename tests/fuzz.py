"""Fuzzing: generated graphs through the lossless recipe, against the source run as it is.

    python tests/fuzz.py --count 100000 [--start 0] [--jobs 2] [--out fuzz-failures]

Each seed is one graph (`fuzz_graph`). Seeds are checked in worker processes, so that one that ends
the process is a failure like others; progress is kept in the folder, and a later run with the same
`--start` goes on from there. A failure is saved as `<seed>.onnx`, its inputs, what differs, the
guilty pass and, where the numbers differ, a smaller graph that shows it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np

from edgepass.errors import EdgepassError
from edgepass.frontends import load_model
from edgepass.passes.base import Context
from edgepass.passes.bisect import bisect_passes
from edgepass.passes.driver import run_passes
from edgepass.passes.equality.judge import compare
from edgepass.passes.equality.wide import Wide
from edgepass.pipelines import epilogue, parse_recipe
from edgepass.targets.onnxruntime import OrtRunner
from edgepass.targets.registry import get_target
from fuzz_graph import fuzz_case

RECIPE, TARGET = "optimize", "x86_64"
EXPLAINED = 1e-3
"""Rounding of the source itself, and what it makes of its inputs' last digit, excuse differences up
to this: convolutions of large numbers, of which a gate leaves the last digits."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """`kind` is equal, differs, raises, refused (by the runtime, after the passes), crashes, or
    invalid (the generated graph itself does not run)."""

    seed: int
    kind: str
    detail: str = ""
    nodes: tuple[int, int] = (0, 0)

    @property
    def failed(self) -> bool:
        return self.kind not in ("equal", "invalid")


def check(seed: int) -> Outcome:
    """One graph: built, run, optimized, run again, compared."""
    proto, feeds = fuzz_case(seed)
    content = proto.SerializeToString()
    try:
        with OrtRunner(content, optimize=False) as source:
            expected = [source.run(feed) for feed in feeds]
    except EdgepassError as error:
        return Outcome(seed, "invalid", str(error))
    try:
        model = load_model(proto)
        model, ledger = run_passes(model, _passes(), Context(get_target(TARGET)))
    except EdgepassError as error:
        return Outcome(seed, "raises", str(error))
    nodes = ledger.before.nodes, ledger.after.nodes
    try:
        with OrtRunner(model, optimize=False) as runner:
            actual = [runner.run(feed) for feed in feeds]
    except EdgepassError as error:
        return Outcome(seed, "refused", str(error), nodes)
    for feed, before, after in zip(feeds, expected, actual, strict=True):
        if list(before) != list(after):
            return Outcome(seed, "differs", f"outputs {list(after)}, not {list(before)}", nodes)
        found = compare(list(before.values()), list(after.values()))
        if not found.acceptable and found.error <= EXPLAINED:
            slack = _rounding(proto, feed, list(before.values()))
            found = compare(list(before.values()), list(after.values()), slack=slack)
        if not found.acceptable:
            name = list(before)[found.output]
            why = found.why or f"{found.error:.1e} of its range"
            return Outcome(seed, "differs", f"output {name!r}: {why}", nodes)
    return Outcome(seed, "equal", nodes=nodes)


def _passes():
    return [*parse_recipe(RECIPE), *epilogue()]


def _rounding(proto, feed, results) -> list[float]:
    with OrtRunner(proto.SerializeToString(), optimize=False) as narrow:
        return Wide(load_model(proto), narrow).own_errors(feed, results)


def save(outcome: Outcome, folder: Path) -> None:
    """Write what reproduces a failure."""
    folder.mkdir(parents=True, exist_ok=True)
    proto, feeds = fuzz_case(outcome.seed)
    (folder / f"{outcome.seed}.onnx").write_bytes(proto.SerializeToString())
    for index, feed in enumerate(feeds):
        np.savez(folder / f"{outcome.seed}.{index}.npz", **feed)
    report = [f"seed {outcome.seed}: {outcome.kind}", outcome.detail]
    if outcome.kind == "differs":
        for index, feed in enumerate(feeds):
            small = folder / f"{outcome.seed}.{index}"
            try:
                found = bisect_passes(
                    load_model(proto),
                    _passes(),
                    Context(get_target(TARGET)),
                    feed,
                    tolerance=1e-5,
                    out=small,
                )
            except EdgepassError as error:
                report.append(f"bisection of input {index}: {error}")
                continue
            report.append(f"input {index}: {found}")
    (folder / f"{outcome.seed}.txt").write_text("\n".join(report) + "\n")


# --- many --------------------------------------------------------------------------------------


def work(start: int, stop: int) -> None:
    """A worker: says which seed it is at, and each that is not equal, on its output."""
    for seed in range(start, stop):
        print(json.dumps({"at": seed}), flush=True)
        try:
            outcome = check(seed)
        except Exception as error:
            outcome = Outcome(seed, "raises", f"{type(error).__name__}: {error}")
        if outcome.kind != "equal":
            print(json.dumps(dataclasses.asdict(outcome)), flush=True)


class Run:
    """Seeds handed out in pieces to workers, and what came back."""

    def __init__(self, start: int, count: int, folder: Path) -> None:
        self.folder, self.start, self.stop = folder, start, start + count
        self.state = folder / f"progress-{start}.json"
        saved = json.loads(self.state.read_text()) if self.state.exists() else {}
        self.next = int(saved.get("next", start))
        self.counts: dict[str, int] = dict(saved.get("counts", {}))
        self.failures: list[Outcome] = []
        self.lock = threading.Lock()
        self.began, self.first = time.monotonic(), self.next
        self.finished = 0

    def loop(self, piece: int = 250) -> None:
        while True:
            with self.lock:
                start, stop = self.next, min(self.next + piece, self.stop)
                self.next = stop
            if start >= stop:
                return
            while start < stop:
                start = self._work(start, stop)
            self._report(piece)

    def _work(self, start: int, stop: int) -> int:
        """Run a worker; the seed to go on with."""
        command = [sys.executable, __file__, "--worker", str(start), str(stop)]
        at, bad = start, 0
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None
            for line in process.stdout:
                said = json.loads(line)
                if "at" in said:
                    at = said["at"]
                else:
                    bad += 1
                    self._add(Outcome(**{**said, "nodes": tuple(said["nodes"])}))
            code = process.wait()
        if code == 0:
            self._count("equal", stop - start - bad)
            return stop
        self._count("equal", at - start - bad)
        self._add(Outcome(at, "crashes", f"the process ended with {code}"))
        return at + 1

    def _add(self, outcome: Outcome) -> None:
        self._count(outcome.kind, 1)
        if outcome.failed:
            with self.lock:
                self.failures.append(outcome)
            print(f"\n{outcome.kind} {outcome.seed}: {outcome.detail.splitlines()[0]}", flush=True)
            if outcome.kind == "crashes":
                self.folder.mkdir(parents=True, exist_ok=True)
                path = self.folder / f"{outcome.seed}.txt"
                path.write_text(f"seed {outcome.seed}: {outcome.detail}\n")
            else:
                save(outcome, self.folder)

    def _count(self, kind: str, number: int) -> None:
        with self.lock:
            self.counts[kind] = self.counts.get(kind, 0) + number

    def _report(self, piece: int) -> None:
        with self.lock:
            self.finished += piece
            self.folder.mkdir(parents=True, exist_ok=True)
            self.state.write_text(json.dumps({"next": self.next, "counts": self.counts}))
            rate = self.finished / (time.monotonic() - self.began)
            text = ", ".join(f"{n} {kind}" for kind, n in sorted(self.counts.items()))
            print(f"\r{self.next} of {self.stop}  {rate:.0f}/s  {text}   ", end="", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--start", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, default=Path("fuzz-failures"))
    parser.add_argument("--seed", type=int, help="check this one alone, and save it if it fails")
    parser.add_argument("--worker", type=int, nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(*options.worker)
        return 0
    if options.seed is not None:
        outcome = check(options.seed)
        print(outcome.kind, outcome.detail)
        if outcome.failed:
            save(outcome, options.out)
        return int(outcome.failed)
    run = Run(options.start, options.count, options.out)
    threads = [threading.Thread(target=run.loop) for _ in range(options.jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    failed = sum(n for kind, n in run.counts.items() if kind not in ("equal", "invalid"))
    total = sum(run.counts.values())
    print(f"\n{total} graphs, {failed} failures{f': see {run.folder}' if failed else ''}")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())

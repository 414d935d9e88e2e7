"""Trained models, compiled in fp32, against their sources: on this machine and on emulated arm64.

The bound is 1e-4 of an output's range, over sequences of calls with carried state. The reference of
an ONNX file is ONNX Runtime with its optimizations off, that of a torch module torch itself.
`benchmarks/real_models.py` prints the errors.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

import edgepass
from edgepass.targets.emulator import EmulatedJob, EmulatedResult, Emulator
from real_models import (
    LOADERS,
    NotInstalled,
    RealModel,
    graph_source,
    real_model,
    reference_steps,
    relative_error,
    run_steps,
    unoptimized,
)

BOUND = 1e-4
HAS_TVM = importlib.util.find_spec("tvm") is not None
needs_tvm = pytest.mark.skipif(not HAS_TVM, reason="apache-tvm is not installed")
TVM_MODELS = ("silero_vad_openvino_16k", "crepe_tiny")
"""Quick ones; docs/tvm.md has the table of all."""


def loaded(name: str) -> RealModel:
    try:
        return real_model(name)
    except NotInstalled as missing:
        pytest.skip(str(missing))


def compiled_for(name: str, target: str) -> edgepass.Compiled:
    return edgepass.compile(graph_source(name), target, check_numerics=False, time_budget_s=0)


@pytest.mark.parametrize("name", LOADERS)
def test_the_inputs_mean_something_to_the_model(name: str):
    """Relative errors say little of a model that answers noise with next to nothing."""
    model = loaded(name)
    for run in model.runs:
        steps = reference_steps(model, run)
        outputs = np.concatenate([np.ravel(next(iter(step.values()))) for step in steps])
        assert np.isfinite(outputs).all()
        assert outputs.max() - outputs.min() > 0.05, run.name


@pytest.mark.parametrize("name", LOADERS)
def test_x86_64(name: str):
    model = loaded(name)
    compiled = compiled_for(name, "x86_64")
    for run in model.runs:
        results = run_steps(compiled.run, run)
        assert relative_error(reference_steps(model, run), results) <= BOUND, run.name


@pytest.mark.parametrize("name", ["crepe_tiny", "minilm"])
def test_a_module_s_export_in_onnx_runtime_is_a_second_reference(name: str):
    model = loaded(name)
    exported = unoptimized(ir.to_proto(graph_source(name)).SerializeToString())
    compiled = compiled_for(name, "x86_64")
    for run in model.runs:
        results = run_steps(compiled.run, run)
        assert relative_error(run_steps(exported, run), results) <= BOUND, run.name


@pytest.mark.parametrize("name", ["silero_vad_half", "magika"])
def test_the_user_s_call_with_all_its_checks(name: str):
    """`compile(path)` and nothing more: every pass's own error is measured, and small."""
    model = loaded(name)
    compiled = edgepass.compile(model.source)
    assert compiled.ledger.total_error is not None
    assert compiled.ledger.total_error.relative <= BOUND
    assert not [note for note in compiled.notes if "WARNING" in note]
    run = model.runs[0]
    assert relative_error(reference_steps(model, run), run_steps(compiled.run, run)) <= BOUND


def test_a_wrong_result_is_seen():
    """The comparison is over carried state, shapes and all outputs."""
    good = [{"y": np.array([0.0, 1.0]), "s": np.array(3.0)} for _ in range(2)]
    assert relative_error(good, good) == 0
    late = [good[0], {**good[1], "s": np.array(3.001)}]
    assert relative_error(good, late) == pytest.approx(0.001 / 3)
    assert relative_error(good, [good[0], {**good[1], "y": np.array([0.0])}]) == float("inf")
    assert relative_error(good, [good[0], {**good[1], "y": np.array([0, np.nan])}]) == float("inf")


# --- emulated arm64 --------------------------------------------------------------------------


def emulated_jobs(name: str, target: str, file: str, folder: Path) -> list[EmulatedJob]:
    model, compiled = real_model(name), compiled_for(name, target)
    artifact = compiled.save(folder / f"{name}-{target.replace('/', '-')}")
    return [
        EmulatedJob(
            name=f"{name} {run.name}",
            model=artifact / file,
            feeds=run.feeds,
            carry=run.carry,
            session_config=compiled.session_options,
        )
        for run in model.runs
    ]


@pytest.fixture(scope="module")
def emulated(
    emulator: Emulator, tmp_path_factory: pytest.TempPathFactory
) -> Mapping[str, list[EmulatedResult]]:
    """Results of every installed model, from one process of the emulated machine."""
    folder = tmp_path_factory.mktemp("arm64")
    jobs: list[EmulatedJob] = []
    for name in LOADERS:
        try:
            jobs += emulated_jobs(name, "arm64", "model.onnx", folder)
            if name in TVM_MODELS and HAS_TVM:
                jobs += emulated_jobs(name, "arm64/tvm", "model.so", folder)
        except NotInstalled:
            continue
    results: dict[str, list[EmulatedResult]] = {}
    for result in emulator.run_jobs(jobs, check=False):
        name = result.job.name.partition(" ")[0] + result.job.model.suffix
        results.setdefault(name, []).append(result)
    return results


def hold_against_source(name: str, results: list[EmulatedResult]) -> None:
    model = real_model(name)
    for run, result in zip(model.runs, results, strict=True):
        result.check()
        assert relative_error(reference_steps(model, run), result.outputs) <= BOUND, run.name


@pytest.mark.arm64
@pytest.mark.parametrize("name", LOADERS)
def test_arm64(name: str, emulated: Mapping[str, list[EmulatedResult]]):
    loaded(name)
    hold_against_source(name, emulated[f"{name}.onnx"])


# --- TVM -------------------------------------------------------------------------------------


@needs_tvm
@pytest.mark.parametrize("name", TVM_MODELS)
def test_x86_64_tvm(name: str):
    model = loaded(name)
    compiled = compiled_for(name, "x86_64/tvm")
    for run in model.runs:
        results = run_steps(compiled.run, run)
        assert relative_error(reference_steps(model, run), results) <= BOUND, run.name


@needs_tvm
@pytest.mark.arm64
@pytest.mark.parametrize("name", TVM_MODELS)
def test_arm64_tvm(name: str, emulated: Mapping[str, list[EmulatedResult]]):
    loaded(name)
    hold_against_source(name, emulated[f"{name}.so"])

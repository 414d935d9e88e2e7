"""The ONNX backend suite: what ONNX Runtime computes unoptimized, a compiled model computes too.

Every case of the onnx wheel that ONNX Runtime passes with its optimizations off, at the case's own
tolerance, must compile with the default recipe and give the expected outputs at that tolerance.
Exceptions stand in `backend_exceptions.toml` with their reasons.
"""

from __future__ import annotations

import functools
import tomllib
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import edgepass
from backend_cases import Case, all_cases, differences, feed_of, reference_outputs
from edgepass.errors import EdgepassError

CHUNKS = 20
EXCEPTIONS: dict[str, str] = tomllib.loads(
    Path(__file__).with_name("backend_exceptions.toml").read_text(encoding="utf-8")
)["exceptions"]
LEAST_PASSED = 1700
"""Cases that ONNX Runtime has passed at least (1845 of 2033 with onnx 1.23 and ORT 1.32): fewer
means that the reference is broken, and this test with it."""


@functools.cache
def reference_passes(case: Case) -> bool:
    """Whether ONNX Runtime, unoptimized, gives the outputs that the suite expects."""
    model = case.model()
    try:
        return not any(
            differences(case, expected, reference_outputs(model, inputs))
            for inputs, expected in case.data_sets()
        )
    except Exception:  # no kernel, or a type that its Python interface can't be given
        return False


def failure_of(case: Case) -> str:
    """How compiling and running a case fails, or ''."""
    model = case.model()
    outputs = [value.name for value in model.graph.output]
    try:
        compiled = edgepass.compile(
            model.SerializeToString(), "host", check_numerics=False, time_budget_s=0
        )
        for inputs, expected in case.data_sets():
            results = compiled.run(feed_of(model, inputs))
            found = differences(case, expected, [results[name] for name in outputs])
            if found:
                return found
    except EdgepassError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_what_onnx_runtime_passes_passes_compiled(chunk: int):
    failures = []
    for case in all_cases()[chunk::CHUNKS]:
        if not reference_passes(case):
            continue
        failure = failure_of(case)
        if case.name in EXCEPTIONS:
            if not failure:
                failures.append(f"{case.name}: passes, so take it out of the exceptions")
        elif failure:
            failures.append(f"{case.name}: {failure}")
    assert not failures, "\n".join(failures)


def test_the_reference_passes_most_cases():
    assert sum(map(reference_passes, all_cases())) >= LEAST_PASSED


def test_every_exception_is_a_case_with_a_reason():
    cases = {case.name: case for case in all_cases()}
    for name, reason in EXCEPTIONS.items():
        assert reason
        assert reference_passes(cases[name]), f"{name}: ONNX Runtime fails it too, so no exception"


def test_half_precision_is_judged_by_its_own_rounding():
    """Folding moves a rounding of this float16 attention: 3e-4 of its range, within one step."""
    (case,) = (c for c in all_cases() if c.name == "node/test_attention_4d_fp16_expanded")
    compiled = edgepass.compile(case.model().SerializeToString(), "host", time_budget_s=0)
    assert compiled.ledger.total_error is not None
    assert 0 < compiled.ledger.total_error.relative < np.finfo(np.float16).eps
    assert not [note for note in compiled.notes if "WARNING" in note]


def test_the_comparison_sees_a_difference():
    node = helper.make_node("Relu", ["x"], ["y"])
    infos = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [3]) for n in "xy"]
    graph = helper.make_graph([node], "g", infos[:1], infos[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    onnx.checker.check_model(model)
    x = np.array([-1, 0, 2], np.float32)
    for y, right in (([0, 0, 2], True), ([0, 0, 2.01], False), ([0, 0, np.nan], False)):
        data = [([x], [np.array(y, np.float32)])]
        case = Case("own", lambda data=data: (model, data), 1e-3, 1e-7)
        assert (failure_of(case) == "") is right
        assert reference_passes(case) is right

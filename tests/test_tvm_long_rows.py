"""Long rows in the TVM lowering: sums whose terms are small against the sum keep their digits."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

import edgepass

pytest.importorskip("tvm", reason="apache-tvm is not installed")

COLUMNS = 18_710
"""The classes of rapidocr's recognizer, whose probabilities showed it: 1e-4 off."""


def compiled(op: str, rows: str) -> edgepass.Compiled:
    text = f"""<ir_version: 9, opset_import: ["" : 18]>
    g (float[{rows},{COLUMNS}] x) => (float[{rows},K] y) <int64[1] last = {{-1}}> {{ y = {op} }}"""
    model = onnx.parser.parse_model(text)
    return edgepass.compile(model, "x86_64/tvm", check_numerics=False, time_budget_s=0)


@pytest.mark.parametrize("rows", ["3", "N"])
def test_softmax_sums_to_one(rows: str):
    """One class above thousands, each less than its last digit, together a few in ten thousand."""
    x = np.random.default_rng(0).normal(0, 0.5, (3, COLUMNS)).astype(np.float32)
    x[:, 7] = 17.5
    y = compiled("Softmax <axis = -1> (x)", rows).run({"x": x})["y"]
    wide = np.exp(x.astype(np.float64) - x.max(axis=1, keepdims=True))
    exact = wide / wide.sum(axis=1, keepdims=True)
    assert 1e-4 < 1 - exact.max() < 1e-2
    assert np.abs(y - exact).max() < 3e-6


def test_a_sum_of_one_large_and_many_small_numbers():
    x = np.full((2, COLUMNS), 3e-4, np.float32)
    x[:, 0] = 1e4
    y = compiled("ReduceSum (x, last)", "2").run({"x": x})["y"]
    exact = x.sum(axis=1, keepdims=True, dtype=np.float64)
    assert np.abs(y / exact - 1).max() < 2e-6

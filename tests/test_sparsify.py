"""Magnitude pruning: the share of zeros, which weights, and what the notes promise."""

from __future__ import annotations

import zlib

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgepass.errors import PassOptionError
from edgepass.ir.verify import verify
from edgepass.passes.base import Context
from edgepass.passes.prune.sparsify import Sparsify
from edgepass.targets.onnxruntime import OrtRunner
from test_quantize import conv_net, graph_of, images, normal


def two_matrices() -> ir.Model:
    return graph_of(
        [("MatMul", ["x", "v"], ["a"], {}), ("MatMul", ["a", "w"], ["y"], {})],
        {"x": ["n", 32]},
        {"y": ["n", 32]},
        {"v": normal(32, 32, seed=1), "w": normal(32, 32, seed=2, scale=0.01)},
    )


def zeros(model: ir.Model, name: str) -> float:
    return float((model.graph.initializers[name].const_value.numpy() == 0).mean())


@given(ratio=st.floats(0, 0.99), seed=st.integers(0, 100))
@settings(max_examples=40, deadline=None)
def test_the_share_of_zeros_is_exact_and_the_largest_stay(ratio, seed):
    model = two_matrices()
    before = normal(32, 32, seed=seed)
    model.graph.initializers["v"].const_value = ir.tensor(before)
    result = Sparsify(ratio=ratio).run(model, Context())
    after = model.graph.initializers["v"].const_value.numpy()
    count = round(ratio * before.size)
    assert (after == 0).sum() == count
    kept = after != 0
    np.testing.assert_array_equal(after[kept], before[kept])
    if 0 < count < before.size:
        assert np.abs(before[~kept]).max() <= np.abs(before[kept]).min()
    assert result.modified is (count > 0)


def test_global_scope_empties_the_small_tensor():
    model = two_matrices()
    Sparsify(ratio=0.5, scope="global").run(model, Context())
    assert zeros(model, "w") > 0.95
    assert zeros(model, "v") < 0.05


def test_ties_are_broken_by_position():
    model = two_matrices()
    model.graph.initializers["v"].const_value = ir.tensor(np.ones((32, 32), np.float32))
    Sparsify(ratio=0.25).run(model, Context())
    after = model.graph.initializers["v"].const_value.numpy()
    assert (after.reshape(-1)[:256] == 0).all()
    assert (after.reshape(-1)[256:] == 1).all()


def test_biases_and_small_weights_stay_and_the_model_runs():
    model = conv_net()
    result = Sparsify(min_elements=100).run(model, Context())
    verify(model)
    assert zeros(model, "w1") == zeros(model, "w5") == 0.5
    assert zeros(model, "w2") == 0  # 72 elements
    assert zeros(model, "b1") == 0
    assert OrtRunner(model).run(images(1)[0])["y"].shape == (2, 10)
    assert result.notes[-1] == "no faster on this target, smaller only when compressed"


def test_it_is_smaller_only_when_compressed():
    model, dense = two_matrices(), two_matrices()
    Sparsify(ratio=0.8).run(model, Context())
    sizes = []
    for item in (model, dense):
        raw = ir.to_proto(item).SerializeToString(deterministic=True)
        sizes.append((len(raw), len(zlib.compress(raw))))
    assert sizes[0][0] == sizes[1][0]
    assert sizes[0][1] < 0.5 * sizes[1][1]


def test_a_second_run_changes_nothing():
    model = two_matrices()
    assert Sparsify().run(model, Context()).modified
    assert not Sparsify().run(model, Context()).modified


def test_nothing_to_sparsify_says_so():
    result = Sparsify(min_elements=10**6).run(two_matrices(), Context())
    assert not result.modified
    assert "nothing to sparsify" in result.notes[0]


@pytest.mark.parametrize(
    "options", [{"ratio": 1.0}, {"ratio": -0.1}, {"scope": "layer"}, {"min_elements": -1}]
)
def test_bad_options_are_refused(options):
    with pytest.raises(PassOptionError):
        Sparsify(**options)

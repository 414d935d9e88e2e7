"""Every pass over generated graphs: interface and numerics kept, idempotent where it says so."""

import io

import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import edgepass
from edgepass import list_passes
from edgepass.frontends import load_model
from edgepass.ir.shapes import infer_shapes
from edgepass.ir.text import format_model
from edgepass.ir.verify import interface, interface_difference, verify
from edgepass.passes.base import Context
from edgepass.passes.driver import run_passes
from edgepass.passes.probe import Probe, numeric_error
from edgepass.passes.rules import RewriteRule
from edgepass.pipelines import parse_recipe
from edgepass.targets.onnxruntime import OrtRunner
from edgepass.targets.registry import get_target
from generated import feed_for, models

PASSES = {
    name: cls
    for name, cls in list_passes().items()
    if cls.__module__.startswith("edgepass.")
    # a rule is tested through its group; lossy passes have tests of their own, with bounds
    and not issubclass(cls, RewriteRule)
    and cls.lossless
}
QUICK = settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


def test_the_passes_of_the_main_job_are_covered():
    assert {"fold_branches", "fold_shapes", "fold_constants", "identities"} <= set(PASSES)
    assert {"duplicates", "dead_code"} <= set(PASSES)
    assert {"fold_affine", "gemm_forms", "fuse_activations", "legalize"} <= set(PASSES)


@pytest.mark.parametrize("name", sorted(PASSES))
@QUICK
@given(proto=models(), flag=st.integers(0, 1))
def test_a_lossless_pass_keeps_everything(name, proto, flag):
    model = load_model(proto)
    infer_shapes(model)
    probe = Probe(feed_for(proto, flag))
    before = probe.run(model)
    signature = interface(model.graph.inputs), interface(model.graph.outputs)
    context = Context(target=get_target("x86_64"), calibration=[feed_for(proto, flag)])

    result = PASSES[name]().run(model, context)

    verify(result.model)
    assert not interface_difference("input", signature[0], interface(result.model.graph.inputs))
    assert not interface_difference("output", signature[1], interface(result.model.graph.outputs))
    assert numeric_error(before, probe.run(result.model)).relative <= 1e-4
    if PASSES[name].idempotent:
        text = format_model(result.model)
        again = PASSES[name]().run(result.model, context)
        assert not again.modified, again.notes
        assert format_model(again.model) == text


@QUICK
@given(proto=models(max_steps=20), flag=st.integers(0, 1))
def test_the_default_recipe_keeps_everything_and_is_idempotent(proto, flag):
    model = load_model(proto)
    infer_shapes(model)
    probe = Probe(feed_for(proto, flag))
    before = probe.run(model)
    context = Context(target=get_target("x86_64"))

    compiled, ledger = run_passes(model, parse_recipe("default"), context, probe=probe)

    assert numeric_error(before, probe.run(compiled)).relative <= 1e-4
    assert ledger.after.nodes <= ledger.before.nodes
    text = format_model(compiled)
    again, _ = run_passes(compiled, parse_recipe("default"), context)
    assert format_model(again) == text


@QUICK
@given(proto=st.integers(7, 17).flatmap(lambda version: models(opset=version)))
def test_older_opsets_compile_to_the_same_results(proto):
    before = OrtRunner(proto.SerializeToString(), optimize=False).run(feed_for(proto))

    compiled = edgepass.compile(proto, "x86_64", check_numerics=False, time_budget_s=0)

    assert [v.name for v in compiled.model.graph.inputs] == [i.name for i in proto.graph.input]
    assert numeric_error(before, compiled.run(feed_for(proto))).relative <= 1e-4


@QUICK
@given(proto=models())
def test_shape_inference_agrees_with_the_runtime(proto):
    import numpy as np

    model = load_model(proto)
    infer_shapes(model)
    feed = feed_for(proto)
    results = Probe(feed).run(model)
    for value in model.graph.outputs:
        actual = np.asarray(results[value.name]).shape
        assert value.shape is not None
        assert len(value.shape) == len(actual)
        for known, dim in zip(value.shape.dims, actual, strict=True):
            assert not isinstance(known, int) or known == dim


@QUICK
@given(proto=models())
def test_the_same_model_compiles_to_the_same_bytes(proto):
    texts = []
    for _ in range(2):
        model, _ = run_passes(load_model(proto), parse_recipe("default"))
        stream = io.BytesIO(ir.to_proto(model).SerializeToString(deterministic=True))
        texts.append(stream.getvalue())
    assert texts[0] == texts[1]

"""`inspect`: what is matched, injected apart from accumulated error, and planted faults named."""

from __future__ import annotations

import functools
import json
import logging

import numpy as np
import onnx_ir as ir
import pytest

import edgepass
from edgepass.cli import main
from edgepass.errors import CalibrationError, UsageError
from edgepass.evaluation.drift import Drift, Extent, Rounding, ideal_quantizer
from edgepass.evaluation.internals_graph import Quantizer
from edgepass.evaluation.internals_weights import Weight, compare_weights
from edgepass.passes.base import Context
from edgepass.passes.quantize.dynamic_int8 import DynamicInt8
from edgepass.passes.quantize.half import Fp16
from edgepass.passes.quantize.weight_only import WeightOnly
from edgepass.targets.onnx_file import write_onnx
from planted_faults import (
    MODELS,
    graph_of,
    layers_of,
    lose_bias,
    normal,
    pairs_of,
    quantized,
    scale_activation,
    scale_weight,
    zero_channel,
)
from real_models import NotInstalled, graph_source, real_model


@functools.cache
def healthy(name: str):
    model, samples = MODELS[name]()
    return model, quantized(model, samples), samples[:5]


def close_to(found, value: str) -> bool:
    """Whether a culprit is about a value of the candidate, whatever the original calls it."""
    return value in (found.candidate, found.value)


def names(found) -> list[tuple[str, str]]:
    return [(c.candidate, c.cause) for c in found.culprits]


# --- healthy models give no alarm ------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("options", [{}, {"scheme": "s8s8"}, {"per_channel": False}], ids=str)
def test_no_alarm_on_healthy_int8(name, options):
    model, samples = MODELS[name]()
    found = edgepass.inspect(model, quantized(model, samples, **options), samples[:5])
    assert not found.culprits
    assert found.share == 1
    assert all(layer.injected.sqnr > 20 for layer in found.layers)
    assert "no layer is out of its expected range" in str(found)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "item", [DynamicInt8(), WeightOnly(bits=8), Fp16(arithmetic="yes")], ids=lambda x: x.name
)
def test_no_alarm_on_other_healthy_kinds(name, item):
    model, samples = MODELS[name]()
    copy = model.clone()
    item.run(copy, Context())
    found = edgepass.inspect(model, copy, samples[:5])
    assert not found.culprits
    assert found.layers[-1].accumulated.sqnr > 25


REAL = ["crepe_tiny", "magika", "rapidocr_cls"]


@functools.cache
def real(name: str):
    try:
        model, source = real_model(name), graph_source(name)
    except NotInstalled as missing:
        pytest.skip(str(missing))
    feeds = [feed for run in model.runs for feed in run.feeds][:3]
    made = edgepass.compile(
        source, "x86_64", recipe="int8", calibration=feeds, time_budget_s=0, check_numerics=False
    )
    return source, made, feeds


@pytest.mark.parametrize("name", REAL)
def test_no_alarm_on_trained_models(name):
    source, made, feeds = real(name)
    found = edgepass.inspect(source, made, feeds)
    assert names(found) == []
    assert found.share > 0.6


def test_a_lossless_candidate_is_exact():
    model, samples = MODELS["cnn"]()
    made = edgepass.compile(model, "x86_64", time_budget_s=0)
    found = edgepass.inspect(model, made, samples[:2])
    assert not found.culprits
    assert all(layer.injected.sqnr > 100 for layer in found.layers)


# --- planted faults are named ----------------------------------------------------------------


def faulty(name: str, plant) -> tuple[ir.Model, str]:
    """A copy with a fault, and the candidate's value that it is at."""
    copy = healthy(name)[1].clone()
    return copy, plant(copy)


def at_layer(index: int, fault):
    def plant(model: ir.Model) -> str:
        node = layers_of(model)[index]
        fault(node)
        return node.outputs[0].name

    return plant


def at_pair(index: int, factor: float):
    def plant(model: ir.Model) -> str:
        pair = pairs_of(model)[index]
        scale_activation(pair, factor)
        return pair.inputs[0].name

    return plant


FAULTS = {
    "weight 4x": (lambda n: scale_weight(n, 4, again=False), {"weight_scale"}),
    "weight 1/4": (lambda n: scale_weight(n, 0.25, again=False), {"weight_scale"}),
    "weight 4x, coarse": (lambda n: scale_weight(n, 4, again=True), {"weight_scale"}),
    "weight 1/4, clipped": (lambda n: scale_weight(n, 0.25, again=True), {"weight_scale"}),
    "channel clipped": (
        lambda n: scale_weight(n, 0.125, again=True, channel=3),
        {"saturated_weights"},
    ),
    "channel 4x": (lambda n: scale_weight(n, 4, again=False, channel=3), {"channel_scale"}),
    "channel zero": (lambda n: zero_channel(n, 3), {"dead_channel"}),
    "bias lost": (lose_bias, {"bias_lost"}),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", MODELS)
def test_a_fault_of_weights_is_named_and_nothing_else(name, fault):
    model, good, samples = healthy(name)
    plant, causes = FAULTS[fault]
    count = len(layers_of(good))
    for index in sorted({1, count - 1}):
        bad, value = faulty(name, at_layer(index, plant))
        found = edgepass.inspect(model, bad, samples)
        assert found.culprits, (fault, value)
        assert all(close_to(c, value) for c in found.culprits), (fault, value, names(found))
        assert causes & {c.cause for c in found.culprits}, (fault, value, names(found))


@pytest.mark.parametrize("factor", [4, 0.25])
@pytest.mark.parametrize("name", MODELS)
def test_a_wrong_scale_of_an_activation_is_named_with_its_factor(name, factor):
    model, good, samples = healthy(name)
    count = len(pairs_of(good))
    for index in sorted({0, count // 2, count - 1}):
        bad, value = faulty(name, at_pair(index, factor))
        found = edgepass.inspect(model, bad, samples)
        assert found.culprits, value
        assert all(close_to(c, value) for c in found.culprits), (value, names(found))
        first = found.culprits[0]
        size = "large" if factor > 1 else "small"
        assert first.cause == f"activation_scale_too_{size}"
        assert 0.6 < first.factor / factor < 1.7  # some samples of many: their range is smaller


@pytest.mark.parametrize("name", REAL)
def test_faults_in_trained_models_are_named(name):
    source, made, feeds = real(name)
    for index, factor in ((len(pairs_of(made.model)) // 2, 4), (1, 0.25)):
        bad = made.model.clone()
        pair = pairs_of(bad)[index]
        scale_activation(pair, factor)
        found = edgepass.inspect(source, bad, feeds)
        assert any(close_to(c, pair.inputs[0].name) for c in found.culprits[:2]), names(found)
    bad = made.model.clone()
    node = layers_of(bad)[len(layers_of(bad)) // 2]
    scale_weight(node, 4, again=False)
    found = edgepass.inspect(source, bad, feeds)
    first = found.culprits[0]
    assert close_to(first, node.outputs[0].name), names(found)
    assert first.cause == "weight_scale"
    assert 3 < first.factor < 5


def test_an_overflow_in_fp16_is_named():
    model = graph_of(
        [
            ("MatMul", ["x", "w"], ["a"], {}),
            ("Tanh", ["a"], ["t"], {}),
            ("MatMul", ["t", "v"], ["huge"], {}),
            ("Mul", ["huge", "small"], ["b"], {}),
            ("MatMul", ["b", "u"], ["y"], {}),
        ],
        {"x": ["n", 16]},
        {"y": ["n", 4]},
        {
            "w": normal(16, 16, scale=0.3),
            "v": normal(16, 16, seed=1, scale=2e4),
            "small": np.array(1e-5, np.float32),
            "u": normal(16, 4, seed=2),
        },
    )
    samples = [{"x": normal(4, 16, seed=i)} for i in range(4)]
    blind = model.clone()
    Fp16(arithmetic="yes").run(blind, Context())
    found = edgepass.inspect(model, blind, samples)
    assert [(c.layer, c.cause) for c in found.culprits] == [("n2_MatMul", "overflow")]
    assert "65504" in found.culprits[0].what
    assert "keep=['n2_MatMul']" in found.culprits[0].remedy
    assert found["n2_MatMul"].injected.not_finite > 0
    assert found["n3_Mul"].injected.not_finite == 0  # fed what fits, it is sound
    kept = model.clone()
    Fp16(arithmetic="yes").run(kept, Context(calibration=samples))
    assert not edgepass.inspect(model, kept, samples).culprits


def test_one_saturating_channel_of_an_activation_is_named():
    """A channel ten times as wide as the rest, and a range made for the rest."""
    weight = normal(16, 3, 3, 3, scale=0.3)
    weight[5] *= 10
    model = graph_of(
        [
            ("Conv", ["x", "w"], ["c"], {}),
            ("Relu", ["c"], ["r"], {}),
            ("Conv", ["r", "v"], ["y"], {}),
        ],
        {"x": ["n", 3, 10, 10]},
        {"y": ["n", 4, 8, 8]},
        {"w": weight, "v": normal(4, 16, 1, 1, seed=1)},
    )
    samples = [{"x": normal(2, 3, 10, 10, seed=i)} for i in range(6)]
    bad = quantized(model, samples)
    pair = next(p for p in pairs_of(bad) if p.inputs[0].name == "r")
    scale_activation(pair, 0.12)
    found = edgepass.inspect(model, bad, samples)
    (culprit,) = found.culprits
    assert (culprit.value, culprit.cause, culprit.channels) == ("r", "saturating_channel", (5,))
    assert found["r"].activation.clipped_share > 0.01


def test_a_concat_of_different_ranges_is_named():
    """Boxes in pixels beside scores: one scale leaves nothing of the scores."""
    model = graph_of(
        [
            ("Conv", ["x", "w"], ["boxes"], {}),
            ("Conv", ["x", "v"], ["logits"], {}),
            ("Sigmoid", ["logits"], ["scores"], {}),
            ("Concat", ["boxes", "scores"], ["head"], {"axis": 1}),
            ("Conv", ["head", "u"], ["y"], {}),
        ],
        {"x": ["n", 3, 8, 8]},
        {"y": ["n", 2, 8, 8]},
        {
            "w": normal(4, 3, 1, 1, scale=200),
            "v": normal(4, 3, 1, 1, seed=1),
            "u": normal(2, 8, 1, 1, seed=2),
        },
    )
    samples = [{"x": normal(2, 3, 8, 8, seed=i)} for i in range(6)]
    found = edgepass.inspect(model, quantized(model, samples), samples)
    mixing = [c for c in found.culprits if c.cause == "range_mixing"]
    assert [c.layer for c in mixing] == ["n3_Concat"]
    assert "'scores'" in mixing[0].what


def test_low_bits_and_per_tensor_weights_are_named():
    model, samples = MODELS["mlp"]()
    coarse = model.clone()
    for node in [n for n in coarse.graph if n.op_type == "Gemm"][1:2]:
        array = node.inputs[1].const_value.numpy()
        scale = np.abs(array).max() / 1
        node.inputs[1].const_value = ir.Tensor(
            (np.rint(array / scale) * scale).astype(np.float32), name=node.inputs[1].name
        )
    found = edgepass.inspect(model, coarse, samples[:3])
    assert {c.layer for c in found.culprits} == {"n2_Gemm"}
    uneven = model.clone()
    weight = next(n for n in uneven.graph if n.name == "n2_Gemm").inputs[1]
    gains = np.where(np.arange(64) % 8 == 0, 60.0, 1.0).astype(np.float32)
    weight.const_value = ir.Tensor(weight.const_value.numpy() * gains, name=weight.name)
    found = edgepass.inspect(uneven, quantized(uneven, samples, per_channel=False), samples[:3])
    assert ("n2_Gemm", "per_tensor_weights") in {(c.layer, c.cause) for c in found.culprits} | {
        (c.layer.replace("n3_Relu", "n2_Gemm"), c.cause) for c in found.culprits
    }


# --- injected and accumulated ----------------------------------------------------------------


def test_errors_compound_and_injected_ones_do_not():
    """Twelve equal noisy layers: each alone errs alike, the run ever more."""
    nodes, weights, last = [], {}, "x"
    for i in range(12):
        out = "y" if i == 11 else f"h{i}"
        nodes.append(("MatMul", [last, f"w{i}"], [out], {}))
        weights[f"w{i}"] = np.linalg.qr(normal(32, 32, seed=i))[0].astype(np.float32)
        last = out
    model = graph_of(nodes, {"x": ["n", 32]}, {"y": ["n", 32]}, weights)
    noisy = model.clone()
    for i, value in enumerate(noisy.graph.initializers.values()):
        array = value.const_value.numpy() + normal(32, 32, seed=900 + i, scale=0.01)
        value.const_value = ir.Tensor(array, name=value.name)
    samples = [{"x": normal(64, 32, seed=i)} for i in range(4)]
    found = edgepass.inspect(model, noisy, samples)
    injected = np.array([layer.injected.sqnr for layer in found.layers])
    accumulated = np.array([layer.accumulated.sqnr for layer in found.layers])
    assert np.ptp(injected) < 1.5
    expected = -10 * np.log10(32 * 0.01**2)  # orthogonal layers keep norms: noise is that of w
    assert abs(injected.mean() - expected) < 0.5
    compounding = injected[0] - 10 * np.log10(np.arange(1, 13))
    assert np.abs(accumulated - compounding).max() < 1.0


def test_a_fault_early_on_does_not_accuse_what_follows():
    model, _, samples = healthy("cnn")
    bad, value = faulty("cnn", at_layer(0, lambda n: scale_weight(n, 4, again=False)))
    found = edgepass.inspect(model, bad, samples)
    assert {c.candidate for c in found.culprits} == {value}
    after = [x for x in found.layers if x.candidate not in (value, "x")]
    assert all(x.injected.sqnr > 25 for x in after)
    assert all(x.accumulated.sqnr < 15 for x in after[:3])


# --- matching --------------------------------------------------------------------------------


def renamed(model: ir.Model) -> ir.Model:
    copy = model.clone()
    for i, node in enumerate(copy.graph):
        node.name = f"z{i}"
        for j, value in enumerate(node.outputs):
            value.name = f"t{i}_{j}"
    for i, value in enumerate(list(copy.graph.initializers.values())):
        value.name = f"k{i}"
    for i, value in enumerate(copy.graph.inputs):
        value.name = f"in{i}"
    return copy


@pytest.mark.parametrize("name", MODELS)
def test_a_candidate_with_other_names_is_matched_and_its_faults_named(name):
    model, good, samples = healthy(name)
    other = renamed(good)
    found = edgepass.inspect(model, other, samples)
    assert not found.culprits
    assert found.share == 1
    assert found.how["data"] > len(found.layers) / 2
    bad = other.clone()
    node = layers_of(bad)[1]
    scale_weight(node, 4, again=False)
    found = edgepass.inspect(model, bad, samples)
    assert found.culprits[0].candidate == node.outputs[0].name
    assert found.culprits[0].cause == "weight_scale"


@pytest.mark.parametrize("form", ["QDQ", "QOperator"])
@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("name", ["cnn", "mlp"])
def test_models_of_onnxruntimes_quantizer(name, per_channel, form, tmp_path):
    from onnxruntime import quantization as ort

    logging.disable(logging.WARNING)
    model, samples = MODELS[name]()
    write_onnx(model, tmp_path / "float.onnx")

    class Reader(ort.CalibrationDataReader):
        def __init__(self) -> None:
            self.samples = iter(samples)

        def get_next(self):
            return next(self.samples, None)

    ort.quantize_static(
        tmp_path / "float.onnx",
        tmp_path / "int8.onnx",
        Reader(),
        quant_format=ort.QuantFormat[form],
        per_channel=per_channel,
    )
    logging.disable(logging.NOTSET)
    found = edgepass.inspect(tmp_path / "float.onnx", tmp_path / "int8.onnx", samples[:4])
    assert not found.culprits
    assert found.share == 1
    assert all(w.bits == 8 for layer in found.layers for w in layer.weights)


def test_equalized_channels_are_no_faults():
    """Channels divided in one layer and multiplied in the next (Nagel et al. 2019)."""
    model, samples = MODELS["mlp"]()
    other = model.clone()
    gains = np.exp2(normal(64, seed=7)).astype(np.float32)
    values = other.graph.initializers
    changes = {
        "w1": values["w1"].const_value.numpy() / gains,
        "b1": values["b1"].const_value.numpy() / gains,
        "w2": values["w2"].const_value.numpy() * gains[:, None],
    }
    for key, array in changes.items():
        values[key].const_value = ir.Tensor(array.astype(np.float32), name=key)
    found = edgepass.inspect(model, other, samples[:4])
    assert not found.culprits
    assert found["r1"].rescaled
    assert found["h2"].injected.sqnr > 90


def test_subgraphs_are_noted_and_what_is_around_is_compared():
    text = """
    <ir_version: 10, opset_import: ["" : 18]>
    g (float[n,4] x, bool flag) => (float[n,4] y)
    <float[4,4] w = {1,2,3,4,5,6,7,8,9,8,7,6,5,4,3,2}> {
      h = MatMul (x, w)
      k = If (flag) <
        then_branch = t () => (float[n,4] p) { p = Relu (h) },
        else_branch = e () => (float[n,4] q) { q = Neg (h) }>
      y = Tanh (k)
    }
    """
    model = ir.from_onnx_text(text)
    samples = [{"x": normal(3, 4, seed=i), "flag": np.array(i % 2 == 0)} for i in range(4)]
    found = edgepass.inspect(model, model, samples)
    assert any("inside If" in note for note in found.notes)
    assert found["k"].injected.sqnr == float("inf")


def test_bad_calls_say_why():
    model, good, samples = healthy("mlp")
    with pytest.raises(UsageError, match="other inputs"):
        edgepass.inspect(model, two_inputs(), samples)
    with pytest.raises(CalibrationError):
        edgepass.inspect(model, good, [{"x": normal(2, 31)}])
    with pytest.raises(UsageError, match="no layer"):
        edgepass.inspect(model, good, samples[:1])["nothing"]


def two_inputs() -> ir.Model:
    return graph_of(
        [("Add", ["p", "q"], ["y"], {})], {"p": ["n", 5], "q": ["n", 5]}, {"y": ["n", 5]}, {}
    )


# --- what comes out --------------------------------------------------------------------------


def test_json_tables_plots_and_the_command(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    model, _, samples = healthy("cnn")
    bad, _ = faulty("cnn", at_layer(1, lambda n: scale_weight(n, 4, again=False)))
    write_onnx(model, tmp_path / "a.onnx")
    write_onnx(bad, tmp_path / "b.onnx")
    np.savez(tmp_path / "x.npz", x=np.concatenate([s["x"] for s in samples]))
    files = {name: str(tmp_path / name) for name in ("a.onnx", "b.onnx", "x.npz", "p", "f")}
    options = ["--data", files["x.npz"], "--plots", files["p"], "--json", files["f"]]
    assert main(["inspect", files["a.onnx"], files["b.onnx"], *options]) == 0
    shown = capsys.readouterr().out
    assert "weight scale" in shown
    assert "5 of 5 nodes with weights told apart" in shown
    data = json.loads((tmp_path / "f").read_text())
    assert (data["schema"], data["version"], data["samples"]) == ("edgepass.internals", 1, 10)
    assert data["culprits"][0]["cause"] == "weight_scale"
    layer = next(x for x in data["layers"] if x["weights"])
    assert sum(layer["activation"]["histogram"]["original"]) > 0
    assert {"injected", "accumulated", "computed", "how", "weights"} <= set(layer)
    pictures = sorted(p.name for p in (tmp_path / "p").iterdir())
    assert pictures[0] == "error-by-depth.png"
    assert len(pictures) == 2
    assert all((tmp_path / "p" / p).read_bytes()[:4] == b"\x89PNG" for p in pictures)


def test_memory_does_not_grow_with_samples():
    """28 further samples of 221 kB take less than four of their inputs would, kept whole."""
    import gc
    import tracemalloc

    model, good, _ = healthy("cnn")
    feed = normal(128, 3, 12, 12)
    sizes = []
    for count in (1, 4, 32):  # the first run fills caches
        gc.collect()
        tracemalloc.start()
        edgepass.inspect(model, good, [{"x": feed}] * count)
        sizes.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert sizes[2] - sizes[1] < 4 * feed.nbytes


# --- sums ------------------------------------------------------------------------------------


def test_drift_against_numpy():
    r = [normal(3, 4, 5, seed=i) for i in range(3)]
    gains, offsets = np.array([1, 2, 0.5, 1]), np.array([0, 1, 0, -1])
    x = [a * gains[:, None] + offsets[:, None] for a in r]
    drift = Drift(1)
    for a, b in zip(r, x, strict=True):
        drift.add(a, b)
    a, b = np.stack(r).astype(float), np.stack(x).astype(float)
    assert drift.sqnr == pytest.approx(10 * np.log10((a**2).sum() / ((a - b) ** 2).sum()))
    assert drift.cosine == pytest.approx((a * b).sum() / np.sqrt((a**2).sum() * (b**2).sum()))
    line = drift.line()
    assert line.gain == pytest.approx(gains, abs=1e-6)
    assert line.offset == pytest.approx(offsets, abs=1e-6)
    assert drift.worst == pytest.approx(np.abs(a - b).max())
    drift.add(np.ones((1, 4, 1)), np.full((1, 4, 1), np.inf))
    assert drift.broken == 4
    assert drift.sqnr == -np.inf


def test_rounding_of_an_ideal_quantizer_loses_what_theory_says():
    x = np.random.default_rng(0).uniform(-1, 1, (1, 100_000))
    extent = Extent(None)
    extent.add(x)
    like = Quantizer(np.array([1.0]), np.array([128]), ir.DataType.UINT8, 1)
    for factor in (1, 4, 0.25):
        ideal = ideal_quantizer(like, *extent.span)
        wrong = Quantizer(ideal.scale * factor, ideal.zero_point, ideal.dtype, 1)
        rounding = Rounding(wrong, extent)
        rounding.add(x)
        theory = 10 * np.log10((1 / 3) / ((2 / 255) ** 2 / 12))
        assert rounding.ideal_sqnr == pytest.approx(theory, abs=0.2)
        if factor == 4:
            assert rounding.sqnr == pytest.approx(theory - 20 * np.log10(4), abs=0.3)
        if factor == 0.25:
            assert rounding.clipped_share == pytest.approx(0.75, abs=0.01)


def test_weights_are_compared_up_to_gains_of_channels():
    ours = normal(8, 40)
    scale = np.abs(ours).max(axis=1, keepdims=True) / 127
    integers = np.rint(ours / scale)
    gains = np.exp2(normal(8, 1, seed=3))
    theirs = Weight("c", integers * scale * gains, 0, 8, integers, "channel")
    drift = compare_weights(Weight("o", ours, 0), theirs)
    assert abs(drift.sqnr - drift.ideal_sqnr) < 1.5
    assert drift.usage == 1
    assert not drift.dead
    assert not drift.saturated
    integers[2] = 0
    drift = compare_weights(Weight("o", ours, 0), Weight("c", integers * scale, 0, 8, integers))
    assert drift.dead == (2,)

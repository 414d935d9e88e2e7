"""Layers of static int8 one at a time: switches, automatic protection, `edgepass.sensitivity`."""

from __future__ import annotations

import contextlib
import json
import math

import numpy as np
import onnx_ir as ir
import pytest

import edgepass
from edgepass.cli import main
from edgepass.errors import SlowerError, UsageError
from edgepass.frontends import load_model
from edgepass.ir.graph import graph_tree
from edgepass.ir.shapes import infer_shapes
from edgepass.passes.base import Context
from edgepass.passes.quantize.sensitivity import divergence_on, layer_effects, protect
from edgepass.passes.quantize.static_int8 import StaticInt8
from edgepass.passes.quantize.switched import Switched, divergence_over
from edgepass.passes.spec import build_pass, parse_specs
from edgepass.search import layer_job
from edgepass.search.blame import find_blame
from edgepass.search.mixed import heads
from edgepass.targets.onnxruntime import OrtRunner
from subgraph_models import subgraph_model
from test_docs import blocks
from test_quantize import conv_net, graph_of, images, mlp, normal, sqnr, token_ids

TARGET = "x86_64-avx512"
SHAPE = [1, 8, 6, 6]
REGRESSION = 29


def weights(*names: str, channels: int = 8, kernel: int = 1) -> dict[str, np.ndarray]:
    shape = (channels, channels, kernel, kernel)
    scale = 1 / math.sqrt(channels * kernel * kernel)
    return {name: normal(*shape, seed=i + 1, scale=scale) for i, name in enumerate(names)}


def gate(*rows, **more: np.ndarray) -> ir.Model:
    """A convolution, what is in `rows` from `a` to `m`, and a convolution."""
    nodes = [("Conv", ["x", "u", "b"], ["a"], {}), *rows, ("Conv", ["m", "v"], ["y"], {})]
    values = {**weights("u", "v"), "b": normal(8, seed=2), **more}
    return graph_of(nodes, {"x": SHAPE}, {"y": SHAPE}, values)


def squeeze_and_excite() -> ir.Model:
    nodes = [
        ("Conv", ["x", "w1"], ["a"], {}),
        ("Relu", ["a"], ["r"], {}),
        ("ReduceMean", ["r"], ["g"], {"axes": [2, 3]}),
        ("Conv", ["g", "w2", "b"], ["h"], {}),
        ("Relu", ["h"], ["hr"], {}),
        ("Conv", ["hr", "w3"], ["i"], {}),
        ("HardSigmoid", ["i"], ["s"], {"alpha": 1 / 6}),
        ("Mul", ["r", "s"], ["m"], {}),
        ("Conv", ["m", "w2"], ["y"], {}),
    ]
    values = {**weights("w1", "w2", "w3"), "b": normal(8, seed=2)}
    return graph_of(nodes, {"x": SHAPE}, {"y": SHAPE}, values)


def residual_outputs() -> ir.Model:
    """One weight for three convolutions; values in 8 bits that are outputs as well."""
    nodes = [
        ("Conv", ["x", "w"], ["a"], {}),
        ("Relu", ["a"], ["r"], {}),
        ("Conv", ["r", "w"], ["c"], {}),
        ("Add", ["c", "r"], ["d"], {}),
        ("Conv", ["d", "w"], ["y"], {}),
    ]
    return graph_of(nodes, {"x": SHAPE}, {"y": SHAPE, "r": SHAPE, "d": SHAPE}, weights("w"))


def attention() -> ir.Model:
    nodes = [
        ("MatMul", ["x", "wq"], ["q"], {}),
        ("Add", ["q", "bq"], ["qb"], {}),
        ("MatMul", ["x", "wk"], ["k"], {}),
        ("Transpose", ["k"], ["kt"], {"perm": [0, 2, 1]}),
        ("MatMul", ["qb", "kt"], ["s"], {}),
        ("Softmax", ["s"], ["p"], {"axis": -1}),
        ("MatMul", ["x", "wv"], ["v"], {}),
        ("MatMul", ["p", "v"], ["o"], {}),
        ("MatMul", ["o", "wo"], ["oo"], {}),
        ("Add", ["oo", "bo"], ["ob"], {}),
        ("Add", ["ob", "x"], ["y"], {}),
    ]
    matrices = {
        n: normal(16, 16, seed=i, scale=0.25) for i, n in enumerate(("wq", "wk", "wv", "wo"))
    }
    biases = {"bq": normal(16, seed=8), "bo": normal(16, seed=9)}
    shape = [1, 7, 16]
    return graph_of(nodes, {"x": shape}, {"y": shape}, {**matrices, **biases})


FAMILIES = {
    "conv": conv_net,
    "mlp": mlp,
    "silu": lambda: gate(("Sigmoid", ["a"], ["s"], {}), ("Mul", ["a", "s"], ["m"], {})),
    "hard sigmoid": lambda: gate(
        ("HardSigmoid", ["a"], ["s"], {"alpha": 0.2, "beta": 0.3}), ("Mul", ["a", "s"], ["m"], {})
    ),
    "concat": lambda: gate(
        ("Concat", ["a", "k"], ["c"], {"axis": 1}),
        ("Conv", ["c", "t"], ["m"], {}),
        k=normal(1, 2, 6, 6, seed=4),
        t=normal(8, 10, 1, 1, seed=5, scale=0.3),
    ),
    "groups": lambda: gate(
        ("Conv", ["a", "t"], ["m"], {"group": 4, "pads": [1, 1, 1, 1]}),
        t=normal(8, 2, 3, 3, seed=5, scale=0.3),
    ),
    "squeeze": squeeze_and_excite,
    "outputs": residual_outputs,
    "attention": attention,
}


def feeds_of(model: ir.Model, count: int, seed: int = 0) -> list[dict[str, np.ndarray]]:
    if model.graph.inputs[0].name == "ids":
        return [token_ids(seed + i) for i in range(count)]
    shape = [d if isinstance(d, int) else 2 for d in model.graph.inputs[0].shape.dims]
    return [{"x": normal(*shape, seed=100 * seed + i + 50)} for i in range(count)]


def plain(**options) -> StaticInt8:
    """The pass with nothing but pairs: what the switches stand for."""
    given = {"protect": False, "leftovers": "float", "exclude": ("Gather",), **options}
    return StaticInt8(**given)


def switched_and_written(model: ir.Model, item: StaticInt8, feeds) -> tuple[Switched, ir.Model]:
    switched, _ = item.switched(model.clone(), Context(calibration=feeds))
    written = model.clone()
    item.run(written, Context(calibration=feeds))
    assert switched is not None
    return switched, written


def outputs(model: ir.Model, feed) -> list[np.ndarray]:
    with OrtRunner(model, optimize=False) as runner:
        return list(runner.run(feed).values())


def divergence(reference, found) -> float:
    return divergence_over([(reference, found)])


# --- the switches ------------------------------------------------------------------------------


def without_biases(model: ir.Model) -> ir.Model:
    """Every constant row zero: what is left is exact in int32."""
    for graph in graph_tree(model.graph):
        for value in graph.initializers.values():
            tensor = value.const_value
            if tensor.dtype == ir.DataType.FLOAT and len(tensor.shape) == 1:
                value.const_value = ir.Tensor(np.zeros_like(tensor.numpy()), name=value.name)
        for node in graph:
            if node.op_type == "Constant":
                tensor = node.attributes["value"].as_tensor()
                if tensor.dtype == ir.DataType.FLOAT and len(tensor.shape) == 1:
                    zeros = ir.Tensor(np.zeros_like(tensor.numpy()))
                    node.attributes["value"] = ir.AttrTensor("value", zeros)
    return model


def assert_float_and_written(model: ir.Model, item: StaticInt8, feeds, held_out, share) -> None:
    """All switches off is the float model; on, what is written, but for a `share` of elements that
    fall on the other side of a quantization step, which never makes much of a difference."""
    switched, written = switched_and_written(model, item, feeds)
    with switched:
        assert len(switched.units) >= 2
        for feed in held_out:
            float_, real = outputs(model, feed), outputs(written, feed)
            off, on = switched.run(feed, switched.none()), switched.run(feed, switched.every())
            for before, same, expected, found in zip(float_, off, real, on, strict=True):
                close = 1e-5 * max(float(np.ptp(before)), 1e-3)
                np.testing.assert_allclose(same, before, atol=close, rtol=1e-5)
                assert np.mean(np.abs(found - expected) > 10 * close) <= share
            assert divergence(real, on) <= max(0.5 * divergence(float_, real), 1e-9)


@pytest.mark.parametrize("scheme", ["u8s8", "s8s8"])
@pytest.mark.parametrize("family", FAMILIES)
def test_all_switches_on_is_the_written_model_and_all_off_is_float(family, scheme):
    item = plain(scheme=scheme, attention=family == "attention")
    for model, share in (
        (without_biases(FAMILIES[family]()), 0.01),
        (FAMILIES[family](), 1.0),  # int32 biases are rounded, and steps fall elsewhere
    ):
        assert_float_and_written(model, item, feeds_of(model, 4), feeds_of(model, 2, seed=1), share)


def test_a_hard_swish_differs_by_the_rounding_of_its_gate():
    model = gate(("HardSwish", ["a"], ["m"], {}))
    switched, written = switched_and_written(model, plain(), feeds_of(model, 4))
    with switched:
        for feed in feeds_of(model, 2, seed=1):
            (real,) = outputs(written, feed)
            (on,) = switched.run(feed, switched.every())
            assert np.abs(on - real).max() < 4 / 255 * np.ptp(real)


@pytest.mark.parametrize("seed", range(16))
def test_switches_inside_branches_and_loops(seed):
    model = load_model(subgraph_model(seed))
    infer_shapes(model)
    rng = np.random.default_rng(seed)

    def sample(value: ir.Value) -> np.ndarray:
        shape = tuple(int(d) for d in value.shape.dims)
        if value.dtype == ir.DataType.FLOAT:
            return rng.standard_normal(shape).astype(np.float32)
        if value.dtype == ir.DataType.BOOL:
            return np.asarray(rng.random(shape) < 0.5)
        return np.asarray(rng.integers(1, 4, shape), value.dtype.numpy())

    feeds = [{value.name: sample(value) for value in model.graph.inputs} for _ in range(8)]
    assert_float_and_written(
        without_biases(model), plain(recurrent="never"), feeds, feeds[:3], 0.02
    )


def test_values_of_one_name_in_branches_beside_each_other():
    """A Relu is absorbed, and the range of its name has the negative values of the other branch."""
    model = load_model(subgraph_model(2))
    infer_shapes(model)
    image = {"image": (2, 4, 6, 6), "matrix": (2, 16)}
    feeds = []
    for i in range(8):
        feed = {n: normal(*s, seed=i) for n, s in image.items()}
        for value in model.graph.inputs:
            if value.dtype == ir.DataType.BOOL:
                feed[value.name] = np.array(i % 2 == 0).reshape(value.shape.numpy())
            elif value.dtype == ir.DataType.INT64:
                feed[value.name] = np.full(value.shape.numpy(), 2, np.int64)
        feeds.append(feed)
    written = StaticInt8().run(model.clone(), Context(calibration=feeds)).model
    for feed in feeds[:4]:
        for expected, actual in zip(outputs(model, feed), outputs(written, feed), strict=True):
            assert sqnr(expected, actual) > 25


def test_a_layer_that_reads_nothing_to_observe():
    """The only value with a pair is a gate, whose range is known."""
    nodes = [
        ("Sigmoid", ["x"], ["s"], {}),
        ("Mul", ["x", "s"], ["z"], {}),
        ("MatMul", ["s", "w"], ["y"], {}),
    ]
    shape = [2, 16]
    model = graph_of(nodes, {"x": shape}, {"y": shape, "z": shape}, {"w": normal(16, 16)})
    feeds = [{"x": normal(2, 16, seed=i)} for i in range(4)]
    assert StaticInt8().run(model, Context(calibration=feeds)).modified
    assert [node.op_type for node in model.graph].count("QuantizeLinear") == 1


def test_one_switch_is_one_layer():
    model = FAMILIES["groups"]()
    feeds = feeds_of(model, 4)
    names = [node.name for node in model.graph]
    with plain().switched(model.clone(), Context(calibration=feeds))[0] as switched:
        assert [unit.name for unit in switched.units] == names
        assert all(unit.weighted for unit in switched.units)
        measure = divergence_on(switched, feeds)
        effects = layer_effects(switched, measure, leave_one_out=True)
        whole = measure(switched.every(), switched.every())
        for effect in effects:
            assert 0 < effect.alone < whole
            assert effect.without < 1.2 * whole
        # errors of layers are nearly independent: powers add up
        assert math.isclose(sum(e.alone for e in effects), whole, rel_tol=0.5)


def test_divergence_of_what_is_no_float_or_not_finite():
    a = np.array([1.0, 2.0, 4.0], np.float32)
    assert divergence([a], [a]) == 0
    assert divergence([a], [a * np.float32(np.nan)]) == math.inf
    assert divergence([np.array([1, 2, 3, 4])], [np.array([1, 2, 3, 5])]) == 0.25
    signal = float(np.sum((a - a.mean()) ** 2))
    assert divergence([a], [a + 1]) == pytest.approx(3 / signal)
    assert divergence([np.zeros((0, 2), np.float32)], [np.zeros((0, 2), np.float32)]) == 0


# --- automatic protection ------------------------------------------------------------------------


def chain(*, clip_after: int, layers: int = 8, channels: int = 16) -> ir.Model:
    """Convolutions in a row; a Clip behind that of `clip_after` takes spikes away. With 0, it is
    at the end: every layer sees them."""
    nodes, value = [], "x"
    for i in range(layers):
        last = i == layers - 1
        out = "y" if last and clip_after else f"c{i}"
        nodes.append(("Conv", [value, f"w{i}"], [out], {}))
        value = out
        if i + 1 == (clip_after or layers):
            result = "y" if last else f"d{i}"
            nodes.append(("Clip", [value, "low", "high"], [result], {}))
            value = result
    shape = [1, channels, 8, 8]
    values = weights(*(f"w{i}" for i in range(layers)), channels=channels)
    bounds = {"low": np.array(-3, np.float32), "high": np.array(3, np.float32)}
    return graph_of(nodes, {"x": shape}, {"y": shape}, {**values, **bounds})


def spiky(count: int, *, seed: int = 0, channels: int = 16, height: float = 1e4):
    """Samples in which one place of all channels is huge: no scale of channels evens that out."""
    found = []
    for i in range(count):
        x = normal(1, channels, 8, 8, seed=seed + i)
        x[0, :, i % 8, 3] = height * np.sign(x[0, :, i % 8, 3])
        found.append({"x": x})
    return found


def protected(model: ir.Model, feeds, **options):
    switched, _ = plain(**options).switched(model.clone(), Context(calibration=feeds))
    with switched:
        return protect(switched, feeds)


def integer_weights(model: ir.Model) -> list[str]:
    """The layers whose weights are 8 bits in front of the node, in front of a DequantizeLinear."""
    return [
        node.name
        for graph in graph_tree(model.graph)
        for node in graph
        if node.op_type in ("Conv", "Gemm", "MatMul")
        and node.inputs[1].producer() is not None
        and node.inputs[1].producer().op_type == "DequantizeLinear"
    ]


def test_the_layer_with_the_outliers_is_the_one_kept_float():
    model, feeds = chain(clip_after=1), spiky(8)
    found = protected(model, feeds)
    assert found.names == ("n0_Conv",)
    assert found.before > 0.5
    assert found.after < 0.02
    assert "1 of 8 layers kept float" in found.notes[0]
    result = StaticInt8().run(model, Context(calibration=feeds))
    model = result.model
    assert integer_weights(model) == [f"n{i}_Conv" for i in range(2, 9)]
    assert any("n0_Conv" in note for note in result.notes)
    for feed in spiky(3, seed=90):
        (expected,), (actual,) = outputs(chain(clip_after=1), feed), outputs(model, feed)
        assert sqnr(expected, actual) > 14


def test_a_healthy_net_is_left_alone():
    model = conv_net()
    found = protected(model, images(6))
    assert found.names == ()
    assert found.before == found.after < 0.01
    a = StaticInt8(observer="minmax").run(conv_net(), Context(calibration=images(6))).model
    item = StaticInt8(observer="minmax", protect=False)
    b = item.run(conv_net(), Context(calibration=images(6))).model
    assert ir.serde.serialize_model(a).SerializeToString() == (
        ir.serde.serialize_model(b).SerializeToString()
    )


def test_a_model_that_no_layer_saves_is_computed_in_float():
    model, feeds = chain(clip_after=0, layers=5), spiky(8)
    found = protected(model, feeds)
    assert set(found.names) == {f"n{i}_Conv" for i in range(5)}
    assert found.before > 0.5
    assert found.after == 0
    result = StaticInt8().run(model, Context(calibration=feeds))
    model = result.model
    assert not any(node.op_type == "QuantizeLinear" for node in model.graph)
    assert any("kept float" in note for note in result.notes), result.notes
    feed = feeds[3]
    (expected,), (actual,) = outputs(chain(clip_after=0, layers=5), feed), outputs(model, feed)
    assert sqnr(expected, actual) > 20
    stored = {v.const_value.dtype for v in model.graph.initializers.values()}
    assert ir.DataType.INT8 in stored  # weights did no harm: 8 bits in the file


def test_protection_is_deterministic():
    written = []
    for _ in range(2):
        model = chain(clip_after=1)
        model = StaticInt8().run(model, Context(calibration=spiky(8))).model
        written.append(ir.serde.serialize_model(model).SerializeToString())
    assert written[0] == written[1]
    assert protected(chain(clip_after=1), spiky(8)) == protected(chain(clip_after=1), spiky(8))


def with_wild_weights() -> ir.Model:
    """The first layer has a weight in each channel, for an input that is zero, that is huge."""
    model = chain(clip_after=1)
    value = model.graph.initializers["w0"]
    array = value.const_value.numpy().copy()
    array[:, 0] = 1e4
    value.const_value = ir.Tensor(array, name="w0")
    return model


def test_weights_that_do_no_harm_are_stored_small_and_others_are_not():
    harmless = chain(clip_after=1)
    found = protected(harmless, spiky(8))
    assert found.storable == {"n0_Conv"}
    harmless = StaticInt8().run(harmless, Context(calibration=spiky(8))).model
    assert harmless.graph[0].op_type != "Conv"  # unpacked in front of it
    assert "w0" not in harmless.graph.initializers

    feeds = spiky(8, height=1.0)
    for feed in feeds:
        feed["x"][:, 0] = 0
    harmful = with_wild_weights()
    found = protected(harmful, feeds)
    assert found.names == ("n0_Conv",)
    assert found.storable == frozenset()
    harmful = StaticInt8().run(harmful, Context(calibration=feeds)).model
    assert harmful.graph.initializers["w0"].const_value.dtype == ir.DataType.FLOAT
    (expected,), (actual,) = outputs(with_wild_weights(), feeds[0]), outputs(harmful, feeds[0])
    assert sqnr(expected, actual) > 18


def test_nodes_without_names_are_excluded_by_their_results():
    model = chain(clip_after=1)
    for node in model.graph:
        node.name = ""
    found = protected(model, spiky(8))
    assert found.names == ("c0",)
    plan = StaticInt8(exclude=found.names).plan(model, Context())
    assert "c0" not in plan.nodes
    assert "c1" in plan.nodes


# --- the public call -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def planted():
    return edgepass.sensitivity(chain(clip_after=1), TARGET, calibration=spiky(12))


def test_the_planted_layer_leads_the_table(planted):
    assert len(planted.layers) == 8
    assert [layer.depth for layer in planted.layers] == list(range(8))
    worst = planted.ranked[0]
    assert worst.name == "n0_Conv"
    assert worst.alone.sqnr_db < 5 < 20 < planted.ranked[1].alone.sqnr_db
    assert worst.without.sqnr_db > 15
    assert all(layer.without.sqnr_db < 5 for layer in planted.ranked[1:])
    assert planted.every.sqnr_db < 5
    assert sum(layer.macs for layer in planted.layers) == pytest.approx(1)
    assert planted.runs == 18 * planted.samples
    with pytest.raises(UsageError, match="no layer"):
        planted["nothing"]


def test_the_fewest_layers_for_a_limit(planted):
    choice = planted.mixed(15)
    assert choice
    assert choice.names == ("n0_Conv",)
    assert choice.recipe == 'int8{exclude=["n0_Conv"],protect=false}'
    assert choice.macs == pytest.approx(1 / 8)
    more = planted.mixed(40)
    assert len(more.names) > 1
    assert more.outcome.sqnr_db >= 40
    assert planted.mixed(5000, at_most=2).met is False
    assert not planted.mixed(15, at_most=0)
    assert not planted.mixed(15, macs=0.1)  # the guilty layer is an eighth


def test_a_choice_is_what_its_recipe_compiles(planted):
    choice = planted.mixed(15)
    model = chain(clip_after=1)
    compiled = edgepass.compile(
        model, TARGET, recipe=choice.recipe, calibration=spiky(12), force=True, time_budget_s=0
    )
    assert integer_weights(compiled.model) == [f"n{i}_Conv" for i in range(2, 9)]
    samples = spiky(12)
    error = divergence_over(
        (outputs(model, feed), list(compiled.run(feed).values())) for feed in samples
    )
    assert -10 * math.log10(error) == pytest.approx(choice.outcome.sqnr_db, abs=0.5)


def test_a_budget_without_a_limit_goes_to_the_worst(planted):
    choice = planted.mixed(at_most=1)
    assert choice
    assert choice.names == ("n0_Conv",)
    assert planted.mixed(macs=0.13).names == ("n0_Conv",)
    assert planted.mixed(at_most=0).names == ()
    for bad in ({"at_most": -1}, {"macs": 1.5}):
        with pytest.raises(UsageError):
            planted.mixed(**bad)
    with pytest.raises(UsageError, match="Without an evaluation"):
        planted.mixed({"accuracy": -0.1})


def test_table_data_and_picture(planted, tmp_path):
    text = str(planted)
    lines = text.splitlines()
    assert lines[3].startswith("n0_Conv")
    assert any(line.startswith("all in 8 bits") for line in lines)
    data = json.loads(json.dumps(planted.as_dict()))
    assert (data["schema"], data["schema_version"]) == ("edgepass.sensitivity", 1)
    assert data["ranked"][0] == "n0_Conv"
    assert data["layers"][0]["alone"]["sqnr_db"] == planted.layers[0].alone.sqnr_db
    assert "2 more" in _text(planted.table(6))
    pytest.importorskip("matplotlib")
    assert planted.save_plot(tmp_path / "a" / "depth.png").stat().st_size > 5000


def _text(table) -> str:
    from rich.console import Console

    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(table)
    return console.export_text()


def labelled(count: int, seed: int):
    """Spiky samples; the label is the channel whose mean over what is left is the largest."""
    feeds = spiky(count, seed=seed)
    model = chain(clip_after=1)
    with OrtRunner(model) as runner:
        means = [next(iter(runner.run(feed).values())).mean((2, 3))[0] for feed in feeds]
    return feeds, np.array([mean.argmax() for mean in means])


def channel_means(found):
    return found["y"].mean((2, 3))


def test_the_users_metric_decides():
    feeds, labels = labelled(40, seed=300)
    evaluation = edgepass.Evaluation(
        data=iter(feeds),
        labels=labels,
        metrics=["accuracy"],
        predict=channel_means,
        limits={"accuracy": -0.2},
    )
    said = []
    found = edgepass.sensitivity(
        chain(clip_after=1),
        TARGET,
        calibration=spiky(12),
        evaluate=evaluation,
        progress=lambda done, total, what: said.append(what),
    )
    assert any("8 layers, 17 variants on 40 samples: 720 runs" in what for what in said)
    assert found.higher == {"accuracy": True}
    assert found["n0_Conv"].alone.changes["accuracy"] < -0.4
    assert (
        found["n1_Conv" if "n1_Conv" in str(found) else "n2_Conv"].alone.changes["accuracy"] > -0.2
    )
    assert found.ranked[0].name == "n0_Conv"
    choice = found.mixed()
    assert choice
    assert choice.names == ("n0_Conv",)
    assert choice.outcome.changes["accuracy"] >= -0.2
    assert not found.mixed({"accuracy": ">= 2"})
    assert found.mixed(-0.9).names == ()
    assert found.mixed({"sqnr_db": ">= 12"}).names == ("n0_Conv",)


def test_runs_are_bounded(monkeypatch):
    feeds = spiky(12)
    few = edgepass.sensitivity(chain(clip_after=1), TARGET, calibration=feeds, max_runs=60)
    assert few.samples == 3
    assert few.runs <= 60
    assert any("3 of 12 calibration samples" in note for note in few.notes)
    with pytest.raises(UsageError, match="too many"):
        edgepass.sensitivity(chain(clip_after=1), TARGET, calibration=feeds, max_runs=17)
    evaluation = edgepass.Evaluation(data=feeds)
    with pytest.raises(UsageError, match="max_runs is 100"):
        edgepass.sensitivity(
            chain(clip_after=1), TARGET, calibration=feeds, evaluate=evaluation, max_runs=100
        )
    monkeypatch.setattr(layer_job, "_TOO_LARGE", 100)
    with pytest.raises(UsageError, match="too large"):
        edgepass.sensitivity(chain(clip_after=1), TARGET, calibration=feeds)


def test_what_has_no_layers_is_said():
    nodes = [("Relu", ["x"], ["r"], {}), ("Sigmoid", ["r"], ["y"], {})]
    model = graph_of(nodes, {"x": [1, 4]}, {"y": [1, 4]}, {})
    with pytest.raises(UsageError, match="No layer of this model"):
        edgepass.sensitivity(model, TARGET, calibration=[{"x": normal(1, 4)}])
    with pytest.raises(UsageError, match="no static int8"):
        edgepass.sensitivity(conv_net(), TARGET, calibration=images(2), recipe="fp16")


def test_options_and_passes_before_stay_in_the_recipe():
    recipe = 'smooth_quant+int8{observer="mse",exclude=["n0_Conv"]}'
    found = edgepass.sensitivity(conv_net(), TARGET, calibration=images(4), recipe=recipe)
    assert "n0_Conv" not in {layer.name for layer in found.layers}
    choice = found.mixed(0)
    assert choice.recipe == ('smooth_quant+int8{observer="mse",exclude=["n0_Conv"],protect=false}')
    (spec,) = parse_specs(planted_text(choice.recipe))
    assert build_pass(StaticInt8, spec) == StaticInt8(
        observer="mse", exclude=("n0_Conv",), protect=False
    )


def planted_text(recipe: str) -> str:
    return recipe.partition("+")[2]


def test_two_runs_agree(planted):
    again = edgepass.sensitivity(chain(clip_after=1), TARGET, calibration=spiky(12))
    assert again.layers == planted.layers
    assert again.every == planted.every


def test_a_sweep_blames_by_trying_where_nothing_inside_is_known(monkeypatch, tmp_path):
    def unknown(*given):
        raise UsageError("Nothing inside can be told apart")

    monkeypatch.setattr("edgepass.evaluation.internals.inspect", unknown)
    feeds = spiky(8)
    given = chain(clip_after=1), tmp_path, edgepass.Evaluation(data=feeds), feeds
    found = find_blame(*given, "int8", TARGET)
    assert found.layers[0].layer == "n0_Conv"
    assert "exclude=['n0_Conv']" in found.layers[0].remedy
    assert not found.unknown
    for recipe in ("", "fp16"):
        found = find_blame(*given, recipe, TARGET)
        assert found.layers == ()
        assert "Nothing inside" in found.unknown


@pytest.mark.parametrize(("most", "sizes"), [(0, [0]), (1, [0, 1]), (5, [0, 1, 2, 3, 4, 5])])
def test_heads_end_at_the_most(most, sizes):
    assert heads(most) == sizes
    assert heads(40)[-1] == 40


def test_the_examples_of_the_docs(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    model = chain(clip_after=1)
    model.graph[0].name = "conv3"
    ir.save(model, "model.onnx")
    feeds, _ = labelled(8, seed=300)
    test = np.concatenate([feed["x"] for feed in feeds])
    labels = np.arange(8)
    names = {
        "edgepass": edgepass,
        "calibration": np.concatenate([feed["x"] for feed in spiky(8)]),
        "test": test,
        "labels": labels,
    }
    first, second, *_ = blocks("docs/sensitivity.md")
    with contextlib.suppress(SlowerError):  # what is timed here is up to the machine
        exec(first, names)
    assert names["choice"].names[0] == "conv3"
    assert "all in 8 bits" in capsys.readouterr().out
    exec(
        second.replace("labels=labels,", "labels=labels, predict=means,"),
        {**names, "means": channel_means},
    )


def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    ir.save(chain(clip_after=1), "model.onnx")
    feeds, labels = labelled(20, seed=300)
    np.savez("calib.npz", x=np.concatenate([feed["x"] for feed in spiky(12)]))
    np.savez("test.npz", x=np.concatenate([feed["x"] for feed in feeds]), labels=labels)
    (tmp_path / "of_channels.py").write_text(
        "def means(found):\n    return found['y'].mean((2, 3))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    base = ["sensitivity", "model.onnx", "--calibration", "calib.npz", "-t", TARGET]
    assert main([*base, "--db", "15", "--json", "found.json"]) == 0
    told = capsys.readouterr()
    assert 'int8{exclude=["n0_Conv"],protect=false}' in told.out
    assert "8 layers, 17 variants" in told.err
    data = json.loads((tmp_path / "found.json").read_text())
    assert data["mixed"]["names"] == ["n0_Conv"]
    assert main([*base, "--db", "15", "--at-most", "0"]) == REGRESSION
    assert "No choice of layers" in capsys.readouterr().err
    measured = [*base, "--data", "test.npz", "--metric", "accuracy"]
    measured += ["--predict", "of_channels:means"]
    assert main([*measured, "--limit", "accuracy=-0.25", "--mixed", "--json", "-"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["mixed"]["names"] == ["n0_Conv"]
    assert main([*base, "--metric", "accuracy"]) == 2
    assert main([*measured, "--db", "15"]) == 2
    assert main([*base, "--recipe", "fp16"]) == 2

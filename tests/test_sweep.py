"""Sweeps: what is tried, what is kept, what is judged, and what is chosen."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

import edgepass
from edgepass.cli import main
from edgepass.cost.budget import Answer, Verdict
from edgepass.errors import UsageError
from edgepass.evaluation.report import (
    EXCEEDS,
    NO_LIMITS,
    WITHIN,
    Estimate,
    LimitResult,
    MetricResult,
    Rung,
)
from edgepass.search import fingerprint, recipes
from edgepass.search.blame import Blame, Found
from edgepass.search.cache import Cache
from edgepass.search.choice import choose, nearest
from edgepass.search.pareto import front
from edgepass.search.recipes import ModelFacts, as_recipes, model_facts, ptq_recipes
from edgepass.search.reference import Reference
from edgepass.search.rows import Row
from edgepass.search.timing import Timing

PLUGIN = '''
import os
import time
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from edgepass import Pass, PassResult, Stage
from edgepass.cli import main
from edgepass.cost.budget import Answer, Verdict
from edgepass.errors import UsageError


@dataclass(frozen=True)
class Counted(Pass):
    """Changes nothing, and says in a file that it was run; `stall` seconds where told to."""

    stage = Stage.QUANTIZE
    lossless = False
    number: int = 0

    def run(self, model, context):
        with open(os.environ["SWEEP_LOG"], "a") as file:
            file.write(f"{self.number}\\n")
        if os.environ.get("SWEEP_STALL") == str(self.number):
            time.sleep(600)
        return PassResult(model, False)


@dataclass(frozen=True)
class Ruin(Pass):
    """Turns the sign of the last weight round: classes swap places."""

    stage = Stage.QUANTIZE
    lossless = False

    def run(self, model, context):
        weights = [v for v in model.graph.initializers.values() if v.const_value.size > 100]
        last = weights[-1]
        last.const_value = ir.tensor(-last.const_value.numpy(), name=last.name)
        return PassResult(model, True)


@dataclass(frozen=True)
class Refuses(Pass):
    """Never agrees."""

    stage = Stage.QUANTIZE
    lossless = False

    def run(self, model, context):
        raise UsageError("The planted pass refuses", why="it was written to")


@dataclass(frozen=True)
class Crashes(Pass):
    """Has a bug."""

    stage = Stage.QUANTIZE
    lossless = False

    def run(self, model, context):
        raise KeyError("a bug")
'''
HARMLESS = "fp16"
"""Rounds a little."""


def mlp(weights: list[np.ndarray], biases: list[np.ndarray]) -> onnx.ModelProto:
    """x [batch, n] -> logits, a ReLU between layers."""
    nodes, constants, value = [], [], "x"
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        constants += [
            numpy_helper.from_array(weight.astype(np.float32), f"w{i}"),
            numpy_helper.from_array(bias.astype(np.float32), f"b{i}"),
        ]
        last = i == len(weights) - 1
        out = "logits" if last else f"h{i}"
        nodes.append(helper.make_node("Gemm", [value, f"w{i}", f"b{i}"], [out], name=f"dense{i}"))
        if not last:
            nodes.append(helper.make_node("Relu", [out], [f"a{i}"], name=f"relu{i}"))
        value = f"a{i}"
    shapes = (["batch", weights[0].shape[0]], ["batch", weights[-1].shape[1]])
    graph = helper.make_graph(
        nodes,
        "mlp",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shapes[0])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, shapes[1])],
        constants,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


@dataclasses.dataclass(frozen=True)
class Task:
    model: onnx.ModelProto
    calibration: dict
    data: dict
    labels: np.ndarray


@pytest.fixture(scope="session")
def digits() -> Task:
    """A trained classifier of handwritten digits, and samples that it has not seen."""
    from sklearn.datasets import load_digits
    from sklearn.neural_network import MLPClassifier

    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(images))
    images, labels = (images[order] / 16).astype(np.float32), labels[order]
    net = MLPClassifier((32,), max_iter=60, random_state=0, learning_rate_init=0.01)
    net.fit(images[:1200], labels[:1200])
    return Task(
        mlp(net.coefs_, net.intercepts_),
        {"x": images[:64]},
        {"x": images[1200:]},
        labels[1200:],
    )


@pytest.fixture(scope="session")
def plugin(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("plugin") / "planted.py"
    path.write_text(PLUGIN)
    edgepass.load_plugin(path)
    return path


@pytest.fixture(autouse=True)
def log(tmp_path, monkeypatch) -> Path:
    """Where `counted` says that it ran."""
    path = tmp_path / "log.txt"
    monkeypatch.setenv("SWEEP_LOG", str(path))
    monkeypatch.setenv("EDGEPASS_CACHE", str(tmp_path / "user-cache"))
    return path


def judged(task: Task, **options) -> edgepass.Evaluation:
    chosen = {"metrics": ["accuracy"], "limits": {"accuracy": -0.02}, **options}
    return edgepass.Evaluation(data=task.data, labels=task.labels, **chosen)


# --- the Pareto front ------------------------------------------------------------------------

numbers = st.one_of(st.none(), st.integers(0, 4).map(float))
points = st.lists(st.tuples(numbers, numbers, numbers), max_size=12)


def beats(a, b) -> bool:
    a, b = ([float("inf") if x is None else x for x in point] for point in (a, b))
    return all(x <= y for x, y in zip(a, b, strict=True)) and a != b


@given(points)
@settings(max_examples=300, deadline=None)
def test_on_the_front_is_what_no_other_beats(cloud):
    marks = front(cloud)
    for point, mark in zip(cloud, marks, strict=True):
        known = any(x is not None for x in point)
        assert mark == (known and not any(beats(other, point) for other in cloud))


@given(points)
@settings(max_examples=200, deadline=None)
def test_every_point_off_the_front_is_beaten_by_one_on_it(cloud):
    marks = front(cloud)
    best = [point for point, mark in zip(cloud, marks, strict=True) if mark]
    for point, mark in zip(cloud, marks, strict=True):
        if not mark and any(x is not None for x in point):
            assert any(beats(other, point) for other in best)


@given(points, st.randoms(use_true_random=False))
@settings(max_examples=100, deadline=None)
def test_the_front_does_not_depend_on_order(cloud, random):
    order = list(range(len(cloud)))
    random.shuffle(order)
    marks, again = front(cloud), front([cloud[i] for i in order])
    assert [marks[i] for i in order] == again


def test_nan_is_worst():
    assert front([(1.0, float("nan")), (1.0, 5.0)]) == [False, True]


# --- what is worth trying --------------------------------------------------------------------


def names(plan) -> list[str]:
    return [recipe.name for recipe in plan.recipes]


def reasons(plan) -> dict[str, str]:
    return dict(plan.left_out)


CONVNET = ModelFacts({"Conv": 10_000, "Gemm": 100}, rescalable=4)
TRANSFORMER = ModelFacts({"MatMul": 10_000, "Gather": 4_000}, normed=6)


def test_variants_fit_the_model():
    convnet = ptq_recipes(CONVNET, edgepass.get_target("x86_64"), calibrated=True)
    assert names(convnet)[0] == "fp32"
    assert {"fp16", "int8", "int8-weights"} <= set(names(convnet))
    assert "hardly any weight" in reasons(convnet)["dynamic-int8"]
    assert "normalization" in reasons(convnet)["smooth_quant + int8"]
    transformer = ptq_recipes(TRANSFORMER, edgepass.get_target("x86_64"), calibrated=True)
    assert {"dynamic-int8", "int4-weights"} <= set(names(transformer))
    assert "ReLU" in reasons(transformer)["equalize + int8"]
    assert all(recipe.why for recipe in transformer.recipes)


def test_variants_fit_the_target():
    target = edgepass.get_target("x86_64").replace(quantization=())
    plan = ptq_recipes(CONVNET, target, calibrated=True)
    assert "int8" not in names(plan)
    assert "does not compute in 8-bit integers" in reasons(plan)["int8"]
    assert "bfloat16" in reasons(plan)["bf16"]


def test_without_samples_nothing_is_calibrated():
    plan = ptq_recipes(TRANSFORMER, edgepass.get_target("x86_64"), calibrated=False)
    assert "int8" not in names(plan)
    assert "calibration" in reasons(plan)["int8"]
    assert "int8-weights" in names(plan)


def test_a_variant_that_is_not_installed_is_left_out(monkeypatch):
    known = recipes._known
    monkeypatch.setattr(recipes, "_known", lambda text: text != "fp16" and known(text))
    plan = ptq_recipes(CONVNET, edgepass.get_target("x86_64"), calibrated=True)
    assert "fp16" not in names(plan)
    assert "no such pass" in reasons(plan)["fp16"]


def test_all_variants_can_be_read():
    for facts in (CONVNET, TRANSFORMER):
        for recipe in ptq_recipes(facts, edgepass.get_target("arm64"), calibrated=True).recipes:
            from edgepass.pipelines import parse_recipe

            assert parse_recipe(recipe.text)


def test_facts_of_a_model(digits):
    from edgepass.frontends import load_supported

    facts = model_facts(load_supported(digits.model))
    assert facts.weights["Gemm"] == 4 * (64 * 32 + 32 + 32 * 10 + 10)
    assert (facts.rescalable, facts.normed) == (1, 0)
    assert facts.share("Gemm") == 1


def test_a_list_of_ones_own():
    plan = as_recipes(["fp32", ("fine", "int8")])
    assert [(r.name, r.text) for r in plan.recipes] == [("fp32", "fp32"), ("fine", "int8")]
    for wrong in ([], ["a", "a"], [1], [("a", "b", "c")]):
        with pytest.raises(UsageError):
            as_recipes(wrong)


# --- digests ---------------------------------------------------------------------------------


def test_a_model_is_known_by_its_content(digits, tmp_path):
    from edgepass.frontends import load_supported

    first = fingerprint.model_digest(load_supported(digits.model))
    onnx.save(
        onnx.ModelProto.FromString(digits.model.SerializeToString()),
        tmp_path / "external.onnx",
        save_as_external_data=True,
        size_threshold=0,
    )
    assert fingerprint.model_digest(load_supported(tmp_path / "external.onnx")) == first
    other = onnx.ModelProto.FromString(digits.model.SerializeToString())
    array = numpy_helper.to_array(other.graph.initializer[0]).copy()
    array[0, 0] = np.nextafter(array[0, 0], np.float32(1e9))
    other.graph.initializer[0].CopyFrom(numpy_helper.from_array(array, "w0"))
    assert fingerprint.model_digest(load_supported(other)) != first
    renamed = onnx.ModelProto.FromString(digits.model.SerializeToString())
    renamed.graph.node[0].attribute.append(helper.make_attribute("alpha", 0.5))
    assert fingerprint.model_digest(load_supported(renamed)) != first


def test_samples_are_known_by_their_content():
    feeds = [{"x": np.zeros(3, np.float32)}, {"x": np.ones(3, np.float32)}]
    first = fingerprint.feeds_digest(feeds)
    assert fingerprint.feeds_digest([dict(f) for f in feeds]) == first
    assert fingerprint.feeds_digest(feeds[::-1]) != first
    assert fingerprint.feeds_digest(feeds[:1]) != first
    assert fingerprint.feeds_digest([{"x": f["x"].astype(np.float64)} for f in feeds]) != first
    assert fingerprint.feeds_digest(None) != fingerprint.feeds_digest([])


def test_a_target_is_known_by_its_facts():
    target = edgepass.get_target("arm64")
    first = fingerprint.target_digest(target, None)
    assert fingerprint.target_digest(edgepass.get_target("arm64"), None) == first
    assert fingerprint.target_digest(target.replace(vector_bits=256), None) != first


# --- the cache -------------------------------------------------------------------------------


def test_entries_come_back_whole_or_not_at_all(tmp_path):
    cache = Cache(tmp_path)
    assert cache.get("kind", "key") is None
    place = cache.put("kind", "key", {"a": [1, 2.5, None], "nan": float("nan")})
    assert cache.get("kind", "key")["a"] == [1, 2.5, None]
    text = (place / "entry.json").read_text()
    for damaged in (text[:-30], text.replace("2.5", "2.6"), "", "[]", "\x00"):
        (place / "entry.json").write_text(damaged)
        cache.notes.clear()
        assert cache.get("kind", "key") is None
        assert len(cache.notes) == 1
        assert str(place) in cache.notes[0]
    cache.put("kind", "key", {"a": 1})
    assert cache.get("kind", "key") == {"a": 1}


def test_an_entry_whose_making_fails_leaves_what_was_there(tmp_path):
    cache = Cache(tmp_path)
    cache.put("kind", "key", {"a": 1})

    def fails(folder):
        (folder / "half.bin").write_bytes(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.put("kind", "key", fails)
    assert cache.get("kind", "key") == {"a": 1}
    assert [p.name for p in (tmp_path / "kind").iterdir()] == ["key"]


# --- the original's outputs ------------------------------------------------------------------


class Counting:
    """Doubles x, and counts how often it was asked."""

    inputs = ()

    def __init__(self):
        self.runs = 0

    def run(self, feed):
        self.runs += 1
        return {"y": 2 * feed["x"]}


@pytest.mark.parametrize(
    ("worth_s", "most_bytes", "runs"),
    [(0.0, 10**9, 2 + 3 + 0), (60.0, 10**9, 2 + 3 + 4), (0.0, 20, 2 + 3 + 2)],
)
def test_the_original_is_run_once_where_that_is_worth_it(tmp_path, worth_s, most_bytes, runs):
    """Two runs decide, three more samples follow; the second time all four come again, of which
    two of 16 bytes each are over 20 bytes."""
    runner = Counting()
    reference = Reference(runner, tmp_path, worth_s=worth_s, most_bytes=most_bytes)
    for _ in range(2):
        reference.begin()
        for i in range(4):
            x = np.full(2, i, np.float64)
            assert np.array_equal(reference.run({"x": x})["y"], 2 * x)
    assert runner.runs in (runs, runs + 1)  # the first sample was timed, not kept


# --- choosing --------------------------------------------------------------------------------


def row(name, size, ms, accuracy=0.9, allowed=True, lossless=False, **fields) -> Row:
    verdict = WITHIN if allowed else EXCEEDS
    rung = Rung(
        name,
        {"accuracy": MetricResult(Estimate(accuracy), Estimate(accuracy - 0.95))},
        limits=(LimitResult("accuracy", "-0.02", accuracy - 0.95, verdict),),
        verdict=verdict,
    )
    timing = Timing(ms, 10.0, "2026-01-01", "cpu")
    plain = Row(name, name, file_bytes=size, timing=timing, rung=rung, lossless=lossless)
    return dataclasses.replace(plain, **fields)


def no_blame(row):
    return Found()


def test_smallest_fastest_and_both():
    rows = [
        row("fp32", 400, 10, lossless=True),
        row("small", 50, 9.0),
        row("quick", 120, 2.0),
        row("fair", 60, 2.5),
        row("broken", 10, 1, 0.2, allowed=False),
    ]
    found = {
        by: choose(rows, by=by, measured=True, blame=no_blame).row.name
        for by in ("size", "latency", "both")
    }
    assert found == {"size": "small", "latency": "quick", "both": "fair"}
    best = choose(rows, by="size", measured=True, blame=no_blame)
    assert best
    assert "small" in best.reason
    assert "smallest of 4 of 5 recipes" in best.reason
    with pytest.raises(UsageError, match="beauty"):
        choose(rows, by="beauty", measured=True, blame=no_blame)


def test_times_within_the_noise_are_decided_by_size():
    rows = [row("large", 400, 2.00), row("small", 100, 2.01)]
    assert choose(rows, by="latency", measured=True, blame=no_blame).row.name == "small"


def test_nothing_is_given_up_for_nothing():
    rows = [row("fp32", 400, 10, 0.95, lossless=True), row("no better", 399, 9.99, 0.94)]
    for by in ("size", "latency", "both"):
        best = choose(rows, by=by, measured=True, blame=no_blame)
        assert best
        assert best.row.name == "fp32"
        assert "no other gains anything" in best.reason


def test_none_may_be_shipped_and_why():
    rows = [
        row("fp32", 400, 10, 0.95, lossless=True),
        row("bad", 100, 5, 0.90, allowed=False),
        row("worse", 50, 4, 0.50, allowed=False),
        Row("crashed", "crashed", failed="It failed [lowering]\n  why: so"),
    ]
    asked = []

    def blame(chosen):
        asked.append(chosen.name)
        return Found((Blame("dense1", "adds 80 % of the error", "keep it in float"),))

    best = choose(rows, measured=True, blame=blame)
    assert not best
    assert best.row.name == "fp32"
    assert best.nearest.name == "bad"
    assert asked == ["bad"]
    for part in ("No recipe that compresses", "bad", "accuracy changes by -0.05", "dense1", "fp32"):
        assert part in best.reason
    assert nearest(rows).name == "bad"


def test_layers_are_blamed_only_for_what_they_did():
    def blame(chosen):
        raise AssertionError(f"{chosen.name} is asked about")

    bad = row("bad", 100, 5, 0.90, allowed=False)
    rows = [row("fp32", 400, 10, 0.92, allowed=False, lossless=True), bad]
    best = choose(rows, measured=True, blame=blame)
    assert best.row is None
    assert "fp32, which is lossless, misses the limits too" in best.reason
    over = Verdict("size", Answer.MISSED, 1.0, 2.0, 1.0, "size missed: 2.00 MB")
    best = choose([row("large", 100, 5, budget=(over,))], measured=True, blame=blame)
    assert best.misses == ("size missed: 2.00 MB",)
    assert "blame" not in best.reason


def test_lossless_alone_is_enough_where_nothing_else_was_asked_for():
    best = choose([row("fp32", 400, 10, lossless=True)], measured=True, blame=no_blame)
    assert best
    assert best.row.name == "fp32"


def test_without_limits_worse_beyond_chance_is_an_objection():
    def with_change(low, high):
        change = MetricResult(Estimate(0.9), Estimate((low + high) / 2, low, high))
        return Row("r", "r", rung=Rung("r", {"accuracy": change}, verdict=NO_LIMITS))

    assert with_change(-0.2, -0.1).objections
    assert not with_change(-0.2, 0.01).objections
    assert not with_change(0.1, 0.2).objections


# --- the whole -------------------------------------------------------------------------------


def test_planted_outcomes(digits, plugin):
    result = edgepass.sweep(
        digits.model,
        "host",
        ["fp32", HARMLESS, "ruin", "refuses", "crashes", "nonsense"],
        calibration=digits.calibration,
        evaluate=judged(digits),
        time_budget_s=0.05,
    )
    assert [r.name for r in result] == ["fp32", HARMLESS, "ruin", "refuses", "crashes", "nonsense"]
    assert result["fp32"].verdict == "within"
    assert result["fp16"].verdict == "within"
    assert result["fp16"].file_bytes < 0.7 * result["fp32"].file_bytes
    assert result["ruin"].verdict == "exceeds"
    assert result["ruin"].rung.metrics["accuracy"].value.value < 0.5
    assert result["ruin"].rung.flips.broken > 100
    assert "The planted pass refuses" in result["refuses"].failed
    assert "a bug" in result["crashes"].failed
    assert "nonsense" in result["nonsense"].failed
    assert all(result[name].verdict == "failed" for name in ("refuses", "crashes", "nonsense"))
    assert {r.name for r in result.front} <= {"fp32", "fp16", "ruin"}
    assert result["fp32"].timing.ms > 0
    text = str(result)
    for part in ("ruin", "exceeds", "The planted pass refuses", "best: fp16", "accuracy"):
        assert part in text
    best = result.best("size")
    assert best
    assert best.recipe == "fp16"
    feed = {"x": digits.data["x"][:1]}
    assert set(best.artifact.run(feed)) == {"logits"}


def test_without_labels_outputs_are_held_against_the_originals(digits, plugin):
    data = (feed for feed in [{"x": x[None]} for x in digits.calibration["x"]])
    result = edgepass.sweep(
        digits.model, "host", ["fp32", "fp16", "ruin"], calibration=data, time_budget_s=0
    )
    noise = {row.name: -row.loss for row in result}
    assert noise["fp16"] > 40
    assert noise["ruin"] < 5
    assert "SQNR" in str(result)
    assert not result["fp16"].objections
    assert "signal to noise" in result["ruin"].objections[0]
    assert result.best().row.name == "fp16"


def test_data_that_can_be_read_once_serves_all_recipes(digits):
    evaluation = edgepass.Evaluation(
        data=({"x": x[None]} for x in digits.data["x"][:50]),
        labels=iter(digits.labels[:50]),
        metrics=["accuracy"],
    )
    result = edgepass.sweep(
        digits.model, "host", ["fp32", "fp16"], evaluate=evaluation, time_budget_s=0
    )
    assert {row.rung.metrics["accuracy"].value.value > 0.8 for row in result} == {True}


def test_a_limit_that_none_meets_names_the_nearest(digits, plugin):
    result = edgepass.sweep(
        digits.model,
        "host",
        ["fp32", "ruin"],
        evaluate=judged(digits),
        time_budget_s=0,
    )
    best = result.best()
    assert not best
    assert best.row.name == "fp32"
    assert best.nearest.name == "ruin"
    assert "accuracy" in best.reason
    assert [item.layer for item in best.blame][:1] == ["dense1"]  # where the fault was planted
    assert best.blame[0].remedy


def test_nothing_is_done_twice(digits, plugin, log, tmp_path):
    def go(**options):
        chosen = {
            "recipes": ["fp32", "counted{number=1}", "counted{number=2}", "refuses"],
            "calibration": digits.calibration,
            "evaluate": judged(digits),
            "time_budget_s": 0.02,
            "cache": tmp_path / "cache",
            **options,
        }
        return edgepass.sweep(digits.model, "host", **chosen)

    first = go()
    assert first.done.compiled == ["fp32", "counted{number=1}", "counted{number=2}", "refuses"]
    # the three artifacts are the same files: one evaluation and one timing serve all
    assert first.done.evaluated == ["fp32"]
    assert first.done.timed == ["fp32"]
    assert first["counted{number=1}"].same_as == "fp32"
    assert first["counted{number=1}"].rung.metrics == first["fp32"].rung.metrics
    again = go()
    assert again.done == type(again.done)()
    assert log.read_text().split() == ["1", "2"]
    assert [r.rung for r in again] == [r.rung for r in first]
    assert [r.timing for r in again] == [r.timing for r in first]
    assert again["refuses"].failed == first["refuses"].failed
    assert all(r.reused for r in again)

    stricter = go(evaluate=judged(digits, limits={"accuracy": ">= 0.9999"}))
    assert stricter.done == type(again.done)()  # limits are held against what was measured
    assert stricter["fp32"].verdict == "exceeds"
    other = go(evaluate=judged(digits, seed=1))
    assert other.done.compiled == []
    assert other.done.evaluated == ["fp32"]
    fewer = go(calibration={"x": digits.calibration["x"][:32]})
    assert len(fewer.done.compiled) == 4
    assert fewer.done.evaluated == []
    plain = go(recipes=["fp32"], cache=None)
    assert plain.done.compiled == ["fp32"]
    assert plain.best().artifact.run({"x": digits.data["x"][:1]})


def test_times_of_another_machine_are_not_taken(digits, tmp_path, monkeypatch):
    def go():
        return edgepass.sweep(
            digits.model, "host", ["fp32"], time_budget_s=0.02, cache=tmp_path / "cache"
        )

    assert go().done.timed == ["fp32"]
    assert go().done.timed == []
    monkeypatch.setattr(fingerprint, "machine", lambda: {"cpu": "another", "features": []})
    there = go()
    assert there.done.timed == ["fp32"]
    assert there.done.compiled == []


@pytest.mark.parametrize("damage", ["entry", "model", "missing"])
def test_damage_is_noted_and_made_good(digits, tmp_path, damage):
    cache = tmp_path / "cache"

    def go():
        return edgepass.sweep(digits.model, "host", ["fp32"], time_budget_s=0, cache=cache)

    go()
    (entry,) = (cache / "compiled").iterdir()
    file = entry / "entry.json" if damage == "entry" else entry / "artifact" / "model.onnx"
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-40])
    mended = go()
    assert mended.done.compiled == ["fp32"]
    assert any("damaged cache entry" in note and str(entry) in note for note in mended.notes)
    after = go()
    assert after.done.compiled == []
    assert not any("damaged" in note for note in after.notes)


SCRIPT = """
import sys
import numpy as np
import edgepass
from edgepass.search import fingerprint

fingerprint.program_digest = lambda: "edgepass may be edited while this test runs"
edgepass.load_plugin(sys.argv[1])
samples = dict(np.load(sys.argv[3]))
edgepass.sweep(
    sys.argv[2],
    "host",
    ["counted{number=1}", "fp16,counted{number=2}", "counted{number=3}", "counted{number=4}"],
    calibration={"x": samples["x"][:8]},
    evaluate=edgepass.Evaluation(
        data={"x": samples["x"]}, labels=samples["labels"], metrics=["accuracy"]
    ),
    time_budget_s=0.02,
    cache=sys.argv[4],
)
"""


def test_a_killed_sweep_goes_on_where_it_was(digits, plugin, log, tmp_path):
    onnx.save(digits.model, tmp_path / "model.onnx")
    np.savez(tmp_path / "data.npz", x=digits.data["x"], labels=digits.labels)
    arguments = [plugin, tmp_path / "model.onnx", tmp_path / "data.npz", tmp_path / "cache"]
    command = [sys.executable, "-c", SCRIPT, *map(str, arguments)]
    process = subprocess.Popen(command, env={**os.environ, "SWEEP_STALL": "3"})
    try:
        end = time.monotonic() + 120
        while not (log.exists() and "3" in log.read_text().split()):
            assert process.poll() is None
            assert time.monotonic() < end
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert process.returncode == -signal.SIGKILL
    assert log.read_text().split() == ["1", "2", "3"]
    log.unlink()
    subprocess.run(command, env={**os.environ}, check=True, timeout=120)
    assert log.read_text().split() == ["3", "4"]  # 1 and 2 were not compiled again
    left = [p.name for p in (tmp_path / "cache").rglob("*") if ".edgepass-" in p.name]
    assert left == []


def test_what_is_saved(digits, plugin, tmp_path):
    result = edgepass.sweep(
        digits.model,
        "host",
        [("float", "fp32"), ("half", "fp16"), ("bad", "ruin")],
        evaluate=judged(digits),
        budget=edgepass.Budget(size_mb=1),
        time_budget_s=0.02,
    )
    folder = result.save(tmp_path / "out")
    assert {p.name for p in folder.iterdir()} == {"sweep.json", "table.txt", "pareto.png", "best"}
    data = json.loads((folder / "sweep.json").read_text())
    assert (data["schema"], data["schema_version"]) == ("edgepass.sweep", 1)
    assert [entry["name"] for entry in data["rows"]] == ["float", "half", "bad"]
    assert data["rows"][2]["verdict"] == "exceeds"
    assert data["rows"][1]["budget"][0]["answer"] == "met"
    assert data["rows"][1]["measured"]["label"] == "measured"
    assert data["rows"][1]["measured"]["cpu"]
    assert data["rows"][1]["predicted"]["label"] in ("assumed", "calibrated")
    assert data["best"]["name"] == result.best().row.name
    assert edgepass.load(folder / "best").run({"x": digits.data["x"][:1]})
    result.save(folder)  # its own may be replaced
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="not what a sweep wrote"):
        result.save(tmp_path / "mine")


def test_over_budget(digits):
    result = edgepass.sweep(
        digits.model,
        "host",
        ["fp32", "fp16"],
        evaluate=judged(digits),
        budget=edgepass.Budget(size_mb=result_between(digits)),
        time_budget_s=0,
    )
    assert result["fp32"].verdict == "within, over budget"
    assert result["fp16"].verdict == "within"
    assert result.best().row.name == "fp16"


def result_between(task: Task) -> float:
    """Megabytes between the model in half precision and in float."""
    return len(task.model.SerializeToString()) * 0.8 / 1e6


def test_a_target_that_is_not_here_is_predicted(digits):
    result = edgepass.sweep(
        digits.model, "raspberry-pi-4", ["fp32", "fp16"], evaluate=judged(digits)
    )
    assert not result.measured
    assert result["fp32"].timing is None
    assert result["fp32"].predicted.ms > 0
    assert any("no raspberry-pi-4" in note for note in result.notes)
    assert result.best()


def test_the_evaluations_own_fault_is_not_a_recipes(digits):
    def broken(predictions, labels):
        raise ValueError("no such thing")

    with pytest.raises(edgepass.EdgepassError, match="no such thing"):
        edgepass.sweep(
            digits.model,
            "host",
            ["fp32"],
            evaluate=judged(digits, metrics={"m": broken}, limits={}),
        )


def test_the_example_of_the_docs(digits, tmp_path, monkeypatch, capsys):
    page = (Path(__file__).parent.parent / "docs" / "sweep.md").read_text()
    code = page.split("```python\n")[1].split("```")[0]
    onnx.save(digits.model, tmp_path / "model.onnx")
    monkeypatch.chdir(tmp_path)
    short = code.replace('recipes="ptq"', 'recipes=["fp32", "fp16"]')
    assert short != code
    names_ = {"calibration": digits.calibration["x"], "test": digits.data["x"]}
    exec(short, {**names_, "labels": digits.labels})
    assert "fp16" in capsys.readouterr().out
    assert (tmp_path / "sweep" / "best").is_dir()


# --- the command -----------------------------------------------------------------------------


@pytest.fixture
def files(digits, tmp_path) -> Path:
    """A folder with the model, samples, labelled data, and a metric of the user's."""
    onnx.save(digits.model, tmp_path / "model.onnx")
    np.savez(tmp_path / "calib.npz", **digits.calibration)
    np.savez(tmp_path / "test.npz", **digits.data, labels=digits.labels)
    (tmp_path / "sweep_metrics.py").write_text(
        "import numpy as np\n\n\n"
        "def hits(predictions, labels):\n"
        "    return float(np.mean(np.argmax(predictions, axis=-1) == labels))\n\n\n"
        "def ink(feed, label, index):\n"
        "    return float(feed['x'].sum())\n"
    )
    return tmp_path


def command(files: Path, *more: str) -> list[str]:
    return [
        "sweep",
        str(files / "model.onnx"),
        *("--calibration", str(files / "calib.npz"), "--data", str(files / "test.npz")),
        *("--metric", "sweep_metrics:hits", "--slice", "sweep_metrics:ink"),
        *("--cache", str(files / "cache"), "--time-budget", "0.02", *more),
    ]


def test_the_command(files, plugin, capsys, monkeypatch):
    monkeypatch.syspath_prepend(files)
    arguments = command(
        files,
        *("--plugin", str(plugin), "--recipe", "fp32", "--recipe", "half=fp16"),
        *("--recipe", "refuses", "--limit", "hits=-0.02", "--budget", "size_mb=1", "--json"),
        *("--out", str(files / "out"), "--plots"),
    )
    assert main(arguments) == 0
    out = capsys.readouterr()
    found = json.loads(out.out)
    assert out.err == ""  # no progress where nobody watches
    assert [entry["name"] for entry in found["rows"]] == ["fp32", "half", "refuses"]
    assert found["rows"][1]["evaluation"]["metrics"]["hits"]["value"]["low"] > 0.8
    assert found["rows"][2]["verdict"] == "failed"
    assert found["best"]["name"] == "half"
    assert (files / "out" / "best" / "manifest.json").is_file()
    assert (files / "out" / "pareto.png").is_file()
    assert main(arguments) == 0
    assert json.loads(capsys.readouterr().out)["done"]["compiled"] == []


def test_the_command_says_when_none_will_do(files, plugin, capsys, monkeypatch):
    monkeypatch.syspath_prepend(files)
    limits = ("--plugin", str(plugin), "--recipes", "fp32,ruin", "--limit", "hits=-0.02")
    assert main(command(files, *limits)) == 29
    out = capsys.readouterr()
    assert "best: No recipe that compresses" in out.out
    assert "dense1" in out.err


def test_ctrl_c_keeps_what_is_done(files, plugin, capsys, monkeypatch, log):
    from edgepass.search import stages

    monkeypatch.syspath_prepend(files)
    compile_model = stages.compile_model

    def interrupted(*arguments, recipe, **options):
        if recipe == "fp16":
            raise KeyboardInterrupt
        return compile_model(*arguments, recipe=recipe, **options)

    recipes_ = ("--plugin", str(plugin), "--recipes", "counted{number=1},fp16")
    with monkeypatch.context() as patch:
        patch.setattr(stages, "compile_model", interrupted)
        assert main(command(files, *recipes_)) == 130
    assert "goes on from there" in capsys.readouterr().err
    assert main(command(files, *recipes_)) == 0
    assert log.read_text().split() == ["1"]


def test_options_that_contradict(files, capsys):
    model = str(files / "model.onnx")
    for wrong, said in (
        (["--metric", "accuracy"], "give --data"),
        (["--plots"], "give --out"),
        (["--cache", "a", "--no-cache"], "contradict"),
        (["--by", "beauty"], "beauty"),
        (["--recipes", "best"], "no pass or recipe"),
    ):
        code = main(["sweep", model, *wrong])
        captured = capsys.readouterr()
        assert said in captured.err + captured.out
        assert code != 0

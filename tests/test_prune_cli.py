"""What users see of structured pruning: recipes, scans, budgets and limits, and the command."""

import json
import math

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper
from typer.testing import CliRunner

import edgepass
from edgepass.cli.app import app
from edgepass.errors import PassOptionError, UsageError
from edgepass.ir.random_weights import fill_random_weights
from edgepass.passes.prune.quantized import quantized_share
from edgepass.passes.spec import format_passes
from edgepass.pipelines import parse_recipe, pruning_pass, with_ratio
from edgepass.search.recipes import ModelFacts, prune_recipes
from edgepass.targets.onnx_file import write_onnx

HIDDEN, DEAD, CLASSES = 64, 32, 4
RNG = np.random.default_rng(0)
INPUTS = RNG.normal(size=(60, 16)).astype(np.float32)
QUIET = {"time_budget_s": 0}
EVEN = "prune{allocation=uniform,limit=10}"
"""The same share of every group, whatever that does to so small a network."""


def network(dead: int = 0) -> ir.Model:
    """16 inputs, two hidden layers of 64 with ReLU, 4 classes; `dead` units of the first give 0."""
    rng = np.random.default_rng(1)
    sizes = (16, HIDDEN, HIDDEN, CLASSES)
    weights, nodes, before = [], [], "x"
    for i in range(3):
        matrix = rng.normal(size=sizes[i : i + 2]) / math.sqrt(sizes[i])
        bias = rng.normal(size=sizes[i + 1]) / 10
        if i == 0:
            matrix[:, :dead], bias[:dead] = 0, -1
        for name, array in ((f"w{i}", matrix), (f"b{i}", bias)):
            weights.append(numpy_helper.from_array(array.astype(np.float32), name))
        result = "y" if i == 2 else f"h{i}"
        nodes.append(
            helper.make_node("Gemm", [before, f"w{i}", f"b{i}"], [result], name=f"layer{i}")
        )
        if i < 2:
            nodes.append(helper.make_node("Relu", [result], [f"a{i}"], name=f"relu{i}"))
        before = f"a{i}"
    shape = lambda n: ["N", n]  # noqa: E731
    graph = helper.make_graph(
        nodes, "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape(16))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape(CLASSES))],
        weights,
    )  # fmt: skip
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return ir.from_proto(made)


def answers(model: ir.Model) -> np.ndarray:
    compiled = edgepass.compile(model, check_numerics=False, **QUIET)
    return compiled.run({"x": INPUTS})["y"].argmax(1)


def evaluation(model: ir.Model, **limits: float | str) -> edgepass.Evaluation:
    """The model's own answers as labels: it has an accuracy of 1."""
    return edgepass.Evaluation(
        data={"x": INPUTS}, labels=answers(model), metrics=["accuracy"], limits=limits, resamples=50
    )


# --- recipes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "prune{ratio=0.3},int8",
        "prune30+int8",
        "int8,prune{ratio=0.3}",
        "int8+prune30",
        "prune30,int8",
    ],
)
def test_pruning_and_quantizing_alone_is_a_whole_pipeline_in_any_order(text):
    assert format_passes(parse_recipe(text)) == format_passes(parse_recipe("prune{ratio=0.3}+int8"))
    names = [item.name for item in parse_recipe(text)]
    assert names.index("dead_code") < names.index("prune") < names.index("fold_affine")
    assert names.index("fold_affine") < names.index("int8") < names.index("runtime_forms")


def test_a_list_that_names_cleanup_is_taken_as_written():
    assert [p.name for p in parse_recipe("prune50,dead_code")] == ["dead_code", "prune"]
    assert [p.name for p in parse_recipe("dead_code,int8")] == ["dead_code", "int8"]
    assert "fold_affine" not in [p.name for p in parse_recipe("cleanup,prune,int8")]


@pytest.mark.parametrize(("text", "name"), [("prune50", "prune"), ("sparsify50", "sparsify")])
def test_percent_is_a_ratio(text, name):
    (item,) = (p for p in parse_recipe(text) if p.name == name)
    assert vars(item)["ratio"] == 0.5
    assert pruning_pass(text) == item


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("prune", "prune{ratio=0.45}"),
        ("prune30+int8", "prune{ratio=0.45}+int8"),
        ("prune{widths=true},int8", "prune{ratio=0.45,widths=true}+int8"),
        ("int8{observer=mse},prune", 'int8{observer="mse"}+prune{ratio=0.45}'),
        ("cleanup,prune,fuse", "cleanup,prune{ratio=0.45},fuse"),
        ("sparsify20", "sparsify{ratio=0.45}"),
    ],
)  # fmt: skip
def test_a_recipe_at_another_ratio(text, expected):
    assert with_ratio(text, 0.45) == expected
    assert len(parse_recipe(expected)) == len(parse_recipe(text))


def test_a_recipe_without_a_ratio_is_refused():
    with pytest.raises(PassOptionError, match="no pass that prunes"):
        with_ratio("int8", 0.3)


def test_the_family_of_a_sweep():
    facts = ModelFacts({"Conv": 1000})
    target = edgepass.get_target("x86_64")
    plan = prune_recipes(facts, target, calibrated=True)
    names = [recipe.name for recipe in plan.recipes]
    assert names[:4] == ["fp32", "int8", "prune10", "prune10+int8"]
    assert names[-1] == "prune70+int8"
    assert not plan.left_out
    without = prune_recipes(facts, target, calibrated=False)
    assert [r.name for r in without.recipes] == ["fp32", *(f"prune{p}0" for p in range(1, 8))]
    assert all("calibration" in why for _, why in without.left_out)


# --- scans ---------------------------------------------------------------------------------------


def test_a_scan_finds_what_is_free_and_says_why_the_rest_stays():
    found = edgepass.prune_scan(network(DEAD), ratio=0.5, calibration={"x": INPUTS})
    rows = {row.name: row for row in found.rows}
    assert set(rows) == {"layer0", "layer1"}
    assert rows["layer0"].units == HIDDEN
    assert rows["layer0"].removed == HIDDEN // 2
    # half of layer0 and what reads it: 16 x 32 + 32 weights and biases, 32 x 64 of layer1
    assert rows["layer0"].fewer_parameters == 16 * 32 + 32 + 32 * 64
    assert rows["layer0"].fewer_macs == 16 * 32 + 32 * 64
    assert rows["layer0"].sqnr_db > 60  # what left gave nothing
    assert 0 < rows["layer1"].sqnr_db < 60
    assert found.worst is rows["layer1"]
    assert [row.name for row in found.ranked] == ["layer0", "layer1"]
    (blocked,) = found.blocked
    assert "output 'y'" in blocked.reason
    assert found.reach == 1 - CLASSES / found.parameters  # the last bias stays
    assert found.measured == "outputs"
    assert "layer0" in str(found)
    assert "output 'y'" in str(found)


def test_a_scan_without_samples_goes_by_the_weights_and_says_so():
    found = edgepass.prune_scan(network(DEAD), ratio=0.25)
    assert found.measured == "weights"
    assert found["layer0"].sqnr_db > found["layer1"].sqnr_db
    assert "energy" in str(found)


def test_a_scan_of_an_architecture_has_sizes_and_no_errors():
    model = network()
    bare = edgepass.Architecture(model).prepared("fp32", "x86_64")
    from edgepass.architecture import without_weights

    found = edgepass.prune_scan(without_weights(bare), "raspberry-pi-4", ratio=0.5)
    assert found.measured == ""
    assert all(row.sqnr_db is None for row in found.rows)
    assert all(row.fewer_parameters > 0 for row in found.rows)


def test_a_scan_as_json():
    found = edgepass.prune_scan(network(), calibration={"x": INPUTS}, samples=9)
    data = json.loads(json.dumps(found.as_dict()))
    assert (data["schema"], data["schema_version"]) == ("edgepass.prune_scan", 1)
    assert data["order"] == [row.name for row in found.ranked]
    assert {"name", "kind", "units", "gained_ms", "sqnr_db", "order"} <= set(data["groups"][0])


def test_a_scan_looks_at_the_groups_that_are_asked_for():
    found = edgepass.prune_scan(network(), recipe="prune{only=layer1}")
    assert [row.name for row in found.rows] == ["layer1"]
    with pytest.raises(UsageError, match="no structured pruning"):
        edgepass.prune_scan(network(), recipe="sparsify")


# --- how much ------------------------------------------------------------------------------------


def test_a_ratio_is_pruned_and_told():
    found = edgepass.prune(network(), ratio=0.5, calibration={"x": INPUTS}, recipe=EVEN, **QUIET)
    assert found
    assert found.ratio == 0.5
    assert found.original.parameters == 16 * 64 + 64 + 64 * 64 + 64 + 64 * 4 + 4
    assert found.chosen.parameters == 16 * 32 + 32 + 32 * 32 + 32 + 32 * 4 + 4
    assert "removed" in found.reason
    assert any("held out" in note for note in found.notes)
    assert found.chosen.sqnr_db > 0
    outputs = found.compiled.run({"x": INPUTS})["y"]
    assert outputs.shape == (60, CLASSES)


def test_a_size_budget_is_met_by_the_least_ratio():
    budget = edgepass.Budget(size_mb=0.012)
    found = edgepass.prune(
        network(), "raspberry-pi-4", budget=budget, calibration={"x": INPUTS}, step=0.1,
        recipe=EVEN,
    )  # fmt: skip
    assert found.met
    assert found.chosen.file_bytes <= 12_000
    less = round(found.ratio - 0.1, 4)
    estimate = edgepass.estimate(network(), "raspberry-pi-4", [with_ratio(EVEN, less)])
    assert estimate.rows[0].file_bytes > 12_000


def test_a_budget_out_of_reach_is_said_to_be():
    found = edgepass.prune(
        network(), "raspberry-pi-4", budget=edgepass.Budget(size_mb=0.0001), step=0.3
    )
    assert not found
    assert found.ratio == 0.9
    assert "not even 90 %" in found.reason
    assert found.compiled is not None


def test_a_budget_that_the_bound_forbids_says_so():
    budget = edgepass.Budget(size_mb=0.012)
    found = edgepass.prune(
        network(), "raspberry-pi-4", budget=budget, calibration={"x": INPUTS}, step=0.3,
        recipe="prune{limit=0.0001}",
    )  # fmt: skip
    assert not found
    assert "over the limit" in found.reason


def test_limits_stop_the_pruning_at_the_largest_ratio_that_keeps_them():
    model = network()
    judge = evaluation(model, accuracy=-0.1)
    found = edgepass.prune(
        model, evaluation=judge, calibration={"x": INPUTS}, recipe="prune{multiple=4}", step=0.15,
        **QUIET,
    )  # fmt: skip
    assert found.met
    assert not found.chosen.lost
    assert found.chosen.metrics["accuracy"].value.value >= 0.9
    beyond = [trial for trial in found.trials if trial.ratio > found.ratio]
    assert beyond
    assert all(trial.lost for trial in beyond)
    assert "the most that keeps the limits" in found.reason
    assert "original" in str(found)


def test_limits_that_any_pruning_breaks_name_the_group():
    model = network()
    judge = evaluation(model, sqnr_db=">= 100")
    found = edgepass.prune(
        model, evaluation=judge, calibration={"x": INPUTS}, step=0.25, most=0.5, **QUIET
    )
    assert not found
    assert found.compiled is None
    assert "even 25 % breaks the limits" in found.reason
    assert "'layer" in found.blame
    with pytest.raises(UsageError, match="no pruned model"):
        found.save("nowhere")


def test_a_limit_that_the_recipe_breaks_without_pruning_is_not_blamed_on_it():
    model = network()
    judge = evaluation(model, sqnr_db=">= 100")
    found = edgepass.prune(
        model, evaluation=judge, calibration={"x": INPUTS}, recipe="prune+fp16", step=0.5, **QUIET
    )
    assert "before anything is pruned" in found.reason
    assert not found.blame


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"ratio": 1.0},
        {"ratio": 0.3, "budget": edgepass.Budget(size_mb=1)},
        {"ratio": 0.3, "step": 0.0},
    ],
    ids=["nothing", "all", "both", "no step"],
)
def test_questions_that_make_no_sense(options):
    with pytest.raises(UsageError):
        edgepass.prune(network(), **options)


# --- compile, estimate, sweep --------------------------------------------------------------------


def test_the_ledger_shows_what_pruning_bought():
    recipe = with_ratio(EVEN, 0.5)
    compiled = edgepass.compile(network(), recipe=recipe, calibration={"x": INPUTS}, **QUIET)
    (row,) = (row for row in compiled.ledger.rows if row.name.startswith("prune"))
    assert row.after.macs == 16 * 32 + 32 * 32 + 32 * 4
    assert row.after.weight_bytes < row.before.weight_bytes / 2
    assert any("predicted" in remark for remark in compiled.ledger.remarks)


def test_an_architecture_is_priced_pruned():
    from edgepass.architecture import without_weights

    bare = without_weights(network())
    found = edgepass.estimate(bare, "x86_64", ["fp32", "prune30", "prune50", "prune50+int8"])
    assert not found.failed
    assert [found[r].parameters for r in ("fp32", "prune50")] == [
        16 * 64 + 64 + 64 * 64 + 64 + 64 * 4 + 4,
        16 * 32 + 32 + 32 * 32 + 32 + 32 * 4 + 4,
    ]
    sizes = [found[r].file_bytes for r in ("fp32", "prune30", "prune50", "prune50+int8")]
    assert sizes == sorted(sizes, reverse=True)


def test_what_is_estimated_is_what_is_compiled():
    model = network()
    recipe = with_ratio(EVEN, 0.3)
    (row,) = edgepass.estimate(model, "x86_64", [recipe]).rows
    made = edgepass.compile(model, "x86_64", recipe=recipe, calibration={"x": INPUTS}, **QUIET)
    assert made.cost["macs"] == row.macs
    assert made.cost["file_bytes"] == pytest.approx(row.file_bytes, rel=0.02)


def test_a_ladder(tmp_path):
    model = network()
    result = edgepass.sweep(
        model,
        recipes=["default", "prune30", "int8", "prune{ratio=0.3},int8"],
        calibration={"x": INPUTS},
        evaluate=evaluation(model),
        time_budget_s=0,
        cache=tmp_path,
    )
    assert not any(row.failed for row in result)
    sizes = {row.name: row.file_bytes for row in result}
    assert sizes["prune{ratio=0.3},int8"] < sizes["int8"] < sizes["default"]
    assert sizes["prune30"] < sizes["default"]
    assert result["prune30"].cost.macs < result["default"].cost.macs


def test_a_quantized_model_is_refused_with_the_way_out():
    model = network()
    made = edgepass.compile(model, recipe="int8", calibration={"x": INPUTS}, force=True, **QUIET)
    assert quantized_share(model) == 0
    assert quantized_share(made.model) == 1
    for call in (
        lambda: edgepass.compile(made.model, recipe="prune", **QUIET),
        lambda: edgepass.prune_scan(made.model),
    ):
        with pytest.raises(edgepass.EdgepassError, match=r"prune\+int8"):
            call()


# --- the command ---------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path):
    model = network(DEAD)
    fill_random_weights(model)
    write_onnx(model, tmp_path / "model.onnx")
    np.savez(tmp_path / "calib.npz", x=INPUTS)
    np.savez(tmp_path / "test.npz", x=INPUTS, labels=answers(model))
    return tmp_path


def invoke(*arguments: object) -> object:
    return CliRunner().invoke(app, ["prune", *map(str, arguments)], catch_exceptions=True)


def test_the_command_scans(files):
    out = invoke(files / "model.onnx", "--scan", "--calibration", files / "calib.npz", "--json")
    assert out.exit_code == 0, out.output
    data = json.loads(out.stdout)
    assert [row["name"] for row in data["groups"]] == ["layer0", "layer1"]
    assert data["measured"] == "outputs"
    again = invoke(files / "model.onnx", "--scan", "--data", files / "test.npz", "--ratio", 0.5)
    assert again.exit_code == 0, again.output
    assert "samples that no repair has seen" in " ".join(again.stdout.split())
    assert "it is the output 'y' of the model" in again.stdout


def test_the_command_prunes(files):
    out = invoke(
        files / "model.onnx", "-o", files / "out", "--ratio", 0.5, "--time-budget", 0,
        "--calibration", files / "calib.npz", "--json",
    )  # fmt: skip
    assert out.exit_code == 0, out.output
    assert json.loads(out.stdout)["ratio"] == 0.5
    assert edgepass.load(files / "out").run({"x": INPUTS})["y"].shape == (60, CLASSES)


def test_the_command_fails_where_limits_break(files):
    out = invoke(
        files / "model.onnx", "-o", files / "out", "--data", files / "test.npz",
        "--metric", "accuracy", "--limit", "accuracy>=1.5", "--step", 0.5, "--time-budget", 0,
    )  # fmt: skip
    assert out.exit_code == 29
    assert not (files / "out").exists()


@pytest.mark.parametrize(
    "arguments",
    [(), ("--scan", "-o", "out"), ("-o", "out", "--metric", "accuracy")],
    ids=["no folder", "scan writes nothing", "no data"],
)
def test_the_command_refuses(files, arguments):
    result = invoke(files / "model.onnx", *arguments)
    assert isinstance(result.exception, UsageError)

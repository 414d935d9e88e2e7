"""compile, estimate and the registries, as a user meets them."""

import os
import re
import subprocess
import sys

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper, numpy_helper

import edgepass
from edgepass.errors import (
    CalibrationError,
    PluginError,
    StrictTargetError,
    UnknownTargetError,
    UnsupportedOpError,
    UsageError,
)

GENERATOR = np.random.default_rng(0)
QUIET = {"time_budget_s": 0}


@pytest.fixture(scope="module")
def net() -> onnx.ModelProto:
    """Conv, BatchNormalization, Relu, residual Conv, pooling, Gemm; batch is dynamic."""

    def array(*shape):
        return GENERATOR.uniform(-0.5, 0.5, shape).astype(np.float32)

    weights = {
        "w1": array(16, 3, 3, 3), "s": array(16) + 1, "b": array(16), "m": array(16),
        "v": array(16) + 1, "w2": array(16, 16, 3, 3), "w3": array(16, 10), "b3": array(10),
    }  # fmt: skip
    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["c1"], pads=[1] * 4),
        helper.make_node("BatchNormalization", ["c1", "s", "b", "m", "v"], ["n1"]),
        helper.make_node("Relu", ["n1"], ["r1"]),
        helper.make_node("Conv", ["r1", "w2"], ["c2"], pads=[1] * 4),
        helper.make_node("Add", ["r1", "c2"], ["a2"]),
        helper.make_node("Relu", ["a2"], ["r2"]),
        helper.make_node("GlobalAveragePool", ["r2"], ["p"]),
        helper.make_node("Flatten", ["p"], ["f"]),
        helper.make_node("Gemm", ["f", "w3", "b3"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", 1, ["batch", 3, 16, 16])],
        [helper.make_tensor_value_info("y", 1, ["batch", 10])],
        [numpy_helper.from_array(a, n) for n, a in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


@pytest.fixture(scope="module")
def samples():
    return [{"x": GENERATOR.random((1, 3, 16, 16), np.float32)} for _ in range(8)]


def test_importing_edgepass_loads_nothing_heavy():
    code = (
        "import sys, edgepass; "
        "print([m for m in ('torch', 'tvm', 'onnxruntime', 'onnx', 'onnx_ir') if m in sys.modules])"
    )
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert output.stdout.strip() == "[]"


def test_every_public_name_resolves():
    for name in edgepass.__all__:
        assert getattr(edgepass, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'compilee'"):
        _ = edgepass.compilee


def test_the_default_recipe_is_lossless_and_says_what_int8_would_add(net, samples):
    compiled = edgepass.compile(net, target="arm64", **QUIET)
    assert [n.op_type for n in compiled.model.graph].count("BatchNormalization") == 0
    assert compiled.ledger.total_error.relative <= 1e-4
    (note,) = [n for n in compiled.notes if "int8" in n]
    assert "would take the file from" in note
    assert "assumed" in note
    before, unit, after, same = re.search(r"from ([\d.]+) (\w+) to ([\d.]+) (\w+)", note).groups()
    assert (float(after), same) < (float(before), unit)
    outputs = compiled.run({"x": np.concatenate([s["x"] for s in samples])})
    assert outputs["y"].shape == (8, 10)


def test_the_input_model_is_not_changed(net):
    before = net.SerializeToString()
    edgepass.compile(net, target="x86_64", **QUIET)
    assert net.SerializeToString() == before
    model = ir.from_proto(net)
    nodes = [n.op_type for n in model.graph]
    edgepass.compile(model, target="x86_64", **QUIET)
    assert [n.op_type for n in model.graph] == nodes


@pytest.mark.parametrize("target", ["x86_64", "arm64"])
def test_int8_for_each_target_uses_its_scheme(net, samples, target):
    compiled = edgepass.compile(net, target=target, recipe="int8", calibration=samples, **QUIET)
    first = next(n for n in compiled.model.graph if n.op_type == "QuantizeLinear")
    signed = target == "arm64"
    assert first.outputs[0].dtype == (ir.DataType.INT8 if signed else ir.DataType.UINT8)
    assert ("session.qdqisint8allowed" in compiled.session_options) is signed
    reference = edgepass.compile(net, target=target, **QUIET).run(samples[0])["y"]
    result = compiled.run(samples[0])["y"]
    assert np.abs(result - reference).max() <= 0.1 * np.ptp(reference)


@pytest.mark.parametrize("recipe", ["fp16", "bf16", "dynamic-int8", "int8-weights", "sparsify50"])
def test_every_recipe_makes_a_model_that_runs(net, samples, recipe):
    compiled = edgepass.compile(net, target="x86_64", recipe=recipe, **QUIET)
    assert compiled.run(samples[0])["y"].dtype == np.float32


def test_save_and_load(net, samples, tmp_path):
    compiled = edgepass.compile(net, target="arm64", recipe="int8", calibration=samples, **QUIET)
    folder = compiled.save(tmp_path / "out")
    artifact = edgepass.load(folder)
    expected = compiled.run(samples[0])["y"]
    np.testing.assert_allclose(artifact.run(samples[0])["y"], expected, atol=1e-6)
    assert ",int8," in artifact.manifest["recipe"]
    again = edgepass.compile(net, target="arm64", recipe="int8", calibration=samples, **QUIET)
    again.save(tmp_path / "again")
    for file in sorted(p.name for p in folder.iterdir()):
        assert (folder / file).read_bytes() == (tmp_path / "again" / file).read_bytes(), file


@pytest.mark.parametrize("form", ["list", "tuples", "arrays", "stack", "rows", "npz"])
def test_calibration_in_every_form(net, samples, tmp_path, form):
    arrays = [s["x"] for s in samples]
    np.savez(tmp_path / "data.npz", x=np.stack(arrays))
    data = {
        "list": samples,
        "tuples": [(a,) for a in arrays],
        "arrays": iter(arrays),
        "stack": {"x": np.stack(arrays)},
        "rows": {"x": np.concatenate(arrays)},
        "npz": tmp_path / "data.npz",
    }[form]
    compiled = edgepass.compile(net, target="x86_64", recipe="int8", calibration=data, **QUIET)
    (row,) = [r for r in compiled.ledger.rows if r.name == "int8"]
    assert "calibrated on 8 samples" in " ".join(row.notes)


def test_nan_in_calibration_is_named(net, samples):
    bad = [dict(s) for s in samples]
    bad[3] = {"x": np.full((1, 3, 16, 16), np.nan, np.float32)}
    with pytest.raises(CalibrationError, match="NaN") as caught:
        edgepass.compile(net, target="x86_64", recipe="int8", calibration=bad, **QUIET)
    assert "sample 3" in str(caught.value)


def test_estimate_prices_every_recipe_and_says_assumed(net):
    recipes = ["fp32", "fp16", "int8", "int8-weights", "sparsify50+int8"]
    estimate = edgepass.estimate(net, "arm64", recipes)
    assert [row.recipe for row in estimate.rows] == recipes
    assert not estimate.failed
    sizes = {row.recipe: row.file_bytes for row in estimate.rows}
    assert sizes["fp32"] > 1.5 * sizes["fp16"]
    assert sizes["fp32"] > 1.5 * sizes["int8-weights"]
    assert str(estimate).count("assumed") >= len(recipes)


def test_estimates_agree_with_what_is_saved(net, samples, tmp_path):
    estimate = edgepass.estimate(net, "x86_64", ["fp32", "fp16", "int8"])
    for row in estimate.rows:
        compiled = edgepass.compile(
            net, target="x86_64", recipe=row.recipe, calibration=samples, **QUIET
        )
        folder = compiled.save(tmp_path / row.recipe)
        actual = (folder / "model.onnx").stat().st_size
        # a small net: what is not weights (names, nodes) weighs more than in a real one
        assert row.file_bytes == pytest.approx(actual, rel=0.1), row.recipe


def test_estimate_of_absent_weights(net, tmp_path):
    copy = onnx.ModelProto.FromString(net.SerializeToString())  # saving moves weights out of it
    onnx.save(
        copy, tmp_path / "a.onnx", save_as_external_data=True, location="w", size_threshold=64
    )
    (tmp_path / "w").unlink()
    with_weights = edgepass.estimate(net, "arm64", ["fp32"]).rows[0]
    without = edgepass.estimate(tmp_path / "a.onnx", "arm64", ["fp32"]).rows[0]
    assert without.macs == with_weights.macs
    assert without.parameters == with_weights.parameters


def test_strict_refuses_what_falls_off_the_fast_path(net):
    board = edgepass.get_target("x86_64").replace(
        name="conv-only", ops=(edgepass.OpSupport(op_type="Conv"),)
    )
    with pytest.raises(UnsupportedOpError, match="conv-only can't run"):
        edgepass.compile(net, target=board, **QUIET)
    with pytest.raises(StrictTargetError, match="fall off"):
        edgepass.compile(net, target="x86_64", recipe="fp16{arithmetic=yes}", strict=True, **QUIET)


def test_unknown_targets_are_suggested():
    with pytest.raises(UnknownTargetError, match="did you mean arm64"):
        edgepass.get_target("arm46")
    with pytest.raises(UnknownTargetError, match="no target 'x86_64/tensorrt'"):
        edgepass.get_target("x86_64/tensorrt")


def test_a_variant_of_a_target():
    board = edgepass.get_target("arm64").replace(name="board", cores=2, frequency_ghz=1.2)
    assert (board.hardware.cores, board.hardware.arch) == (2, "aarch64")
    with pytest.raises(UsageError, match="no field 'corse'"):
        board.replace(corse=2)


def test_a_target_name_can_be_taken_once():
    with pytest.raises(PluginError, match="Two targets are called 'arm64'"):
        edgepass.register_target(edgepass.get_target("arm64").replace(description="mine"))


PLUGIN = '''
from dataclasses import dataclass
import edgepass

@dataclass(frozen=True)
class MyPass(edgepass.Pass):
    """Counts."""
    x: int = 0
    def run(self, model, context):
        return edgepass.PassResult(model, False, (f"x is {self.x}",))

BOARD = edgepass.get_target("arm64").replace(name="plugin-board", description="a board")
'''


def test_a_plugin_file(net, tmp_path):
    path = tmp_path / "plugin.py"
    path.write_text(PLUGIN)
    assert edgepass.load_plugin(path) == ["my_pass", "plugin-board"]
    assert edgepass.load_plugin(path) == ["my_pass", "plugin-board"]  # twice is once
    compiled = edgepass.compile(net, "plugin-board", recipe="cleanup,my_pass{x=1}", **QUIET)
    assert ("x is 1",) in [row.notes for row in compiled.ledger.rows]
    other = tmp_path / "other.py"
    other.write_text(PLUGIN)
    with pytest.raises(PluginError, match="Two .* are called"):
        edgepass.load_plugin(other)


def test_plugins_that_fail_say_where(tmp_path):
    path = tmp_path / "broken.py"
    path.write_text("x = 1\nraise KeyError('oops')\n")
    with pytest.raises(PluginError, match="KeyError") as caught:
        edgepass.load_plugin(path)
    assert "broken.py:2" in str(caught.value)
    (tmp_path / "empty.py").write_text("x = 1\n")
    with pytest.raises(PluginError, match="defines no pass, rule or target"):
        edgepass.load_plugin(tmp_path / "empty.py")
    with pytest.raises(PluginError, match="is not a file"):
        edgepass.load_plugin(tmp_path / "absent.py")


def test_a_slower_result_is_announced(net, monkeypatch):
    from edgepass import api
    from edgepass.speed import Speed

    monkeypatch.setattr(api, "compare", lambda *_, **__: Speed(1.0, 2.0, 0.5, 9))
    compiled = edgepass.compile(net, target="host", time_budget_s=0.1)
    assert any("SLOWER" in note and "2.00x" in note for note in compiled.notes)
    assert "2.00x slower (measured, 9 pairs)" in str(compiled)


def test_an_entry_point(tmp_path):
    (tmp_path / "entry_plugin.py").write_text(
        PLUGIN.replace("plugin-board", "entry-board").replace("MyPass", "EntryPass")
    )
    info = tmp_path / "entry_plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: entry-plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[edgepass.plugins]\nmine = entry_plugin\n")
    code = (
        "import edgepass; print(edgepass.get_target('entry-board').description); "
        "print('entry_pass' in edgepass.list_passes())"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    output = subprocess.check_output([sys.executable, "-c", code], text=True, env=environment)
    assert output.split("\n")[:2] == ["a board", "True"]

"""The command line: what it prints, where, and what it returns."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx_ir as ir
import pytest

from edgepass.artifact import load
from edgepass.cli import INTERRUPTED, UNEXPECTED, main
from edgepass.cli.arguments import parse_dims, parse_input_shapes, split_list
from edgepass.errors import UsageError
from edgepass.npz import read_npz, write_npz
from edgepass.targets.onnx_file import write_onnx


def small_net(hidden: int = 32, seed: int = 0) -> ir.Model:
    """y = Relu(x @ w0 + b) @ w1, with an Identity that cleanup removes and a dynamic batch."""
    generator = np.random.default_rng(seed)
    floats = ir.TensorType(ir.DataType.FLOAT)

    def weight(name: str, *shape: int) -> ir.Value:
        data = generator.normal(size=shape).astype(np.float32)
        return ir.Value(name=name, type=floats, const_value=ir.tensor(data, name=name))

    x = ir.Value(name="x", shape=ir.Shape(["batch", 16]), type=floats)
    w0, bias, w1 = weight("w0", 16, hidden), weight("bias", hidden), weight("w1", hidden, 4)
    nodes = [ir.node("MatMul", [x, w0], name="first")]
    nodes.append(ir.node("Add", [nodes[-1].outputs[0], bias], name="add"))
    nodes.append(ir.node("Relu", nodes[-1].outputs, name="relu"))
    nodes.append(ir.node("Identity", nodes[-1].outputs, name="useless"))
    nodes.append(ir.node("MatMul", [nodes[-1].outputs[0], w1], name="second"))
    for i, node in enumerate(nodes):
        node.outputs[0].name = f"h{i}"
    y = nodes[-1].outputs[0]
    y.name, y.shape, y.type = "y", ir.Shape(["batch", 4]), floats
    graph = ir.Graph(
        [x], [y], nodes=nodes, initializers=[w0, bias, w1], opset_imports={"": 17}, name="net"
    )
    return ir.Model(graph, ir_version=8)


@pytest.fixture
def net(tmp_path: Path) -> Path:
    path = tmp_path / "net.onnx"
    write_onnx(small_net(), path)
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.npz"
    np.savez(path, x=np.random.default_rng(1).normal(size=(12, 16)).astype(np.float32))
    return path


def run_json(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict:
    code = main([*map(str, arguments), "--json"])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return json.loads(captured.out)


# --- compile, run ----------------------------------------------------------------------------


def test_compile_then_run(net: Path, data: Path, tmp_path: Path, capsys):
    out = tmp_path / "out"
    report = run_json(capsys, "compile", net, "-o", out, "--target", "x86_64", "--time-budget", 0)
    assert report["artifact"] == str(out)
    assert report["target"] == "x86_64"
    assert report["ledger"]["rows"]
    assert report["speed"] is None
    assert "Identity" not in [n.op_type for n in ir.load(out / "model.onnx").graph]

    golden = run_json(capsys, "run", out)
    assert golden["golden_difference"] == {"y": 0.0}
    results = tmp_path / "results.npz"
    ran = run_json(capsys, "run", out, "--input", data, "-o", results)
    assert ran["outputs"]["y"]["shape"] == [12, 4]
    assert ran["golden_difference"] is None
    expected = load(out).run(read_npz(data))
    np.testing.assert_array_equal(read_npz(results)["y"], expected["y"])
    plain = run_json(capsys, "run", net, "--input", data)
    assert plain["outputs"]["y"]["max"] == pytest.approx(ran["outputs"]["y"]["max"], rel=1e-5)


def test_compile_int8_with_calibration_and_ort(net: Path, data: Path, tmp_path: Path, capsys):
    out = tmp_path / "out"
    arguments = ["--recipe", "int8", "--calibration", data, "--format", "onnx", "--format", "ort"]
    report = run_json(
        capsys, "compile", net, "-o", out, "-t", "arm64", "--time-budget", 0, *arguments
    )
    assert "int8" in report["recipe"]
    assert {"model.onnx", "model.ort"} <= {path.name for path in out.iterdir()}
    ops = [node.op_type for node in ir.load(out / "model.onnx").graph]
    assert "QuantizeLinear" in ops
    assert load(out).manifest["session_options"] == {"session.qdqisint8allowed": "1"}


def test_compile_prints_tables(net: Path, tmp_path: Path, capsys):
    assert main(["compile", str(net), "-o", str(tmp_path / "out"), "--time-budget", "0"]) == 0
    captured = capsys.readouterr()
    assert "Ledger" in captured.out
    assert "saved to" in captured.out
    assert "\x1b[" not in captured.out + captured.err


def test_samples_with_a_new_axis_are_run_one_by_one(net: Path, tmp_path: Path, capsys):
    stack = np.random.default_rng(2).normal(size=(3, 2, 16)).astype(np.float32)
    write_npz(tmp_path / "stack.npz", {"x": stack})
    out = tmp_path / "out.npz"
    run_json(capsys, "run", net, "--input", tmp_path / "stack.npz", "-o", out)
    assert read_npz(out)["y"].shape == (3, 2, 4)


def test_plugin_pass_in_a_recipe(net: Path, tmp_path: Path, capsys):
    plugin = tmp_path / "my_passes.py"
    plugin.write_text(
        "from dataclasses import dataclass\n"
        "from edgepass import Pass, PassResult, Stage\n\n"
        "@dataclass(frozen=True)\n"
        "class CountReluForTest(Pass):\n"
        "    '''Counts Relu nodes.'''\n"
        "    at_least: int = 0\n"
        "    stage = Stage.CLEANUP\n"
        "    def run(self, model, context):\n"
        "        n = sum(node.op_type == 'Relu' for node in model.graph)\n"
        "        return PassResult(model, False, (f'{n} Relu, {self.at_least} wanted',))\n"
    )
    recipe = "cleanup,count_relu_for_test{at_least=3}"
    arguments = ["--plugin", plugin, "--recipe", recipe, "--time-budget", 0]
    report = run_json(capsys, "compile", net, "-o", tmp_path / "out", *arguments)
    notes = [note for row in report["ledger"]["rows"] for note in row["notes"]]
    assert "1 Relu, 3 wanted" in notes
    listed = run_json(capsys, "passes", "count_relu_for_test", "--plugin", plugin)
    assert listed["options"][0]["name"] == "at_least"


def test_run_without_input_wants_an_artifact(net: Path, capsys):
    assert main(["run", str(net), "--json"]) == UsageError.exit_code
    captured = capsys.readouterr()
    assert json.loads(captured.out)["error"]["code"] == "usage"
    assert "--input data.npz" in captured.err


def test_emulated_run(net: Path, data: Path, tmp_path: Path, capsys, emulator):
    out = tmp_path / "out"
    run_json(capsys, "compile", net, "-o", out, "--target", "arm64", "--time-budget", 0)
    assert run_json(capsys, "run", out, "--emulate", "arm64")["golden_difference"]["y"] < 1e-4


# --- estimate, lists, show, explain, bisect --------------------------------------------------


def test_estimate(net: Path, capsys):
    report = run_json(capsys, "estimate", net, "--target", "arm64", "--recipes", "fp32,int8")
    text = json.dumps(report)
    assert "fp32" in text
    assert "int8" in text
    assert main(["estimate", str(net), "--recipes", "fp32", "--per-node"]) == 0
    assert "second" in capsys.readouterr().out


def test_targets(capsys):
    names = [row["name"] for row in run_json(capsys, "targets")]
    assert {"arm64", "x86_64", "arm64/tvm"} <= set(names)
    assert main(["targets"]) == 0
    assert "arm64/tvm" in capsys.readouterr().out


def test_passes(capsys):
    report = run_json(capsys, "passes")
    names = {row["name"] for row in report["passes"]}
    assert set(report["groups"]["cleanup"]) <= names
    assert "int8" in report["recipes"]
    for row in report["passes"]:
        assert row["summary"], f"{row['name']} has no docstring"
    page = run_json(capsys, "passes", report["groups"]["cleanup"][0])
    assert page["documentation"]
    assert main(["passes"]) == 0
    assert main(["passes", report["groups"]["cleanup"][0]]) == 0


def test_show_and_difference(net: Path, tmp_path: Path, capsys):
    assert main(["show", str(net)]) == 0
    text = capsys.readouterr().out
    assert "input x: FLOAT[batch,16]" in text
    assert "MatMul" in text
    other = tmp_path / "other.onnx"
    write_onnx(small_net(hidden=8), other)
    assert main(["show", str(net), str(other)]) == 0
    assert "@@" in capsys.readouterr().out
    assert run_json(capsys, "show", net, net) == {"equal": True, "difference": ""}
    assert run_json(capsys, "show", net)["inputs"][0]["shape"] == ["batch", 16]


def test_show_of_an_artifact(net: Path, tmp_path: Path, capsys):
    run_json(capsys, "compile", net, "-o", tmp_path / "out", "--time-budget", 0)
    assert main(["show", str(net), str(tmp_path / "out")]) == 0
    assert "-" in capsys.readouterr().out


def test_explain(net: Path, capsys):
    from edgepass.passes.registry import rules

    for name in rules():
        found = run_json(capsys, "explain", net, "--rule", name)
        assert all(item["matched"] or item["reason"] for item in found), name
    assert main(["explain", str(net), "--rule", "no_such_rule"]) == 18
    name = next(iter(rules()))
    assert main(["explain", str(net), "--rule", name, "--node", "nope"]) == 2
    assert "no node 'nope'" in capsys.readouterr().err
    assert len(run_json(capsys, "explain", net, "--rule", name, "--node", "relu")) == 1


def test_bisect(net: Path, tmp_path: Path, capsys):
    plugin = tmp_path / "bad_pass.py"
    plugin.write_text(
        "from dataclasses import dataclass\n"
        "import numpy as np, onnx_ir as ir\n"
        "from edgepass import Pass, PassResult, Stage\n\n"
        "@dataclass(frozen=True)\n"
        "class BreakBiasForTest(Pass):\n"
        "    '''Doubles the bias.'''\n"
        "    stage = Stage.PRUNE\n"
        "    def run(self, model, context):\n"
        "        value = model.graph.initializers['bias']\n"
        "        value.const_value = ir.tensor(value.const_value.numpy() * 2, name='bias')\n"
        "        return PassResult(model, True)\n"
    )
    arguments = ["--plugin", plugin, "--recipe", "break_bias_for_test,fuse"]
    report = run_json(capsys, "bisect", net, "-o", tmp_path / "small", *arguments)
    assert "break_bias_for_test" in report["guilty"]
    assert (tmp_path / "small").is_dir()


# --- arguments -------------------------------------------------------------------------------


def test_text_forms():
    assert parse_dims(["batch=1", "n=128"]) == {"batch": 1, "n": 128}
    assert parse_input_shapes([]) is None
    assert parse_input_shapes(["1x3x224x224"]) == ["1x3x224x224"]
    shapes = parse_input_shapes(["x=1x3x8x8", "ids=1x128:int64", "scale="])
    assert shapes == {"x": "1x3x8x8", "ids": "1x128:int64", "scale": ""}
    assert split_list("fp32, prune{ratio=0.5,scope=x},int8") == [
        "fp32",
        "prune{ratio=0.5,scope=x}",
        "int8",
    ]


@pytest.mark.parametrize("text", ["batch", "batch=", "=1", "batch=0", "batch=-1", "batch=x"])
def test_a_wrong_dim(text: str):
    with pytest.raises(UsageError, match="--dim"):
        parse_dims([text])


@pytest.mark.parametrize("items", [["x=1x"], ["x=axb"], ["x=1", "2"], ["x=1", "x=2"]])
def test_a_wrong_input_shape(items: list[str]):
    with pytest.raises(UsageError, match="--input-shape"):
        parse_input_shapes(items)


# --- errors ----------------------------------------------------------------------------------


def test_usage_errors(capsys):
    assert main(["compile"]) == 2
    assert main(["run", "--nope", "--json"]) == 2
    captured = capsys.readouterr()
    assert json.loads(captured.out)["error"]["code"] == "usage"
    assert main(["no-such-command"]) == 2


def test_an_unexpected_exception_is_short_and_says_how_to_report(net: Path, capsys, monkeypatch):
    def broken(*args: object, **kwargs: object) -> None:
        raise RuntimeError("boom\nand more")

    monkeypatch.setattr("edgepass.ir.text.format_model", broken)
    assert main(["show", str(net), "--json"]) == UNEXPECTED
    captured = capsys.readouterr()
    assert json.loads(captured.out)["error"]["why"] == "RuntimeError: boom"
    assert "Traceback" not in captured.err
    monkeypatch.setenv("EDGEPASS_DEBUG", "1")
    assert main(["show", str(net)]) == UNEXPECTED
    assert "Traceback" in capsys.readouterr().err


def test_ctrl_c(net: Path, tmp_path: Path, capsys, monkeypatch):
    def interrupted(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("edgepass.api.compile", interrupted)
    out = tmp_path / "out"
    assert main(["compile", str(net), "-o", str(out)]) == INTERRUPTED
    assert not out.exists()
    assert "interrupted" in capsys.readouterr().err


def test_an_error_on_a_terminal_is_a_panel(net: Path, capsys, monkeypatch):
    monkeypatch.setattr(
        "edgepass.cli.console.sys",
        SimpleNamespace(
            stderr=SimpleNamespace(
                isatty=lambda: True, write=sys.stderr.write, flush=sys.stderr.flush
            ),
            stdout=sys.stdout,
        ),
    )
    assert main(["run", str(net)]) == 2
    assert "golden input" in capsys.readouterr().err


def test_help_and_version_import_nothing_heavy():
    script = (
        "import sys; from edgepass.cli import main; code = main(sys.argv[1:]);"
        "heavy = {'torch', 'tvm', 'onnxruntime', 'onnx', 'onnx_ir', 'numpy'} & set(sys.modules);"
        "sys.exit(f'imported {heavy}' if heavy else code)"
    )
    for argument in ("--help", "--version"):
        ran = subprocess.run(
            [sys.executable, "-c", script, argument], capture_output=True, text=True, check=False
        )
        assert ran.returncode == 0, ran.stderr
        assert "edgepass" in ran.stdout
    ran = subprocess.run(
        [sys.executable, "-c", script, "compile", "--help"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    for option in ("--target", "--recipe", "--calibration", "--strict", "--plugin"):
        assert option in ran.stdout

"""Bad input through the command line: each kind has its own message and exit code.

And what a killed or interrupted `compile` leaves behind.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from edgepass.artifact import load, save_artifact
from edgepass.cli import main
from edgepass.targets.feed import input_specs, output_specs
from edgepass.targets.onnx_file import write_onnx
from edgepass.targets.onnxruntime import emit
from edgepass.targets.registry import get_target

X = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 64])
Y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)


def proto(
    nodes: list[onnx.NodeProto], inputs: list | None = None, weights: list | None = None
) -> onnx.ModelProto:
    graph = helper.make_graph(nodes, "g", inputs or [X], [Y], weights or [])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def dense_proto() -> onnx.ModelProto:
    weight = onnx.numpy_helper.from_array(
        np.random.default_rng(0).normal(size=(64, 8)).astype(np.float32), "w"
    )
    return proto([helper.make_node("MatMul", ["x", "w"], ["y"], name="product")], weights=[weight])


class Case:
    """What a test calls: `case(arguments...)` runs the command line and checks the outcome."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder = folder
        self.capsys = capsys

    def model(self, source: onnx.ModelProto | bytes | None = None) -> Path:
        path = self.folder / "model.onnx"
        source = dense_proto() if source is None else source
        path.write_bytes(source if isinstance(source, bytes) else source.SerializeToString())
        return path

    def samples(self, **arrays: np.ndarray) -> Path:
        np.savez(self.folder / "data.npz", **arrays)
        return self.folder / "data.npz"

    def compile_fails(self, model: Path, code: str, exit_code: int, *arguments: object) -> str:
        out = self.folder / "out"
        text = ["compile", model, "-o", out, "--time-budget", 0, "--json", *arguments]
        message = self.fails(code, exit_code, *text)
        assert not out.exists()
        assert [p for p in self.folder.iterdir() if p.name.startswith(".")] == []
        return message

    def fails(self, code: str, exit_code: int, *arguments: object) -> str:
        returned = main(list(map(str, arguments)))
        captured = self.capsys.readouterr()
        assert returned == exit_code, captured.err
        assert "Traceback" not in captured.err
        error = json.loads(captured.out)["error"]
        assert error["code"] == code
        assert error["what"] in captured.err
        return " ".join(captured.err.split())


@pytest.fixture
def case(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Case:
    return Case(tmp_path, capsys)


# --- model files -----------------------------------------------------------------------------


def test_no_such_file(case: Case):
    message = case.compile_fails(case.folder / "nothing.onnx", "model-file", 10)
    assert "nothing.onnx" in message


def test_truncated_file(case: Case):
    whole = dense_proto().SerializeToString()
    message = case.compile_fails(case.model(whole[: len(whole) // 2]), "model-file", 10)
    assert "model.onnx" in message


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04 zip", b"\x80\x02 pickle"])
def test_not_a_model(case: Case, content: bytes):
    case.compile_fails(case.model(content), "model-file", 10)


def test_missing_external_data(case: Case):
    path = case.folder / "model.onnx"
    write_onnx(ir.from_proto(dense_proto()), path, external_data=True)
    (case.folder / "model.onnx.data").unlink()
    message = case.compile_fails(path, "weights-absent", 11)
    assert "model.onnx.data" in message
    assert main(["estimate", str(path), "--recipes", "fp32", "--json"]) == 0


def external(location: str, length: int = 64 * 8 * 4) -> onnx.ModelProto:
    model = dense_proto()
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", "0"), ("length", str(length))):
        tensor.external_data.add(key=key, value=value)
    return model


@pytest.mark.parametrize("location", ["../secret.bin", "/etc/hostname", "a/../../secret.bin"])
def test_external_data_outside_the_folder(case: Case, location: str):
    inner = case.folder / "inner"
    inner.mkdir()
    (case.folder / "secret.bin").write_bytes(bytes(64 * 8 * 4))
    path = inner / "model.onnx"
    path.write_bytes(external(location).SerializeToString())
    message = case.compile_fails(path, "unsafe-path", 12)
    assert location.rsplit("/", 1)[-1] in message


def test_external_data_through_a_link(case: Case):
    inner = case.folder / "inner"
    inner.mkdir()
    (case.folder / "secret.bin").write_bytes(bytes(64 * 8 * 4))
    (inner / "weights.bin").symlink_to(case.folder / "secret.bin")
    (inner / "model.onnx").write_bytes(external("weights.bin").SerializeToString())
    case.compile_fails(inner / "model.onnx", "unsafe-path", 12)


# --- graphs ----------------------------------------------------------------------------------


def test_cyclic_graph(case: Case):
    nodes = [
        helper.make_node("Add", ["x", "b"], ["a"], name="one"),
        helper.make_node("Relu", ["a"], ["b"], name="two"),
        helper.make_node("Relu", ["b"], ["y"], name="three"),
    ]
    message = case.compile_fails(case.model(proto(nodes)), "invalid-graph", 13)
    assert "cycle" in message


def test_dangling_graph(case: Case):
    nodes = [helper.make_node("Add", ["x", "nowhere"], ["y"], name="sum")]
    message = case.compile_fails(case.model(proto(nodes)), "invalid-graph", 13)
    assert "nowhere" in message


def test_name_defined_twice(case: Case):
    nodes = [
        helper.make_node("Relu", ["x"], ["y"], name="one"),
        helper.make_node("Neg", ["x"], ["y"], name="two"),
    ]
    case.compile_fails(case.model(proto(nodes)), "invalid-graph", 13)


def test_shapes_that_contradict(case: Case):
    weight = onnx.numpy_helper.from_array(np.zeros((7, 8), np.float32), "w")
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"], name="product")]
    message = case.compile_fails(case.model(proto(nodes, weights=[weight])), "shape", 14)
    assert "product" in message


@pytest.mark.parametrize(
    ("domain", "code", "exit_code"),
    [("", "invalid-graph", 13), ("my.domain", "unsupported-op", 15)],
)
def test_unknown_operator(case: Case, domain: str, code: str, exit_code: int):
    """In the standard's own domain the graph is wrong; in another, the runtime lacks it."""
    model = proto([helper.make_node("Teleport", ["x"], ["y"], name="beam", domain=domain)])
    if domain:
        model.opset_import.append(helper.make_opsetid(domain, 1))
    message = case.compile_fails(case.model(model), code, exit_code)
    assert "Teleport" in message
    assert "beam" in message


def test_operator_without_a_kernel(case: Case):
    """A double AveragePool is in the standard, and ONNX Runtime's CPU provider lacks it."""
    image = helper.make_tensor_value_info("x", TensorProto.DOUBLE, [1, 3, 8, 8])
    node = helper.make_node("AveragePool", ["x"], ["y"], name="pool", kernel_shape=[2, 2])
    model = proto([node], inputs=[image])
    model.graph.output[0].type.tensor_type.elem_type = TensorProto.DOUBLE
    message = case.compile_fails(case.model(model), "unsupported-op", 15, "-t", "x86_64")
    assert "AveragePool" in message
    assert "pool" in message
    assert "tensor(double)" in message


# --- calibration -----------------------------------------------------------------------------

INT8 = ("--recipe", "int8", "--calibration")
ROWS = np.ones((4, 64), np.float32)


def nan_rows() -> np.ndarray:
    rows = ROWS.copy()
    rows[2, 5] = np.nan
    return rows


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"z": ROWS}, "'x'"),
        ({"x": ROWS, "z": ROWS}, "no input 'z'"),
        ({"x": ROWS[:, :5]}, "64 elements along axis 1, the array 5"),
        ({"x": np.ones((4, 1, 1, 64), np.float32)}, "dimensions"),
        ({"x": ROWS.astype(np.float64)}, "astype('float32')"),
        ({"x": ROWS.astype(np.int64)}, "the array is int64"),
        ({"x": nan_rows()}, "NaN"),
        ({"x": ROWS[:0]}, "no sample"),
        ({"x": np.array([{"code": 1}], object)}, "Python objects"),
    ],
)
def test_wrong_calibration(case: Case, arrays: dict[str, np.ndarray], message: str):
    found = case.compile_fails(case.model(), "calibration", 16, *INT8, case.samples(**arrays))
    assert message in found


def test_damaged_calibration(case: Case):
    path = case.samples(x=ROWS)
    path.write_bytes(path.read_bytes()[:100])
    case.compile_fails(case.model(), "calibration", 16, *INT8, path)


def test_calibration_that_is_no_data(case: Case):
    case.compile_fails(case.model(), "usage", 2, *INT8, case.folder / "none.npz")
    (case.folder / "data").mkdir()
    case.compile_fails(case.model(), "usage", 2, *INT8, case.folder / "data")


def test_int8_without_calibration(case: Case):
    message = case.compile_fails(case.model(), "usage", 2, "--recipe", "int8")
    assert "calibration" in message


def test_wrong_run_input(case: Case):
    data = case.samples(x=ROWS.astype(np.float64))
    case.fails("calibration", 16, "run", case.model(), "--input", data, "--json")


# --- names and options -----------------------------------------------------------------------


def test_unknown_target(case: Case):
    message = case.compile_fails(case.model(), "unknown-target", 17, "--target", "amr64")
    assert "arm64" in message


def test_unknown_pass(case: Case):
    message = case.compile_fails(case.model(), "unknown-pass", 18, "--recipe", "cleanup,fsue")
    assert "fsue" in message


@pytest.mark.parametrize(
    "recipe", ["cleanup,dead_code{nope=1}", "cleanup,dead_code{", "", "cleanup,sparsify{ratio=abc}"]
)
def test_wrong_option(case: Case, recipe: str):
    case.compile_fails(case.model(), "pass-option", 19, "--recipe", recipe)


def test_broken_plugin(case: Case):
    plugin = case.folder / "plugin.py"
    case.compile_fails(case.model(), "plugin", 20, "--plugin", plugin)
    plugin.write_text("raise ValueError('no')\n")
    case.compile_fails(case.model(), "plugin", 20, "--plugin", plugin)
    plugin.write_text("x = 1\n")
    case.compile_fails(case.model(), "plugin", 20, "--plugin", plugin)


def test_unknown_format(case: Case):
    message = case.compile_fails(case.model(), "usage", 2, "--format", "tflite")
    assert "tflite" in message


def test_wrong_dim(case: Case):
    case.compile_fails(case.model(), "usage", 2, "--dim", "batch=zero")


def test_unknown_architecture(case: Case):
    text = "no_such_package_of_mine:build"
    case.fails("architecture", 26, "estimate", text, "--recipes", "fp32", "--json")


def test_a_folder_that_is_not_an_artifact(case: Case):
    out = case.folder / "photos"
    out.mkdir()
    (out / "cat.jpg").write_bytes(b"meow")
    case.fails("usage", 2, "compile", case.model(), "-o", out, "--time-budget", 0, "--json")
    assert (out / "cat.jpg").read_bytes() == b"meow"
    case.fails("artifact", 23, "run", out, "--json")


# --- the earlier artifact stays whole --------------------------------------------------------


def earlier(folder: Path) -> dict[str, bytes]:
    """An artifact at `folder`, and the bytes of its files."""
    model = ir.from_proto(dense_proto())
    target = get_target("x86_64")
    save_artifact(
        folder,
        write_model=lambda place: emit(model, target, place),
        target=target,
        recipe="none",
        inputs=input_specs(model),
        outputs=output_specs(model),
        golden_input={"x": ROWS},
    )
    return contents(folder)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


SCRIPT = textwrap.dedent(
    """
    import importlib, pathlib, sys, time
    from edgepass.cli import main
    import edgepass.artifact, edgepass.passes.driver, edgepass.targets.onnxruntime

    module, name = sys.argv[1].split(":")
    module = importlib.import_module(module)

    def wait(*args, **kwargs):
        pathlib.Path(sys.argv[2]).write_text("here")
        time.sleep(60)

    setattr(module, name, wait)
    sys.exit(main(sys.argv[3:]))
    """
)

POINTS = [
    "edgepass.api:run_passes",
    "edgepass.targets.onnxruntime:write_onnx",
    "edgepass.artifact:write_npz",
    "edgepass.atomic:_swap_in",
]


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT], ids=["kill", "ctrl-c"])
def test_stopped_in_the_middle_of_compile(tmp_path: Path, point: str, number: signal.Signals):
    """The child waits inside one step of `compile`; there it gets the signal."""
    out, mark, model = tmp_path / "out", tmp_path / "mark", tmp_path / "model.onnx"
    model.write_bytes(dense_proto().SerializeToString())
    before = earlier(out)
    arguments = ["compile", str(model), "-o", str(out), "--time-budget", "0"]
    child = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, point, str(mark), *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        # a shell that runs the tests in its background has them ignore Ctrl-C
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL) and None,
    )
    try:
        wait_for(mark.exists, child)
        child.send_signal(number)
        code = child.wait(30)
    finally:
        child.kill()
        child.wait()
    assert code == (130 if number == signal.SIGINT else -signal.SIGKILL)
    assert contents(out) == before
    assert load(out).verify() == {"y": 0.0}
    if number == signal.SIGINT:
        assert sorted(p.name for p in tmp_path.iterdir()) == ["mark", "model.onnx", "out"]
    assert main(arguments) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mark", "model.onnx", "out"]
    assert contents(out) != before


def wait_for(condition: Callable[[], bool], child: subprocess.Popen[bytes]) -> None:
    for _ in range(600):
        if condition():
            return
        assert child.poll() is None, "the child ended before it came to the point"
        time.sleep(0.1)
    raise AssertionError("the child never came to the point")

"""Models really run on the emulated arm64 machine, and what goes wrong there is said clearly."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.helper as oh
import pytest
from onnx import TensorProto, numpy_helper

from edgepass.errors import LoweringError, MissingDependencyError, UsageError
from edgepass.targets.emulator import EmulatedJob, Emulator, find_emulator

RNG = np.random.default_rng(7)


def save_model(
    path: Path,
    nodes: list[onnx.NodeProto],
    initializers: dict[str, np.ndarray],
    inputs: dict[str, tuple[int, list[int]]],
    outputs: dict[str, tuple[int, list[int]]],
) -> Path:
    def infos(table: dict[str, tuple[int, list[int]]]) -> list[onnx.ValueInfoProto]:
        return [oh.make_tensor_value_info(name, *entry) for name, entry in table.items()]

    graph = oh.make_graph(
        nodes,
        "g",
        infos(inputs),
        infos(outputs),
        [numpy_helper.from_array(array, name) for name, array in initializers.items()],
    )
    opset = oh.make_opsetid("", 17)
    onnx.save(oh.make_model(graph, opset_imports=[opset], ir_version=8), path)
    return path


def conv_net(path: Path) -> Path:
    """Conv-Relu, a depthwise convolution, a residual, pooling and a Gemm, fp32."""
    weights = {
        "w0": RNG.standard_normal((16, 3, 3, 3)).astype(np.float32),
        "b0": RNG.standard_normal(16).astype(np.float32),
        "w1": RNG.standard_normal((16, 1, 3, 3)).astype(np.float32),
        "w2": RNG.standard_normal((16, 10)).astype(np.float32),
    }
    nodes = [
        oh.make_node("Conv", ["x", "w0", "b0"], ["c0"], pads=[1, 1, 1, 1]),
        oh.make_node("Relu", ["c0"], ["r0"]),
        oh.make_node("Conv", ["r0", "w1"], ["c1"], pads=[1, 1, 1, 1], group=16),
        oh.make_node("Add", ["c1", "r0"], ["s"]),
        oh.make_node("GlobalAveragePool", ["s"], ["p"]),
        oh.make_node("Flatten", ["p"], ["f"]),
        oh.make_node("Gemm", ["f", "w2"], ["y"]),
    ]
    shapes = {"x": (TensorProto.FLOAT, [1, 3, 16, 16])}
    return save_model(path, nodes, weights, shapes, {"y": (TensorProto.FLOAT, [1, 10])})


def accumulator(path: Path) -> Path:
    """A state carried over calls: `state_out = state + x`, and twice that as the output."""
    nodes = [
        oh.make_node("Add", ["state", "x"], ["state_out"]),
        oh.make_node("Add", ["state_out", "state_out"], ["y"]),
    ]
    vector = (TensorProto.FLOAT, [4])
    return save_model(
        path, nodes, {}, {"x": vector, "state": vector}, {"y": vector, "state_out": vector}
    )


def endless_loop(path: Path) -> Path:
    """A Loop of 2**62 trips that adds one: runs until it is killed."""
    body = oh.make_graph(
        [
            oh.make_node("Identity", ["go"], ["go_out"]),
            oh.make_node("Add", ["v", "v"], ["v_out"]),
        ],
        "body",
        [
            oh.make_tensor_value_info("i", TensorProto.INT64, []),
            oh.make_tensor_value_info("go", TensorProto.BOOL, []),
            oh.make_tensor_value_info("v", TensorProto.FLOAT, [1]),
        ],
        [
            oh.make_tensor_value_info("go_out", TensorProto.BOOL, []),
            oh.make_tensor_value_info("v_out", TensorProto.FLOAT, [1]),
        ],
    )
    nodes = [oh.make_node("Loop", ["trips", "yes", "x"], ["y"], body=body)]
    constants = {"trips": np.array(2**62), "yes": np.array(True)}
    vector = (TensorProto.FLOAT, [1])
    return save_model(path, nodes, constants, {"x": vector}, {"y": vector})


def quantized_net(path: Path) -> Path:
    """Two convolutions with s8 activations and per-channel s8 weights, as Q/DQ pairs."""
    values: dict[str, np.ndarray] = {"zero": np.array(0, np.int8), "scale": np.float32(0.05)}
    nodes = []

    def quantize(name: str) -> str:
        nodes.append(oh.make_node("QuantizeLinear", [name, "scale", "zero"], [f"{name}_q"]))
        nodes.append(
            oh.make_node("DequantizeLinear", [f"{name}_q", "scale", "zero"], [f"{name}_d"])
        )
        return f"{name}_d"

    current = quantize("x")
    for layer, (outputs, inputs) in enumerate([(16, 3), (16, 16)]):
        w, s, z = f"w{layer}", f"ws{layer}", f"wz{layer}"
        values[w] = RNG.integers(-127, 128, (outputs, inputs, 3, 3), dtype=np.int8)
        values[s] = RNG.uniform(0.001, 0.002, outputs).astype(np.float32)
        values[z] = np.zeros(outputs, np.int8)
        values[f"b{layer}"] = RNG.integers(-500, 500, outputs, dtype=np.int32)
        values[f"bs{layer}"] = values[s] * values["scale"]
        values[f"bz{layer}"] = np.zeros(outputs, np.int32)
        nodes.append(oh.make_node("DequantizeLinear", [w, s, z], [f"{w}_d"], axis=0))
        bias = [f"b{layer}", f"bs{layer}", f"bz{layer}"]
        nodes.append(oh.make_node("DequantizeLinear", bias, [f"b{layer}_d"], axis=0))
        conv = [current, f"{w}_d", f"b{layer}_d"]
        nodes.append(oh.make_node("Conv", conv, [f"c{layer}"], pads=[1, 1, 1, 1]))
        current = quantize(f"c{layer}")
    shapes = {"x": (TensorProto.FLOAT, [1, 3, 8, 8])}
    values = {name: np.asarray(value) for name, value in values.items()}
    return save_model(path, nodes, values, shapes, {current: (TensorProto.FLOAT, [1, 16, 8, 8])})


def host_outputs(model: Path, feed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What ONNX Runtime computes on the host, optimizations off."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(None, feed), strict=True))


def relative_error(actual: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference, relative to the range of the expected values."""
    return float(np.abs(actual - expected).max() / np.ptp(expected))


@pytest.mark.arm64
def test_onnxruntime_jobs_in_one_process(emulator: Emulator, tmp_path: Path) -> None:
    """fp32 equals the host; s8/s8 fuses into QLinearConv; state is carried; levels are obeyed."""
    net = conv_net(tmp_path / "net.onnx")
    feeds = [{"x": RNG.standard_normal((1, 3, 16, 16)).astype(np.float32)} for _ in range(2)]
    quantized = quantized_net(tmp_path / "quantized.onnx")
    image = {"x": RNG.uniform(-5, 5, (1, 3, 8, 8)).astype(np.float32)}
    ones = np.ones(4, np.float32)
    jobs = [
        EmulatedJob(
            name="fp32", model=net, feeds=feeds, save_optimized=tmp_path / "net.optimized.onnx"
        ),
        EmulatedJob(
            name="fp32 as written",
            model=net,
            feeds=feeds[:1],
            optimization="disabled",
            save_optimized=tmp_path / "net.disabled.onnx",
        ),
        EmulatedJob(
            name="int8",
            model=quantized,
            feeds=[image],
            session_config={"session.qdqisint8allowed": "1"},
            save_optimized=tmp_path / "quantized.optimized.onnx",
        ),
        EmulatedJob(
            name="int8 not allowed",
            model=quantized,
            feeds=[image],
            session_config={"session.qdqisint8allowed": "0"},
            save_optimized=tmp_path / "quantized.u8.onnx",
        ),
        EmulatedJob(
            name="state",
            model=accumulator(tmp_path / "state.onnx"),
            feeds=[{"x": ones, "state": ones}, {"x": ones}, {"x": ones, "state": 9 * ones}],
            carry={"state_out": "state"},
        ),
    ]
    fp32, as_written, int8, uint8, state = emulator.run_jobs(jobs)

    assert len(fp32.outputs) == 2
    for feed, outputs in zip(feeds, fp32.outputs, strict=True):
        assert relative_error(outputs["y"], host_outputs(net, feed)["y"]) < 1e-4
    assert relative_error(as_written.outputs[0]["y"], host_outputs(net, feeds[0])["y"]) < 1e-4
    assert operators(as_written.optimized_model).count("Relu") == 1
    assert "Relu" not in operators(fp32.optimized_model)  # fused into its convolution

    for result in (int8, uint8):
        assert operators(result.optimized_model).count("QLinearConv") == 2
        assert "Conv" not in operators(result.optimized_model)
    # Without the option the session turns s8 activations into u8 before it fuses.
    assert activation_types(int8.optimized_model) == {TensorProto.INT8}
    assert activation_types(uint8.optimized_model) == {TensorProto.UINT8}
    expected = host_outputs(quantized, image)
    for name, array in int8.outputs[0].items():
        # Integer accumulation may round a value one quantization step (0.05) away from float's.
        assert np.abs(array - expected[name]).max() <= 0.05 + 1e-6
        assert np.mean(array == expected[name]) > 0.99

    assert [float(step["y"][0]) for step in state.outputs] == [4.0, 6.0, 20.0]


def operators(model: Path | None) -> list[str]:
    assert model is not None
    return [node.op_type for node in onnx.load(model).graph.node]


def activation_types(model: Path | None) -> set[int]:
    """The types of the zero points of what the QLinearConv nodes read."""
    assert model is not None
    graph = onnx.load(model).graph
    types = {tensor.name: tensor.data_type for tensor in graph.initializer}
    return {types[node.input[2]] for node in graph.node if node.op_type == "QLinearConv"}


@pytest.mark.arm64
def test_tvm_library(emulator: Emulator, tmp_path: Path) -> None:
    """A library cross-compiled by TVM runs, with the inputs in its signature's order."""
    pytest.importorskip("tvm")
    compiler = shutil.which("aarch64-linux-gnu-gcc")
    if compiler is None:
        pytest.skip("no aarch64-linux-gnu-gcc: scripts/setup_arm64.sh installs it")
    weight = RNG.standard_normal((8, 16)).astype(np.float32)
    library = two_input_library(tmp_path / "model.so", weight, compiler)
    x = RNG.standard_normal((4, 8)).astype(np.float32)
    y = RNG.standard_normal((4, 16)).astype(np.float32)
    good = EmulatedJob(name="library", model=library, feeds=[{"y": y, "x": x}, {"x": x, "y": -y}])
    wrong = EmulatedJob(name="wrong name", model=library, feeds=[{"x": x, "z": y}])
    other_type = EmulatedJob(name="float64", model=library, feeds=[{"x": x.astype(float), "y": y}])
    result, named, typed = emulator.run_jobs([good, wrong, other_type], check=False)
    product = x @ weight
    for step, sign in zip(result.check().outputs, (1, -1), strict=True):
        assert relative_error(step["sum"], product + sign * y) < 1e-4
        np.testing.assert_array_equal(step["positive"], np.maximum(step["sum"], 0))
    assert "'z'" in named.error
    assert "float64" in typed.error
    assert "'x'" in typed.error


def two_input_library(path: Path, weight: np.ndarray, compiler: str) -> Path:
    """`x @ weight + y` and its Relu, compiled for aarch64, with the signature beside it."""
    import tvm
    from tvm import relax
    from tvm.support import cc

    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((4, 8), "float32"))
    y = relax.Var("y", relax.TensorType((4, 16), "float32"))
    with builder.function("main", [x, y]):
        with builder.dataflow():
            product = builder.emit(relax.op.matmul(x, relax.const(weight)))
            total = builder.emit(relax.op.add(product, y))
            positive = builder.emit(relax.op.nn.relu(total))
            outputs = builder.emit_output(relax.Tuple([total, positive]))
        builder.emit_func_output(outputs)
    target = tvm.target.Target(
        {"kind": "llvm", "mtriple": "aarch64-linux-gnu", "mattr": ["+neon", "+dotprod"]}
    )
    compiled = tvm.compile(builder.get(), target=target)
    compiled.export_library(str(path), fcompile=cc.cross_compiler(compiler))
    tensors = {"x": [4, 8], "y": [4, 16], "sum": [4, 16], "positive": [4, 16]}
    entries = [{"name": n, "shape": s, "dtype": "float32"} for n, s in tensors.items()]
    signature = {"inputs": entries[:2], "outputs": entries[2:]}
    path.with_suffix(".json").write_text(json.dumps(signature))
    return path


@pytest.mark.arm64
def test_failure_in_the_guest_names_the_job_and_costs_only_it(
    emulator: Emulator, tmp_path: Path
) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"not a model")
    net = conv_net(tmp_path / "net.onnx")
    image = {"x": np.ones((1, 3, 16, 16), np.float32)}
    jobs = [
        EmulatedJob(name="truncated file", model=broken, feeds=[]),
        EmulatedJob(name="wrong shape", model=net, feeds=[{"x": image["x"][:, :2]}]),
        EmulatedJob(name="good", model=net, feeds=[image]),
    ]
    truncated, shape, good = emulator.run_jobs(jobs, check=False)
    assert truncated.error
    assert truncated.optimized_model is None
    assert "invalid dimensions" in shape.error.lower()
    assert good.error == ""
    assert relative_error(good.outputs[0]["y"], host_outputs(net, image)["y"]) < 1e-4
    with pytest.raises(LoweringError, match="'truncated file'") as caught:
        truncated.check()
    assert str(broken) in caught.value.diagnostic.where
    assert "Traceback" in caught.value.diagnostic.why
    with pytest.raises(LoweringError, match="'wrong shape'"):
        emulator.run_jobs(jobs[1:2])


@pytest.mark.arm64
def test_job_that_never_ends_is_stopped(emulator: Emulator, tmp_path: Path) -> None:
    """The hung job has an error; the job behind it still runs."""
    ones = np.ones(4, np.float32)
    state = accumulator(tmp_path / "state.onnx")
    jobs = [
        EmulatedJob(name="before", model=state, feeds=[{"x": ones, "state": ones}]),
        EmulatedJob(
            name="endless",
            model=endless_loop(tmp_path / "loop.onnx"),
            feeds=[{"x": np.ones(1, np.float32)}],
        ),
        EmulatedJob(name="after", model=state, feeds=[{"x": ones, "state": 2 * ones}]),
    ]
    before, endless, after = emulator.run_jobs(jobs, timeout=5.0, check=False)
    assert "no result after 5 seconds" in endless.error
    assert before.outputs[0]["y"][0] == 4.0
    assert after.outputs[0]["y"][0] == 6.0


@pytest.mark.arm64
def test_guest_dies_with_its_host_process(emulator: Emulator, tmp_path: Path) -> None:
    """`kill -9` of the process that runs the jobs leaves no emulator behind."""
    psutil = pytest.importorskip("psutil")
    if shutil.which("setpriv") is None:
        pytest.skip("no setpriv on this host")
    model = endless_loop(tmp_path / "loop.onnx")
    code = (
        "import sys, numpy as np; from pathlib import Path\n"
        "from edgepass.targets.emulator import EmulatedJob, find_emulator\n"
        "feeds = [{'x': np.ones(1, np.float32)}]\n"
        "find_emulator().run_jobs([EmulatedJob(name='l', model=Path(sys.argv[1]), feeds=feeds)])\n"
    )
    environment = {**os.environ, "TMPDIR": str(tmp_path)}  # a killed process leaves its folder
    parent = subprocess.Popen([sys.executable, "-c", code, str(model)], env=environment)
    try:
        guest = wait_for_guest(psutil.Process(parent.pid))
    finally:
        parent.kill()
        parent.wait()
    gone, alive = psutil.wait_procs([guest], timeout=20)
    for process in alive:
        process.kill()
    assert [process.pid for process in gone] == [guest.pid]


def wait_for_guest(parent: Any) -> Any:
    """The emulator process under `parent`, once there is one."""
    for _ in range(300):
        for child in parent.children():
            if any("qemu-aarch64" in part for part in child.cmdline()[:1]):
                return child
        time.sleep(0.1)
    raise AssertionError("no emulator was started")


@pytest.mark.arm64
def test_jobs_that_cannot_be_sent(emulator: Emulator, tmp_path: Path) -> None:
    net = conv_net(tmp_path / "net.onnx")
    text = {"x": np.array(["a"], dtype=object)}
    hidden = next((emulator.sysroot / "usr" / "bin").iterdir())
    shadowed = Path("/usr/bin") / hidden.name
    cases = [
        ("not a kind of model", EmulatedJob(name="j", model=tmp_path / "net.tflite", feeds=[])),
        ("There is no file", EmulatedJob(name="j", model=tmp_path / "absent.onnx", feeds=[])),
        ("dtype object", EmulatedJob(name="j", model=net, feeds=[text])),
        ("can't see", EmulatedJob(name="j", model=net, feeds=[], save_optimized=shadowed)),
    ]
    for message, job in cases:
        with pytest.raises(UsageError, match=message):
            emulator.run_jobs([job])
    (tmp_path / "lib.so").write_bytes(b"")
    with pytest.raises(UsageError, match=r"lib\.json"):
        emulator.run_jobs([EmulatedJob(name="j", model=tmp_path / "lib.so", feeds=[])])


def test_missing_machine_says_how_to_set_it_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without qemu, and with qemu but no sysroot or half of one."""
    monkeypatch.setenv("EDGEPASS_ARM64_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    with pytest.raises(MissingDependencyError, match="needs qemu-aarch64") as caught:
        find_emulator()
    assert "scripts/setup_arm64.sh" in caught.value.diagnostic.fix

    (tmp_path / "bin").mkdir()
    qemu = tmp_path / "bin" / "qemu-aarch64-static"
    qemu.write_text("#!/bin/sh\n")
    qemu.chmod(0o755)
    with pytest.raises(MissingDependencyError, match="not set up"):
        find_emulator()
    sysroot = tmp_path / "sysroot"
    (sysroot / "proc").mkdir(parents=True)
    (sysroot / "site").mkdir()
    (sysroot / "proc" / "cpuinfo").touch()
    with pytest.raises(MissingDependencyError, match="edgepass-stamp"):
        find_emulator()
    (sysroot / ".edgepass-stamp").touch()
    with pytest.raises(MissingDependencyError, match="no Python"):
        find_emulator()
    with pytest.raises(UsageError, match="riscv64"):
        find_emulator("riscv64")

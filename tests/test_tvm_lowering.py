"""The TVM lowering: import, compile, link and run, against ONNX Runtime without optimizations."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

pytest.importorskip("tvm", reason="TVM is not installed")

from edgepass.errors import (
    ArtifactError,
    CalibrationError,
    LoweringError,
    MissingDependencyError,
    UnsupportedOpError,
    UsageError,
    WeightsAbsentError,
)
from edgepass.ir.graph import AbsentTensor
from edgepass.targets.tvm import (
    TvmRunner,
    TvmTarget,
    emit,
    fix_dims,
    symbolic_dims,
    to_relax,
    unsupported_nodes,
)
from edgepass.targets.tvm.crosscompile import ELF_MACHINES, elf_machine, find_linker
from edgepass.targets.tvm.schedules import ARM64_NEON_DOTPROD, RISCV64, X86_64_AVX2

HOST = TvmTarget(cpu=X86_64_AVX2)
RNG = np.random.default_rng(0)

CONV = """g (float[N,3,16,16] x) => (float[N,8,8,8] y) {
    a = Conv<pads=[1,1,1,1], strides=[2,2]>(x, w)
    y = Relu(a)
}"""


def model_of(text: str, opset: int = 18, **weights: np.ndarray) -> ir.Model:
    proto = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : {opset}]> {text}')
    for name, array in weights.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto))


def floats(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def conv_model() -> ir.Model:
    weights = np.random.default_rng(1).standard_normal((8, 3, 3, 3)).astype(np.float32)
    return model_of(CONV, w=weights)


def reference(model: ir.Model, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(
        ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, inputs), strict=True))


def assert_same(model: ir.Model, runner: TvmRunner, inputs: dict[str, np.ndarray]) -> None:
    """Outputs within 1e-5 of the reference's range, same shapes and dtypes."""
    got, want = runner.run(inputs), reference(model, inputs)
    assert got.keys() == want.keys()
    for name, expected in want.items():
        assert got[name].dtype == expected.dtype
        assert got[name].shape == expected.shape
        wide = expected.astype(np.float64)
        allowed = 1e-5 * max(float(np.ptp(wide)) if wide.size else 0.0, 1e-6)
        assert np.abs(got[name].astype(np.float64) - wide).max(initial=0) <= allowed


def compiled(model: ir.Model, folder: Path, **options: object) -> TvmRunner:
    emit(model, HOST, folder / "model.so", **options)  # type: ignore[arg-type]
    return TvmRunner(folder / "model.so")


# --- numerics --------------------------------------------------------------------------------


def test_conv_with_a_dynamic_batch(tmp_path: Path) -> None:
    model = conv_model()
    runner = compiled(model, tmp_path)
    for batch in (1, 3):
        assert_same(model, runner, {"x": floats(batch, 3, 16, 16)})
    assert runner.inputs[0].shape == ("N", 3, 16, 16)


def test_attention_with_two_dynamic_dimensions(tmp_path: Path) -> None:
    """Reshape targets computed from `Shape` keep their relation to the input's symbols."""
    text = """g (float[B,L,16] x) => (float[B,L,16] y)
    <int64[1] zero = {0}, int64[1] one = {1}, int64[1] two = {2}, int64[1] four = {4},
     int64[1] width = {16}> {
        shape = Shape(x)
        batch = Slice(shape, zero, one)
        length = Slice(shape, one, two)
        heads_shape = Concat<axis=0>(batch, length, four, four)
        q0 = MatMul(x, wq)
        q1 = Reshape(q0, heads_shape)
        q = Transpose<perm=[0,2,1,3]>(q1)
        kt = Transpose<perm=[0,2,3,1]>(q1)
        scores = MatMul(q, kt)
        weights = Softmax<axis=-1>(scores)
        mixed = MatMul(weights, q)
        back = Transpose<perm=[0,2,1,3]>(mixed)
        flat_shape = Concat<axis=0>(batch, length, width)
        y = Reshape(back, flat_shape)
    }"""
    model = model_of(text, wq=floats(16, 16))
    runner = compiled(model, tmp_path)
    for batch, length in ((1, 5), (2, 9)):
        assert_same(model, runner, {"x": floats(batch, length, 16)})


def test_int8_with_quantize_and_dequantize_pairs(tmp_path: Path) -> None:
    text = """g (float[1,3,8,8] x) => (float[1,4,8,8] y)
    <float xs = {0.05}, uint8 xz = {128}, float ys = {0.1}, uint8 yz = {100}> {
        xq = QuantizeLinear(x, xs, xz)
        xd = DequantizeLinear(xq, xs, xz)
        wd = DequantizeLinear<axis=0>(wq, ws, wz)
        c = Conv<pads=[1,1,1,1]>(xd, wd)
        r = Relu(c)
        yq = QuantizeLinear(r, ys, yz)
        y = DequantizeLinear(yq, ys, yz)
    }"""
    model = model_of(
        text,
        wq=RNG.integers(-127, 128, (4, 3, 3, 3)).astype(np.int8),
        ws=np.array([0.01, 0.02, 0.015, 0.005], np.float32),
        wz=np.zeros(4, np.int8),
    )
    assert_same(model, compiled(model, tmp_path), {"x": floats(1, 3, 8, 8)})


@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
def test_lstm_is_unrolled(tmp_path: Path, direction: str) -> None:
    d = 2 if direction == "bidirectional" else 1
    text = f"""g (float[3,2,4] x, float[{d},2,5] h0, float[{d},2,5] c0)
        => (float[3,{d},2,5] y, float[{d},2,5] h, float[{d},2,5] c) {{
        y, h, c = LSTM<hidden_size=5, direction="{direction}">(x, w, r, b, , h0, c0)
    }}"""
    model = model_of(text, w=floats(d, 20, 4), r=floats(d, 20, 5), b=floats(d, 40))
    inputs = {"x": floats(3, 2, 4), "h0": floats(d, 2, 5), "c0": floats(d, 2, 5)}
    assert_same(model, compiled(model, tmp_path), inputs)


def test_operator_expanded_by_its_onnx_definition(tmp_path: Path) -> None:
    model = model_of("g (float[2,6] x) => (float[2,6] y) { y = Celu<alpha=0.5>(x) }")
    assert unsupported_nodes(model) == []
    assert_same(model, compiled(model, tmp_path), {"x": floats(2, 6)})


def test_same_lower_padding_with_a_dynamic_size(tmp_path: Path) -> None:
    text = """g (float[1,2,H,7] x) => (float[1,2,H,7] y) {
        y = MaxPool<kernel_shape=[2,2], auto_pad="SAME_LOWER">(x)
    }"""
    model = model_of(text)
    runner = compiled(model, tmp_path)
    assert_same(model, runner, {"x": floats(1, 2, 5, 7)})


def test_dims_are_fixed_by_name_or_by_axis(tmp_path: Path) -> None:
    model = conv_model()
    assert symbolic_dims(model) == {"N": ["x[0]"]}
    runner = compiled(model, tmp_path, dims={"N": 2})
    assert runner.inputs[0].shape == (2, 3, 16, 16)
    assert runner.outputs[0].shape == (2, 8, 8, 8)
    assert_same(model, runner, {"x": floats(2, 3, 16, 16)})
    with pytest.raises(UsageError, match="dynamic dimensions of the inputs: N"):
        fix_dims(model, {"M": 1})


# --- refusals --------------------------------------------------------------------------------


def test_operator_without_converter_is_named_with_its_node() -> None:
    model = model_of("g (float[2,2] x) => (float y) { [determinant] y = Det(x) }")
    next(iter(model.graph)).name = "determinant"
    [(node, reason)] = unsupported_nodes(model)
    assert node.op_type == "Det"
    assert "no converter" in reason
    with pytest.raises(UnsupportedOpError) as caught:
        to_relax(model)
    diagnostic = caught.value.diagnostic
    assert "'determinant' (Det)" in diagnostic.where
    assert "ONNX Runtime" in diagnostic.fix


def test_converter_that_gives_up_is_named_with_its_node() -> None:
    model = model_of(
        "g (float[1,4] x, int64[4] pads) => (float[A,B] y) { y = Pad(x, pads) }",
    )
    next(iter(model.graph)).name = "the_pad"
    with pytest.raises(UnsupportedOpError) as caught:
        to_relax(model)
    assert "'the_pad' (Pad)" in caught.value.diagnostic.where
    assert caught.value.diagnostic.why


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("g (float[4] x) => (bool[4] y) { y = IsInf<detect_negative=0>(x) }", "detect_negative"),
        ("g (float[4] x, float[4] z) => (float[4] y) { y = Mod(x, z) }", "fmod"),
        ("g (int32[4] x, int32[4] z) => (int32[4] y) { y = Pow(x, z) }", "integer power"),
        ("g (float[0,4] x) => (float[1,1] y) { y = ReduceMax(x) }", "empty tensor"),
        ("g (string[4] x) => (string[4] y) { y = Identity(x) }", "STRING"),
    ],
)
def test_wrong_results_of_tvm_are_refused(text: str, reason: str) -> None:
    [(_, why)] = unsupported_nodes(model_of(text))
    assert reason in why


def test_nodes_in_branches_are_checked() -> None:
    text = """g (bool c, float[2,2] x) => (float y) {
        y = If(c)<then_branch = t () => (float a) { a = Det(x) },
                  else_branch = e () => (float b) { b = ReduceSum<keepdims=0>(x) }>
    }"""
    assert [node.op_type for node, _ in unsupported_nodes(model_of(text))] == ["Det"]


def test_old_opset_and_absent_weights_are_refused() -> None:
    with pytest.raises(LoweringError, match="opset 12"):
        to_relax(model_of("g (float[4] x) => (float[4] y) { y = Relu(x) }", opset=12))
    model = conv_model()
    value = model.graph.initializers["w"]
    value.const_value = AbsentTensor("w", ir.DataType.FLOAT, [8, 3, 3, 3])
    with pytest.raises(WeightsAbsentError, match="compiles weights into the library"):
        to_relax(model)


def test_the_callers_model_is_not_changed(tmp_path: Path) -> None:
    model = conv_model()
    before = ir.to_proto(model).SerializeToString()
    emit(model, HOST, tmp_path / "model.so", dims={"N": 1})
    assert ir.to_proto(model).SerializeToString() == before


# --- the runner ------------------------------------------------------------------------------


def test_bad_inputs_are_named(tmp_path: Path) -> None:
    text = "g (float[N,2] a, float[N,2] b) => (float[N,2] y) { y = Add(a, b) }"
    runner = compiled(model_of(text), tmp_path)
    good = {"a": floats(3, 2), "b": floats(3, 2)}
    bad = [
        ({"a": good["a"]}, "missing \\['b'\\]"),
        ({**good, "c": good["a"]}, "unknown \\['c'\\]"),
        ({**good, "b": good["b"].astype(np.float64)}, "dtype float64"),
        ({**good, "b": floats(3, 4)}, "axis 1 is 4 instead of 2"),
        ({**good, "b": floats(3)}, "rank 1 instead of 2"),
        ({**good, "b": floats(4, 2)}, "axis 0 \\(N\\) is 4, but a\\[0\\] is 3"),
    ]
    for inputs, message in bad:
        with pytest.raises(CalibrationError, match=message):
            runner.run(inputs)
    assert np.array_equal(runner.run(good)["y"], good["a"] + good["b"])


def test_a_library_compiled_anew_is_loaded_anew(tmp_path: Path) -> None:
    x = floats(4)
    for op, expected in (("Neg", -x), ("Abs", np.abs(x))):
        model = model_of(f"g (float[4] x) => (float[4] y) {{ y = {op}(x) }}")
        assert np.array_equal(compiled(model, tmp_path).run({"x": x})["y"], expected)


def test_missing_and_broken_side_file(tmp_path: Path) -> None:
    emit(conv_model(), HOST, tmp_path / "model.so", dims={"N": 1})
    (tmp_path / "model.json").write_text("{")
    with pytest.raises(ArtifactError, match="side file"):
        TvmRunner(tmp_path / "model.so")


# --- files -----------------------------------------------------------------------------------

_EMIT_TWICE = """
import sys
from pathlib import Path
import onnx_ir as ir
from edgepass.targets.tvm import TvmTarget, emit
from edgepass.targets.tvm.schedules import X86_64_AVX2
emit(ir.load(sys.argv[1]), TvmTarget(cpu=X86_64_AVX2), Path(sys.argv[2]))
"""


def test_same_model_gives_the_same_bytes_in_another_process(tmp_path: Path) -> None:
    model = conv_model()
    ir.save(model, tmp_path / "model.onnx")
    emit(ir.load(tmp_path / "model.onnx"), HOST, tmp_path / "here" / "one.so")
    other = tmp_path / "there" / "deeper" / "two.so"
    command = [sys.executable, "-c", _EMIT_TWICE, str(tmp_path / "model.onnx"), str(other)]
    subprocess.run(command, check=True, capture_output=True)
    assert (tmp_path / "here" / "one.so").read_bytes() == other.read_bytes()
    one = json.loads((tmp_path / "here" / "one.json").read_text())
    assert one == json.loads(other.with_suffix(".json").read_text())


def test_report(tmp_path: Path) -> None:
    report = emit(conv_model(), HOST, tmp_path / "model.so", dims={"N": 1})
    assert report.library_bytes == (tmp_path / "model.so").stat().st_size
    assert report.kernels
    assert report.schedule is not None
    assert {record.name for record in report.schedule.kernels} <= set(report.kernels)
    assert report.unscheduled == ()


@pytest.mark.parametrize("prefer", ["gcc", "zig"])
def test_cross_compiled_for_arm64(tmp_path: Path, prefer: str) -> None:
    try:
        linker = find_linker(ARM64_NEON_DOTPROD.triple, prefer=prefer)
    except MissingDependencyError as error:
        pytest.skip(f"no {prefer} cross compiler here: {error.diagnostic.why}")
    target = TvmTarget(cpu=ARM64_NEON_DOTPROD)
    report = emit(conv_model(), target, tmp_path / "model.so", dims={"N": 1}, linker=linker)
    assert elf_machine(report.library) == ELF_MACHINES["aarch64"]
    assert prefer in report.linker
    with pytest.raises(ArtifactError, match="not for this machine"):
        TvmRunner(report.library)


def test_cross_compilation_can_be_forbidden(tmp_path: Path) -> None:
    target = TvmTarget(cpu=ARM64_NEON_DOTPROD, cross_compile=False)
    with pytest.raises(UsageError, match="for aarch64"):
        emit(conv_model(), target, tmp_path / "model.so")


def test_no_cross_compiler_names_both_ways_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError) as caught:
        find_linker("aarch64-linux-gnu")
    assert "gcc-aarch64-linux-gnu" in caught.value.diagnostic.fix
    assert "ziglang" in caught.value.diagnostic.fix


def test_riscv64_compiles(tmp_path: Path) -> None:
    try:
        find_linker(RISCV64.triple)
    except MissingDependencyError as error:
        pytest.skip(f"no RISC-V cross compiler here: {error.diagnostic.why}")
    report = emit(conv_model(), TvmTarget(cpu=RISCV64), tmp_path / "model.so", dims={"N": 1})
    assert elf_machine(report.library) == ELF_MACHINES["riscv64"]


def test_cuda_compiles_to_kernels_in_source_form(tmp_path: Path) -> None:
    target = TvmTarget(kind="cuda")
    report = emit(conv_model(), target, tmp_path / "model.so", dims={"N": 1})
    assert "cuda kernels as source" in report.note
    assert b"__global__ void" in report.library.read_bytes()


def test_vulkan_is_refused_where_the_wheel_has_no_generator(tmp_path: Path) -> None:
    import tvm_ffi

    if tvm_ffi.get_global_func("target.build.vulkan", allow_missing=True) is not None:
        pytest.skip("this TVM generates Vulkan code")
    with pytest.raises(MissingDependencyError, match=r"target\.build\.vulkan"):
        emit(conv_model(), TvmTarget(kind="vulkan"), tmp_path / "model.so")


# --- tuning ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_metaschedule_replaces_plain_loops_by_the_same_function(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import tvm
    from tvm import te, topi

    from edgepass.targets.tvm import tuning

    a, b = te.placeholder((96, 96), name="a"), te.placeholder((96, 96), name="b")
    plain = te.create_prim_func([a, b, topi.matmul(a, b)]).with_attr("global_symbol", "product")
    target = X86_64_AVX2.tvm_target()
    # Whatever compiles and runs counts as faster: the test must not depend on the clock.
    monkeypatch.setattr(tuning, "_seconds", lambda f, _: 2.0 if f.same_as(plain) else 1.0)
    tuned, replaced = tuning.tune(tvm.IRModule({"product": plain}), target, 2, ["product"])
    assert replaced == ("product",)
    left, right = floats(96, 96), floats(96, 96)
    out = tvm.runtime.tensor(np.zeros((96, 96), np.float32))
    function = tuned["product"].with_attr("global_symbol", "main")
    built = tvm.compile(tvm.IRModule({"main": function}), target=target)
    built["main"](tvm.runtime.tensor(left), tvm.runtime.tensor(right), out)
    assert np.abs(out.numpy() - left @ right).max() < 1e-4


def test_metaschedule_is_refused_for_another_machine(tmp_path: Path) -> None:
    target = TvmTarget(cpu=ARM64_NEON_DOTPROD, tuning_trials=4)
    with pytest.raises(LoweringError, match="measures on this machine"):
        emit(conv_model(), target, tmp_path / "model.so", dims={"N": 1})

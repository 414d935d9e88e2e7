"""ONNX Runtime as a back-end: sessions of any size, errors that name the node, files."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from edgepass.errors import (
    CalibrationError,
    LoweringError,
    ModelFileError,
    UnsupportedOpError,
    UsageError,
    WeightsAbsentError,
)
from edgepass.ir.graph import AbsentTensor
from edgepass.targets.feed import check_feed, input_specs
from edgepass.targets.onnx_file import serialize, write_onnx
from edgepass.targets.onnxruntime import OrtRunner, emit
from edgepass.targets.ort_file import canonicalize
from edgepass.targets.ort_support import highest_opset, kernel_support, ort_supports
from edgepass.targets.target import Hardware, Target

TARGET = Target(name="test", description="", hardware=Hardware(arch="x86_64"))


def dense(
    dtype: ir.DataType = ir.DataType.FLOAT, opset: int = 21, op_type: str = "MatMul"
) -> ir.Model:
    """y = Relu(x @ w), with a big weight and a batch dimension named `b`."""
    weight = np.random.default_rng(0).normal(size=(64, 32)).astype(dtype.numpy())
    x = ir.Value(name="x", shape=ir.Shape(["b", 64]), type=ir.TensorType(dtype))
    w = ir.Value(name="w", const_value=ir.tensor(weight, name="w"))
    product = ir.node(op_type, [x, w], name="product")
    relu = ir.node("Relu", product.outputs, name="relu")
    product.outputs[0].name, y = "h", relu.outputs[0]
    y.name, y.shape, y.type = "y", ir.Shape(["b", 32]), ir.TensorType(dtype)
    graph = ir.Graph(
        [x], [y], nodes=[product, relu], initializers=[w], opset_imports={"": opset}, name="g"
    )
    return ir.Model(graph, ir_version=10)


def sample(rows: int = 3) -> np.ndarray:
    return np.random.default_rng(1).normal(size=(rows, 64)).astype(np.float32)


def expected(model: ir.Model, x: np.ndarray) -> np.ndarray:
    return np.maximum(x @ model.graph.initializers["w"].const_value.numpy(), 0)


def test_runs_a_graph_and_knows_its_interface():
    model = dense()
    runner = OrtRunner(model)
    assert [str(spec) for spec in runner.inputs] == ["x: float32[b,64]"]
    assert [str(spec) for spec in runner.outputs] == ["y: float32[b,32]"]
    assert runner.inputs == input_specs(model)
    np.testing.assert_allclose(
        runner.run({"x": sample()})["y"], expected(model, sample()), rtol=1e-4, atol=1e-5
    )


def test_weights_over_the_limit_go_in_memory():
    model = dense()
    names = dict(model.graph.initializers)
    whole = OrtRunner(model).run({"x": sample()})
    outside = OrtRunner(model, inline_limit=0).run({"x": sample()})
    np.testing.assert_array_equal(whole["y"], outside["y"])
    assert dict(model.graph.initializers) == names
    assert isinstance(model.graph.initializers["w"].const_value, ir.Tensor)


def test_external_weights_of_a_file_elsewhere_are_followed(tmp_path: Path):
    write_onnx(dense(), tmp_path / "model.onnx", external_data=True)
    model = ir.load(tmp_path / "model.onnx")
    assert isinstance(model.graph.initializers["w"].const_value, ir.ExternalTensor)
    reference = OrtRunner(dense()).run({"x": sample()})["y"]
    for limit in (0, 10**9):
        np.testing.assert_array_equal(
            OrtRunner(model, inline_limit=limit).run({"x": sample()})["y"], reference
        )
    assert isinstance(model.graph.initializers["w"].const_value, ir.ExternalTensor)


def test_sub_byte_weights_over_the_limit_go_through_a_temporary_file():
    packed = np.arange(-8, 8, dtype=np.int8).repeat(512).reshape(128, 64).astype(ml_dtypes.int4)
    w = ir.Value(name="w", const_value=ir.tensor(packed, name="w"))
    s = ir.Value(name="s", const_value=ir.tensor(np.array(0.5, np.float32), name="s"))
    x = ir.Value(name="x", shape=ir.Shape([1, 128]), type=ir.TensorType(ir.DataType.FLOAT))
    dequantize = ir.node("DequantizeLinear", [w, s], name="dq")
    product = ir.node("MatMul", [x, dequantize.outputs[0]], name="product")
    y = product.outputs[0]
    y.name, y.shape, y.type = "y", ir.Shape([1, 64]), ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph(
        [x], [y], nodes=[dequantize, product], initializers=[w, s], opset_imports={"": 21}
    )
    runner = OrtRunner(ir.Model(graph, ir_version=10), inline_limit=100)
    feed = {"x": np.ones((1, 128), np.float32)}
    np.testing.assert_allclose(
        runner.run(feed)["y"], packed.astype(np.float32).sum(0, keepdims=True) * 0.5, rtol=1e-5
    )
    runner.close()


def test_bfloat16_goes_in_and_out():
    x = ir.Value(name="x", shape=ir.Shape([2]), type=ir.TensorType(ir.DataType.BFLOAT16))
    node = ir.node("Identity", [x])
    y = node.outputs[0]
    y.name, y.shape, y.type = "y", ir.Shape([2]), ir.TensorType(ir.DataType.BFLOAT16)
    graph = ir.Graph([x], [y], nodes=[node], opset_imports={"": 21}, name="g")
    array = np.array([1.5, -2], ml_dtypes.bfloat16)
    result = OrtRunner(ir.Model(graph, ir_version=10)).run({"x": array})["y"]
    assert result.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(result, array)


def test_optimize_off_keeps_the_graph(tmp_path: Path):
    OrtRunner(dense(), optimize=False, save_optimized=tmp_path / "plain.onnx")
    found = [node.op_type for node in ir.load(tmp_path / "plain.onnx").graph]
    assert found == ["MatMul", "Relu"]


@pytest.mark.parametrize(
    ("feed", "message"),
    [
        ({}, "No array for the input 'x'"),
        ({"z": sample()}, "rename 'z' to 'x'"),
        ({"x": sample(), "z": sample()}, "no input 'z'"),
        ({"x": sample().astype(np.float64)}, "astype('float32')"),
        ({"x": sample()[0]}, "array\\[None\\]"),
        ({"x": sample()[:, :5]}, "64 elements along axis 1, the array 5"),
        ({"x": [1.0]}, "is a list, not a numpy array"),
    ],
)
def test_a_wrong_feed_says_what_is_wrong(feed, message: str):
    message = message.replace("(", "\\(").replace(")", "\\)")
    with pytest.raises(CalibrationError, match=message):
        OrtRunner(dense()).run(feed)


def test_nan_is_refused_where_asked():
    x = sample()
    x[1, 2] = np.nan
    specs = input_specs(dense())
    check_feed(specs, {"x": x})
    with pytest.raises(CalibrationError, match=r"has NaN[\s\S]*index \[1, 2\]"):
        check_feed(specs, {"x": x}, finite=True)
    x[1, 2] = np.inf
    with pytest.raises(CalibrationError, match="has infinity"):
        check_feed(specs, {"x": x}, finite=True)


def test_an_unknown_output_is_refused():
    runner = OrtRunner(dense())
    assert list(runner.run({"x": sample()}, ["y"])) == ["y"]
    with pytest.raises(UsageError, match="no output 'nope'"):
        runner.run({"x": sample()}, ["nope"])


def test_a_refused_node_is_named_and_described():
    with pytest.raises(UnsupportedOpError, match=r"for Foo[\s\S]*node 'product' \(Foo\) of \(x:"):
        OrtRunner(dense(op_type="Foo"))
    with pytest.raises(UnsupportedOpError, match=r"node 'product' \(MatMul\) of \(x: BFLOAT16"):
        OrtRunner(dense(ir.DataType.BFLOAT16))


def test_other_refusals(tmp_path: Path):
    with pytest.raises(LoweringError, match="Opset 99"):
        OrtRunner(dense(opset=99))
    with pytest.raises(ModelFileError, match="not a readable ONNX model"):
        OrtRunner(b"not a model")
    with pytest.raises(ModelFileError, match="no file"):
        OrtRunner(tmp_path / "nothing.onnx")
    with pytest.raises(UsageError, match="'qdqisint8allowed' is not a session option"):
        OrtRunner(dense(), session_options={"qdqisint8allowed": "1"})
    model = dense()
    model.graph.initializers["w"].const_value = AbsentTensor("w", ir.DataType.FLOAT, [64, 32])
    with pytest.raises(WeightsAbsentError, match="'w'"):
        OrtRunner(model)


def test_a_failure_while_running_names_the_node():
    model = dense()
    model.graph.inputs[0].shape = ir.Shape(["b", "k"])
    with pytest.raises(LoweringError, match=r"node 'product'"):
        OrtRunner(model, optimize=False).run({"x": np.ones((2, 5), np.float32)})


# --- kernels ---------------------------------------------------------------------------------


def test_highest_opset_is_the_last_one_that_loads():
    OrtRunner(dense(opset=highest_opset()))
    with pytest.raises(LoweringError):
        OrtRunner(dense(opset=highest_opset() + 1))


@pytest.mark.parametrize("dtype", [ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16])
@pytest.mark.parametrize("op_type", ["MatMul", "Foo"])
def test_support_agrees_with_sessions(dtype: ir.DataType, op_type: str):
    model = dense(dtype, op_type=op_type)
    answer = ort_supports(next(iter(model.graph)), 21)
    try:
        OrtRunner(model, optimize=False)
    except UnsupportedOpError:
        assert not answer
        assert answer.reason
    else:
        assert answer


def test_support_says_how_and_why_not():
    half = next(iter(dense(ir.DataType.FLOAT16).graph))
    assert "float32" in ort_supports(half, 21).note
    brain = next(iter(dense(ir.DataType.BFLOAT16).graph))
    assert "not tensor(bfloat16)" in ort_supports(brain, 21).reason
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT))
    assert "new in opset 20" in ort_supports(ir.node("Gelu", [x]), 19).reason
    assert ort_supports(ir.node("Gelu", [x], domain="com.microsoft"), 19)
    assert "knows no operator" in ort_supports(ir.node("Nope", [x], domain="mine"), 21).reason
    assert ort_supports(ir.node("Nope", [x], domain="mine"), 21, functions={("mine", "Nope")})
    assert ("", "Conv") in kernel_support()


# --- files -----------------------------------------------------------------------------------


def test_emitted_files_are_byte_reproducible_and_run(tmp_path: Path):
    reference = OrtRunner(dense()).run({"x": sample()})["y"]
    contents = []
    for name, model in (("a", dense()), ("b", ir.from_proto(ir.to_proto(dense())))):
        (tmp_path / name).mkdir()
        files = emit(model, TARGET, tmp_path / name, ("onnx", "ort"))
        assert [file.name for file in files] == ["model.onnx", "model.ort"]
        contents.append([file.read_bytes() for file in files])
        for file in files:
            np.testing.assert_allclose(
                OrtRunner(file).run({"x": sample()})["y"], reference, rtol=1e-5, atol=1e-6
            )
    assert contents[0] == contents[1]


def test_ort_files_are_equal_over_many_writes(tmp_path: Path):
    """ONNX Runtime itself writes one of its tables in hash-map order."""
    contents = {emit(dense(), TARGET, tmp_path, ("ort",))[0].read_bytes() for _ in range(8)}
    assert len(contents) == 1
    assert canonicalize(b"not an ort file") == b"not an ort file"


def test_emit_puts_big_weights_beside_the_model(tmp_path: Path):
    files = emit(dense(), TARGET, tmp_path, inline_limit=1000)
    assert [file.name for file in files] == ["model.onnx", "model.onnx.data"]
    assert files[0].stat().st_size < 1000
    assert files[1].stat().st_size == 64 * 32 * 4
    np.testing.assert_array_equal(
        OrtRunner(files[0]).run({"x": sample()})["y"], OrtRunner(dense()).run({"x": sample()})["y"]
    )
    with pytest.raises(LoweringError, match="flatbuffer"):
        emit(dense(), TARGET, tmp_path, ("ort",), inline_limit=1000)
    with pytest.raises(UsageError, match="'tflite'"):
        emit(dense(), TARGET, tmp_path, ("tflite",))


def test_repeated_node_names_are_numbered(tmp_path: Path):
    model = dense()
    for node in model.graph:
        node.name = "same"
    OrtRunner(model).run({"x": sample()})
    assert [node.name for node in ir.from_proto(ir.to_proto(model)).graph] == ["same", "same"]
    (path,) = write_onnx(model, tmp_path / "model.onnx")
    assert [node.name for node in ir.load(path).graph] == ["same", "same_1"]


def test_the_exporters_paths_stay_out_of_the_file():
    model = dense()
    node = next(iter(model.graph))
    node.metadata_props["pkg.torch.onnx.stack_trace"] = 'File "/home/me/secret.py", line 1, in f'
    node.metadata_props["kept"] = "yes"
    data = serialize(model)
    assert b"secret.py" not in data
    assert b"kept" in data
    assert "pkg.torch.onnx.stack_trace" in node.metadata_props


def test_an_ort_file_has_no_layout_of_the_host(tmp_path: Path):
    x = ir.Value(name="x", shape=ir.Shape([1, 16, 8, 8]), type=ir.TensorType(ir.DataType.FLOAT))
    weight = ir.tensor(np.ones((16, 16, 3, 3), np.float32), name="w")
    w = ir.Value(name="w", const_value=weight)
    conv = ir.node("Conv", [x, w], name="conv")
    y = conv.outputs[0]
    y.name, y.shape, y.type = "y", ir.Shape([1, 16, 6, 6]), ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph([x], [y], nodes=[conv], initializers=[w], opset_imports={"": 17}, name="g")
    model = ir.Model(graph, ir_version=8)
    (file,) = emit(model, TARGET, tmp_path, ("ort",))
    assert b"ReorderInput" not in file.read_bytes()
    OrtRunner(model, save_optimized=tmp_path / "host.onnx")
    host = {node.domain for node in ir.load(tmp_path / "host.onnx").graph}
    if "com.microsoft.nchwc" not in host:
        pytest.skip("this host has no blocked layout to leave out")


def test_the_operator_table_of_an_ort_file_is_whole(tmp_path: Path):
    """Read with the flatbuffer bindings that come with ONNX Runtime."""
    fbs = pytest.importorskip(
        "onnxruntime.tools.ort_format_model.ort_flatbuffers_py.fbs.InferenceSession"
    )
    (file,) = emit(dense(), TARGET, tmp_path, ("ort",))
    resolver = fbs.InferenceSession.GetRootAs(file.read_bytes(), 0).KernelTypeStrResolver()
    table = {}
    for i in range(resolver.OpKernelTypeStrArgsLength()):
        entry = resolver.OpKernelTypeStrArgs(i)
        items = [entry.KernelTypeStrArgs(j) for j in range(entry.KernelTypeStrArgsLength())]
        table[entry.OpId()] = {
            item.KernelTypeStr(): [
                (item.Args(k).ArgType(), item.Args(k).Index()) for k in range(item.ArgsLength())
            ]
            for item in items
        }
    assert list(table) == sorted(table)
    matmul = next(value for key, value in table.items() if key.endswith(b"MatMul:13"))
    assert matmul == {b"T": [(0, 0), (0, 1), (1, 0)]}

"""Reading ONNX in every form, and what is said about files that are wrong or hostile."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import struct
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgepass.errors import (
    InvalidGraphError,
    ModelFileError,
    UnsafePathError,
    UnsupportedOpError,
    UsageError,
    WeightsAbsentError,
)
from edgepass.frontends import load_model, to_supported_opset
from edgepass.ir.graph import AbsentTensor, absent_weights, is_absent

WEIGHT = np.arange(12, dtype=np.float32).reshape(3, 4)


def linear(weight: TensorProto | None = None) -> onnx.ModelProto:
    """y = x @ w with the weight inline unless another tensor is given."""
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"], name="mm")],
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 4])],
        [weight or numpy_helper.from_array(WEIGHT, "w")],
    )
    return helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 18)])


def external(location: str, offset: str = "0", length: str | None = "48") -> TensorProto:
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[3, 4])
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", offset), ("length", length)):
        if value is not None:
            tensor.external_data.add(key=key, value=value)
    return tensor


def save(folder: Path, proto: onnx.ModelProto, name: str = "model.onnx") -> Path:
    path = folder / name
    path.write_bytes(proto.SerializeToString())
    return path


def run(model: ir.Model, x: np.ndarray) -> np.ndarray:
    proto = ir.to_proto(model)
    for tensor in proto.graph.initializer:  # external ones inline: the session has no folder
        if tensor.data_location == TensorProto.EXTERNAL:
            data = model.graph.initializers[tensor.name].const_value.numpy()
            tensor.CopyFrom(numpy_helper.from_array(data, tensor.name))
    return ort.InferenceSession(proto.SerializeToString()).run(None, {"x": x})[0]


# --- every form ------------------------------------------------------------------------------


def test_every_form_gives_the_same_model(tmp_path: Path) -> None:
    proto = linear()
    path = save(tmp_path, proto)
    before = proto.SerializeToString(deterministic=True)
    graph = ir.from_proto(linear())
    x = np.ones((2, 3), np.float32)
    for source in (path, str(path), path.read_bytes(), bytearray(before), proto, graph):
        model = load_model(source)
        np.testing.assert_array_equal(run(model, x), x @ WEIGHT)
        weight = model.graph.initializers["w"]
        weight.name = "renamed"  # the caller's copy must not notice any of this
        model.graph.inputs[0].name = "other"
        model.graph.remove(model.graph[0], safe=False)
    assert proto.SerializeToString(deterministic=True) == before
    assert path.read_bytes() == before
    assert graph.graph.initializers["w"].const_value.name == "w"
    assert [node.op_type for node in graph.graph] == ["MatMul"]


def test_weights_of_an_ir_model_are_shared_not_copied() -> None:
    graph = ir.from_proto(linear())
    graph.graph.initializers["w"].const_value = ir.tensor(WEIGHT, name="w")
    shared = load_model(graph).graph.initializers["w"].const_value.numpy()
    assert np.shares_memory(shared, WEIGHT)


def test_what_is_no_model_at_all() -> None:
    with pytest.raises(UsageError, match=r"builtins\.int is not a model"):
        load_model(42)
    with pytest.raises(UsageError, match="dynamic_shapes"):
        load_model(linear(), dynamic_shapes={"x": {0: "n"}})


# --- external data ---------------------------------------------------------------------------


def test_external_data_is_mapped_and_only_when_read(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "w.bin").write_bytes(b"\0" * 16 + WEIGHT.tobytes())
    model = load_model(save(tmp_path, linear(external("data/w.bin", "16"))))
    tensor = model.graph.initializers["w"].const_value
    assert isinstance(tensor, ir.ExternalTensor)
    assert tensor.raw is None
    np.testing.assert_array_equal(tensor.numpy(), WEIGHT)


def test_two_gigabytes_of_external_data(tmp_path: Path) -> None:
    rows = (1 << 29) + 1024  # float32: over 2 GB, in a file with a hole
    with open(tmp_path / "w.bin", "wb") as stream:
        stream.truncate(rows * 4)
        stream.seek((rows - 1) * 4)
        stream.write(struct.pack("<f", 7.5))
    tensor = external("w.bin", length=None)
    tensor.dims[:] = [rows]
    model = load_model(save(tmp_path, linear(tensor)))
    assert model.graph.initializers["w"].const_value.numpy()[-1] == 7.5


def test_missing_weights(tmp_path: Path) -> None:
    path = save(tmp_path, linear(external("absent.bin")))
    with pytest.raises(WeightsAbsentError, match=r"1 tensor in absent\.bin"):
        load_model(path)
    model = load_model(path, weights_required=False)
    assert absent_weights(model) == ["w"]
    tensor = model.graph.initializers["w"].const_value
    assert is_absent(tensor)
    assert tensor.shape.numpy() == (3, 4)
    with pytest.raises(WeightsAbsentError, match=r"absent\.bin is missing"):
        tensor.numpy()
    with pytest.raises(WeightsAbsentError, match="came without"):
        load_model(path.read_bytes())
    with pytest.raises(WeightsAbsentError, match="1 weight has no data"):
        load_model(model)
    assert absent_weights(load_model(model, weights_required=False)) == ["w"]


def test_stripped_weights_are_absent_not_zero() -> None:
    stripped = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[3, 4])
    with pytest.raises(WeightsAbsentError):
        load_model(linear(stripped))
    assert absent_weights(load_model(linear(stripped), weights_required=False)) == ["w"]


@pytest.mark.parametrize(
    "location", ["../w.bin", "/etc/hostname", "a/../../w.bin", "a\0b", "..\\w"]
)
@pytest.mark.parametrize("weights_required", [True, False])
def test_locations_that_leave_the_folder(
    tmp_path: Path, location: str, weights_required: bool
) -> None:
    path = save(tmp_path, linear(external(location)))
    for source in (
        path,
        path.read_bytes(),
        ir.from_proto(onnx.load(path, load_external_data=False)),
    ):
        with pytest.raises(UnsafePathError, match="model's folder"):
            load_model(source, weights_required=weights_required)


def test_links_out_of_the_folder(tmp_path: Path) -> None:
    outside, inside = tmp_path / "outside.bin", tmp_path / "model"
    outside.write_bytes(WEIGHT.tobytes())
    inside.mkdir()
    (inside / "w.bin").symlink_to(outside)
    with pytest.raises(UnsafePathError, match="symbolic link"):
        load_model(save(inside, linear(external("w.bin"))))
    (inside / "w.bin").unlink()
    os.link(outside, inside / "w.bin")
    with pytest.raises(UnsafePathError, match="hard links"):
        load_model(inside / "model.onnx")
    (inside / "deep").symlink_to(tmp_path)
    with pytest.raises(UnsafePathError, match="symbolic link"):
        load_model(save(inside, linear(external("deep/nowhere.bin"))))


def test_download_caches_link_the_model_and_its_data_alike(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir()
    snapshot.mkdir()
    (blobs / "1234").write_bytes(linear(external("w.bin")).SerializeToString())
    (blobs / "5678").write_bytes(WEIGHT.tobytes())
    (snapshot / "model.onnx").symlink_to(blobs / "1234")
    (snapshot / "w.bin").symlink_to(blobs / "5678")
    model = load_model(snapshot / "model.onnx")
    np.testing.assert_array_equal(model.graph.initializers["w"].const_value.numpy(), WEIGHT)


@pytest.mark.parametrize(
    ("tensor", "why"),
    [
        (external("w.bin", "8"), "ends at byte 56, the file has 48"),
        (external("w.bin", length="44"), "declared length is 44"),
        (external("w.bin", "minus one"), "not a number"),
        (external("w.bin", "-4"), "not a number"),
        (external(""), "no file is named"),
    ],
)
def test_external_data_that_does_not_fit(tmp_path: Path, tensor: TensorProto, why: str) -> None:
    (tmp_path / "w.bin").write_bytes(WEIGHT.tobytes())
    with pytest.raises(ModelFileError, match=why) as error:
        load_model(save(tmp_path, linear(tensor)), weights_required=False)
    assert "'w'" in error.value.diagnostic.where


# --- files that are something else -----------------------------------------------------------


def zipped(*names: str) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name in names:
            archive.writestr(name, b"")
    return stream.getvalue()


def safetensors() -> bytes:
    header = json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    return len(header).to_bytes(8, "little") + header + b"\0" * 4


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has no bytes"),
        (b"\x08\x08" + b"\xff" * 40, "damaged or not an ONNX model"),
        (linear().SerializeToString()[:-20], "damaged"),
        (b"\x08\x08", "not an ONNX model"),
        (b"\x20\0\0\0ORTM" + b"\0" * 60, r"\.ort file"),
        (b"\x1c\0\0\0TFL3" + b"\0" * 60, "TensorFlow Lite"),
        (zipped("archive/data.pkl", "archive/version"), "torch checkpoint"),
        (zipped("m/data.pkl", "m/constants.pkl"), "TorchScript"),
        (zipped("m/archive_format", "m/models/model.json"), r"torch\.export archive"),
        (zipped("readme.txt"), "zip archive"),
        (pickle.dumps({"w": 1}), "pickle"),
        (safetensors(), "safetensors"),
        (b"GGUF" + b"\3" * 20, "GGUF"),
        (b"\x89HDF\r\n\x1a\n" + b"\0" * 20, "HDF5"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "Git LFS"),
        (b'{"graph": 1}', "text"),
    ],
)
def test_what_the_file_is_instead(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(ModelFileError, match=message) as error:
        load_model(path)
    assert error.value.diagnostic.fix


def test_no_such_file_and_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="There is no file"):
        load_model(tmp_path / "nowhere.onnx")
    save(tmp_path, linear())
    with pytest.raises(ModelFileError, match=r"(?s)folder.*model\.onnx"):
        load_model(tmp_path)


# --- tensors that contradict themselves ------------------------------------------------------


def forged(**fields: object) -> TensorProto:
    tensor = numpy_helper.from_array(WEIGHT, "w")
    for name, value in fields.items():
        if name == "dims":
            tensor.dims[:] = value
        else:
            setattr(tensor, name, value)
    return tensor


@pytest.mark.parametrize(
    ("tensor", "why"),
    [
        (forged(dims=[1 << 40, 1 << 20]), "48 are stored"),
        (forged(dims=[3, 5]), "takes 60 bytes, 48 are stored"),
        (forged(dims=[-3, -4]), "negative dimension"),
        (forged(data_type=77), "element type 77"),
        (forged(data_type=0), "element type 0"),
        (forged(data_type=TensorProto.STRING), "strings"),
        (TensorProto(name="w", data_type=1, dims=[2, 2], float_data=[1.0, 2.0]), "2 are stored"),
    ],
)
def test_tensors_that_contradict_themselves(tensor: TensorProto, why: str) -> None:
    content = linear(tensor).SerializeToString()
    tracemalloc.start()
    with pytest.raises(ModelFileError, match=why) as error:
        load_model(content)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 22
    assert "initializer 'w'" in error.value.diagnostic.where


def test_tensors_in_attributes_are_checked_too() -> None:
    proto = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["": 18]> g(float[3] x) => (float[3] y)'
        " { c = Constant<value = float[3] {1.0, 2.0, 3.0}>() y = Add(x, c) }"
    )
    proto.graph.node[0].attribute[0].t.float_data.pop()
    with pytest.raises(ModelFileError, match="2 are stored") as error:
        load_model(proto)
    assert "Constant" in error.value.diagnostic.where


def test_unknown_element_type_of_an_input() -> None:
    proto = linear()
    proto.graph.input[0].type.tensor_type.elem_type = 99
    with pytest.raises(ModelFileError, match="element type 99"):
        load_model(proto)


@pytest.mark.parametrize("dtype", [TensorProto.INT4, TensorProto.FLOAT16, TensorProto.BFLOAT16])
def test_types_of_less_than_four_bytes(dtype: int) -> None:
    tensor = helper.make_tensor("w", dtype, [3], [1, 2, 3])
    proto = linear()
    proto.graph.initializer.append(tensor)
    proto.graph.initializer[-1].name = "extra"
    array = load_model(proto).graph.initializers["extra"].const_value.numpy()
    np.testing.assert_array_equal(array.astype(np.float32), [1, 2, 3])


# --- graphs that can't be --------------------------------------------------------------------


def parsed(body: str) -> onnx.ModelProto:
    return onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["": 18]> g(float[2] x, bool c) => (float[2] y)'
        f" {{ {body} }}"
    )


@pytest.mark.parametrize(
    ("body", "what", "where"),
    [
        ("y = Add(x, ghost)", "produces the value 'ghost'", "'y' \\(Add\\)"),
        ("z = Neg(x)", "output 'y'", "graph 'g'"),
        ("y = Neg(x) y = Abs(x)", "'y' is defined twice", "Abs"),
        ("x = Neg(c) y = Abs(x)", "'x' is defined twice", "Neg"),
        ("a = Add(x, b) b = Neg(a) y = Abs(b)", "cycle", "'[ab]'"),
        (
            "y = If(c) <then_branch = t() => (float[2] p) { p = Neg(ghost) },"
            " else_branch = e() => (float[2] q) { q = Neg(x) }>",
            "produces the value 'ghost'",
            "graph 't'",
        ),
        (
            "y = If(c) <then_branch = t() => (float[2] p) { p = Neg(y) },"
            " else_branch = e() => (float[2] q) { q = Neg(x) }>",
            "cycle",
            "If",
        ),
        (
            "z = Neg(x) y = If(c) <then_branch = t() => (float[2] z) { },"
            " else_branch = e() => (float[2] q) { q = Neg(x) }>",
            "output 'z'",
            "graph 't'",
        ),
    ],
)
def test_impossible_graphs(body: str, what: str, where: str) -> None:
    with pytest.raises(InvalidGraphError, match=what) as error:
        load_model(parsed(body))

    assert re.search(where, error.value.diagnostic.where)


def test_unsorted_nodes_are_sorted() -> None:
    proto = parsed("a = Neg(x) b = Abs(a) y = Exp(b)")
    nodes = list(proto.graph.node)
    del proto.graph.node[:]
    proto.graph.node.extend(reversed(nodes))
    assert [node.op_type for node in load_model(proto).graph] == ["Neg", "Abs", "Exp"]


def test_functions_with_ghosts() -> None:
    text = (
        '<ir_version: 8, opset_import: ["": 18, "loc": 1]>'
        "g(float[2] x) => (float[2] y) { y = loc.f(x) }"
        '<opset_import: ["": 18], domain: "loc"> f(a) => (b) { b = Add(a, ghost) }'
    )
    with pytest.raises(InvalidGraphError, match="ghost") as error:
        load_model(onnx.parser.parse_model(text))
    assert "loc.f" in error.value.diagnostic.where


# --- peculiarities ---------------------------------------------------------------------------


def test_before_ir_version_4_initializers_are_constants_though_listed_as_inputs() -> None:
    proto = linear()
    proto.ir_version = 3
    proto.graph.input.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, [3, 4]))
    assert [value.name for value in load_model(proto).graph.inputs] == ["x"]
    proto.ir_version = 8  # from here on it is a default that the caller may override
    assert [value.name for value in load_model(proto).graph.inputs] == ["x", "w"]


def test_minus_one_in_a_shape_is_an_unknown_dimension() -> None:
    proto = linear()
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value = -1
    dim = load_model(proto).graph.inputs[0].shape[0]
    assert isinstance(dim, ir.SymbolicDim)
    assert dim.value is None


def test_sparse_initializers_are_written_out() -> None:
    proto = linear()
    del proto.graph.initializer[:]
    values = numpy_helper.from_array(np.array([5, 6], np.float32), "w")
    indices = numpy_helper.from_array(np.array([1, 11], np.int64))
    proto.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [3, 4]))
    array = load_model(proto).graph.initializers["w"].const_value.numpy()
    assert (array[0, 1], array[2, 3], array.sum()) == (5, 6, 11)
    assert len(proto.graph.sparse_initializer) == 1
    proto.graph.sparse_initializer[0].dims[:] = [1 << 40, 4]
    with pytest.raises(ModelFileError, match="too large"):
        load_model(proto)


def test_features_without_a_form() -> None:
    proto = parsed("y = Neg(x)")
    node = helper.make_node("Constant", [], ["s"], sparse_value=helper.make_sparse_tensor(
        numpy_helper.from_array(np.ones(1, np.float32), "v"),
        numpy_helper.from_array(np.zeros(1, np.int64)), [4]))  # fmt: skip
    proto.graph.node.append(node)
    with pytest.raises(UnsupportedOpError, match="Sparse"):
        load_model(proto)


def test_names_metadata_and_opset_survive() -> None:
    proto = linear()
    helper.set_model_props(proto, {"author": "someone"})
    model = load_model(proto)
    assert model.metadata_props == {"author": "someone"}
    assert to_supported_opset(model) == []


def test_an_absent_tensor_without_a_shape_in_an_ir_model() -> None:
    graph = ir.from_proto(linear())
    graph.graph.initializers["w"].const_value = None
    model = load_model(graph, weights_required=False)
    tensor = model.graph.initializers["w"].const_value
    assert isinstance(tensor, AbsentTensor)
    assert tensor.shape.numpy() == (3, 4)

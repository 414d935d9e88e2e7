"""ONNX in any form (file, bytes, `ModelProto`, `onnx_ir.Model`) to a graph that is ours to change.

Here: reading, and separating the graph from what the caller keeps. Not here: the checks
(`onnx_checks`, `external_data`), other formats (`file_formats`), opsets (`opset`).
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from ..errors import EdgepassError, ModelFileError, UnsupportedOpError, WeightsAbsentError
from ..ir.graph import AbsentTensor, absent_weights, graphs
from ..ir.mapped import MappedTensor
from .external_data import settle_external_data
from .file_formats import other_format
from .mapped_file import without_weights
from .onnx_checks import check_model_proto, check_tensor_proto, has_no_data

_PROTOBUF_LIMIT = 2**31 - 1
_DENSE_LIMIT_BYTES = 1 << 30


def from_path(
    path: str | os.PathLike[str], weights_required: bool, *, map_weights: bool = False
) -> ir.Model:
    """A model file; weights beside it are mapped when first read, and with `map_weights` also
    those in it: the file must then stay as it is for as long as the model is used.

    Raises `ModelFileError` for what isn't an ONNX file, else as `from_proto`.
    """
    file = Path(path)
    shown = repr(str(file))
    _check_file(file, shown)
    split = without_weights(file) if map_weights and file.stat().st_size else None
    content, mapped = split if split is not None else (_read(file, shown), {})
    proto = _parse(content, shown)
    del content  # a large file needn't be in memory twice
    # A symlinked model (a download cache) has its data beside the link or beside the real file.
    folders = [file.parent, Path(os.path.realpath(file)).parent]
    return _from_own_proto(proto, folders, weights_required, mapped)


def from_bytes(content: bytes, weights_required: bool) -> ir.Model:
    """A serialized `ModelProto`; its external data, if any, counts as absent."""
    return _from_own_proto(_parse(content, "the bytes given"), None, weights_required)


def from_proto(proto: onnx.ModelProto, weights_required: bool) -> ir.Model:
    """A `ModelProto`, which stays as it is; its external data, if any, counts as absent.

    Raises:
        InvalidGraphError: dangling names, names defined twice, a cycle.
        ModelFileError: tensors that contradict themselves.
        WeightsAbsentError: weights are missing and `weights_required`.
    """
    if not proto.HasField("graph"):
        raise ModelFileError("The ModelProto has no graph", fix="pass a complete model")
    return _from_own_proto(proto, None, weights_required)


def from_ir(source: ir.Model, weights_required: bool) -> ir.Model:
    """A clone that shares the weights' data but no object the caller could see change."""
    try:
        model = source.clone()
    except Exception as error:
        from ..ir.verify import verify

        verify(source)  # names the node and value, where a rule covers it
        raise ModelFileError(
            "The onnx_ir.Model can't be cloned",
            why=f"{type(error).__name__}: {str(error).splitlines()[0][:200]}",
            fix="build the model again; its graph refers to values it doesn't own",
        ) from error
    model.meta.update(source.meta)
    settle_external_data(model, [], weights_required)
    return finish(model, weights_required)


def finish(model: ir.Model, weights_required: bool) -> ir.Model:
    """What every source needs at the end: own tensors, no version-3 quirks, weights if required."""
    _separate_tensors(model)
    _initializers_are_not_inputs(model)
    _unknown_dimensions(model)
    if weights_required and (names := absent_weights(model)):
        raise WeightsAbsentError(
            f"{len(names)} weight{'s have' if len(names) > 1 else ' has'} no data",
            where=", ".join(repr(name) for name in names[:5]) + (", ..." * (len(names) > 5)),
            why="the model is an architecture without weights",
            fix="use `edgepass.estimate`, which needs shapes only, or provide the weights",
        )
    return model


# --- reading ---------------------------------------------------------------------------------


def _check_file(file: Path, shown: str) -> None:
    """Whether it can be an ONNX file, by its first bytes and its size."""
    if file.is_dir():
        found = sorted(p.name for p in file.glob("*.onnx"))
        hint = f": there is {', '.join(found[:3])} in it" if found else ""
        raise ModelFileError(
            f"{shown} is a folder, not a model file", fix="pass the .onnx file" + hint
        )
    try:
        with open(file, "rb") as stream:
            what = other_format(file, stream.read(512))
            if what:
                raise ModelFileError(f"{shown} is not an ONNX file: {what[0]}", fix=what[1])
            size = os.fstat(stream.fileno()).st_size
            if size > _PROTOBUF_LIMIT:
                raise ModelFileError(
                    f"{shown} is not an ONNX file: it has {size} bytes",
                    why="an ONNX file has at most 2 GB; larger weights lie in a file beside it",
                    fix="save the model with external data, and pass the .onnx file",
                )
    except FileNotFoundError as error:
        raise ModelFileError(
            f"There is no file {shown}", where=f"looked in {os.getcwd()!r}", fix="check the path"
        ) from error
    except OSError as error:
        raise ModelFileError(
            f"{shown} can't be read", why=error.strerror or str(error), fix="check the file"
        ) from error


def _read(file: Path, shown: str) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise ModelFileError(
            f"{shown} can't be read", why=error.strerror or str(error), fix="check the file"
        ) from error


def _parse(content: bytes, shown: str) -> onnx.ModelProto:
    if not content:
        raise ModelFileError(f"The model is empty: {shown} has no bytes", fix="get the file again")
    try:
        proto = onnx.ModelProto.FromString(content)
    except Exception as error:  # protobuf's DecodeError; its package has no types
        raise ModelFileError(
            f"{shown} is damaged or not an ONNX model",
            why=f"protobuf can't decode its {len(content)} bytes, as after a cut-off download",
            fix="get the file again, and compare its size with the original's",
        ) from error
    if not proto.HasField("graph"):
        raise ModelFileError(
            f"{shown} is not an ONNX model",
            why="it decodes as protobuf, but has no graph",
            fix="pass a file that an ONNX exporter wrote",
        )
    return proto


# --- from protobuf to graph ------------------------------------------------------------------


def _from_own_proto(
    proto: onnx.ModelProto,
    folders: list[Path] | None,
    weights_required: bool,
    mapped: Mapping[str, MappedTensor] | None = None,
) -> ir.Model:
    needs_sort = check_model_proto(proto)
    proto = _with_dense_initializers(proto)
    try:
        model = ir.from_proto(proto)
    except EdgepassError:
        raise
    except Exception as error:
        raise _not_representable(error) from error
    for name, tensor in (mapped or {}).items():
        model.graph.initializers[name].const_value = tensor
    _mark_stripped(model)
    if needs_sort:
        for graph in (model.graph, *(f.graph for f in model.functions.values())):
            graph.sort()
    settle_external_data(model, folders, weights_required)
    return finish(model, weights_required)


def _not_representable(error: Exception) -> EdgepassError:
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    text = str(cause).splitlines()[0][:300] if str(cause) else type(cause).__name__
    if isinstance(cause, NotImplementedError):
        return UnsupportedOpError(
            "The model uses a feature of ONNX that edgepass has no form for",
            why=text,
            fix="export the model without map types and sparse tensors",
        )
    return ModelFileError(
        "The model can't be read", why=text, fix="export the model again, or get the file again"
    )


def _with_dense_initializers(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Sparse initializers written out, in a copy: the graph has no sparse form, nor do runtimes."""
    if not proto.graph.sparse_initializer:
        return proto
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    for sparse in copy.graph.sparse_initializer:
        where = f"sparse initializer {sparse.values.name!r}"
        check_tensor_proto(sparse.values, where)
        check_tensor_proto(sparse.indices, where)
        values = onnx.numpy_helper.to_array(sparse.values)
        indices = onnx.numpy_helper.to_array(sparse.indices)
        dims, count = list(sparse.dims), math.prod(sparse.dims)
        if not 0 <= count * values.itemsize <= _DENSE_LIMIT_BYTES or any(d < 0 for d in dims):
            raise ModelFileError(
                "A sparse initializer is too large to be written out",
                where=f"{where}, shape {dims}",
                why=f"it would take {count * values.itemsize} bytes",
            )
        if indices.ndim == 2:
            indices = np.ravel_multi_index(tuple(indices.T), tuple(dims), mode="clip")
        if indices.size != values.size or (
            indices.size and not 0 <= indices.min() <= indices.max() < count
        ):
            raise ModelFileError("A sparse initializer has indices out of its shape", where=where)
        dense = np.zeros(count, values.dtype)
        dense[indices] = values
        copy.graph.initializer.append(
            onnx.numpy_helper.from_array(dense.reshape(dims), sparse.values.name)
        )
    copy.graph.ClearField("sparse_initializer")
    return copy


def _mark_stripped(model: ir.Model) -> None:
    """Initializers that store nothing at all are absent weights, not zeros."""
    for graph in graphs(model):
        for value in graph.initializers.values():
            raw = getattr(value.const_value, "raw", None)
            if isinstance(raw, onnx.TensorProto) and has_no_data(raw):
                value.const_value = AbsentTensor(
                    raw.name, ir.DataType(raw.data_type), list(raw.dims), "the file stores no data"
                )


# --- making it ours --------------------------------------------------------------------------


def _separate_tensors(model: ir.Model) -> None:
    """Give every weight a tensor object of its own: renaming a value renames its tensor too.

    Data is shared; an inline protobuf tensor is decoded when first read, and once.
    """
    for graph in graphs(model):
        for value in graph.initializers.values():
            tensor = value.const_value
            if tensor is None:
                tensor = AbsentTensor(
                    value.name or "",
                    value.dtype or ir.DataType.UNDEFINED,
                    value.shape if value.shape is not None else ir.Shape([]),
                )
            value.const_value = _own(tensor, value.name or "")
        for node in graph:
            found = node.attributes.get("value") if node.op_type == "Constant" else None
            if found is not None and found.type == ir.AttributeType.TENSOR and not found.is_ref():
                tensor = found.as_tensor()
                node.attributes["value"] = ir.AttrTensor("value", _own(tensor, tensor.name or ""))


def _own(tensor: ir.TensorProtocol, name: str) -> ir.TensorProtocol:
    if isinstance(tensor, AbsentTensor):
        return AbsentTensor(name, tensor.dtype, tensor.shape, tensor.reason)
    if isinstance(tensor, ir.ExternalTensor):
        tensor.name = name  # `settle_external_data` made it
        return tensor
    if isinstance(tensor, MappedTensor):
        return tensor.renamed(name)
    if isinstance(tensor, ir.StringTensor):
        return ir.StringTensor(tensor.raw, shape=tensor.shape, name=name)
    if isinstance(tensor, ir.Tensor) and isinstance(tensor.raw, np.ndarray):
        return ir.Tensor(tensor.raw, dtype=tensor.dtype, shape=tensor.shape, name=name)
    if _without_data(getattr(tensor, "raw", None)):
        return AbsentTensor(
            name,
            tensor.dtype,
            list(tensor.shape.numpy()),
            "it was exported from a torch module without weights",
        )
    return ir.LazyTensor(
        lambda: ir.Tensor(tensor.numpy(), dtype=tensor.dtype, name=name),
        dtype=tensor.dtype,
        shape=ir.Shape(list(tensor.shape.numpy())),
        name=name,
        cache=True,
    )


def _without_data(raw: object) -> bool:
    """Whether it is a torch tensor on the meta device or a fake one (asked without torch)."""
    fake = any(base.__name__ == "FakeTensor" for base in type(raw).__mro__)
    return fake or getattr(raw, "is_meta", False) is True


def _initializers_are_not_inputs(model: ir.Model) -> None:
    """Before IR version 4 every initializer had to be a graph input too; they're constants."""
    if model.ir_version is None or model.ir_version >= 4:
        return
    for graph in graphs(model):
        kept = [value for value in graph.inputs if not value.is_initializer()]
        if len(kept) < len(graph.inputs):
            graph.inputs.clear()
            graph.inputs.extend(kept)
    model.ir_version = 4


def _unknown_dimensions(model: ir.Model) -> None:
    """Some exporters write -1 for a dimension they don't know: make it an unnamed symbol."""
    for graph in graphs(model):
        for values in (graph.inputs, *(node.outputs for node in graph)):
            for value in values:
                shape = value.shape
                if shape is not None and any(isinstance(d, int) and d < 0 for d in shape.dims):
                    value.shape = ir.Shape(
                        [None if isinstance(d, int) and d < 0 else d for d in shape.dims]
                    )

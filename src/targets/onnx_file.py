"""A graph as ONNX bytes: deterministic, of any size, with or without a file of external data.

Here: `serialize` and `write_onnx`. Not here: reading a user's model (frontends), running (runners).
protobuf refuses messages of 2 GiB, so big weights leave the message: into a file beside it, or
to the caller, who gives them to the runtime in memory.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from ..errors import LoweringError, WeightsAbsentError
from ..ir import wire_format as wire
from ..ir.graph import absent_weights, graphs, is_absent
from ..ir.mapped import MappedTensor

INLINE_LIMIT = 1_500_000_000
"""Bytes of weights up to which a model is one file; protobuf's own limit is 2^31 - 1."""
EXTERNAL_MINIMUM = 1024
"""Smaller tensors stay inline: shapes and scales are wanted by shape inference."""
_ALIGNMENT = 4096
_STREAMED_MINIMUM = 65536
"""Smaller weights are copied into the message: fewer pieces to write."""
_PRIVATE_METADATA = "pkg.torch."


def weight_bytes(model: ir.Model) -> int:
    """Bytes of all initializers, subgraphs included, as they would be stored."""
    return sum(value.const_value.nbytes for value in _initializers(model) if value.const_value)


def serialize(model: ir.Model, *, external: dict[str, ir.ExternalTensor] | None = None) -> bytes:
    """The model as ONNX protobuf bytes; equal models give equal bytes.

    Exporter metadata (stack traces with paths of the machine it ran on) is left out. `external`
    maps names of main-graph initializers to where their data is; all others are inline, also
    those whose source was an external file. The model itself is not changed.

    Raises:
        WeightsAbsentError: an initializer has no data.
        LoweringError: over protobuf's 2 GiB.
    """
    absent = absent_weights(model)
    if absent:
        raise WeightsAbsentError(
            f"{len(absent)} weights have no data, {absent[0]!r} first",
            why="the model is an architecture without weights",
            fix="use `edgepass.estimate`, which needs shapes only, or provide the weights",
        )
    with _substituted(model, external or {}):
        proto = ir.to_proto(model)
    _canonicalize(proto)
    try:
        return bytes(proto.SerializeToString(deterministic=True))
    except Exception as error:  # protobuf's EncodeError or ValueError, by implementation
        raise LoweringError(
            "The model does not fit in one ONNX message",
            why=f"{error}; {weight_bytes(model):,} bytes of weights",
            fix="save it with external data",
        ) from error


def write_onnx(
    model: ir.Model,
    path: Path,
    *,
    external_data: bool | None = None,
    inline_limit: int = INLINE_LIMIT,
) -> list[Path]:
    """Write `path`, and `path` + `.data` when the weights leave the message.

    They do when `external_data` is true, or None and there are more than `inline_limit` bytes of
    them. Offsets in the data file are multiples of 4096, so that it can be memory-mapped.
    Returns the files written. The same model gives the same bytes.
    """
    if external_data is None:
        external_data = weight_bytes(model) > inline_limit
    if not external_data:
        with path.open("wb") as file:
            for part in _pieces(model):
                if isinstance(part, bytes):
                    file.write(part)
                else:
                    _write_tensor(part, file)
        return [path]
    data = path.with_name(path.name + ".data")
    placed: dict[str, ir.ExternalTensor] = {}
    absent = absent_weights(model)
    if not absent:
        with data.open("wb") as file:
            for name, value in model.graph.initializers.items():
                tensor = value.const_value
                if tensor is None or not leaves_message(value):
                    continue
                file.write(bytes(-file.tell() % _ALIGNMENT))
                offset = file.tell()
                _write_tensor(tensor, file)
                placed[name] = ir.ExternalTensor(
                    data.name,
                    offset,
                    file.tell() - offset,
                    tensor.dtype,
                    shape=ir.Shape(list(tensor.shape.numpy())),
                    name=name,
                    base_dir=os.fspath(path.parent),
                )
    path.write_bytes(serialize(model, external=placed))
    return [path, data]


def _pieces(model: ir.Model) -> Iterator[bytes | ir.TensorProtocol]:
    """What `serialize` gives, in pieces: big weights as themselves, so that none is copied."""
    big = {
        name: tensor
        for name, value in model.graph.initializers.items()
        if (tensor := value.const_value) is not None
        and leaves_message(value)
        and tensor.nbytes >= _STREAMED_MINIMUM
        and not is_absent(tensor)
    }
    stand_ins = {
        name: ir.ExternalTensor(
            "-", 0, tensor.nbytes, tensor.dtype, shape=ir.Shape(list(tensor.shape.numpy())),
            name=name,
        )
        for name, tensor in big.items()
    }  # fmt: skip
    content = serialize(model, external=stand_ins)
    if not big:
        yield content
        return
    graph = next(f for f in wire.fields(content, 0, len(content)) if f.number == wire.MODEL_GRAPH)
    inside: list[bytes | ir.TensorProtocol] = []
    copied = graph.start
    for field in wire.fields(content, graph.start, graph.end):
        if field.number != wire.GRAPH_INITIALIZER:
            continue
        proto = onnx.TensorProto.FromString(content[field.start : field.end])
        if proto.name not in big:
            continue
        tensor = big[proto.name]
        head, tail = _around_raw_data(proto)
        head += wire.bytes_field(wire.TENSOR_RAW_DATA, tensor.nbytes)
        length = len(head) + tensor.nbytes + len(tail)
        inside.append(content[copied : field.tag])
        inside.append(wire.bytes_field(wire.GRAPH_INITIALIZER, length) + head)
        inside += [tensor, tail]
        copied = field.end
    inside.append(content[copied : graph.end])
    size = sum(len(part) if isinstance(part, bytes) else part.nbytes for part in inside)
    yield content[: graph.tag] + wire.bytes_field(wire.MODEL_GRAPH, size)
    yield from inside
    yield content[graph.end :]


def _around_raw_data(proto: onnx.TensorProto) -> tuple[bytes, bytes]:
    """A tensor's message before and after its raw data, of which it has none yet."""
    proto.ClearField("external_data")
    proto.ClearField("data_location")
    proto.raw_data = b""
    message = bytes(proto.SerializeToString(deterministic=True))
    raw = next(f for f in wire.fields(message, 0, len(message)) if f.number == wire.TENSOR_RAW_DATA)
    return message[: raw.tag], message[raw.end :]


def leaves_message(value: ir.Value) -> bool:
    """Whether an initializer may be external: big, not text, and not also a graph input."""
    tensor = value.const_value
    return (
        tensor is not None
        and tensor.dtype != ir.DataType.STRING
        and tensor.nbytes >= EXTERNAL_MINIMUM
        and not value.is_graph_input()
    )


def _write_tensor(tensor: ir.TensorProtocol, file: object) -> None:
    array = tensor.raw if isinstance(tensor, ir.Tensor) else None
    if isinstance(array, np.ndarray) and _is_plain(array, tensor.dtype):
        file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8))  # type: ignore[attr-defined]
        if isinstance(tensor, MappedTensor):
            tensor.release()
    elif isinstance(tensor, ir.Tensor | ir.ExternalTensor):
        tensor.tofile(file)
    else:
        file.write(tensor.tobytes())  # type: ignore[attr-defined]


def _is_plain(array: np.ndarray, dtype: ir.DataType) -> bool:
    """Whether the array's bytes are the stored bytes."""
    return sys.byteorder == "little" and array.dtype.kind in "biuf" and array.dtype == dtype.numpy()


def _initializers(model: ir.Model) -> Iterator[ir.Value]:
    for graph in graphs(model):
        yield from graph.initializers.values()


@contextlib.contextmanager
def _substituted(model: ir.Model, external: dict[str, ir.ExternalTensor]) -> Iterator[None]:
    """Initializers stand where `external` says, and every other external one is in memory."""
    saved: list[tuple[ir.Value, ir.TensorProtocol]] = []
    attributes: list[tuple[ir.Node, ir.Attr]] = []
    try:
        for value in _initializers(model):
            tensor = value.const_value
            if tensor is None:
                continue
            placed = external.get(value.name or "") if value.graph is model.graph else None
            if placed is not None:
                saved.append((value, tensor))
                value.const_value = placed
            elif isinstance(tensor, ir.ExternalTensor):
                saved.append((value, tensor))
                value.const_value = _in_memory(tensor)
        for graph in graphs(model):
            for node in graph:
                for attribute in _external_attributes(node):
                    attributes.append((node, attribute))
                    tensor = _in_memory(attribute.as_tensor())
                    node.attributes[attribute.name] = ir.AttrTensor(attribute.name, tensor)
        yield
    finally:
        for value, tensor in saved:
            value.const_value = tensor
        for node, attribute in attributes:
            node.attributes[attribute.name] = attribute


def _external_attributes(node: ir.Node) -> list[ir.Attr]:
    if node.op_type not in ("Constant", "ConstantOfShape"):
        return []
    return [
        attribute
        for attribute in node.attributes.values()
        if attribute.type == ir.AttributeType.TENSOR
        and not attribute.is_ref()
        and isinstance(attribute.as_tensor(), ir.ExternalTensor)
    ]


def _in_memory(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    return ir.Tensor(tensor.numpy(), dtype=tensor.dtype, name=tensor.name)


def _canonicalize(proto: onnx.ModelProto) -> None:
    """Same order every time, and nothing of the machine that exported the model."""
    opsets = sorted(proto.opset_import, key=lambda entry: entry.domain)
    del proto.opset_import[:]
    proto.opset_import.extend(opsets)
    _strip(proto.metadata_props)
    for function in proto.functions:
        _strip(function.metadata_props)
        _unique_names(function.node)
        for node in function.node:
            _canonicalize_node(node)
    _canonicalize_graph(proto.graph)


def _canonicalize_graph(graph: onnx.GraphProto) -> None:
    _strip(graph.metadata_props)
    known = {tensor.name for tensor in graph.initializer}
    if known:  # an initializer says its own type; whether it is said twice depends on the source
        infos = [info for info in graph.value_info if info.name not in known]
        if len(infos) != len(graph.value_info):
            del graph.value_info[:]
            graph.value_info.extend(infos)
    for info in (*graph.input, *graph.output, *graph.value_info, *graph.initializer):
        _strip(info.metadata_props)
    _unique_names(graph.node)
    for node in graph.node:
        _canonicalize_node(node)


def _canonicalize_node(node: onnx.NodeProto) -> None:
    if node.metadata_props:
        _strip(node.metadata_props)
    if node.doc_string:
        node.doc_string = ""
    if len(node.attribute) > 1:
        names = [attribute.name for attribute in node.attribute]
        if names != sorted(names):
            node.attribute.sort(key=lambda attribute: attribute.name)
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            _canonicalize_graph(attribute.g)
        elif attribute.type == onnx.AttributeProto.GRAPHS:
            for graph in attribute.graphs:
                _canonicalize_graph(graph)


def _unique_names(nodes: Iterable[onnx.NodeProto]) -> None:
    """Number repeated names: nodes a pass made in one's place share it, ONNX Runtime refuses that.

    (Seen with 1.32: "two nodes with same node name".)
    """
    nodes = list(nodes)
    taken = {node.name for node in nodes}
    copies: dict[str, int] = {}
    for node in nodes:
        base = node.name
        if not base or base not in copies:
            copies[base] = 0
            continue
        while node.name in taken:
            copies[base] += 1
            node.name = f"{base}_{copies[base]}"
        taken.add(node.name)


def _strip(entries: object) -> None:
    kept = sorted(
        (entry.key, entry.value)
        for entry in entries  # type: ignore[attr-defined]
        if not entry.key.startswith(_PRIVATE_METADATA)
    )
    del entries[:]  # type: ignore[attr-defined]
    for key, value in kept:
        entries.add(key=key, value=value)  # type: ignore[attr-defined]

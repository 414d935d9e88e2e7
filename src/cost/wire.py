"""Bytes of ONNX protobuf messages, by arithmetic: nothing is built and no weight is read.

Here: the size of a model, graph, node, tensor or value as `targets.onnx_file` writes it, absent
weights counted as if they were there. Not here: the size of files and of plans (`size`).
Field numbers and presence rules are those of onnx.proto (proto2: a field that was set is written).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping

import onnx_ir as ir

from ..ir.graph import is_absent

_PRIVATE_METADATA = "pkg.torch."  # left out by targets.onnx_file
_FUNCTION_VALUE_INFO = 10  # the IR version from which functions hold their own value_info

Placed = Mapping[str, tuple[str, int, int]]
"""Main-graph initializers in external data: name to (location, offset, length)."""


def varint_bytes(number: int) -> int:
    """Bytes of a protobuf varint; a negative number takes ten."""
    return 10 if number < 0 else max(1, -(-number.bit_length() // 7))


def framed(size: int, tag: int = 1) -> int:
    """A length-delimited field of `size` bytes with its tag and its length."""
    return tag + varint_bytes(size) + size


def text_bytes(text: str) -> int:
    """A string field."""
    return framed(len(text) if text.isascii() else len(text.encode()))


def model_bytes(model: ir.Model, placed: Placed | None = None) -> int:
    """The size of the whole ModelProto."""
    size = 1 + varint_bytes(model.ir_version)
    for text in (model.producer_name, model.producer_version, model.domain, model.doc_string):
        size += text_bytes(text) if text else 0
    if model.model_version:
        size += 1 + varint_bytes(model.model_version)
    size += _opset_bytes(model.opset_imports)
    size += _metadata_bytes(model.metadata_props)
    own_values = model.ir_version >= _FUNCTION_VALUE_INFO
    graph = graph_bytes(model.graph, placed)
    for function in model.functions.values():
        size += framed(_function_bytes(function, own_values), tag=2)
        if not own_values:
            scope = f"{function.domain}::{function.name}/"
            values = [*function.inputs, *(v for node in function for v in node.outputs)]
            graph += sum(
                framed(value_info_bytes(v, scope + (v.name or ""))) for v in values if _is_told(v)
            )
    return size + framed(graph)


def graph_bytes(graph: ir.Graph, placed: Placed | None = None) -> int:
    """The size of a GraphProto."""
    size = text_bytes(graph.name) if graph.name else 0
    size += text_bytes(graph.doc_string) if graph.doc_string else 0
    size += _metadata_bytes(graph.metadata_props, tag=2)
    for value in (*graph.inputs, *graph.outputs):
        size += framed(value_info_bytes(value))
    for name, value in graph.initializers.items():
        size += framed(_initializer_bytes(value, placed.get(name) if placed else None))
    for node in graph:
        size += framed(node_bytes(node))
        for value in node.outputs:
            if not value.is_graph_output() and _is_told(value):
                size += framed(value_info_bytes(value))
    return size


def _function_bytes(function: ir.Function, own_values: bool) -> int:
    size = 0
    for text in (function.domain, function.name, function.overload, function.doc_string):
        size += text_bytes(text) if text else 0
    size += _opset_bytes(function.opset_imports)
    size += _metadata_bytes(function.metadata_props)
    size += sum(text_bytes(v.name or "") for v in (*function.inputs, *function.outputs))
    for attribute in function.attributes.values():
        if attribute.value is None:
            size += text_bytes(attribute.name)
        else:
            size += framed(_attribute_bytes(attribute))
    values = list(function.inputs)
    for node in function:
        size += framed(node_bytes(node))
        values += node.outputs
    if own_values:
        size += sum(framed(value_info_bytes(v)) for v in values if _is_told(v))
    return size


def _opset_bytes(imports: Mapping[str, int]) -> int:
    return sum(
        framed(text_bytes(domain) + 1 + varint_bytes(version))
        for domain, version in imports.items()
    )


def _metadata_bytes(props: Mapping[str, str], tag: int = 1) -> int:
    if not props:
        return 0
    return sum(
        framed(text_bytes(key) + text_bytes(value), tag)
        for key, value in props.items()
        if not key.startswith(_PRIVATE_METADATA)
    )


# --- nodes -----------------------------------------------------------------------------------


def node_bytes(node: ir.Node) -> int:
    """The size of a NodeProto, subgraphs included."""
    size = text_bytes(node.op_type)
    for text in (node.domain, node.name, node.overload):
        size += text_bytes(text) if text else 0
    if node.doc_string:
        size += 2  # emptied, not removed
    size += _metadata_bytes(node.metadata_props)
    for value in node.inputs:
        size += text_bytes(value.name or "") if value is not None else 2
    outputs = list(node.outputs)
    while outputs and not outputs[-1].name:
        outputs.pop()
    for value in outputs:
        size += text_bytes(value.name or "")
    for attribute in node.attributes.values():
        size += framed(_attribute_bytes(attribute))
    return size


def plain_node_bytes(
    op_type: str, name: str, inputs: Iterable[str], output: str, **attributes: int
) -> int:
    """A framed node that does not exist yet, with integer attributes."""
    size = text_bytes(op_type) + text_bytes(name) + text_bytes(output)
    size += sum(text_bytes(text) for text in inputs)
    for key, value in attributes.items():
        size += framed(text_bytes(key) + 3 + 1 + varint_bytes(value))
    return framed(size)


def _attribute_bytes(attribute: ir.Attr) -> int:
    size = text_bytes(attribute.name) + 3  # the type is field 20: a tag of two bytes
    if attribute.doc_string:
        size += text_bytes(attribute.doc_string)
    if attribute.is_ref():
        reference = (attribute.ref_attr_name or "").encode()
        return size + framed(len(reference), tag=2)
    value = attribute.value
    match attribute.type:
        case ir.AttributeType.INT:
            return size + 1 + varint_bytes(value)
        case ir.AttributeType.FLOAT:
            return size + 5
        case ir.AttributeType.INTS:
            return size + sum(1 + varint_bytes(number) for number in value)
        case ir.AttributeType.FLOATS:
            return size + 5 * len(value)
        case ir.AttributeType.STRING:
            return size + (framed(len(value)) if isinstance(value, bytes) else text_bytes(value))
        case ir.AttributeType.STRINGS:
            return size + sum(text_bytes(text) for text in value)
        case ir.AttributeType.TENSOR:
            return size + framed(tensor_bytes(value, value.name or ""))
        case ir.AttributeType.TENSORS:
            return size + sum(framed(tensor_bytes(t, t.name or "")) for t in value)
        case ir.AttributeType.GRAPH:
            return size + framed(graph_bytes(value))
        case ir.AttributeType.GRAPHS:
            return size + sum(framed(graph_bytes(graph)) for graph in value)
        case _:
            whole: int = ir.to_proto(attribute).ByteSize()
            return whole


# --- tensors ---------------------------------------------------------------------------------


def _initializer_bytes(value: ir.Value, place: tuple[str, int, int] | None) -> int:
    tensor = value.const_value
    name = value.name or ""
    if tensor is None:  # an architecture: the weight will be there with this dtype and shape
        if value.dtype is None or value.shape is None or not value.shape.is_static():
            return text_bytes(name)
        dims = tuple(int(d) for d in value.shape.numpy())
        return plain_tensor_bytes(name, value.dtype, dims)
    if place is not None:
        return _placed_tensor_bytes(tensor, name, place)
    return tensor_bytes(tensor, name)


def tensor_bytes(tensor: ir.TensorProtocol, name: str) -> int:
    """The size of a TensorProto with its data inline."""
    if isinstance(tensor, ir.TensorProtoTensor):  # copied as it is, whatever field holds the data
        size: int = tensor.raw.ByteSize()
        if tensor.name != name:
            size += text_bytes(name) - (text_bytes(tensor.name) if tensor.name else 0)
        return size
    dims = tuple(int(d) for d in tensor.shape.numpy())
    if isinstance(tensor, ir.StringTensor):
        size = _tensor_head_bytes(name, tensor.dtype, dims)
        size += sum(framed(len(text)) for text in tensor.string_data())
    else:
        size = _tensor_head_bytes(name, tensor.dtype, dims) + framed(tensor.nbytes)
    if isinstance(tensor, ir.ExternalTensor) or is_absent(tensor):
        return size
    if tensor.doc_string:
        size += text_bytes(tensor.doc_string)
    return size + _metadata_bytes(tensor.metadata_props, tag=2)


def plain_tensor_bytes(name: str, dtype: ir.DataType, dims: tuple[int, ...]) -> int:
    """A TensorProto of raw data that does not exist yet."""
    data = (math.prod(dims) * dtype.bitwidth + 7) // 8
    return _tensor_head_bytes(name, dtype, dims) + framed(data)


def _placed_tensor_bytes(tensor: ir.TensorProtocol, name: str, place: tuple[str, int, int]) -> int:
    dims = tuple(int(d) for d in tensor.shape.numpy())
    size = _tensor_head_bytes(name, tensor.dtype, dims) + 2  # data_location
    for key, value in zip(("location", "offset", "length"), place, strict=True):
        size += framed(text_bytes(key) + text_bytes(str(value)))
    return size


def _tensor_head_bytes(name: str, dtype: ir.DataType, dims: tuple[int, ...]) -> int:
    size = (text_bytes(name) if name else 0) + 1 + varint_bytes(dtype.value)
    return size + sum(1 + varint_bytes(d) for d in dims)


# --- values ----------------------------------------------------------------------------------


def value_info_bytes(value: ir.Value, name: str | None = None) -> int:
    """The size of a ValueInfoProto."""
    size = text_bytes(name if name is not None else value.name or "")
    size += _metadata_bytes(value.metadata_props)
    if value.doc_string:
        size += text_bytes(value.doc_string)
    if value.type is None:
        return size
    shape = value.shape
    if type(value.type) is not ir.TensorType or value.type.denotation:
        whole: int = ir.to_proto(value).ByteSize()
        return whole + text_bytes(name or "") - text_bytes(value.name or "") if name else whole
    if shape is None:
        return size + framed(tensor_type_bytes(value.type.dtype, None))
    dims = tuple(d if isinstance(d, int) else d.value for d in shape.dims)
    size += framed(tensor_type_bytes(value.type.dtype, dims))
    return size


@functools.lru_cache(maxsize=65536)
def tensor_type_bytes(dtype: ir.DataType, dims: tuple[int | str | None, ...] | None) -> int:
    """The size of a TypeProto of a tensor; symbolic dimensions by name, unknown ones None."""
    size = 1 + varint_bytes(dtype.value)
    if dims is not None:
        shape = 0
        for dim in dims:
            match dim:
                case None:
                    shape += 2
                case int():
                    shape += framed(1 + varint_bytes(dim))
                case str():
                    shape += framed(text_bytes(dim))
        size += framed(shape)
    return framed(size)


def _is_told(value: ir.Value) -> bool:
    """Whether onnx_ir writes a value_info for a node output."""
    if not value.name:
        return False
    return not (
        value.shape is None
        and value.type is None
        and not value.metadata_props
        and not value.doc_string
    )

"""Checks on an ONNX protobuf before it becomes a graph: what would be lost or crash later on.

Here: names that nobody produces, names defined twice, cycles, and tensors whose declared type,
shape and size contradict each other, all found without allocating what a tensor declares.
Not here: files of external data (`external_data`), and rules of operators (`ir.verify`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import onnx
import onnx_ir as ir

from ..errors import InvalidGraphError, ModelFileError

_EXPORT_AGAIN = "export the model again"
_Scope = tuple[set[str], set[str]]
"""All names of a graph, and those of them that are defined before the node at hand."""

_FIELD_OF_TYPE: dict[ir.DataType, str] = {
    ir.DataType.FLOAT: "float_data",
    ir.DataType.COMPLEX64: "float_data",
    ir.DataType.DOUBLE: "double_data",
    ir.DataType.COMPLEX128: "double_data",
    ir.DataType.INT64: "int64_data",
    ir.DataType.UINT32: "uint64_data",
    ir.DataType.UINT64: "uint64_data",
    ir.DataType.STRING: "string_data",
}
"""The field of a protobuf tensor for each type; all types not here use `int32_data`."""


def check_model_proto(proto: onnx.ModelProto) -> bool:
    """Raise for a structure or tensor that can't be right; return whether nodes need sorting.

    Raises:
        InvalidGraphError: dangling or doubly defined names, a cycle; names node and value.
        ModelFileError: a tensor of unknown type, negative size, or the wrong amount of data.
    """
    needs_sort = _check_graph(proto.graph, [])
    seen: set[tuple[str, str, str]] = set()
    for function in proto.functions:
        key = (function.domain, function.name, function.overload)
        if key in seen:
            raise InvalidGraphError(
                f"Function {function.domain}.{function.name} is defined twice", fix=_EXPORT_AGAIN
            )
        seen.add(key)
        where = f"function {function.domain}.{function.name}"
        names = set(function.input)
        needs_sort |= _check_nodes(function.node, names, [], where)
        _check_outputs(function.output, names, where)
    return needs_sort


def tensor_bytes(dtype: ir.DataType, dims: Iterable[int]) -> int:
    """Bytes of a tensor as ONNX stores it: elements of less than a byte are packed."""
    return (math.prod(dims) * dtype.bitwidth + 7) // 8


# --- structure -------------------------------------------------------------------------------


def _check_graph(graph: onnx.GraphProto, outer: list[_Scope]) -> bool:
    where = f"graph {graph.name!r}"
    names: set[str] = set()
    for info in graph.input:
        if info.name in names:
            raise _defined_twice(info.name, f"an input of {where}")
        names.add(info.name)
        _check_value_type(info, where)
    for info in (*graph.output, *graph.value_info):
        _check_value_type(info, where)
    stored: set[str] = set()
    for tensor in graph.initializer:
        if tensor.name in stored:
            raise _defined_twice(tensor.name, f"an initializer of {where}")
        stored.add(tensor.name)
        check_tensor_proto(tensor, f"initializer {tensor.name!r} of {where}")
    stored.update(sparse.values.name for sparse in graph.sparse_initializer)
    names |= stored
    needs_sort = _check_nodes(graph.node, names, outer, where)
    _check_outputs([info.name for info in graph.output], names, where)
    return needs_sort


def _check_nodes(nodes: Any, names: set[str], outer: list[_Scope], where: str) -> bool:
    """Check the nodes of one graph or function; adds what they produce to `names`."""
    produced: set[str] = set()
    for node in nodes:
        for name in node.output:
            if name and (name in produced or name in names):
                raise _defined_twice(name, f"an output of {_describe(node)}")
            produced.add(name)
    ready = set(names)
    names |= produced
    scopes = [*outer, (names, ready)]
    needs_sort = False
    for node in nodes:
        for name in node.input:
            if not name or name in ready:
                continue
            scope = next((s for s in reversed(scopes) if name in s[0]), None)
            if scope is None:
                raise InvalidGraphError(
                    f"Nothing produces the value {name!r}",
                    where=f"an input of {_describe(node)} in {where}",
                    why="it is neither a graph input, nor an initializer, nor a node's output",
                    fix=_EXPORT_AGAIN,
                )
            needs_sort |= name not in scope[1]
        for attribute in node.attribute:
            needs_sort |= _check_attribute(attribute, node, scopes)
        ready.update(node.output)
    if needs_sort:
        _refuse_cycle(nodes, where)
    return needs_sort


def _check_attribute(
    attribute: onnx.AttributeProto, node: onnx.NodeProto, scopes: list[_Scope]
) -> bool:
    needs_sort = False
    if attribute.type == onnx.AttributeProto.TENSOR:
        check_tensor_proto(attribute.t, f"attribute {attribute.name!r} of {_describe(node)}")
    elif attribute.type == onnx.AttributeProto.TENSORS:
        for tensor in attribute.tensors:
            check_tensor_proto(tensor, f"attribute {attribute.name!r} of {_describe(node)}")
    elif attribute.type == onnx.AttributeProto.GRAPH:
        needs_sort = _check_graph(attribute.g, scopes)
    elif attribute.type == onnx.AttributeProto.GRAPHS:
        for graph in attribute.graphs:
            needs_sort |= _check_graph(graph, scopes)
    return needs_sort


def _check_outputs(outputs: Iterable[str], names: set[str], where: str) -> None:
    for name in outputs:
        if name not in names:
            raise InvalidGraphError(
                f"Nothing in the graph produces its output {name!r}",
                where=where,
                why="an output is a graph input, an initializer, or the output of a node in it",
                fix=_EXPORT_AGAIN,
            )


def _defined_twice(name: str, where: str) -> InvalidGraphError:
    return InvalidGraphError(
        f"The value {name!r} is defined twice",
        where=where,
        why="every value has exactly one definition",
        fix=_EXPORT_AGAIN,
    )


def _refuse_cycle(nodes: Any, where: str) -> None:
    """Raise if nodes depend on each other in a circle, naming the circle."""
    producer = {name: i for i, node in enumerate(nodes) for name in node.output if name}
    needs = [{producer[name] for name in _reads(node) if name in producer} for node in nodes]
    users: list[list[int]] = [[] for _ in needs]
    for i, sources in enumerate(needs):
        for source in sources:
            users[source].append(i)
    waiting = [len(sources) for sources in needs]
    ready = [i for i, count in enumerate(waiting) if count == 0]
    for i in ready:
        for user in users[i]:
            waiting[user] -= 1
            if waiting[user] == 0:
                ready.append(user)
    stuck = {i for i, count in enumerate(waiting) if count}
    if not stuck:
        return
    path = [min(stuck)]  # every stuck node needs a stuck node: walking back must repeat one
    while (previous := min(needs[path[-1]] & stuck)) not in path:
        path.append(previous)
    circle = [*path[path.index(previous) :], previous][::-1]
    raise InvalidGraphError(
        "The graph has a cycle",
        where=f"{_describe(nodes[circle[0]])} in {where}",
        why=" -> ".join(nodes[i].name or nodes[i].op_type for i in circle),
        fix=_EXPORT_AGAIN,
    )


def _reads(node: onnx.NodeProto) -> Iterator[str]:
    yield from node.input
    for attribute in node.attribute:
        for graph in (attribute.g, *attribute.graphs):
            for inner in graph.node:
                yield from _reads(inner)


def _describe(node: onnx.NodeProto) -> str:
    domain = f"{node.domain}." if node.domain else ""
    name = node.name or next(iter(node.output), "") or "(unnamed)"
    return f"node {name!r} ({domain}{node.op_type})"


# --- tensors ---------------------------------------------------------------------------------


def check_tensor_proto(tensor: onnx.TensorProto, where: str) -> None:
    """Raise `ModelFileError` unless type, shape and the amount of data given fit together.

    External data is checked as far as the entry goes, not the file. A tensor of some size but
    without any data passes: it's the weight of an architecture.
    """
    dtype = _data_type(tensor.data_type, where)
    if any(dim < 0 for dim in tensor.dims):
        raise _bad_tensor(where, f"negative dimension in its shape {list(tensor.dims)}")
    if tensor.HasField("segment"):
        raise _bad_tensor(where, "it is stored in segments, which no known runtime reads")
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        if dtype == ir.DataType.STRING:
            raise _bad_tensor(where, "strings can't be stored as external data")
        _check_external_entry(tensor, where)
        return
    if tensor.HasField("raw_data"):
        if dtype == ir.DataType.STRING:
            raise _bad_tensor(where, "strings can't be stored as raw bytes")
        stored, expected = len(tensor.raw_data), tensor_bytes(dtype, tensor.dims)
        if stored != expected:
            raise _bad_tensor(
                where,
                f"{dtype.name} {list(tensor.dims)} takes {expected} bytes, {stored} are stored",
            )
        return
    _check_typed_data(tensor, dtype, where)


def has_no_data(tensor: onnx.TensorProto) -> bool:
    """Whether a tensor that should have elements stores none, inline or externally."""
    return (
        tensor.data_location != onnx.TensorProto.EXTERNAL
        and math.prod(tensor.dims) > 0
        and not tensor.HasField("raw_data")
        and not len(
            getattr(tensor, _FIELD_OF_TYPE.get(ir.DataType(tensor.data_type), "int32_data"))
        )
    )


def _check_typed_data(tensor: onnx.TensorProto, dtype: ir.DataType, where: str) -> None:
    count = math.prod(tensor.dims)
    field = _FIELD_OF_TYPE.get(dtype, "int32_data")
    stored = len(getattr(tensor, field))
    expected = {count}
    if dtype in (ir.DataType.COMPLEX64, ir.DataType.COMPLEX128):
        expected = {2 * count}
    elif dtype != ir.DataType.STRING and dtype.bitwidth in (2, 4):
        expected = {tensor_bytes(dtype, tensor.dims)}
    if stored and stored not in expected:
        raise _bad_tensor(
            where,
            f"{dtype.name} {list(tensor.dims)} takes {min(expected)} entries of {field}, "
            f"{stored} are stored",
        )


def _check_external_entry(tensor: onnx.TensorProto, where: str) -> None:
    entries = {entry.key: entry.value for entry in tensor.external_data}
    if not entries.get("location"):
        raise _bad_tensor(where, "its data is external, but no file is named")
    for key in ("offset", "length"):
        text = entries.get(key, "0")
        if not (text.isascii() and text.isdigit()):
            raise _bad_tensor(where, f"the {key} of its external data is {text!r}, not a number")


def _data_type(number: int, where: str) -> ir.DataType:
    try:
        dtype = ir.DataType(number)
    except ValueError:
        dtype = ir.DataType.UNDEFINED
    if dtype == ir.DataType.UNDEFINED:
        raise _bad_tensor(where, f"element type {number} is not one that ONNX defines")
    return dtype


def _check_value_type(info: onnx.ValueInfoProto, where: str) -> None:
    kind = info.type.WhichOneof("value")
    if kind in ("tensor_type", "sparse_tensor_type"):
        number = getattr(info.type, kind).elem_type
        if number:  # absent means unknown, which is legal inside a graph
            _data_type(number, f"value {info.name!r} of {where}")


def _bad_tensor(where: str, why: str) -> ModelFileError:
    return ModelFileError(
        "The model file contradicts itself about a tensor",
        where=where,
        why=why,
        fix="get the file again (it may be damaged or forged), or export the model again",
    )

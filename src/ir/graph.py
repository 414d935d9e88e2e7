"""The `onnx_ir` graph we build on, and the few helpers it lacks.

Here: walking a model with its subgraphs and functions, reading shapes, attributes and constants,
making initializers, weights that are absent, and saying where a node came from.
Not here: changing the graph (`edit`), patterns (`match`), operator facts (`ops`).
"""

from __future__ import annotations

import ast
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from ..errors import WeightsAbsentError

Dim = int | ir.SymbolicDim
"""One dimension: an int when static, else a named or unnamed symbol."""

ONNX_DOMAINS = frozenset({"", "ai.onnx"})
CONTRIB_DOMAIN = "com.microsoft"
RUNTIME_OWN = frozenset({"SimplifiedLayerNormalization"})
"""Operators that ONNX Runtime registers in the standard domain, and ONNX does not know."""
_NAMES = "edgepass.names"
_WITH_SUBGRAPHS = frozenset({"If", "Loop", "Scan", "SequenceMap"})


class AbsentTensor(ir.LazyTensor):
    """An initializer that has a dtype and a shape but no data: the weight of an architecture.

    Reading it (`numpy`, `tobytes`) raises `WeightsAbsentError`. `nbytes` and `size` work.
    """

    def __init__(
        self, name: str, dtype: ir.DataType, shape: Sequence[int] | ir.Shape, reason: str = ""
    ) -> None:
        super().__init__(
            self._fail,
            dtype=dtype,
            shape=shape if isinstance(shape, ir.Shape) else ir.Shape(list(shape)),
            name=name,
        )
        self.reason = reason

    def __repr__(self) -> str:
        return f"AbsentTensor<{self.dtype},{self.shape}>({self.name!r})"

    def _fail(self) -> ir.TensorProtocol:
        raise WeightsAbsentError(
            f"The weight {self.name!r} has no data",
            where=f"initializer {self.name!r}, {self.dtype.name} {list(self.shape.numpy())}",
            why=self.reason or "the model is an architecture without weights",
            fix="use `edgepass.estimate`, which needs shapes only, or provide the weights",
        )


def is_absent(tensor: ir.TensorProtocol | None) -> bool:
    """Whether a tensor is a weight without data."""
    return isinstance(tensor, AbsentTensor)


def absent_weights(model: ir.Model) -> list[str]:
    """Names of the initializers that have no data, in graph order."""
    return [
        name
        for graph in graphs(model)
        for name, value in graph.initializers.items()
        if value.const_value is None or is_absent(value.const_value)
    ]


# --- walking ---------------------------------------------------------------------------------


def graphs(model: ir.Model) -> Iterator[ir.Graph]:
    """The main graph, every subgraph under it, and every function's graph."""
    yield from graph_tree(model.graph)
    for function in model.functions.values():
        yield from graph_tree(function.graph)


def graph_tree(graph: ir.Graph) -> Iterator[ir.Graph]:
    """A graph, then the subgraphs of its nodes, theirs included."""
    yield graph
    for node in graph:
        for subgraph in node_subgraphs(node):
            yield from graph_tree(subgraph)


def all_nodes(model: ir.Model) -> Iterator[ir.Node]:
    """Every node, those inside subgraphs and functions too."""
    for graph in graphs(model):
        yield from graph


def node_count(model: ir.Model) -> int:
    """Nodes in the model, subgraphs and functions included, `Constant` not counted."""
    return sum(1 for node in all_nodes(model) if node.op_type != "Constant")


def has_subgraphs(node: ir.Node) -> bool:
    """Whether a node carries a graph in an attribute (`If`, `Loop`, `Scan`, ...)."""
    return any(True for _ in node_subgraphs(node))


def node_subgraphs(node: ir.Node) -> Iterator[ir.Graph]:
    """The graphs directly in a node's attributes."""
    if node.domain == "" and node.op_type not in _WITH_SUBGRAPHS:
        return  # most nodes: attributes need not be looked at
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH and not attribute.is_ref():
            yield attribute.as_graph()
        elif attribute.type == ir.AttributeType.GRAPHS and not attribute.is_ref():
            yield from attribute.as_graphs()


def is_onnx_op(node: ir.Node, *op_types: str) -> bool:
    """Whether a node is one of the standard operators named."""
    return node.op_type in op_types and node.domain in ONNX_DOMAINS


def opset_of(model: ir.Model) -> int:
    """The version of the standard operator set the model imports; 0 if none."""
    return int(model.opset_imports.get("", model.opset_imports.get("ai.onnx", 0)))


# --- shapes and constants --------------------------------------------------------------------


def static_shape(value: ir.Value | None) -> tuple[int, ...] | None:
    """The shape as ints, or None when it is unknown or has a symbolic dimension."""
    if value is None or value.shape is None:
        return None
    dims = value.shape.dims
    if all(type(d) is int for d in dims):
        return dims  # type: ignore[return-value]
    return None


def dims_of(value: ir.Value | None) -> tuple[Dim, ...] | None:
    """The dimensions, symbols kept, or None when even the rank is unknown."""
    return None if value is None or value.shape is None else value.shape.dims


def constant_tensor(value: ir.Value | None) -> ir.TensorProtocol | None:
    """The tensor behind an initializer or a `Constant` node, absent weights included.

    An initializer that is also a graph input can be overridden by the caller: not constant.
    """
    if value is None:
        return None
    if value.is_initializer():
        return None if value.is_graph_input() else value.const_value
    node = value.producer()
    if node is not None and is_onnx_op(node, "Constant"):
        return _constant_node_tensor(node)
    return None


def constant_array(value: ir.Value | None, max_elements: int = 1 << 62) -> np.ndarray | None:
    """The array behind a constant value; None if not constant, absent, or over `max_elements`.

    Do not write to it: it may be a memory-mapped file.
    """
    tensor = constant_tensor(value)
    if tensor is None or is_absent(tensor) or tensor.size > max_elements:
        return None
    return tensor.numpy()


def constant_scalar(value: ir.Value | None) -> float | int | bool | None:
    """A one-element constant as a Python number, or None."""
    array = constant_array(value, 1)
    if array is None or array.size != 1 or array.dtype.kind in "OSU":
        return None
    scalar: float | int | bool = array.reshape(()).item()
    return scalar


def _constant_node_tensor(node: ir.Node) -> ir.TensorProtocol | None:
    for name, attribute in node.attributes.items():
        if attribute.is_ref():
            return None
        match name:
            case "value":
                tensor: ir.TensorProtocol = attribute.value  # as_tensor() checks a slow protocol
                return tensor
            case "value_float":
                return ir.Tensor(np.array(attribute.as_float(), np.float32))
            case "value_int":
                return ir.Tensor(np.array(attribute.as_int(), np.int64))
            case "value_floats":
                return ir.Tensor(np.array(attribute.as_floats(), np.float32))
            case "value_ints":
                return ir.Tensor(np.array(attribute.as_ints(), np.int64))
            case "value_string":
                return ir.StringTensor([attribute.as_string().encode()], shape=ir.Shape([]))
            case "value_strings":
                texts = [text.encode() for text in attribute.as_strings()]
                return ir.StringTensor(texts, shape=ir.Shape([len(texts)]))
    return None


# --- attributes ------------------------------------------------------------------------------


def attribute(node: ir.Node, name: str, default: Any = None) -> Any:
    """An attribute's plain value (int, float, str, tuple, tensor, graph), or `default`."""
    found = node.attributes.get(name)
    if found is None or found.is_ref():
        return default
    if found.type in (ir.AttributeType.INTS, ir.AttributeType.FLOATS, ir.AttributeType.STRINGS):
        return tuple(found.value)
    return found.value


# --- building --------------------------------------------------------------------------------


def index_names(model: ir.Model) -> None:
    """Share one set of taken value names among all graphs of the model, for `fresh_name`.

    The driver calls it before every pass; names must be unique over subgraphs too, and a
    graph does not know its parent.
    """
    taken = {name for graph in graphs(model) for name in _value_names(graph)}
    for graph in graphs(model):
        graph.meta[_NAMES] = taken


def fresh_name(graph: ir.Graph, base: str) -> str:
    """A name like `base` that no value uses yet: O(1) after `index_names`."""
    taken: set[str] | None = graph.meta.get(_NAMES)
    if taken is None:
        taken = {name for g in graph_tree(graph) for name in _value_names(g)}
        graph.meta[_NAMES] = taken
    name, n = base, 0
    while name in taken:
        n += 1
        name = f"{base}_{n}"
    taken.add(name)
    return name


def _value_names(graph: ir.Graph) -> Iterator[str]:
    yield from graph.initializers
    for value in graph.inputs:
        if value.name is not None:
            yield value.name
    for node in graph:
        for value in node.outputs:
            if value.name is not None:
                yield value.name


def add_initializer(
    graph: ir.Graph, base_name: str, data: np.ndarray | ir.TensorProtocol
) -> ir.Value:
    """Register a new initializer under a fresh name and return its value, shape and dtype set."""
    name = fresh_name(graph, base_name)
    tensor = ir.Tensor(data) if isinstance(data, np.ndarray) else data
    tensor.name = name
    value = ir.Value(
        name=name,
        shape=ir.Shape(list(tensor.shape.numpy())),
        type=ir.TensorType(tensor.dtype),
        const_value=tensor,
    )
    graph.register_initializer(value)
    return value


# --- saying where ----------------------------------------------------------------------------

_STACK_LINE = re.compile(r'File "([^"]+)", line (\d+), in (\S+)')


def node_name(node: ir.Node) -> str:
    """What a node is called by plans and options: its name, or that of its first result."""
    return node.name or (node.outputs[0].name if node.outputs else None) or ""


def source_line(node: ir.Node) -> str:
    """The user's source line that made the node (`model.py:12 in forward`), or ''.

    torch's exporter keeps the Python stack trace in `metadata_props`; the last frame outside
    installed packages is the user's (the last of all, where there is none).
    """
    frames = _STACK_LINE.findall(node.metadata_props.get("pkg.torch.onnx.stack_trace", ""))
    if not frames:
        return ""
    own = [frame for frame in frames if "site-packages" not in frame[0]]
    path, line, function = (own or frames)[-1]
    return f"{os.path.basename(path)}:{line} in {function}"


def module_path(node: ir.Node) -> str:
    """The torch module scope (`encoder.layer.0.attention`) a node came from, or ''."""
    scopes = node.metadata_props.get("pkg.torch.onnx.name_scopes", "")
    try:
        names = ast.literal_eval(scopes) if scopes else []
    except (ValueError, SyntaxError):
        return ""
    return str(names[-2]) if len(names) > 1 else ""


def describe_value(value: ir.Value | None) -> str:
    """`name: FLOAT[1,3,224,N]`, unknown parts as `?`."""
    if value is None:
        return "(none)"
    dtype = value.dtype.name if value.dtype is not None else "?"
    if value.shape is None:
        return f"{value.name}: {dtype}[?]"
    dims = ",".join(str(d) if isinstance(d, int) else (d.value or "?") for d in value.shape.dims)
    return f"{value.name}: {dtype}[{dims}]"


def describe_node(node: ir.Node) -> str:
    """One line for messages: name, op, input types, and the user's source line if known."""
    domain = "" if node.domain in ONNX_DOMAINS else f"{node.domain}."
    name = node.name or (node.outputs[0].name if node.outputs else None) or "(unnamed)"
    inputs = ", ".join(describe_value(v) for v in node.inputs[:6])
    more = ", ..." if len(node.inputs) > 6 else ""
    text = f"node {name!r} ({domain}{node.op_type}) of ({inputs}{more})"
    line = source_line(node)
    return f"{text}, from {line}" if line else text

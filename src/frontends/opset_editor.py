"""What an opset adapter writes with: constants, nodes in front of another, types of values.

Here: the editor. Not here: the adapters and what changed in which opset (`opset_adapters`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import numpy as np
import onnx_ir as ir

from ..errors import UnsupportedOpError
from ..ir.graph import add_initializer, all_nodes, describe_node, fresh_name


class NodeEditor:
    """What an adapter writes with: constants, earlier nodes, and the types of values.

    `inferred` answers for values whose type or shape the model doesn't state.
    """

    def __init__(
        self, model: ir.Model, inferred: Callable[[str], ir.Value | None], version: int
    ) -> None:
        self._main_graph = model.graph
        self._inferred = inferred
        self._node_names = {node.name for node in all_nodes(model)}
        self.version = version

    def refuse(self, node: ir.Node, why: str) -> NoReturn:
        """Raise the error for a node that has no form in the newer opset."""
        raise UnsupportedOpError(
            f"{node.op_type} can't be converted to opset {self.version}",
            where=describe_node(node),
            why=why,
            fix="export the model again with opset 18 or newer",
        )

    def take(self, node: ir.Node, name: str, default: Any = None) -> Any:
        """Remove an attribute and return its plain value, or `default`."""
        found = node.attributes.pop(name, None)
        if found is None:
            return default
        if found.is_ref():
            self.refuse(node, f"attribute {name!r} is a parameter of the enclosing function")
        return found.value

    def dtype(self, value: ir.Value | None) -> ir.DataType | None:
        """The element type as stated by the model, else as inferred, else None."""
        if value is None:
            return None
        if value.dtype is None and (known := self._inferred(value.name or "")) is not None:
            return known.dtype
        return value.dtype

    def shape(self, value: ir.Value | None) -> ir.Shape | None:
        """The shape as stated by the model, else as inferred, else None."""
        if value is None:
            return None
        if value.shape is None and (known := self._inferred(value.name or "")) is not None:
            return known.shape
        return value.shape

    def node_name(self, base: str) -> str:
        """A node name like `base` not used yet: ONNX Runtime refuses a model with two alike."""
        name, n = base, 0
        while name in self._node_names:
            n += 1
            name = f"{base}_{n}"
        self._node_names.add(name)
        return name

    def constant(self, node: ir.Node, name: str, array: np.ndarray) -> ir.Value:
        """A constant that `node` can use: an initializer, or a `Constant` where the graph is
        not the main one (functions have no initializers)."""
        graph = graph_of(node)
        if graph is self._main_graph:
            return add_initializer(graph, name, array)
        return self.before(node, "Constant", [], {"value": ir.tensor(array)}, name=name)

    def like(self, node: ir.Node, name: str, number: float, model: ir.Value | None) -> ir.Value:
        """A scalar of the same element type as `model`, by `CastLike` if that isn't known."""
        dtype = self.dtype(model)
        if dtype is not None:
            with np.errstate(over="ignore"):  # 3.4e38 in float16 is infinity: no bound
                return self.constant(node, name, np.array(number).astype(dtype.numpy()))
        scalar = self.constant(node, name, np.array(number, np.float32))
        return self.before(node, "CastLike", [scalar, model])

    def ints(self, node: ir.Node, name: str, numbers: Sequence[int]) -> ir.Value:
        """An int64 vector."""
        return self.constant(node, name, np.array(list(numbers), np.int64))

    def before(
        self,
        node: ir.Node,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        attributes: dict[str, Any] | None = None,
        name: str = "",
    ) -> ir.Value:
        """Insert a standard node in front of `node` and return its one output."""
        graph = graph_of(node)
        base = name or f"{node.outputs[0].name}_{op_type}"
        new = ir.Node(
            "",
            op_type,
            inputs,
            ir.convenience.convert_attributes(attributes or {}),
            outputs=[ir.Value(name=fresh_name(graph, base))],
            name=self.node_name(f"{node.name or node.op_type}/{op_type}"),
            metadata_props=dict(node.metadata_props),
        )
        graph.insert_before(node, new)
        return new.outputs[0]

    def become(
        self,
        node: ir.Node,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        attributes: dict[str, Any] | None = None,
    ) -> None:
        """Turn `node` into another standard operator; outputs, name and metadata stay."""
        node.op_type = op_type
        node.attributes.clear()
        for attribute in ir.convenience.convert_attributes(attributes or {}):
            node.attributes.add(attribute)
        set_inputs(node, inputs)


def set_inputs(node: ir.Node, inputs: Sequence[ir.Value | None]) -> None:
    """Replace all inputs, trailing absent ones dropped."""
    inputs = list(inputs)
    while inputs and inputs[-1] is None:
        inputs.pop()
    node.resize_inputs(len(inputs))
    for index, value in enumerate(inputs):
        node.replace_input_with(index, value)


def graph_of(node: ir.Node) -> ir.Graph:
    """The graph a node is in; for a node of a function, the function's."""
    graph = node.graph
    assert graph is not None, f"{node.name} is in no graph"
    return graph.graph if isinstance(graph, ir.Function) else graph

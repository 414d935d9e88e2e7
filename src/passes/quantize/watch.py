"""Further outputs of a model that tell of values anywhere inside it, in branches and loops too.

Here: `Watch`, a copy of a model with an output for each value: a summary made inside the graph, or
all its elements. Not here: running it (`calibrate`).
"""

from __future__ import annotations

import enum
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from ...ir.graph import (
    add_initializer,
    fresh_name,
    graph_tree,
    index_names,
    is_onnx_op,
    node_subgraphs,
    opset_of,
    static_shape,
)

IN_A_FUNCTION = "it is inside a function, or not of this model"
VARYING = "how many elements it has differs between the rounds of a loop"


class Wanted(enum.Enum):
    """What a watched value's output holds.

    SUMMARY: [-least, greatest, 1 if any element is NaN or infinite, elements], float32. Where the
    value is made more than once (a loop) it is the maximum over all rounds; where it is not made at
    all (a branch not taken) it is [-inf, -inf, 0, 0]. ELEMENTS: a flat float32 array, empty where
    the value is not made.
    """

    SUMMARY = enum.auto()
    ELEMENTS = enum.auto()


_NOTHING = np.array([-math.inf, -math.inf, 0, 0], np.float32)


class Watch:
    """A copy of a model, `model`, and the names of the outputs it has for values, `outputs`.

    `unseen` says why a value has none. `only`: the copy gives these outputs alone, and has no node
    that they do not need.
    """

    def __init__(
        self, model: ir.Model, values: Sequence[ir.Value], wanted: Wanted, *, only: bool = False
    ) -> None:
        self.model = model.clone()
        index_names(self.model)
        self.outputs: dict[ir.Value, str] = {}
        self.unseen: dict[ir.Value, str] = {}
        self._wanted = wanted
        self._opset = opset_of(model)
        self._main = self.model.graph
        self._owners = {
            inner: node
            for graph in graph_tree(self._main)
            for node in graph
            for inner in node_subgraphs(node)
        }
        self._constants: dict[str, ir.Value] = {}
        twins = _twins(model.graph, self._main)
        if only:
            self._main.outputs.clear()
        # ONNX Runtime 1.32 runs depth first from the last node without readers: the first value
        # must come last, or every value is computed before the first is reduced and let go.
        # Measured on a text detector, 163 values: 352 MB so, 1,190 MB in graph order, 338 MB
        # without reductions.
        for value in reversed(values):
            twin = twins.get(value)
            reason = IN_A_FUNCTION if twin is None else self._add(value, twin)
            if reason:
                self.unseen[value] = reason
        if only:
            _remove_unused(self._main)

    def _add(self, value: ir.Value, twin: ir.Value) -> str:
        """Make the output; '' or why there can be none."""
        graph = twin.graph
        assert isinstance(graph, ir.Graph)
        if reason := self._obstacle(graph, twin):
            return reason
        base = f"{value.name}/observe"
        found = self._leaf(graph, twin, base)
        while graph is not self._main:
            node = self._owners[graph]
            found = self._out_of(node, graph, found, base)
            assert isinstance(node.graph, ir.Graph)
            graph = node.graph
        graph.outputs.append(found)
        self.outputs[value] = found.name or ""
        return ""

    def _obstacle(self, graph: ir.Graph, value: ir.Value) -> str:
        """Why a value can't be told of; ''."""
        varying = static_shape(value) is None
        while graph is not self._main:
            node = self._owners.get(graph)
            if node is None:
                return IN_A_FUNCTION
            if is_onnx_op(node, "If"):
                varying = True
            elif not is_onnx_op(node, "Loop", "Scan"):
                return f"it is inside a {node.op_type}"
            elif self._wanted is Wanted.ELEMENTS:
                if varying and node.op_type == "Loop":
                    return VARYING
                varying = True
            assert isinstance(node.graph, ir.Graph)
            graph = node.graph
        return ""

    # --- inside one graph ----------------------------------------------------------------------

    def _leaf(self, graph: ir.Graph, value: ir.Value, base: str) -> ir.Value:
        if value.dtype != ir.DataType.FLOAT:
            value = _node(graph, base, "Cast", value, to=ir.DataType.FLOAT.value)
        flat = _node(graph, base, "Reshape", value, self._constant("flat", [-1]))
        if self._wanted is Wanted.ELEMENTS:
            return _typed(flat, None)
        low, high = flat, flat
        if static_shape(value) is None:  # it may be empty, which has no least element
            most = self._constant("most", np.array([math.inf], np.float32))
            low = _node(graph, base, "Concat", flat, most, axis=0)
            high = _node(graph, base, "Concat", flat, self._minus_infinity(), axis=0)
        least = _node(graph, base, "ReduceMin", low, keepdims=1)
        greatest = _node(graph, base, "ReduceMax", high, keepdims=1)
        # least and greatest alone would miss a NaN: how a kernel compares it is not defined
        zeros = _node(graph, base, "Mul", flat, self._constant("zero", np.zeros((), np.float32)))
        poison = _node(graph, base, "IsNaN", _node(graph, base, "ReduceSum", zeros, keepdims=1))
        bad = _node(graph, base, "Cast", poison, to=ir.DataType.FLOAT.value)
        size = _node(graph, base, "Shape", flat)
        count = _node(graph, base, "Cast", size, to=ir.DataType.FLOAT.value)
        negated = _node(graph, base, "Neg", least)
        row = _node(graph, base, "Concat", negated, greatest, bad, count, axis=0)
        return _typed(row, 4)

    def _minus_infinity(self) -> ir.Value:
        return self._constant("least", np.array([-math.inf], np.float32))

    def _constant(self, name: str, data: Any) -> ir.Value:
        """An initializer of the main graph, which every subgraph sees."""
        if name not in self._constants:
            array = data if isinstance(data, np.ndarray) else np.array(data, np.int64)
            self._constants[name] = add_initializer(self._main, f"observe/{name}", array)
        return self._constants[name]

    # --- out of a subgraph ---------------------------------------------------------------------

    def _out_of(self, node: ir.Node, graph: ir.Graph, found: ir.Value, base: str) -> ir.Value:
        """What a node with subgraphs gives for a value that one of them gives."""
        if node.op_type == "If":
            return self._out_of_branch(node, graph, found, base)
        assert isinstance(node.graph, ir.Graph)
        outer = node.graph
        graph.outputs.append(found)
        rows = self._more(node, base)
        for name in ("scan_output_axes", "scan_output_directions"):
            given = node.attributes.get(name)
            if given is not None:
                node.attributes[name] = ir.AttrInt64s(name, [*given.as_ints(), 0])
        if self._wanted is Wanted.ELEMENTS:
            rows.type, rows.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape([None, None])
            return _typed(_node(outer, base, "Reshape", rows, self._constant("flat", [-1])), None)
        rows.type, rows.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape([None, 4])
        nothing = self._constant("nothing", _NOTHING[None])  # a loop of no rounds gives no row
        all_rows = _node(outer, base, "Concat", rows, nothing, axis=0)
        if self._opset >= 18:
            axes = self._constant("axes", [0])
            return _typed(_node(outer, base, "ReduceMax", all_rows, axes, keepdims=0), 4)
        return _typed(_node(outer, base, "ReduceMax", all_rows, axes=[0], keepdims=0), 4)

    def _out_of_branch(
        self, node: ir.Node, graph: ir.Graph, found: ir.Value, base: str
    ) -> ir.Value:
        neutral = _NOTHING if self._wanted is Wanted.SUMMARY else np.zeros(0, np.float32)
        for branch in node_subgraphs(node):
            if branch is graph:
                branch.outputs.append(found)
                continue
            constant = ir.Node(
                "", "Constant", [], [ir.AttrTensor("value", ir.Tensor(neutral))], num_outputs=1
            )
            constant.outputs[0].name = fresh_name(branch, base)
            branch.append(constant)
            branch.outputs.append(_typed(constant.outputs[0], neutral.size))
        return _typed(self._more(node, base), 4 if neutral.size else None)

    def _more(self, node: ir.Node, base: str) -> ir.Value:
        node.resize_outputs(len(node.outputs) + 1)
        output = node.outputs[-1]
        assert isinstance(node.graph, ir.Graph)
        output.name = fresh_name(node.graph, base)
        return output


def _twins(original: ir.Graph, copy: ir.Graph) -> dict[ir.Value, ir.Value]:
    """The values of a graph and its subgraphs, and those of a clone of it."""
    twins: dict[ir.Value, ir.Value] = {}
    for one, other in zip(graph_tree(original), graph_tree(copy), strict=True):
        twins.update(zip(one.inputs, other.inputs, strict=True))
        for node, twin in zip(one, other, strict=True):
            twins.update(zip(node.outputs, twin.outputs, strict=True))
    return twins


def _remove_unused(graph: ir.Graph) -> None:
    for node in reversed(list(graph)):
        if not any(v.uses() or v.is_graph_output() for v in node.outputs):
            graph.remove(node, safe=True)
    for name, value in list(graph.initializers.items()):
        if not (value.uses() or value.is_graph_input() or value.is_graph_output()):
            del graph.initializers[name]


def _node(
    graph: ir.Graph, base: str, op_type: str, *inputs: ir.Value, **attributes: Any
) -> ir.Value:
    node = ir.Node(
        "", op_type, inputs, ir.convenience.convert_attributes(attributes), num_outputs=1
    )
    node.outputs[0].name = fresh_name(graph, f"{base}/{op_type}")
    graph.append(node)
    return node.outputs[0]


def _typed(value: ir.Value, size: int | None) -> ir.Value:
    """The value, said to be float32 of one axis."""
    value.type, value.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape([size])
    return value


def same_names(values: Iterable[ir.Value]) -> dict[str, list[ir.Value]]:
    """Values by name. Branches beside each other may use the same names."""
    found: dict[str, list[ir.Value]] = {}
    for value in values:
        found.setdefault(value.name or "", []).append(value)
    return found

"""Changing the graph without losing what is known of it: replace, insert, erase, with listeners.

Here: `Editor`, through which rewrites change a graph. Names of graph outputs, metadata (source
lines, module paths), shapes and types survive a replacement, and listeners (a worklist, a counter)
hear of every change. Not here: what to change (`match`, passes).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import numpy as np
import onnx_ir as ir

from .graph import add_initializer, fresh_name, node_subgraphs


class Listener(Protocol):
    """Hears of changes made through an `Editor`."""

    def inserted(self, node: ir.Node) -> None:
        """A node is now in the graph."""

    def erased(self, node: ir.Node) -> None:
        """A node has left the graph; its inputs are already cut."""

    def changed(self, node: ir.Node) -> None:
        """A node has another input than before, or its result has another set of users."""


class Editor:
    """Edits the nodes of one model. Nodes of any of its graphs may be given."""

    def __init__(self, *listeners: Listener) -> None:
        self._listeners = listeners
        self.modified = False

    # --- replacing ---------------------------------------------------------------------------

    def can_replace(self, old: ir.Value, new: ir.Value) -> bool:
        """Whether every use of `old` may become `new`.

        False only where `old` is the output of a graph that is not its own (a subgraph that
        returns an outer value): there an interface would change silently.
        """
        return not old.is_graph_output() or _output_slots(old) != []

    def replace_value(self, old: ir.Value, new: ir.Value) -> None:
        """Make every use of `old` a use of `new`; `old` keeps its producer, now without uses.

        A graph output keeps its name: `new` takes it over, or, where `new` has a name that must
        stay (an input, an initializer, another output, or a value of another graph), an
        `Identity` carries it.
        """
        if old is new:
            return
        self.modified = True
        slots = _output_slots(old)
        producer = old.producer()
        graph = old.graph
        users = [user for user, _ in old.uses()]
        _inherit_value(old, new)
        for user, index in list(old.uses()):
            user.replace_input_with(index, new)
        if slots and graph is not None:
            self._take_over_output(graph, slots, old, new)
        for user in users:
            self._tell_changed(user)
        if producer is not None:
            self._tell_changed(producer)
        new_producer = new.producer()
        if new_producer is not None:
            self._tell_changed(new_producer)

    def _take_over_output(
        self, graph: ir.Graph, slots: Sequence[int], old: ir.Value, new: ir.Value
    ) -> None:
        name = old.name
        renamable = (
            new.producer() is not None
            and new.graph is graph
            and not new.is_graph_output()
            and not new.is_graph_input()
        )
        if not renamable:
            identity = ir.Node("", "Identity", [new], num_outputs=1, name=f"{name}/identity")
            carrier = identity.outputs[0]
            _inherit_value(old, carrier)
            anchor = old.producer()
            _inherit_node(anchor, identity)
            if anchor is not None and anchor.graph is graph:
                graph.insert_after(anchor, identity)
            else:
                graph.append(identity)
            self._tell_inserted(identity)
        else:
            carrier = new
        if carrier.shape is None or (old.shape is not None and not _is_static(carrier)):
            carrier.shape = old.shape
        for slot in slots:
            graph.outputs[slot] = carrier
        old.name = fresh_name(graph, f"{name}/replaced")
        carrier.name = name

    def replace_node(self, node: ir.Node, *values: ir.Value | None) -> None:
        """Replace a node's outputs by `values`, in order, and erase it.

        A None keeps no replacement: that output must have no use.
        """
        for old, new in zip(node.outputs, values, strict=True):
            if new is not None:
                self.replace_value(old, new)
        self.erase(node)

    def replace_input(self, node: ir.Node, index: int, value: ir.Value | None) -> None:
        """Give a node another input."""
        before = node.inputs[index]
        if before is value:
            return
        self.modified = True
        node.replace_input_with(index, value)
        self._tell_changed(node)
        if before is not None and (producer := before.producer()) is not None:
            self._tell_changed(producer)
        elif before is not None:
            _drop_if_unused(before)

    def set_attribute(self, node: ir.Node, name: str, value: Any) -> None:
        """Set an attribute to a plain Python value; None removes it."""
        self.modified = True
        if value is None:
            node.attributes.pop(name, None)
        else:
            node.attributes[name] = ir.convenience.convert_attribute(name, value)
        self._tell_changed(node)

    # --- inserting and erasing ---------------------------------------------------------------

    def insert_before(self, anchor: ir.Node, node: ir.Node) -> ir.Node:
        """Put `node` before `anchor`; it inherits the anchor's metadata where it has none."""
        graph = anchor.graph
        assert isinstance(graph, ir.Graph | ir.Function)
        _inherit_node(anchor, node)
        self._name_outputs(anchor, node)
        graph.insert_before(anchor, node)
        self._tell_inserted(node)
        return node

    def insert_after(self, anchor: ir.Node, node: ir.Node) -> ir.Node:
        """Put `node` after `anchor`; it inherits the anchor's metadata where it has none."""
        graph = anchor.graph
        assert isinstance(graph, ir.Graph | ir.Function)
        _inherit_node(anchor, node)
        self._name_outputs(anchor, node)
        graph.insert_after(anchor, node)
        self._tell_inserted(node)
        return node

    def erase(self, node: ir.Node) -> None:
        """Remove a node whose outputs have no use."""
        graph = node.graph
        if graph is None:
            return
        self.modified = True
        inputs = [v for v in node.inputs if v is not None]
        producers = [p for v in inputs if (p := v.producer()) is not None]
        graph.remove(node, safe=True)
        for value in inputs:
            _drop_if_unused(value)
        for listener in self._listeners:
            listener.erased(node)
        for producer in producers:
            self._tell_changed(producer)

    def initializer(
        self, anchor: ir.Node, base_name: str, data: np.ndarray | ir.TensorProtocol
    ) -> ir.Value:
        """A new initializer in the graph that holds `anchor`."""
        graph = anchor.graph
        if isinstance(graph, ir.Function):
            graph = graph.graph
        assert isinstance(graph, ir.Graph)
        self.modified = True
        return add_initializer(graph, base_name, data)

    # --- listeners ---------------------------------------------------------------------------

    def _name_outputs(self, anchor: ir.Node, node: ir.Node) -> None:
        graph = anchor.graph
        if isinstance(graph, ir.Function):
            graph = graph.graph
        if not isinstance(graph, ir.Graph):
            return
        if node.name is None:
            node.name = fresh_name(graph, f"{anchor.name or anchor.op_type}/{node.op_type}")
        for i, value in enumerate(node.outputs):
            if value.name is None:
                base = anchor.outputs[min(i, len(anchor.outputs) - 1)].name or node.op_type
                value.name = fresh_name(graph, f"{base}/{node.op_type}")

    def _tell_inserted(self, node: ir.Node) -> None:
        self.modified = True
        for listener in self._listeners:
            listener.inserted(node)

    def _tell_changed(self, node: ir.Node) -> None:
        for listener in self._listeners:
            listener.changed(node)


class Builder:
    """Makes nodes in place of one: `build.Add(x, y, axis=1)` inserts before the anchor.

    Inputs may be values, None (an omitted input) or numpy arrays (which become initializers).
    Returns the node's first output; `build.node(...)` returns the node. The domain of the last call
    can be set with `_domain`, the number of outputs with `_outputs`. `opset` is the model's version
    of the standard operators, 0 where not known.
    """

    def __init__(
        self, editor: Editor, anchor: ir.Node, opset: int = 0, *, after: bool = False
    ) -> None:
        self.opset = opset
        self._editor = editor
        self._anchor = anchor
        self._after = after

    def initializer(self, name: str, data: np.ndarray | ir.TensorProtocol) -> ir.Value:
        """A new initializer beside the anchor."""
        base = f"{self._anchor.outputs[0].name}/{name}"
        return self._editor.initializer(self._anchor, base, data)

    def where_made(self, value: ir.Value) -> Builder:
        """A builder of the same edit that inserts right after what makes `value`, in order; at the
        start of the anchor's graph where no node of that graph makes it."""
        producer, graph = value.producer(), self._anchor.graph
        if producer is not None and producer.graph is graph:
            return Builder(self._editor, producer, self.opset, after=True)
        assert graph is not None
        return Builder(self._editor, graph[0], self.opset)

    def replace(self, old: ir.Value, new: ir.Value) -> None:
        """Make every use of `old` one of `new`, and erase its producer if nothing else needs it.

        For a rewrite with more results than the root of its match has.
        """
        producer = old.producer()
        self._editor.replace_value(old, new)
        if producer is not None and not any(
            v.uses() or v.is_graph_output() for v in producer.outputs
        ):
            self._editor.erase(producer)

    def node(
        self,
        op_type: str,
        *inputs: ir.Value | np.ndarray | np.generic | None,
        _domain: str = "",
        _outputs: int = 1,
        **attributes: Any,
    ) -> ir.Node:
        values = [self._input(op_type, item) for item in inputs]
        node = ir.Node(
            _domain,
            op_type,
            values,
            ir.convenience.convert_attributes(
                {k: v for k, v in attributes.items() if v is not None}
            ),
            num_outputs=_outputs,
        )
        if not self._after:
            return self._editor.insert_before(self._anchor, node)
        self._anchor = self._editor.insert_after(self._anchor, node)
        return node

    def _input(
        self, op_type: str, item: ir.Value | np.ndarray | np.generic | None
    ) -> ir.Value | None:
        if isinstance(item, np.ndarray | np.generic):
            return self.initializer(f"{op_type}/c", np.asarray(item))
        if item is not None and not isinstance(item, ir.Value):
            raise TypeError(
                f"an input of {op_type} is a {type(item).__name__}; give a value, None, or a numpy "
                "array, which has a dtype"
            )
        return item

    def __getattr__(self, op_type: str) -> Any:
        if op_type.startswith("_"):
            raise AttributeError(op_type)

        def make(*inputs: ir.Value | np.ndarray | np.generic | None, **kwargs: Any) -> ir.Value:
            return self.node(op_type, *inputs, **kwargs).outputs[0]

        return make


def _output_slots(value: ir.Value) -> list[int]:
    graph = value.graph
    if graph is None or not value.is_graph_output():
        return []
    return [i for i, output in enumerate(graph.outputs) if output is value]


def _is_static(value: ir.Value) -> bool:
    return value.shape is not None and value.shape.is_static()


def _inherit_value(old: ir.Value, new: ir.Value) -> None:
    if new.type is None:
        new.type = old.type
    if new.shape is None:
        new.shape = old.shape
    elif old.shape is not None and len(old.shape) == len(new.shape) and new.producer() is not None:
        dims = [
            n if type(n) is int or (o := old.shape[i]) is None or _unknown(o) else o
            for i, n in enumerate(new.shape.dims)
        ]
        if tuple(dims) != new.shape.dims:
            new.shape = ir.Shape(dims)
    for key, item in old.metadata_props.items():
        new.metadata_props.setdefault(key, item)
    for key, item in old.meta.items():
        new.meta.setdefault(key, item)


def _unknown(dim: Any) -> bool:
    return isinstance(dim, ir.SymbolicDim) and dim.value is None


def _inherit_node(source: ir.Node | None, node: ir.Node) -> None:
    if source is None:
        return
    for key, item in source.metadata_props.items():
        node.metadata_props.setdefault(key, item)
    for key, item in source.meta.items():
        node.meta.setdefault(key, item)


def _drop_if_unused(value: ir.Value) -> None:
    """Unregister an initializer that nothing uses any more and that is no part of the interface."""
    graph = value.graph
    if (
        value.is_initializer()
        and graph is not None
        and not value.uses()
        and not value.is_graph_input()
        and not value.is_graph_output()
        and value.name is not None
        and value.name in graph.initializers
    ):
        del graph.initializers[value.name]


def inherit_metadata(sources: Iterable[ir.Node], nodes: Iterable[ir.Node]) -> None:
    """Give each of `nodes` the metadata (source line, module path) of the first source with it."""
    sources = list(sources)
    for node in nodes:
        for source in sources:
            _inherit_node(source, node)


def disconnect(graph: ir.Graph) -> None:
    """Cut a doomed subgraph's uses of outer values, so that their producers can go too."""
    for node in reversed(list(graph)):
        for subgraph in node_subgraphs(node):
            disconnect(subgraph)
        for i in range(len(node.inputs)):
            node.replace_input_with(i, None)


def insert_like(
    editor: Editor,
    anchor: ir.Node,
    op_type: str,
    inputs: Sequence[ir.Value | None],
    dtype: ir.DataType = ir.DataType.FLOAT,
    **attributes: int,
) -> ir.Value:
    """A node before `anchor` whose result has the shape of the anchor's; its result."""
    like, graph = anchor.outputs[0], anchor.graph
    assert isinstance(graph, ir.Graph)
    node = ir.Node(
        "", op_type, inputs, ir.convenience.convert_attributes(attributes), num_outputs=1
    )
    value = node.outputs[0]
    value.type = ir.TensorType(dtype)
    value.shape = None if like.shape is None else ir.Shape(list(like.shape.dims))
    value.name = node.name = fresh_name(graph, f"{like.name}/{op_type}")
    editor.insert_before(anchor, node)
    return value

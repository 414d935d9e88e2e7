"""Removal of what nothing uses: nodes, initializers, functions."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import onnx_ir as ir

from ...ir.edit import disconnect
from ...ir.graph import all_nodes, graphs, node_subgraphs
from ...ir.ops import is_pure
from ..base import Context, Pass, PassResult, Stage


@dataclasses.dataclass(frozen=True)
class DeadCode(Pass):
    """Removes nodes whose results nothing uses, unused initializers and unused functions.

    An initializer that is also a graph input stays: it is part of the interface.

        y = Relu(x); z = Exp(x); return y   ->   y = Relu(x); return y
    """

    stage: ClassVar[Stage] = Stage.CLEANUP
    idempotent: ClassVar[bool] = True
    fixpoint: ClassVar[bool] = True

    def run(self, model: ir.Model, context: Context) -> PassResult:
        nodes = _remove_nodes(model.graph, model)
        for function in model.functions.values():
            nodes += _remove_nodes(function.graph, model)
        weights = _remove_initializers(model)
        functions = _remove_functions(model)
        found = ((nodes, "nodes"), (weights, "initializers"), (functions, "functions"))
        notes = tuple(f"removed {count} {what}" for count, what in found if count)
        return PassResult(model, bool(notes), notes)


def _remove_nodes(graph: ir.Graph, model: ir.Model) -> int:
    removed = 0
    for node in reversed(graph):
        if any(v.uses() or v.is_graph_output() for v in node.outputs):
            for subgraph in node_subgraphs(node):
                removed += _remove_nodes(subgraph, model)
        elif node.outputs and is_pure(node, model.functions):
            for subgraph in node_subgraphs(node):
                disconnect(subgraph)
            graph.remove(node, safe=True)
            removed += 1
    return removed


def _remove_initializers(model: ir.Model) -> int:
    removed = 0
    for graph in graphs(model):
        for name in list(graph.initializers):
            value = graph.initializers[name]
            if not value.uses() and not value.is_graph_output() and not value.is_graph_input():
                del graph.initializers[name]
                removed += 1
    return removed


def _remove_functions(model: ir.Model) -> int:
    removed = 0
    while model.functions:
        called = {node.op_identifier() for node in all_nodes(model)}
        unused = [key for key in model.functions if key not in called]
        for key in unused:
            del model.functions[key]
            removed += 1
        if not unused:
            break
    return removed

"""Branches of which one is always taken: its nodes in place of the `If`."""

from __future__ import annotations

import collections
import dataclasses
from typing import ClassVar

import onnx_ir as ir

from ...ir.edit import Editor, disconnect
from ...ir.graph import all_nodes, attribute, fresh_name, graphs, is_onnx_op, node_subgraphs
from ...ir.shapes import ShapeReport, infer_shapes
from ..base import Context, Pass, PassResult, Stage


@dataclasses.dataclass(frozen=True)
class FoldBranches(Pass):
    """Puts the taken branch in place of an `If` whose condition is known.

    Exporters write such an If where a shape decides (a Squeeze of a dimension that may not be 1).
    It goes before other shapes are folded: with those known, the branch that is never taken can
    contradict itself, for which ONNX Runtime refuses the model.

        If(Equal(Size(Shape(x)), 3), then: Relu(x), else: Squeeze(x))   ->   Relu(x)   for rank 3
    """

    stage: ClassVar[Stage] = Stage.CLEANUP
    idempotent: ClassVar[bool] = True
    fixpoint: ClassVar[bool] = True

    def run(self, model: ir.Model, context: Context) -> PassResult:
        if not any(is_onnx_op(node, "If") for node in all_nodes(model)):
            return PassResult(model, False)
        inliner = _Inliner(infer_shapes(model), _name_counts(model))
        inliner.visit(model.graph)
        notes = (f"inlined the only branch taken of {inliner.count} If",) if inliner.count else ()
        return PassResult(model, bool(inliner.count), notes)


class _Inliner:
    """Walks a graph and those under it, outermost first."""

    def __init__(self, report: ShapeReport, names: collections.Counter[str]) -> None:
        self._report = report
        self._names = names
        self._editor = Editor()
        self.count = 0

    def visit(self, graph: ir.Graph) -> None:
        waiting = collections.deque(graph)
        while waiting:
            node = waiting.popleft()
            taken = self._taken(node)
            if taken is not None:
                waiting.extendleft(reversed(self._inline(graph, node, taken)))
                self.count += 1
                continue
            for subgraph in node_subgraphs(node):
                self.visit(subgraph)

    def _taken(self, node: ir.Node) -> ir.Graph | None:
        """The branch that always runs, if it is known which."""
        if not is_onnx_op(node, "If") or not node.inputs or node.inputs[0] is None:
            return None
        condition = self._report.condition(node.inputs[0])
        if condition is None:
            return None
        branch: ir.Graph | None = attribute(node, "then_branch" if condition else "else_branch")
        return branch

    def _inline(self, graph: ir.Graph, node: ir.Node, branch: ir.Graph) -> list[ir.Node]:
        """Move the branch's nodes and initializers before the If, and erase it; the moved nodes."""
        results = list(branch.outputs)
        branch.outputs.clear()
        for name, value in list(branch.initializers.items()):
            del branch.initializers[name]
            self._rename(graph, value)
            graph.register_initializer(value)
        moved = list(branch)
        branch.remove(moved)
        graph.insert_before(node, moved)
        for inner in moved:
            for value in inner.outputs:
                self._rename(graph, value)
        for old, new in zip(node.outputs, results, strict=True):
            self._editor.replace_value(old, new)
        for subgraph in node_subgraphs(node):
            disconnect(subgraph)
        self._editor.erase(node)
        return moved

    def _rename(self, graph: ir.Graph, value: ir.Value) -> None:
        """Sibling branches may share names with each other; values of one graph may not."""
        if value.name and self._names[value.name] > 1:
            self._names[value.name] -= 1
            value.name = fresh_name(graph, value.name)


def _name_counts(model: ir.Model) -> collections.Counter[str]:
    """How many values of the model have each name."""
    counts: collections.Counter[str] = collections.Counter()
    for graph in graphs(model):
        counts.update(value.name or "" for value in graph.initializers.values())
        counts.update(v.name or "" for v in graph.inputs if not v.is_initializer())
        counts.update(value.name or "" for node in graph for value in node.outputs)
    return counts

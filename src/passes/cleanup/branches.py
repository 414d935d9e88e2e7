"""Branches of which one is always taken: its nodes in place of the `If`."""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import ClassVar

import onnx_ir as ir

from ...errors import ShapeError
from ...ir.edit import Editor, disconnect
from ...ir.graph import all_nodes, attribute, fresh_name, graphs, is_onnx_op, node_subgraphs
from ...ir.shapes import ShapeReport, infer_shapes
from ..base import Context, Pass, PassResult, Stage

_MAX_TRIES = 8
_TRIED = "edgepass.branches_tried"


@dataclasses.dataclass(frozen=True)
class FoldBranches(Pass):
    """Puts the taken branch in place of an `If` whose condition is known.

    Exporters write such an If where a shape decides (a Squeeze of a dimension that may not be 1).
    It goes before other shapes are folded: with those known, the branch that is never taken can
    contradict itself, for which ONNX Runtime refuses the model.

    Where the condition is not known, but the branches give results of different ranks and one of
    them contradicts what follows (an LSTM that needs rank 3), a run can only succeed with the
    other: it is taken too. This is tried for few of them, as each try infers the model's shapes.

        If(Equal(Size(Shape(x)), 3), then: Relu(x), else: Squeeze(x))   ->   Relu(x)   for rank 3
    """

    stage: ClassVar[Stage] = Stage.CLEANUP
    idempotent: ClassVar[bool] = True
    fixpoint: ClassVar[bool] = True

    def run(self, model: ir.Model, context: Context) -> PassResult:
        if not any(is_onnx_op(node, "If") for node in all_nodes(model)):
            return PassResult(model, False)
        report = infer_shapes(model)
        inliner = _Inliner(report, _name_counts(model))
        inliner.visit(model.graph)
        count, forced = inliner.count, 0
        tried: set[str] = model.meta.setdefault(_TRIED, set())  # in this and in earlier rounds
        while True:
            found = _only_possible(model, tried)
            if found is None:
                break
            node, branch = found
            inliner = _Inliner(report, _name_counts(model), {id(node): branch})
            inliner.visit(model.graph)
            count, forced = count + inliner.count, forced + 1
            report = infer_shapes(model, refresh=True)
            tried.clear()  # what was undecided may follow from it
        found_texts = (
            (count, "inlined the only branch taken of {} If"),
            (forced, "{} of them had one branch that can only fail"),
        )
        notes = tuple(text.format(number) for number, text in found_texts if number)
        return PassResult(model, bool(count), notes)


_Path = tuple[tuple[int, str], ...]
"""Where an If is: the index of each If around it in its graph, and the attribute that holds the
branch; then its own index, and ''."""


def _only_possible(model: ir.Model, tried: set[str]) -> tuple[ir.Node, bool] | None:
    """The first If of which one branch contradicts what follows, and whether the other is `then`.

    Of an If inside branches, what follows is what does if they are taken.
    """
    for path, node in _undecided(model.graph):
        name = node.outputs[0].name or ""
        if name in tried:
            continue
        if len(tried) >= _MAX_TRIES:
            break
        tried.add(name)
        possible = [_succeeds(model, path, taken=taken) for taken in (True, False)]
        if possible[0] != possible[1]:
            return node, possible[0]
    return None


def _undecided(graph: ir.Graph, path: _Path = ()) -> Iterator[tuple[_Path, ir.Node]]:
    for index, node in enumerate(graph):
        if not is_onnx_op(node, "If"):
            continue
        if _ranks_differ(node):
            yield (*path, (index, "")), node
        for name in ("then_branch", "else_branch"):
            branch = attribute(node, name)
            if branch is not None:
                yield from _undecided(branch, (*path, (index, name)))


def _ranks_differ(node: ir.Node) -> bool:
    branches = [attribute(node, name) for name in ("then_branch", "else_branch")]
    if any(branch is None for branch in branches):
        return False
    return any(
        a.shape is not None and b.shape is not None and len(a.shape) != len(b.shape)
        for a, b in zip(branches[0].outputs, branches[1].outputs, strict=True)
    )


def _succeeds(model: ir.Model, path: _Path, *, taken: bool) -> bool:
    """Whether the model's shapes agree with each other if an If takes a branch.

    Only what surely runs can contradict: inference is lenient in branches of which it is not known
    whether they are taken. So the branches around the If are taken too, in a copy.
    """
    copy = model.clone()
    decided: dict[int, bool] = {}
    graph = copy.graph
    for index, name in path:
        node = next(itertools.islice(graph, index, None))
        decided[id(node)] = name == "then_branch" if name else taken
        graph = attribute(node, name) if name else graph
    _Inliner(None, _name_counts(copy), decided).visit(copy.graph)
    try:
        infer_shapes(copy, refresh=True)
    except ShapeError:
        return False
    return True


class _Inliner:
    """Walks a graph and those under it, outermost first."""

    def __init__(
        self,
        report: ShapeReport | None,
        names: collections.Counter[str],
        decided: Mapping[int, bool] = MappingProxyType({}),
    ) -> None:
        self._decided = decided
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
        condition = self._decided.get(id(node))
        if condition is None and self._report is not None:
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

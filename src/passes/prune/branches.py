"""Models as samples run through them: each If replaced by the branch that is taken.

Here: `paths`, which branches samples take, and `flattened`, the model along one path, in which the
nodes of these branches are nodes of the main graph, so that what works on that works on them. Not
here: folding Ifs whose condition is known for good (`cleanup.branches`).
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from ...ir.edit import disconnect
from ...ir.graph import (
    attribute,
    constant_array,
    graph_tree,
    index_names,
    is_onnx_op,
    node_name,
    node_subgraphs,
)
from ..base import Feed
from ..quantize.capture import iterate
from ..quantize.layers import LinearLayer
from .groups import Group
from .layer_bias import with_bias
from .views import linear_view

_MOST_PATHS = 8


@dataclasses.dataclass(frozen=True)
class Path:
    """Samples that take the same branch of each If; `taken` has the condition by first result."""

    samples: Sequence[Feed]
    taken: Mapping[str, bool]


@dataclasses.dataclass(frozen=True)
class Flat:
    """A model along one path, and its nodes by those of the model that it was made of.

    Names of values are those of the model, made unique. Nodes inside a Loop or Scan, or of a
    branch that is not taken, have no twin.
    """

    model: ir.Model
    twins: Mapping[ir.Node, ir.Node]

    def node_of(self, own: ir.Node) -> ir.Node | None:
        """The twin of a linear layer's node, None where there is none that has the same bias."""
        twin = self.twins.get(own)
        if twin is None or twin is own:
            return twin
        one, other = linear_view(own), linear_view(twin)
        if one is None or other is None:
            return twin if one is other else None
        return twin if self._bias_alike(one, other) else None

    def _bias_alike(self, one: LinearLayer, other: LinearLayer) -> bool:
        maker = with_bias(one).producer()
        return maker is not None and self.twins.get(maker) is with_bias(other).producer()


def has_branches(model: ir.Model) -> bool:
    """Whether the main graph has an If."""
    return any(is_onnx_op(node, "If") for node in model.graph)


def paths(model: ir.Model, samples: Sequence[Feed]) -> list[Path]:
    """The paths that the samples take, most samples first (eight paths at most).

    Raises:
        CalibrationError: a sample does not fit the inputs, or the model fails on it.
    """
    waiting = [Path(samples, {})]
    done: list[Path] = []
    while waiting:
        path = waiting.pop()
        graph = flattened(model, path.taken).model
        ifs = [node for node in graph.graph if is_onnx_op(node, "If")]
        if ifs:
            waiting += _parted(graph, ifs, path)
        else:
            done.append(path)
    done.sort(key=lambda path: -len(path.samples))
    return done[:_MOST_PATHS]


def _parted(model: ir.Model, ifs: Sequence[ir.Node], path: Path) -> list[Path]:
    conditions = [node.inputs[0] for node in ifs]
    known = [constant_array(value) for value in conditions]
    asked = [v for v, array in zip(conditions, known, strict=True) if array is None and v]
    parts: dict[tuple[bool, ...], list[Feed]] = collections.defaultdict(list)
    found = iterate(model, asked, path.samples) if asked else ({} for _ in path.samples)
    for sample, arrays in zip(path.samples, found, strict=True):
        given = [
            arrays[value.name or ""] if array is None and value is not None else array
            for value, array in zip(conditions, known, strict=True)
        ]
        parts[tuple(bool(np.all(array)) for array in given)].append(sample)
    names = [node.outputs[0].name or "" for node in ifs]
    return [
        Path(part, {**path.taken, **dict(zip(names, taken, strict=True))})
        for taken, part in parts.items()
    ]


def flattened(model: ir.Model, taken: Mapping[str, bool]) -> Flat:
    """The model with the branches taken in place of their Ifs.

    A model without Ifs is itself; any other is copied, weights shared.
    """
    if not has_branches(model):
        return Flat(model, {node: node for node in model.graph})
    copy = model.clone()
    pairs = [
        pair
        for one, other in zip(graph_tree(model.graph), graph_tree(copy.graph), strict=True)
        for pair in zip(one, other, strict=True)
    ]
    _unique_names(copy)
    while True:
        ifs = [node for node in copy.graph if is_onnx_op(node, "If")]
        known = [node for node in ifs if node.outputs[0].name in taken]
        if not known:
            break
        for node in known:
            _inline(copy.graph, node, taken[node.outputs[0].name or ""])
    index_names(copy)
    return Flat(copy, {own: twin for own, twin in pairs if twin.graph is copy.graph})


def _unique_names(model: ir.Model) -> None:
    """Branches beside each other may share names; the second value of one is renamed.

    Names depend on the order of graphs alone, so they agree between a model and a pruned copy.
    """
    seen: set[str] = set()
    for number, graph in enumerate(graph_tree(model.graph)):
        values = [*graph.initializers.values(), *graph.inputs]
        for value in dict.fromkeys([*values, *(v for node in graph for v in node.outputs)]):
            if value.name and value.name in seen:
                value.name = f"{value.name}@{number}"
            seen.add(value.name or "")


def _inline(graph: ir.Graph, node: ir.Node, taken: bool) -> None:
    """Move a branch's nodes before its If; the If's results are then copies of the branch's."""
    branch: ir.Graph = attribute(node, "then_branch" if taken else "else_branch")
    results = list(branch.outputs)
    branch.outputs.clear()
    for name, value in list(branch.initializers.items()):
        del branch.initializers[name]
        graph.register_initializer(value)
    moved = list(branch)
    branch.remove(moved)
    graph.insert_before(node, moved)
    for old, result in zip(node.outputs, results, strict=True):
        name = old.name or ""
        old.name = f"{name}@if"
        copy = ir.Node("", "Identity", [result], name=f"{node_name(node)}/{name}")
        new = copy.outputs[0]
        new.name, new.type, new.shape = name, old.type, old.shape
        graph.insert_before(node, copy)
        for user, index in list(old.uses()):
            user.replace_input_with(index, new)
        for i, output in enumerate(graph.outputs):
            if output is old:
                graph.outputs[i] = new
    for subgraph in node_subgraphs(node):
        disconnect(subgraph)
    graph.remove(node, safe=True)


def unreached(
    model: ir.Model, groups: Iterable[Group], samples: Sequence[Feed]
) -> dict[Group, str]:
    """The groups of which samples say nothing, and why: some of their nodes are in branches that no
    sample takes, or in loops.
    """
    around = {
        inner: node
        for graph in graph_tree(model.graph)
        for node in graph
        for inner in node_subgraphs(node)
    }
    if not around:
        return {}
    seen = {n for path in paths(model, samples) for n in flattened(model, path.taken).twins}
    found: dict[Group, str] = {}
    for group in groups:
        node = next((s.node for s in group.sites if s.node not in seen), None)
        if node is not None:
            found[group] = _why_unseen(node, around)
    return found


def _why_unseen(node: ir.Node, around: Mapping[ir.Graph, ir.Node]) -> str:
    graph = node.graph
    while isinstance(graph, ir.Graph) and graph in around:
        outer = around[graph]
        if not is_onnx_op(outer, "If"):
            return f"it is inside the {outer.op_type} {node_name(outer)!r}, not followed on samples"
        graph = outer.graph
    return "no calibration sample takes the branch that it is in"

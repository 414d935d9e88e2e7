"""Questions about the graph as a graph: order, liveness, critical path, cycles, partition.

Here, and only here, networkx is used: for cycles, longest paths and drawing. Liveness and partition
are linear passes of our own (reachability by merging is quadratic in networkx).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import networkx as nx
import onnx_ir as ir

from .graph import node_subgraphs


def to_networkx(graph: ir.Graph) -> Any:
    """A `networkx.DiGraph` of node positions (0-based), an edge from producer to user.

    A value used inside a subgraph counts as used by the node that carries the subgraph.
    """
    nodes = list(graph)
    position = {id(node): i for i, node in enumerate(nodes)}
    result: Any = nx.DiGraph()
    result.add_nodes_from((i, {"op": n.op_type, "name": n.name}) for i, n in enumerate(nodes))
    for i, node in enumerate(nodes):
        for value in used_values(node):
            producer = value.producer()
            if producer is not None and (source := position.get(id(producer))) is not None:
                result.add_edge(source, i)
    return result


def used_values(node: ir.Node) -> Iterable[ir.Value]:
    """A node's inputs, and what its subgraphs take from outside."""
    yield from (v for v in node.inputs if v is not None)
    for subgraph in node_subgraphs(node):
        inner = {id(v) for n in subgraph for v in n.outputs}
        inner |= {id(v) for v in subgraph.inputs}
        inner |= {id(v) for v in subgraph.initializers.values()}
        for n in subgraph:
            yield from (v for v in used_values(n) if id(v) not in inner)
        yield from (v for v in subgraph.outputs if id(v) not in inner)


def find_cycle(graph: ir.Graph) -> list[ir.Node]:
    """The nodes of one cycle, or an empty list."""
    nodes = list(graph)
    try:
        edges = nx.find_cycle(to_networkx(graph))
    except nx.NetworkXNoCycle:
        return []
    return [nodes[edge[0]] for edge in edges]


def critical_path(graph: ir.Graph, weight: Callable[[ir.Node], float]) -> list[ir.Node]:
    """The chain of nodes with the largest summed weight, first to last.

    Raises:
        networkx.NetworkXUnfeasible: the graph has a cycle.
    """
    nodes = list(graph)
    drawn = to_networkx(graph)
    for _, target, data in drawn.edges(data=True):
        data["weight"] = weight(nodes[target])
    source = len(nodes)
    drawn.add_node(source)
    for i in range(len(nodes)):
        drawn.add_edge(source, i, weight=weight(nodes[i]))
    return [nodes[i] for i in nx.dag_longest_path(drawn, weight="weight") if i != source]


def last_uses(graph: ir.Graph) -> Mapping[ir.Value, int]:
    """For each value, the position of the last node that uses it; outputs live to the end."""
    last: dict[ir.Value, int] = {}
    end = 0
    for i, node in enumerate(graph):
        for value in used_values(node):
            last[value] = i
        for value in node.outputs:
            last.setdefault(value, i)
        end = i
    for value in graph.outputs:
        last[value] = end
    return last


def live_bytes(graph: ir.Graph, bytes_of: Callable[[ir.Value], int]) -> list[int]:
    """Bytes of activations alive while each node runs, in graph order.

    Alive are graph inputs, and every node output from its producer to its last use. Initializers
    are not counted. `bytes_of` gives a value's size and may return 0 for what takes no memory.
    """
    last = last_uses(graph)
    freed: dict[int, int] = {}
    alive = 0
    for value in graph.inputs:
        if value.is_initializer():
            continue
        size = bytes_of(value)
        alive += size
        if value in last:
            freed[last[value]] = freed.get(last[value], 0) + size
    result = []
    for i, node in enumerate(graph):
        for value in node.outputs:
            size = bytes_of(value)
            alive += size
            freed[last[value]] = freed.get(last[value], 0) + size
        result.append(alive)
        alive -= freed.get(i, 0)
    return result


def partition(graph: ir.Graph, supported: Callable[[ir.Node], bool]) -> list[list[ir.Node]]:
    """Maximal runs of supported nodes that can be cut out without making a cycle.

    Each node gets a level: the number of changes between supported and unsupported on the way
    from the inputs, at most. Connected supported nodes of one level form a part (union-find), so
    no path leaves a part and comes back to it. Linear in edges.
    """
    nodes = list(graph)
    position = {id(node): i for i, node in enumerate(nodes)}
    good = [supported(node) for node in nodes]
    level = [0] * len(nodes)
    parent = list(range(len(nodes)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    sources: list[list[int]] = []
    for i, node in enumerate(nodes):
        found = [
            position[id(p)]
            for v in used_values(node)
            if (p := v.producer()) is not None and id(p) in position
        ]
        sources.append(found)
        for s in found:
            level[i] = max(level[i], level[s] + (good[s] != good[i]))
    for i, found in enumerate(sources):
        for s in found:
            if good[i] and good[s] and level[i] == level[s]:
                parent[root(i)] = root(s)
    parts: dict[int, list[ir.Node]] = {}
    for i, node in enumerate(nodes):
        if good[i]:
            parts.setdefault(root(i), []).append(node)
    return list(parts.values())

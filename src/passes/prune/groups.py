"""Dependency groups: which slices of which weights can only be removed together.

Here: `Group` and its parts, and `find_groups`, which reads them off a graph. Fang et al. 2023,
"DepGraph: Towards Any Structural Pruning", arXiv:2301.12900, is the idea; here positions of
tensors carry labels that the operators unite (`labels`, `rules`), so that channels are followed
through any layout. Not here: what is unimportant (`importance`), removing it (`remove`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from ...ir.graph import (
    AbsentTensor,
    add_initializer,
    graphs,
    is_absent,
    node_name,
    node_subgraphs,
    static_shape,
)
from ...ir.shapes import infer_shapes
from . import (
    rules,
    rules_attention,
    rules_movement,
    rules_norms,
    rules_recurrent,
    rules_selection,
)
from .flow import RULES, Flow, View, is_parameter
from .labels import Labels, Track
from .resolve import Resolved, mixed, resolve

RULE_MODULES = (
    rules, rules_attention, rules_movement, rules_norms, rules_recurrent, rules_selection,
)  # fmt: skip
"""They register their rules."""


@dataclasses.dataclass(frozen=True, eq=False)
class Site:
    """A parameter that a group's units run through.

    `weight` is the initializer, `node` the operator that reads it. `role` is "out" where the units
    are what the node computes, "in" where they are what it sums over, "norm" for scale, shift and
    statistics of a normalization, "bias", "table" for embeddings, "state" for the recurrent
    weights of an LSTM or GRU, and "other" for operands of elementwise operators.

    `units` says for each position along that axis of the weight (for "in": of the node's input
    channels; for "out": of its output channels, in the order in which they leave it) which unit
    of the group it belongs to, -1 where it is of another group.
    """

    node: ir.Node
    weight: ir.Value
    role: str
    units: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Group:
    """Units of one kind: each is a channel, a head, a dimension of a head or a hidden unit.

    `name` is that of the first node that computes them. `size` counts units. `rows` gives each
    unit's row: as many units must stay in one row as in every other row of the groups of the same
    `cluster` (groups of a convolution, heads of an attention); one row where units are free.
    `multiple` is how many channels one unit is (2 for rotary pairs).
    `parameters` is how many weights one unit holds, consumers' included. `blocked` says why it
    can't be pruned, or is empty; `wish` names the option that would allow it, if one would.
    """

    name: str
    kind: str
    size: int
    rows: np.ndarray
    cluster: int
    sites: tuple[Site, ...]
    multiple: int = 1
    parameters: int = 0
    blocked: str = ""
    wish: str = ""

    @property
    def producers(self) -> tuple[Site, ...]:
        """Where the units are computed."""
        return tuple(site for site in self.sites if site.role in ("out", "table", "state"))

    @property
    def consumers(self) -> tuple[Site, ...]:
        """Where they are summed over: the layers whose weights can make up for a loss."""
        return tuple(site for site in self.sites if site.role == "in")


class Groups(Sequence[Group]):
    """The groups of one model, blocked ones included, in graph order.

    `flow` and `resolved` are what `remove` needs. `reach` is the share of the parameters that a
    group which is not blocked holds.
    """

    def __init__(self, flow: Flow, resolved: Resolved) -> None:
        self.flow = flow
        self.resolved = resolved
        self._units: list[np.ndarray] = []
        self._groups = _read(flow, resolved, self._units)
        self.reach = _reach(flow, resolved)

    def __len__(self) -> int:
        return len(self._groups)

    def __getitem__(self, index: Any) -> Any:
        return self._groups[index]

    def __iter__(self) -> Iterator[Group]:
        return iter(self._groups)

    @property
    def free(self) -> list[Group]:
        """Those that can be pruned."""
        return [g for g in self._groups if not g.blocked]

    def labels_of(self, chosen: Mapping[Group, Sequence[int]]) -> np.ndarray:
        """A mask over all labels: which go when these units of these groups go."""
        gone = np.zeros(len(self.resolved.root), bool)
        for i, group in enumerate(self._groups):
            if group in chosen:
                gone[self._units[i][np.asarray(chosen[group], np.int64)]] = True
        mask: np.ndarray = gone[self.resolved.root]
        return mask


def find_groups(model: ir.Model, *, heads: str = "auto", widths: bool = False) -> Groups:
    """The dependency groups of a model.

    The model is not changed apart from inferred shapes, and vectors of parameters that several
    nodes share: each node gets its own.

    `heads` says what the units of an attention are: "whole" heads, "dimensions" inside them (as
    many of each head), or "auto": dimensions where they may go, and heads where not. `widths` lets
    go of channels that LayerNormalization takes statistics over.

    Raises:
        ShapeError: the model's shapes contradict each other.
    """
    _unshare_vectors(model)
    labels = Labels()
    flow = Flow(labels, infer_shapes(model, mend=True), widths=widths)
    _walk(flow, model.graph)
    for output in model.graph.outputs:
        flow.block(output, f"it is the output {output.name!r} of the model")
    _forget_unused(flow)
    joint = [t.ids for tracks in flow.tracks.values() for t in tracks if t.ids.ndim > 1]
    joint += [t.ids for v in flow.views.values() for t in v.tracks if t.ids.ndim > 1]
    held = np.zeros(labels.count)
    for _, shape, tracks in parameter_tracks(flow):
        for track in tracks:
            held[track.ids] += math.prod(shape) // track.ids.size
    return Groups(flow, resolve(labels, joint, heads, held))


def _unshare_vectors(model: ir.Model) -> None:
    """Biases and scales that several nodes share make no group of these: they are alike by chance
    (all zeros, say), and became one to save space.
    """
    for graph in graphs(model):
        for value in list(graph.initializers.values()):
            shape, tensor = static_shape(value), value.const_value
            if shape is None or len(shape) != 1 or shape[0] < 2 or tensor is None:
                continue
            nodes: dict[ir.Node, list[int]] = {}
            for node, index in value.uses():
                nodes.setdefault(node, []).append(index)
            if value.is_graph_input() or value.is_graph_output() or not is_parameter(value):
                continue
            for node, indices in list(nodes.items())[1:]:
                own = add_initializer(graph, f"{value.name}/own", _copy(tensor))
                for index in indices:
                    node.replace_input_with(index, own)


def _copy(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    if is_absent(tensor):
        return AbsentTensor(tensor.name or "", tensor.dtype, ir.Shape(list(tensor.shape.numpy())))
    return ir.Tensor(tensor.numpy(), dtype=tensor.dtype)


def _forget_unused(flow: Flow) -> None:
    """Drop labels along axes of parameters that no rule asked for (taps of a kernel)."""
    met = np.zeros(flow.labels.count, bool)
    for pair in [*flow.labels.pairs, *flow.labels.columns]:
        for ids in pair:
            met[ids] = True
    for value, tracks in flow.tracks.items():
        if not value.is_initializer():
            for track in tracks:
                met[track.ids] = True
    for value, tracks in flow.tracks.items():
        if value.is_initializer():
            flow.tracks[value] = tuple(t for t in tracks if met[t.ids].any())


def _walk(flow: Flow, graph: ir.Graph) -> None:
    for node in graph:
        subgraphs = list(node_subgraphs(node))
        if subgraphs:
            _control(flow, node, subgraphs)
            continue
        domain = "" if node.domain == "ai.onnx" else node.domain
        RULES.get((domain, node.op_type), rules.default)(flow, node)


def _control(flow: Flow, node: ir.Node, subgraphs: Sequence[ir.Graph]) -> None:
    """Branches of an If are followed; what enters or leaves a loop keeps its size."""
    for graph in subgraphs:
        if node.op_type != "If":
            for captured in _captured(graph):
                flow.block(captured, f"it is used inside the {node.op_type} {node_name(node)!r}")
        _walk(flow, graph)
    for value in node.inputs:
        flow.block(value, f"it enters the {node.op_type} {node_name(node)!r}")
    for i, output in enumerate(node.outputs):
        branches = [g.outputs[i] for g in subgraphs if i < len(g.outputs)]
        rank = len(output.shape) if output.shape is not None else -1
        even = node.op_type == "If" and all(
            b.shape is not None and len(b.shape) == rank for b in branches
        )
        if even:
            flow.put(output, flow.merge([flow.operand(b, rank) for b in branches], node))
            continue
        for branch in branches:
            flow.block(branch, f"it leaves the {node.op_type} {node_name(node)!r}")
        flow.put(output, ())


def _captured(graph: ir.Graph) -> Iterator[ir.Value]:
    """Values of outer graphs that a subgraph's nodes read."""
    inner = {v for node in graph.all_nodes() for v in node.outputs}
    inner |= set(graph.inputs)
    for node in graph.all_nodes():
        yield from (v for v in node.inputs if v is not None and v not in inner)


# --- reading groups off ------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Slot:
    """One track of one parameter: the roots along it, and how many elements a position has."""

    weight: ir.Value
    roots: np.ndarray
    elements: int


def parameter_tracks(flow: Flow) -> Iterator[tuple[ir.Value, tuple[int, ...], tuple[Track, ...]]]:
    """Each parameter with tracks, the shape they are on, and them."""
    for value, tracks in flow.tracks.items():
        view: View | None = flow.views.get(value)
        shape = static_shape(value)
        if view is not None:
            yield value, view.shape, view.tracks
        elif value.is_initializer() and tracks and shape is not None:
            yield value, shape, tracks


def _slots(flow: Flow, resolved: Resolved) -> Iterator[_Slot]:
    for value, shape, tracks in parameter_tracks(flow):
        for track in tracks:
            yield _Slot(value, resolved.root[track.ids], math.prod(shape) // track.ids.size)


def _read(flow: Flow, resolved: Resolved, units: list[np.ndarray]) -> list[Group]:
    count = len(resolved.root)
    key = np.zeros(count, np.uint64)
    weight = np.zeros(count, np.int64)
    for place, slot in enumerate(_slots(flow, resolved)):
        roots, times = np.unique(slot.roots, return_counts=True)
        np.add.at(key, roots, mixed(times.astype(np.uint64) + np.uint64((place + 1) << 32)))
        weight[roots] += times * slot.elements
    found = np.flatnonzero(key)
    state = np.stack([key[found], resolved.blocked[found].astype(np.uint64)])
    state = np.vstack([state, (resolved.cluster[found] + 1).astype(np.uint64)])
    number = np.unique(state, axis=1, return_inverse=True)[1].reshape(-1)
    order = np.argsort(number, kind="stable")
    members = (
        np.split(found[order], np.flatnonzero(np.diff(number[order])) + 1) if found.size else []
    )
    members.sort(key=lambda roots: int(roots[0]))
    owner = np.full(count, -1, np.int64)
    index = np.zeros(count, np.int64)
    for place, roots in enumerate(members):
        owner[roots] = place
        index[roots] = np.arange(len(roots))
    sites = _sites(flow, resolved, owner, index, len(members))
    groups = []
    for i, roots in enumerate(members):
        groups.append(_group(flow, resolved, roots, sites[i], int(weight[roots[0]])))
        units.append(roots)
    return groups


def _sites(
    flow: Flow, resolved: Resolved, owner: np.ndarray, index: np.ndarray, count: int
) -> list[list[Site]]:
    sites: list[list[Site]] = [[] for _ in range(count)]
    for use in flow.uses:
        roots = resolved.root[use.ids]
        owners = owner[roots]
        numbers = owners[:1] if (owners == owners[:1]).all() else np.unique(owners)
        for number in numbers:
            if number >= 0:
                units = np.where(owners == number, index[roots], -1)
                sites[number].append(Site(use.node, use.weight, use.role, units))
    return sites


def _group(
    flow: Flow, resolved: Resolved, roots: np.ndarray, sites: Sequence[Site], parameters: int
) -> Group:
    reason, wish = resolved.reasons[resolved.blocked[roots[0]]]
    rows = resolved.row[roots]
    in_rows = bool((rows >= 0).all())
    rows = _in_order(rows)
    made = [s for s in sites if s.role in ("out", "table", "state")]
    first = made[0] if made else sites[0] if sites else None
    multiple = int((first.units == 0).sum()) if first is not None else 1
    return Group(
        name=node_name(first.node) if first is not None else "",
        kind=_kind(flow, first, in_rows),
        size=len(roots),
        rows=rows.reshape(-1) if in_rows else np.zeros(len(roots), np.int64),
        cluster=int(resolved.cluster[roots[0]]) if in_rows else -1 - int(roots[0]),
        sites=tuple(sites),
        multiple=max(1, multiple),
        parameters=parameters,
        blocked=reason,
        wish=wish,
    )


def _in_order(rows: np.ndarray) -> np.ndarray:
    """Rows numbered as they come."""
    _, first, number = np.unique(rows, return_index=True, return_inverse=True)
    places = np.empty_like(first)
    places[np.argsort(first)] = np.arange(first.size)
    ordered: np.ndarray = places[number.reshape(-1)]
    return ordered


def _kind(flow: Flow, first: Site | None, in_rows: bool) -> str:
    if first is None:
        return "features"
    if first.role == "state":
        return "hidden units"
    if first.role == "table":
        return "embedding dimensions"
    if first.node.op_type.startswith("Conv"):
        return "channels"
    if in_rows:
        return "head dimensions"
    return "features"


def _reach(flow: Flow, resolved: Resolved) -> float:
    """The share of parameters that at least one free label holds."""
    total = reached = 0
    known = set()
    for value, shape, tracks in parameter_tracks(flow):
        if value.dtype == ir.DataType.BOOL:  # a mask
            continue
        free = [resolved.blocked[resolved.root[track.ids]] == 0 for track in tracks]
        reached += round(_share(len(shape), tracks, free) * math.prod(shape))
        known.add(value)
    for graph in {v.graph for v in known if v.graph is not None}:
        for value in graph.initializers.values():
            if (value.dtype is not None and value.dtype.is_floating_point()) or value in known:
                total += math.prod(static_shape(value) or (0,))
    return reached / total if total else 0.0


def _share(rank: int, tracks: Sequence[Track], free: Sequence[np.ndarray]) -> float:
    """The share of a tensor's elements that are in a free position of any track."""
    if any(mask.all() for mask in free):
        return 1.0
    axes = [a for track in tracks for a in track.axes]
    if len(set(axes)) == len(axes):
        return 1.0 - math.prod(1.0 - float(mask.mean()) for mask in free)
    held = np.zeros([1] * rank, bool)
    for track, mask in zip(tracks, free, strict=True):
        missing = tuple(a for a in range(rank) if a not in track.axes)
        held = held | np.expand_dims(mask.transpose(np.argsort(track.axes)), missing)
    return float(held.mean())

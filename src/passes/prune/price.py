"""What a model costs by how many units its groups have left, without removing any.

Here: `Price`, `Held`, where there is no graph, and `node_times`. Not here: how milliseconds are
predicted (`cost`), sizes of a graph as it is (`ir.ops`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from ...cost.kernels import kernels
from ...cost.latency import latency
from ...cost.profiles import profile_for
from ...ir.graph import static_shape
from ...ir.ops import node_cost
from ...targets.target import Target
from .groups import Group, Site

_INPUT, _OUTPUT = 0, 1
_SIDES = {
    "in": (_INPUT,),
    "out": (_OUTPUT,),
    "depthwise": (_OUTPUT,),
    "table": (_OUTPUT,),
    "state": (_OUTPUT,),
}
"""Which sides of a weight shrink with the units; recurrent weights have states on both."""


@dataclasses.dataclass
class _Weight:
    """A weight at a node: its MACs and parameters, and the share of each side each part holds."""

    cost: np.ndarray
    sides: tuple[dict[int, float], dict[int, float]]

    def hold(self, part: int, site: Site) -> None:
        """Note that units of the part are along the side of the site."""
        share = float(np.mean(site.units >= 0))
        both = site.role == "state" and _recurrent(site.node, site.weight)
        for side in (_INPUT, _OUTPUT) if both else _SIDES[site.role]:
            held = self.sides[side]
            held[part] = min(1.0, held.get(part, 0.0) + share)

    def left(self, lost: np.ndarray) -> np.ndarray:
        """What is left of both, [2]."""
        factor = 1.0
        for side in self.sides:
            factor *= 1.0 - sum(share * lost[part] for part, share in side.items())
        left: np.ndarray = self.cost * factor
        return left


class Price:
    """What is left of units, MACs and parameters, by the share of its units each part has lost.

    With `times` of nodes, in place of MACs it is their time, which is taken to fall as MACs do.
    Parts are groups that go together. MACs and parameters are those that run through some unit;
    MACs that are not known (a size is missing) count as parameters do. Products of two activations
    are left out: their sizes follow, but no weight of a group is in them.
    """

    def __init__(
        self,
        parts: Sequence[Sequence[Group]],
        dims: Mapping[str, int] | None = None,
        times: Mapping[ir.Node, float] | None = None,
    ) -> None:
        found: dict[tuple[ir.Node, ir.Value], _Weight] = {}
        own: list[set[tuple[ir.Node, ir.Value]]] = [set() for _ in parts]
        for number, groups in enumerate(parts):
            for site in (site for group in groups for site in group.sites):
                if site.role not in _SIDES or len(static_shape(site.weight) or ()) < 2:
                    continue
                key = site.node, site.weight
                weight = found.setdefault(key, _Weight(np.zeros(2), ({}, {})))
                weight.hold(number, site)
                own[number].add(key)
        self._weights = list(found.values())
        _put_costs(found, dims or {}, times)
        places = {key: i for i, key in enumerate(found)}
        self._own = [sorted(places[key] for key in keys) for keys in own]
        self._units = _shares(np.array([sum(g.size for g in part) for part in parts], float))

    def left(self, lost: np.ndarray) -> np.ndarray:
        """Shares of units, MACs and parameters, [3], with these shares of the parts' units gone."""
        costs = sum((weight.left(lost) for weight in self._weights), np.zeros(2))
        found: np.ndarray = np.concatenate([[self._units @ (1.0 - lost)], costs])
        return found

    def gain(self, part: int, share: float, lost: np.ndarray) -> np.ndarray:
        """What leaves, [3], when the part has lost this share in place of `lost[part]`."""
        after = lost.copy()
        after[part] = share
        weights = [self._weights[i] for i in self._own[part]]
        costs = sum((weight.left(lost) - weight.left(after) for weight in weights), np.zeros(2))
        units = self._units[part] * (share - lost[part])
        found: np.ndarray = np.concatenate([[units], costs])
        return found


def node_times(
    model: ir.Model, target: Target, dims: Mapping[str, int] | None = None
) -> dict[ir.Node, float]:
    """Predicted milliseconds of each node with weights on the target: those of its kernel, which
    nodes that are computed together share by their MACs. Nodes of unknown cost are missing.
    """
    found = kernels(model, target, dims=dims or None)
    told = latency(found, target, 1, profile_for(target))
    times: dict[ir.Node, float] = {}
    for kernel, ms in zip(found, told.kernel_ms, strict=True):
        macs = {node: node_cost(node, dims or None).macs or 0 for node in kernel.nodes}
        total = sum(macs.values())
        for node, own in macs.items():
            if ms and own:
                times[node] = times.get(node, 0.0) + ms * own / total
    return times


def _put_costs(
    found: Mapping[tuple[ir.Node, ir.Value], _Weight],
    dims: Mapping[str, int],
    times: Mapping[ir.Node, float] | None,
) -> None:
    """Give each weight its share of the MACs and of the parameters; of a node's MACs, by size."""
    if not found:
        return
    sizes = np.array([math.prod(static_shape(value) or (0,)) for _, value in found], float)
    nodes: dict[ir.Node, float] = {}
    for (node, _), size in zip(found, sizes, strict=True):
        nodes[node] = nodes.get(node, 0.0) + size
    counts: dict[ir.Node, float | None] = {
        node: node_cost(node, dims or None).macs if times is None else times.get(node, 0.0)
        for node in nodes
    }
    readers: dict[ir.Value, int] = {}
    for _, value in found:
        readers[value] = readers.get(value, 0) + 1
    parameters = sizes / [readers[value] for _, value in found]
    macs = parameters
    if all(count is not None for count in counts.values()) and any(counts.values()):
        parts = zip(found, sizes, strict=True)
        macs = np.array([(counts[n] or 0) * size / max(1.0, nodes[n]) for (n, _), size in parts])
    for weight, *cost in zip(found.values(), _shares(macs), _shares(parameters), strict=True):
        weight.cost = np.array(cost)


def _shares(values: np.ndarray) -> np.ndarray:
    shares: np.ndarray = values / max(float(values.sum()), 1e-30)
    return shares


class Held:
    """As `Price`, where there is no graph to ask: every unit of a part holds as many weights."""

    def __init__(self, parts: Sequence[Sequence[Group]]) -> None:
        sizes = [float(sum(g.size for g in part)) for part in parts]
        held = [float(sum(g.parameters * g.size for g in part)) for part in parts]
        units, weights = _shares(np.array(sizes)), _shares(np.array(held))
        self._shares = np.stack([units, weights, weights], axis=1)

    def left(self, lost: np.ndarray) -> np.ndarray:
        """See `Price.left`."""
        found: np.ndarray = (1.0 - lost) @ self._shares
        return found

    def gain(self, part: int, share: float, lost: np.ndarray) -> np.ndarray:
        """See `Price.gain`."""
        found: np.ndarray = self._shares[part] * (share - lost[part])
        return found


def _recurrent(node: ir.Node, weight: ir.Value) -> bool:
    return node.op_type in ("LSTM", "GRU", "RNN") and node.inputs[2] is weight

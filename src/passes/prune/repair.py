"""Repair without training: the weights of a pruned model solved again, one layer after the other.

Here: `repair`, which goes through the layers that lost inputs in graph order and solves each by
least squares for the results of the model before pruning, given the inputs that the layers repaired
so far make. Not here: single layers (`repair_items`), the arithmetic (`least_squares`), what to
remove (`selection`).

He et al. 2017, "Channel pruning for accelerating very deep neural networks", arXiv:1707.06168,
section 3.2, do the same for convolutions; as there, a layer whose result is added to a residual
stream is solved for the sum, so that it makes up for what the stream has lost before it.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Container, Iterator, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from ..base import Feed
from ..quantize.capture import Progress
from ..quantize.layers import linear_layer
from ..quantize.moments import Moments
from .groups import Group
from .repair_items import Item
from .stepwise import Stepwise

MAX_SAMPLES = 128
"""More samples are thinned out evenly: every layer in a row runs them all again."""
MAX_INPUTS = 4608
"""Wider layers are left as they are: solving takes the cube of it."""
_BUDGET = 1 << 28


@dataclasses.dataclass(frozen=True)
class Repaired:
    """How many layers there were, how many were solved again, and how many are too wide."""

    layers: int
    solved: int
    wide: int


def repair(
    model: ir.Model,
    reference: ir.Model,
    kept: Mapping[str, np.ndarray],
    samples: Sequence[Feed],
    progress: Progress = lambda done, total, what: None,
    only: Container[str | None] | None = None,
) -> Repaired:
    """Solve the weights and biases of the linear layers of a pruned model again, in place.

    `reference` is the model before pruning; values have the same names in both. `kept` has the
    output channels that are left, by the name of the result, where some are gone. `only` are the
    results of the nodes to solve, by name; all by default.

    Raises:
        CalibrationError: a sample does not fit the model.
    """
    places = {value.name: value for node in reference.graph for value in node.outputs}
    nodes = [n for n in model.graph if only is None or n.outputs[0].name in only]
    work = [item for node in nodes if (item := Item.of(node, places, kept)) is not None]
    wide = sum(item.layer.shape[1] > MAX_INPUTS for item in work)
    step = -(-len(samples) // MAX_SAMPLES)
    chosen = samples[::step] if step > 1 else samples
    blocks = list(_blocks(model, [i for i in work if i.layer.shape[1] <= MAX_INPUTS]))
    before, now = Stepwise(reference, chosen), Stepwise(model, chosen)
    solved = 0
    for done, block in enumerate(blocks):
        progress(done, len(blocks), "repairing")
        targets = before.advance([item.target for item in block])
        found = now.advance([value for item in block for value in item.own_values])
        for wanted, given in zip(targets, found, strict=True):
            for item in block:
                item.add(given, wanted, len(chosen))
        for item in block:
            solved += item.solve(model)
    progress(len(blocks), len(blocks), "repairing")
    return Repaired(len(work), solved, wide)


def lost_inputs(model: ir.Model, reference: ir.Model) -> set[str | None]:
    """The results, by name, of the layers that read fewer inputs than in the reference."""
    before = {
        layer.node.outputs[0].name: layer.shape[:2]
        for node in reference.graph
        if (layer := linear_layer(node)) is not None
    }
    found = set()
    for node in model.graph:
        layer = linear_layer(node)
        name = node.outputs[0].name if node.outputs else None
        if layer is not None and name in before and before[name] != layer.shape[:2]:
            found.add(name)
    return found


def _blocks(model: ir.Model, items: Sequence[Item]) -> Iterator[list[Item]]:
    """Items none of which gets another's result, in order, whose sums fit in memory together."""
    levels: dict[ir.Node, int] = {}
    layers = {item.layer.node for item in items}
    for node in model.graph:
        before = [v.producer() for v in node.inputs if v is not None]
        depth = max((levels[p] for p in before if p in levels), default=0)
        levels[node] = depth + (node in layers)

    def level(item: Item) -> int:
        return levels[item.layer.node]

    for item in items:
        source = item.stream.producer() if item.stream is not None else None
        if source is not None and levels[source] >= level(item):
            item.aim_at_result()  # the other side of the sum is not settled by then
    for _, group in itertools.groupby(sorted(items, key=level), key=level):
        block: list[Item] = []
        size = 0
        for item in group:
            need = 2 * Moments.bytes(item.layer)
            if block and size + need > _BUDGET:
                yield block
                block, size = [], 0
            block.append(item)
            size += need
        yield block


def kept_outputs(chosen: Mapping[Group, Sequence[int]]) -> dict[str, np.ndarray]:
    """The output channels that stay, by the name of the result, of nodes that compute units."""
    masks: dict[str, np.ndarray] = {}
    for group, units in chosen.items():
        for site in group.sites:
            if site.role in ("out", "depthwise"):
                name = site.node.outputs[0].name or ""
                mask = masks.setdefault(name, np.ones(len(site.units), bool))
                mask &= ~np.isin(site.units, np.asarray(units, np.int64))
    return {name: np.flatnonzero(mask) for name, mask in masks.items()}

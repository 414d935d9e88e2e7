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
from collections.abc import Callable, Container, Iterator, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from ...ir.graph import graph_tree
from ..base import Feed
from ..quantize.capture import Progress
from ..quantize.layers import LinearLayer
from ..quantize.moments import Moments
from .branches import flattened, paths
from .divergence import thinned
from .layer_bias import first_result
from .made_samples import half_of
from .repair_items import Item, Solution, kept_outputs, named, own_weight, store
from .stepwise import Stepwise
from .views import linear_view, state_view

__all__ = ["Repaired", "kept_outputs", "lost_inputs", "repair"]

MAX_SAMPLES = 128
"""More are thinned out evenly: values that wait to be read are held of each."""
MAX_INPUTS = 4608
"""Wider layers are left as they are: solving takes the cube of it."""
_BUDGET = 1 << 28


@dataclasses.dataclass(frozen=True)
class Repaired:
    """How many layers there were, how many were solved again, and how many are too wide."""

    layers: int
    solved: int
    wide: int

    def __add__(self, other: Repaired) -> Repaired:
        return Repaired(
            self.layers + other.layers, self.solved + other.solved, self.wide + other.wide
        )


def repair(
    model: ir.Model,
    reference: ir.Model,
    kept: Mapping[str, np.ndarray],
    samples: Sequence[Feed],
    progress: Progress = lambda done, total, what: None,
    only: Container[str | None] | None = None,
    most: int = MAX_SAMPLES,
) -> Repaired:
    """Solve the weights and biases of the linear layers of a pruned model again, in place.

    `reference` is the model before pruning; values have the same names in both. `kept` has the
    output channels that are left, by the name of the result, where some are gone. `only` are the
    results of the nodes to solve, by name; all by default. No more than `most` samples are run, in
    turn. Layers in branches of an If are solved
    on the samples that take it, layers outside on those of the most common path.

    Raises:
        CalibrationError: a sample does not fit the model.
    """
    total, done = Repaired(0, 0, 0), set[ir.Node]()
    for path in paths(reference, samples):
        before, now = flattened(reference, path.taken), flattened(model, path.taken)
        own = {twin: node for node in now.twins if (twin := now.node_of(node)) is not None}
        nodes = [
            node
            for node in now.model.graph
            if node in own
            and own[node] not in done
            and all(own_weight(layer) for layer in _layers(own[node]))
            and (only is None or first_result(node).name in only)
        ]
        done.update(own[node] for node in nodes)
        run = _Run(now.model, before.model, kept, path.samples, most)
        total += run.solve(nodes, progress)
        if now.model is not model:
            for node, kind, solution in run.solved:
                layer = kind(own[node])
                assert layer is not None
                store(layer, solution)
    return total


class _Run:
    """The layers of a model without branches."""

    def __init__(
        self,
        model: ir.Model,
        reference: ir.Model,
        kept: Mapping[str, np.ndarray],
        samples: Sequence[Feed],
        most: int,
    ) -> None:
        self._model = model
        self._places = {value.name: value for node in reference.graph for value in node.outputs}
        self._kept = kept
        self._samples = thinned(samples, most)
        self._halves = [half_of(sample) for sample in self._samples]
        self._before = Stepwise(reference, self._samples)
        self._now = Stepwise(model, self._samples)
        self.solved: list[tuple[ir.Node, Callable[[ir.Node], LinearLayer | None], Solution]] = []

    def solve(self, nodes: Sequence[ir.Node], progress: Progress) -> Repaired:
        """Solve the layers of those nodes, in place."""
        work = [item for node in nodes for item in Item.of(node, self._places, self._kept)]
        wide = sum(item.layer.shape[1] > MAX_INPUTS for item in work)
        narrow = [item for item in work if item.layer.shape[1] <= MAX_INPUTS]
        with named(value for item in work for value in item.nameless):
            blocks = list(_blocks(self._model, narrow))
            for done, block in enumerate(blocks):
                progress(done, len(blocks), "repairing")
                self._solve(block)
            progress(len(blocks), len(blocks), "repairing")
        return Repaired(len(work), len(self.solved), wide)

    def _solve(self, block: Sequence[Item]) -> None:
        targets = self._before.advance([v for item in block for v in item.wanted_values])
        found = self._now.advance([value for item in block for value in item.own_values])
        for wanted, given, half in zip(targets, found, self._halves, strict=True):
            for item in block:
                item.add(given, wanted, len(self._samples), half)
        for item in block:
            solution = item.solve()
            if solution is not None:
                store(item.layer, solution)
                self.solved.append((item.layer.node, item.view, solution))


def lost_inputs(model: ir.Model, reference: ir.Model) -> set[str | None]:
    """The results, by name, of the layers that read fewer inputs than in the reference.

    Branches of Ifs are looked at too.
    """
    before = {first_result(node).name: _inputs(node) for node in _nodes(reference.graph)}
    return {
        name
        for node in _nodes(model.graph)
        if (name := first_result(node).name) in before and before[name] != _inputs(node)
    }


def _nodes(graph: ir.Graph) -> Iterator[ir.Node]:
    """The linear layers of a graph and those under it."""
    for inner in graph_tree(graph):
        yield from (node for node in inner if node.outputs and linear_view(node) is not None)


def _layers(node: ir.Node) -> list[LinearLayer]:
    """The layers that a node is."""
    return [layer for layer in (linear_view(node), state_view(node)) if layer is not None]


def _inputs(node: ir.Node) -> list[tuple[int, int]]:
    return [layer.shape[:2] for layer in _layers(node)]


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
        # what a recurrent layer reads is gone when it has run: its items go together
        for _, same in itertools.groupby(group, key=lambda item: item.layer.node):
            part = list(same)
            need = sum(2 * Moments.bytes(item.layer) for item in part)
            if block and size + need > _BUDGET:
                yield block
                block, size = [], 0
            block += part
            size += need
        yield block

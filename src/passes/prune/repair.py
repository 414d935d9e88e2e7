"""Repair without training: the weights of a pruned model solved again, one layer after the other.

Here: `repair`, which goes through the layers that lost inputs in graph order and solves each by
least squares for the results of the model before pruning, given the inputs that the layers repaired
so far make. Not here: the arithmetic (`least_squares`), what to remove (`selection`).

He et al. 2017, "Channel pruning for accelerating very deep neural networks", arXiv:1707.06168,
section 3.2, do the same for convolutions; as there, a layer whose result is added to a residual
stream is solved for the sum, so that it makes up for what the stream has lost before it.
"""

from __future__ import annotations

import dataclasses
import itertools
import zlib
from collections.abc import Container, Iterator, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from ...ir.graph import constant_array, constant_tensor, is_absent, is_onnx_op
from ..base import Feed
from ..quantize.capture import Progress
from ..quantize.layers import LinearLayer, linear_layer
from ..quantize.moments import Moments
from .groups import Group
from .layer_bias import set_bias, with_bias
from .least_squares import solve
from .stepwise import Stepwise

MAX_SAMPLES = 128
"""More samples are thinned out evenly: every layer in a row runs them all again."""
MAX_INPUTS = 4608
"""Wider layers are left as they are: solving takes the cube of it."""
_ROWS_PER_INPUT = 12
_FEWEST_ROWS, _MOST_ROWS = 8192, 24576
_BUDGET = 1 << 28
_TOGETHER = 1024
"""Rows."""


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
    work = [item for node in nodes if (item := _Item.of(node, places, kept)) is not None]
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


_Pair = tuple[np.ndarray, np.ndarray]


class _Item:
    """A layer to be solved: what it reads, what it is to give, and sums over both.

    `result` is the layer's result with its bias. `target` is the value of the reference that the
    result, plus `stream` where there is one, is to equal.
    """

    def __init__(
        self, layer: LinearLayer, result: ir.Value, target: ir.Value, kept: np.ndarray | None
    ) -> None:
        self.layer = layer
        self.result = result
        self.target = self.plain_target = target
        self.kept = kept
        self.stream: ir.Value | None = None
        self.halves = (Moments(layer), Moments(layer))
        self.waiting: list[list[_Pair]] = [[], []]

    @classmethod
    def of(
        cls, node: ir.Node, places: Mapping[str | None, ir.Value], kept: Mapping[str, np.ndarray]
    ) -> _Item | None:
        """The item of a node, None where it is no linear layer with weights of its own."""
        layer = linear_layer(node)
        if layer is None or is_absent(constant_tensor(layer.weight)):
            return None
        weight = layer.weight
        if len(weight.uses()) > 1 or not weight.is_initializer() or weight.is_graph_output():
            return None
        result = with_bias(layer)
        if result.name not in places:
            return None
        item = cls(layer, result, places[result.name], kept.get(node.outputs[0].name or ""))
        item._aim_at_sum(places)
        return item

    def _aim_at_sum(self, places: Mapping[str | None, ir.Value]) -> None:
        """Where the result goes into a residual sum only, aim at the sum."""
        users = list(self.result.uses())
        if len(users) != 1 or self.result.is_graph_output():
            return
        user = users[0].node
        if not is_onnx_op(user, "Add") or user.outputs[0].name not in places:
            return
        other = user.inputs[1 - users[0].idx]
        if other is None or other is self.result or other.producer() is None:
            return
        if other.shape is None or other.shape != self.result.shape:
            return
        self.stream, self.target = other, places[user.outputs[0].name]

    def aim_at_result(self) -> None:
        """Aim at the layer's own result, whatever it is added to."""
        self.stream, self.target = None, self.plain_target

    @property
    def own_values(self) -> list[ir.Value]:
        """What is read off the pruned model."""
        return [self.layer.data, *([self.stream] if self.stream is not None else [])]

    def add(
        self, found: Mapping[str, np.ndarray], targets: Mapping[str, np.ndarray], samples: int
    ) -> None:
        """Fold in one sample."""
        x = found[self.layer.data.name or ""]
        y = targets[self.target.name or ""]
        if self.kept is not None:
            y = np.take(y, self.kept, self.layer.channel_axis)
        if self.stream is not None:
            y = y - found[self.stream.name or ""]
        if x.shape[: self.layer.channel_axis] != y.shape[: self.layer.channel_axis]:
            return
        # by content: no order of the samples changes who teaches and who judges
        half = zlib.crc32(np.ascontiguousarray(x).data) % 2
        rows = min(max(_FEWEST_ROWS, _ROWS_PER_INPUT * self.layer.shape[1]), _MOST_ROWS)
        limit = max(16, -(-rows // samples))
        if self.layer.node.op_type == "Conv":
            self.halves[half].add(x, y, limit)
            return
        # few rows a sample cost as much as many: they are put together
        positions = self.layer.positions(x, limit)
        pair = self.layer.inputs(x, positions)[0], self.layer.outputs(y, positions)[0]
        self.waiting[half].append(pair)
        if sum(len(a) for a, _ in self.waiting[half]) > _TOGETHER:
            self._fold(half)

    def _fold(self, half: int) -> None:
        """Fold in the rows that wait."""
        if self.waiting[half]:
            x, y = (np.concatenate(arrays) for arrays in zip(*self.waiting[half], strict=True))
            self.halves[half].add(x, y, 0)
            self.waiting[half] = []

    def solve(self, model: ir.Model) -> bool:
        """Put the new weights into the model."""
        weight = constant_array(self.layer.weight)
        assert weight is not None
        self._fold(0)
        self._fold(1)
        found = solve(self.halves, self.layer.matrix(weight.astype(np.float64)))
        if found is None:
            return False
        matrix, bias = found
        stored = self.layer.restore(matrix).astype(weight.dtype)
        self.layer.weight.const_value = ir.Tensor(stored, name=self.layer.weight.name)
        set_bias(model, self.layer, bias.reshape(-1).astype(weight.dtype))
        return True


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


def _blocks(model: ir.Model, items: Sequence[_Item]) -> Iterator[list[_Item]]:
    """Items none of which gets another's result, in order, whose sums fit in memory together."""
    levels: dict[ir.Node, int] = {}
    layers = {item.layer.node for item in items}
    for node in model.graph:
        before = [v.producer() for v in node.inputs if v is not None]
        depth = max((levels[p] for p in before if p in levels), default=0)
        levels[node] = depth + (node in layers)

    def level(item: _Item) -> int:
        return levels[item.layer.node]

    for item in items:
        source = item.stream.producer() if item.stream is not None else None
        if source is not None and levels[source] >= level(item):
            item.aim_at_result()  # the other side of the sum is not settled by then
    for _, group in itertools.groupby(sorted(items, key=level), key=level):
        block: list[_Item] = []
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

"""The layers that repair solves again, one by one: what each reads, what it is to give.

Here: `Item`, its kinds, and `store`. Not here: the order of the layers and the runs (`repair`), the
arithmetic (`least_squares`).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from ...ir.graph import constant_array, constant_tensor, is_absent, is_onnx_op
from ..quantize.layers import LinearLayer
from ..quantize.moments import Moments
from .groups import Group
from .layer_bias import first_result, set_bias, with_bias
from .least_squares import solve
from .views import RECURRENT, GateLayer, StateLayer, linear_view, state_view

_ROWS_PER_INPUT = 12
_FEWEST_ROWS, _MOST_ROWS = 8192, 24576
_TOGETHER = 1024
"""Rows."""
_MOST_WEIGHT = 1000.0

_Pair = tuple[np.ndarray, np.ndarray]
_Rows = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Inputs, results and weights."""
Solution = tuple[np.ndarray, np.ndarray]
"""A weight as stored, and a bias."""


class Item:
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
        self.waiting: list[list[_Rows]] = [[], []]
        self._power = 0.0

    @classmethod
    def of(
        cls, node: ir.Node, places: Mapping[str | None, ir.Value], kept: Mapping[str, np.ndarray]
    ) -> list[Item]:
        """The items of a node: none where it is no linear layer with weights of its own.

        `places` are the values of the reference by name.
        """
        layer = linear_view(node)
        if layer is None or not own_weight(layer):
            return []
        result = with_bias(layer)
        if result.name not in places:
            return []
        left = kept.get(first_result(node).name or "")
        if isinstance(layer, GateLayer):
            return _recurrent_items(layer, places[result.name], left)
        item = cls(layer, result, places[result.name], left)
        item._aim_at_sum(places)
        return [item]

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
    def view(self) -> Callable[[ir.Node], LinearLayer | None]:
        """What makes the layer of its node."""
        return linear_view

    @property
    def nameless(self) -> list[ir.Value]:
        """What is to be read and has no name."""
        return []

    @property
    def own_values(self) -> list[ir.Value]:
        """What is read off the pruned model."""
        return [self.layer.data, *([self.stream] if self.stream is not None else [])]

    @property
    def wanted_values(self) -> list[ir.Value]:
        """What is read off the reference."""
        return [self.target]

    def pair(self, found: Mapping[str, np.ndarray], targets: Mapping[str, np.ndarray]) -> _Pair:
        """The layer's data and what its result is to be, on one sample."""
        x = found[self.layer.data.name or ""]
        y = targets[self.target.name or ""]
        if self.kept is not None:
            y = np.take(y, self.kept, self.layer.channel_axis)
        if self.stream is not None:
            y = y - found[self.stream.name or ""]
        return x, y

    def add(
        self,
        found: Mapping[str, np.ndarray],
        targets: Mapping[str, np.ndarray],
        samples: int,
        half: int,
    ) -> None:
        """Fold one of so many samples into a half."""
        x, y = self.pair(found, targets)
        last = 2 if isinstance(self.layer, GateLayer) else self.layer.channel_axis
        if x.shape[:last] != y.shape[:last]:
            return
        rows = min(max(_FEWEST_ROWS, _ROWS_PER_INPUT * self.layer.shape[1]), _MOST_ROWS)
        limit = max(16, -(-rows // samples))
        if self.layer.channel_axis == 1:
            self.halves[half].add(x, y, limit, self._weight(x))
            return
        # few rows a sample cost as much as many: they are put together
        positions = self.layer.positions(x, limit)
        weights = np.full(len(positions), self._weight(x), x.dtype)
        taken = self.layer.inputs(x, positions), self.layer.outputs(y, positions), weights
        self.waiting[half].append(taken)
        if sum(len(part[2]) for part in self.waiting[half]) > _TOGETHER:
            self._fold(half)

    def _weight(self, x: np.ndarray) -> float:
        """A sample's: loud ones (noise among speech) are not to count more than quiet ones."""
        power = float(np.square(x, dtype=np.float64).mean()) if x.size else 0.0
        self._power = self._power or power
        if not power or not np.isfinite(power):
            return 1.0
        return float(np.clip(self._power / power, 1 / _MOST_WEIGHT, _MOST_WEIGHT))

    def _fold(self, half: int) -> None:
        """Fold in the rows that wait."""
        if self.waiting[half]:
            parts = list(zip(*self.waiting[half], strict=True))
            x, y = (np.concatenate(arrays, axis=1) for arrays in parts[:2])
            self.halves[half].add_rows(x, y, np.concatenate(parts[2]))
            self.waiting[half] = []

    def solve(self) -> Solution | None:
        """The new weight and bias, None where nothing was learnt."""
        weight = constant_array(self.layer.weight)
        assert weight is not None
        self._fold(0)
        self._fold(1)
        found = solve(self.halves, self.layer.matrix(weight.astype(np.float64)))
        if found is None:
            return None
        matrix, bias = found
        stored = self.layer.restore(matrix).astype(weight.dtype)
        return stored, bias.reshape(-1).astype(weight.dtype)


class GateItem(Item):
    """The inputs of a recurrent layer: its gates are to read what they read before."""

    def __init__(self, layer: GateLayer, target: ir.Value, kept: np.ndarray | None) -> None:
        node = target.producer()
        assert node is not None
        self.before = linear_view(node) if not isinstance(layer, StateLayer) else state_view(node)
        assert self.before is not None
        super().__init__(layer, layer.data, self.before.data, kept)

    def pair(self, found: Mapping[str, np.ndarray], targets: Mapping[str, np.ndarray]) -> _Pair:
        """See `Item.pair`."""
        return found[self.layer.data.name or ""], self._gates(targets[self.target.name or ""])

    def _gates(self, x: np.ndarray) -> np.ndarray:
        """What the reference's gates read, [steps, batch, directions * gates * units left]."""
        assert self.before is not None
        weight = constant_array(self.before.weight)
        assert weight is not None
        rows = self.before.inputs(x, np.arange(math.prod(x.shape[:2])))
        y: np.ndarray = rows @ self.before.matrix(weight) + self._old_bias()[:, None]
        if self.kept is not None:
            y = self._left(y)
        return y.swapaxes(0, 1).reshape(*x.shape[:2], -1)

    def _left(self, y: np.ndarray) -> np.ndarray:
        """Of [directions, rows, gates * units], the units that are left."""
        assert self.kept is not None
        directions, rows, width = y.shape
        gates = RECURRENT[self.layer.node.op_type]
        units = self.kept.reshape(directions, -1) - width // gates * np.arange(directions)[:, None]
        parts = y.reshape(directions, rows, gates, -1)
        taken: np.ndarray = np.take_along_axis(parts, units[:, None, None], axis=3)
        return taken.reshape(directions, rows, -1)

    def _old_bias(self) -> np.ndarray:
        """Of the reference, [directions, gates * units]."""
        assert self.before is not None
        directions, _, rows = self.before.shape
        bias = constant_array(self.before.bias) if self.before.bias is not None else None
        if bias is None:
            return np.zeros((directions, rows), np.float32)
        start = rows if isinstance(self.layer, StateLayer) else 0
        found: np.ndarray = bias[:, start : start + rows]
        return found


class StateItem(GateItem):
    """The hidden units of a recurrent layer that has lost some.

    Both sides are the reference's: what is left of its states, and what its gates made of all.
    """

    @property
    def view(self) -> Callable[[ir.Node], LinearLayer | None]:
        """See `Item.view`."""
        return state_view

    @property
    def nameless(self) -> list[ir.Value]:
        """The states, where the graph has no use for them."""
        return [] if self.target.name else [self.target]

    @property
    def own_values(self) -> list[ir.Value]:
        """Nothing."""
        return []

    @property
    def wanted_values(self) -> list[ir.Value]:
        """The states, and the first if it is computed."""
        first = self._first
        return [self.target, *([first] if first is not None and not _known(first) else [])]

    @property
    def _first(self) -> ir.Value | None:
        assert self.before is not None
        return [*self.before.node.inputs, *[None] * 8][5]

    def pair(self, found: Mapping[str, np.ndarray], targets: Mapping[str, np.ndarray]) -> _Pair:
        """See `Item.pair`."""
        first = self._first
        start = None if first is None else constant_array(first)
        if first is not None and start is None:
            start = targets[first.name or ""]
        assert isinstance(self.before, StateLayer)
        assert self.kept is not None
        x = self.before.previous(targets[self.target.name or ""], start)
        units = self.kept.reshape(x.shape[2], -1) - x.shape[3] * np.arange(x.shape[2])[:, None]
        return np.take_along_axis(x, units[None, None], axis=3), self._gates(x)


def _recurrent_items(layer: GateLayer, result: ir.Value, kept: np.ndarray | None) -> list[Item]:
    items: list[Item] = [GateItem(layer, result, kept)]
    state = state_view(layer.node)
    if kept is not None and state is not None and own_weight(state):
        items.append(StateItem(state, result, kept))
    return items


def own_weight(layer: LinearLayer) -> bool:
    """Whether the layer's weight is there, and its alone."""
    weight = layer.weight
    if len(weight.uses()) > 1 or not weight.is_initializer() or weight.is_graph_output():
        return False
    return not is_absent(constant_tensor(weight))


def _known(value: ir.Value) -> bool:
    return constant_array(value) is not None


@contextlib.contextmanager
def named(values: Iterable[ir.Value]) -> Iterator[None]:
    """Gives results that have no name one for a while."""
    changed = [value for value in dict.fromkeys(values) if not value.name]
    for i, value in enumerate(changed):
        value.name = f"repair/nameless{i}"
    try:
        yield
    finally:
        for value in changed:
            value.name = ""


def store(layer: LinearLayer, solution: Solution) -> None:
    """Put a new weight and bias where the layer keeps them."""
    weight, bias = solution
    layer.weight.const_value = ir.Tensor(weight, name=layer.weight.name)
    set_bias(layer, bias)


def kept_outputs(chosen: Mapping[Group, Sequence[int]]) -> dict[str, np.ndarray]:
    """The output channels that stay, by the name of the result, of nodes that compute units.

    Of recurrent layers, their hidden units, those of one direction after those of the other.
    """
    masks: dict[str, np.ndarray] = {}
    for group, units in chosen.items():
        for site in group.sites:
            if site.role in ("out", "depthwise", "state"):
                name = first_result(site.node).name or ""
                mask = masks.setdefault(name, np.ones(len(site.units), bool))
                mask &= ~np.isin(site.units, np.asarray(units, np.int64))
    return {name: np.flatnonzero(mask) for name, mask in masks.items()}

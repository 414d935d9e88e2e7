"""The layers that repair solves again, one by one: what each reads, what it is to give.

Here: `Item`. Not here: the order of the layers and the runs (`repair`), the arithmetic
(`least_squares`).
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from ...ir.graph import constant_array, constant_tensor, is_absent, is_onnx_op
from ..quantize.layers import LinearLayer, linear_layer
from ..quantize.moments import Moments
from .layer_bias import set_bias, with_bias
from .least_squares import solve

_ROWS_PER_INPUT = 12
_FEWEST_ROWS, _MOST_ROWS = 8192, 24576
_TOGETHER = 1024
"""Rows."""

_Pair = tuple[np.ndarray, np.ndarray]


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
        self.waiting: list[list[_Pair]] = [[], []]

    @classmethod
    def of(
        cls, node: ir.Node, places: Mapping[str | None, ir.Value], kept: Mapping[str, np.ndarray]
    ) -> Item | None:
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

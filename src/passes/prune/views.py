"""Gates of recurrent layers and ConvTranspose as what they are too: rows times a matrix.

Here: `linear_view`, which takes what `linear_layer` does and these; `GateLayer` (the inputs of an
LSTM, GRU or RNN), `StateLayer` (its hidden units, as it reads them) and `TransposedLayer`. Not
here: what is done with them (`statistics`, `repair`).
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import onnx_ir as ir

from ...ir.graph import attribute, constant_tensor, is_onnx_op
from ..quantize.layers import LinearLayer, linear_layer

RECURRENT = {"LSTM": 4, "GRU": 3, "RNN": 1}
"""The gates of each."""


@dataclasses.dataclass(frozen=True)
class GateLayer(LinearLayer):
    """What an LSTM, GRU or RNN makes of its inputs before its gates: a group for each direction.

    The results, [steps, batch, directions * gates * units], are no value of the graph.
    """

    @property
    def shape(self) -> tuple[int, int, int]:
        """Directions, inputs, gates * units."""
        assert self.weight.shape is not None
        directions, rows, size = self.weight.shape.numpy()
        return directions, size, rows

    @property
    def rows_key(self) -> tuple[object, ...]:
        """See `LinearLayer.rows_key`."""
        return self.data, self.shape[:2], "gates"

    def matrix(self, weight: np.ndarray) -> np.ndarray:
        """See `LinearLayer.matrix`."""
        return weight.swapaxes(1, 2)

    def restore(self, matrix: np.ndarray) -> np.ndarray:
        """See `LinearLayer.restore`."""
        return np.ascontiguousarray(matrix.swapaxes(1, 2))

    def inputs(self, x: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """The same rows for each direction."""
        rows = x.reshape(-1, x.shape[-1])[positions]
        return np.broadcast_to(rows, (self.groups, *rows.shape))


@dataclasses.dataclass(frozen=True)
class StateLayer(GateLayer):
    """What it makes of its hidden units before its gates; x is [steps, batch, directions, units].

    `data` is the sequence of hidden states that it gives: `previous` makes x of that.
    """

    @property
    def rows_key(self) -> tuple[object, ...]:
        """See `LinearLayer.rows_key`."""
        return self.data, self.shape[:2], "states"

    def inputs(self, x: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """The rows of each direction."""
        rows: np.ndarray = x.reshape(-1, *x.shape[-2:])[positions].swapaxes(0, 1)
        return rows

    def _positions_shape(self, x: np.ndarray) -> tuple[int, ...]:
        return x.shape[:2]

    def previous(self, states: np.ndarray, first: np.ndarray | None) -> np.ndarray:
        """Hidden states as each step reads them, of those [steps, directions, batch, units] that
        the steps give and the first, [directions, batch, units] (None: zeros)."""
        way = attribute(self.node, "direction", "forward")
        way = way.decode() if isinstance(way, bytes) else way
        found = np.empty_like(states)
        start = np.zeros_like(states[0]) if first is None else first
        for i in range(states.shape[1]):
            if way == "reverse" or i == 1:
                found[:-1, i], found[-1, i] = states[1:, i], start[i]
            else:
                found[1:, i], found[0, i] = states[:-1, i], start[i]
        moved: np.ndarray = found.swapaxes(1, 2)
        return moved


@dataclasses.dataclass(frozen=True)
class TransposedLayer(LinearLayer):
    """A ConvTranspose: a convolution of the data with zeros in between, its kernel turned around.

    Dumoulin and Visin 2016, "A guide to convolution arithmetic for deep learning",
    arXiv:1603.07285, section 4.
    """

    @property
    def channel_axis(self) -> int:
        """See `LinearLayer.channel_axis`."""
        return 1

    @property
    def shape(self) -> tuple[int, int, int]:
        """Groups, inputs of each (kernel taps included), outputs of each."""
        assert self.weight.shape is not None
        inputs, out, *kernel = self.weight.shape.numpy()
        return self.groups, inputs // self.groups * math.prod(kernel), out

    @property
    def rows_key(self) -> tuple[object, ...]:
        """Each has its own."""
        return (self.node,)

    def matrix(self, weight: np.ndarray) -> np.ndarray:
        """See `LinearLayer.matrix`."""
        inputs, out, *kernel = weight.shape
        turned = np.flip(weight, tuple(range(2, weight.ndim)))
        parts = turned.reshape(self.groups, inputs // self.groups, out, math.prod(kernel))
        found: np.ndarray = parts.swapaxes(2, 3).reshape(self.groups, -1, out)
        return found

    def restore(self, matrix: np.ndarray) -> np.ndarray:
        """See `LinearLayer.restore`."""
        assert self.weight.shape is not None
        inputs, out, *kernel = self.weight.shape.numpy()
        parts = matrix.reshape(inputs, math.prod(kernel), out).swapaxes(1, 2)
        turned = parts.reshape(inputs, out, *kernel)
        return np.ascontiguousarray(np.flip(turned, tuple(range(2, turned.ndim))))

    def inputs(self, x: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """See `LinearLayer.inputs`."""
        return self._patches(self._spread(x), positions)

    def outputs(self, y: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """See `LinearLayer.outputs`."""
        rows: np.ndarray = np.moveaxis(y, 1, -1).reshape(-1, y.shape[1])[positions]
        return rows.reshape(len(rows), self.groups, -1).swapaxes(0, 1)

    def positions(self, x: np.ndarray, limit: int = 0) -> np.ndarray:
        """See `LinearLayer.positions`."""
        return super().positions(self._spread(x), limit)

    def _spread(self, x: np.ndarray) -> np.ndarray:
        """The data with stride - 1 zeros between neighbours."""
        strides = attribute(self.node, "strides", (1,) * (x.ndim - 2))
        sizes = [(n - 1) * s + 1 for n, s in zip(x.shape[2:], strides, strict=True)]
        found = np.zeros((*x.shape[:2], *sizes), x.dtype)
        found[(slice(None), slice(None), *(slice(None, None, s) for s in strides))] = x
        return found

    def _positions_shape(self, x: np.ndarray) -> tuple[int, ...]:
        kernel, _, dilations, pads = self._geometry(x)
        sizes = [
            n + before + after - (k - 1) * d
            for n, k, d, (before, after) in zip(x.shape[2:], kernel, dilations, pads, strict=True)
        ]
        return (x.shape[0], *sizes)

    def _geometry(
        self, x: np.ndarray
    ) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], list[tuple[int, int]]]:
        assert self.weight.shape is not None
        kernel = tuple(self.weight.shape.numpy()[2:])
        rank = len(kernel)
        dilations = attribute(self.node, "dilations", (1,) * rank)
        flat = attribute(self.node, "pads", (0,) * (2 * rank)) or (0,) * (2 * rank)
        more = attribute(self.node, "output_padding", (0,) * rank)
        reach = [(k - 1) * d for k, d in zip(kernel, dilations, strict=True)]
        pads = [(r - flat[i], r - flat[i + rank] + more[i]) for i, r in enumerate(reach)]
        return kernel, (1,) * rank, dilations, pads


def linear_view(node: ir.Node) -> LinearLayer | None:
    """As `linear_layer`, but of recurrent layers, for their inputs, and ConvTranspose too."""
    layer = linear_layer(node)
    if layer is not None:
        return layer
    if is_onnx_op(node, *RECURRENT):
        return _recurrent(node, GateLayer, 0, 1)
    return _transposed(node) if is_onnx_op(node, "ConvTranspose") else None


def state_view(node: ir.Node) -> StateLayer | None:
    """The hidden units of a recurrent layer, as its gates read them."""
    if not is_onnx_op(node, *RECURRENT):
        return None
    found = _recurrent(node, StateLayer, None, 2)
    assert found is None or isinstance(found, StateLayer)
    return found


def _recurrent(
    node: ir.Node, kind: type[GateLayer], data: int | None, index: int
) -> GateLayer | None:
    inputs = [*node.inputs, *[None] * 8]
    source = node.outputs[0] if data is None else inputs[data]
    weight, bias, lengths = inputs[index], inputs[3], inputs[4]
    tensor = constant_tensor(weight)
    known = tensor is not None and len(tensor.shape) == 3
    fixed = bias is None or constant_tensor(bias) is not None
    if not known or not fixed or lengths is not None or attribute(node, "layout", 0):
        return None
    if source is None or weight is None or constant_tensor(source) is not None:
        return None
    assert tensor is not None
    return kind(node, source, weight, bias, int(tensor.shape.numpy()[0]))


def _transposed(node: ir.Node) -> TransposedLayer | None:
    inputs = [*node.inputs, None]
    data, weight, bias = inputs[:3]
    tensor = constant_tensor(weight)
    if data is None or weight is None or tensor is None or constant_tensor(data) is not None:
        return None
    auto = attribute(node, "auto_pad", "NOTSET")
    auto = auto.decode() if isinstance(auto, bytes) else auto
    if auto != "NOTSET" or attribute(node, "output_shape") or len(tensor.shape) < 3:
        return None
    layer = TransposedLayer(node, data, weight, bias, int(attribute(node, "group", 1)))
    pads = layer._geometry(np.zeros(0))[3]
    return layer if min(min(pair) for pair in pads) >= 0 else None

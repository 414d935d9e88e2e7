"""Conv, Gemm and MatMul as what they all are: rows of inputs times a matrix, in groups.

Here: `linear_layer`, the view of a node that data-driven methods (least squares, rounding, GPTQ)
work on. A convolution's rows are its patches. Not here: running models to get the inputs
(`capture`), what is done with them.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import zlib
from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from ...ir.graph import attribute, constant_tensor, is_onnx_op


@dataclasses.dataclass(frozen=True)
class LinearLayer:
    """A node that multiplies rows of inputs by a constant matrix, once for each group.

    `data`, `weight` and `bias` are the node's inputs (no bias: None). Rows are counted over all
    positions of the output; `inputs` has one row for each row of `outputs`.
    """

    node: ir.Node
    data: ir.Value
    weight: ir.Value
    bias: ir.Value | None
    groups: int

    @property
    def channel_axis(self) -> int:
        """The axis of the data that holds input channels."""
        return 1 if self.node.op_type == "Conv" else -1

    @property
    def shape(self) -> tuple[int, int, int]:
        """Groups, inputs of each, outputs of each."""
        assert self.weight.shape is not None
        dims = self.weight.shape.numpy()
        if self.node.op_type == "Conv":
            return self.groups, math.prod(dims[1:]), dims[0] // self.groups
        size, out = reversed(dims) if self._transposed else dims
        return 1, size, out

    @property
    def rows_key(self) -> tuple[object, ...]:
        """Equal for layers that read the same rows (q, k, v of one activation)."""
        if self.node.op_type != "Conv":
            return self.data, self.shape[1]
        attributes = sorted((k, str(a.value)) for k, a in self.node.attributes.items())
        assert self.weight.shape is not None
        return self.data, tuple(self.weight.shape.numpy()[1:]), *attributes

    # --- the weight ----------------------------------------------------------------------------

    def matrix(self, weight: np.ndarray) -> np.ndarray:
        """The weight as [groups, in, out], so that outputs = inputs @ matrix + bias."""
        if self.node.op_type == "Conv":
            groups, size, out = self.shape
            return weight.reshape(groups, out, size).swapaxes(1, 2)
        return (weight.T if self._transposed else weight)[None]

    def restore(self, matrix: np.ndarray) -> np.ndarray:
        """A matrix [groups, in, out] in the weight's own layout."""
        assert self.weight.shape is not None
        if self.node.op_type == "Conv":
            return np.ascontiguousarray(matrix.swapaxes(1, 2)).reshape(self.weight.shape.numpy())
        return np.ascontiguousarray(matrix[0].T if self._transposed else matrix[0])

    @property
    def _transposed(self) -> bool:
        return self.node.op_type == "Gemm" and bool(attribute(self.node, "transB", 0))

    # --- the rows ------------------------------------------------------------------------------

    def positions(self, x: np.ndarray, limit: int = 0) -> np.ndarray:
        """Which rows to take of a sample's data: all, or `limit` of them chosen at random.

        The choice depends on the data alone, so neither order nor run changes it.
        """
        count = math.prod(self._positions_shape(x))
        if not limit or count <= limit:
            return np.arange(count)
        generator = np.random.default_rng(zlib.crc32(np.ascontiguousarray(x).data))
        return np.sort(generator.choice(count, limit, replace=False))

    def inputs(self, x: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Rows of inputs: [groups, len(positions), in]."""
        if self.node.op_type != "Conv":
            rows: np.ndarray = x.reshape(-1, x.shape[-1])[positions][None]
            return rows
        return self._patches(x, positions)

    def outputs(self, y: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Rows of results: [groups, len(positions), out]."""
        if self.node.op_type == "Conv":
            y = np.moveaxis(y, 1, -1)
        rows: np.ndarray = y.reshape(-1, y.shape[-1])[positions]
        return rows.reshape(len(rows), self.groups, -1).swapaxes(0, 1)

    def chunks(self, positions: np.ndarray, elements: int = 1 << 24) -> Iterator[np.ndarray]:
        """Positions in runs whose inputs hold at most about that many elements."""
        groups, size, _ = self.shape
        step = max(1, elements // max(1, groups * size))
        for start in range(0, len(positions), step):
            yield positions[start : start + step]

    def _positions_shape(self, x: np.ndarray) -> tuple[int, ...]:
        if self.node.op_type != "Conv":
            return x.shape[:-1]
        kernel, strides, dilations, pads = self._geometry(x)
        out = []
        for axis, size in enumerate(x.shape[2:]):
            reach = (kernel[axis] - 1) * dilations[axis] + 1
            out.append((size + sum(pads[axis]) - reach) // strides[axis] + 1)
        return (x.shape[0], *out)

    def _geometry(
        self, x: np.ndarray
    ) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], list[tuple[int, int]]]:
        """Kernel, strides, dilations and (before, after) padding along each spatial axis."""
        assert self.weight.shape is not None
        kernel = tuple(self.weight.shape.numpy()[2:])
        rank = len(kernel)
        strides = attribute(self.node, "strides", (1,) * rank)
        dilations = attribute(self.node, "dilations", (1,) * rank)
        auto = attribute(self.node, "auto_pad", "NOTSET")
        auto = auto.decode() if isinstance(auto, bytes) else auto
        if auto in ("SAME_UPPER", "SAME_LOWER"):
            pads = []
            for axis, size in enumerate(x.shape[2:]):
                out = -(-size // strides[axis])
                reach = (kernel[axis] - 1) * dilations[axis] + 1
                need = max(0, (out - 1) * strides[axis] + reach - size)
                less, more = need // 2, need - need // 2
                pads.append((less, more) if auto == "SAME_UPPER" else (more, less))
            return kernel, strides, dilations, pads
        flat = attribute(self.node, "pads", (0,) * (2 * rank)) if auto == "NOTSET" else ()
        flat = flat or (0,) * (2 * rank)
        return kernel, strides, dilations, [(flat[i], flat[i + rank]) for i in range(rank)]

    def _patches(self, x: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Gathered one kernel offset at a time: each is a plain lookup in the padded data."""
        kernel, strides, dilations, pads = self._geometry(x)
        shape = self._positions_shape(x)
        padded = np.pad(x, [(0, 0), (0, 0), *pads]) if any(map(any, pads)) else x
        channels = x.shape[1]
        last = np.moveaxis(padded, 1, -1)
        sample, *corner = np.unravel_index(positions, shape)
        corner = [c * s for c, s in zip(corner, strides, strict=True)]
        found = np.empty((len(positions), channels, math.prod(kernel)), x.dtype)
        for i, offset in enumerate(itertools.product(*map(range, kernel))):
            where = [c + o * d for c, o, d in zip(corner, offset, dilations, strict=True)]
            found[:, :, i] = last[(sample, *where)]
        rows = found.reshape(len(positions), self.groups, -1)
        return rows.swapaxes(0, 1)


def linear_layer(node: ir.Node) -> LinearLayer | None:
    """The view of a node, or None when it is not a product with a constant matrix.

    Taken: Conv; MatMul by a constant matrix on the right; Gemm without transA, alpha and beta. The
    weight may be absent, its shape must be known.
    """
    if not is_onnx_op(node, "Conv", "Gemm", "MatMul"):
        return None
    data, weight = node.inputs[0], node.inputs[1]
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    tensor = constant_tensor(weight)
    if data is None or weight is None or tensor is None or constant_tensor(data) is not None:
        return None
    rank = len(tensor.shape)
    if node.op_type == "Conv":
        if rank < 3:
            return None
        return LinearLayer(node, data, weight, bias, int(attribute(node, "group", 1)))
    plain = not attribute(node, "transA", 0) and (
        attribute(node, "alpha", 1.0) == attribute(node, "beta", 1.0) == 1.0
    )
    return LinearLayer(node, data, weight, bias, 1) if rank == 2 and plain else None

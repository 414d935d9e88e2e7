"""Putting a network together operator by operator: values with shapes, weights without data.

Here: `NetBuilder`, with the operators that networks are made of. Weights are absent until
`fill_random_weights`. Not here: blocks (`microbench_images`, `microbench_tokens`), and which
networks are made (`microbench_nets`).
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from ..ir.graph import AbsentTensor

OPSET = 20
IR_VERSION = 10
Shape = tuple[int, ...]


class NetBuilder:
    """A network under construction. `random` makes every choice, so a seed names a network.

    `macs` counts what has been added, for those who stop at a budget.
    """

    def __init__(self, name: str, seed: int) -> None:
        self.name = name
        self.random = random.Random(seed)
        self.macs = 0
        self.weight_bytes = 0
        self._nodes: list[ir.Node] = []
        self._inputs: list[ir.Value] = []
        self._initializers: list[ir.Value] = []
        self._count = 0

    # --- values --------------------------------------------------------------------------------

    def _name(self, kind: str) -> str:
        self._count += 1
        return f"{kind}_{self._count}"

    def input(self, shape: Shape, dtype: ir.DataType = ir.DataType.FLOAT) -> ir.Value:
        """An input of the network."""
        value = _value(self._name("input"), shape, dtype)
        self._inputs.append(value)
        return value

    def weight(self, shape: Shape) -> ir.Value:
        """A float32 weight without data."""
        name = self._name("weight")
        value = _value(name, shape, ir.DataType.FLOAT)
        value.const_value = AbsentTensor(name, ir.DataType.FLOAT, shape)
        self._initializers.append(value)
        self.weight_bytes += 4 * math.prod(shape)
        return value

    def constant(self, array: Any, dtype: Any = np.int64) -> ir.Value:
        """A constant that is known: an axis, a shape, an index."""
        name = self._name("constant")
        data = np.asarray(array, dtype)
        value = _value(name, data.shape, ir.DataType.from_numpy(data.dtype))
        value.const_value = ir.Tensor(data, name=name)
        self._initializers.append(value)
        return value

    def op(
        self,
        kind: str,
        inputs: Sequence[ir.Value | None],
        shapes: Sequence[Shape],
        dtype: ir.DataType | None = None,
        **attributes: Any,
    ) -> list[ir.Value]:
        """Any operator, its outputs' shapes given; they have the first input's dtype."""
        found = next(value.dtype for value in inputs if value is not None and value.dtype)
        outputs = [_value(self._name(kind), shape, dtype or found) for shape in shapes]
        self._nodes.append(
            ir.node(
                kind, list(inputs), attributes=attributes, outputs=outputs, name=outputs[0].name
            )
        )
        return outputs

    def model(self, *outputs: ir.Value) -> ir.Model:
        """The finished network."""
        graph = ir.Graph(
            self._inputs,
            list(outputs),
            nodes=self._nodes,
            initializers=self._initializers,
            opset_imports={"": OPSET},
            name=self.name,
        )
        return ir.Model(graph, ir_version=IR_VERSION, producer_name="edgepass")

    # --- operators -----------------------------------------------------------------------------

    def unary(self, kind: str, x: ir.Value, **attributes: Any) -> ir.Value:
        """An operator that keeps the shape."""
        return self.op(kind, [x], [shape_of(x)], **attributes)[0]

    def binary(self, kind: str, x: ir.Value, y: ir.Value) -> ir.Value:
        """An operator that broadcasts."""
        return self.op(kind, [x, y], [np.broadcast_shapes(shape_of(x), shape_of(y))])[0]

    def conv(
        self,
        x: ir.Value,
        channels: int,
        kernel: int | Sequence[int] = 3,
        stride: int | Sequence[int] = 1,
        groups: int = 1,
        dilation: int = 1,
        bias: bool = True,
    ) -> ir.Value:
        """A convolution of any rank with "same" padding."""
        before = shape_of(x)
        rank = len(before) - 2
        kernels = tuple([kernel] * rank if isinstance(kernel, int) else kernel)
        strides = tuple([stride] * rank if isinstance(stride, int) else stride)
        pads = [(dilation * (k - 1)) // 2 for k in kernels]
        extents = [
            (size + 2 * pad - dilation * (k - 1) - 1) // step + 1
            for size, pad, k, step in zip(before[2:], pads, kernels, strides, strict=True)
        ]
        weight = self.weight((channels, before[1] // groups, *kernels))
        inputs = [x, weight, self.weight((channels,))] if bias else [x, weight]
        shape = (before[0], channels, *extents)
        self.macs += math.prod(shape) * (before[1] // groups) * math.prod(kernels)
        return self.op(
            "Conv",
            inputs,
            [shape],
            group=groups,
            kernel_shape=list(kernels),
            strides=list(strides),
            dilations=[dilation] * rank,
            pads=pads * 2,
        )[0]

    def conv_transpose(self, x: ir.Value, channels: int, kernel: int = 2) -> ir.Value:
        """An upsampling convolution, stride 2."""
        n, before, *extents = shape_of(x)
        pad = (kernel - 2) // 2
        shape = (n, channels, *(2 * size for size in extents))
        self.macs += math.prod(extents) * before * channels * kernel ** len(extents)
        return self.op(
            "ConvTranspose",
            [
                x,
                self.weight((before, channels, *[kernel] * len(extents))),
                self.weight((channels,)),
            ],
            [shape],
            kernel_shape=[kernel] * len(extents),
            strides=[2] * len(extents),
            pads=[pad] * (2 * len(extents)),
        )[0]

    def pool(self, kind: str, x: ir.Value, kernel: int = 3, stride: int = 2) -> ir.Value:
        """MaxPool or AveragePool with padding of half the window."""
        n, c, *extents = shape_of(x)
        pad = (kernel - 1) // 2
        after = [(size + 2 * pad - kernel) // stride + 1 for size in extents]
        more: dict[str, Any] = {"count_include_pad": 0} if kind == "AveragePool" else {}
        return self.op(
            kind,
            [x],
            [(n, c, *after)],
            kernel_shape=[kernel] * len(extents),
            strides=[stride] * len(extents),
            pads=[pad] * (2 * len(extents)),
            **more,
        )[0]

    def reduce(self, kind: str, x: ir.Value, axes: Sequence[int], keep: bool = True) -> ir.Value:
        """A reduction over axes."""
        shape = shape_of(x)
        reduced = {axis % len(shape) for axis in axes}
        after = tuple(
            1 if axis in reduced else size
            for axis, size in enumerate(shape)
            if keep or axis not in reduced
        )
        return self.op(kind, [x, self.constant(list(axes))], [after], keepdims=int(keep))[0]

    def matmul(self, x: ir.Value, y: ir.Value) -> ir.Value:
        """A product of two activations, or with a constant."""
        left, right = shape_of(x), shape_of(y)
        shape = (*np.broadcast_shapes(left[:-2], right[:-2]), left[-2], right[-1])
        self.macs += math.prod(shape) * left[-1]
        return self.op("MatMul", [x, y], [shape])[0]

    def linear(self, x: ir.Value, features: int, bias: bool = True) -> ir.Value:
        """x W + b on the last axis."""
        product = self.matmul(x, self.weight((shape_of(x)[-1], features)))
        return self.binary("Add", product, self.weight((features,))) if bias else product

    def gemm(self, x: ir.Value, features: int) -> ir.Value:
        """A classifier's last layer, on [n, c]."""
        rows, depth = shape_of(x)
        self.macs += rows * depth * features
        weight = self.weight((features, depth))
        return self.op("Gemm", [x, weight, self.weight((features,))], [(rows, features)], transB=1)[
            0
        ]

    def reshape(self, x: ir.Value, *shape: int) -> ir.Value:
        """The same elements in another shape."""
        return self.op("Reshape", [x, self.constant(shape)], [shape])[0]

    def transpose(self, x: ir.Value, *order: int) -> ir.Value:
        """Axes in another order."""
        shape = shape_of(x)
        return self.op("Transpose", [x], [tuple(shape[i] for i in order)], perm=list(order))[0]

    def concat(self, values: Sequence[ir.Value], axis: int) -> ir.Value:
        """Values side by side."""
        shape = list(shape_of(values[0]))
        shape[axis] = sum(shape_of(value)[axis] for value in values)
        return self.op("Concat", values, [tuple(shape)], axis=axis)[0]

    def split(self, x: ir.Value, sizes: Sequence[int], axis: int) -> list[ir.Value]:
        """A value in pieces."""
        shape = shape_of(x)
        shapes = [(*shape[:axis], size, *shape[axis + 1 :]) for size in sizes]
        return self.op("Split", [x, self.constant(list(sizes))], shapes, axis=axis)

    def slice(self, x: ir.Value, axis: int, start: int, stop: int, step: int = 1) -> ir.Value:
        """A piece of a value."""
        shape = list(shape_of(x))
        shape[axis] = -(-(min(stop, shape[axis]) - start) // step)
        bounds = [self.constant([item]) for item in (start, stop, axis, step)]
        return self.op("Slice", [x, *bounds], [tuple(shape)])[0]

    def gather(self, x: ir.Value, index: Any, axis: int) -> ir.Value:
        """Rows of a value by constant indices (a scalar drops the axis)."""
        shape = shape_of(x)
        indices = self.constant(index)
        after = (*shape[:axis], *shape_of(indices), *shape[axis + 1 :])
        return self.op("Gather", [x, indices], [after], axis=axis)[0]

    def pad(self, x: ir.Value, before: Sequence[int], after: Sequence[int], mode: str) -> ir.Value:
        """Padding of all axes."""
        shape = tuple(size + a + b for size, a, b in zip(shape_of(x), before, after, strict=True))
        return self.op("Pad", [x, self.constant([*before, *after])], [shape], mode=mode)[0]

    def softmax(self, x: ir.Value, axis: int = -1) -> ir.Value:
        """Softmax over an axis."""
        return self.unary("Softmax", x, axis=axis)

    def layer_norm(self, x: ir.Value) -> ir.Value:
        """Over the last axis, with scale and bias."""
        size = (shape_of(x)[-1],)
        return self.op(
            "LayerNormalization",
            [x, self.weight(size), self.weight(size)],
            [shape_of(x)],
            axis=-1,
            epsilon=1e-6,
        )[0]

    def batch_norm(self, x: ir.Value) -> ir.Value:
        """A normalization that no convolution can take in."""
        size = (shape_of(x)[1],)
        return self.op(
            "BatchNormalization", [x, *(self.weight(size) for _ in range(4))], [shape_of(x)]
        )[0]

    def resize(self, x: ir.Value, mode: str = "nearest") -> ir.Value:
        """Twice the height and width."""
        n, c, h, w = shape_of(x)
        scales = self.constant([1, 1, 2, 2], np.float32)
        more: dict[str, Any] = (
            {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
            if mode == "nearest"
            else {"coordinate_transformation_mode": "half_pixel"}
        )
        return self.op("Resize", [x, None, scales], [(n, c, 2 * h, 2 * w)], mode=mode, **more)[0]

    def scaled(self, x: ir.Value, shape: Shape, kind: str = "Mul") -> ir.Value:
        """A weight of `shape` multiplied with, or added to, a value."""
        return self.binary(kind, x, self.weight(shape))


def shape_of(value: ir.Value) -> Shape:
    """Its shape as ints."""
    assert value.shape is not None
    return tuple(value.shape.numpy())


def _value(name: str, shape: Sequence[int], dtype: ir.DataType) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape([int(d) for d in shape]), type=ir.TensorType(dtype))

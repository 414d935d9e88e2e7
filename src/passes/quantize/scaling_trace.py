"""The way back from an activation to the constants that can take up a scale of its channels.

Here: `trace`, which follows positions (see `scaling`) through operators that a positive factor
passes: linear ones, Relu and its like, pooling, moves, normalizations' weights, the value side of
attention. Not here: readers, and choosing scales.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from ...ir.graph import (
    CONTRIB_DOMAIN,
    attribute,
    constant_array,
    constant_scalar,
    constant_tensor,
    is_onnx_op,
    static_shape,
)


class Blocked(Exception):  # noqa: N818 - a reason, no error
    """No constant takes the scale up; the message says why."""


@dataclasses.dataclass(frozen=True, eq=False)
class Fold:
    """A constant input of a node and which entry of the scale vector multiplies which element.

    `index` broadcasts against the constant; -1 is a factor of one. `inverse`: it is divided.
    `product`: the constant is a product's weight, not a bias or a vector of factors.
    """

    node: ir.Node
    input: int
    index: np.ndarray
    inverse: bool = False
    product: bool = False

    @property
    def value(self) -> ir.Value:
        """The constant."""
        value = self.node.inputs[self.input]
        assert value is not None
        return value


def trace(value: ir.Value, index: np.ndarray, size: int) -> tuple[list[Fold], np.ndarray]:
    """The constants behind a value, and for each channel the one whose scale it must share.

    `index` has the value's rank. All readers of the value itself are the caller's business; every
    value further back may have one reader only.

    Raises:
        Blocked: something on the way can't take a factor.
    """
    tracer = _Tracer(size)
    tracer.into(value, index)
    return tracer.folds, tracer.resolved()


_HOMOGENEOUS = ("Relu", "LeakyRelu", "PRelu", "Identity", "Abs")
_WINDOWS = ("MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool", "LpPool")
_REDUCTIONS = ("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceL1", "ReduceL2")
_LAST_AXIS_NORMS = {
    ("", "LayerNormalization"): (1, 2),
    ("", "RMSNormalization"): (1,),
    ("", "SimplifiedLayerNormalization"): (1,),
    (CONTRIB_DOMAIN, "LayerNormalization"): (1, 2),
    (CONTRIB_DOMAIN, "SimplifiedLayerNormalization"): (1,),
    (CONTRIB_DOMAIN, "SkipLayerNormalization"): (2, 3),
    (CONTRIB_DOMAIN, "SkipSimplifiedLayerNormalization"): (2,),
}
"""Where norms over the last axis keep their weight and bias."""


class _Tracer:
    def __init__(self, size: int) -> None:
        self.folds: list[Fold] = []
        self.same_as = np.arange(-1, size)  # entry c + 1: the channel that c must equal

    def resolved(self) -> np.ndarray:
        """The class of each channel after all ties."""
        same = self.same_as
        while True:
            further = same[same + 1]
            if (further == same).all():
                classes: np.ndarray = further[1:]
                return classes
            same = further

    # --- walking -------------------------------------------------------------------------------

    def _back(self, value: ir.Value | None, index: np.ndarray) -> None:
        """Into a value that only the node just passed may read."""
        if value is None:
            raise Blocked("an input is missing")
        if value.is_graph_output():
            raise Blocked("a graph output lies on the way")
        if len(value.uses()) != 1:
            other = next(iter(value.uses())).node
            raise Blocked(f"a value on the way has several readers (one is {other.op_type})")
        self.into(value, index)

    def into(self, value: ir.Value, index: np.ndarray) -> None:
        """Follow the factor at `index` into what makes the value."""
        node = value.producer()
        if node is None:
            raise Blocked("the model's input" if value.is_graph_input() else "a constant")
        if is_onnx_op(node, "Split"):
            self._split(node, value, index)
            return
        rule = self._rule(node)
        if rule is None:
            raise Blocked(f"{node.op_type} lets no factor through")
        if value is not node.outputs[0]:
            raise Blocked(f"a side result of {node.op_type}")
        rule(node, index)

    def _rule(self, node: ir.Node) -> Callable[[ir.Node, np.ndarray], None] | None:
        if (node.domain, node.op_type) in _LAST_AXIS_NORMS or (
            is_onnx_op(node, "LayerNormalization", "RMSNormalization")
        ):
            return self._norm
        if node.domain == CONTRIB_DOMAIN and node.op_type == "MultiHeadAttention":
            return self._attention
        if not is_onnx_op(node, node.op_type):
            return None
        if node.op_type in _HOMOGENEOUS:
            return lambda node, index: self._back(node.inputs[0], index)
        if node.op_type in _WINDOWS:
            return self._window
        if node.op_type in _REDUCTIONS:
            return self._reduction
        if node.op_type in ("Reshape", "Flatten", "Squeeze", "Unsqueeze"):
            return self._reshape
        found: Callable[[ir.Node, np.ndarray], None] | None = {
            "Conv": self._conv,
            "ConvTranspose": self._conv,
            "BatchNormalization": self._channel_norm,
            "InstanceNormalization": self._channel_norm,
            "Gemm": self._gemm,
            "MatMul": self._matmul,
            "Gather": self._gather,
            "Clip": self._clip,
            "Add": self._sum,
            "Sub": self._sum,
            "Sum": self._sum,
            "Mul": self._mul,
            "Div": self._div,
            "Pad": self._pad,
            "Resize": self._window,
            "Transpose": self._transpose,
            "Concat": self._concat,
            "Attention": self._attention,
        }.get(node.op_type)
        return found

    def _fold(
        self,
        node: ir.Node,
        position: int,
        index: np.ndarray,
        *,
        inverse: bool = False,
        product: bool = False,
    ) -> None:
        """Let a constant input take the factor; nothing where the input is left out."""
        value = node.inputs[position] if position < len(node.inputs) else None
        if value is None:
            return
        if constant_tensor(value) is None:
            raise Blocked(f"{node.op_type} with a weight or bias that is not constant")
        self.folds.append(Fold(node, position, index, inverse, product))

    def _tie(self, index: np.ndarray, keep: int) -> np.ndarray:
        """One factor for all positions that differ in other axes than `keep`: its vector."""
        others = tuple(i for i in range(index.ndim) if i != keep % index.ndim)
        if index.size == index.shape[keep]:
            return index.reshape(-1)
        least: np.ndarray = index.min(axis=others, keepdims=True, initial=np.iinfo(np.int64).max)
        for entry, target in zip(
            index.ravel(), np.broadcast_to(least, index.shape).ravel(), strict=True
        ):
            self._unite(int(entry), int(target))
        return least.reshape(-1)

    def _unite(self, a: int, b: int) -> None:
        while self.same_as[a + 1] != a:
            a = int(self.same_as[a + 1])
        while self.same_as[b + 1] != b:
            b = int(self.same_as[b + 1])
        self.same_as[max(a, b) + 1] = min(a, b)

    # --- products ------------------------------------------------------------------------------

    def _conv(self, node: ir.Node, index: np.ndarray) -> None:
        channels = self._tie(index, 1)
        shape = static_shape(node.inputs[1])
        if shape is None:
            raise Blocked("a weight of unknown shape")
        axis = 0 if node.op_type == "Conv" else 1
        if axis == 1 and attribute(node, "group", 1) != 1:
            raise Blocked("a grouped ConvTranspose")
        if shape[axis] != len(channels):
            raise Blocked("channels that do not line up")
        spread = channels.reshape([-1 if i == axis else 1 for i in range(len(shape))])
        self._fold(node, 1, spread, product=True)
        self._fold(node, 2, channels)

    def _gemm(self, node: ir.Node, index: np.ndarray) -> None:
        columns = self._tie(index, -1)
        transposed = attribute(node, "transB", 0)
        self._fold(node, 1, columns[:, None] if transposed else columns[None], product=True)
        self._fold(node, 2, columns)

    def _matmul(self, node: ir.Node, index: np.ndarray) -> None:
        weight = node.inputs[1]
        if constant_tensor(weight) is not None:
            self._fold(node, 1, self._tie(index, -1)[None], product=True)
            return
        if index.ndim < 2 or index.shape[-2] != 1:
            raise Blocked("rows of a product of activations")
        # a probability matrix times values: every row mixes rows of the right side alone
        self._same_dims(weight, index)
        self._back(weight, index)

    def _attention(self, node: ir.Node, index: np.ndarray) -> None:
        """Results are averages of the values' rows, channel by channel."""
        if any(v.uses() or v.is_graph_output() for v in node.outputs[1:]):
            raise Blocked("attention with a cache")
        if node.domain == CONTRIB_DOMAIN:
            caches = [v for v in (*node.inputs[3:4], *node.inputs[6:8]) if v is not None]
        else:
            caches = [v for v in node.inputs[4:6] if v is not None]
            if attribute(node, "q_num_heads", 0) != attribute(node, "kv_num_heads", 0):
                raise Blocked("attention whose heads share values")
        if caches:
            raise Blocked("attention with a cache or a bias of its own")
        value = node.inputs[2] if len(node.inputs) > 2 else None
        self._same_dims(value, index)
        self._back(value, index)

    def _gather(self, node: ir.Node, index: np.ndarray) -> None:
        shape = static_shape(node.inputs[0])
        if attribute(node, "axis", 0) != 0 or shape is None or len(shape) != 2:
            raise Blocked("Gather that is no lookup of rows")
        self._fold(node, 0, self._tie(index, -1)[None])

    # --- normalizations ------------------------------------------------------------------------

    def _norm(self, node: ir.Node, index: np.ndarray) -> None:
        columns = self._tie(index, -1)
        positions = _LAST_AXIS_NORMS.get((node.domain, node.op_type), (1, 2))
        axis = attribute(node, "axis", -1)
        if axis not in (-1, index.ndim - 1):
            raise Blocked(f"{node.op_type} over several axes")
        self._fold(node, positions[0], columns)
        if len(positions) > 1:
            self._fold(node, positions[1], columns)

    def _channel_norm(self, node: ir.Node, index: np.ndarray) -> None:
        if attribute(node, "training_mode", 0):
            raise Blocked("BatchNormalization in training mode")
        channels = self._tie(index, 1)
        self._fold(node, 1, channels)
        self._fold(node, 2, channels)

    # --- elementwise ---------------------------------------------------------------------------

    def _clip(self, node: ir.Node, index: np.ndarray) -> None:
        """Passes where only zero bounds it: bounds at 6 would have to move with each channel."""
        for position, name in ((1, "min"), (2, "max")):
            value = node.inputs[position] if position < len(node.inputs) else None
            bound = attribute(node, name) if value is None else constant_scalar(value)
            given = value is not None or name in node.attributes
            open_ = bound is not None and (bound == 0 or abs(bound) > np.finfo(np.float32).max / 2)
            if given and not open_:
                raise Blocked("Clip at a bound that would scale, too")
        self._back(node.inputs[0], index)

    def _sum(self, node: ir.Node, index: np.ndarray) -> None:
        for position, value in enumerate(node.inputs):
            if constant_tensor(value) is not None:
                self._fold(node, position, index)
            else:
                self._back(value, self._operand(value, index))

    def _mul(self, node: ir.Node, index: np.ndarray) -> None:
        for position, value in enumerate(node.inputs):
            if constant_tensor(value) is not None:
                self._fold(node, position, index)
                return
        reason: Blocked | None = None
        for value in node.inputs:
            saved = list(self.folds), self.same_as.copy()
            try:
                self._back(value, self._operand(value, index))
            except Blocked as blocked:
                self.folds, self.same_as = saved
                reason = reason or blocked
            else:
                return
        assert reason is not None
        raise reason

    def _div(self, node: ir.Node, index: np.ndarray) -> None:
        if constant_tensor(node.inputs[1]) is not None:
            self._fold(node, 1, index, inverse=True)
        elif constant_tensor(node.inputs[0]) is not None:
            self._fold(node, 0, index)
        else:
            self._back(node.inputs[0], self._operand(node.inputs[0], index))

    def _operand(self, value: ir.Value | None, index: np.ndarray) -> np.ndarray:
        """The index for an operand of the result's own extent along the scaled axes."""
        rank = None if value is None or value.shape is None else len(value.shape)
        if rank is None or rank > index.ndim:
            raise Blocked("an operand of unknown rank")
        extra = index.ndim - rank
        if math.prod(index.shape[:extra]) != 1:
            raise Blocked("an operand that is broadcast along the channels")
        own = index.reshape(index.shape[extra:])
        self._same_dims(value, own)
        return own

    @staticmethod
    def _same_dims(value: ir.Value | None, index: np.ndarray) -> None:
        if value is None or value.shape is None or len(value.shape) != index.ndim:
            raise Blocked("an operand of unknown rank")
        for dim, size in zip(value.shape.dims, index.shape, strict=True):
            if size != 1 and dim != size:
                raise Blocked("an operand that is broadcast along the channels")

    # --- pooling and moves ---------------------------------------------------------------------

    def _window(self, node: ir.Node, index: np.ndarray) -> None:
        if attribute(node, "coordinate_transformation_mode") == "tf_crop_and_resize":
            raise Blocked("Resize with a value for what lies outside")
        channels = self._tie(index, 1)
        value = node.inputs[0]
        spread = channels.reshape([-1 if i == 1 else 1 for i in range(index.ndim)])
        if len(node.outputs) > 1 and node.outputs[1].uses():
            raise Blocked(f"{node.op_type} with a second result")
        self._same_dims(value, spread)
        self._back(value, spread)

    def _reduction(self, node: ir.Node, index: np.ndarray) -> None:
        value = node.inputs[0]
        axes_input = node.inputs[1] if len(node.inputs) > 1 else None
        constant = constant_array(axes_input)
        axes = attribute(node, "axes") if constant is None else tuple(constant.tolist())
        if axes is None or value is None or value.shape is None:
            raise Blocked(f"{node.op_type} over axes that are not known")
        rank = len(value.shape)
        axes = {axis % rank for axis in axes}
        if not attribute(node, "keepdims", 1):
            index = np.expand_dims(index, tuple(axes))
        self._same_dims(value, index)
        self._back(value, index)

    def _pad(self, node: ir.Node, index: np.ndarray) -> None:
        filler = node.inputs[2] if len(node.inputs) > 2 else None
        zero = attribute(node, "value", 0.0) if filler is None else constant_scalar(filler)
        mode = attribute(node, "mode", "constant")
        if mode == "constant" and zero != 0:
            raise Blocked("Pad with something other than zero")
        self._same_dims(node.inputs[0], index)
        self._back(node.inputs[0], index)

    def _transpose(self, node: ir.Node, index: np.ndarray) -> None:
        perm = attribute(node, "perm", tuple(reversed(range(index.ndim))))
        self._back(node.inputs[0], index.transpose(np.argsort(perm)))

    def _reshape(self, node: ir.Node, index: np.ndarray) -> None:
        """The scaled axes, and all behind them, must be as many elements on either side."""
        value = node.inputs[0]
        before = None if value is None or value.shape is None else value.shape.dims
        after = None if node.outputs[0].shape is None else node.outputs[0].shape.dims
        if before is None or after is None:
            raise Blocked(f"{node.op_type} of unknown shape")
        first = next((i for i, size in enumerate(index.shape) if size != 1), index.ndim - 1)
        tail = _trailing(after, first)
        if tail is None:
            raise Blocked(f"{node.op_type} of unknown shape")
        start = len(before)
        while start > 0 and (_trailing(before, start) or 0) < tail:
            start -= 1
        if _trailing(before, start) != tail:
            raise Blocked(f"{node.op_type} that mixes channels with other axes")
        whole = np.broadcast_to(index, (*index.shape[:first], *_ints(after[first:])))
        moved = whole.reshape([1] * start + _ints(before[start:]))
        self._back(value, _collapsed(moved))

    def _concat(self, node: ir.Node, index: np.ndarray) -> None:
        axis = int(attribute(node, "axis", 0)) % index.ndim
        start = 0
        for position, value in enumerate(node.inputs):
            part = index
            if index.shape[axis] != 1:
                dim = None if value is None or value.shape is None else value.shape.dims[axis]
                if not isinstance(dim, int):
                    raise Blocked("Concat of unknown shape")
                part = index.take(range(start, start + dim), axis=axis)
                start += dim
            if constant_tensor(value) is not None:
                self._fold(node, position, part)
            else:
                self._back(value, part)

    def _split(self, node: ir.Node, result: ir.Value, index: np.ndarray) -> None:
        axis = int(attribute(node, "axis", 0)) % index.ndim
        if index.shape[axis] == 1:
            raise Blocked("Split along another axis than the channels")
        parts = []
        for value in node.outputs:
            dim = None if value.shape is None else value.shape.dims[axis]
            if not isinstance(dim, int):
                raise Blocked("Split of unknown shape")
            size = [dim if i == axis else length for i, length in enumerate(index.shape)]
            parts.append(index if value is result else np.full(size, -1))
        self._back(node.inputs[0], np.concatenate(parts, axis=axis))


def _trailing(dims: Sequence[object], start: int) -> int | None:
    """Elements of the axes from `start`, None where one is not known."""
    known = [d for d in dims[start:] if isinstance(d, int)]
    return math.prod(known) if len(known) == len(dims[start:]) else None


def _ints(dims: Sequence[object]) -> list[int]:
    return [d for d in dims if isinstance(d, int)]


def _collapsed(index: np.ndarray) -> np.ndarray:
    """The index with axes of one where it does not vary along them."""
    for axis in range(index.ndim):
        first = index.take([0], axis=axis)
        if (index == first).all():
            index = first
    return index

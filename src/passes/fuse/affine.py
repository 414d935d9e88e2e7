"""Affine neighbours folded into the weights of a convolution.

Here: BatchNormalization, Mul, Div, Add and Sub with constants, after and before Conv and
ConvTranspose; parallel convolutions of one input. Not here: matrix products (`linear`), constants
that meet constants (`cleanup.algebra`).
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from ...ir.edit import Builder
from ...ir.graph import (
    AbsentTensor,
    attribute,
    constant_array,
    constant_tensor,
    dims_of,
    is_onnx_op,
    static_shape,
)
from ...ir.match import Match, OpPattern, const, op, var
from ..base import Context
from ..rules import RewriteRule, RuleGroup

_CONVS = ("Conv", "ConvTranspose")
_AFFINE = ("Mul", "Div", "Add", "Sub")
_LAZY_BYTES = 64 << 10
_SHARED_BYTES = 1 << 20
"""A shared weight up to this size is copied rather than left with its affine neighbour."""


def _output_channels(node: ir.Node) -> int | None:
    """Channels that a Conv or ConvTranspose writes, from the weight's shape."""
    shape = static_shape(node.inputs[1])
    if shape is None or len(shape) < 3:
        return None
    return shape[0] if node.op_type == "Conv" else shape[1] * attribute(node, "group", 1)


def refuse_weights(node: ir.Node) -> str | None:
    """Why the weight and the bias of a Conv, MatMul or Gemm can't be replaced by new ones."""
    weight = node.inputs[1]
    tensor = constant_tensor(weight)
    if tensor is None:
        return "the weight is not a constant"
    assert weight is not None
    if len(weight.uses()) > 1 and tensor.nbytes > _SHARED_BYTES and not _all_scaled(weight):
        return "the weight is large and shared with another node"
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is not None and constant_tensor(bias) is None:
        return "the bias is not a constant"
    return None


def _all_scaled(weight: ir.Value) -> bool:
    """Whether each user of a weight is followed by a BatchNormalization of its own or an affine
    operator: then no copy of the weight as it is stays behind."""
    users = weight.consumers()
    return len(users) <= 16 and all(
        len(after := user.outputs[0].consumers()) == 1
        and is_onnx_op(after[0], "BatchNormalization", *_AFFINE)
        for user in users
    )


def scaled_conv(
    node: ir.Node, scale: np.ndarray | None, shift: np.ndarray | None, build: Builder
) -> ir.Value:
    """The convolution with output channel c multiplied by `scale[c]`, then `shift[c]` added.

    Both are float64 of shape [output channels], or None. The arithmetic is done in float64 and
    rounded once. Weights without data stay without data: only the bias may be new.
    """
    weight, old_bias = node.inputs[1], node.inputs[2] if len(node.inputs) > 2 else None
    channels = _output_channels(node)
    assert weight is not None
    assert weight.dtype is not None
    assert channels is not None
    new_weight: ir.Value | np.ndarray = weight
    data = constant_array(weight)
    if data is not None and scale is not None:
        new_weight = _scaled_weight(node, data, scale, build)
    bias = np.zeros(channels) if old_bias is None else constant_array(old_bias)
    new_bias: ir.Value | np.ndarray | None
    if data is None or bias is None or (scale is None and shift is None):
        new_bias = old_bias or absent(weight.dtype, (channels,), build)
    else:
        total = bias.astype(np.float64) * (1.0 if scale is None else scale)
        total = total + (0.0 if shift is None else shift)
        new_bias = total.astype(data.dtype)
    return build.node(
        node.op_type,
        node.inputs[0],
        new_weight,
        new_bias,
        **{a.name: a.value for a in node.attributes.values()},
    ).outputs[0]


def _scaled_weight(
    node: ir.Node, data: np.ndarray, scale: np.ndarray, build: Builder
) -> ir.Value | np.ndarray:
    """The weight with the scale in it; a large one is computed when it is read, so that memory
    holds no second set of weights."""
    if data.nbytes < _LAZY_BYTES:
        return _scale_weight(node.op_type, attribute(node, "group", 1), data, scale)
    op_type, groups = node.op_type, attribute(node, "group", 1)
    dtype, shape = ir.DataType.from_numpy(data.dtype), ir.Shape(data.shape)

    def compute() -> ir.Tensor[np.ndarray]:
        return ir.Tensor(_scale_weight(op_type, groups, data, scale), dtype=dtype)

    return build.initializer("scaled", ir.LazyTensor(compute, dtype=dtype, shape=shape))


def _scale_weight(op_type: str, groups: int, data: np.ndarray, scale: np.ndarray) -> np.ndarray:
    wide = data.astype(np.float64)
    if op_type == "Conv":
        scaled = wide * scale.reshape(-1, *([1] * (data.ndim - 1)))
    else:  # ConvTranspose: [in, out / group, ...], groups of the input in order
        split = wide.reshape(groups, data.shape[0] // groups, *data.shape[1:])
        factor = scale.reshape(groups, 1, data.shape[1], *([1] * (data.ndim - 2)))
        scaled = (split * factor).reshape(data.shape)
    result: np.ndarray = scaled.astype(data.dtype)
    return result


def absent(dtype: ir.DataType, shape: tuple[int, ...], build: Builder) -> ir.Value:
    """A new weight without data."""
    tensor = AbsentTensor("folded", dtype, shape, "it is folded from absent weights")
    return build.initializer("folded", tensor)


def norm_affine(m: Match) -> tuple[np.ndarray, np.ndarray] | tuple[None, None]:
    """Scale and shift of the BatchNormalization called `norm`; None without data."""
    arrays = [constant_array(m[name]) for name in ("scale", "bias", "mean", "var")]
    if any(a is None for a in arrays):
        return None, None
    gamma, beta, mean, variance = (np.asarray(a, np.float64) for a in arrays)
    scale = gamma / np.sqrt(variance + m.attribute("norm", "epsilon", 1e-5))
    return scale, beta - mean * scale


def refuse_norm(m: Match) -> str | None:
    """Why the BatchNormalization called `norm` is not just a scale and a shift per channel."""
    norm = m.node("norm")
    if attribute(norm, "training_mode", 0):
        return "it is in training mode"
    if any(v.uses() or v.is_graph_output() for v in norm.outputs[1:]):
        return "its running statistics are used"
    return None


def batch_norm(x: OpPattern | Any) -> OpPattern:
    """BatchNormalization of x with constant parameters, called `norm`."""
    names = ("scale", "bias", "mean", "var")
    return op.BatchNormalization(x, *(const(n, data=False) for n in names), _name="norm")


@dataclasses.dataclass(frozen=True)
class FoldBatchNorm(RewriteRule):
    """BatchNormalization(Conv(x, W, b)) -> Conv(x, W * s, b * s + t), s = scale / sqrt(var + eps).

    Refused where anything stands between (the operators do not commute past a non-linearity), and
    in training mode. Ioffe and Szegedy 2015, arXiv:1502.03167, equation for inference.
    """

    def pattern(self) -> OpPattern:
        conv = op.one_of(_CONVS, var("x"), const("w", data=False), _rest=True, _name="conv")
        return batch_norm(conv)

    def check(self, m: Match, context: Context) -> str | None:
        if reason := refuse_norm(m):
            return reason
        channels = _output_channels(m.node("conv"))
        if channels is None or static_shape(m["scale"]) != (channels,):
            return "its channels are not those of the convolution"
        return refuse_weights(m.node("conv"))

    def rewrite(self, m: Match, build: Builder) -> tuple[ir.Value | None, ...]:
        scale, shift = norm_affine(m)
        value = scaled_conv(m.node("conv"), scale, shift, build)
        return (value, *([None] * (len(m.root.outputs) - 1)))


@dataclasses.dataclass(frozen=True)
class FoldConvScale(RewriteRule):
    """Mul(Conv(x, W, b), c) -> Conv(x, W * c, b * c), c one number or one per channel; Div
    likewise, with 1 / c."""

    def pattern(self) -> tuple[OpPattern, ...]:
        conv = op.one_of(_CONVS, var("x"), const("w", data=False), _rest=True, _name="conv")
        c = const("c", data=False)
        return op.Mul(conv, c), op.Div(conv, c)

    def check(self, m: Match, context: Context) -> str | None:
        return _check_affine(m)

    def rewrite(self, m: Match, build: Builder) -> ir.Value:
        factor = _per_channel(m)
        if factor is not None and m.root.op_type == "Div":
            factor = 1.0 / factor
        conv = m.node("conv")
        if factor is None and (len(conv.inputs) < 3 or conv.inputs[2] is None):
            return build.node(
                conv.op_type,
                *conv.inputs[:2],
                **{a.name: a.value for a in conv.attributes.values()},
            ).outputs[0]
        return scaled_conv(conv, factor, None, build)


@dataclasses.dataclass(frozen=True)
class FoldConvBias(RewriteRule):
    """Add(Conv(x, W, b), c) -> Conv(x, W, b + c), c one number or one per channel; Sub likewise,
    and c - Conv(x, W, b) -> Conv(x, -W, c - b)."""

    def pattern(self) -> tuple[OpPattern, ...]:
        conv = op.one_of(_CONVS, var("x"), const("w", data=False), _rest=True, _name="conv")
        c = const("c", data=False)
        return op.Add(conv, c), op.Sub(conv, c), op.Sub(c, conv)

    def check(self, m: Match, context: Context) -> str | None:
        return _check_affine(m)

    def rewrite(self, m: Match, build: Builder) -> ir.Value:
        shift, conv = _per_channel(m), m.node("conv")
        channels = _output_channels(conv)
        scale = None
        if m.root.op_type == "Sub" and m.root.inputs[1] is m["c"]:
            shift = None if shift is None else -shift
        elif m.root.op_type == "Sub" and channels is not None and shift is not None:
            scale = -np.ones(channels)
        return scaled_conv(conv, scale, shift, build)


def _check_affine(m: Match) -> str | None:
    conv = m.node("conv")
    channels = _output_channels(conv)
    rank = None if conv.outputs[0].shape is None else len(conv.outputs[0].shape)
    shape = static_shape(m["c"])
    if channels is None or rank is None or shape is None:
        return "a shape is not known"
    if len(shape) > rank:
        return "the constant raises the rank"
    padded = (1,) * (rank - len(shape)) + shape
    if any(d != 1 for i, d in enumerate(padded) if i != 1) or padded[1] not in (1, channels):
        return f"the constant of shape {list(shape)} is not one number or one per channel"
    if m.root.op_type == "Div" and (a := constant_array(m["c"])) is not None and not np.all(a):
        return "it divides by zero"
    return refuse_weights(conv)


def _per_channel(m: Match) -> np.ndarray | None:
    channels = _output_channels(m.node("conv"))
    array = constant_array(m["c"])
    assert channels is not None
    if array is None:
        return None
    return np.broadcast_to(array.astype(np.float64).reshape(-1), (channels,))


@dataclasses.dataclass(frozen=True)
class FoldBeforeConv(RewriteRule):
    """Conv(x * c + d, W, b) -> Conv(x, W * c, b + sum(W * d)), one c and d per input channel.

    From Mul, Div, Add, Sub and BatchNormalization. A summand only where the convolution does not
    pad: padding comes after it, and is zero.
    """

    def pattern(self) -> tuple[OpPattern, ...]:
        c = const("c", data=False)
        w = const("w", data=False)
        x = var("x")
        inner = (op.Mul(x, c), op.Div(x, c), op.Add(x, c), op.Sub(x, c), batch_norm(x))
        return tuple(op.Conv(form, w, _rest=True, _name="conv") for form in inner)

    def check(self, m: Match, context: Context) -> str | None:
        conv, producer = m.node("conv"), m.node("conv").inputs[0].producer()  # type: ignore[union-attr]
        w, x = static_shape(m["w"]), dims_of(m["x"])
        if producer is None or w is None or len(w) < 3 or x is None or len(x) != len(w):
            return "a shape is not known"
        channels = w[1] * attribute(conv, "group", 1)
        if "norm" in m.nodes and (reason := refuse_norm(m)):
            return reason
        pads = any(attribute(conv, "pads", ())) or attribute(conv, "auto_pad", "NOTSET") not in (
            "NOTSET",
            "VALID",
        )
        if producer.op_type not in ("Mul", "Div") and pads:
            return "the convolution pads, after the summand"
        if "norm" not in m.nodes:
            shape = static_shape(m["c"])
            if shape is None or len(shape) > len(x):
                return "the shape of the constant is not known, or raises the rank"
            padded = (1,) * (len(x) - len(shape)) + shape
            if any(d != 1 for i, d in enumerate(padded) if i != 1) or padded[1] not in (
                1,
                channels,
            ):
                return "the constant is not one number or one per channel"
            if x[1] != channels:
                return "the constant widens x"
            array = constant_array(m["c"])
            if producer.op_type == "Div" and array is not None and not np.all(array):
                return "it divides by zero"
        return refuse_weights(conv)

    def rewrite(self, m: Match, build: Builder) -> ir.Value:
        conv = m.node("conv")
        producer = conv.inputs[0].producer()  # type: ignore[union-attr]
        assert producer is not None
        weight, bias = m["w"], conv.inputs[2] if len(conv.inputs) > 2 else None
        assert weight.dtype is not None
        groups, data = attribute(conv, "group", 1), constant_array(weight)
        shape = static_shape(weight)
        assert shape is not None
        scale, shift = self._affine(m, producer, shape[1] * groups)
        known = scale is not None or shift is not None
        adds = producer.op_type not in ("Mul", "Div")
        old = None if bias is None else constant_array(bias)
        new_weight: ir.Value | np.ndarray = weight
        new_bias: ir.Value | np.ndarray | None = bias
        if data is not None and known and (bias is None or old is not None or not adds):
            wide = _by_input_channel(data, groups)
            if scale is not None:
                scaled = (wide * _spread(scale, data, groups)).reshape(data.shape)
                new_weight = scaled.astype(data.dtype)
            if shift is not None:
                extra = (wide * _spread(shift, data, groups)).reshape(data.shape[0], -1).sum(1)
                new_bias = (extra + (0.0 if old is None else old)).astype(data.dtype)
        elif adds and bias is None:
            new_bias = absent(weight.dtype, (shape[0],), build)
        options = {a.name: a.value for a in conv.attributes.values()}
        return build.node("Conv", m["x"], new_weight, new_bias, **options).outputs[0]

    @staticmethod
    def _affine(
        m: Match, producer: ir.Node, channels: int
    ) -> tuple[np.ndarray | None, np.ndarray | None]:
        if "norm" in m.nodes:
            return norm_affine(m)
        array = constant_array(m["c"])
        if array is None:
            return None, None
        c = np.broadcast_to(array.astype(np.float64).reshape(-1), (channels,))
        match producer.op_type:
            case "Mul":
                return c, None
            case "Div":
                return 1.0 / c, None
            case "Add":
                return None, c
        return None, -c


def _by_input_channel(data: np.ndarray, groups: int) -> np.ndarray:
    """A convolution's weight as [groups, out / groups, in / groups, ...], in float64."""
    return data.astype(np.float64).reshape(groups, data.shape[0] // groups, *data.shape[1:])


def _spread(values: np.ndarray, data: np.ndarray, groups: int) -> np.ndarray:
    """One number per input channel, to multiply `_by_input_channel` with."""
    return values.reshape(groups, 1, data.shape[1], *([1] * (data.ndim - 2)))


@dataclasses.dataclass(frozen=True)
class AddParallelConvs(RewriteRule):
    """Conv(x, V, a) + Conv(x, W, b) -> Conv(x, V + W, a + b), the smaller kernel centred.

    Where both step, group and dilate alike, and see the same window. A BatchNormalization of x is a
    1x1 convolution of each channel with itself. Ding et al. 2021 (RepVGG), arXiv:2101.03697,
    section 3.3.
    """

    def pattern(self) -> tuple[OpPattern, ...]:
        x = var("x")
        first = op.Conv(x, const("v", data=False), _rest=True, _name="first")
        second = op.Conv(x, const("w", data=False), _rest=True, _name="second")
        return op.Add(first, second), op.Add(first, batch_norm(x))

    def check(self, m: Match, context: Context) -> str | None:
        first = m.node("first")
        if "norm" in m.nodes:
            if reason := refuse_norm(m):
                return reason
            shape = static_shape(m["v"])
            if shape is None or len(shape) < 3:
                return "the shape of the weight is not known"
            if static_shape(m["scale"]) != (shape[0],) or shape[0] != shape[1] * attribute(
                first, "group", 1
            ):
                return "the convolution has another number of channels than x"
            geometry = _Geometry((1,) * (len(shape) - 2), (0,) * (2 * len(shape) - 4))
            strides = attribute(first, "strides", (1,))
            if any(s != 1 for s in strides):
                return "the convolution steps by more than one"
        else:
            second = m.node("second")
            shapes = static_shape(m["v"]), static_shape(m["w"])
            if shapes[0] is None or shapes[1] is None or shapes[0][:2] != shapes[1][:2]:
                return "the weights differ in channels"
            for name, default in (("strides", None), ("dilations", None), ("group", 1)):
                if _attr(first, name, default) != _attr(second, name, default):
                    return f"they differ in {name}"
            if attribute(second, "auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
                return "a padding is not written out"
            geometry = _geometry(second)
            if (reason := refuse_weights(second)) is not None:
                return reason
        if attribute(first, "auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
            return "a padding is not written out"
        dilations = _attr(first, "dilations", None)
        wide = _geometry(first)
        if _margins(wide, geometry, dilations) is None and (
            "norm" in m.nodes or _margins(geometry, wide, dilations) is None
        ):
            return "the kernels are not centred on each other"
        return refuse_weights(first)

    def rewrite(self, m: Match, build: Builder) -> ir.Value:
        first = m.node("first")
        if "norm" in m.nodes:
            kernel, bias = self._identity(m)
            wide, small = first, None
        else:
            second = m.node("second")
            dilations = _attr(first, "dilations", None)
            swap = _margins(_geometry(first), _geometry(second), dilations) is None
            wide, small = (second, first) if swap else (first, second)
            kernel = constant_array(small.inputs[1])
            bias = _bias(small)
        big, total = constant_array(wide.inputs[1]), _bias(wide)
        options = {a.name: a.value for a in wide.attributes.values()}
        weight = wide.inputs[1]
        assert weight is not None
        assert weight.dtype is not None
        new_weight: ir.Value | np.ndarray = weight
        if big is None or kernel is None or bias is None or total is None:
            shape = static_shape(weight)
            assert shape is not None
            new_bias: ir.Value | np.ndarray = absent(weight.dtype, (shape[0],), build)
        else:
            geometry = _Geometry(kernel.shape[2:], (0,) * (2 * kernel.ndim - 4))
            margins = [
                ((w - k) // 2, (w - k) - (w - k) // 2)
                for w, k in zip(big.shape[2:], geometry.kernel, strict=True)
            ]
            padded = np.pad(kernel.astype(np.float64), [(0, 0), (0, 0), *margins])
            new_weight = (big.astype(np.float64) + padded).astype(big.dtype)
            new_bias = (total + bias).astype(big.dtype)
        return build.node("Conv", m["x"], new_weight, new_bias, **options).outputs[0]

    @staticmethod
    def _identity(m: Match) -> tuple[np.ndarray | None, np.ndarray | None]:
        """The kernel and the bias that do what the normalization does."""
        shape = static_shape(m["v"])
        scale, shift = norm_affine(m)
        if scale is None or shape is None:
            return None, None
        kernel = np.zeros((shape[0], shape[1], *([1] * (len(shape) - 2))))
        rows = np.arange(shape[0])
        kernel.reshape(shape[0], shape[1])[rows, rows % shape[1]] = scale
        return kernel, shift


@dataclasses.dataclass(frozen=True)
class _Geometry:
    """Kernel sizes, and pads as ONNX writes them: all beginnings, then all ends."""

    kernel: tuple[int, ...]
    pads: tuple[int, ...]


def _geometry(conv: ir.Node) -> _Geometry:
    shape = static_shape(conv.inputs[1]) or ()
    kernel = shape[2:]
    return _Geometry(kernel, tuple(attribute(conv, "pads", (0,) * (2 * len(kernel)))))


def _margins(wide: _Geometry, small: _Geometry, dilations: tuple[int, ...]) -> list[int] | None:
    """How many elements of the wide kernel lie around the small one, or None where the small one
    is not in its centre."""
    rank = len(wide.kernel)
    margins = []
    for i, (w, k) in enumerate(zip(wide.kernel, small.kernel, strict=True)):
        step = dilations[i]
        margin = (w - k) // 2
        if w < k or (w - k) % 2 or wide.pads[i] - small.pads[i] != margin * step:
            return None
        if wide.pads[rank + i] - small.pads[rank + i] != margin * step:
            return None
        margins.append(margin)
    return margins


def _attr(conv: ir.Node, name: str, default: Any) -> Any:
    rank = len(static_shape(conv.inputs[1]) or (0, 0)) - 2
    return attribute(conv, name, (1,) * rank if default is None else default)


def _bias(conv: ir.Node) -> np.ndarray | None:
    """The bias in float64, zeros where there is none; None without data."""
    value = conv.inputs[2] if len(conv.inputs) > 2 else None
    if value is None:
        return np.zeros((static_shape(conv.inputs[1]) or (0,))[0])
    array = constant_array(value)
    return None if array is None else array.astype(np.float64)


@dataclasses.dataclass(frozen=True)
class FoldAffine(RuleGroup):
    """Folds BatchNormalization, constant factors and summands into the convolution before them,
    and adds up parallel convolutions. What stands before a convolution is folded later
    (`FoldLinear`), once activations that end in a factor are recognized.

    BatchNormalization(Conv(x, W))   ->   Conv(x, W', b')
    """

    stage: ClassVar = RewriteRule.stage
    rules: ClassVar[tuple[type[RewriteRule], ...]] = (
        FoldBatchNorm,
        FoldConvScale,
        FoldConvBias,
        AddParallelConvs,
    )

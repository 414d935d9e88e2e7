"""Affine neighbours folded into the weights of a convolution: BatchNormalization, Mul, Add."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from ...ir.edit import Builder
from ...ir.graph import AbsentTensor, attribute, constant_array, constant_tensor, static_shape
from ...ir.match import Match, OpPattern, const, op, var
from ..base import Context
from ..rules import RewriteRule, RuleGroup

_CONVS = ("Conv", "ConvTranspose")


def _output_channels(node: ir.Node) -> int | None:
    """Channels that a Conv or ConvTranspose writes, from the weight's shape."""
    shape = static_shape(node.inputs[1])
    if shape is None or len(shape) < 3:
        return None
    return shape[0] if node.op_type == "Conv" else shape[1] * attribute(node, "group", 1)


def _weight_is_private(node: ir.Node) -> str | None:
    """Why the weight can't be changed; a new one is made, so sharing would only cost bytes."""
    weight = node.inputs[1]
    if constant_tensor(weight) is None:
        return "the weight is not a constant"
    assert weight is not None
    if len(weight.uses()) > 1:
        return "the weight is shared with another node"
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is not None and constant_tensor(bias) is None:
        return "the bias is not a constant"
    return None


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
        new_weight = _scale_weight(node, data, scale)
    bias = np.zeros(channels) if old_bias is None else constant_array(old_bias)
    new_bias: ir.Value | np.ndarray | None
    if data is None or bias is None or (scale is None and shift is None):
        new_bias = old_bias or _absent_bias(weight.dtype, channels, build)
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


def _scale_weight(node: ir.Node, data: np.ndarray, scale: np.ndarray) -> np.ndarray:
    wide = data.astype(np.float64)
    if node.op_type == "Conv":
        scaled = wide * scale.reshape(-1, *([1] * (data.ndim - 1)))
    else:  # ConvTranspose: [in, out / group, ...], groups of the input in order
        groups = attribute(node, "group", 1)
        split = wide.reshape(groups, data.shape[0] // groups, *data.shape[1:])
        factor = scale.reshape(groups, 1, data.shape[1], *([1] * (data.ndim - 2)))
        scaled = (split * factor).reshape(data.shape)
    result: np.ndarray = scaled.astype(data.dtype)
    return result


def _absent_bias(dtype: ir.DataType, channels: int, build: Builder) -> ir.Value:
    tensor = AbsentTensor("bias", dtype, [channels], "it is folded from absent weights")
    return build.initializer("bias", tensor)


@dataclasses.dataclass(frozen=True)
class FoldBatchNorm(RewriteRule):
    """BatchNormalization(Conv(x, W, b)) -> Conv(x, W * s, b * s + t), s = scale / sqrt(var + eps).

    Refused where anything stands between (the operators do not commute past a non-linearity), and
    in training mode. Ioffe and Szegedy 2015, arXiv:1502.03167, equation for inference.
    """

    def pattern(self) -> OpPattern:
        return op.BatchNormalization(
            op.one_of(_CONVS, var("x"), const("w", data=False), _rest=True, _name="conv"),
            const("scale", data=False),
            const("bias", data=False),
            const("mean", data=False),
            const("var", data=False),
            _name="norm",
        )

    def check(self, m: Match, context: Context) -> str | None:
        if m.attribute("norm", "training_mode", 0):
            return "it is in training mode"
        if any(v.uses() or v.is_graph_output() for v in m.root.outputs[1:]):
            return "its running statistics are used"
        channels = _output_channels(m.node("conv"))
        if channels is None or static_shape(m["scale"]) != (channels,):
            return "its channels are not those of the convolution"
        return _weight_is_private(m.node("conv"))

    def rewrite(self, m: Match, build: Builder) -> tuple[ir.Value | None, ...]:
        arrays = [constant_array(m[name]) for name in ("scale", "bias", "mean", "var")]
        scale = shift = None
        if all(a is not None for a in arrays):
            gamma, beta, mean, variance = (np.asarray(a, np.float64) for a in arrays)
            scale = gamma / np.sqrt(variance + m.attribute("norm", "epsilon", 1e-5))
            shift = beta - mean * scale
        value = scaled_conv(m.node("conv"), scale, shift, build)
        return (value, *([None] * (len(m.root.outputs) - 1)))


@dataclasses.dataclass(frozen=True)
class FoldConvScale(RewriteRule):
    """Mul(Conv(x, W, b), c) -> Conv(x, W * c, b * c), c one number or one per channel."""

    def pattern(self) -> OpPattern:
        return op.Mul(op.one_of(_CONVS, var("x"), const("w"), _rest=True, _name="conv"), const("c"))

    def check(self, m: Match, context: Context) -> str | None:
        return _check_affine(m)

    def rewrite(self, m: Match, build: Builder) -> ir.Value:
        return scaled_conv(m.node("conv"), _per_channel(m), None, build)


@dataclasses.dataclass(frozen=True)
class FoldConvBias(RewriteRule):
    """Add(Conv(x, W, b), c) -> Conv(x, W, b + c), c one number or one per channel."""

    def pattern(self) -> OpPattern:
        return op.Add(op.one_of(_CONVS, var("x"), const("w"), _rest=True, _name="conv"), const("c"))

    def check(self, m: Match, context: Context) -> str | None:
        return _check_affine(m)

    def rewrite(self, m: Match, build: Builder) -> ir.Value:
        return scaled_conv(m.node("conv"), None, _per_channel(m), build)


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
    return _weight_is_private(conv)


def _per_channel(m: Match) -> np.ndarray:
    channels = _output_channels(m.node("conv"))
    assert channels is not None
    return np.broadcast_to(m.array("c").astype(np.float64).reshape(-1), (channels,))


@dataclasses.dataclass(frozen=True)
class FoldAffine(RuleGroup):
    """Folds BatchNormalization, a constant factor and a constant summand into the convolution
    before them.

    BatchNormalization(Conv(x, W))   ->   Conv(x, W', b')
    """

    stage: ClassVar = RewriteRule.stage
    rules: ClassVar[tuple[type[RewriteRule], ...]] = (FoldBatchNorm, FoldConvScale, FoldConvBias)

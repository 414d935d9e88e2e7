"""Convolutions with what follows them inside: an activation, a residual sum.

Here: the rules that write com.microsoft FusedConv, and which values ONNX Runtime keeps in its
blocked layout. Not here: products (`products`), what is folded into weights (`passes.fuse.affine`).
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from ...ir.edit import Builder
from ...ir.graph import (
    CONTRIB_DOMAIN,
    attribute,
    constant_scalar,
    constant_tensor,
    dims_of,
    static_shape,
)
from ...ir.match import Match, OpPattern, any_of, op, var
from ..base import Context, Stage
from ..rules import RewriteRule
from .conditions import options_of, refusal

_ACTIVATIONS = ("Relu", "Sigmoid", "Tanh", "LeakyRelu", "HardSigmoid", "HardSwish", "Clip")
_DEPTH = 8


def _conv() -> OpPattern:
    return op.Conv(var("x"), var("w"), _rest=True, _name="conv")


def _fused_conv() -> OpPattern:
    return op.FusedConv(var("x"), var("w"), _rest=True, _name="conv", _domain=CONTRIB_DOMAIN)


@dataclasses.dataclass(frozen=True)
class ConvActivation(RewriteRule):
    """Relu(Conv(x, W, b)) -> com.microsoft.FusedConv(x, W, b, activation="Relu").

    Also Sigmoid, Tanh, LeakyRelu, HardSigmoid, Clip and HardSwish. ONNX Runtime does the same at
    its extended level, but for HardSwish: with it inside, a 1x1 convolution takes 0.91x and a
    depthwise one 0.83x the time (x86-64, one thread, 28 x 28 x 64). Its blocked layouts take
    FusedConv as they take Conv (seen with 1.32, ResNet-34, MobileNetV2 and EfficientNet: the same
    kernels, and times within 1 %).
    """

    stage: ClassVar[Stage] = Stage.LOWER

    def pattern(self) -> OpPattern:
        conv = any_of(_conv(), _fused_conv())
        return op.one_of(_ACTIVATIONS, conv, _rest=True, _name="activation")

    def check(self, m: Match, context: Context) -> str | None:
        conv = m.node("conv")
        if attribute(conv, "activation") is not None:
            return "the convolution has an activation already"
        if activation_parameters(m.node("activation")) is None:
            return "its bounds are not constant numbers"
        return refusal(m, context, "FusedConv", conv.inputs)

    def rewrite(self, m: Match, build: Builder) -> ir.Value:
        conv, activation = m.node("conv"), m.node("activation")
        value: ir.Value = build.FusedConv(
            *conv.inputs,
            **options_of(conv),
            activation=activation.op_type,
            activation_params=activation_parameters(activation) or None,
            _domain=CONTRIB_DOMAIN,
        )
        return value


def activation_parameters(node: ir.Node) -> list[float] | None:
    """What the runtime's fused operators call `activation_params`; None where it isn't constant."""

    def number(name: str, default: float) -> float:
        found = node.attributes.get(name)
        return default if found is None else float(found.as_float())

    if node.op_type == "LeakyRelu":
        return [number("alpha", 0.01)]
    if node.op_type == "HardSigmoid":
        return [number("alpha", 0.2), number("beta", 0.5)]
    if node.op_type == "HardSwish":
        return [1 / 6, 0.5]
    if node.op_type != "Clip":
        return []
    limits = []
    highest = float(np.finfo(np.float32).max)
    for index, default in ((1, -highest), (2, highest)):
        bound = node.inputs[index] if index < len(node.inputs) else None
        limit = default if bound is None else constant_scalar(bound)
        if limit is None:
            return None
        limits.append(float(limit))
    return limits


@dataclasses.dataclass(frozen=True)
class ConvResidual(RewriteRule):
    """Add(Conv(x, W, b), z) -> FusedConv(x, W, b, z), z of the result's shape and in its layout.

    Refused where the convolution can have the blocked layout and z has not: the runtime leaves such
    a FusedConv unblocked, 1.22x the time (x86-64, one thread, 3x3, 28 x 28 x 64). It does so too
    where there is a summand but no bias; hence the bias of zeros.
    """

    stage: ClassVar[Stage] = Stage.LOWER

    def pattern(self) -> OpPattern:
        return op.Add(_conv(), var("z"))

    def check(self, m: Match, context: Context) -> str | None:
        conv, z = m.node("conv"), m["z"]
        dims = dims_of(conv.outputs[0])
        if constant_tensor(z) is not None:
            return "the summand is a constant"
        if static_shape(m["w"]) is None:
            return "the number of channels is not known"
        if dims is None or dims_of(z) != dims:
            return "the summand has not the shape of the convolution's result"
        if any(not isinstance(d, int) and d.value is None for d in dims):
            return "a dimension is not known"
        if _has_blocked_layout(context) and _blocks(conv) and not is_blocked(z):
            return "the summand is not in the blocked layout that the convolution would have"
        bias = conv.inputs[2] if len(conv.inputs) > 2 else None
        return refusal(m, context, "FusedConv", (m["x"], m["w"], bias, z))

    def rewrite(self, m: Match, build: Builder) -> ir.Value:
        conv = m.node("conv")
        bias = conv.inputs[2] if len(conv.inputs) > 2 else None
        shape = static_shape(m["w"])
        assert shape is not None
        value: ir.Value = build.FusedConv(
            m["x"],
            m["w"],
            np.zeros(shape[0], np.float32) if bias is None else bias,
            m["z"],
            **options_of(conv),
            _domain=CONTRIB_DOMAIN,
        )
        return value


def _has_blocked_layout(context: Context) -> bool:
    """Not on arm64: the optimized graphs that the runtime saves there keep every Conv as it is
    (seen with 1.32 in emulation)."""
    return context.target is None or context.target.hardware.arch != "aarch64"


def _blocks(conv: ir.Node) -> bool:
    """Whether ONNX Runtime's layout optimizer would take the convolution, on AVX2 or AVX-512.

    Seen in the graphs that 1.32 saves: two spatial axes, constant weights; channels in multiples of
    4 (or an image's few), and of the block of 8 or 16 in groups.
    """
    shape = static_shape(conv.inputs[1])
    if shape is None or len(shape) != 4 or constant_tensor(conv.inputs[1]) is None:
        return False
    groups, out, each = int(attribute(conv, "group", 1)), shape[0], shape[1]
    if groups == 1:
        return each % 4 == 0 or each < 8
    if each == 1 and out == groups:
        return out % 8 == 0
    return each % 8 == 0 and (out // groups) % 8 == 0


def is_blocked(value: ir.Value, depth: int = _DEPTH) -> bool:
    """Whether the runtime surely holds the value in its blocked layout."""
    node = value.producer()
    shape = value.shape
    if node is None or shape is None or len(shape) != 4 or not depth:
        return False
    if node.op_type in ("Conv", "FusedConv"):
        if not _blocks(node):
            return False
        summand = node.inputs[3] if len(node.inputs) > 3 else None
        return summand is None or is_blocked(summand, depth - 1)
    sources = [v for v in node.inputs if v is not None]
    if node.op_type in ("MaxPool", "AveragePool", "BatchNormalization"):
        return is_blocked(sources[0], depth - 1)
    if node.op_type == "Concat":
        whole = all(type(c := v.shape[1]) is int and c % 16 == 0 for v in sources if v.shape)
        return (
            attribute(node, "axis") == 1
            and whole
            and all(is_blocked(v, depth - 1) for v in sources)
        )
    if node.op_type == "Add":
        same = len({dims_of(v) for v in sources}) == 1
        return same and all(is_blocked(v, depth - 1) for v in sources)
    return False

"""Convolution and its activation in one node, as ONNX Runtime would fuse them when it loads."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from ...ir.edit import Builder
from ...ir.graph import CONTRIB_DOMAIN, constant_scalar
from ...ir.match import Match, OpPattern, op, var
from ..base import Context, Stage
from ..operators import missing_operator
from ..rules import RewriteRule

_ACTIVATIONS = ("Relu", "Sigmoid", "Tanh", "LeakyRelu", "HardSigmoid", "Clip")


@dataclasses.dataclass(frozen=True)
class ConvActivation(RewriteRule):
    """Relu(Conv(x, W, b)) -> FusedConv(x, W, b, activation="Relu"); also Sigmoid, Tanh, LeakyRelu,
    HardSigmoid and Clip.

    ONNX Runtime does the same at its extended level, and its blocked layouts take FusedConv as
    they take Conv (seen with 1.32, ResNet-34, MobileNetV2 and EfficientNet: the same kernels, and
    times within 1 %). Beside Q/DQ pairs nothing is fused: there it becomes QLinearConv.
    """

    stage: ClassVar[Stage] = Stage.LOWER

    def pattern(self) -> OpPattern:
        conv = op.Conv(var("x"), var("w"), _rest=True, _name="conv")
        return op.one_of(_ACTIVATIONS, conv, _rest=True, _name="activation")

    def check(self, m: Match, context: Context) -> str | None:
        conv, activation = m.node("conv"), m.node("activation")
        if reason := beside_quantization(conv, activation):
            return reason
        if activation_parameters(activation) is None:
            return "its bounds are not constant numbers"
        return missing_operator(context, "FusedConv", conv.inputs, domain=CONTRIB_DOMAIN)

    def rewrite(self, m: Match, build: Builder) -> ir.Value:
        conv, activation = m.node("conv"), m.node("activation")
        value: ir.Value = build.FusedConv(
            *conv.inputs,
            **{a.name: a.value for a in conv.attributes.values()},
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


def beside_quantization(*nodes: ir.Node) -> str | None:
    """Why nodes stay apart: the first reads dequantized values, or the last is quantized."""
    for value in nodes[0].inputs:
        producer = None if value is None else value.producer()
        if producer is not None and producer.op_type == "DequantizeLinear":
            return "its inputs are dequantized: the runtime fuses it into an integer operator"
    for user in nodes[-1].outputs[0].consumers():
        if user.op_type == "QuantizeLinear":
            return "its result is quantized: the runtime fuses it into an integer operator"
    return None

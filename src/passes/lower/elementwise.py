"""Elementwise chains as one kernel of ONNX Runtime: gated activations, biased GELU, affine maps.

Here: the rules that write QuickGelu, BiasGelu, FastGelu with a bias, and BatchNormalization for a
scale and a shift per channel; and the sum that stays apart from a LayerNormalization. Not here:
standard activations (`passes.fuse.activations`).
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from ...ir.edit import Builder
from ...ir.graph import (
    CONTRIB_DOMAIN,
    AbsentTensor,
    attribute,
    constant_array,
    constant_scalar,
    constant_tensor,
    dims_of,
    static_shape,
)
from ...ir.match import Match, OpPattern, any_of, const, op, var
from ..base import Context, Stage
from ..rules import RewriteRule
from .conditions import refusal


@dataclasses.dataclass(frozen=True)
class QuickGeluForm(RewriteRule):
    """x * Sigmoid(alpha * x) -> com.microsoft.QuickGelu(x, alpha); SiLU has alpha 1.

    ONNX Runtime does so itself, and is right to: without it cs3darknet_focus_m takes 1.03x and
    tf_efficientnet_b0 1.11x the time (x86-64, one thread). arXiv:1606.08415, section 2.
    """

    stage: ClassVar[Stage] = Stage.LOWER

    def pattern(self) -> tuple[OpPattern, ...]:
        x = var("x")
        return (
            op.Mul(x, op.Sigmoid(x)),
            op.Mul(x, op.Sigmoid(op.Mul(x, const("alpha")))),
        )

    def check(self, m: Match, context: Context) -> str | None:
        if "alpha" in m.values and (
            constant_scalar(m["alpha"]) is None
            or len(m["alpha"].shape or ()) > len(dims_of(m["x"]) or ())
        ):
            return "alpha is not one number"
        return refusal(m, context, "QuickGelu", (m["x"],))

    def rewrite(self, m: Match, build: Builder) -> ir.Value:
        alpha = float(constant_scalar(m["alpha"]) or 0.0) if "alpha" in m.values else 1.0
        return build.node("QuickGelu", m["x"], alpha=alpha, _domain=CONTRIB_DOMAIN).outputs[0]


@dataclasses.dataclass(frozen=True)
class BiasGelu(RewriteRule):
    """Gelu(Add(x, b)) -> com.microsoft.BiasGelu(x, b), b of the last axis's size.

    With approximate="tanh", FastGelu(x, b). Refused where x is a MatMul of static shape: of that
    and the Add the runtime makes a Gemm, and BiasGelu instead takes 1.02x the time (x86-64, one
    thread, 128 x 384 x 1536).
    """

    stage: ClassVar[Stage] = Stage.LOWER

    def pattern(self) -> tuple[OpPattern, ...]:
        shifted = op.Add(var("x"), const("b", data=False))
        return (
            op.Gelu(shifted, _name="gelu"),
            op.Gelu(shifted, _name="gelu", _domain=CONTRIB_DOMAIN),
            op.FastGelu(shifted, _name="gelu", _domain=CONTRIB_DOMAIN),
        )

    def check(self, m: Match, context: Context) -> str | None:
        dims, bias = dims_of(m["x"]), static_shape(m["b"])
        if not dims or bias is None or len(bias) != 1 or dims[-1] != bias[0]:
            return "the summand is not one number per element of the last axis"
        producer = m["x"].producer()
        if producer is not None and producer.op_type == "MatMul" and static_shape(m["x"]):
            return "the runtime makes a Gemm of the MatMul and the Add"
        return refusal(m, context, _gelu_operator(m), (m["x"], m["b"]))

    def rewrite(self, m: Match, build: Builder) -> ir.Value:
        operator = _gelu_operator(m)
        return build.node(operator, m["x"], m["b"], _domain=CONTRIB_DOMAIN).outputs[0]


def _gelu_operator(m: Match) -> str:
    node = m.node("gelu")
    fast = node.op_type == "FastGelu" or attribute(node, "approximate", "none") == "tanh"
    return "FastGelu" if fast else "BiasGelu"


@dataclasses.dataclass(frozen=True)
class SumBeforeNorm(RewriteRule):
    """LayerNormalization(Add(a, b)) -> LayerNormalization(Sum(a, b)).

    ONNX Runtime turns the former into SkipLayerNormalization, whose CPU kernel takes 6 to 7 times
    as long as the two nodes (x86-64, one thread: 64 x 768, 246 us and 37 us). It knows no Sum, and
    a Sum of two is as fast as an Add. For the same reason no rule writes SkipLayerNormalization,
    nor SkipSimplifiedLayerNormalization (2.2 times) or EmbedLayerNormalization.
    """

    stage: ClassVar[Stage] = Stage.LOWER

    def pattern(self) -> OpPattern:
        total = op.Add(var("a"), var("b"), _name="add")
        return op.LayerNormalization(total, _rest=True, _name="norm")

    def check(self, m: Match, context: Context) -> str | None:
        a, b = dims_of(m["a"]), dims_of(m["b"])
        if a is None or a != b:
            return "the summands have not the same shape"
        if any(constant_tensor(m[name]) is not None for name in ("a", "b")):
            return "a summand is a constant"
        return refusal(m, context, "Sum", (m["a"], m["b"]), domain="", float_root=True)

    def rewrite(self, m: Match, build: Builder) -> tuple[ir.Value | None, ...]:
        norm, add = m.node("norm"), m.node("add")
        total = build.Sum(m["a"], m["b"])
        total.type, total.shape = add.outputs[0].type, add.outputs[0].shape
        options = {a.name: a.value for a in norm.attributes.values()}
        made = build.node(
            "LayerNormalization", total, *norm.inputs[1:], _outputs=len(norm.outputs), **options
        )
        return tuple(made.outputs)


# --- affine maps by channel ------------------------------------------------------------------

_CANCELLING = 16.0
"""The greatest shift, in units of the result, that may go before the scale: above it the product
rounds off what the difference would keep."""

_Affine = tuple[np.ndarray, np.ndarray]


@dataclasses.dataclass(frozen=True)
class AffineByChannel(RewriteRule):
    """Add(Mul(x, s), t) -> BatchNormalization(x, s, t, 0, 1, epsilon=0), s and t per channel.

    Also Sub, Div and either order, and a third such node behind it. 0.4 to 0.7 times the time of
    the two nodes (x86-64, one thread, six shapes), and the blocked layout knows it.
    """

    stage: ClassVar[Stage] = Stage.LOWER

    def pattern(self) -> tuple[OpPattern, ...]:
        first, second = const("first", data=False), const("second", data=False)
        inner = any_of(
            op.one_of(("Add", "Mul"), var("x"), first, _name="inner"),
            op.one_of(("Sub", "Div"), var("x"), first, _name="inner"),
        )
        params = (const("s", data=False), const("t", data=False), const("m"), const("v"))
        norm = op.BatchNormalization(var("x"), *params, _name="norm")
        return tuple(
            op.one_of(names, before, second)
            for before in (inner, norm)
            for names in (("Add", "Mul"), ("Sub", "Div"))
        )

    def check(self, m: Match, context: Context) -> str | None:
        dims = dims_of(m["x"])
        if dims is None or len(dims) < 2 or not isinstance(dims[1], int):
            return "the number of channels is not known"
        if "norm" in m.nodes and not _is_affine(m):
            return "the normalization is a real one, with statistics"
        for name in ("first", "second"):
            if name in m.values and _by_channel(m[name], len(dims), dims[1]) is None:
                return f"a constant of shape {static_shape(m[name])} is not one number per channel"
        if "inner" in m.nodes and _factors_only(m):
            return "there is no shift, or no scale"
        if not _is_finite(m):
            return "a factor is not finite in float32"
        if _cancels(m):
            return f"the shift comes first, and is over {_CANCELLING:g} in units of the result"
        return refusal(m, context, "BatchNormalization", [m["x"]] * 5, domain="")

    def rewrite(self, m: Match, build: Builder) -> ir.Value:
        dims = dims_of(m["x"])
        assert dims is not None
        channels = dims[1]
        assert isinstance(channels, int)
        composed = _compose(m)
        parameters: list[ir.Value | np.ndarray]
        if composed is None:
            parameters = [_absent(channels, build), _absent(channels, build)]
        else:
            parameters = [
                np.ascontiguousarray(np.broadcast_to(a, channels), np.float32) for a in composed
            ]
        zeros, ones = np.zeros(channels, np.float32), np.ones(channels, np.float32)
        value: ir.Value = build.BatchNormalization(m["x"], *parameters, zeros, ones, epsilon=0.0)
        return value


def _is_affine(m: Match) -> bool:
    node = m.node("norm")
    plain = (m.array("m") == 0).all() and (m.array("v") == 1).all()
    return bool(plain) and attribute(node, "epsilon", 1e-5) == 0 and len(node.outputs) == 1


def _factors_only(m: Match) -> bool:
    """Whether the two nodes are both scales or both shifts, which could be one node."""
    scales = [node.op_type in ("Mul", "Div") for node in (m.node("inner"), m.root)]
    return scales[0] == scales[1]


def _by_channel(value: ir.Value, rank: int, channels: int) -> tuple[int, ...] | None:
    """The shape of a constant that is one number, or one for each entry of axis 1."""
    shape = static_shape(value)
    if shape is None or len(shape) > rank:
        return None
    padded = (1,) * (rank - len(shape)) + shape
    others = [d for i, d in enumerate(padded) if i != 1]
    return shape if padded[1] in (1, channels) and all(d == 1 for d in others) else None


def _step(node: ir.Node, value: ir.Value) -> _Affine | None:
    """(scale, shift) of one node; None where its constant has no data."""
    data = constant_array(value)
    if data is None:
        return None
    c = data.astype(np.float64).reshape(-1)
    zero, one = np.zeros(1), np.ones(1)
    with np.errstate(divide="ignore"):
        match node.op_type:
            case "Add":
                return one, c
            case "Sub":
                return one, -c
            case "Mul":
                return c, zero
            case _:
                return 1 / c, zero


def _compose(m: Match) -> _Affine | None:
    if "norm" in m.nodes:
        s, t = constant_array(m["s"]), constant_array(m["t"])
        before = None if s is None or t is None else (s.astype(np.float64), t.astype(np.float64))
    else:
        before = _step(m.node("inner"), m["first"])
    after = _step(m.root, m["second"])
    if before is None or after is None:
        return None
    with np.errstate(invalid="ignore", over="ignore"):
        return before[0] * after[0], before[1] * after[0] + after[1]


def _cancels(m: Match) -> bool:
    composed = _compose(m)
    shift_first = "inner" in m.nodes and m.node("inner").op_type in ("Add", "Sub")
    if composed is None or not shift_first:
        return False
    return bool(np.abs(composed[1]).max() > _CANCELLING)


def _is_finite(m: Match) -> bool:
    """Whether the composed scale and shift are finite in float32, as far as they are known."""
    composed = _compose(m)
    limit = np.finfo(np.float32).max
    return composed is None or all(bool((np.abs(a) <= limit).all()) for a in composed)


def _absent(channels: int, build: Builder) -> ir.Value:
    reason = "it is composed of absent weights"
    return build.initializer(
        "affine", AbsentTensor("affine", ir.DataType.FLOAT, [channels], reason)
    )

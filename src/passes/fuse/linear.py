"""Affine neighbours folded into the weights of a matrix product.

Here: Mul, Div, Add, Sub and BatchNormalization with constants, after and before MatMul and Gemm
with a constant right side. Not here: convolutions (`affine`), the forms of a product (`gemm`).
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from ...ir.edit import Builder
from ...ir.graph import attribute, constant_array, dims_of, static_shape
from ...ir.match import Match, OpPattern, const, op, var
from ..base import Context
from ..cleanup.algebra import DivideByFactor, MergeFactors, MergeSummands
from ..rules import RewriteRule, RuleGroup
from .affine import FoldBeforeConv, absent, batch_norm, norm_affine, refuse_norm, refuse_weights

_PRODUCTS = ("MatMul", "Gemm")


def _columns(node: ir.Node) -> int | None:
    """Columns of the product of a MatMul or Gemm with a matrix of constants."""
    shape = static_shape(node.inputs[1])
    if shape is None or len(shape) != 2:
        return None
    return shape[0] if attribute(node, "transB", 0) else shape[1]


def _refuse_vector(value: ir.Value, size: int, rank: int) -> str | None:
    """Why a constant is not one number, or one for each of the `size` last elements."""
    shape = static_shape(value)
    if shape is None or len(shape) > rank:
        return "the shape of the constant is not known, or raises the rank"
    if shape and (any(d != 1 for d in shape[:-1]) or shape[-1] not in (1, size)):
        return f"the constant of shape {list(shape)} is not one number or one per column"
    return None


def _vector(value: ir.Value, size: int) -> np.ndarray | None:
    array = constant_array(value)
    if array is None:
        return None
    return np.broadcast_to(array.astype(np.float64).reshape(-1), (size,))


def _refuse_product(node: ir.Node) -> str | None:
    dtype = node.outputs[0].dtype
    if dtype is None or not dtype.is_floating_point():
        return f"it computes in {dtype}"
    if _columns(node) is None:
        return "the right side is not a matrix"
    return refuse_weights(node)


def _scaled_weight(
    node: ir.Node, factor: np.ndarray | None, axis: int, build: Builder
) -> ir.Value | np.ndarray:
    """The weight with its rows (axis 0) or columns (axis 1) multiplied; as it is without data."""
    weight = node.inputs[1]
    assert weight is not None
    data = constant_array(weight)
    if data is None or factor is None:
        return weight
    axis = 1 - axis if attribute(node, "transB", 0) else axis
    wide = data.astype(np.float64) * (factor[None, :] if axis == 1 else factor[:, None])
    result: np.ndarray = wide.astype(data.dtype)
    return result


def _times(
    bias: ir.Value | None, factor: np.ndarray | None, *, size: int
) -> ir.Value | np.ndarray | None:
    """A bias multiplied; as it is without data."""
    data = constant_array(bias)
    if bias is None or data is None or factor is None:
        return bias
    wide = np.broadcast_to(data.astype(np.float64), (*data.shape[:-1], size)) * factor
    result: np.ndarray = wide.astype(data.dtype)
    return result


def _factor(m: Match, size: int) -> np.ndarray | None:
    factor = _vector(m["c"], size)
    divides = "divide" in m.nodes
    return 1.0 / factor if divides and factor is not None else factor


def _refuse_divisor(m: Match) -> str | None:
    array = constant_array(m["c"])
    if "divide" in m.nodes and array is not None and not np.all(array):
        return "it divides by zero"
    return None


@dataclasses.dataclass(frozen=True)
class ScaleAfterProduct(RewriteRule):
    """MatMul(x, W) * c -> MatMul(x, W * c); (MatMul(x, W) + b) * c -> MatMul(x, W * c) + b * c;
    Gemm(x, W, b) * c -> Gemm(x, W * c, b * c). c is one number or one per column; Div likewise."""

    def pattern(self) -> tuple[OpPattern, ...]:
        c, w = const("c", data=False), const("w", data=False)
        plain = op.one_of(_PRODUCTS, var("x"), w, _rest=True, _name="product")
        summed = op.Add(op.MatMul(var("x"), w, _name="product"), const("b", data=False))
        return tuple(
            form
            for inner in (plain, summed)
            for form in (op.Mul(inner, c), op.Div(inner, c, _name="divide"))
        )

    def check(self, m: Match, context: Context) -> str | None:
        node, out = m.node("product"), dims_of(m.node("product").outputs[0])
        size = _columns(node)
        if out is None or size is None:
            return "a shape is not known"
        if (reason := _refuse_product(node)) or (reason := _refuse_divisor(m)):
            return reason
        if "b" in m.values and (reason := _refuse_vector(m["b"], size, len(out))):
            return f"as a summand, {reason}"
        bias = static_shape(node.inputs[2]) if len(node.inputs) > 2 else ()
        if bias is None or (len(bias) > 1 and bias[0] != 1):
            return "the bias is not one number per column"
        return _refuse_vector(m["c"], size, len(out))

    def rewrite(self, m: Match, build: Builder) -> ir.Value:
        node = m.node("product")
        size = _columns(node)
        assert size is not None
        factor = _factor(m, size)
        inputs = [m["x"], _scaled_weight(node, factor, 1, build)]
        if len(node.inputs) > 2 and node.inputs[2] is not None:
            bias = _times(node.inputs[2], factor, size=size)
            assert bias is not None
            inputs.append(bias)
        options = {a.name: a.value for a in node.attributes.values()}
        value = build.node(node.op_type, *inputs, **options).outputs[0]
        if "b" not in m.values:
            return value
        value.type, value.shape = node.outputs[0].type, node.outputs[0].shape
        result: ir.Value = build.Add(value, _times(m["b"], factor, size=size))
        return result


@dataclasses.dataclass(frozen=True)
class ScaleBeforeProduct(RewriteRule):
    """MatMul(x * c, W) -> MatMul(x, c * W), c one number or one per row of W; Div, Gemm too."""

    def pattern(self) -> tuple[OpPattern, ...]:
        c, w, x = const("c", data=False), const("w", data=False), var("x")
        return tuple(
            op.one_of(_PRODUCTS, inner, w, _rest=True, _name="product")
            for inner in (op.Mul(x, c), op.Div(x, c, _name="divide"))
        )

    def check(self, m: Match, context: Context) -> str | None:
        node, x = m.node("product"), dims_of(m["x"])
        shape = static_shape(m["w"])
        if (reason := _refuse_product(node)) or (reason := _refuse_divisor(m)):
            return reason
        if x is None or shape is None or attribute(node, "transA", 0):
            return "a shape is not known, or x is transposed"
        rows = shape[1] if attribute(node, "transB", 0) else shape[0]
        if not x or x[-1] != rows:
            return "the constant widens x"
        return _refuse_vector(m["c"], rows, len(x))

    def rewrite(self, m: Match, build: Builder) -> ir.Value:
        node, shape = m.node("product"), static_shape(m["w"])
        assert shape is not None
        rows = shape[1] if attribute(node, "transB", 0) else shape[0]
        weight = _scaled_weight(node, _factor(m, rows), 0, build)
        options = {a.name: a.value for a in node.attributes.values()}
        return build.node(node.op_type, m["x"], weight, *node.inputs[2:], **options).outputs[0]


@dataclasses.dataclass(frozen=True)
class ShiftAfterGemm(RewriteRule):
    """Gemm(x, W, b) + c -> Gemm(x, W, b + c), Sub likewise; BatchNormalization(Gemm(x, W, b)) ->
    Gemm(x, W * s, b * s + t)."""

    def pattern(self) -> tuple[OpPattern, ...]:
        c, w = const("c", data=False), const("w", data=False)
        gemm = op.Gemm(var("x"), w, const("b", data=False), _name="product")
        bare = op.Gemm(var("x"), w, _name="product")
        return op.Add(gemm, c), op.Sub(gemm, c), batch_norm(gemm), batch_norm(bare)

    def check(self, m: Match, context: Context) -> str | None:
        node = m.node("product")
        size = _columns(node)
        if reason := _refuse_product(node):
            return reason
        if (
            size is None
            or attribute(node, "alpha", 1.0) != 1.0
            or attribute(node, "beta", 1.0) != 1.0
        ):
            return "the Gemm scales"
        if "b" in m.values and (reason := _refuse_vector(m["b"], size, 2)):
            return reason
        if "norm" in m.nodes:
            return refuse_norm(m)
        return _refuse_vector(m["c"], size, 2)

    def rewrite(self, m: Match, build: Builder) -> tuple[ir.Value | None, ...]:
        node = m.node("product")
        size = _columns(node)
        assert size is not None
        bias = _vector(m["b"], size) if "b" in m.values else np.zeros(size)
        if "norm" in m.nodes:
            scale, shift = norm_affine(m)
        else:
            scale, shift = None, _vector(m["c"], size)
            if m.root.op_type == "Sub" and shift is not None:
                shift = -shift
        weight = _scaled_weight(node, scale, 1, build)
        dtype = m["w"].dtype
        assert dtype is not None
        new_bias: ir.Value | np.ndarray
        if bias is None or shift is None:
            new_bias = absent(dtype, (size,), build)
        else:
            new_bias = (bias * (1.0 if scale is None else scale) + shift).astype(dtype.numpy())
        options = {a.name: a.value for a in node.attributes.values()}
        value = build.node("Gemm", m["x"], weight, new_bias, **options).outputs[0]
        return (value, *([None] * (len(m.root.outputs) - 1)))


@dataclasses.dataclass(frozen=True)
class FoldLinear(RuleGroup):
    """Folds constant factors and summands into the matrix product next to them, or the convolution
    after them, and into each other. It goes after the fusions that look for such constants.

    Mul(Add(MatMul(x, W), b), c)   ->   Add(MatMul(x, W * c), b * c)
    """

    stage: ClassVar = RewriteRule.stage
    rules: ClassVar[tuple[type[RewriteRule], ...]] = (
        ScaleAfterProduct,
        ScaleBeforeProduct,
        ShiftAfterGemm,
        FoldBeforeConv,
        MergeFactors,
        MergeSummands,
        DivideByFactor,
    )

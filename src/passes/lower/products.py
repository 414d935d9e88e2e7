"""Matrix products with their scale, transpositions and activation inside.

Here: the rules that write com.microsoft FusedMatMul and FusedGemm. Not here: Gemm itself
(`passes.fuse.gemm`), attention (`attention`).
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import onnx_ir as ir

from ...ir.edit import Builder
from ...ir.graph import CONTRIB_DOMAIN, attribute, constant_scalar, constant_tensor, dims_of
from ...ir.match import AnyOf, Match, OpPattern, ValuePattern, any_of, const, op, var
from ..base import Context, Stage
from ..rules import RewriteRule
from .conditions import options_of, refusal


def _product(a: ValuePattern, b: ValuePattern) -> AnyOf:
    return any_of(
        op.MatMul(a, b, _name="product"),
        op.FusedMatMul(a, b, _name="product", _domain=CONTRIB_DOMAIN),
    )


def _fuse(
    m: Match, build: Builder, a: ir.Value | None, b: ir.Value | None, **changed: float
) -> ir.Value:
    options = {"alpha": 1.0, "transA": 0, "transB": 0} | options_of(m.node("product")) | changed
    return build.node("FusedMatMul", a, b, _domain=CONTRIB_DOMAIN, **options).outputs[0]  # type: ignore[arg-type]


def _check(m: Match, context: Context) -> str | None:
    a, b = (dims_of(v) for v in m.node("product").inputs)
    if a is None or b is None:
        return "a rank is not known"
    if len(a) < 2 or len(b) < 2:
        return "an operand is a vector"
    return refusal(m, context, "FusedMatMul", m.node("product").inputs)


def _factor(m: Match, node: str = "scale") -> float | None:
    """What the product is multiplied by, where it is a number that raises no rank."""
    number = constant_scalar(m["factor"])
    if number is None or len(m["factor"].shape or ()) > 2:
        return None
    if m.node(node).op_type == "Div":
        return None if number == 0 else 1 / float(number)
    return float(number)


def _scaled(value: ValuePattern) -> AnyOf:
    """The value times or divided by a constant."""
    return any_of(
        op.Mul(value, const("factor"), _name="scale"),
        op.Div(value, const("factor"), _name="scale"),
    )


@dataclasses.dataclass(frozen=True)
class ScaledProduct(RewriteRule):
    """Mul(MatMul(a, b), c) -> FusedMatMul(a, b, alpha=c); Div likewise."""

    stage: ClassVar[Stage] = Stage.LOWER

    def pattern(self) -> tuple[OpPattern, ...]:
        product = _product(var("a"), var("b"))
        return (
            op.Mul(product, const("factor"), _name="scale"),
            op.Div(product, const("factor"), _name="scale"),
        )

    def check(self, m: Match, context: Context) -> str | None:
        return "the factor is not one number" if _factor(m) is None else _check(m, context)

    def rewrite(self, m: Match, build: Builder) -> ir.Value:
        alpha = attribute(m.node("product"), "alpha", 1.0) * (_factor(m) or 0.0)
        return _fuse(m, build, m["a"], m["b"], alpha=alpha)


@dataclasses.dataclass(frozen=True)
class ProductOfScaled(RewriteRule):
    """MatMul(Mul(a, c), b) -> FusedMatMul(a, b, alpha=c), and likewise for b."""

    stage: ClassVar[Stage] = Stage.LOWER

    def pattern(self) -> tuple[OpPattern, ...]:
        a, b = var("a"), var("b")
        forms = [(_scaled(a), b), (a, _scaled(b))]
        return tuple(
            pattern
            for left, right in forms
            for pattern in (
                op.MatMul(left, right, _name="product"),
                op.FusedMatMul(left, right, _name="product", _domain=CONTRIB_DOMAIN),
            )
        )

    def check(self, m: Match, context: Context) -> str | None:
        if any(constant_tensor(m[name]) is not None for name in ("a", "b")):
            return "an operand is a constant, which the factor could go into"
        return "the factor is not one number" if _factor(m) is None else _check(m, context)

    def rewrite(self, m: Match, build: Builder) -> ir.Value:
        alpha = attribute(m.node("product"), "alpha", 1.0) * (_factor(m) or 0.0)
        return _fuse(m, build, m["a"], m["b"], alpha=alpha)


@dataclasses.dataclass(frozen=True)
class ProductOfTransposed(RewriteRule):
    """MatMul(a, Transpose(b)) -> FusedMatMul(a, b, transB=1), the last axes swapped; so for a."""

    stage: ClassVar[Stage] = Stage.LOWER

    def pattern(self) -> tuple[OpPattern, ...]:
        swapped = op.Transpose(var("t"), _name="transpose")
        return tuple(
            pattern
            for left, right, side in ((var("a"), swapped, "B"), (swapped, var("b"), "A"))
            for pattern in (
                op.MatMul(left, right, _name="product"),
                op.FusedMatMul(left, right, _name="product", _domain=CONTRIB_DOMAIN),
            )
            if side
        )

    def check(self, m: Match, context: Context) -> str | None:
        rank = len(dims_of(m["t"]) or ())
        perm = m.attribute("transpose", "perm", tuple(reversed(range(rank))))
        if rank < 2 or tuple(perm) != (*range(rank - 2), rank - 1, rank - 2):
            return f"perm {list(perm)} moves more than the last two axes"
        side = "B" if "a" in m.values else "A"
        if attribute(m.node("product"), f"transBatch{side}", 0):
            return "its batch axes are transposed too"
        return _check(m, context)

    def rewrite(self, m: Match, build: Builder) -> ir.Value:
        name = "transB" if "a" in m.values else "transA"
        flipped = 1 - attribute(m.node("product"), name, 0)
        if name == "transB":
            return _fuse(m, build, m["a"], m["t"], transB=flipped)
        return _fuse(m, build, m["t"], m["b"], transA=flipped)


@dataclasses.dataclass(frozen=True)
class GemmActivation(RewriteRule):
    """Relu(Gemm(a, b, c)) -> com.microsoft.FusedGemm(a, b, c, activation="Relu")."""

    stage: ClassVar[Stage] = Stage.LOWER

    def pattern(self) -> OpPattern:
        gemm = op.Gemm(var("a"), var("b"), _rest=True, _name="gemm")
        return op.one_of(("Relu", "Sigmoid", "Tanh", "LeakyRelu"), gemm)

    def check(self, m: Match, context: Context) -> str | None:
        return refusal(m, context, "FusedGemm", m.node("gemm").inputs)

    def rewrite(self, m: Match, build: Builder) -> ir.Value:
        gemm, node = m.node("gemm"), m.root
        options = options_of(gemm) | {"activation": node.op_type}
        if node.op_type == "LeakyRelu":
            options["activation_alpha"] = attribute(node, "alpha", 0.01)
        return build.node("FusedGemm", *gemm.inputs, _domain=CONTRIB_DOMAIN, **options).outputs[0]  # type: ignore[arg-type]

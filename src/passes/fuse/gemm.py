"""Matrix products in the form that runtimes fuse: Gemm with its bias and transposition inside."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import onnx_ir as ir

from ...ir.edit import Builder
from ...ir.graph import attribute, constant_tensor, dims_of, static_shape
from ...ir.match import Match, OpPattern, const, op, var
from ..base import Context
from ..rules import RewriteRule, RuleGroup


@dataclasses.dataclass(frozen=True)
class MatMulAddToGemm(RewriteRule):
    """Add(MatMul(a, W), c) -> Gemm(a, W, c), for matrices a and W and a constant bias c."""

    def pattern(self) -> OpPattern:
        product = op.MatMul(var("a"), const("w", data=False))
        return op.Add(product, const("c", data=False))

    def check(self, m: Match, context: Context) -> str | None:
        a, w, c = dims_of(m["a"]), static_shape(m["w"]), static_shape(m["c"])
        if a is None or len(a) != 2:
            return "the left side is not a matrix"
        if w is None or len(w) != 2:
            return "the right side is not a matrix"
        if c is None or c not in ((w[1],), (1, w[1])):
            return "the summand is not one number per column"
        dtype = m["a"].dtype
        if dtype is None or not dtype.is_floating_point():
            return f"Gemm is not for {dtype}"
        return None

    def rewrite(self, m: Match, build: Builder) -> ir.Value:
        value: ir.Value = build.Gemm(m["a"], m["w"], m["c"])
        return value


@dataclasses.dataclass(frozen=True)
class TransposeIntoGemm(RewriteRule):
    """Gemm(a, Transpose(b)) -> Gemm(a, b, transB=1), and likewise for a; transB flips."""

    def pattern(self) -> tuple[OpPattern, ...]:
        side_b = op.Transpose(var("t"), _name="transpose", _shared=True)
        side_a = op.Transpose(var("t"), _name="transpose", _shared=True)
        return (
            op.Gemm(var("a"), side_b, _rest=True, _name="b"),
            op.Gemm(side_a, var("b"), _rest=True, _name="a"),
        )

    def check(self, m: Match, context: Context) -> str | None:
        perm = m.attribute("transpose", "perm", (1, 0))
        return None if tuple(perm) == (1, 0) else f"perm is {perm}"

    def rewrite(self, m: Match, build: Builder) -> ir.Value:
        node = m.root
        options = {a.name: a.value for a in node.attributes.values()}
        inputs = list(node.inputs)
        flip, index = ("transB", 1) if "b" in m.nodes else ("transA", 0)
        inputs[index] = m["t"]
        options[flip] = 1 - attribute(node, flip, 0)
        return build.node("Gemm", *inputs, **options).outputs[0]


@dataclasses.dataclass(frozen=True)
class GemmBias(RewriteRule):
    """Add(Gemm(a, W), c) -> Gemm(a, W, c), where the Gemm has no bias yet."""

    def pattern(self) -> OpPattern:
        return op.Add(op.Gemm(var("a"), var("w"), _name="gemm"), const("c", data=False))

    def check(self, m: Match, context: Context) -> str | None:
        out, c = dims_of(m.node("gemm").outputs[0]), static_shape(m["c"])
        if constant_tensor(m["c"]) is None or out is None or c is None:
            return "a shape is not known"
        if c not in ((out[1],), (1, out[1])):
            return "the summand is not one number per column"
        return None

    def rewrite(self, m: Match, build: Builder) -> ir.Value:
        options = {a.name: a.value for a in m.node("gemm").attributes.values()}
        options.pop("beta", None)
        return build.node("Gemm", m["a"], m["w"], m["c"], **options).outputs[0]


@dataclasses.dataclass(frozen=True)
class GemmForms(RuleGroup):
    """Brings matrix products into the form that runtimes fuse.

    Add(MatMul(a, W), c)   ->   Gemm(a, W, c)
    """

    stage: ClassVar = RewriteRule.stage
    rules: ClassVar[tuple[type[RewriteRule], ...]] = (MatMulAddToGemm, GemmBias, TransposeIntoGemm)

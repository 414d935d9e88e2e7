"""Products and their biases in one node, before pairs are written.

Here: `merge_biases`. ONNX Runtime 1.32 makes a Gemm of MatMul and Add itself before it looks at
pairs, finds a float bias in it, and runs the node in float. Not here: the pairs (`qdq`).
"""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir

from ...ir.edit import Builder
from ...ir.graph import constant_tensor, dims_of, is_absent, static_shape
from ...ir.match import Match, OpPattern, const, op, var
from ..base import Context
from ..fuse.gemm import MatMulAddToGemm
from ..rules import RewriteRule
from .known_types import require_types
from .qdq import absent


def merge_biases(model: ir.Model, context: Context) -> None:
    """Make a Gemm of every product with constant weights and a bias, in place."""
    require_types(model)
    MatMulAddToGemm().run(model, context)
    StackedMatMulAddToGemm().run(model, context)


@dataclasses.dataclass(frozen=True)
class StackedMatMulAddToGemm(RewriteRule):
    """Add(MatMul(x, W), c) -> Reshape(Gemm(Reshape(x), W, c)), for x of three axes or more.

    At most one of the axes before the last may have an unknown size.
    """

    def pattern(self) -> OpPattern:
        product = op.MatMul(var("x"), const("w", data=False), _name="product")
        return op.Add(product, const("c", data=False))

    def check(self, m: Match, context: Context) -> str | None:
        dims, w, c = dims_of(m["x"]), static_shape(m["w"]), static_shape(m["c"])
        if dims is None or len(dims) < 3:
            return "the left side is no stack of matrices"
        if sum(not isinstance(d, int) for d in dims[:-1]) > 1 or 0 in dims:
            return "the shape of the result can't be written down"
        if w is None or len(w) != 2:
            return "the right side is not a matrix"
        if c is None or c[-1:] != (w[1],) or any(d != 1 for d in c[:-1]) or len(c) > len(dims):
            return "the summand is not one number per column"
        if m["x"].dtype != ir.DataType.FLOAT:
            return "not float32"
        return None

    def rewrite(self, m: Match, build: Builder) -> ir.Value:
        dims, w = dims_of(m["x"]), static_shape(m["w"])
        assert dims is not None
        assert w is not None
        rows = build.Reshape(m["x"], np.array([-1, w[0]], np.int64))
        bias = m["c"]
        if len(static_shape(bias) or ()) > 2:
            bias = build.initializer("bias", _row(bias, w[1]))
        product = build.Gemm(rows, m["w"], bias)
        back = [d if isinstance(d, int) else -1 for d in dims[:-1]]
        value: ir.Value = build.Reshape(product, np.array([*back, w[1]], np.int64))
        return value


def _row(bias: ir.Value, columns: int) -> np.ndarray | ir.TensorProtocol:
    tensor = constant_tensor(bias)
    assert tensor is not None
    if is_absent(tensor):
        return absent(tensor.dtype, (columns,))
    row: np.ndarray = tensor.numpy().reshape(columns)
    return row

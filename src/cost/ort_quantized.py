"""What ONNX Runtime's own optimizer makes of quantization.

Here: `prepare`, `simulate` and `finish`, in the order in which the float rewrites come between
them. The rules are beside it: pairs (`ort_qdq`), layouts (`ort_layout`), plans (`ort_plan`).
"""

from __future__ import annotations

import math

from ..ir.quant import QuantPlan
from ..targets.target import Target
from .ort_layout import move_channels_last
from .ort_qdq import form_integer_ops, is_pair, spread_pairs
from .runtime_graph import Op, RuntimeGraph, Tensor


def prepare(graph: RuntimeGraph, target: Target, plan: QuantPlan | None) -> None:
    """Before the float rewrites: what a plan would write, and biases that it would hide."""
    for op in graph:
        if op in graph and op.is_onnx("MatMul"):
            _add_bias(graph, op)
    graph.sort()


def simulate(graph: RuntimeGraph, target: Target) -> None:
    """Rewrite Q/DQ pairs into the integer operators that the session would run."""
    if not any(is_pair(op, "Dequantize") for op in graph):
        return
    spread_pairs(graph)
    form_integer_ops(graph, target)


def finish(graph: RuntimeGraph, target: Target) -> None:
    """After the float rewrites: layouts of integer operators."""
    move_channels_last(graph)


def _add_bias(graph: RuntimeGraph, op: Op) -> None:
    """MatMul by an unpacked weight, then a float bias: a Gemm between views.

    ONNX Runtime does so before it looks at pairs; the Gemm then stays float, since its bias is no
    integer.
    """
    user = graph.only_user(op.outputs[0])
    left, right = op.inputs
    if user is None or not user.is_onnx("Add") or left is None or right is None:
        return
    pair, result = right.producer, op.outputs[0]
    if pair is None or not is_pair(pair, "Dequantize") or not _is_stored(pair):
        return
    bias = user.inputs[1] if user.inputs[0] is result else user.inputs[0]
    if bias is None or left.shape is None or right.shape is None or result.shape is None:
        return
    if len(right.shape) != 2 or len(left.shape) < 2:
        return
    rows, columns = math.prod(left.shape[:-1]), right.shape[1]
    if bias.shape not in ((columns,), (1, columns), (rows, columns)):
        return
    final = user.outputs[0]
    graph.remove(user)
    op.type, op.origin, op.fused = "Gemm", op.origin + user.origin, ("Add",)
    graph.set_input(op, 2, bias)
    if len(left.shape) == 2:
        graph.set_output(op, 0, final)
        return
    flat = Tensor(f"{left.name}_flat", (rows, left.shape[-1]), left.dtype)
    product = Tensor(f"{final.name}_flat", (rows, columns), final.dtype)
    graph.add(Op("Reshape", "", [left], [flat]))
    graph.set_input(op, 0, flat)
    graph.set_output(op, 0, product)
    graph.renew(op)
    graph.add(Op("Reshape", "", [product], [final]))


def _is_stored(pair: Op) -> bool:
    return pair.inputs[0] is not None and pair.inputs[0].constant

"""What ONNX Runtime's own optimizer makes of floats.

Here: `simplify`, what it does before it looks at Q/DQ pairs, and `fuse`, what it does after. The
rules were found by holding graphs that sessions saved beside ours. Not here: pairs (`ort_integer`).
"""

from __future__ import annotations

from ..targets.target import Target
from .runtime_graph import CONTRIB, Op, RuntimeGraph, Tensor


def simplify(graph: RuntimeGraph, target: Target) -> None:
    """The rewrites that come before quantized operators are formed."""


def fuse(graph: RuntimeGraph, target: Target) -> None:
    """The rewrites that come after quantized operators were formed."""
    for op in graph:
        if op in graph and op.is_onnx("Conv", "Gemm"):
            _fuse_behind(graph, op, target)


def _fuse_behind(graph: RuntimeGraph, op: Op, target: Target) -> None:
    user = graph.only_user(op.outputs[0])
    if user is not None and op.type == "Conv" and user.is_onnx("Add"):
        other = user.inputs[1] if user.inputs[0] is op.outputs[0] else user.inputs[0]
        if other is not None and not other.constant and _same_shape(other, op.outputs[0]):
            if len(op.inputs) < 3:
                graph.set_input(op, 2, None)
            absorb(graph, op, user, other)
            user = graph.only_user(op.outputs[0])
    if user is None or user.inputs[0] is not op.outputs[0]:
        return
    if user.is_onnx(*target.fused_activations):
        op.type, op.domain = f"Fused{op.type}", CONTRIB
        absorb(graph, op, user)


def _same_shape(a: Tensor, b: Tensor) -> bool:
    return a.shape is not None and a.shape == b.shape


def absorb(graph: RuntimeGraph, op: Op, user: Op, operand: Tensor | None = None) -> None:
    """Let an operator do the work of the only reader of its result, with another operand."""
    result = user.outputs[0]
    graph.remove(user)
    graph.set_output(op, 0, result)
    if operand is not None:
        graph.set_input(op, len(op.inputs), operand)
    op.origin += user.origin
    op.fused += (user.type,)

"""What ONNX Runtime's own optimizer makes of floats.

Here: `simplify`, what it does before it looks at Q/DQ pairs, and `fuse`, what it does after. The
rules were found by holding graphs that sessions saved beside ours. Not here: pairs (`ort_integer`).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import onnx_ir as ir

from ..targets.target import Target
from .ort_fusions import fuse_pairs, join_slices, tidy
from .ort_nchwc import block_channels
from .ort_transpose import push_transposes
from .runtime_graph import CONTRIB, Op, RuntimeGraph, Tensor


def simplify(graph: RuntimeGraph, target: Target) -> None:
    """The rewrites that come before quantized operators are formed."""
    tidy(graph)
    push_transposes(graph)
    join_slices(graph)
    for op in graph:
        if op in graph and op.is_onnx("MatMul"):
            _add_bias(graph, op)
    graph.sort()


def _add_bias(graph: RuntimeGraph, op: Op) -> None:
    """MatMul by a constant, then a bias: a Gemm, between views where there are more dimensions."""
    user = graph.only_user(op.outputs[0])
    left, right = op.inputs
    if user is None or not user.is_onnx("Add") or left is None or right is None:
        return
    bias = user.inputs[1] if user.inputs[0] is op.outputs[0] else user.inputs[0]
    result = op.outputs[0]
    if bias is None or left.shape is None or right.shape is None or bias.shape is None:
        return
    if len(right.shape) != 2 or len(left.shape) < 2 or result.shape is None:
        return
    columns, first = right.shape[1], left.shape[0]
    fitting: set[tuple[int, ...]] = {(columns,)}
    if len(left.shape) == 2:
        fitting |= {(1, columns), (first, columns), (first, 1)}
    if bias.shape not in fitting or left.constant:
        return
    if left.dtype not in _GEMM_TYPES:
        return
    graph.remove(user)
    final = user.outputs[0]
    rows = math.prod(left.shape[:-1])
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


_GEMM_TYPES = (ir.DataType.FLOAT, ir.DataType.DOUBLE)


def fuse(graph: RuntimeGraph, target: Target) -> None:
    """The rewrites that come after quantized operators were formed."""
    fuse_pairs(graph)
    for op in graph:
        if op in graph and op.is_onnx("Conv", "Gemm"):
            _fuse_activation(graph, op, target)
        elif op in graph and (op.is_onnx("MatMul") or op.type == "FusedMatMul"):
            _take_transposes(graph, op)
    for op in graph:
        if op in graph and op.type in ("MatMul", "FusedMatMul"):
            _take_scales(graph, op)
    graph.sort()
    if target.hardware.arch == "x86_64":
        block_channels(graph, target)
    for op in graph:
        if op in graph and (op.is_onnx("Conv") or op.type == "FusedConv"):
            _fuse_residual(graph, op, target)
    graph.sort()


def _take_transposes(graph: RuntimeGraph, op: Op) -> None:
    """Matrix products read an operand whose last two dimensions are swapped as it was before.

    So they do where the rows come first of all, before the batch: (rows, batch, columns).
    """
    if any(t is None or t.shape is None or len(t.shape) < 2 for t in op.inputs[:2]):
        return
    found = [_swap(op.inputs[index]) for index in (0, 1)]
    flags: dict[str, int] = {}
    for index, swap in enumerate(found):
        source = op.inputs[index]
        if swap is None or source is None or source.producer is None:
            continue
        maker = source.producer
        graph.set_input(op, index, maker.inputs[0])
        side = "AB"[index]
        flags[f"trans{side}"] = int(op.attribute(f"trans{side}", 0)) ^ swap.last
        flags[f"transBatch{side}"] = int(op.attribute(f"transBatch{side}", 0)) or swap.batch
        if not source.users and not source.is_output:
            graph.remove(maker)
            op.origin = maker.origin + op.origin
    if flags:
        op.type, op.domain = "FusedMatMul", CONTRIB
        op.attributes = {**op.attributes, **flags}
        graph.renew(op)


class _Swap(NamedTuple):
    """How a Transpose brings an operand into the order of a product."""

    last: int
    batch: int


def _swap(source: Tensor | None) -> _Swap | None:
    maker = source.producer if source is not None else None
    if source is None or maker is None or not maker.is_onnx("Transpose"):
        return None
    rank = len(source.shape or ())
    perm = list(maker.attribute("perm") or reversed(range(rank)))
    if perm == [*range(rank - 2), rank - 1, rank - 2]:
        return _Swap(1, 0)
    if rank > 2 and perm == [*range(1, rank - 1), 0, rank - 1]:
        return _Swap(0, 1)
    if rank > 2 and perm == [*range(1, rank), 0]:
        return _Swap(1, 1)
    return None


def _take_scales(graph: RuntimeGraph, op: Op) -> None:
    """Matrix products multiply by a number themselves."""
    for index in (0, 1):
        source = op.inputs[index]
        maker = source.producer if source is not None else None
        if maker is None or source is None or not maker.is_onnx("Mul", "Div"):
            continue
        data, number = maker.inputs
        if maker.type == "Mul" and data is not None and data.constant and data.elements == 1:
            data, number = number, data
        if data is None or number is None or not number.constant or number.elements != 1:
            continue
        if graph.only_user(source) is not op:
            continue
        graph.set_input(op, index, data)
        graph.remove(maker)
        op.origin = maker.origin + op.origin
        op.type, op.domain = "FusedMatMul", CONTRIB
        graph.renew(op)


def _fuse_activation(graph: RuntimeGraph, op: Op, target: Target) -> None:
    user = graph.only_user(op.outputs[0])
    if user is None or user.inputs[0] is not op.outputs[0]:
        return
    if user.is_onnx(*target.fused_activations):
        op.attributes = {**op.attributes, "activation": user.type}
        op.type, op.domain = f"Fused{op.type.removeprefix('Fused')}", CONTRIB
        absorb(graph, op, user)


def _fuse_residual(graph: RuntimeGraph, op: Op, target: Target) -> None:
    """A sum behind a Conv with a bias that is not blocked, and an activation behind that."""
    user = graph.only_user(op.outputs[0])
    if user is None or not user.is_onnx("Add") or len(op.inputs) != 3 or op.inputs[2] is None:
        return
    if op.attribute("activation") is not None or op.type != "Conv":
        return
    if len(op.outputs[0].shape or ()) != 4:  # images only
        return
    other = user.inputs[1] if user.inputs[0] is op.outputs[0] else user.inputs[0]
    if other is None or not _same_shape(other, op.outputs[0]):
        return
    absorb(graph, op, user, other)
    op.type, op.domain = "FusedConv", CONTRIB
    _fuse_activation(graph, op, target)


def _same_shape(a: Tensor, b: Tensor) -> bool:
    return a.shape is not None and a.shape == b.shape


def absorb(graph: RuntimeGraph, op: Op, user: Op, operand: Tensor | None = None) -> None:
    """Let an operator do the work of the only reader of its result, with another operand."""
    result = user.outputs[0]
    graph.remove(user)
    graph.set_output(op, 0, result)
    if operand is not None:
        graph.set_input(op, len(op.inputs), operand)
    graph.renew(op)
    op.origin += user.origin
    op.fused += (user.type,)

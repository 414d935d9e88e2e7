"""Rules for matrix products, by constants and by tensors known at run time only.

Each rule returns an empty string if it took the node, else the reason why not (see `rules.py`).
"""

from __future__ import annotations

import math
from typing import Any

from .epilogue import Access
from .fusion import PlainDomain, grow
from .graph import Node, int_tuple, static_type
from .matmul import Matmul, matmul_kernel
from .pack import pack_columns
from .rewrite import FunctionWriter, as_float32
from .views import View, contiguous_strides, view_of


def matrix_product(writer: FunctionWriter, node: Node) -> str:
    left, right = node.inputs
    types = [static_type(item) for item in node.inputs]
    if any(dtype != "float32" for _, dtype in types):
        return "not float32"
    shapes = [shape for shape, _ in types]
    if any(shape is None or len(shape) < 2 or 0 in shape for shape in shapes):
        return "dynamic, empty or one-dimensional operand"
    weight = writer.graph.constant(right)
    b_shape = shapes[1]
    assert b_shape is not None
    shared = all(extent == 1 for extent in b_shape[:-2])
    if shared and b_shape[:-2] and node.shape is not None and len(node.shape) < len(b_shape):
        shared = False
    a = view_of(writer.graph, left, writer.materialized)
    if shared:
        rows = a.reshaped((math.prod(a.shape[:-1]), a.shape[-1]))
        if rows is None:
            shape = shapes[0]
            assert shape is not None
            plain = View(left, shape, contiguous_strides(shape))
            rows = plain.reshaped((math.prod(shape[:-1]), shape[-1]))
        assert rows is not None
        if weight is not None:
            return _emit_matmul(writer, node, rows, None, as_float32(weight.reshape(b_shape[-2:])))
        b = view_of(writer.graph, right, writer.materialized)
        b_rows = b.reshaped(b_shape[-2:])
        assert b_rows is not None
        return _emit_matmul(writer, node, rows, b_rows, None)
    b = view_of(writer.graph, right, writer.materialized)
    return _emit_matmul(writer, node, a, b, None)


def _broadcast_access(view: View, base_shape: tuple[int, ...], rank: int) -> Access:
    """A view addressed by `rank` coordinates; extents of one are broadcast."""
    strides = tuple(
        0 if extent == 1 else stride
        for extent, stride in zip(view.shape, view.strides, strict=True)
    )
    return Access(base_shape, (0,) * (rank - len(strides)) + strides)


def _emit_matmul(writer: FunctionWriter, node: Node, a: View, b: View | None, weight: Any) -> str:
    shape = node.shape
    assert shape is not None
    flat = len(a.shape) == 2 and (b is None or len(b.shape) == 2)
    batch = () if flat else shape[:-2]
    m, k = a.shape[-2:]
    n = shape[-1]
    scale = a.scale * (b.scale if b is not None else 1.0)
    group = grow(
        writer.graph, node.var, PlainDomain(shape, rows=flat), shape, writer.claimed, scale=scale
    )
    permutation, result = _absorbed_transpose(writer, group.result, shape)
    out_shape = tuple(shape[axis] for axis in permutation)
    by_axis = dict(zip(permutation, contiguous_strides(out_shape), strict=True))
    out_strides = tuple(by_axis[axis] for axis in range(len(shape)))
    if flat:
        if permutation == tuple(range(len(shape))):
            out_strides = (n, 1)
        else:
            # Rows are one coordinate here, which a transposed output can't be addressed by.
            permutation, result = tuple(range(len(shape))), group.result
            out_shape, out_strides = shape, (n, 1)
    if result is not group.result:
        group.nodes.append(writer.graph.producer[result])
        group.result = result
    rank = len(batch) + 2
    a_base = static_type(a.base)[0]
    b_base = static_type(b.base)[0] if b is not None else None
    assert a_base is not None
    config = Matmul(
        batch=batch,
        m=m,
        n=n,
        k=k,
        a=_broadcast_access(a, a_base, rank),
        b=None if b is None or b_base is None else _b_access(b, b_base, rank),
        out=Access(out_shape, out_strides),
        epilogue=group.epilogue,
    )

    def emit() -> None:
        tile = config.tile(writer.spec)
        if b is not None:
            second = writer.plain(b.base)
        else:
            second = writer.packed(
                node.inputs[1],
                ("matmul", tile.vectors),
                lambda: pack_columns(weight, writer.spec.lanes, tile.vectors),
            )
        function = writer.library.get(
            writer.bb,
            config,
            "batch_matmul" if batch else "matmul",
            "matmul",
            f"{'packed' if b is None else 'run-time'} right side, tile {tile}",
            lambda name: matmul_kernel(config, writer.spec, name),
        )
        args = [writer.plain(a.base), second, *writer.operands(group.sources)]
        writer.define(group.result, plain=writer.call(function, args, out_shape))

    writer.place(node, group, emit)
    return ""


def _b_access(view: View, base_shape: tuple[int, ...], rank: int) -> Access:
    """As `_broadcast_access`, but a single column still counts as contiguous."""
    access = _broadcast_access(view, base_shape, rank)
    if view.shape[-1] == 1:
        return Access(access.shape, (*access.strides[:-1], 1))
    return access


def _absorbed_transpose(
    writer: FunctionWriter, value: Any, shape: tuple[int, ...]
) -> tuple[tuple[int, ...], Any]:
    """A `permute_dims` that is the value's only use and keeps the last axis: written directly."""
    identity = tuple(range(len(shape)))
    users = writer.graph.users.get(value, [])
    if len(users) != 1 or value in writer.graph.results or users[0] in writer.claimed:
        return identity, value
    user = users[0]
    if user.op != "permute_dims" or not user.attrs.axes:
        return identity, value
    axes = tuple(axis % len(shape) for axis in int_tuple(user.attrs.axes))
    if axes[-1] != len(shape) - 1:
        return identity, value
    return axes, user.var

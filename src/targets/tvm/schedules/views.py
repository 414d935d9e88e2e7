"""Tensors seen through transposes and reshapes, as strides over the tensor they come from.

A matrix product reads its operands by strides, so that `permute_dims` before it costs nothing.
"""

from __future__ import annotations

import dataclasses

from .graph import Expr, FlatGraph, static_type

_VIEWS = ("permute_dims", "reshape", "expand_dims", "squeeze", "flatten")


def contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Row-major strides in elements."""
    strides = []
    step = 1
    for extent in reversed(shape):
        strides.append(step)
        step *= extent
    return tuple(reversed(strides))


@dataclasses.dataclass(frozen=True)
class View:
    """`scale` times the tensor `base`, addressed with `shape` and `strides` in elements."""

    base: Expr
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    scale: float = 1.0

    def permuted(self, axes: list[int]) -> View:
        return dataclasses.replace(
            self,
            shape=tuple(self.shape[axis] for axis in axes),
            strides=tuple(self.strides[axis] for axis in axes),
        )

    def reshaped(self, shape: tuple[int, ...]) -> View | None:
        """None where the new shape can't be addressed by strides."""
        strides = _reshaped_strides(self.shape, self.strides, shape)
        return None if strides is None else dataclasses.replace(self, shape=shape, strides=strides)


def _reshaped_strides(
    shape: tuple[int, ...], strides: tuple[int, ...], new: tuple[int, ...]
) -> tuple[int, ...] | None:
    """Merge the axes that are contiguous with each other, then cut them into the new ones."""
    chunks: list[tuple[int, int]] = []
    for extent, stride in zip(shape, strides, strict=True):
        if extent == 1:
            continue
        if chunks and chunks[-1][1] == extent * stride:
            chunks[-1] = (chunks[-1][0] * extent, stride)
        else:
            chunks.append((extent, stride))
    result = []
    for extent in reversed(new):
        if extent == 1:
            result.append(0)
            continue
        if not chunks or chunks[-1][0] % extent:
            return None
        left, stride = chunks.pop()
        result.append(stride)
        if left > extent:
            chunks.append((left // extent, stride * extent))
    return tuple(reversed(result))


def view_of(graph: FlatGraph, expr: Expr, materialized: set[Expr]) -> View:
    """Follow `expr` back through views and scalar factors.

    Stops at tensors that exist anyway (`materialized`: results of kernels), at constants, and at
    whatever is not a view.
    """
    shape, _ = static_type(expr)
    assert shape is not None
    node = graph.producer.get(expr)
    if node is None or expr in materialized or graph.constant(expr) is not None:
        return View(expr, shape, contiguous_strides(shape))
    stop = View(expr, shape, contiguous_strides(shape))
    if node.op in _VIEWS and static_type(node.inputs[0])[0] is not None:
        inner = view_of(graph, node.inputs[0], materialized)
        if node.op == "permute_dims":
            axes = node.attrs.axes
            rank = len(inner.shape)
            order = [int(axis) % rank for axis in axes] if axes else list(range(rank))[::-1]
            return inner.permuted(order)
        return inner.reshaped(shape) or stop
    if node.op == "multiply":
        for tensor, factor in (node.inputs, node.inputs[::-1]):
            value = graph.scalar(factor)
            if value is not None and static_type(tensor)[0] == shape:
                inner = view_of(graph, tensor, materialized)
                return dataclasses.replace(inner, scale=inner.scale * value)
    return stop

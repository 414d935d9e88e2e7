"""Where the elements of a value come from: reshapes, transposes and slices read as one view.

Here: `views_of`, which follows a value back through operators that only move or scale elements, and
says which axis of the source, at which stride, each of its axes walks along. Attention reads its
heads with it, however an exporter spelled their split. Not here: what is made of it (`heads`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence

import onnx_ir as ir

from ...ir import dims as dim_math
from ...ir.graph import (
    Dim,
    attribute,
    constant_array,
    constant_scalar,
    dims_of,
    is_onnx_op,
)

REPEATED = -1
"""The axis of a digit that repeats the same elements (Expand)."""

_REGROUPING = ("Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity")
_SCALING = ("Mul", "Div")
_MOVING = (*_REGROUPING, *_SCALING, "Transpose", "Slice", "Split", "Gather", "Expand")
_LONGEST = 16
"""Operators followed back. The longest chain seen, torch's unoptimized export of attention: 9."""


@dataclasses.dataclass(frozen=True)
class Digit:
    """A factor of an axis: `size` steps of `stride` along `axis` of the source."""

    axis: int
    stride: int
    size: Dim


Axis = tuple[Digit, ...]


@dataclasses.dataclass(frozen=True)
class View:
    """A value as elements of `source`: each axis a mixed-radix number, outermost digit first.

    `offset` is added along the source's last axis; the elements are multiplied by `scale`. `nodes`
    lie between, the nearest to the value first.
    """

    source: ir.Value
    axes: tuple[Axis, ...]
    offset: int = 0
    scale: float = 1.0
    nodes: tuple[ir.Node, ...] = ()


def plain_view(value: ir.Value) -> View | None:
    """The value as a view of itself; None when its rank is not known."""
    dims = dims_of(value)
    if dims is None:
        return None
    return View(value, tuple(() if d == 1 else (Digit(i, 1, d),) for i, d in enumerate(dims)))


def views_of(value: ir.Value) -> Iterator[View]:
    """The value as a view of each value that it can be seen as one of, the farthest first."""
    chain: list[tuple[ir.Value, ir.Value, ir.Node]] = []  # (from, to, by)
    at = value
    while len(chain) < _LONGEST:
        node = at.producer()
        if node is None or not is_onnx_op(node, *_MOVING) or node.graph is not _graph_of(value):
            break
        before = _moved_input(node)
        if before is None:
            break
        chain.append((before, at, node))
        at = before
    for length in range(len(chain), -1, -1):
        view = plain_view(chain[length - 1][0] if length else value)
        for _, after, node in reversed(chain[:length]):
            view = None if view is None else apply_view(view, node, after)
        if view is not None:
            yield dataclasses.replace(view, nodes=tuple(node for _, _, node in chain[:length]))


def _graph_of(value: ir.Value) -> ir.Graph | ir.Function | None:
    node = value.producer()
    return None if node is None else node.graph


def _moved_input(node: ir.Node) -> ir.Value | None:
    if node.op_type in _SCALING:
        factor, value = node.inputs[1], node.inputs[0]
        if node.op_type == "Mul" and constant_scalar(factor) is None:
            factor, value = value, factor
        if not isinstance(constant_scalar(factor), float):
            return None
        rank, own = dims_of(value), dims_of(factor)
        return None if rank is None or own is None or len(own) > len(rank) else value
    return node.inputs[0]


def apply_view(view: View, node: ir.Node, output: ir.Value) -> View | None:
    """The view of `output` of a node of which `view` is the view of the moved input."""
    match node.op_type:
        case "Mul" | "Div":
            return _scaled(view, node)
        case "Transpose":
            order = attribute(node, "perm") or range(len(view.axes))[::-1]
            return dataclasses.replace(view, axes=tuple(view.axes[i] for i in order))
        case "Slice":
            return _sliced(view, node)
        case "Split":
            return _split(view, node, output)
        case "Gather":
            return _gathered(view, node)
        case "Expand":
            return _expanded(view, output)
        case _:
            dims = dims_of(output)
            axes = None if dims is None else regroup(view.axes, dims)
            return None if axes is None else dataclasses.replace(view, axes=axes)


def _scaled(view: View, node: ir.Node) -> View | None:
    first, second = constant_scalar(node.inputs[0]), constant_scalar(node.inputs[1])
    factor = second if second is not None else first
    if not factor or not math.isfinite(factor):
        return None
    factor = 1 / factor if node.op_type == "Div" else factor
    return dataclasses.replace(view, scale=view.scale * factor)


def _sliced(view: View, node: ir.Node) -> View | None:
    arrays = [constant_array(v, 8) for v in node.inputs[1:]]
    if len(arrays) < 2 or any(a is None for a in arrays):
        return None
    starts, ends, *rest = [[int(i) for i in a] for a in arrays if a is not None]
    axes = rest[0] if rest else list(range(len(starts)))
    if len(rest) > 1 and any(step != 1 for step in rest[1]):
        return None
    found: View | None = view
    for start, end, axis in zip(starts, ends, axes, strict=True):
        size = _size(view.axes[axis])
        if found is None or not isinstance(size, int):
            return None
        first, last, _ = slice(start, end).indices(size)
        found = _narrowed(found, axis % len(view.axes), first, last - first)
    return found


def _split(view: View, node: ir.Node, output: ir.Value) -> View | None:
    axis = attribute(node, "axis", 0) % len(view.axes)
    before: Dim = 0
    for value in node.outputs:
        dims = dims_of(value)
        if dims is None or not isinstance(before, int) or not isinstance(dims[axis], int):
            return None
        if value is output:
            return _narrowed(view, axis, before, int(dims[axis]))
        before += int(dims[axis])
    return None


def _gathered(view: View, node: ir.Node) -> View | None:
    axis = attribute(node, "axis", 0) % len(view.axes)
    index, dims = constant_scalar(node.inputs[1]), dims_of(node.inputs[1])
    size = _size(view.axes[axis])
    if not isinstance(index, int) or dims is None or len(dims) > 1 or not isinstance(size, int):
        return None
    found = _narrowed(view, axis, index % size, 1)
    if found is None or dims:
        return found
    return dataclasses.replace(found, axes=(*found.axes[:axis], *found.axes[axis + 1 :]))


def _narrowed(view: View, axis: int, start: int, size: int) -> View | None:
    """Elements `start` to `start + size` of an axis that is one digit of the source's last axis."""
    dims = dims_of(view.source)
    digits = merged(view.axes[axis])
    if size == _size(digits):
        return view
    if dims is None or len(digits) != 1 or digits[0].axis != len(dims) - 1 or size < 1:
        return None
    digit = digits[0]
    new = () if size == 1 else (Digit(digit.axis, digit.stride, size),)
    axes = (*view.axes[:axis], new, *view.axes[axis + 1 :])
    return dataclasses.replace(view, axes=axes, offset=view.offset + start * digit.stride)


def _expanded(view: View, output: ir.Value) -> View | None:
    dims = dims_of(output)
    if dims is None:
        return None
    padded = ((),) * (len(dims) - len(view.axes)) + view.axes
    axes: list[Axis] = []
    for digits, dim in zip(padded, dims, strict=True):
        if digits or dim == 1:
            axes.append(digits)
        elif isinstance(dim, int):
            axes.append((Digit(REPEATED, 0, dim),))
        else:
            return None
    return dataclasses.replace(view, axes=tuple(axes))


def merged(digits: Sequence[Digit]) -> Axis:
    """The same elements with as few digits: neighbours that walk on in one stride become one."""
    result: list[Digit] = []
    for digit in digits:
        outer = result[-1] if result else None
        if (
            outer is not None
            and outer.axis == digit.axis != REPEATED
            and outer.stride == dim_math.mul(digit.stride, digit.size)
        ):
            result[-1] = Digit(digit.axis, digit.stride, dim_math.mul(outer.size, digit.size))
        else:
            result.append(digit)
    return tuple(result)


def _size(digits: Sequence[Digit]) -> Dim:
    return dim_math.product([digit.size for digit in digits])


def regroup(axes: Sequence[Axis], dims: Sequence[Dim]) -> tuple[Axis, ...] | None:
    """The digits of `axes`, in order, dealt to axes of the sizes `dims`; None where that fails.

    A digit is cut in two where a new axis ends inside it.
    """
    left = [digit for digits in axes for digit in digits]
    result: list[Axis] = []
    for dim in dims:
        taken: list[Digit] = []
        size: Dim = 1
        while not _equal(size, dim):
            if not left:
                return None
            digit = left.pop(0)
            grown = dim_math.mul(size, digit.size)
            if all(isinstance(d, int) for d in (grown, dim, size)) and grown > dim:  # type: ignore[operator]
                need, rest = divmod(int(dim), int(size))  # type: ignore[arg-type]
                total = int(digit.size)  # type: ignore[arg-type]
                if rest or total % need:
                    return None
                inner = total // need
                left.insert(0, Digit(digit.axis, digit.stride, inner))
                digit = Digit(digit.axis, digit.stride * inner, need)
                grown = dim
            taken.append(digit)
            size = grown
        result.append(tuple(taken))
    return None if left else tuple(result)


def _equal(a: Dim, b: Dim) -> bool:
    return dim_math.same(a, b) is True

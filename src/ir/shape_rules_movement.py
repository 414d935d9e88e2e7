"""Shape rules of operators that rearrange, pick, repeat or make elements, and of Shape itself.

Where an operator's shape is given by a tensor (Reshape, Expand, Slice, Range, ...) the tensor's
followed elements are used, symbols included; what cannot be known gets a fresh symbol.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from . import dims as dim_math
from .graph import Dim
from .shape_rules import Call, Data, Dims, Element, Undecided, element_grid, rule
from .shape_rules_elementwise import MAX_DATA

_INT_MAX = (2**31 - 1, 2**63 - 1)
_END = 10**9  # exporters write "to the end" as 1e9, INT32_MAX, INT64_MAX or their negatives


def dims_from_data(call: Call, data: Data | None, length: Dim | None, output: int = 0) -> Dims:
    """Dimensions from a shape tensor's elements; fresh symbols for those not followed."""
    if data is not None:
        return tuple(
            call.fresh(output, axis) if isinstance(e, float) or dim_math.is_unknown(e) else e
            for axis, e in enumerate(data)
        )
    if not isinstance(length, int):
        raise Undecided
    return tuple(call.fresh(output, axis) for axis in range(length))


def length_of(call: Call, index: int) -> Dim | None:
    """The length of a rank-1 input."""
    dims = call.dims(index)
    return dims[0] if dims is not None and len(dims) == 1 else None


def axes_of(call: Call, index: int, rank: int, since: int = 13) -> list[int] | None:
    """Axes from attribute `axes` (before opset `since`) or input `index`; None when not given.

    Ends the rule when they are given but not known.
    """
    found: tuple[int, ...] | None
    if call.has(index) and call.opset >= since:
        found = call.ints(index)
        if found is None:
            raise Undecided
    else:
        found = call.attr("axes")
        if found is None:
            return None
    axes = [call.axis(a, rank) for a in found]
    if len(set(axes)) != len(axes):
        call.fail(f"the axes {list(found)} repeat")
    return axes


# --- reshapes --------------------------------------------------------------------------------


@rule("Reshape")
def reshape(call: Call) -> None:
    """-1 takes what is left, 0 copies (unless allowzero), and element counts must agree."""
    source = call.dims(0)
    if call.opset < 5:
        shape: Data | None = call.attr("shape")
        length: Dim | None = len(shape) if shape is not None else None
    else:
        shape, length = call.data(1), length_of(call, 1)
    if shape is None:
        result = dims_from_data(call, None, length)
        if source is not None and len(result) == 1:
            result = (_or_fresh(call, dim_math.product(source), 0),)
        call.put(0, result)
        return
    result = _reshaped(call, source, shape)
    call.put(0, result)
    data = call.data(0)
    if data is not None:
        call.put(0, data=data)


def _or_fresh(call: Call, dim: Dim, axis: int, output: int = 0) -> Dim:
    return call.fresh(output, axis) if dim_math.is_unknown(dim) else dim


def _reshaped(call: Call, source: Dims | None, shape: Data) -> Dims:
    copies = not call.attr("allowzero", 0)
    result: list[Dim] = []
    left = list(source) if source is not None else []
    inferred: int | None = None
    undecided = source is None
    for axis, element in enumerate(shape):
        if element == -1:
            if inferred is not None:
                call.fail(f"the target shape {dim_math.text(_plain(shape))} has two -1")
            inferred = axis
            result.append(1)
        elif element == 0 and isinstance(element, int) and copies:
            if source is None:
                result.append(call.fresh(0, axis))
                continue
            if axis >= len(source):
                call.fail(f"axis {axis} of the target is 0 (copy), the input has no such axis")
            result.append(source[axis])
        elif isinstance(element, float) or dim_math.is_unknown(element):
            undecided = True
            result.append(call.fresh(0, axis))
        elif isinstance(element, int) and element < 0:
            call.fail(f"the target shape {dim_math.text(_plain(shape))} has a negative size")
        else:
            result.append(element)
    if undecided:
        if inferred is not None:
            result[inferred] = call.fresh(0, inferred)
        return tuple(result)
    others = [d for axis, d in enumerate(result) if axis != inferred]
    _cancel(left, others)
    have, want = dim_math.product(left), dim_math.product(others)
    if inferred is None:
        _check_count(call, source, tuple(result), have, want)
    else:
        result[inferred] = _or_fresh(call, _quotient(call, source, shape, have, want), inferred)
    return tuple(result)


def _plain(shape: Data) -> Dims:
    return tuple(dim_math.UNKNOWN if isinstance(e, float) else e for e in shape)


def _cancel(left: list[Dim], right: list[Dim]) -> None:
    """Drop dimensions that are on both sides, unnamed ones (the same object) included."""
    for dim in list(right):
        for index, other in enumerate(left):
            if dim is other or (not dim_math.is_unknown(dim) and dim == other and dim != 0):
                del left[index]
                right.remove(dim)
                break


def _check_count(call: Call, source: Dims | None, result: Dims, have: Dim, want: Dim) -> None:
    if dim_math.same(have, want) is False:
        call.fail(
            f"{dim_math.text(source)} and {dim_math.text(result)} have different element counts",
            "correct the target shape, or use -1 for the axis that should adapt",
        )


def _quotient(call: Call, source: Dims | None, shape: Data, have: Dim, want: Dim) -> Dim:
    if isinstance(have, int) and isinstance(want, int):
        if want == 0 or have % want:
            if want == 0 and have == 0:
                return dim_math.UNKNOWN
            call.fail(
                f"{dim_math.text(source)} does not divide into {dim_math.text(_plain(shape))}",
                "correct the target shape",
            )
        return have // want
    return dim_math.floordiv(have, want)


@rule("Flatten")
def flatten(call: Call) -> None:
    """Two axes: the product before `axis`, and the product from it on."""
    dims = call.known(0)
    axis = call.attr("axis", 1)
    if not -len(dims) <= axis <= len(dims):
        call.fail(f"axis {axis} is out of range for rank {len(dims)}")
    axis = axis + len(dims) if axis < 0 else axis
    parts = (dim_math.product(dims[:axis]), dim_math.product(dims[axis:]))
    call.put(0, [_or_fresh(call, d, i) for i, d in enumerate(parts)])


@rule("Squeeze")
def squeeze(call: Call) -> None:
    """Drops the axes named, which must be 1, or every 1."""
    dims = call.known(0)
    if call.data(0) is not None:
        call.put(0, data=call.data(0))
    axes = axes_of(call, 1, len(dims))
    if axes is None:
        if any(not isinstance(d, int) for d in dims):
            raise Undecided
        axes = [i for i, d in enumerate(dims) if d == 1]
    for axis in axes:
        call.require_same(
            dims[axis] if isinstance(dims[axis], int) else 1,
            1,
            f"axis {axis} of {dim_math.text(dims)} is not 1 and cannot be squeezed",
        )
    call.put(0, [d for i, d in enumerate(dims) if i not in axes])


@rule("Unsqueeze")
def unsqueeze(call: Call) -> None:
    """Inserts axes of 1 at the positions named, counted in the output."""
    dims = call.known(0)
    given = call.ints(1) if call.has(1) and call.opset >= 13 else call.attr("axes")
    if given is None:
        length = length_of(call, 1)
        if isinstance(length, int):
            call.put(0, [call.fresh(0, i) for i in range(len(dims) + length)])
        return
    rank = len(dims) + len(given)
    axes = [call.axis(a, rank) for a in given]
    if len(set(axes)) != len(axes):
        call.fail(f"the axes {list(given)} repeat")
    rest = iter(dims)
    call.put(0, [1 if i in axes else next(rest) for i in range(rank)])
    data = call.data(0)
    if data is not None:
        call.put(0, data=data)


@rule("Transpose")
def transpose(call: Call) -> None:
    """Axes in the order of `perm`, reversed by default."""
    dims = call.known(0)
    perm = call.attr("perm")
    order = list(perm) if perm is not None else list(range(len(dims)))[::-1]
    if sorted(order) != list(range(len(dims))):
        call.fail(f"perm {order} is no permutation of the axes of {dim_math.text(dims)}")
    call.put(0, [dims[a] for a in order])
    data = call.data(0)
    if data is not None and (grid := element_grid(data, dims)) is not None:
        call.put(0, data=tuple(grid.transpose(order).reshape(-1)))


@rule("Expand")
def expand(call: Call) -> None:
    """Broadcast of the input with the shape tensor."""
    dims, target = call.known(0), call.data(1)
    length = length_of(call, 1)
    if target is None:
        if not isinstance(length, int):
            return
        rank = max(len(dims), length)
        fresh: list[Dim] = [call.fresh(0, axis) for axis in range(rank)]
        for axis, dim in enumerate(dims):
            if isinstance(dim, int) and dim != 1:
                fresh[rank - len(dims) + axis] = dim
        call.put(0, fresh)
        return
    if any(isinstance(e, int) and e < 0 for e in target):
        call.fail(f"the target shape {dim_math.text(_plain(target))} has a negative size")
    found = dim_math.broadcast_shapes([dims, _plain(target)])
    if found is None:
        call.fail(f"{dim_math.text(dims)} does not broadcast to {dim_math.text(_plain(target))}")
    call.put(0, [_or_fresh(call, d, axis) for axis, d in enumerate(found)])
    data = call.data(0)
    size = dim_math.product(found)
    if data is not None and len(found) == 1 and isinstance(size, int) and size <= MAX_DATA:
        call.put(0, data=data if len(data) == size else data * size)


@rule("Tile")
def tile(call: Call) -> None:
    """Each axis times its repeat."""
    dims = call.known(0)
    if call.opset < 6:
        raise Undecided
    repeats = call.data(1)
    if repeats is None:
        call.put(0, [call.fresh(0, axis) for axis in range(len(dims))])
        return
    if len(repeats) != len(dims):
        call.fail(f"{len(repeats)} repeats for rank {len(dims)}")
    found = [dim_math.mul(d, _whole(r)) for d, r in zip(dims, repeats, strict=True)]
    call.put(0, [_or_fresh(call, d, axis) for axis, d in enumerate(found)])


def _whole(element: Element) -> Dim:
    if isinstance(element, float):
        return int(element) if element.is_integer() else dim_math.UNKNOWN
    return element


@rule("DepthToSpace SpaceToDepth")
def depth_to_space(call: Call) -> None:
    """Blocks of channels become blocks of pixels, or the reverse."""
    batch, channels, height, width = call.rank(0, 4)
    block = call.attr("blocksize", 1)
    if call.node.op_type == "DepthToSpace":
        _check_divides(call, channels, block * block, "channels")
        shape = (
            batch,
            dim_math.floordiv(channels, block * block),
            dim_math.mul(height, block),
            dim_math.mul(width, block),
        )
    else:
        _check_divides(call, height, block, "rows")
        _check_divides(call, width, block, "columns")
        shape = (
            batch,
            dim_math.mul(channels, block * block),
            dim_math.floordiv(height, block),
            dim_math.floordiv(width, block),
        )
    call.put(0, shape)


def _check_divides(call: Call, dim: Dim, by: int, what: str) -> None:
    if isinstance(dim, int) and (by <= 0 or dim % by):
        call.fail(f"{dim} {what} do not divide by {by}")


# --- joining and splitting -------------------------------------------------------------------


@rule("Concat")
def concat(call: Call) -> None:
    """Sizes add along `axis`, and agree elsewhere."""
    inputs = range(len(call.node.inputs))
    shapes = [call.dims(i) for i in inputs]
    known = [s for s in shapes if s is not None]
    if not known:
        return
    rank = len(known[0])
    if any(len(s) != rank for s in known):
        call.fail(f"the inputs have different ranks: {', '.join(map(dim_math.text, known))}")
    axis = call.axis(call.attr("axis", 1 if call.opset < 4 else 0), rank)
    result = [_agreed(call, known, i) if i != axis else 0 for i in range(rank)]
    if len(known) < len(shapes):
        result[axis] = call.fresh(0, axis)
    else:
        total: Dim = sum(d for s in known if isinstance(d := s[axis], int))
        for shape in known:
            if not isinstance(shape[axis], int):
                total = dim_math.add(total, shape[axis])
        result[axis] = _or_fresh(call, total, axis)
    call.put(0, result)
    columns = [call.data(i) for i in inputs]
    if rank == 1 and all(c is not None for c in columns):
        joined = tuple(e for c in columns for e in c or ())
        if len(joined) <= MAX_DATA:
            call.put(0, data=joined)


def _agreed(call: Call, shapes: Sequence[Dims], axis: int) -> Dim:
    """One dimension that several shapes share: the most that is known of it."""
    best = shapes[0][axis]
    for shape in shapes[1:]:
        dim = shape[axis]
        call.require_same(
            best,
            dim,
            f"axis {axis} differs: {', '.join(map(dim_math.text, shapes[:6]))}",
            "the inputs must agree on every axis but the one joined",
        )
        if isinstance(dim, int) or dim_math.is_unknown(best):
            best = dim
    return best


@rule("Split")
def split(call: Call) -> None:
    """Sizes from the `split` input or attribute, else equal parts (the last one smaller)."""
    dims = call.known(0)
    axis = call.axis(call.attr("axis", 0), len(dims))
    count = len(call.node.outputs)
    sizes: Sequence[Element] | None = call.attr("split")
    if call.opset >= 13 and call.has(1):
        sizes = call.data(1)
        if sizes is None:
            sizes = [dim_math.UNKNOWN] * count
    if sizes is None:
        parts = call.attr("num_outputs", count)
        part = dim_math.ceildiv(dims[axis], parts)
        last = dim_math.sub(dims[axis], dim_math.mul(part, parts - 1))
        if call.opset < 18 and isinstance(dims[axis], int):
            _check_divides(call, dims[axis], parts, f"entries of axis {axis}")
        elif call.opset < 18:
            last = part  # equal parts are required, so the symbol divides
        sizes = [part] * (parts - 1) + [last]
    else:
        total: Dim = dim_math.UNKNOWN
        if all(isinstance(s, int) for s in sizes):
            total = sum(s for s in sizes if isinstance(s, int))
        message = f"the parts {list(sizes)} do not add up to axis {axis}, {dims[axis]}"
        call.require_same(total, dims[axis], message)
    if len(sizes) < count:
        call.fail(f"{count} outputs for {len(sizes)} parts")
    data, start = call.data(0), 0
    for output in range(count):
        size = _or_fresh(call, _whole(sizes[output]), axis, output)
        call.put(output, (*dims[:axis], size, *dims[axis + 1 :]))
        if data is not None and len(dims) == 1 and isinstance(size, int):
            call.put(output, data=data[start : start + size])
            start += size
        else:
            data = None


@rule("Slice")
def slice_(call: Call) -> None:
    """Python's slice on each axis named."""
    dims = call.known(0)
    starts, ends, axes, steps = _slice_arguments(call, len(dims))
    result = list(dims)
    if axes is None:
        call.put(0, [call.fresh(0, axis) for axis in range(len(dims))])
        return
    for position, axis in enumerate(axes):
        at = _taken(starts, position), _taken(ends, position), _taken(steps, position)
        result[axis] = _or_fresh(call, _slice_length(call, dims[axis], *at), axis)
    call.put(0, result)
    data = call.data(0)
    if data is not None:
        call.put(0, data=_slice_data(data, dims, axes, starts, ends, steps))


def _taken(elements: Data | None, position: int) -> Element:
    return dim_math.UNKNOWN if elements is None else elements[position]


def _slice_arguments(
    call: Call, rank: int
) -> tuple[Data | None, Data | None, list[int] | None, Data | None]:
    steps: Data | None
    if call.opset < 10:
        starts, ends = call.attr("starts"), call.attr("ends")
        count: Dim | None = len(starts or ())
        given, steps = call.attr("axes"), (1,) * len(starts or ())
    else:
        starts, ends = call.data(1), call.data(2)
        count = length_of(call, 1)
        given = call.ints(3) if call.has(3) else None
        if call.has(3) and given is None:
            return starts, ends, None, None
        if not isinstance(count, int) and given is not None:
            count = len(given)
        steps = call.data(4) if call.has(4) else (1,) * (count if isinstance(count, int) else 0)
    if given is None:
        if not isinstance(count, int):
            return starts, ends, None, steps
        given = range(count)
    axes = [call.axis(a, rank) for a in given]
    for name, found in (("starts", starts), ("ends", ends), ("steps", steps)):
        if found is not None and len(found) != len(axes):
            call.fail(f"{len(found)} {name} for {len(axes)} axes")
    return starts, ends, axes, steps


def _slice_length(call: Call, dim: Dim, start: Element, end: Element, step: Element) -> Dim:
    if not isinstance(step, int):
        return dim_math.UNKNOWN
    if step == 0:
        call.fail("a step of 0")
    if isinstance(start, float) or isinstance(end, float) or _is_disputed(end, step):
        return dim_math.UNKNOWN
    if isinstance(dim, int) and isinstance(start, int) and isinstance(end, int):
        return len(_slice_range(dim, start, end, step))
    if step < 0:
        return _reversed_length(dim, start, end, step)
    first, last = _bound(dim, start), _bound(dim, end)
    if first == 0 and step == 1:
        return last
    length = dim_math.ceildiv(dim_math.sub(last, first), step)
    negative = dim_math.is_negative(length)
    return length if negative is False else 0 if negative else dim_math.maximum(length, 0)


def _is_disputed(end: Element, step: int) -> bool:
    """INT_MAX as the end of a reversed slice: clamped to the last element by the definition,
    read as "past the first" by ONNX Runtime. Nothing is claimed.
    """
    return step < 0 and isinstance(end, int) and end in _INT_MAX


def _slice_range(dim: int, start: int, end: int, step: int) -> range:
    """The indices taken, clamped as the operator defines it.

    Python's slice differs for a negative step: a start before the first element is clamped to it,
    not past it.
    """
    start = start + dim if start < 0 else start
    end = end + dim if end < 0 else end
    if step > 0:
        return range(min(max(start, 0), dim), min(max(end, 0), dim), step)
    return range(min(max(start, 0), dim - 1), min(max(end, -1), dim - 1), step)


def _reversed_length(dim: Dim, start: Element, end: Element, step: int) -> Dim:
    """Negative steps over a symbol: only the whole axis reversed is followed."""
    from_last = isinstance(start, int) and (start == -1 or start >= _END)
    if from_last and isinstance(end, int) and end <= -_END:
        return dim_math.ceildiv(dim, -step)
    return dim_math.UNKNOWN


def _bound(dim: Dim, position: Element) -> Dim:
    """A start or end, clamped to [0, dim]; symbols are sizes, so at least 0."""
    if isinstance(position, float):
        return dim_math.UNKNOWN
    if isinstance(position, int):
        if position >= _END:
            return dim
        if position <= -_END:
            return 0
        if position < 0:
            return dim_math.maximum(dim_math.add(dim, position), 0)
        return 0 if position == 0 else dim_math.minimum(position, dim)
    if dim_math.same(position, dim):
        return dim
    negative = dim_math.is_negative(position)
    if negative is None:
        return dim_math.UNKNOWN
    if negative:
        return dim_math.maximum(dim_math.add(dim, position), 0)
    return dim_math.minimum(position, dim)


def _slice_data(
    data: Data,
    dims: Dims,
    axes: list[int],
    starts: Data | None,
    ends: Data | None,
    steps: Data | None,
) -> Data | None:
    grid = element_grid(data, dims)
    if grid is None:
        return None
    for position, axis in enumerate(axes):
        bounds = _taken(starts, position), _taken(ends, position), _taken(steps, position)
        start, end, step = (b if type(b) is int else None for b in bounds)
        if start is None or end is None or step is None or _is_disputed(end, step):
            return None
        grid = grid.take(_slice_range(grid.shape[axis], start, end, step), axis)
    return tuple(grid.reshape(-1))


@rule("Pad")
def pad(call: Call) -> None:
    """Padding before and after each axis named; negative padding crops."""
    dims = call.known(0)
    axes: list[int] | None = list(range(len(dims)))
    if call.opset < 11:
        pads: Data | None = call.attr("pads", call.attr("paddings"))
    else:
        pads = call.data(1)
        if call.has(3):
            given = call.ints(3)
            axes = None if given is None else [call.axis(a, len(dims)) for a in given]
    if pads is None or axes is None:
        call.put(0, [call.fresh(0, axis) for axis in range(len(dims))])
        return
    if len(pads) != 2 * len(axes):
        call.fail(f"{len(pads)} paddings for {len(axes)} axes, expected {2 * len(axes)}")
    result = list(dims)
    for position, axis in enumerate(axes):
        extra = dim_math.add(_whole(pads[position]), _whole(pads[position + len(axes)]))
        found = dim_math.add(dims[axis], extra)
        if isinstance(found, int) and found < 0:
            call.fail(f"axis {axis} of {dim_math.text(dims)} is padded to {found}")
        result[axis] = _or_fresh(call, found, axis)
    call.put(0, result)


# --- picking ---------------------------------------------------------------------------------


@rule("Gather")
def gather(call: Call) -> None:
    """The indices' shape takes the place of `axis`."""
    data, indices = call.rank(0, at_least=1), call.known(1)
    axis = call.axis(call.attr("axis", 0), len(data))
    call.put(0, (*data[:axis], *indices, *data[axis + 1 :]))
    elements, picks = call.data(0), call.ints(1)
    if picks is None:
        return
    size = data[axis]
    if isinstance(size, int):
        for pick in picks:
            if not -size <= pick < size:
                call.fail(f"index {pick} is out of range for axis {axis} of {dim_math.text(data)}")
    if elements is not None and len(data) == 1 and len(indices) <= 1:
        call.put(0, data=tuple(elements[pick] for pick in picks))


@rule("GatherElements")
def gather_elements(call: Call) -> None:
    """The indices' shape."""
    data, indices = call.dims(0), call.dims(1)
    if data is not None:
        call.axis(call.attr("axis", 0), len(data))
        if indices is not None and len(indices) != len(data):
            call.fail(f"data has rank {len(data)}, the indices have rank {len(indices)}")
    call.put(0, indices)


@rule("GatherND")
def gather_nd(call: Call) -> None:
    """Index tuples replace the axes they address."""
    data, indices = call.rank(0, at_least=1), call.rank(1, at_least=1)
    depth, batch = indices[-1], call.attr("batch_dims", 0)
    if not isinstance(depth, int):
        return
    if batch + depth > len(data):
        call.fail(f"index tuples of {depth} after {batch} batch axes for rank {len(data)}")
    call.put(0, (*indices[:-1], *data[batch + depth :]))


@rule("Compress")
def compress(call: Call) -> None:
    """How many are kept is data, unless the condition is known."""
    dims = call.dims(0)
    kept = call.ints(1)
    axis = call.attr("axis")
    if axis is None:
        call.put(0, (call.fresh(0, 0) if kept is None else sum(map(bool, kept)),))
    elif dims is not None:
        axis = call.axis(axis, len(dims))
        count: Dim = call.fresh(0, axis) if kept is None else sum(map(bool, kept))
        call.put(0, (*dims[:axis], count, *dims[axis + 1 :]))


@rule("NonZero")
def non_zero(call: Call) -> None:
    """One row an axis; how many columns is data."""
    dims = call.dims(0)
    rank: Dim = call.fresh(0, 0) if dims is None else max(len(dims), 1)
    call.put(0, (rank, call.fresh(0, 1)))


@rule("Unique")
def unique(call: Call) -> None:
    """How many are distinct is data; the last three outputs are vectors."""
    dims, axis = call.dims(0), call.attr("axis")
    call.put(1, (call.fresh(1, 0),))
    call.put(2, (call.fresh(2, 0),))
    call.put(3, (call.fresh(3, 0),))
    for output in (1, 2, 3):
        call.put(output, dtype=ir.DataType.INT64)
    if axis is None:
        count = call.fresh(0, 0)
        call.put(0, (count,))
        if dims is not None:
            call.put(2, (_or_fresh(call, dim_math.product(dims), 0, 2),))
    elif dims is not None:
        axis = call.axis(axis, len(dims))
        count = call.fresh(0, axis)
        call.put(0, (*dims[:axis], count, *dims[axis + 1 :]))
        call.put(2, (dims[axis],))
    else:
        return
    call.put(1, (count,))
    call.put(3, (count,))


@rule("TopK")
def top_k(call: Call) -> None:
    """k entries along `axis`."""
    dims = call.rank(0, at_least=1)
    axis = call.axis(call.attr("axis", -1), len(dims))
    data = call.data(1) if call.opset >= 10 else (call.attr("k"),)
    count: Dim = dim_math.UNKNOWN if data is None else _whole(data[0])
    length = dims[axis]
    if isinstance(count, int) and isinstance(length, int) and count > length:
        call.fail(f"k = {count} is more than the {length} entries of axis {axis}")
    for output in (0, 1):
        size = _or_fresh(call, count, axis)
        call.put(output, (*dims[:axis], size, *dims[axis + 1 :]))


@rule("OneHot")
def one_hot(call: Call) -> None:
    """`depth` becomes a new axis."""
    dims = call.known(0)
    axis = call.axis(call.attr("axis", -1), len(dims) + 1)
    depth = call.data(1)
    size = dim_math.UNKNOWN if not depth else _whole(depth[0])
    call.put(0, (*dims[:axis], _or_fresh(call, size, axis), *dims[axis:]))


# --- shapes as data --------------------------------------------------------------------------


@rule("Shape")
def shape_of(call: Call) -> None:
    """The dimensions themselves, from `start` to `end`."""
    dims = call.dims(0)
    if dims is None:
        call.put(0, (call.fresh(0, 0),))
        return
    found = dims[slice(call.attr("start", 0), call.attr("end"))]
    call.put(0, (len(found),), data=found)


@rule("Size")
def size_of(call: Call) -> None:
    """The element count."""
    dims = call.dims(0)
    call.put(0, ())
    if dims is not None:
        call.put(0, data=(dim_math.product(dims),))


@rule("ConstantOfShape")
def constant_of_shape(call: Call) -> None:
    """A shape, filled with one value."""
    value = call.attr("value")
    call.put(0, dtype=ir.DataType.FLOAT if value is None else value.dtype)
    dims = dims_from_data(call, call.data(0), length_of(call, 0))
    if any(isinstance(d, int) and d < 0 for d in dims):
        call.fail(f"the shape {dim_math.text(dims)} has a negative size")
    call.put(0, dims)
    size = dim_math.product(dims)
    if len(dims) > 1 or not isinstance(size, int):
        return
    if value is not None and value.dtype == ir.DataType.INT64 and size <= MAX_DATA:
        call.put(0, data=(int(value.numpy().reshape(-1)[0]),) * size)


@rule("Range")
def range_(call: Call) -> None:
    """ceil((limit - start) / delta) elements."""
    ends = [call.data(i) for i in range(3)]
    if any(e is None or len(e) != 1 for e in ends):
        call.put(0, (call.fresh(0, 0),))
        return
    start, limit, delta = (e[0] for e in ends if e is not None)
    call.put(0, (_or_fresh(call, _range_length(call, start, limit, delta), 0),))
    if all(type(e) is int for e in (start, limit, delta)):
        elements = range(start, limit, delta)  # type: ignore[arg-type]
        if len(elements) <= MAX_DATA:
            call.put(0, data=tuple(elements))


def _range_length(call: Call, start: Element, limit: Element, delta: Element) -> Dim:
    if delta == 0:
        call.fail("a step of 0")
    if any(isinstance(e, float) for e in (start, limit, delta)):
        if any(isinstance(e, ir.SymbolicDim) for e in (start, limit, delta)):
            return dim_math.UNKNOWN
        numbers = [np.float64(e) for e in (start, limit, delta)]  # type: ignore[arg-type]
        return max(math.ceil((numbers[1] - numbers[0]) / numbers[2]), 0)
    first, last, step = _whole(start), _whole(limit), _whole(delta)
    length = dim_math.ceildiv(dim_math.sub(last, first), step)
    negative = dim_math.is_negative(length)
    return 0 if negative else length if negative is False else dim_math.maximum(length, 0)

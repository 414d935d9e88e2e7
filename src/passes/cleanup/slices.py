"""Slices, splits, joins and gathers: merged, cancelled, or one Split for several of them.

Here: what picks parts of a tensor or puts parts together, sequences included. Not here: those that
change nothing (`identities`).
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from ...ir.edit import Builder
from ...ir.graph import (
    Dim,
    attribute,
    constant_scalar,
    constant_tensor,
    dims_of,
    is_onnx_op,
    static_shape,
)
from ...ir.match import Match, OpPattern, const, op, var
from ..base import Context
from ..rules import RewriteRule
from .conditions import (
    CleanupRule,
    axes_of,
    consumers_of,
    ints,
    must_stay,
    only_used_once,
    reshape_target,
    reshaped,
    same_dims,
    typed,
)
from .reshapes import RESHAPES

_END = (1 << 63) - 1
_SMALL = 4096


@dataclasses.dataclass(frozen=True)
class Cut:
    """What a Slice takes of one axis, with a step of 1; `end` is None up to the last element."""

    axis: int
    start: int
    end: int | None


def cuts_of(node: ir.Node) -> list[Cut] | None:
    """A Slice's cuts, one for each axis it names, starts and ends counted from the front.

    None where something is not constant, reverses or skips, or counts from the back of an axis of
    unknown size.
    """
    dims = dims_of(node.inputs[0])
    given = [ints(v) for v in node.inputs[1:]]
    if dims is None or len(given) < 2 or given[0] is None or given[1] is None:
        return None
    starts, ends = given[0], given[1]
    has_axes = len(node.inputs) > 3 and node.inputs[3] is not None
    axes = given[2] if has_axes else tuple(range(len(starts)))
    steps = given[3] if len(node.inputs) > 4 and node.inputs[4] is not None else (1,) * len(starts)
    if axes is None or steps is None or not len(axes) == len(starts) == len(ends) == len(steps):
        return None
    cuts = []
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        cut = _cut(start, end, axis % len(dims), dims[axis % len(dims)])
        if step != 1 or cut is None:
            return None
        cuts.append(cut)
    return cuts if len({c.axis for c in cuts}) == len(cuts) else None


def _cut(start: int, end: int, axis: int, size: object) -> Cut | None:
    if isinstance(size, int):
        first, last = (max(0, p + size) if p < 0 else min(p, size) for p in (start, end))
        return Cut(axis, first, max(first, last))
    if start < 0 or end < 0:
        return None
    if end >= (1 << 31) - 1:
        return Cut(axis, start, None)
    return None if end < start else Cut(axis, start, end)


def _single(node: ir.Node) -> Cut | None:
    """The cut of a Slice along one axis of known size."""
    cuts, dims = cuts_of(node), dims_of(node.inputs[0])
    if cuts is None or dims is None:
        return None
    real = [c for c in cuts if (c.start, c.end) != (0, dims[c.axis])]
    if len(real) != 1 or not isinstance(dims[real[0].axis], int):
        return None
    return real[0]


@dataclasses.dataclass(frozen=True)
class MergeSlices(CleanupRule):
    """Slice(Slice(x, ..), ..) -> Slice(x, ..), with steps of 1."""

    def pattern(self) -> OpPattern:
        inner = op.Slice(var("x"), const("s"), const("e"), _rest=True, _name="inner")
        return op.Slice(inner, const("t"), const("f"), _rest=True)

    def check(self, m: Match, context: Context) -> str | None:
        if cuts_of(m.node("inner")) is None or cuts_of(m.root) is None:
            return "a start, an end or a step is not known, or not from the front"
        return None

    def rewrite(self, m: Match, build: Builder) -> ir.Value:
        merged = {c.axis: c for c in cuts_of(m.node("inner")) or ()}
        for cut in cuts_of(m.root) or ():
            first = merged.get(cut.axis, Cut(cut.axis, 0, None))
            ends = [e for e in (first.end, _plus(first.start, cut.end)) if e is not None]
            merged[cut.axis] = Cut(cut.axis, first.start + cut.start, min(ends, default=None))
        return sliced(build, m["x"], list(merged.values()))


def _plus(start: int, end: int | None) -> int | None:
    return None if end is None else start + end


def sliced(build: Builder, value: ir.Value, cuts: Sequence[Cut]) -> ir.Value:
    """A Slice of the cuts given."""
    cuts = sorted(cuts, key=lambda cut: cut.axis)
    starts, axes = [c.start for c in cuts], [c.axis for c in cuts]
    ends = [_END if c.end is None else c.end for c in cuts]
    result: ir.Value = build.Slice(value, *(np.array(v, np.int64) for v in (starts, ends, axes)))
    return result


@dataclasses.dataclass(frozen=True)
class SlicesToSplit(CleanupRule):
    """Slices of x that divide one axis among them, nothing left over -> one Split."""

    def pattern(self) -> OpPattern:
        return op.Slice(var("x"), const("starts"), const("ends"), _rest=True)

    def check(self, m: Match, context: Context) -> str | None:
        return None if self._parts(m) else "the slices of x do not divide one axis"

    def rewrite(self, m: Match, build: Builder) -> ir.Value:
        parts = self._parts(m)
        assert parts is not None
        axis = parts[0][0].axis
        sizes = np.array([(c.end or 0) - c.start for c, _ in parts], np.int64)
        maker = build.where_made(m["x"])
        split = maker.node("Split", m["x"], sizes, _outputs=len(parts), axis=axis)
        own = split.outputs[0]
        for part, (_, nodes) in zip(split.outputs, parts, strict=True):
            like = nodes[0].outputs[0]
            typed(part, like, dims_of(like))
            for node in nodes:
                if node is m.root:
                    own = part
                else:
                    build.replace(node.outputs[0], part)
        return own

    @staticmethod
    def _parts(m: Match) -> list[tuple[Cut, list[ir.Node]]] | None:
        own = _single(m.root)
        if own is None:
            return None
        found: dict[Cut, list[ir.Node]] = {}
        for node in consumers_of(m["x"], lambda n: is_onnx_op(n, "Slice")):
            cut = _single(node)
            if cut is not None and cut.axis == own.axis:
                found.setdefault(cut, []).append(node)
        parts = sorted(found.items(), key=lambda item: item[0].start)
        dims = dims_of(m["x"])
        assert dims is not None
        ends = [0, *(cut.end for cut, _ in parts)]
        if len(parts) < 2 or ends[-1] != dims[own.axis]:
            return None
        if any(
            cut.start != end or cut.end == end for (cut, _), end in zip(parts, ends, strict=False)
        ):
            return None
        outputs = [n.outputs[0] for _, nodes in parts for n in nodes]
        # two that are graph outputs stay two; and none may be an output of another graph
        if any(v.is_graph_output() for v in outputs):
            return None
        return parts


@dataclasses.dataclass(frozen=True)
class SliceOfConcat(CleanupRule):
    """Slice(Concat(.., x, ..)) of a part that is all of x -> x; of a part of x -> Slice(x)."""

    def pattern(self) -> OpPattern:
        joined = op.Concat(var("first"), _rest=True, _name="concat", _shared=True)
        return op.Slice(joined, const("starts"), const("ends"), _rest=True)

    def check(self, m: Match, context: Context) -> str | None:
        found = self._source(m)
        if found is None:
            return "it takes from more than one input, or a size is not known"
        value, cut = found
        return must_stay(m.root.outputs[0], value) if cut is None else None

    def rewrite(self, m: Match, build: Builder) -> ir.Value:
        found = self._source(m)
        assert found is not None
        value, cut = found
        return value if cut is None else sliced(build, value, [cut])

    @staticmethod
    def _source(m: Match) -> tuple[ir.Value, Cut | None] | None:
        cut = _single(m.root)
        concat = m.node("concat")
        rank = len(dims_of(concat.outputs[0]) or ())
        if cut is None or cut.end is None or cut.axis != attribute(concat, "axis") % rank:
            return None
        start = 0
        for value, size in zip(concat.inputs, _sizes(concat.inputs, cut.axis), strict=True):
            if value is None or size is None:
                return None
            if start <= cut.start and cut.end <= start + size:
                whole = (cut.start, cut.end) == (start, start + size)
                part = Cut(cut.axis, cut.start - start, cut.end - start)
                return value, None if whole else part
            start += size
        return None


def _sizes(values: Sequence[ir.Value | None], axis: int) -> list[int | None]:
    """Along one axis; None for what is not known."""
    found: list[int | None] = []
    for value in values:
        dims = dims_of(value)
        size = None if dims is None else dims[axis]
        found.append(size if isinstance(size, int) else None)
    return found


@dataclasses.dataclass(frozen=True)
class SplitOfConcat(CleanupRule):
    """Split(Concat(x, y, ..)) at the seams -> x, y, .."""

    def pattern(self) -> OpPattern:
        joined = op.Concat(var("first"), _rest=True, _name="concat", _shared=True)
        return op.Split(joined, _rest=True)

    def check(self, m: Match, context: Context) -> str | None:
        concat = m.node("concat")
        rank = len(dims_of(concat.outputs[0]) or ())
        axis = attribute(m.root, "axis", 0)
        if rank == 0 or axis % rank != attribute(concat, "axis") % rank:
            return "it splits along another axis, or the rank is not known"
        before = _sizes(concat.inputs, axis % rank)
        if None in before or before != _sizes(m.root.outputs, axis % rank):
            return "it does not split at the seams"
        for old, new in zip(m.root.outputs, concat.inputs, strict=True):
            if new is None or (reason := must_stay(old, new)):
                return reason or "an input is absent"
        return None

    def rewrite(self, m: Match, build: Builder) -> tuple[ir.Value | None, ...]:
        return tuple(m.node("concat").inputs)


@dataclasses.dataclass(frozen=True)
class ConcatOfSplit(CleanupRule):
    """Concat(all parts of Split(x), in order) along the same axis -> x."""

    def pattern(self) -> OpPattern:
        split = op.Split(var("x"), _rest=True, _name="split", _shared=True)
        return op.Concat(split, _rest=True)

    def check(self, m: Match, context: Context) -> str | None:
        split = m.node("split")
        rank = len(dims_of(m["x"]) or ())
        axis = attribute(m.root, "axis")
        if rank == 0 or axis % rank != attribute(split, "axis", 0) % rank:
            return "it joins along another axis, or the rank is not known"
        if tuple(m.root.inputs) != tuple(split.outputs):
            return "it does not join all parts in order"
        return must_stay(m.root.outputs[0], m["x"])

    def rewrite(self, m: Match, build: Builder) -> ir.Value:
        return m["x"]


@dataclasses.dataclass(frozen=True)
class MergeConcats(CleanupRule):
    """Concat(Concat(x, y), z) along one axis -> Concat(x, y, z); inputs of size 0 are left out."""

    def pattern(self) -> OpPattern:
        return op.Concat(var("first"), _rest=True)

    def check(self, m: Match, context: Context) -> str | None:
        inputs = self._inputs(m.root)
        if inputs is None:
            return "no input is empty or itself joined along the same axis for this alone"
        return must_stay(m.root.outputs[0], inputs[0]) if len(inputs) == 1 else None

    def rewrite(self, m: Match, build: Builder) -> ir.Value:
        inputs = self._inputs(m.root)
        assert inputs is not None
        if len(inputs) == 1:
            return inputs[0]
        value: ir.Value = build.Concat(*inputs, axis=attribute(m.root, "axis"))
        return value

    @staticmethod
    def _inputs(node: ir.Node) -> list[ir.Value] | None:
        rank = len(dims_of(node.outputs[0]) or ())
        if rank == 0:
            return None
        axis = attribute(node, "axis") % rank
        inputs: list[ir.Value] = []
        for value in node.inputs:
            if value is None:
                return None
            producer = value.producer()
            if _sizes([value], axis) == [0]:
                continue
            if (
                producer is not None
                and is_onnx_op(producer, "Concat")
                and producer.graph is node.graph
                and only_used_once(value)
                and attribute(producer, "axis") % rank == axis
                and all(v is not None for v in producer.inputs)
            ):
                inputs.extend(v for v in producer.inputs if v is not None)
            else:
                inputs.append(value)
        return inputs if inputs and inputs != list(node.inputs) else None


@dataclasses.dataclass(frozen=True)
class SliceOneToGather(CleanupRule):
    """Squeeze(Slice(x, [i], [i + 1], [a]), [a]) -> Gather(x, i, axis=a), for a scalar i."""

    def pattern(self) -> OpPattern:
        part = op.Slice(var("x"), const("starts"), const("ends"), _rest=True, _name="slice")
        return op.one_of(("Squeeze", "Reshape"), part, _rest=True)

    def check(self, m: Match, context: Context) -> str | None:
        cut = _single(m.node("slice"))
        if cut is None or cut.end != cut.start + 1:
            return "it takes more than one element, or the axis has no known size"
        dims = dims_of(m["x"]) or ()
        return None if _drops(m.root, dims, cut.axis) else "it drops other axes"

    def rewrite(self, m: Match, build: Builder) -> ir.Value:
        cut = _single(m.node("slice"))
        assert cut is not None
        value: ir.Value = build.Gather(m["x"], np.array(cut.start), axis=cut.axis)
        return value


@dataclasses.dataclass(frozen=True)
class SplitToGathers(CleanupRule):
    """Squeeze of each part of a Split into ones -> Gather(x, i, axis), for a scalar i.

    One part may be reshaped in another way, which is left: then there is one node as before.
    """

    def pattern(self) -> OpPattern:
        return op.Split(var("x"), _rest=True)

    def check(self, m: Match, context: Context) -> str | None:
        dims = dims_of(m["x"])
        if dims is None:
            return "the rank is not known"
        axis = attribute(m.root, "axis", 0) % len(dims)
        if dims[axis] != len(m.root.outputs) or len(m.root.outputs) < 2:
            return "the parts are not one element each"
        others = 0
        for value in m.root.outputs:
            if not value.uses() and not value.is_graph_output():
                continue
            if not only_used_once(value):
                return "a part has other users"
            (user,) = value.consumers()
            if user.graph is not m.root.graph or not is_onnx_op(user, *RESHAPES):
                return "a part is not squeezed"
            result = dims_of(user.outputs[0])
            if user.outputs[0].is_graph_output() or result is None:
                return "a part is returned, or its shape is not known"
            if not _drops(user, dims, axis):
                others += 1
                if reshape_target(result, _without(dims, axis)) is None:
                    return "a shape depends on more than one symbol"
        return "more than one part is not squeezed" if others > 1 else None

    def rewrite(self, m: Match, build: Builder) -> tuple[ir.Value | None, ...]:
        dims = dims_of(m["x"])
        assert dims is not None
        axis = attribute(m.root, "axis", 0) % len(dims)
        for i, part in enumerate(m.root.outputs):
            for user in list(part.consumers()):
                old = user.outputs[0]
                drops = _drops(user, dims, axis)
                value = build.Gather(m["x"], np.array(i), axis=axis)
                typed(value, m["x"], _without(dims, axis))
                if not drops:
                    made = reshaped(build, value, dims_of(old) or ())
                    assert made is not None
                    value = made
                build.replace(old, value)
        return (None,) * len(m.root.outputs)


def _without(dims: Sequence[Dim], axis: int) -> tuple[Dim, ...]:
    return (*dims[:axis], *dims[axis + 1 :])


def _drops(node: ir.Node, dims: Sequence[Dim], axis: int) -> bool:
    """Whether all that the node does to a tensor of these dimensions, but 1 at `axis`, is to drop
    that axis."""
    if is_onnx_op(node, "Squeeze"):
        return axes_of(node, len(dims)) == (axis,)
    return same_dims(dims_of(node.outputs[0]), _without(dims, axis))


@dataclasses.dataclass(frozen=True)
class GatherNDToGather(CleanupRule):
    """GatherND(x, indices of shape [.., 1]) -> Gather(x, indices of shape [..]), constant."""

    def pattern(self) -> OpPattern:
        return op.GatherND(var("x"), const("i", data=False))

    def check(self, m: Match, context: Context) -> str | None:
        shape = static_shape(m["i"])
        if attribute(m.root, "batch_dims", 0) or not shape or shape[-1] != 1:
            return "it takes single elements, or batch by batch"
        return None if _alike(m["i"], m.root) else "the indices have another use"

    def rewrite(self, m: Match, build: Builder) -> ir.Value:
        shape = (static_shape(m["i"]) or ())[:-1]
        value: ir.Value = build.Gather(m["x"], _reshaped_indices(build, m["i"], shape), axis=0)
        return value


def _reshaped_indices(build: Builder, value: ir.Value, shape: tuple[int, ...]) -> ir.Value:
    """A Reshape of a constant, which folding makes one, data or not."""
    result: ir.Value = build.Reshape(value, np.array(shape, np.int64))
    return typed(result, value, shape)


def _alike(value: ir.Value, node: ir.Node) -> bool:
    """Whether all users of a constant are of the kind of `node`, and will be rewritten like it:
    else its bytes would be stored twice, which matters where they are many."""
    tensor = constant_tensor(value)
    if tensor is not None and tensor.nbytes <= _SMALL:
        return True
    return all(user.op_type == node.op_type and index == 1 for user, index in value.uses())


@dataclasses.dataclass(frozen=True)
class ReshapeOfGather(CleanupRule):
    """Reshape(Gather(x, i)) of the axes of i alone, a constant -> Gather(x, Reshape(i))."""

    def pattern(self) -> OpPattern:
        gather = op.Gather(var("x"), const("i", data=False), _name="gather")
        return op.one_of(RESHAPES, gather, _rest=True)

    def check(self, m: Match, context: Context) -> str | None:
        if self._shape(m) is None:
            return "it reshapes more than the axes of the indices"
        return None if _alike(m["i"], m.node("gather")) else "the indices have another use"

    def rewrite(self, m: Match, build: Builder) -> ir.Value:
        shape = self._shape(m)
        assert shape is not None
        axis = m.attribute("gather", "axis", 0)
        value: ir.Value = build.Gather(m["x"], _reshaped_indices(build, m["i"], shape), axis=axis)
        return value

    @staticmethod
    def _shape(m: Match) -> tuple[int, ...] | None:
        """The shape of the indices that gives the result's shape."""
        x, out = dims_of(m["x"]), dims_of(m.root.outputs[0])
        if x is None or out is None:
            return None
        axis = m.attribute("gather", "axis", 0) % len(x)
        before, after = x[:axis], x[axis + 1 :]
        end = len(out) - len(after)
        if end < axis or not same_dims(out[:axis], before) or not same_dims(out[end:], after):
            return None
        shape = out[axis:end]
        if not all(isinstance(d, int) for d in shape):
            return None
        sizes = tuple(d for d in shape if isinstance(d, int))
        indices = static_shape(m["i"])
        if indices is None or math.prod(sizes) != math.prod(indices):
            return None
        return sizes


@dataclasses.dataclass(frozen=True)
class SequenceToSplit(CleanupRule):
    """SequenceAt(SplitToSequence(x, sizes), i), for all that use it, i constant -> Split(x)[i]."""

    def pattern(self) -> OpPattern:
        return op.SplitToSequence(var("x"), _rest=True)

    def check(self, m: Match, context: Context) -> str | None:
        sizes = self._sizes(m)
        if sizes is None or len(sizes) > 1024:
            return "the sizes of the parts are not known"
        if not attribute(m.root, "keepdims", 1) and len(m.root.inputs) < 2:
            return "the parts lose their axis"
        if m.root.outputs[0].is_graph_output():
            return "the sequence is returned"
        for user in m.root.outputs[0].consumers():
            if not is_onnx_op(user, "SequenceAt") or user.graph is not m.root.graph:
                return f"it is used by {user.op_type}"
            position = constant_scalar(user.inputs[1])
            if position is None or not -len(sizes) <= position < len(sizes):
                return "a position is not constant, or there is none such"
        return None

    def rewrite(self, m: Match, build: Builder) -> tuple[ir.Value | None, ...]:
        sizes = self._sizes(m)
        assert sizes is not None
        axis = attribute(m.root, "axis", 0)
        array = np.array(sizes, np.int64)
        split = build.node("Split", m["x"], array, _outputs=len(sizes), axis=axis)
        for user in list(m.root.outputs[0].consumers()):
            part = split.outputs[int(constant_scalar(user.inputs[1]) or 0)]
            typed(part, m["x"], dims_of(user.outputs[0]))
            build.replace(user.outputs[0], part)
        return (None,)

    @staticmethod
    def _sizes(m: Match) -> list[int] | None:
        dims = dims_of(m["x"])
        if dims is None:
            return None
        given = m.root.inputs[1] if len(m.root.inputs) > 1 else None
        whole = dims[attribute(m.root, "axis", 0) % len(dims)]
        if given is None:
            return [1] * whole if isinstance(whole, int) else None
        found = ints(given)
        tensor = constant_tensor(given)
        if found is None or tensor is None:
            return None
        if len(tensor.shape) > 0:
            return list(found)
        if not isinstance(whole, int) or found[0] <= 0:
            return None
        step = found[0]
        return [min(step, whole - start) for start in range(0, whole, step)]


@dataclasses.dataclass(frozen=True)
class SequenceOfParts(CleanupRule):
    """SequenceAt(SequenceConstruct(x, y, ..), i), i constant -> the i-th; ConcatFromSequence of
    SequenceConstruct -> Concat."""

    def pattern(self) -> tuple[OpPattern, ...]:
        parts = op.SequenceConstruct(var("first"), _rest=True, _name="parts", _shared=True)
        return op.SequenceAt(parts, const("i")), op.ConcatFromSequence(parts)

    def check(self, m: Match, context: Context) -> str | None:
        parts = m.node("parts").inputs
        if "i" not in m.values:
            return "it stacks" if attribute(m.root, "new_axis", 0) else None
        position = constant_scalar(m["i"])
        if position is None or not -len(parts) <= position < len(parts):
            return "there is no such part"
        value = parts[int(position)]
        return "the part is absent" if value is None else must_stay(m.root.outputs[0], value)

    def rewrite(self, m: Match, build: Builder) -> ir.Value:
        parts = m.node("parts").inputs
        if "i" not in m.values:
            value: ir.Value = build.Concat(*parts, axis=attribute(m.root, "axis"))
            return value
        part = parts[int(constant_scalar(m["i"]) or 0)]
        assert part is not None
        return part


@dataclasses.dataclass(frozen=True)
class GatherAll(CleanupRule):
    """Gather(x, [0, 1, .., n - 1]) along an axis of size n -> x."""

    def pattern(self) -> OpPattern:
        return op.Gather(var("x"), const("i"))

    def check(self, m: Match, context: Context) -> str | None:
        dims, indices = dims_of(m["x"]), m.array("i")
        if dims is None or indices.ndim != 1:
            return "the indices are not a list, or the rank is not known"
        if dims[attribute(m.root, "axis", 0) % len(dims)] != len(indices):
            return "it takes another number of elements"
        if not np.array_equal(indices, np.arange(len(indices))):
            return "the indices are not all in order"
        return must_stay(m.root.outputs[0], m["x"])

    def rewrite(self, m: Match, build: Builder) -> ir.Value:
        return m["x"]


@dataclasses.dataclass(frozen=True)
class ShapePart(CleanupRule):
    """Unsqueeze(Gather(Shape(x), i), [0]), Gather(Shape(x), [i]), Slice(Shape(x), [a], [b]) ->
    Shape(x, start=a, end=b)."""

    def pattern(self) -> tuple[OpPattern, ...]:
        whole = op.Shape(var("x"), _name="shape", _shared=True)
        element = op.Gather(whole, const("i"), _shared=True)
        return (
            op.one_of(("Unsqueeze", "Reshape"), element, _rest=True),
            op.Gather(whole, const("i")),
            op.Slice(whole, const("starts"), const("ends"), _rest=True, _name="slice"),
        )

    def check(self, m: Match, context: Context) -> str | None:
        if dims_of(m["x"]) is None:
            return "the rank is not known"
        if context.opsets.get("", 0) < 15:
            return "Shape gives a part of the shape from opset 15 on"
        if m.attribute("shape", "start", 0) or m.attribute("shape", "end") is not None:
            return "it is a part already"
        dims = dims_of(m.root.outputs[0])
        if dims is None or len(dims) != 1:
            return "the result is not a list"
        return None if self._bounds(m) is not None else "it takes more than one stretch"

    def rewrite(self, m: Match, build: Builder) -> ir.Value:
        bounds = self._bounds(m)
        assert bounds is not None
        value: ir.Value = build.Shape(m["x"], start=bounds[0], end=bounds[1])
        return value

    @staticmethod
    def _bounds(m: Match) -> tuple[int, int] | None:
        rank = len(dims_of(m["x"]) or ())
        if "slice" in m.nodes:
            cuts = cuts_of(m.node("slice"))
            if cuts is None or len(cuts) != 1 or cuts[0].end is None:
                return None
            return cuts[0].start, cuts[0].end
        indices = [int(i) for i in m.array("i").reshape(-1)]
        if not indices or any(not -rank <= i < rank for i in indices):
            return None
        indices = [i % rank for i in indices]
        if any(b != a + 1 for a, b in itertools.pairwise(indices)):
            return None
        return indices[0], indices[-1] + 1


SLICE_RULES: tuple[type[RewriteRule], ...] = (
    SequenceToSplit,
    SequenceOfParts,
    MergeSlices,
    SliceOfConcat,
    SplitOfConcat,
    ConcatOfSplit,
    MergeConcats,
    SliceOneToGather,
    SplitToGathers,
    SlicesToSplit,
    GatherAll,
    GatherNDToGather,
    ReshapeOfGather,
    ShapePart,
)

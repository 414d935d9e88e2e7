"""The heads of attention: how queries, keys and values lie in the matrix they are cut from.

Here: `read_heads`, which reads a (batch, heads, length, size) value as columns of a (batch, length,
width) one, and `Heads.build`, which writes that. Not here: reading views (`views`), scores and
masks (`scores`), the operator that takes the heads (`attention`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from ...ir import dims as dim_math
from ...ir.edit import Builder
from ...ir.graph import Dim, dims_of
from .views import REPEATED, Axis, Digit, View, merged, views_of


@dataclasses.dataclass(frozen=True)
class Heads:
    """`count` heads of `size` columns of `source`, from `offset` on, every `stride`-th column.

    `batch` and `length` are the rows that `source` has, of rank 2 or more. Each head stands for
    `repeats` of the attention's (grouped queries). `scale` multiplies the elements.
    """

    source: ir.Value
    batch: Dim
    length: Dim
    count: int
    size: int
    stride: int
    offset: int
    repeats: int
    scale: float
    nodes: tuple[ir.Node, ...]

    @property
    def width(self) -> int:
        """Columns of all heads together."""
        return self.count * self.size

    @property
    def contiguous(self) -> bool:
        """Whether the heads lie side by side."""
        return self.stride == self.size or self.count == 1

    @property
    def whole(self) -> bool:
        """Whether the heads are all that the source has."""
        return self.contiguous and self.offset == 0 and _columns(self.source) == self.width

    def rows(self, build: Builder) -> ir.Value:
        """The source as (batch, length, columns)."""
        wanted = (self.batch, self.length, _columns(self.source))
        if have_dims(self.source, wanted):
            return self.source
        value: ir.Value = build.Reshape(self.source, target_shape(wanted))
        return typed(value, wanted, self.source)


def read_heads(value: ir.Value, *, transposed: bool = False) -> Heads | str:
    """The heads of a (batch..., heads, length, size) value, or why it has no such form.

    `transposed`: the value is (batch..., heads, size, length), as the keys of a product are.
    """
    reason = ""
    for view in views_of(value):
        axes = view.axes if not transposed else (*view.axes[:-2], view.axes[-1], view.axes[-2])
        found = _from_view(view, axes)
        if isinstance(found, Heads):
            return found
        reason = reason or found
    return (
        f"{value.name!r} is not split into heads from one matrix: {reason or 'no shape is known'}"
    )


def _from_view(view: View, axes: tuple[Axis, ...]) -> Heads | str:
    dims = dims_of(view.source)
    if dims is None or len(dims) < 2 or len(axes) < 3:
        return "it has too few axes"
    last = len(dims) - 1
    if not isinstance(dims[last], int):
        return "its width is not known"
    size = merged(axes[-1])
    if len(size) != 1 or size[0].axis != last or size[0].stride != 1:
        return "the elements of a head do not lie side by side"
    if len(axes) > 3 and any(digit.axis not in (last, REPEATED) for digit in axes[-3]):
        return "its heads are an axis of their own"
    lead = [digit for axis in axes[:-2] for digit in axis]
    heads: list[Digit] = []
    while lead and lead[-1].axis in (last, REPEATED):
        heads.insert(0, lead.pop())
    if any(d.axis == REPEATED for d in heads[:-1]):
        return "its heads are repeated as a whole, not each by itself"
    repeated = [d for d in heads if d.axis == REPEATED]
    heads = list(merged([d for d in heads if d.axis == last]))
    if len(heads) > 1:
        return "its heads are no regular columns"
    rows = [d for d in lead if d.size != 1]
    plain = [Digit(i, 1, d) for i, d in enumerate(dims[:-1]) if d != 1]
    if not _same_digits(merged([*rows, *axes[-2]]), plain):
        return "the rows are in another order"
    if any(not isinstance(d.size, int) for d in (*heads, *repeated, *size)):
        return "the number or size of the heads is not known"
    return Heads(
        view.source,
        dim_math.product([d.size for d in rows]),
        dim_math.product([d.size for d in axes[-2]]),
        int(heads[0].size) if heads else 1,  # type: ignore[arg-type]
        int(size[0].size),  # type: ignore[arg-type]
        heads[0].stride if heads else int(size[0].size),  # type: ignore[arg-type]
        view.offset,
        int(repeated[0].size) if repeated else 1,  # type: ignore[arg-type]
        view.scale,
        view.nodes,
    )


def _same_digits(a: Sequence[Digit], b: Sequence[Digit]) -> bool:
    return len(a) == len(b) and all(
        (x.axis, x.stride) == (y.axis, y.stride) and dim_math.same(x.size, y.size) is True
        for x, y in zip(a, b, strict=True)
    )


def have_dims(value: ir.Value, dims: Sequence[Dim]) -> bool:
    """Whether a value is known to have these dimensions."""
    own = dims_of(value)
    return (
        own is not None
        and len(own) == len(dims)
        and all(dim_math.same(a, b) is True for a, b in zip(own, dims, strict=True))
    )


def _columns(value: ir.Value) -> int:
    dims = dims_of(value)
    assert dims is not None
    assert isinstance(dims[-1], int)
    return dims[-1]


def target_shape(dims: Sequence[Dim]) -> np.ndarray:
    """The input of a Reshape to `dims`, of which at most one is a symbol."""
    return np.array([d if isinstance(d, int) else -1 for d in dims], np.int64)


def typed(value: ir.Value, dims: Sequence[Dim], like: ir.Value) -> ir.Value:
    """`value` with its shape set, and the element type of `like`."""
    value.shape = ir.Shape(list(dims))
    value.type = like.type
    return value


def write_columns(heads: Sequence[Heads], build: Builder) -> list[ir.Value]:
    """The heads as (batch, length, width) values, those cut from one source by one Split."""
    results: dict[int, ir.Value] = {}
    for first in heads:
        group = sorted(
            {h.offset: h for h in heads if h.source is first.source}.values(),
            key=lambda h: h.offset,
        )
        if any(id(h) in results for h in heads if h.source is first.source):
            continue
        rows = first.rows(build)
        parts = {group[0].offset: rows} if first.whole else _cut(rows, group, build)
        for h in heads:
            if h.source is first.source:
                results[id(h)] = parts[h.offset]
    return [results[id(h)] for h in heads]


def _cut(rows: ir.Value, group: Sequence[Heads], build: Builder) -> dict[int, ir.Value]:
    starts = [h.offset for h in group]
    ends = [h.offset + h.width for h in group]
    columns = _columns(rows)
    if starts == [0, *ends[:-1]] and ends[-1] == columns:
        sizes = np.array([h.width for h in group], np.int64)
        values = build.node("Split", rows, sizes, _outputs=len(group), axis=-1).outputs
    else:
        values = [
            build.Slice(rows, *(np.array([i], np.int64) for i in (start, end, 2)))
            for start, end in zip(starts, ends, strict=True)
        ]
    for h, value in zip(group, values, strict=True):
        typed(value, (h.batch, h.length, h.width), rows)
    return dict(zip(starts, values, strict=True))

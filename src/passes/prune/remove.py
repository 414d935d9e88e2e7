"""Removing units: parameters lose positions, and nodes that state sizes state the new ones.

Here: `remove`. Not here: which units may go together (`groups`), nodes one by one (`resize`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from ...errors import InvalidGraphError
from ...ir.graph import AbsentTensor, graphs, is_absent
from ...ir.shapes import infer_shapes
from .absorb import absorb
from .cut import kept_sizes, take
from .groups import Group, Groups, parameter_tracks
from .kept import Kept
from .labels import Track
from .resize import resize


def remove(model: ir.Model, groups: Groups, chosen: Mapping[Group, Sequence[int]]) -> None:
    """Take the chosen units out of the model that the groups were found in, in place.

    The groups are used up: find them again for another removal. Units are numbered within their
    group; of groups with rows, as many of each row of a cluster must be chosen. What a channel
    gives that is constant (its weights are zero) goes to the biases of the layers that read it.

    Raises:
        InvalidGraphError: rows of a cluster are left with different lengths, or nothing of a
            group is left; the model is as it was.
    """
    _check(groups, chosen)
    gone = groups.labels_of(chosen)
    if not gone.any():
        return
    kept = Kept(groups.flow, gone, absorb(model, groups.flow, gone))
    for value, shape, tracks in parameter_tracks(groups.flow):
        if any(gone[t.ids].any() for t in tracks):
            _shrink(value, shape, tracks, gone)
    for graph in list(graphs(model)):
        for node in list(graph):
            resize(node, kept)
    infer_shapes(model, refresh=True)


def _check(groups: Groups, chosen: Mapping[Group, Sequence[int]]) -> None:
    left: dict[int, dict[int, int]] = {}
    for group in groups:
        going = np.zeros(group.size, bool)
        going[np.asarray(chosen.get(group, ()), np.int64)] = True
        if going.any() and group.blocked:
            raise _refused(group, "it is blocked", group.blocked)
        if going.all():
            raise _refused(group, "nothing of it would be left", "a layer needs a channel")
        counts = left.setdefault(group.cluster, {})
        rows = np.bincount(group.rows, weights=~going)
        for row, count in enumerate(rows):
            counts[_row_key(group, row)] = counts.get(_row_key(group, row), 0) + int(count)
        if len(set(rows.tolist())) > 1:
            raise _refused(group, "its rows would differ in length", f"{rows.tolist()} would stay")
    for counts in left.values():
        if len(set(counts.values())) > 1:
            group = next(g for g in groups if g.cluster in left and left[g.cluster] is counts)
            text = f"{sorted(set(counts.values()))} would stay"
            raise _refused(group, "rows that depend on one another would differ in length", text)


def _row_key(group: Group, row: int) -> int:
    """Rows of different groups are different rows."""
    return hash((id(group), row))


def _refused(group: Group, what: str, why: str) -> InvalidGraphError:
    return InvalidGraphError(
        f"The chosen {group.kind} can't be removed: {what}",
        where=f"the group of {group.name!r}",
        why=why,
        fix="choose as many units of every row, and leave at least one",
    )


def _shrink(
    value: ir.Value, shape: tuple[int, ...], tracks: Sequence[Track], gone: np.ndarray
) -> None:
    """A parameter without the positions that go; `shape` may be finer than its own."""
    old = value.const_value
    assert old is not None
    own = tuple(int(d) for d in old.shape.numpy())
    masks = {t.axes: ~gone[t.ids] for t in tracks}
    if is_absent(old):
        sizes = list(shape)
        for axes, mask in masks.items():
            for axis, size in zip(axes, kept_sizes(mask), strict=True):
                sizes[axis] = size
        new_shape = _merged(own, shape, sizes)
        value.const_value = AbsentTensor(old.name or "", old.dtype, ir.Shape(new_shape))
    else:
        array = take(old.numpy().reshape(shape), masks)
        new_shape = _merged(own, shape, array.shape)
        array = np.ascontiguousarray(array.reshape(new_shape))
        value.const_value = ir.Tensor(array, dtype=old.dtype, name=value.name)
    value.shape = ir.Shape(new_shape)


def _merged(own: Sequence[int], finer: Sequence[int], sizes: Sequence[int]) -> list[int]:
    """Sizes on finer axes as sizes on the parameter's own axes."""
    merged = []
    i = 0
    for dim in own:
        product, size = 1, 1
        while product < dim or (i < len(finer) and finer[i] == 1 and product == dim == 1):
            product *= finer[i]
            size *= int(sizes[i])
            i += 1
        merged.append(size)
    return merged

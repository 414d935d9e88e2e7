"""What several rules ask of a match: shapes that agree, axes that are known, values of one user.

Here: the questions, each answered from shapes and constants. Not here: the rules.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from ...ir.edit import Builder
from ...ir.graph import Dim, attribute, constant_array, dims_of
from ..base import Stage
from ..rules import RewriteRule

MAX_AXES = 64
"""Elements of an axes, starts or perm input that are read."""


class CleanupRule(RewriteRule):
    """A rule of the cleanup stage, repeated with the others until nothing changes."""

    stage: ClassVar[Stage] = Stage.CLEANUP
    fixpoint: ClassVar[bool] = True


def must_stay(old: ir.Value, new: ir.Value) -> str | None:
    """Why `old` can't simply become `new`: it would only be replaced by an Identity."""
    if not old.is_graph_output():
        return None
    if new.producer() is None:
        return "a graph output can't be an input or a weight itself"
    if new.is_graph_output():
        return "both are graph outputs"
    if new.graph is not old.graph:
        return "it returns a value of an outer graph"
    return None


def known(dim: Dim) -> bool:
    """Whether a dimension has a size or a name."""
    return isinstance(dim, int) or dim.value is not None


def same_dims(first: Sequence[Dim] | None, second: Sequence[Dim] | None) -> bool:
    """Equal dimension for dimension; named symbols count as equal, unnamed ones never do."""
    if first is None or second is None or len(first) != len(second):
        return False
    return all(x == y and known(x) for x, y in zip(first, second, strict=True))


def same_shape(a: ir.Value, b: ir.Value) -> bool:
    """`same_dims` of two values."""
    return same_dims(dims_of(a), dims_of(b))


def only_used_once(value: ir.Value) -> bool:
    """Whether one input of one node is all that uses a value."""
    return len(value.uses()) == 1 and not value.is_graph_output()


def ints(value: ir.Value | None) -> tuple[int, ...] | None:
    """A small constant of integers, flat, or None."""
    array = constant_array(value, MAX_AXES)
    if array is None or array.dtype.kind not in "iu":
        return None
    return tuple(int(i) for i in array.reshape(-1))


def axes_of(node: ir.Node, rank: int, index: int = 1) -> tuple[int, ...] | None:
    """The axes that input `index` gives, in 0..rank-1 and in order; None when absent or unknown."""
    found = ints(node.inputs[index]) if len(node.inputs) > index else None
    if found is None or any(not -rank <= a < rank for a in found):
        return None
    return tuple(sorted(a % rank for a in found))


def perm_of(node: ir.Node) -> tuple[int, ...] | None:
    """The permutation of a Transpose, the default written out where the rank is known."""
    perm = attribute(node, "perm")
    if perm is not None:
        return tuple(perm)
    dims = dims_of(node.inputs[0])
    return None if dims is None else tuple(reversed(range(len(dims))))


def attributes_of(node: ir.Node) -> dict[str, Any]:
    """All attributes, for a node of the same kind."""
    return {a.name: a.value for a in node.attributes.values()}


def uniform(value: ir.Value) -> float | int | bool | None:
    """The number that every element of a constant is, or None."""
    array = constant_array(value)
    if array is None or array.size == 0 or array.dtype.kind not in "biuf":
        return None
    flat = array.reshape(-1)
    first = flat[0]
    if flat[-1] != first or flat[flat.size // 2] != first or not bool(np.all(flat == first)):
        return None
    number: float | int | bool = first.item()
    return number


def typed(value: ir.Value, like: ir.Value, dims: Sequence[Dim] | None = None) -> ir.Value:
    """Give a new inner value the dtype of another and, where known, a shape."""
    value.type = like.type
    if dims is not None:
        value.shape = ir.Shape(list(dims))
    return value


def reshape_target(dims: Sequence[Dim], source: Sequence[Dim] | None) -> np.ndarray | None:
    """The constant target that reshapes to `dims`: -1 for one symbol; where there are more, 0 for
    those that the source has at the same place. None where symbols are left beside a -1, or beside
    a size of 0."""
    if any(d == 0 for d in dims):
        return np.array(dims, np.int64) if all(isinstance(d, int) for d in dims) else None
    target: list[int] = []
    free = 0
    several = sum(not isinstance(d, int) for d in dims) > 1
    for i, dim in enumerate(dims):
        if isinstance(dim, int):
            target.append(dim)
        elif several and source is not None and i < len(source) and source[i] == dim and known(dim):
            target.append(0)
        else:
            target.append(-1)
            free += 1
    if free > 1:
        return None
    return np.array(target, np.int64)


def reshaped(
    build: Builder, value: ir.Value, dims: Sequence[Dim], like: ir.Value | None = None
) -> ir.Value | None:
    """Reshape `value` to `dims`, or None where `reshape_target` knows no target."""
    target = reshape_target(dims, dims_of(value))
    if target is None:
        return None
    zero = any(d == 0 for d in dims)
    result: ir.Value = build.Reshape(value, target, allowzero=1 if zero else None)
    return typed(result, like or value, dims)


def consumers_of(
    value: ir.Value, wanted: Callable[[ir.Node], bool], limit: int = 64
) -> list[ir.Node]:
    """The users of a value in its own graph that fit; none where there are over `limit` uses."""
    if len(value.uses()) > limit:
        return []
    found: dict[int, ir.Node] = {}
    for user, index in value.uses():
        if index == 0 and user.graph is value.graph and wanted(user):
            found.setdefault(id(user), user)
    return list(found.values())

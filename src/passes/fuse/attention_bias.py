"""What is added to the scores of attention, in the form that operators take: four axes.

Here: `Bias`, read from masks and biases of any rank and written as (batch or 1, heads or 1, length,
keys). Not here: where they come from (`scores`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from ...ir import dims as dim_math
from ...ir.edit import Builder
from ...ir.graph import Dim, constant_array, dims_of
from .heads import have_dims, target_shape, typed
from .scores import Scores, never_all_masked

_LARGEST_WRITTEN = 1 << 22
"""Elements of a constant that is written broadcast, and not left to an Expand."""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of attention: batch, heads, length of the queries, number of keys, and the scores' rank."""

    batch: Dim
    heads: int
    length: Dim
    keys: Dim
    rank: int


@dataclasses.dataclass(frozen=True)
class Bias:
    """The sum of `terms`, each a value with the four dimensions it has as a bias."""

    terms: tuple[tuple[ir.Value, tuple[Dim, ...]], ...]
    masks: tuple[tuple[ir.Value, float, bool], ...]
    sizes: Sizes

    @property
    def exact_rows(self) -> bool:
        """Whether each row is a constant with an entry that is no mask (above -1e4)."""
        arrays = [constant_array(value, 1 << 24) for value, _ in self.terms]
        return not self.masks and all(
            a is not None and a.ndim > 0 and bool(np.all(np.any(a > -1e4, axis=-1))) for a in arrays
        )


def read_bias(scores: Scores, sizes: Sizes) -> Bias | str | None:
    """The bias of the scores, None where there is none, or why it can't be written."""
    if not scores.biases and not scores.masks:
        return None
    terms = []
    for value in [*scores.biases, *(condition for condition, _, _ in scores.masks)]:
        dims = _four_axes(value, sizes)
        if isinstance(dims, str):
            return dims
        terms.append((value, dims))
    if scores.guarded:
        low = [low for _, low, _ in scores.masks if low == -np.inf]
        if low or len(terms) > 1 or not all(never_all_masked(v) for v in scores.biases):
            return "a row may be masked throughout by minus infinity, which becomes 0 here"
    total = dim_math.broadcast_shapes([dims for _, dims in terms])
    if total is None:
        return "biases do not fit together"
    if not _fits(total, sizes) and not (
        isinstance(sizes.length, int) and isinstance(sizes.keys, int)
    ):
        return f"the bias {dim_math.text(total)} would have to be repeated over symbolic lengths"
    return Bias(tuple(terms[: len(scores.biases)]), tuple(scores.masks), sizes)


def _four_axes(value: ir.Value, sizes: Sizes) -> tuple[Dim, ...] | str:
    dims = dims_of(value)
    if dims is None or len(dims) > sizes.rank:
        return f"the bias {value.name!r} has no known shape, or more axes than the scores"
    padded = (*([1] * (sizes.rank - len(dims))), *dims)
    *lead, length, keys = padded
    heads: Dim
    if sizes.rank == 3:
        batch, heads = _unmerged(lead[0], sizes)
    else:
        batch, heads = dim_math.product(lead[:-1]), lead[-1]
    for name, dim, whole in (
        ("batch", batch, sizes.batch),
        ("heads", heads, sizes.heads),
        ("length", length, sizes.length),
        ("keys", keys, sizes.keys),
    ):
        if dim != 1 and dim_math.same(dim, whole) is not True:
            return f"the bias {dim_math.text(dims)} does not fit the scores in its {name}"
    return batch, heads, length, keys


def _unmerged(dim: Dim, sizes: Sizes) -> tuple[Dim, Dim]:
    return (1, 1) if dim == 1 else (dim_math.floordiv(dim, sizes.heads), sizes.heads)


def _fits(dims: Sequence[Dim], sizes: Sizes) -> bool:
    return (
        dim_math.same(dims[2], sizes.length) is True and dim_math.same(dims[3], sizes.keys) is True
    )


def write_bias(bias: Bias | None, like: ir.Value, build: Builder) -> ir.Value | None:
    """The bias as one (batch or 1, heads or 1, length, keys) value of the type of `like`."""
    if bias is None:
        return None
    parts = [(_reshaped(value, dims, build), dims) for value, dims in bias.terms]
    assert like.dtype is not None
    kind = like.dtype.numpy()
    for condition, low, keep in bias.masks:
        dims = _four_axes(condition, bias.sizes)
        assert not isinstance(dims, str)
        zero, masked = np.array(0, kind), np.array(low, kind)
        values = (zero, masked) if keep else (masked, zero)
        parts.append(
            (typed(build.Where(_reshaped(condition, dims, build), *values), dims, like), dims)
        )
    total, dims = parts[0]
    for value, more in parts[1:]:
        dims = dim_math.broadcast_shapes([dims, more]) or dims
        total = typed(build.Add(total, value), dims, like)
    if _fits(dims, bias.sizes):
        return total
    return _expanded(total, (*dims[:2], bias.sizes.length, bias.sizes.keys), build)


def _reshaped(value: ir.Value, dims: Sequence[Dim], build: Builder) -> ir.Value:
    if have_dims(value, dims):
        return value
    own = dims_of(value)
    assert own is not None
    array = constant_array(value, _LARGEST_WRITTEN)
    if array is not None:
        shape = tuple(d for d in dims if isinstance(d, int))
        return build.initializer("bias", np.ascontiguousarray(array.reshape(shape)))
    if len(own) < len(dims) and all(d == 1 for d in dims[: len(dims) - len(own)]):
        axes = np.arange(len(dims) - len(own), dtype=np.int64)
        return typed(build.Unsqueeze(value, axes), dims, value)
    return typed(build.Reshape(value, target_shape(dims)), dims, value)


def _expanded(value: ir.Value, dims: tuple[Dim, ...], build: Builder) -> ir.Value:
    array = constant_array(value, _LARGEST_WRITTEN)
    if array is not None and dim_math.product(dims[:2]) == array.shape[0] * array.shape[1]:
        wide = np.broadcast_to(array, tuple(int(d) for d in dims))  # type: ignore[arg-type]
        if wide.size <= _LARGEST_WRITTEN:
            return build.initializer("bias", np.ascontiguousarray(wide))
    for user in value.consumers():  # the layers of a model share one mask
        if user.op_type == "Expand" and have_dims(user.outputs[0], dims):
            return user.outputs[0]
    target = np.array([1, 1, dims[2], dims[3]], np.int64)
    return typed(build.Expand(value, target), dims, value)

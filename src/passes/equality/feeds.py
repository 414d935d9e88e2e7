"""Inputs that try to tell two graphs apart.

Here: sizes for symbolic dimensions, arrays of adversarial values, and all values of a small domain.
Not here: judging what comes out (`judge`), inputs for whole models (`probe`).
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from ...ir.dims import free_symbols

Feeds = dict[str, np.ndarray]

PLAIN = ("normal", "ones", "zeros", "negative", "small", "large", "offset", "denormal", "integers")
"""Kinds of finite inputs on which finite results must agree."""

BAND = ("huge",)
"""So near the largest float that reordered arithmetic may overflow: kind is not compared."""

NON_FINITE = ("infinite", "nan")
"""Kinds with NaN or infinity in them: what differs is recorded, and is no difference."""

_EXHAUSTIVE = 1 << 16
_MANY = 1 << 24
"""Elements of a feed beyond which a region is not run at that size."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One feed, what kind of values it has, and the sizes of the symbolic dimensions."""

    kind: str
    feed: Feeds
    dims: Mapping[str, int]


def assignments(values: Sequence[ir.Value], fixed: Mapping[str, int]) -> list[dict[str, int]]:
    """Sizes for the symbols of the inputs' dimensions: distinct ones, others, equal ones, 1, and 0.

    `fixed` wins. Without symbols there is the one empty assignment.
    """
    symbols = sorted(
        {
            name
            for value in values
            for axis, dim in enumerate(value.shape.dims if value.shape is not None else ())
            if not isinstance(dim, int)
            for name in (free_symbols(dim) or {unnamed(value, axis)})
        }
    )
    free = [name for name in symbols if name not in fixed]
    if not free:
        return [dict(fixed)]
    sizes = (3, 2, 5, 4, 7, 6)
    count = len(free)
    choices: list[list[int]] = [
        [sizes[i % 6] for i in range(count)],
        [sizes[(i + 2) % 6] for i in range(count)],
        [1] * count,
        [4] * count,
        [8] * count,
        [32] * count,
        [0] * count,
    ]
    return [{**dict(zip(free, choice, strict=True)), **fixed} for choice in choices]


def unnamed(value: ir.Value, axis: int) -> str:
    """What an unnamed dimension is called among the symbols: all such of one axis are alike."""
    rank = len(value.shape) if value.shape is not None else 0
    return f"?{axis - rank}"


def shape_at(value: ir.Value, dims: Mapping[str, int]) -> tuple[int, ...] | None:
    """A value's shape at given sizes, or None when a dimension can't be computed or is negative.

    A value of unknown rank gets two dimensions.
    """
    if value.shape is None:
        return (2, 3)
    found = []
    for axis, dim in enumerate(value.shape.dims):
        if isinstance(dim, int):
            found.append(dim)
            continue
        if dim.value is None:
            found.append(dims[unnamed(value, axis)])
            continue
        size: object = dims.get(dim.value)
        if size is None:
            try:
                size = dim.evaluate(dict(dims))
            except (ValueError, TypeError, ZeroDivisionError):
                return None
        if not isinstance(size, int) or size < 0:
            return None
        found.append(size)
    return tuple(found) if math.prod(found) <= _MANY else None


def adversarial(
    values: Sequence[ir.Value], dims: Mapping[str, int], seed: int, *, positive: bool = False
) -> Iterator[Case]:
    """Feeds of every kind at one assignment. Kinds that are alike for these dtypes come once.

    `positive` keeps integers between 1 and 7: an integer division by zero ends the process.
    """
    shapes = [shape_at(value, dims) for value in values]
    if any(shape is None for shape in shapes):
        return
    dtypes = [value.dtype or ir.DataType.FLOAT for value in values]
    floats = any(dtype.is_floating_point() for dtype in dtypes)
    whole = any(dtype.is_integer() or dtype == ir.DataType.BOOL for dtype in dtypes)
    if not floats and not whole:
        kinds: tuple[str, ...] = ("normal",)
    elif not floats:
        kinds = ("normal", "ones", "zeros", "negative", "huge", "integers")
    else:
        kinds = (*PLAIN, *BAND, *NON_FINITE)
    for kind in kinds:
        generator = np.random.default_rng([seed, kinds.index(kind)])
        feed = {
            str(value.name): fill(kind, dtype, shape or (), generator, positive=positive)
            for value, dtype, shape in zip(values, dtypes, shapes, strict=True)
        }
        yield Case(kind, feed, dims)


def fill(
    kind: str,
    dtype: ir.DataType,
    shape: Sequence[int],
    generator: np.random.Generator,
    *,
    positive: bool = False,
) -> np.ndarray:
    """An array of a kind. Integers of the plain kinds are small, so that they may be indices."""
    if dtype == ir.DataType.STRING:
        return generator.choice(np.array(["a", "b", ""], dtype=object), tuple(shape))
    if dtype == ir.DataType.BOOL:
        if kind in ("ones", "zeros"):
            return np.full(shape, kind == "ones")
        return generator.integers(0, 2, shape).astype(bool)
    if dtype.is_integer():
        return _integers(kind, dtype, shape, generator, positive)
    return _floats(kind, dtype, shape, generator)


def _integers(
    kind: str,
    dtype: ir.DataType,
    shape: Sequence[int],
    generator: np.random.Generator,
    positive: bool,
) -> np.ndarray:
    low, high = _limits(dtype)
    if positive:
        low, high = 1, 7
    bounds = {
        "ones": (1, 1),
        "zeros": (0, 0),
        "negative": (-3, -1),
        "huge": (low, high),
        "large": (low // 2, high // 2),
        "integers": (-8, 7),
    }.get(kind, (0, 2))
    least, most = max(bounds[0], low), min(bounds[1], high)
    if least > most:
        least, most = low, min(low + 3, high)
    return generator.integers(least, most, shape, endpoint=True).astype(dtype.numpy())


def _limits(dtype: ir.DataType) -> tuple[int, int]:
    bits = dtype.bitwidth
    if dtype.name.startswith("U"):
        return 0, min(2**bits - 1, 2**63 - 1)
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def _floats(
    kind: str, dtype: ir.DataType, shape: Sequence[int], generator: np.random.Generator
) -> np.ndarray:
    wide = dtype in (ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.BFLOAT16)
    x = generator.standard_normal(shape)
    match kind:
        case "ones":
            x = np.ones(shape)
        case "zeros":  # of both signs
            x = np.copysign(0.0, x)
        case "negative":
            x = -np.abs(x) - 0.01
        case "small":
            x = x * 1e-3
        case "large":
            x = x * (1e4 if wide else 30.0)
        case "offset":
            x = x + 100.0
        case "integers":
            x = np.round(4 * x) / 2  # halves: where rounding and comparing have their ties
        case "denormal":
            x = x * (1e-40 if wide else 1e-7)
        case "huge":
            x = x * (1e37 if wide else 3e4)
        case "infinite" | "nan":
            specials = [np.inf, -np.inf] if kind == "infinite" else [np.nan, np.inf]
            x = np.where(generator.random(shape) < 0.3, generator.choice(specials, shape), x)
    with np.errstate(all="ignore"):
        array = np.asarray(x).astype(dtype.numpy())
        if kind == "huge":
            limit = _largest(dtype)
            array = np.clip(np.asarray(x), -limit, limit).astype(dtype.numpy())
    return array


def _largest(dtype: ir.DataType) -> float:
    if dtype in (ir.DataType.FLOAT16, ir.DataType.FLOAT, ir.DataType.DOUBLE):
        return float(np.finfo(dtype.numpy()).max)
    return 1e38 if dtype == ir.DataType.BFLOAT16 else 100.0


# --- all values of a small domain --------------------------------------------------------------

_SMALL = {ir.DataType.BOOL: 2, ir.DataType.INT8: 256, ir.DataType.UINT8: 256}


def exhaustive(values: Sequence[ir.Value], elementwise: bool) -> list[Feeds] | None:
    """Feeds that together hold every combination of inputs, or None where that are too many.

    For elementwise regions every combination of single elements, one array over; for others of
    whole arrays.
    """
    if not values or any(value.dtype not in _SMALL for value in values):
        return None
    shapes = [
        None if v.shape is None or not v.shape.is_static() else shape_at(v, {}) for v in values
    ]
    domains = [_domain(value) for value in values]
    if elementwise and len(set(shapes)) == 1 and shapes[0] is not None:
        return _elementwise(values, domains, shapes[0])
    if any(shape is None for shape in shapes):
        return None
    sizes = [math.prod(shape or ()) for shape in shapes]
    total = 1
    for domain, size in zip(domains, sizes, strict=True):
        total *= len(domain) ** min(size, 20)
        if size > 20 or total > _EXHAUSTIVE // 16:
            return None
    return [
        {
            str(value.name): np.array(part, domain.dtype).reshape(shape or ())
            for value, domain, shape, part in zip(values, domains, shapes, parts, strict=True)
        }
        for parts in itertools.product(
            *(itertools.product(d, repeat=s) for d, s in zip(domains, sizes, strict=True))
        )
    ]


def _domain(value: ir.Value) -> np.ndarray:
    if value.dtype == ir.DataType.BOOL:
        return np.array([False, True])
    dtype = np.int8 if value.dtype == ir.DataType.INT8 else np.uint8
    return np.arange(np.iinfo(dtype).min, np.iinfo(dtype).max + 1).astype(dtype)


def _elementwise(
    values: Sequence[ir.Value], domains: Sequence[np.ndarray], shape: tuple[int, ...]
) -> list[Feeds] | None:
    total, size = math.prod(len(d) for d in domains), math.prod(shape)
    if total > _EXHAUSTIVE or size == 0 or -(-total // size) > _EXHAUSTIVE // 64:
        return None
    grids = [g.reshape(-1) for g in np.meshgrid(*domains, indexing="ij")]
    feeds = []
    for start in range(0, total, size):
        taken = np.arange(start, start + size) % total
        feeds.append(
            {str(v.name): g[taken].reshape(shape) for v, g in zip(values, grids, strict=True)}
        )
    return feeds

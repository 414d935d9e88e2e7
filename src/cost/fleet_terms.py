"""What a board of a fleet is described by: a few rates, and how they make up a model's time.

Here: `RATES`, `model_row` (how much of each rate a model uses) and `setting` (the classes of a
profile from a board's rates). One rate serves many classes of kernels, because thirty timings of a
board can't tell more of them apart. Not here: fitting (`fleet`).

A 3x3 convolution of stride 1 runs as Winograd's (Lavin and Gray 2016): less arithmetic, and a
transformation of what it reads and writes. The others ("direct") take a factor more, and so do
narrow groups; in a profile these factors are the correction of the class.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from .features import Features
from .profile import ClassModel, Correction, Setting

Array = NDArray[np.float64]

RATES: Mapping[str, float] = {
    "launch": 0.003,
    "pointwise": 2.5e-07,
    "winograd": 1.2e-07,
    "direct": 2,
    "narrow": 3,
    "first": 5e-07,
    "depthwise": 7.5e-07,
    "read": 4e-07,
    "written": 6e-07,
    "transformed": 8e-07,
    "restored": 8e-07,
    "weights": 3e-07,
    "transformed_weights": 5e-07,
    "dense": 5e-07,
    "moved": 1.2e-06,
    "pooled": 2e-06,
    "elementwise": 4e-07,
    "function": 9e-06,
    "local_norm": 3.5e-05,
    "pointwise8": 2.5e-07,
    "winograd8": 1.3e-07,
    "direct8": 1.4,
    "first8": 7.5e-07,
    "depthwise8": 7.5e-07,
}
"""Name -> where fitting starts: ms a kernel, a MAC, a byte or an element; `direct` and `narrow` are
factors on Winograd's. Those that end in 8 are of 8-bit integers."""
NAMES = tuple(RATES)
FACTORS = ("direct", "narrow", "direct8")

NARROW = 16
"""Channels in a group from which on a group runs like a convolution of its own."""
_WINOGRAD_AREA = math.log2(9.0)
_AREAS = (3, 7, 25, 49, 81, 121, 169, 961)  # windows of which a factor is known, besides 3 x 3
_STREAMS: Mapping[str, tuple[str, str]] = {
    # family: rate, what it is counted in
    "elementwise/plain": ("elementwise", "bytes"),
    "elementwise/broadcast": ("elementwise", "bytes"),
    "elementwise/function": ("function", "elements"),
    "softmax": ("function", "elements"),
    "normalization": ("moved", "bytes"),
    "reduction": ("moved", "bytes"),
    "pooling": ("pooled", "unrolled"),
    "pooling/global": ("moved", "bytes"),
    "movement/transpose": ("moved", "bytes"),
    "movement/reorder": ("moved", "bytes"),
    "movement/copy": ("moved", "bytes"),
    "gather": ("moved", "bytes"),
    "resize": ("moved", "bytes"),
    "quantization": ("moved", "bytes"),
    "cast": ("moved", "bytes"),
}
Part = tuple[tuple[str, ...], float]  # rates that multiply, and the amount of them


def parts(found: Features) -> Iterator[Part]:
    """The time of a kernel as a sum of amounts times products of rates."""
    amounts = found.amounts
    suffix = "8" if found.dtype == "int8" else ""
    yield ("launch",), 1.0
    root, _, kind = found.family.partition("/")
    read, written, weights = amounts["read"], amounts["written"], amounts["weights"]
    if root == "convolution" and kind in ("spatial", "grouped", "transposed"):
        slower = slowdown(found)
        yield ("winograd" + suffix, *slower), amounts["macs"]
        yield ("transformed", *slower), read
        yield ("restored", *slower), written
        yield ("transformed_weights", *slower), weights
    elif root in ("convolution", "matmul", "attention", "recurrent"):
        yield ((kind if root == "convolution" else "pointwise") + suffix,), amounts["macs"]
        yield ("weights" if root == "convolution" else "dense",), weights
        yield ("read",), read
        yield ("written",), written
    elif found.type == "LRN":
        yield ("local_norm",), amounts["elements"]
    else:
        rate, unit = _STREAMS.get(found.family, ("moved", "bytes"))
        yield (rate,), read + written if unit == "bytes" else amounts[unit]


def slowdown(found: Features) -> tuple[str, ...]:
    """The factors on Winograd's time that a convolution with a window takes."""
    suffix = "8" if found.dtype == "int8" else ""
    where = found.coordinates
    if found.family == "convolution/grouped" and where["in"] < math.log2(NARROW):
        return ("narrow",)
    square = abs(where["area"] - _WINOGRAD_AREA) < 0.01 and where["stride"] < 0.2
    if square and found.family != "convolution/transposed":
        return ()
    return (f"direct{suffix}",)


def in_integers(found: Features) -> Features:
    """The same kernel where convolutions and products run on 8-bit integers, others as they were.

    A convolution reads and writes a quarter of the bytes; what is left of the traffic stays float.
    """
    if found.family.partition("/")[0] not in ("convolution", "matmul"):
        return found
    smaller = {
        name: value / 4 if name in ("read", "written", "weights") else value
        for name, value in found.amounts.items()
    }
    return dataclasses.replace(found, dtype="int8", amounts=smaller)


@dataclasses.dataclass(frozen=True, eq=False)
class Design:
    """Models as rows of amounts: time = amounts @ exp(uses @ logarithms of rates).

    `amounts` [models, columns], `uses` [columns, rates], 0 or 1.
    """

    amounts: Array
    uses: Array

    def times(self, logs: Array) -> Array:
        """Milliseconds, [..., models], from logarithms of rates, [..., rates]."""
        found: Array = np.exp(logs @ self.uses.T) @ self.amounts.T
        return found

    def rows(self, chosen: Sequence[int] | NDArray[np.intp] | NDArray[np.bool_]) -> Design:
        """Some of the models."""
        return Design(self.amounts[chosen], self.uses)


_WINDOWED = ("transformed", "restored", "transformed_weights")
_COLUMNS: tuple[tuple[str, ...], ...] = (
    *((name,) for name in NAMES if name not in FACTORS),
    *itertools.product(("winograd", *_WINDOWED), ("direct", "narrow")),
    *itertools.product(("winograd8", *_WINDOWED), ("direct8",)),
    ("winograd8", "narrow"),
)
_USES = np.array([[float(name in column) for name in NAMES] for column in _COLUMNS])


def design(models: Sequence[Sequence[Features]]) -> Design:
    """The rows of models from their kernels."""
    index = {column: i for i, column in enumerate(_COLUMNS)}
    amounts = np.zeros((len(models), len(_COLUMNS)))
    for row, kernels in zip(amounts, models, strict=True):
        for found in kernels:
            for rates, amount in parts(found):
                row[index[rates]] += amount
    return Design(amounts, _USES)


def classes(logs: Array) -> dict[str, ClassModel]:
    """The classes of a profile from logarithms of rates; what a launch costs is left out."""
    rate = {name: float(value) for name, value in zip(NAMES, np.exp(logs), strict=True)}
    found: dict[str, ClassModel] = {}
    for dtype, suffix in (("float32", ""), ("int8", "8")):
        plain = {name: rate[name] for name in ("read", "written", "weights")}
        for kind in ("pointwise", "first", "depthwise"):
            found[f"convolution/{kind}:{dtype}"] = ClassModel(
                {"macs": rate[kind + suffix], **plain}
            )
        direct, narrow = rate["direct" + suffix], rate["narrow"]
        for kind, factor, discount in (
            ("spatial", direct, _winograd_discount(direct)),
            ("transposed", direct, None),
            ("grouped", narrow, _wide_discount(direct, narrow)),
        ):
            terms = {
                "macs": factor * rate["winograd" + suffix],
                "read": factor * rate["transformed"],
                "written": factor * rate["restored"],
                "weights": factor * rate["transformed_weights"],
            }
            found[f"convolution/{kind}:{dtype}"] = ClassModel(terms, discount)
        product = {**plain, "macs": rate["pointwise" + suffix], "weights": rate["dense"]}
        for family in ("matmul/weights", "matmul/batched", "attention", "recurrent"):
            found[f"{family}:{dtype}"] = ClassModel(product)
        for family, (name, unit) in _STREAMS.items():
            terms = _bytes(rate[name]) if unit == "bytes" else {unit: rate[name]}
            found[f"{family}:{dtype}"] = ClassModel(terms)
        found[f"normalization:LRN:{dtype}"] = ClassModel({"elements": rate["local_norm"]})
    return found


def setting(logs: Array, threads: int) -> Setting:
    """A profile's setting from logarithms of rates."""
    return Setting(threads, classes(logs), per_kernel_ms=float(np.exp(logs[NAMES.index("launch")])))


def _bytes(rate: float) -> dict[str, float]:
    return {"read": rate, "written": rate}


def _winograd_discount(direct: float) -> Correction:
    """One over `direct` at a 3x3 window of stride 1, one elsewhere."""
    others = itertools.product((1.0, 2.0, math.log2(6), 4.0, *map(math.log2, _AREAS)), (0, 1, 2))
    points = [[_WINOGRAD_AREA, 0.0], *([area, float(stride)] for area, stride in others)]
    weights = np.zeros(len(points))
    weights[0] = -math.log(direct)
    return Correction(("area", "stride"), np.array([0.2, 0.2]), np.array(points), weights)


def _wide_discount(direct: float, narrow: float) -> Correction:
    """From `narrow` to what a convolution takes where a group has `NARROW` channels or more.

    Half of that is narrow. Windows that are not listed take `narrow`.
    """
    channels = np.arange(0.0, 11.1)
    similar = np.exp(-0.5 * (channels[:, None] - channels) ** 2)
    step = np.linalg.solve(similar, (channels >= math.log2(NARROW)).astype(float))
    points, weights = [], []
    for area, stride in itertools.product((0.0, _WINOGRAD_AREA, math.log2(25)), (0.0, 1.0)):
        factor = 1.0 if area == _WINOGRAD_AREA and not stride else direct
        points += [[area, stride, float(wide)] for wide in channels]
        weights.append(math.log(factor / narrow) * step)
    scales = np.array([0.2, 0.2, 1.0])
    return Correction(("area", "stride", "in"), scales, np.array(points), np.concatenate(weights))

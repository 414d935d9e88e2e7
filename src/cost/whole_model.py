"""Where a whole model lies among others, from its kernels: for corrections near known networks.

Here: `COORDINATES` and `coordinates`. Not here: single kernels (`features`), who learns what near
networks have in common (`fleet_nets`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from .features import Features

_KINDS = (
    *("convolution/pointwise", "convolution/spatial", "convolution/depthwise"),
    *("convolution/first", "convolution/grouped", "matmul"),
)
COORDINATES = ("macs", "written", "in_integers", *_KINDS)
"""Logarithms to base 2 of MACs and of elements that kernels with MACs write; shares of MACs, 0 to
1, done in 8-bit integers and by each kind."""
SCALES = np.array([0.25, 0.25, 0.3, *[0.1] * len(_KINDS)])
"""How far apart networks still say something of each other."""


def coordinates(found: Sequence[Features | None]) -> NDArray[np.float64]:
    """The `COORDINATES` of a model, [len(COORDINATES)]; kernels of unknown shape are left out."""
    macs = dict.fromkeys(COORDINATES, 0.0)
    written = 0.0
    for kernel in found:
        amount = kernel.amounts.get("macs", 0.0) if kernel is not None else 0.0
        if kernel is None or not amount:
            continue
        macs["macs"] += amount
        written += kernel.amounts.get("elements", 0.0)
        if kernel.dtype == "int8":
            macs["in_integers"] += amount
        kind = kernel.family if kernel.family in macs else kernel.family.partition("/")[0]
        if kind in macs:
            macs[kind] += amount
    total = max(1.0, macs["macs"])
    shares = [macs[name] / total for name in COORDINATES[2:]]
    return np.array([math.log2(total), math.log2(max(1.0, written)), *shares])

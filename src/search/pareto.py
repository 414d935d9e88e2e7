"""Which points no other point beats.

Here: `front`. Not here: what the axes are (`rows`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def front(points: Sequence[Sequence[float | None]]) -> list[bool]:
    """Whether each point is on the Pareto front; on every axis less is better.

    A point is beaten by one that is no worse on any axis and better on one. Equal points are on the
    front together. None and NaN count as worst: such a point is on the front only where nothing
    is known to be as good on what it has. A point with nothing known is never on it.
    """
    if not points:
        return []
    table = np.array(
        [[math.inf if x is None or math.isnan(x) else float(x) for x in point] for point in points]
    )
    if table.shape[1] == 0:
        return [True] * len(points)
    no_worse = (table[:, None, :] <= table[None, :, :]).all(axis=2)
    better = (table[:, None, :] < table[None, :, :]).any(axis=2)
    beaten = (no_worse & better).any(axis=0)
    known = np.isfinite(table).any(axis=1)
    return [bool(x) for x in known & ~beaten]

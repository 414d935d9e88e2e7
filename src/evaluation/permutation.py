"""Whether a model is worse than the original on a slice, beyond chance, with many slices looked at.

Here: `harm_test`, `holm`. Not here: which rows are in a slice (`slices`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from .report import ORIGINAL
from .scored import Calls, Scored

_ENOUGH = 20
_MOST = 20_000
_CHUNK = 50
_TOLERANCE = 1e-12


def harm_test(scored: Scored, name: str, better: bool, permutations: int, seed: int) -> float:
    """One-sided p-value that the model is no worse than the original on these rows.

    The paired permutation test: under the null hypothesis the two are exchangeable in each unit, so
    units are exchanged at random (Good 2005). It stops after 20 differences at least as bad as
    the one seen (Besag and Clifford 1991), so only slices that look harmed take all permutations.
    1 where the model is not worse.
    """
    point = scored.point() if not isinstance(scored, Calls) else _quiet_point(scored)
    sign = 1.0 if better else -1.0
    seen = sign * (point[name] - point[ORIGINAL])
    if not seen < 0:
        return 1.0 if math.isfinite(seen) else float("nan")
    units = int(scored.units.max(initial=-1)) + 1
    rng = np.random.default_rng(seed)
    as_bad, done = 0, 0
    while done < permutations:
        rows = min(_CHUNK, permutations - done)
        swaps = rng.random((rows, units)) < 0.5
        changes = sign * scored.swapped(ORIGINAL, name, swaps)
        worse = ~(changes > seen + _TOLERANCE * (1 + abs(seen)))  # an undefined one counts
        if as_bad + int(worse.sum()) >= _ENOUGH:
            last = int(np.flatnonzero(np.cumsum(worse) >= _ENOUGH - as_bad)[0]) + 1
            return _ENOUGH / (done + last)
        as_bad, done = as_bad + int(worse.sum()), done + rows
    return (as_bad + 1) / (done + 1)


def permutations_for(tests: int, level: float) -> int:
    """Enough that Holm's smallest threshold can be reached twice over."""
    return min(_MOST, max(400, math.ceil(2 * max(tests, 1) / level)))


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values: the chance of any false alarm among all is held (Holm 1979)."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted = [0.0] * len(p_values)
    highest = 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = highest
    return adjusted


def _quiet_point(scored: Calls) -> dict[str, float]:
    return {n: scored.tried(given, scored.labels) for n, given in scored.predictions.items()}

"""Bits of each matrix within an average: more for those whose products suffer most.

Here: `spread_bits`. Not here: forms (`weight_choice`), codes (`weight_codes`).
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence

import numpy as np

from ...ir.graph import constant_tensor, is_absent
from .grids import Grid, clipped
from .weight_choice import StoredWeight
from .weight_codes import matrix_of


def spread_bits(
    weights: Sequence[StoredWeight],
    moments: Mapping[StoredWeight, np.ndarray],
    widths: Sequence[int],
    average: float,
) -> dict[StoredWeight, int]:
    """The bits of each matrix, so that their mean over elements is `average` at most.

    All start at the least of `widths`; the one whose step to the next width takes away the most
    error for each bit goes first. The error is that of the products relative to their own squares
    (of the weights alone, where there are no second moments), as in Dong et al., "HAWQ-V2" (2020),
    with the layer's own output in place of the loss.
    """
    order = sorted(widths)
    elements = {item: int(np.prod(item.shape)) for item in weights}
    errors = {item: _errors(item, moments.get(item), order) for item in weights}
    chosen = dict.fromkeys(weights, 0)
    room = (average - order[0]) * sum(elements.values())
    queue: list[tuple[float, int, StoredWeight]] = []

    def offer(index: int, item: StoredWeight) -> None:
        level = chosen[item]
        if level + 1 < len(order):
            cost = (order[level + 1] - order[level]) * elements[item]
            gain = errors[item][level] - errors[item][level + 1]
            heapq.heappush(queue, (-gain / cost, index, item))

    for index, item in enumerate(weights):
        offer(index, item)
    while queue:
        _, index, item = heapq.heappop(queue)
        cost = (order[chosen[item] + 1] - order[chosen[item]]) * elements[item]
        if cost <= room:
            room -= cost
            chosen[item] += 1
            offer(index, item)
    return {item: order[level] for item, level in chosen.items()}


def _errors(item: StoredWeight, moments: np.ndarray | None, widths: Sequence[int]) -> list[float]:
    if is_absent(constant_tensor(item.value)):
        return [4.0**-bits for bits in widths]
    matrix = matrix_of(item)
    found = []
    for bits in widths:
        grid = Grid(bits, item.grid.block, item.grid.symmetric)
        error = clipped(matrix, grid, None if moments is None else np.diag(moments)).restored()
        error -= matrix
        if moments is None:
            found.append(float(np.square(error).sum() / max(np.square(matrix).sum(), 1e-30)))
        else:
            whole = max(float((moments @ matrix * matrix).sum()), 1e-30)
            found.append(float((moments @ error * error).sum()) / whole)
    return found

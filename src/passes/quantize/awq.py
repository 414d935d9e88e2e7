"""AWQ: input channels scaled so that the weights which matter most round best.

Here: `scale_channels`, which changes weights and what makes their inputs; the model computes the
same. Where a scale can go is `scaling`'s to say. Not here: rounding (`grids`, `gptq`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from ..base import Feed
from .capture import iterate
from .grids import Grid, clipped
from .layers import linear_layer
from .scaling import Constants, Group, find_groups, refusals, scale_group

_STEPS = 20
_ROWS = 4096
_BUDGET = 1 << 28


def scale_channels(
    model: ir.Model, grids: Mapping[ir.Node, Grid], samples: Sequence[Feed]
) -> tuple[str, ...]:
    """Scale the inputs of the products that `grids` names; what was done and what was not.

    Lin et al., "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration"
    (2023), equations 4 and 5: input channel j of the weights is multiplied by s_j = mean|X_j|^a and
    what makes the channel divided by it, with the a in [0, 1] of least error of the products,
    computed from second moments. All products that read an activation share its scale.
    """
    groups = [
        group
        for group in find_groups(model)
        if all(r.node in grids and linear_layer(r.node) is not None for r in group.readers)
    ]
    usable = [group for group in groups if group.makers]
    constants = Constants()
    chosen: list[float] = []
    for batch in _batches(usable):
        for group, (moments, means) in _observe(model, batch, samples).items():
            found = _best(group, moments, means, grids, constants)
            if found is not None:
                chosen.append(found[0])
                scale_group(constants, group, 1.0 / found[1])
    constants.write()
    text = f"awq: scaled {len(chosen)} of {len(usable)} activations"
    if chosen:
        text += f", exponents {min(chosen):.2f} to {max(chosen):.2f}"
    return (text, *refusals(g for g in groups if not g.makers))


def _best(
    group: Group,
    moments: np.ndarray,
    means: np.ndarray,
    grids: Mapping[ir.Node, Grid],
    constants: Constants,
) -> tuple[float, np.ndarray] | None:
    """The exponent and the scale of least error; None where none is better than none."""
    matrices = []
    for item in group.readers:
        layer = linear_layer(item.node)
        assert layer is not None
        matrices.append((layer.matrix(constants.array(item.fold))[0], grids[item.node]))
    alive = means > 0
    best: tuple[float, np.ndarray] | None = None
    least = _loss(matrices, moments, np.ones(len(means)))
    for step in range(1, _STEPS + 1):
        exponent = step / _STEPS
        scale = np.where(alive, means, 1.0) ** exponent
        middle = np.exp(np.log(scale[alive]).mean()) if alive.any() else 1.0
        scale = group.shared(np.where(alive, scale / middle, 1.0))
        loss = _loss(matrices, moments, scale)
        if loss < least:
            best, least = (exponent, scale), loss
    return best


def _loss(
    matrices: Sequence[tuple[np.ndarray, Grid]], moments: np.ndarray, scale: np.ndarray
) -> float:
    """Squared error of the products, relative to their own squares, summed over the matrices."""
    total = 0.0
    by_input = scale[:, None].astype(np.float32)
    for matrix, grid in matrices:
        importance = np.diag(moments) / np.square(scale)
        error = clipped(matrix * by_input, grid, importance).restored() / by_input - matrix
        whole = max(float((moments @ matrix * matrix).sum()), 1e-30)
        total += float((moments @ error * error).sum()) / whole
    return total


def _observe(
    model: ir.Model, groups: Sequence[Group], samples: Sequence[Feed]
) -> dict[Group, tuple[np.ndarray, np.ndarray]]:
    """Second moments [in, in] and mean magnitudes [in] of each activation."""
    sums: dict[Group, tuple[np.ndarray, np.ndarray]] = {}
    rows: dict[Group, int] = dict.fromkeys(groups, 0)
    for arrays in iterate(model, [g.value for g in groups], samples):
        for group in groups:
            array = arrays[group.value.name or ""]
            part = array.reshape(-1, array.shape[-1])
            if len(part) > _ROWS:
                part = part[np.linspace(0, len(part) - 1, _ROWS).astype(int)]
            both = (part.T @ part).astype(np.float64), np.abs(part).sum(axis=0, dtype=np.float64)
            before = sums.get(group)
            sums[group] = both if before is None else (before[0] + both[0], before[1] + both[1])
            rows[group] += len(part)
    return {g: (m / max(1, rows[g]), a / max(1, rows[g])) for g, (m, a) in sums.items()}


def _batches(groups: Sequence[Group]) -> list[list[Group]]:
    """Groups whose second moments fit in memory together."""
    batches: list[list[Group]] = []
    size = _BUDGET + 1
    for group in groups:
        need = 8 * group.channels**2
        if size + need > _BUDGET:
            batches.append([])
            size = 0
        batches[-1].append(group)
        size += need
    return batches

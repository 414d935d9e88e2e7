"""Scores of units that look at one unit at a time: magnitudes, activations, distances, chance.

Here: `Importance`, `score`, and `weight_rows`, the weights that a unit runs through. Not here:
selection that knows how the rest can make up for a loss (`selection`), data (`statistics`).
"""

from __future__ import annotations

import enum
import zlib
from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from ...ir.graph import attribute, constant_array
from ..quantize.layers import linear_layer
from .groups import Group, Site
from .statistics import Statistics, unit_sums


class Importance(enum.StrEnum):
    """What says how much a unit matters.

    `RECONSTRUCTION`: what its loss costs the layers behind it after their weights have been solved
    again (`selection`). `ACTIVATION`: the power of what it gives them, its activations weighted by
    their weights. `L1` and `L2`: the magnitude of the weights that compute it (Li et al. 2017,
    arXiv:1608.08710). `MEDIAN`: how far these weights are from those of the other units (He et al.
    2019, "Filter pruning via geometric median", arXiv:1811.00250). `RANDOM`: a control.
    `AUTO`: reconstruction with calibration samples, L2 without.
    """

    AUTO = "auto"
    RECONSTRUCTION = "reconstruction"
    ACTIVATION = "activation"
    L1 = "l1"
    L2 = "l2"
    MEDIAN = "median"
    RANDOM = "random"

    @property
    def needs_samples(self) -> bool:
        """Whether it looks at activations."""
        return self in (Importance.RECONSTRUCTION, Importance.ACTIVATION)


def score(
    group: Group, importance: Importance, statistics: Mapping[Site, Statistics], seed: int = 0
) -> np.ndarray:
    """A score for each unit, [size]: the lowest goes first."""
    if importance is Importance.RANDOM:
        return np.random.default_rng((seed, zlib.crc32(group.name.encode()))).random(group.size)
    if importance.needs_samples:
        found = _activation(group, statistics)
        if found is not None:
            return found
    rows = [(site, weight_rows(site)) for site in group.sites if site.role in ("out", "state")]
    made = [(site, weights) for site, weights in rows if weights is not None]
    if not made:
        others = [(site, weight_rows(site)) for site in group.sites]
        made = [(site, weights) for site, weights in others if weights is not None]
    if importance is Importance.MEDIAN:
        return _from_median(group, made)
    total = np.zeros(group.size)
    for site, weights in made:
        size = np.abs(weights).sum(1) if importance is Importance.L1 else (weights**2).sum(1)
        total += unit_sums(size, site.units, group.size)
    return total


def _activation(group: Group, statistics: Mapping[Site, Statistics]) -> np.ndarray | None:
    """The power of each unit's share of the consumers' results, relative to that of all."""
    total, found = np.zeros(group.size), False
    for site in group.consumers:
        if site in statistics:
            power = statistics[site].powers()
            total += unit_sums(power, statistics[site].units, group.size) / max(
                float(power.sum()), 1e-30
            )
            found = True
    if found:
        return total
    made = [s for s in group.producers if s in statistics]
    if len(made) != 2:
        return None
    # query and key: what a dimension adds to the scores
    pair = [unit_sums(statistics[s].result_powers(), s.units, group.size) for s in made]
    product: np.ndarray = pair[0] * pair[1]
    return product


def _from_median(group: Group, made: list[tuple[Site, np.ndarray]]) -> np.ndarray:
    """The sum of a unit's distances to all others, over the weights that compute it."""
    squares = np.zeros((group.size, group.size))
    for site, weights in made:
        own = site.units >= 0
        if own.sum() % group.size:
            continue
        order = np.argsort(site.units[own], kind="stable")
        vectors = weights[own][order].reshape(group.size, -1)
        power = (vectors**2).sum(1)
        squares += power[:, None] + power[None] - 2.0 * vectors @ vectors.T
    total: np.ndarray = np.sqrt(np.maximum(squares, 0.0)).sum(1)
    return total


def weight_rows(site: Site) -> np.ndarray | None:
    """The weights of a site by position along its axis of units, [positions, ...] as float64.

    None where the layout of the operator's weight is not known here.
    """
    array = constant_array(site.weight)
    if array is None or array.dtype.kind != "f":
        return None
    found = _rows(site.node, site.role, np.asarray(array, np.float64))
    return found if found is not None and len(found) == len(site.units) else None


def _rows(node: ir.Node, role: str, array: np.ndarray) -> np.ndarray | None:
    if role == "table":
        return array.reshape(-1, array.shape[-1]).T
    if role in ("norm", "bias", "other"):
        return array.reshape(-1, 1)
    layer = linear_layer(node)
    if layer is not None:
        groups, _, out = layer.shape
        matrix = layer.matrix(array)
        if role in ("out", "depthwise"):
            made: np.ndarray = matrix.swapaxes(1, 2).reshape(groups * out, -1)
            return made
        channels = matrix.shape[1] // max(1, int(np.prod(array.shape[2:])))
        if node.op_type != "Conv":
            return np.asarray(matrix[0])
        found: np.ndarray = matrix.reshape(groups * channels, -1)
        return found
    if node.op_type == "ConvTranspose" and attribute(node, "group", 1) == 1:
        axis = 0 if role == "in" else 1
        moved: np.ndarray = np.moveaxis(array, axis, 0).reshape(array.shape[axis], -1)
        return moved
    if node.op_type in ("LSTM", "GRU", "RNN") and array.ndim == 3 and role == "in":
        rows: np.ndarray = np.moveaxis(array, 2, 0).reshape(array.shape[2], -1)
        return rows
    if node.op_type == "Gemm" and array.ndim == 2:
        out_axis = 0 if attribute(node, "transB", 0) else 1
        turned: np.ndarray = np.moveaxis(array, out_axis if role == "out" else 1 - out_axis, 0)
        return turned
    return None

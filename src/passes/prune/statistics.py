"""What calibration samples say of the layers that read, or compute, the units of groups.

Here: `Statistics` of one site, and `collect`, which runs the samples. Not here: what is made of it
(`importance`, `selection`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import onnx_ir as ir

from ...ir.graph import constant_array
from ..base import Feed
from ..quantize.capture import Gram, Progress, gram, gram_bytes
from ..quantize.layers import LinearLayer, linear_layer
from .groups import Group, Site
from .selection import Problem

MAX_INPUTS = 4608
"""Wider layers have no gram matrix: their units are judged one at a time, or not at all."""
_ROWS_PER_INPUT = 8
_FEWEST_ROWS, _MOST_ROWS = 8192, 18432


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Second moments of a linear layer's inputs, and which unit each input belongs to.

    `units` [groups * in] are those of the weights' inputs, kernel taps included, for a site that
    sums over units; those of the outputs for one that computes them.
    """

    gram: Gram
    weight: np.ndarray
    units: np.ndarray

    def covariance(self) -> np.ndarray:
        """[groups, in, in]: what varies can't be left to the bias."""
        mean = self.gram.mean
        count = max(1, self.gram.rows)
        found: np.ndarray = self.gram.matrix / count - np.einsum("gi,gj->gij", mean, mean)
        return found

    def powers(self) -> np.ndarray:
        """The power of each input's share of the result, [groups * in]."""
        variance = np.einsum("gii->gi", self.covariance())
        power: np.ndarray = np.maximum(variance, 0.0) * (self.weight**2).sum(-1)
        return power.reshape(-1)

    def result_powers(self) -> np.ndarray:
        """The variance of each output, [groups * out]."""
        found = np.einsum("gio,gio->go", self.weight, self.covariance() @ self.weight)
        power: np.ndarray = np.maximum(found, 0.0)
        return power.reshape(-1)

    def problems(self, share: float) -> list[Problem]:
        """One for each group of the layer in which there are units."""
        groups = self.gram.layer.shape[0]
        units = self.units.reshape(groups, -1)
        covariance = self.covariance()
        return [
            Problem(covariance[i], self.weight[i], units[i], share / groups)
            for i in range(groups)
            if (units[i] >= 0).any()
        ]


def batches(groups: Sequence[Group], budget: int = 1 << 29) -> Iterator[list[Group]]:
    """Groups in runs whose sums fit in memory together."""
    batch: list[Group] = []
    size = 0
    for group in groups:
        layers = [linear_layer(site.node) for site in group.consumers or group.producers]
        need = sum(gram_bytes(x) for x in layers if x is not None and x.shape[1] <= MAX_INPUTS)
        if batch and size + need > budget:
            yield batch
            batch, size = [], 0
        batch.append(group)
        size += need
    if batch:
        yield batch


def collect(
    groups: Iterable[Group], samples: Sequence[Feed], model: ir.Model, progress: Progress
) -> dict[Site, Statistics]:
    """Statistics of all linear layers at which units of the groups are summed over, and of those
    that compute units which no such layer reads (queries and keys)."""
    sites: dict[Site, LinearLayer] = {}
    for group in groups:
        read = group.consumers or group.producers
        for site in read:
            layer = linear_layer(site.node)
            if (
                layer is None
                or site.node.graph is not model.graph
                or layer.weight is not site.weight
            ):
                continue
            if layer.shape[1] <= MAX_INPUTS and _units(site, layer) is not None:
                sites[site] = layer
    widest = max((layer.shape[1] for layer in sites.values()), default=1)
    rows = min(max(_FEWEST_ROWS, _ROWS_PER_INPUT * widest), _MOST_ROWS)
    limit = max(16, -(-rows // max(1, len(samples))))
    nodes = dict.fromkeys(layer.node for layer in sites.values())
    grams = gram(model, nodes, samples, limit=limit, progress=progress)
    found = {}
    for site, layer in sites.items():
        weight, units = constant_array(layer.weight), _units(site, layer)
        if weight is not None and units is not None:
            matrix = layer.matrix(np.asarray(weight, np.float64))
            found[site] = Statistics(grams[layer.node], matrix, units)
    return found


def _units(site: Site, layer: LinearLayer) -> np.ndarray | None:
    """The unit of each input of the weights (or of each output), None where they don't match."""
    groups, size, out = layer.shape
    if site.role != "in":
        return site.units if len(site.units) == groups * out else None
    if layer.node.op_type != "Conv":
        return site.units if len(site.units) == size else None
    assert layer.weight.shape is not None
    taps = math.prod(layer.weight.shape.numpy()[2:])
    units = np.repeat(site.units, taps)
    return units if len(units) == groups * size else None


def unit_sums(values: np.ndarray, units: np.ndarray, size: int) -> np.ndarray:
    """Values of positions summed by unit, [size]."""
    found = np.zeros(size)
    own = units >= 0
    np.add.at(found, units[own], values[own])
    return found

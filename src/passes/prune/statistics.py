"""What calibration samples say of the layers that read, or compute, the units of groups.

Here: `Statistics` of one site, and `collect`, which runs the samples. Not here: what is made of it
(`importance`, `selection`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from ...ir.graph import constant_array
from ..base import Feed
from ..quantize.capture import Gram, Progress, empty_gram, gram_bytes, iterate
from ..quantize.layers import LinearLayer
from .branches import flattened, paths
from .groups import Group, Site
from .selection import Problem
from .views import GateLayer, linear_view

MAX_INPUTS = 4608
"""Wider layers have no gram matrix: their units are judged one at a time, or not at all."""
_ROWS_PER_INPUT = 8
_FEWEST_ROWS, _MOST_ROWS = 8192, 18432
_TOGETHER = 512
"""Rows."""


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

    def without(self, units: np.ndarray, damping: float) -> np.ndarray:
        """The weights [groups, in, out] that make up best for the loss of units, which get zeros.

        `damping` is added to the diagonal of the covariance, in units of its mean.
        """
        covariance = self.covariance()
        found = np.zeros_like(self.weight)
        for i, own in enumerate(self.units.reshape(len(covariance), -1)):
            stay = np.flatnonzero(~np.isin(own, units))
            size = len(own)
            firm = damping * np.trace(covariance[i]) / max(1, size) + 1e-30
            matrix = covariance[i] + firm * np.eye(size)
            if len(stay) == size:
                found[i] = self.weight[i]
            elif len(stay):
                wanted = matrix[stay] @ self.weight[i]
                found[i][stay] = np.linalg.solve(matrix[np.ix_(stay, stay)], wanted)
        return found

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
        layers = [linear_view(site.node) for site in group.consumers or group.producers]
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
    that compute units which no such layer reads (queries and keys).

    Of layers in the branches of an If, on the samples that take it.
    """
    sites: dict[Site, LinearLayer] = {}
    for group in groups:
        for site in group.consumers or group.producers:
            layer = linear_view(site.node)
            if layer is None or layer.weight is not site.weight:
                continue
            if layer.shape[1] <= MAX_INPUTS and _units(site, layer) is not None:
                sites[site] = layer
    widest = max((layer.shape[1] for layer in sites.values()), default=1)
    rows = min(max(_FEWEST_ROWS, _ROWS_PER_INPUT * widest), _MOST_ROWS)
    layers = {layer.node: layer for layer in sites.values()}
    grams = _grams(model, layers, samples, rows, progress)
    found = {}
    for site, layer in sites.items():
        weight, units = constant_array(layer.weight), _units(site, layer)
        if weight is not None and units is not None and layer.node in grams:
            matrix = layer.matrix(np.asarray(weight, np.float64))
            found[site] = Statistics(grams[layer.node], matrix, units)
    return found


def _grams(
    model: ir.Model,
    layers: Mapping[ir.Node, LinearLayer],
    samples: Sequence[Feed],
    rows: int,
    progress: Progress,
) -> dict[ir.Node, Gram]:
    """Second moments of the layers' inputs, without those that no sample reaches."""
    found: dict[ir.Node, Gram] = {}
    for path in paths(model, samples) if layers else ():
        flat = flattened(model, path.taken)
        limit = max(16, -(-rows // max(1, len(path.samples))))
        # nodes that read the same value the same way (q, k, v) share one set of sums
        shared: dict[tuple[object, ...], list[tuple[ir.Node, LinearLayer]]] = {}
        for node, layer in layers.items():
            twin = flat.twins.get(node)
            own = layer if twin is node else linear_view(twin) if twin is not None else None
            if own is not None:
                shared.setdefault(own.rows_key, []).append((node, own))
        sums = {key: empty_gram(alike[0][1]) for key, alike in shared.items()}
        values = [gram.layer.data for gram in sums.values()]
        folds = [_Fold(gram, limit) for gram in sums.values()]
        for arrays in iterate(flat.model, values, path.samples, progress) if values else ():
            for fold in folds:
                fold.add(arrays[fold.gram.layer.data.name or ""])
        for fold in folds:
            fold.finish()
        for key, alike in shared.items():
            for node, _ in alike:
                one, other = sums[key], found.get(node)
                matrix = one.matrix if other is None else one.matrix + other.matrix
                total = one.total if other is None else one.total + other.total
                count = one.rows if other is None else one.rows + other.rows
                found[node] = Gram(layers[node], matrix, total, count)
    return found


class _Fold:
    """Rows on their way into sums: few rows a sample cost as much as many, so they wait."""

    def __init__(self, gram: Gram, limit: int) -> None:
        self.gram = gram
        self._limit = limit
        self._waiting: list[np.ndarray] = []

    def add(self, x: np.ndarray) -> None:
        """Take the rows of one sample."""
        layer = self.gram.layer
        positions = layer.positions(x, self._limit)
        if len(positions) >= _TOGETHER:
            self.gram.add(x, self._limit)
            return
        self._waiting.append(layer.inputs(x, positions))
        if sum(rows.shape[1] for rows in self._waiting) >= _TOGETHER:
            self.finish()

    def finish(self) -> None:
        """Fold in what waits."""
        if self._waiting:
            rows = np.concatenate(self._waiting, axis=1)
            self.gram.matrix += rows.swapaxes(1, 2) @ rows
            self.gram.total += rows.sum(axis=1, dtype=np.float64)
            self.gram.rows += rows.shape[1]
            self._waiting = []


def _units(site: Site, layer: LinearLayer) -> np.ndarray | None:
    """The unit of each input of the weights (or of each output), None where they don't match."""
    groups, size, out = layer.shape
    if site.role != "in":
        return site.units if len(site.units) == groups * out else None
    units = site.units
    if isinstance(layer, GateLayer):
        units = np.tile(units, groups)
    elif layer.channel_axis == 1:
        assert layer.weight.shape is not None
        units = np.repeat(units, math.prod(layer.weight.shape.numpy()[2:]))
    return units if len(units) == groups * size else None


def unit_sums(values: np.ndarray, units: np.ndarray, size: int) -> np.ndarray:
    """Values of positions summed by unit, [size]."""
    found = np.zeros(size)
    own = units >= 0
    np.add.at(found, units[own], values[own])
    return found

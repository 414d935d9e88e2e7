"""The numbers of a factorization: subspaces of least error, the factors in them, the errors.

Here: `Factors`, arrays in and arrays out. On data the error is that of the layer's outputs: their
principal components are what the singular vectors of the weight are after whitening by its inputs
(Wang et al. 2024, "SVD-LLM: truncation-aware singular value decomposition for large language model
compression", arXiv:2403.07378; Zhang et al. 2015, "Accelerating very deep convolutional networks
for classification and detection", arXiv:1505.06798). Without data it is that of the weight. Not
here: forms (`low_rank_forms`), moments (`low_rank_statistics`), solving once more for what layers
before have changed (`low_rank_refit`).
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from .forms import Candidate, Form

_FLOOR = 1e-6
"""Directions of less than this share of the greatest energy are no directions of the data."""


@dataclasses.dataclass
class Known:
    """What is known of a layer. W is [outputs, inputs, *kernel] in float64.

    `inputs`, `outputs`: second moments of channels on data, or None; `mean` of the outputs, without
    a bias that is added elsewhere; `bias` that of the layer itself; `free`: a bias can take up a
    mean error. `scale`: what each output is multiplied by next.
    """

    weight: np.ndarray
    inputs: np.ndarray | None
    outputs: np.ndarray | None
    mean: np.ndarray | None
    bias: np.ndarray
    scale: np.ndarray
    free: bool


class Factors:
    """The factorizations of one layer, at any rank."""

    def __init__(self, known: Known) -> None:
        self._known = known

    def error(self, candidate: Candidate) -> float:
        """The error's share of the output's energy (its variance, where a bias can be set), 0 to 1.

        For `spatial` and `tucker` on data it is an estimate: that offsets of the kernel see
        independent inputs. The two errors of `tucker` add up.
        """
        match candidate.form:
            case Form.TUCKER:
                both = _tail(self._before[1], candidate.ranks[0])
                return min(1.0, both + _tail(self._after[1], candidate.ranks[1]))
            case Form.SPATIAL:
                return _tail(self._across[1], candidate.ranks[0])
        return _tail(self._after[1], candidate.ranks[0])

    def weights(self, candidate: Candidate) -> tuple[list[np.ndarray], np.ndarray | None]:
        """The weights of the steps, [outputs, inputs, *kernel] each, and the new bias.

        The bias is the layer's own, or what is to be added to the one behind it; None without data.
        """
        weight, scale = self._known.weight, self._known.scale
        kernel, ranks = weight.shape[2:], candidate.ranks
        ones = (1,) * len(kernel)
        if candidate.form is Form.SPATIAL:
            return self._spatial(ranks[0]), None
        out = self._after[0][:, : ranks[-1]]
        last = (out / scale[:, None]).reshape(*out.shape, *ones)
        reduced = np.tensordot((out * scale[:, None]).T, weight, 1)
        steps = [reduced, last]
        if candidate.form is Form.TUCKER:
            basis, restore = self._before[0], self._before[2]
            inner = np.moveaxis(np.tensordot(reduced, restore[:, : ranks[0]], (1, 0)), -1, 1)
            first = basis[:, : ranks[0]].T
            steps = [first.reshape(*first.shape, *ones), inner, last]
        return steps, self._bias(out)

    def _bias(self, out: np.ndarray) -> np.ndarray | None:
        """The bias with which the mean of the outputs is what it was."""
        known = self._known
        if known.mean is None or not known.free:
            return None
        product = known.mean - known.bias
        kept = ((product * known.scale) @ out @ out.T) / known.scale
        bias: np.ndarray = known.mean - kept
        return bias

    @functools.cached_property
    def _after(self) -> tuple[np.ndarray, np.ndarray]:
        """Directions of the outputs (scaled), as columns, and the energy of each, most first."""
        known = self._known
        outputs = len(known.weight)
        matrix = known.weight.reshape(outputs, -1) * known.scale[:, None]
        if known.outputs is not None:
            return _descending(known.outputs * np.outer(known.scale, known.scale))
        if known.inputs is not None:  # fewer inputs than outputs: a product
            matrix = matrix @ _root(known.inputs)[0]
        if matrix.shape[1] >= outputs:
            return _descending(matrix @ matrix.T)
        vectors, energy = _descending(matrix.T @ matrix)
        made = matrix @ vectors
        size = np.linalg.norm(made, axis=0)
        return made / np.where(size > 0, size, 1.0), energy

    @functools.cached_property
    def _before(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What to multiply the inputs by, the energy that passes, and what to multiply W by."""
        weight = self._scaled
        root, inverse = self._input_root(weight.shape[1])
        flat = np.moveaxis(weight, 1, 0).reshape(weight.shape[1], -1)
        vectors, energy = _descending(root @ (flat @ flat.T) @ root)
        return inverse @ vectors, energy, root @ vectors

    @functools.cached_property
    def _across(self) -> tuple[np.ndarray, np.ndarray]:
        """Directions of [inputs x height], after whitening, and the energy of each."""
        table = self._table
        if len(table) <= table.shape[1]:
            return _descending(table @ table.T)
        vectors, energy = _descending(table.T @ table)
        made = table @ vectors
        size = np.linalg.norm(made, axis=0)
        return made / np.where(size > 0, size, 1.0), energy

    def _spatial(self, rank: int) -> list[np.ndarray]:
        outputs, inputs, height, width = self._known.weight.shape
        vectors = self._across[0][:, :rank]
        _, inverse = self._input_root(inputs)
        first = np.tensordot(inverse, vectors.reshape(inputs, height, rank), 1)
        last = (vectors.T @ self._table).reshape(rank, width, outputs)
        return [
            np.moveaxis(first, -1, 0)[..., None],
            (np.moveaxis(last, -1, 0) / self._known.scale[:, None, None])[:, :, None, :],
        ]

    @functools.cached_property
    def _table(self) -> np.ndarray:
        """The scaled weight as [inputs x height, width x outputs], inputs whitened."""
        outputs, inputs, height, width = self._known.weight.shape
        root, _ = self._input_root(inputs)
        moved = np.moveaxis(self._scaled, 0, -1)
        table: np.ndarray = np.tensordot(root, moved, 1)
        return table.reshape(inputs * height, width * outputs)

    @property
    def _scaled(self) -> np.ndarray:
        scale, weight = self._known.scale, self._known.weight
        scaled: np.ndarray = weight * scale.reshape(-1, *[1] * (weight.ndim - 1))
        return scaled

    def _input_root(self, size: int) -> tuple[np.ndarray, np.ndarray]:
        if self._known.inputs is None:
            return np.eye(size), np.eye(size)
        return _root(self._known.inputs)


def _tail(energy: np.ndarray, rank: int) -> float:
    """The share of what is not among the first `rank`."""
    whole = float(energy.sum())
    return float(energy[rank:].sum()) / whole if whole > 0 else 0.0


def _descending(symmetric: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvectors as columns, and eigenvalues, greatest first, none below zero."""
    values, vectors = np.linalg.eigh((symmetric + symmetric.T) / 2)
    return vectors[:, ::-1], np.maximum(values[::-1], 0.0)


def _root(moments: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The symmetric square root, and its inverse where there is data."""
    vectors, values = _descending(moments)
    kept = np.maximum(values, _FLOOR * max(float(values[0]), 1e-30))
    root = (vectors * np.sqrt(kept)) @ vectors.T
    return root, (vectors / np.sqrt(kept)) @ vectors.T

"""Networks that a fleet's devices have run: what some of their times say about the others'.

Here: `KnownNets`, the joint Gaussian of logarithms of known networks' times over devices, and
matching a user's models with them. It goes beyond rates: what all devices, or some of a kind, take
more for one network than its kernels explain. Not here: rates (`fleet_terms`), how the Gaussian is
learned from a table with gaps (`fleet_near`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .features import Features
from .fleet_near import TimesPrior
from .fleet_terms import Design, design
from .profile import Correction
from .whole_model import COORDINATES, SCALES, coordinates

Array = NDArray[np.float64]

NOISE = 0.03
"""Deviation of a timing, in logarithms."""
ALIKE = 0.8
"""The similarity, of 1, from which on a model is taken for a known network."""
_RIDGE = 0.05  # on similarities, where the correction is solved for
_LARGEST = 0.3  # of a correction's logarithm


@dataclasses.dataclass(frozen=True, eq=False)
class KnownNets:
    """`points` [nets, coordinates] (`whole_model`), `amounts` [nets, columns] (`fleet_terms`),
    `mean` [nets] and `covariance` of logarithms of milliseconds over devices; `misfit` [nets]: what
    all devices take more than rates explain, as a logarithm."""

    names: tuple[str, ...]
    points: Array
    amounts: Array
    mean: Array
    covariance: Array
    misfit: Array

    @classmethod
    def learn(
        cls,
        logs: Array,
        models: Mapping[str, Sequence[Features]],
        misfit: Array,
        weights: Array,
    ) -> KnownNets:
        """From logarithms of times, [devices, models], NaN where there is none."""
        prior = TimesPrior.fit(logs, weights)
        return cls(
            tuple(models),
            np.array([coordinates(kernels) for kernels in models.values()]),
            design(list(models.values())).amounts,
            np.average(prior.logs, axis=0, weights=weights),
            prior.covariance,
            misfit,
        )

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> KnownNets:
        """The inverse of `as_dict`.

        Raises:
            KeyError, ValueError: something is missing or of another size.
        """
        names = tuple(data["names"])
        size = len(names)
        covariance = np.zeros((size, size))
        covariance[np.tril_indices(size)] = data["covariance"]
        covariance += np.tril(covariance, -1).T
        points = np.asarray(data["points"], float).reshape(size, len(COORDINATES))
        amounts = design([()] * size).amounts
        for row, column, amount in data["amounts"]:
            amounts[int(row), int(column)] = amount
        mean, misfit = (np.asarray(data[key], float).reshape(size) for key in ("mean", "misfit"))
        return cls(names, points, amounts, mean, covariance, misfit)

    def as_dict(self) -> dict[str, Any]:
        """Plain data: of the amounts those above 0 as [net, column, amount], of the covariance the
        lower triangle, by rows."""
        lower = self.covariance[np.tril_indices(len(self.names))]
        return {
            "names": list(self.names),
            "points": np.round(self.points, 4).tolist(),
            "amounts": [
                [int(row), int(column), float(self.amounts[row, column])]
                for row, column in np.argwhere(self.amounts)
            ],
            "mean": np.round(self.mean, 4).tolist(),
            "misfit": np.round(self.misfit, 4).tolist(),
            "covariance": np.round(lower, 5).tolist(),
        }

    @property
    def rows(self) -> Design:
        """The known networks as rows of amounts."""
        return Design(self.amounts, design([()]).uses)

    def find(self, models: Sequence[Sequence[Features]]) -> NDArray[np.intp]:
        """The position of the known network that each model is like, -1 where it is like none."""
        found = np.full(len(models), -1)
        if not len(self.names):
            return found
        for index, kernels in enumerate(models):
            similar = _similarity(coordinates(kernels)[None], self.points)[0]
            best = int(similar.argmax())
            found[index] = best if similar[best] >= ALIKE else -1
        return found

    def predict(self, known: NDArray[np.intp], logs: Array) -> Array:
        """Logarithms of a device's times of all networks, [nets], from those of `known`.

        Outliers among `logs` count less: errors are Student's t.
        """
        mean = self.mean + np.median(logs - self.mean[known])
        residual = logs - mean[known]
        noise = np.full(len(known), NOISE**2)
        for _ in range(3):
            inner = self.covariance[np.ix_(known, known)] + np.diag(noise)
            solved = np.linalg.solve(inner, residual)
            noise = NOISE**2 * (1.0 + (noise * solved / NOISE) ** 2 / 3.0)
        found: Array = mean + self.covariance[:, known] @ solved
        return found

    def correction(self, apart: Array) -> Correction:
        """A factor on whole models: exp(`apart`) at the known networks, towards 1 elsewhere."""
        wanted = apart.clip(-_LARGEST, _LARGEST)
        similar = _similarity(self.points, self.points)
        weights = np.linalg.solve(similar + _RIDGE * np.eye(len(wanted)), wanted)
        return Correction(COORDINATES, SCALES, self.points, weights)


def _similarity(left: Array, right: Array) -> Array:
    squares = (((left[:, None] - right[None]) / SCALES) ** 2).sum(2)
    found: Array = np.exp(-0.5 * squares)
    return found
